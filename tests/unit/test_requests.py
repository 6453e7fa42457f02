"""Requests and answers as bytes: the sizes of linux/fuse.h, device numbers, listings, and what each call of the table reads."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from mirrorfs.kernel import protocol, requests
from mirrorfs.kernel.protocol import Opcode
from mirrorfs.kernel.requests import TABLE, Caller, KernelAnswers, Listed

SIZES = {
    "IN_HEADER": 40,
    "OUT_HEADER": 16,
    "INIT_OUT": 64,
    "ATTR": 88,
    "ENTRY_HEAD": 40,
    "ATTR_HEAD": 16,
    "OPEN_OUT": 16,
    "WRITE_OUT": 8,
    "GETXATTR_OUT": 8,
    "LSEEK_OUT": 8,
    "STATFS_OUT": 80,
    "STATX_HEAD": 32,
    "STATX": 256,
    "DIRENT": 24,
    "SETATTR_IN": 88,
    "MKNOD_IN": 16,
    "MKDIR_IN": 8,
    "RENAME2_IN": 16,
    "OPEN_IN": 8,
    "CREATE_IN": 16,
    "RELEASE_IN": 24,
    "READ_IN": 40,
    "WRITE_IN": 40,
    "FSYNC_IN": 16,
    "SETXATTR_IN": 8,
    "FALLOCATE_IN": 32,
    "LSEEK_IN": 24,
    "COPY_FILE_RANGE_IN": 56,
    "BATCH_FORGET_IN": 8,
    "FORGET_ONE": 16,
    "INVALIDATE_INODE": 24,
    "INVALIDATE_ENTRY": 16,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_struct_has_the_size_that_the_kernel_gives_it(name: str, size: int) -> None:
    assert getattr(protocol, name).size == size


@pytest.mark.parametrize(("major", "minor"), [(1, 3), (8, 0), (259, 65536 + 17), (4095, (1 << 20) - 1)])
def test_a_device_number_survives_the_way_to_the_kernel_and_back(major: int, minor: int) -> None:
    number = os.makedev(major, minor)
    assert requests._device(requests._kernel_device(number)) == number
    assert requests._kernel_device(number) >> 32 == 0


def test_times_before_1970_are_told_as_they_are() -> None:
    status: Any = SimpleNamespace(**dict.fromkeys(_STATUS, 0), st_atime_ns=-1, st_mtime_ns=-1_500_000_000, st_ctime_ns=5)
    fields = protocol.ATTR.unpack(requests._attr(1, status))
    assert fields[3] == (1 << 64) - 1
    assert fields[6] == 999_999_999
    assert requests._nanoseconds(fields[4], fields[7]) == -1_500_000_000


_STATUS = ("st_size", "st_blocks", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_blksize")


def _entry(number: int) -> bytes:
    status: Any = SimpleNamespace(**dict.fromkeys(_STATUS, 0), st_atime_ns=0, st_mtime_ns=0, st_ctime_ns=0)
    status.st_mode = 0o100644
    return KernelAnswers().entry(number, status, 1)


def test_a_listing_takes_what_it_has_room_for_and_no_more() -> None:
    one = len(_entry(1)) + protocol.DIRENT.size + 8
    listed = Listed(2 * one)
    assert listed.add(b"longer", _entry(7), 1)
    assert listed.add(b"b", _entry(8), 2)
    assert not listed.add(b"c", _entry(9), 3)
    data = b"".join(listed.parts)
    assert len(data) == 2 * one
    number, following, length, kind = protocol.DIRENT.unpack_from(data, len(_entry(1)))
    assert (number, following, length, kind) == (7, 1, 6, 8)


def test_a_name_that_leads_to_nothing_is_told_only_if_it_can_be_taken_back() -> None:
    answers = KernelAnswers()
    assert answers.nothing(10) is None
    answers.can_forget_nothing = True
    assert protocol.ENTRY_HEAD.unpack_from(answers.nothing(10) or b"") == (0, 0, 10, 0, 0, 0)


class Recorder:
    """Takes any call of the file system, and says what it was given."""

    def __getattr__(self, name: str) -> Any:
        async def raw(*arguments: Any) -> Any:
            self.called = name, [a for a in arguments if not isinstance(a, Caller | Recorder)]
            return 7

        raw.__wrapped__ = raw  # type: ignore[attr-defined]
        return raw


def _call(opcode: Opcode, node: int, body: bytes) -> tuple[str, list[Any], Any]:
    recorder: Any = Recorder()
    coroutine = TABLE[opcode](recorder, node, memoryview(body), Caller(1, 2, 3))
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return recorder.called[0], recorder.called[1], stop.value
    raise AssertionError("it waits")


def test_a_rename_reads_both_names() -> None:
    body = protocol.RENAME2_IN.pack(5, 2, 0) + b"old name\0new\0"
    assert _call(Opcode.RENAME2, 4, body)[:2] == ("rename", [4, b"old name", 5, b"new", 2])


def test_an_attribute_may_hold_any_bytes() -> None:
    body = protocol.SETXATTR_IN.pack(5, 1) + b"user.a\0" + b"\0x\0y\0"
    assert _call(Opcode.SETXATTR, 4, body)[:2] == ("setxattr", [4, b"user.a", b"\0x\0y\0", 1])


def test_a_write_reads_as_much_as_it_says() -> None:
    body = protocol.WRITE_IN.pack(9, 4096, 4, 0, 0, os.O_DSYNC, 0) + b"data and more"
    name, arguments, answer = _call(Opcode.WRITE, 4, body)
    assert (name, arguments) == ("write", [9, 4096, b"data", os.O_DSYNC])
    assert answer == protocol.WRITE_OUT.pack(7, 0)


def test_a_copy_names_both_files() -> None:
    body = protocol.COPY_FILE_RANGE_IN.pack(1, 10, 99, 2, 20, 300, 0)
    assert _call(Opcode.COPY_FILE_RANGE, 4, body)[:2] == ("copy_file_range", [1, 10, 2, 20, 300])
