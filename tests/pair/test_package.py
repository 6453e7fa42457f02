"""The Debian package: built, installed, used, removed."""

import gzip
import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs import __version__
from mirrorfs.lab.pair import Lab, wait_for

_CLEAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

pytestmark = pytest.mark.root


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=_CLEAN, cwd="/", check=False)


def _purge() -> subprocess.CompletedProcess[str]:
    """Remove it; what other tests have mounted is none of its business."""
    return _run("unshare", "--mount", "sh", "-c", "umount --lazy --all --types fuse.mirrorfs; dpkg --purge mirrorfs")


def _is_installed() -> bool:
    return "installed" in _run("dpkg-query", "-W", "-f=${db:Status-Status}", "mirrorfs").stdout.split("-")


@pytest.fixture(scope="module")
def package(built_package: Path) -> Iterator[Path]:
    """The package, installed; removed at the end."""
    if _is_installed():
        pytest.skip("mirrorfs is installed on this machine, and stays")
    try:
        installed = _run("dpkg", "--install", built_package)
        assert installed.returncode == 0, installed.stderr
        yield built_package
    finally:
        _purge()


def test_what_is_in_it_belongs_to_root_and_has_its_place(package: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[1] for line in listed} == {"root/root"}
    names = [line.split()[5].removeprefix(".") for line in listed]
    for name in (
        "/usr/bin/mirrorfs",
        "/usr/sbin/mount.fuse.mirrorfs",
        "/usr/lib/systemd/system/mirrorfs@.service",
        "/usr/lib/systemd/system/mirrorfs-controller@.service",
        "/usr/lib/ocf/resource.d/mirrorfs/volume",
        "/usr/share/doc/mirrorfs/README.md",
        "/usr/share/doc/mirrorfs/ansible/roles/mirrorfs/tasks/main.yml",
        "/usr/share/doc/mirrorfs/copyright",
        "/usr/share/man/man1/mirrorfs-mount.1.gz",
        "/usr/share/man/man5/mirrorfs.toml.5.gz",
        "/usr/share/zsh/vendor-completions/_mirrorfs",
        "/usr/share/fish/vendor_completions.d/mirrorfs.fish",
    ):
        assert name in names
    assert not [name for name in names if "/_pytest/" in name or "/matplotlib/" in name]


def test_the_program_runs_with_an_environment_of_its_own(package: Path) -> None:
    done = _run("mirrorfs", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mirrorfs {__version__}\n", "")
    looked = _run("mirrorfs", "doctor")
    assert looked.returncode == 0, looked.stdout


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man here")
def test_the_manual_is_found(package: Path) -> None:
    for page in ("mirrorfs", "mirrorfs-split-brain-resolve", "mirrorfs.toml"):
        found = _run("man", "-w", page)
        assert found.returncode == 0, found.stderr
        assert gzip.decompress(Path(found.stdout.strip()).read_bytes()).startswith(b".TH ")
    assert "mirrorfs mount [OPTIONS] [PATH]" in _run("man", "mirrorfs-mount").stdout


def test_bash_completes_the_commands(package: Path) -> None:
    script = "/usr/share/bash-completion/completions/mirrorfs"
    assert "mirrorfs status " in _typed(f"source {script}", "mirrorfs sta\t", "mirrorfs status ")


def _typed(first: str, keys: str, expected: str) -> str:
    """What an interactive bash shows after a line and some keys: up to what is expected, or 20 s long."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], {**_CLEAN, "TERM": "dumb"})
    try:
        # The terminal shows what is typed, too: so the quotes.
        os.write(terminal, f"{first}; echo it' 'is' 'read\n".encode())
        _read_until(terminal, "it is read")
        os.write(terminal, keys.encode())
        return _read_until(terminal, expected)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def _read_until(terminal: int, expected: str) -> str:
    shown, end = "", time.monotonic() + 20
    while expected not in shown and (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 65536).decode()
    return shown


def test_a_node_of_the_package_mounts_and_keeps_the_package_installed(
    package: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Lab.create(tmp_path_factory.mktemp("lab")) as lab:
        host = lab.one
        node = host.popen(
            "mirrorfs", "--config", host.config, "mount", host.mount, env=_CLEAN, cwd="/", stderr=subprocess.DEVNULL
        )
        try:
            wait_for(host.answers, "it answers")
            (pid,) = {pid for pid in lab.network.pids("one") if "mirrorfs" in Path(f"/proc/{pid}/cmdline").read_text()}
            assert "/usr/lib/mirrorfs/" in Path(f"/proc/{pid}/maps").read_text()
            refused = _run("dpkg", "--remove", "mirrorfs")
            assert refused.returncode != 0
            assert "unmount it first: mirrorfs unmount" in refused.stderr
            assert host.answers()
            assert host.run("mirrorfs", "--config", host.config, "unmount", env=_CLEAN, capture_output=True).returncode == 0
        finally:
            node.terminate()
            node.wait(timeout=30)


def test_nothing_is_left_of_it(package: Path) -> None:
    files = [line for line in _run("dpkg", "--listfiles", "mirrorfs").stdout.splitlines() if "mirrorfs" in line]
    assert len(files) > 1000
    purged = _purge()
    assert purged.returncode == 0, purged.stderr
    assert [file for file in files if os.path.lexists(file)] == []
