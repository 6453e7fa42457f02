"""What stat and statvfs say: numbers, sizes, blocks, links."""

import os
import stat
from pathlib import Path

import pytest

from tests.posix.support import KINDS, make, mkdir, opened, touch


def test_numbers_are_unique(here: Path) -> None:
    for kind in KINDS:
        for number in range(20):
            make(kind, here / f"{kind}-{number}")
    numbers = {os.lstat(here / name).st_ino for name in os.listdir(here)} | {here.stat().st_ino}
    assert len(numbers) == 20 * len(KINDS) + 1
    assert 0 not in numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_stays_through_renames_and_changes(here: Path, kind: str) -> None:
    make(kind, here / "old")
    number = os.lstat(here / "old").st_ino
    mkdir(here / "directory")
    os.rename(here / "old", here / "directory" / "new")
    os.lchown(here / "directory" / "new", 1, 1)
    os.rename(here / "directory", here / "renamed")
    assert os.lstat(here / "renamed" / "new").st_ino == number


def test_a_number_is_the_same_by_name_by_descriptor_and_in_the_listing(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        [entry] = os.scandir(here)
        assert os.fstat(file).st_ino == os.stat(here / "file").st_ino == entry.inode()
        os.write(file, b"data")
        os.fsync(file)
    assert entry.inode() == os.stat(here / "file").st_ino


def test_everything_lies_on_the_same_device(place: Path, here: Path) -> None:
    for kind in KINDS:
        make(kind, here / kind)
    devices = {os.lstat(here / kind).st_dev for kind in KINDS}
    assert devices == {place.stat().st_dev}


def test_only_devices_have_device_numbers(here: Path) -> None:
    for kind in ("file", "directory", "symlink", "fifo", "socket"):
        make(kind, here / kind)
        assert os.lstat(here / kind).st_rdev == 0


def test_blocks_tell_what_a_file_takes(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        assert os.fstat(file).st_blocks * 512 <= 4096
        os.write(file, os.urandom(1 << 20))
        os.fsync(file)
        full = os.fstat(file).st_blocks * 512
        assert 1 << 20 <= full <= 2 << 20
        os.ftruncate(file, 0)
        os.fsync(file)
        assert os.fstat(file).st_blocks * 512 <= 8192


def test_a_hole_in_the_middle_takes_no_blocks(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.pwrite(file, b"begin", 0)
        os.pwrite(file, b"end", 64 << 20)
        os.fsync(file)
        assert 0 < os.fstat(file).st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"file", "directory", "symlink"}))
def test_what_holds_no_data_has_no_size(here: Path, kind: str) -> None:
    assert os.lstat(make(kind, here / "name")).st_size == 0


def test_block_size_is_sensible(here: Path) -> None:
    assert 512 <= touch(here / "file").stat().st_blksize <= 16 << 20


def test_the_file_system_tells_its_limits(here: Path) -> None:
    limits = os.statvfs(here)
    assert limits.f_namemax == 255
    assert limits.f_bsize >= 512
    assert limits.f_frsize >= 512
    assert 0 < limits.f_bavail <= limits.f_bfree <= limits.f_blocks
    assert 0 < limits.f_ffree <= limits.f_files
    assert os.pathconf(here, "PC_NAME_MAX") == 255


def test_the_file_system_tells_the_same_everywhere(here: Path) -> None:
    for kind in ("file", "directory"):
        make(kind, here / kind)
    sizes = {os.statvfs(here / kind).f_blocks for kind in ("file", "directory")}
    with opened(here / "file") as file:
        sizes.add(os.fstatvfs(file).f_blocks)
    assert sizes == {os.statvfs(here).f_blocks}


def test_the_kind_cannot_be_changed(here: Path) -> None:
    make("file", here / "file")
    os.chmod(here / "file", stat.S_IFDIR | 0o700)
    assert stat.S_ISREG(os.stat(here / "file").st_mode)


def test_attributes_are_the_same_by_name_and_by_entry(here: Path) -> None:
    touch(here / "file", 0o4711, owner=(7, 8), data=b"data")
    by_name = os.stat(here / "file")
    with os.scandir(here) as entries:
        [by_entry] = [entry.stat() for entry in entries]
    for name in ("st_mode", "st_uid", "st_gid", "st_size", "st_nlink", "st_mtime_ns", "st_ctime_ns", "st_ino"):
        assert getattr(by_name, name) == getattr(by_entry, name)
