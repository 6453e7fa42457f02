"""read and write in all their forms."""

import ctypes
import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.posix.support import errno_of, in_child, opened, read, refused, start_child, touch

GIB = 1 << 30


@pytest.fixture
def file(here: Path) -> Iterator[int]:
    """A descriptor of an empty file, for reading and writing."""
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        yield file


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 131_072, 131_073, 4 << 20])
@pytest.mark.parametrize("offset", [0, 1, 4095, 65_537])
def test_what_was_written_is_read(file: int, size: int, offset: int) -> None:
    data = os.urandom(size)
    assert os.pwrite(file, data, offset) == size
    assert os.pread(file, size + 10, offset) == data
    assert os.fstat(file).st_size == (offset + size if size else 0)
    if size:
        assert os.pread(file, offset, 0) == bytes(offset)


def test_a_gap_beyond_the_end_reads_as_zeros(file: int) -> None:
    os.write(file, b"begin")
    os.lseek(file, 100_000, os.SEEK_SET)
    os.write(file, b"end")
    assert os.pread(file, 200_000, 0) == b"begin" + bytes(99_995) + b"end"


@pytest.mark.parametrize("offset", [2 * GIB - 1, 2 * GIB, 4 * GIB - 3, 4 * GIB, 5 * GIB, 1 << 42])
def test_offsets_have_64_bits(here: Path, file: int, offset: int) -> None:
    assert os.pwrite(file, b"far away", offset) == 8
    assert os.pread(file, 100, offset - 2) == b"\0\0far away"
    assert os.stat(here / "file").st_size == offset + 8
    assert os.pread(file, 10, (offset + 8) & 0xFFFFFFFF) == (b"" if offset + 8 < 4 * GIB else bytes(10))
    os.unlink(here / "file")


def test_reading_at_and_beyond_the_end_returns_nothing(file: int) -> None:
    os.write(file, b"data")
    assert os.read(file, 10) == b""
    assert os.pread(file, 10, 3) == b"a"
    assert os.pread(file, 10, 4) == b""
    assert os.pread(file, 10, 1 << 40) == b""


def test_vectors_are_gathered_and_scattered_in_order(file: int) -> None:
    parts = [b"one", b"", b"three", b"x" * 10_000]
    assert os.writev(file, parts) == 10_008
    assert os.pwritev(file, [b"ON", b"E"], 0) == 3
    buffers = [bytearray(2), bytearray(6), bytearray(20_000)]
    assert os.preadv(file, buffers, 0) == 10_008
    assert b"".join(buffers)[:10_008] == b"ONEthree" + b"x" * 10_000
    os.lseek(file, 3, os.SEEK_SET)
    assert os.readv(file, buffers[:2]) == 8
    assert b"".join(buffers[:2]) == b"threexxx"


def test_pread_and_pwrite_leave_the_offset(file: int) -> None:
    os.write(file, b"0123456789")
    os.lseek(file, 5, os.SEEK_SET)
    os.pwrite(file, b"AB", 0)
    os.pread(file, 3, 7)
    assert os.lseek(file, 0, os.SEEK_CUR) == 5


def test_duplicates_share_an_offset_and_separate_opens_do_not(here: Path, file: int) -> None:
    duplicate = os.dup(file)
    os.write(file, b"first")
    os.write(duplicate, b"second")
    os.close(duplicate)
    in_child(lambda: os.write(file, b"third"))
    assert read(here / "file") == b"firstsecondthird"
    assert os.lseek(file, 0, os.SEEK_CUR) == 16
    with opened(here / "file", os.O_RDWR) as other:
        os.write(other, b"FIRST")
        assert os.lseek(other, 0, os.SEEK_CUR) == 5
    assert os.pread(file, 6, 0) == b"FIRSTs"


def test_a_write_by_one_process_is_read_by_another_at_once(here: Path, file: int) -> None:
    for number in range(20):
        data = f"{number:06}".encode() * 100
        os.pwrite(file, data, 0)
        assert in_child(lambda: read(here / "file")) == data


def test_appends_of_several_processes_do_not_overwrite_each_other(here: Path) -> None:
    def append(letter: bytes) -> None:
        with opened(here / "file", os.O_CREAT | os.O_WRONLY | os.O_APPEND) as file:
            for number in range(150):
                os.write(file, letter * (90 + number % 9) + b"\n")

    children = [start_child(lambda letter=letter: append(letter)) for letter in (b"a", b"b", b"c", b"d")]  # type: ignore[misc]
    for child in children:
        child.result()
    lines = read(here / "file").splitlines()
    assert len(lines) == 600
    for letter in b"abcd":
        assert [len(line) for line in lines if set(line) == {letter}] == [90 + number % 9 for number in range(150)]


@pytest.mark.parametrize(
    ("offset", "whence", "expected"), [(3, os.SEEK_SET, 3), (-1, os.SEEK_END, 9), (5, os.SEEK_END, 15), (2, os.SEEK_CUR, 12)]
)
def test_seeking_goes_where_it_says(file: int, offset: int, whence: int, expected: int) -> None:
    os.write(file, b"0123456789")
    assert os.lseek(file, offset, whence) == expected
    assert os.fstat(file).st_size == 10


