"""truncate, ftruncate, fallocate, and the limits of a file's size."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOTH,
    NEITHER,
    as_alice,
    errno_of,
    fallocate,
    in_child,
    make,
    mkdir,
    opened,
    read,
    refused,
    touch,
    watching,
)

Truncate = Callable[[Path, int], None]
GIB = 1 << 30


def _by_descriptor(path: Path, size: int) -> None:
    with opened(path, os.O_WRONLY) as file:
        os.ftruncate(file, size)


both_ways = pytest.mark.parametrize("truncate", [os.truncate, _by_descriptor], ids=["truncate", "ftruncate"])


@both_ways
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12_345])
def test_what_remains_is_the_beginning(here: Path, truncate: Truncate, size: int) -> None:
    data = os.urandom(12_346)
    touch(here / "file", data=data)
    with watching(here / "file") as target, watching(here) as parent:
        truncate(here / "file", size)
    assert read(here / "file") == data[:size]
    assert (target.changed, parent.changed) == (BOTH, NEITHER)


@both_ways
@pytest.mark.parametrize("size", [5, 4096, 4097, 1_234_567])
def test_what_is_added_is_zeros(here: Path, truncate: Truncate, size: int) -> None:
    touch(here / "file", data=b"data")
    with watching(here / "file") as target:
        truncate(here / "file", size)
    assert read(here / "file") == b"data" + bytes(size - 4)
    assert target.changed == BOTH


@pytest.mark.parametrize("size", [100, 4096, 5000])
def test_what_was_cut_off_does_not_come_back(here: Path, size: int) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.write(file, b"x" * 20_000)
        os.ftruncate(file, size)
        os.ftruncate(file, 20_000)
        assert os.pread(file, 30_000, 0) == b"x" * size + bytes(20_000 - size)


def test_a_large_hole_takes_no_space(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.ftruncate(file, 100 * GIB)
        attributes = os.fstat(file)
        assert attributes.st_size == 100 * GIB
        assert attributes.st_blocks * 512 < 1 << 20
        assert os.pread(file, 4096, 99 * GIB) == bytes(4096)
    os.unlink(here / "file")


@both_ways
def test_a_negative_size_is_refused(here: Path, truncate: Truncate) -> None:
    touch(here / "file", data=b"data")
    with refused(errno.EINVAL):
        truncate(here / "file", -1)
    assert read(here / "file") == b"data"


@both_ways
def test_a_size_that_no_file_can_have_is_refused(here: Path, truncate: Truncate) -> None:
    touch(here / "file", data=b"data")
    with refused(errno.EFBIG, errno.EINVAL):
        truncate(here / "file", (1 << 63) - 1)
    assert read(here / "file") == b"data"


def test_a_write_beyond_what_a_file_can_hold_is_refused(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_WRONLY) as file:
        with refused(errno.EFBIG):
            os.pwrite(file, b"x", (1 << 62))
        assert os.fstat(file).st_size == 0


def test_a_directory_is_not_truncated(here: Path) -> None:
    mkdir(here / "directory")
    with refused(errno.EISDIR):
        os.truncate(here / "directory", 0)
    with opened(here / "directory") as directory, refused(errno.EINVAL, errno.EBADF):
        os.ftruncate(directory, 0)


@pytest.mark.parametrize("kind", ["fifo", "socket", "character device"])
def test_only_a_file_is_truncated(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with refused(errno.EINVAL):
        os.truncate(here / "name", 0)


def test_a_descriptor_for_reading_does_not_truncate(here: Path) -> None:
    touch(here / "file", data=b"data")
    with opened(here / "file") as file, refused(errno.EINVAL, errno.EBADF):
        os.ftruncate(file, 0)


@pytest.mark.parametrize(("mode", "may"), [(0o666, True), (0o222, True), (0o644, False), (0o555, False)])
def test_truncating_asks_for_write_permission(here: Path, mode: int, may: bool) -> None:
    touch(here / "file", mode, data=b"data")
    with watching(here / "file") as target:
        assert as_alice(lambda: errno_of(lambda: os.truncate(here / "file", 1))) == (0 if may else errno.EACCES)
    assert target.changed == (BOTH if may else NEITHER)


def test_a_descriptor_truncates_although_the_permission_is_gone(here: Path) -> None:
    touch(here / "file", 0o666, owner=(ALICE, ALICE), data=b"data")

    def truncate() -> None:
        with opened(here / "file", os.O_WRONLY) as file:
            os.chmod(here / "file", 0)
            os.ftruncate(file, 2)

    as_alice(truncate)
    assert read(here / "file") == b"da"


def test_a_truncation_is_seen_through_other_descriptors(here: Path) -> None:
    touch(here / "file", data=b"0123456789")
    with opened(here / "file") as reader, opened(here / "file", os.O_WRONLY) as writer:
        assert os.read(reader, 5) == b"01234"
        os.ftruncate(writer, 7)
        assert os.read(reader, 10) == b"56"
        os.ftruncate(writer, 2)
        assert os.read(reader, 10) == b""
        os.ftruncate(writer, 9)
        assert os.read(reader, 10) == bytes(2)


def test_the_limit_on_the_size_of_a_file_holds(here: Path) -> None:
    def write_to_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
            assert os.write(file, b"x" * 9_000) == 9_000
            assert os.write(file, b"y" * 9_000) == 1_000
            with refused(errno.EFBIG):
                os.write(file, b"z")
            with refused(errno.EFBIG):
                os.ftruncate(file, 10_001)
            os.ftruncate(file, 10_000)
        with refused(errno.EFBIG):
            os.truncate(here / "file", 20_000)

    in_child(write_to_the_limit)
    assert read(here / "file") == b"x" * 9_000 + b"y" * 1_000


def test_posix_fallocate_makes_a_file_as_long_as_asked(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.write(file, b"data")
        os.posix_fallocate(file, 0, 100_000)
        assert os.fstat(file).st_size == 100_000
        os.posix_fallocate(file, 10, 100)
        assert os.fstat(file).st_size == 100_000
    assert read(here / "file") == b"data" + bytes(99_996)


KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
DATA = bytes(range(1, 256)) * 200
TAIL_BYTES = len(DATA) - 40_000


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (0, DATA + bytes(20_000 - TAIL_BYTES)),
        (KEEP_SIZE, DATA),
        (PUNCH_HOLE | KEEP_SIZE, DATA[:40_000] + bytes(TAIL_BYTES)),
        (ZERO_RANGE, DATA[:40_000] + bytes(20_000)),
        (ZERO_RANGE | KEEP_SIZE, DATA[:40_000] + bytes(TAIL_BYTES)),
    ],
    ids=["allocate", "keep size", "punch hole", "zero range", "zero range and keep size"],
)
def test_fallocate_does_what_it_says_or_is_not_supported(here: Path, mode: int, expected: bytes) -> None:
    touch(here / "file", data=DATA)
    with opened(here / "file", os.O_RDWR) as file:
        code = errno_of(lambda: fallocate(file, mode, 40_000, 20_000))
    assert code in (0, errno.EOPNOTSUPP)
    assert read(here / "file") == (DATA if code else expected)


@pytest.mark.parametrize("mode", [COLLAPSE_RANGE, INSERT_RANGE], ids=["collapse", "insert"])
def test_fallocate_moves_data_or_is_not_supported(here: Path, mode: int) -> None:
    touch(here / "file", data=DATA)
    block = os.statvfs(here).f_bsize
    with opened(here / "file", os.O_RDWR) as file:
        code = errno_of(lambda: fallocate(file, mode, block, block))
    assert code in (0, errno.EOPNOTSUPP)
    moved = DATA[:block] + (DATA[2 * block :] if mode == COLLAPSE_RANGE else bytes(block) + DATA[block:])
    assert read(here / "file") == (DATA if code else moved)
