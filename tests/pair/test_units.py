"""What units of systemd and lines of fstab rely on: where to mount, signs of life, and what mount(8) calls."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Host, Lab, wait_for

pytestmark = pytest.mark.root
_HELPER = Path(__file__).parents[2] / "packaging" / "mount.fuse.mirrorfs"


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Lab.create(tmp_path_factory.mktemp("lab")) as lab:
        yield lab.one


def _mount(host: Host, **environment: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "mirrorfs", "--config", host.config, "mount")
    mounting: subprocess.Popen[str] = host.popen(*command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    return mounting


def test_mount_without_a_path_takes_that_of_the_configuration_and_shows_life(host: Host) -> None:
    host.config.write_text(f'mount = "{host.mount}"\n' + host.config.read_text())
    address = str(host.home / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(30)
        mounting = _mount(host, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        try:
            said = [systemd.recv(100) for _ in range(4)]
            assert os.path.ismount(host.mount)
        finally:
            mounting.terminate()
            mounting.communicate(timeout=30)
    assert said == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]


def test_without_either_it_says_what_to_do(host: Host) -> None:
    mounting = _mount(host)
    _, said = mounting.communicate(timeout=30)
    assert mounting.returncode == 2
    assert said == f'mirrorfs: where? Give PATH, or write mount = "/data" into {host.config}\n'


def test_the_log_is_lines_of_json_where_that_is_asked_for(host: Host) -> None:
    host.config.write_text(f'mount = "{host.mount}"\n' + host.config.read_text())
    mounting = _mount(host, MIRRORFS_LOG_FORMAT="json")
    try:
        wait_for(host.answers, "it answers")
    finally:
        mounting.terminate()
        _, said = mounting.communicate(timeout=30)
    lines = [json.loads(line) for line in said.splitlines()]
    assert {(line["volume"], line["node"]) for line in lines} == {("lab", "one")}
    assert "node-stopping" in [line.get("event") for line in lines]


# ---- mount(8) and fstab


def _helper(host: Host, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What mount(8) calls, with a `mirrorfs` on its path as the package installs one."""
    programs = host.home / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "mirrorfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m mirrorfs "$@"\n')
    (programs / "mirrorfs").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "MIRRORFS_LOGS": str(host.home / "logs")}
    return host.run(_HELPER, *arguments, env=environment, capture_output=True, text=True, timeout=60)


def test_mount_of_that_type_returns_once_it_is_mounted(host: Host) -> None:
    done = _helper(host, host.config, host.mount, "-o", "rw,_netdev,nofail")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.path.ismount(host.mount)
    host.wait_answering()
    again = _helper(host, host.config, host.mount)
    assert (again.returncode, again.stderr) == (
        32,
        f"mount.fuse.mirrorfs: {host.mount}: a mirrorfs is mounted there already\n",
    )
    assert "certificate of the link" in (host.home / "logs" / "mirrorfs.log").read_text()


def test_a_mount_that_fails_says_why_in_one_line(host: Host) -> None:
    host.config.write_text('volume = "v"\n')
    done = _helper(host, host.config, host.mount)
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1
    assert "nodes: missing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give NAME PATH"),
        (("no-such-volume", "/data"), "/etc/mirrorfs/no-such-volume.toml: is not there"),
        (("v", "/data", "-o", "ro"), "it is the primary"),
        (("v", "/data", "-x"), "-x is not known here"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(host: Host, arguments: tuple[str, ...], said: str) -> None:
    done = _helper(host, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