@pytest.mark.parametrize(("offset", "whence"), [(-1, os.SEEK_SET), (-11, os.SEEK_END), (-11, os.SEEK_CUR), (0, 99)])
def test_seeking_nowhere_is_refused(file: int, offset: int, whence: int) -> None:
    os.write(file, b"0123456789")
    with refused(errno.EINVAL):
        os.lseek(file, offset, whence)


def test_seeking_for_data_and_holes_never_skips_data(file: int) -> None:
    os.pwrite(file, b"x" * 65_536, 1 << 20)
    os.ftruncate(file, 4 << 20)
    data = os.lseek(file, 0, os.SEEK_DATA)
    hole = os.lseek(file, 1 << 20, os.SEEK_HOLE)
    assert data <= 1 << 20
    assert (1 << 20) + 65_536 <= hole <= 4 << 20
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        with refused(errno.ENXIO):
            os.lseek(file, 4 << 20, whence)


def test_a_closed_descriptor_is_none(here: Path) -> None:
    file = os.open(here / "file", os.O_CREAT | os.O_RDWR)
    os.close(file)
    attempts: list[Callable[[], object]] = [
        lambda: os.read(file, 1),
        lambda: os.write(file, b"x"),
        lambda: os.fsync(file),
    ]
    for attempt in attempts:
        with refused(errno.EBADF):
            attempt()


def test_an_address_that_is_none_is_refused(file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    os.write(file, b"data")
    os.lseek(file, 0, os.SEEK_SET)
    for call in (libc.write, libc.read):
        assert call(file, ctypes.c_void_p(8), ctypes.c_size_t(4)) == -1
        assert ctypes.get_errno() == errno.EFAULT
    assert os.pread(file, 10, 0) == b"data"


@pytest.mark.parametrize("sync", [os.fsync, os.fdatasync])
def test_files_and_directories_are_synced_whatever_they_were_opened_for(here: Path, sync: Callable[[int], None]) -> None:
    touch(here / "file", data=b"data")
    for path, flags in ((here / "file", os.O_RDONLY), (here / "file", os.O_WRONLY), (here, os.O_RDONLY)):
        with opened(path, flags) as descriptor:
            sync(descriptor)


def test_a_fifo_is_not_synced(here: Path) -> None:
    os.mkfifo(here / "fifo")
    with opened(here / "fifo", os.O_RDWR) as fifo, refused(errno.EINVAL):
        os.fsync(fifo)


def test_the_kernel_copies_within_the_file_system(here: Path) -> None:
    data = os.urandom(300_000)
    touch(here / "source", data=data)
    with opened(here / "source") as source, opened(here / "target", os.O_CREAT | os.O_RDWR) as target:
        copied = 0
        while step := os.copy_file_range(source, target, 300_000 - copied, copied, copied):
            copied += step
        assert (copied, read(here / "target")) == (300_000, data)
        assert os.copy_file_range(source, target, 1000, 5000, 100) == 1000
    assert read(here / "target")[100:1100] == data[5000:6000]


def test_sendfile_reads_from_and_writes_to_the_file_system(here: Path) -> None:
    data = os.urandom(200_000)
    touch(here / "source", data=data)
    with opened(here / "source") as source, opened(here / "target", os.O_CREAT | os.O_WRONLY) as target:
        offset = 0
        while step := os.sendfile(target, source, offset, 65_536):
            offset += step
    assert read(here / "target") == data


def test_splice_moves_data_through_a_pipe(here: Path) -> None:
    if not hasattr(os, "splice"):
        pytest.skip("this Python has no os.splice")
    data = os.urandom(50_000)
    touch(here / "source", data=data)
    reader, writer = os.pipe()
    try:
        with opened(here / "source") as source, opened(here / "target", os.O_CREAT | os.O_WRONLY) as target:
            while filled := os.splice(source, writer, 16_384):
                while filled:
                    filled -= os.splice(reader, target, filled)
    finally:
        os.close(reader)
        os.close(writer)
    assert read(here / "target") == data


@pytest.mark.parametrize("seed", range(4))
def test_random_reads_and_writes_agree_with_a_model(here: Path, seed: int) -> None:
    chance = random.Random(seed)
    model = bytearray()
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as one, opened(here / "file", os.O_RDWR) as two:
        for _ in range(150):
            file = chance.choice((one, two))
            offset, length = chance.randrange(200_000), chance.randrange(20_000)
            match chance.choice(("write", "write", "read", "read", "truncate", "append")):
                case "write" | "append" as how:
                    offset = len(model) if how == "append" else offset
                    data = chance.randbytes(length)
                    model.extend(bytes(max(0, offset + length - len(model)) if length else 0))
                    model[offset : offset + length] = data
                    assert os.pwrite(file, data, offset) == length
                case "read":
                    assert os.pread(file, length, offset) == model[offset : offset + length]
                case _:
                    del model[offset:]
                    model.extend(bytes(offset - len(model)))
                    os.ftruncate(file, offset)
            assert os.fstat(file).st_size == len(model)
    assert read(here / "file") == model


def test_errors_leave_a_descriptor_usable(here: Path, file: int) -> None:
    os.write(file, b"data")
    assert errno_of(lambda: os.pwrite(file, b"x", -1)) == errno.EINVAL
    assert errno_of(lambda: os.pread(file, 1, -1)) == errno.EINVAL
    os.write(file, b"!")
    assert read(here / "file") == b"data!"
