"""`mirrorfs support`: what is in the archive, and what must never be."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Host, Lab

pytestmark = pytest.mark.root

_SECRET = "hunter2hunter2"
_SERVICES = f"""
[arbiter]
kind = "etcd"
endpoints = ["https://127.0.0.1:1"]
user = "{_SECRET}"
password_file = "/nowhere/password"
timeout = "100ms"
[failover]
vip_up = "up --password {_SECRET}"
vip_down = "down"
[[service]]
name = "database"
start = "start --password={_SECRET}"
stop = "stop -p{_SECRET}"
[[service.check]]
command = "PGPASSWORD={_SECRET} psql"
[[service.check]]
http = "http://root:{_SECRET}@127.0.0.1:1/health"
"""


def _support(host: Host, file: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mirrorfs", "--config", host.config, "support", file, *more)
    return host.run(*command, capture_output=True, text=True)


def _parts(file: Path) -> dict[str, str]:
    with tarfile.open(file) as archive:
        parts = {}
        for member in archive.getmembers():
            content = archive.extractfile(member)
            assert content is not None
            parts[member.name.removeprefix("mirrorfs-support/")] = content.read().decode()
    return parts


def test_the_archive_has_what_helps_and_no_secrets(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    file = tmp_path / "support.tar.gz"
    with Lab.create(tmp_path_factory.mktemp("lab")) as lab:
        host = lab.one
        host.config.write_text(host.config.read_text() + _SERVICES)
        (host.mount / "name-of-a-file").write_text("content-of-a-file")
        (host.keys / "link.pem").write_text("PRIVATE KEY of the link")
        done = _support(host, file, "--log", host.log)
        assert done.returncode == 0, done.stderr
        secrets = [(host.keys / "identity.key").read_text().splitlines()[1], "PRIVATE KEY", _SECRET]
    parts = _parts(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert {"versions", "configuration", "doctor", "status.json", "mounts", "keys-directory", "log"} <= parts.keys()
    assert sorted(done.stdout.split("\n")[:-2]) == sorted(parts)
    assert "nodes.one.address" in parts["configuration"]
    assert "identity.key" in parts["keys-directory"]
    assert "no mirrorfs node is running" in parts["status.json"]
    for name, content in parts.items():
        for secret in (*secrets, "name-of-a-file", "content-of-a-file"):
            assert secret not in content, name


def test_of_a_node_that_runs_there_are_its_status_and_its_log(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    file = tmp_path / "support.tar.gz"
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        assert _support(lab.one, file, "--log", lab.one.log).returncode == 0
        again = _support(lab.one, file)
    assert (again.returncode, again.stderr) == (1, f"mirrorfs: {file}: is there already, give another name\n")
    parts = _parts(file)
    assert '"state": "primary"' in parts["status.json"]
    assert "two is in sync" in parts["log"]
    assert "ok       keys" in parts["doctor"]
