"""How databases that cannot be installed here write: fio does it on the mount, then reads it back from both nodes.

Not the databases: only the system calls, their flags and sizes that their vendors document.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Host, Lab
from tests.pair.support import tree_differences

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio"),
]

_DIRECTORY = "io-patterns"
_MIB = 2**20


@pytest.fixture
def directory(mirrored: Lab) -> Iterator[Path]:
    """A directory on the primary's mount."""
    directory = mirrored.one.mount / _DIRECTORY
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def fio(host: Host, *options: str) -> None:
    """Run fio on the mount of a host: each block has a checksum of its own and its place in it. It succeeds."""
    every = ("--name=io", "--thread", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=1")
    place = f"--directory={host.mount / _DIRECTORY}"
    done = subprocess.run(
        ["fio", *every, "--fallocate=none", place, *options], capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, f"on {host.name}: {done.stderr}{done.stdout[:1000]}"


def write_and_read_back(mirrored: Lab, order: str, *options: str) -> None:
    """Write in this order and verify on the primary; then the trees are equal, and the standby has what was written there."""
    assert mirrored.primary() is mirrored.one
    fio(mirrored.one, f"--rw={order}", *options, "--do_verify=1")
    assert tree_differences(mirrored) == []
    fio(mirrored.two, f"--rw={order.replace('write', 'read')}", *options, "--readonly")


DIRECT = ("--direct=1", "--ioengine=libaio")
LOG = ("write", "--direct=1", "--sync=dsync", "--size=2m")


def test_direct_asynchronous_random_writes_of_8_kib(mirrored: Lab, directory: Path) -> None:
    """Oracle with filesystemio_options = SETALL: data files opened O_DIRECT, several writers, many writes on their way."""
    write_and_read_back(mirrored, "randwrite", *DIRECT, "--bs=8k", "--size=8m", "--iodepth=16", "--numjobs=2")
    assert sum(file.stat().st_size for file in directory.iterdir()) == 16 * _MIB


def test_direct_writes_through_io_uring(mirrored: Lab, directory: Path) -> None:
    """MariaDB's InnoDB where the kernel lets it."""
    write_and_read_back(mirrored, "randwrite", "--ioengine=io_uring", "--direct=1", "--bs=16k", "--size=8m", "--iodepth=8")


@pytest.mark.parametrize("size", ["512", "4k", "60k"])
def test_log_writes_that_are_direct_and_synchronous_one_after_the_other(mirrored: Lab, directory: Path, size: str) -> None:
    """The logs: O_DIRECT | O_DSYNC, from a sector to the 60 KiB of a full log block of SQL Server."""
    write_and_read_back(mirrored, *LOG, "--ioengine=psync", f"--bs={size}", *(["--size=128k"] if size == "512" else []))


def test_log_writes_that_are_direct_and_synchronous_several_at_once(mirrored: Lab, directory: Path) -> None:
    """SQL Server keeps several log blocks on their way."""
    write_and_read_back(mirrored, *LOG, "--ioengine=libaio", "--iodepth=8", "--bs=60k")


def test_writes_into_a_file_that_was_allocated_before(mirrored: Lab, directory: Path) -> None:
    """A data file, or a redo log, that is made as a whole and then written: the room is there on both nodes, and stays."""
    file = directory / "preallocated"
    with file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, 8 * _MIB)
    for host in mirrored.hosts.values():
        found = (host.backing / _DIRECTORY / "preallocated").stat()
        assert found.st_size == 8 * _MIB
        assert found.st_blocks * 512 >= 8 * _MIB, f"on {host.name}"
    options = ("randwrite", *DIRECT, "--filename=preallocated", "--bs=64k", "--size=6m", "--fdatasync=16")
    write_and_read_back(mirrored, *options, "--iodepth=8")
    assert file.stat().st_size == 8 * _MIB
    with file.open("rb") as opened:
        opened.seek(6 * _MIB)
        assert opened.read() == bytes(2 * _MIB), "what was only allocated reads as zeros"
