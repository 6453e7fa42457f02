"""The Debian package: built, installed, used, removed."""

import os
import subprocess
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
        "/usr/share/doc/mirrorfs/README.md",
    ):
        assert name in names
    assert not [name for name in names if "/_pytest/" in name or "/matplotlib/" in name]


def test_the_program_runs_with_an_environment_of_its_own(package: Path) -> None:
    done = _run("mirrorfs", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mirrorfs {__version__}\n", "")
    looked = _run("mirrorfs", "doctor")
    assert looked.returncode == 0, looked.stdout


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
