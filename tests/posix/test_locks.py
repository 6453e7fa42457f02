"""flock and fcntl locks between processes."""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import Child, in_child, opened, read, start_child, touch

F_OFD_SETLK = 37


def _flock(file: int, kind: int) -> int:
    return _errno(lambda: fcntl.flock(file, kind | fcntl.LOCK_NB))


def _lockf(file: int, kind: int, length: int = 0, start: int = 0) -> int:
    # Python takes LOCK_UN only alone.
    flags = kind if kind == fcntl.LOCK_UN else kind | fcntl.LOCK_NB
    return _errno(lambda: fcntl.lockf(file, flags, length, start))


def _errno(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except OSError as error:
        # POSIX allows either for a lock that somebody else holds.
        return errno.EAGAIN if error.errno == errno.EACCES else error.errno or -1
    return 0


def _elsewhere(path: Path, attempt: Callable[[int], int]) -> int:
    """What the attempt answers in another process, which opens the file anew."""

    def attempt_there() -> int:
        with opened(path, os.O_RDWR) as file:
            return attempt(file)

    return in_child(attempt_there)


@pytest.fixture
def path(here: Path) -> Path:
    """A file to lock."""
    return touch(here / "file", data=b"0" * 100)


@pytest.mark.parametrize("lock", [_flock, _lockf], ids=["flock", "fcntl"])
@pytest.mark.parametrize(
    ("held", "wanted", "answer"),
    [
        (fcntl.LOCK_EX, fcntl.LOCK_EX, errno.EAGAIN),
        (fcntl.LOCK_EX, fcntl.LOCK_SH, errno.EAGAIN),
        (fcntl.LOCK_SH, fcntl.LOCK_EX, errno.EAGAIN),
        (fcntl.LOCK_SH, fcntl.LOCK_SH, 0),
    ],
)
def test_a_held_lock_keeps_others_out(path: Path, lock: Callable[[int, int], int], held: int, wanted: int, answer: int) -> None:
    with opened(path, os.O_RDWR) as file:
        assert lock(file, held) == 0
        assert _elsewhere(path, lambda other: lock(other, wanted)) == answer
        assert lock(file, fcntl.LOCK_UN) == 0
        assert _elsewhere(path, lambda other: lock(other, wanted)) == 0


@pytest.mark.parametrize("lock", [_flock, _lockf], ids=["flock", "fcntl"])
def test_a_lock_ends_when_the_file_is_closed(path: Path, lock: Callable[[int, int], int]) -> None:
    with opened(path, os.O_RDWR) as file:
        assert lock(file, fcntl.LOCK_EX) == 0
    assert _elsewhere(path, lambda other: lock(other, fcntl.LOCK_EX)) == 0


@pytest.mark.parametrize("lock", [_flock, _lockf], ids=["flock", "fcntl"])
def test_a_lock_ends_with_its_process(path: Path, lock: Callable[[int, int], int]) -> None:
    assert _elsewhere(path, lambda other: lock(other, fcntl.LOCK_EX)) == 0
    with opened(path, os.O_RDWR) as file:
        assert lock(file, fcntl.LOCK_EX) == 0


@pytest.mark.parametrize("lock", [_flock, _lockf], ids=["flock", "fcntl"])
def test_a_lock_can_be_turned_from_exclusive_to_shared(path: Path, lock: Callable[[int, int], int]) -> None:
    with opened(path, os.O_RDWR) as file:
        assert lock(file, fcntl.LOCK_EX) == 0
        assert lock(file, fcntl.LOCK_SH) == 0
        assert _elsewhere(path, lambda other: lock(other, fcntl.LOCK_SH)) == 0


def test_two_descriptors_of_one_process_keep_each_other_out_with_flock_and_not_with_fcntl(path: Path) -> None:
    with opened(path, os.O_RDWR) as one, opened(path, os.O_RDWR) as two:
        assert (_flock(one, fcntl.LOCK_EX), _flock(two, fcntl.LOCK_EX)) == (0, errno.EAGAIN)
        assert (_lockf(one, fcntl.LOCK_EX), _lockf(two, fcntl.LOCK_EX)) == (0, 0)


def test_ranges_are_locked_independently(path: Path) -> None:
    with opened(path, os.O_RDWR) as file:
        assert _lockf(file, fcntl.LOCK_EX, 10, 20) == 0
        ranges = {(0, 20): 0, (10, 11): errno.EAGAIN, (29, 1): errno.EAGAIN, (30, 0): 0, (1 << 40, 5): 0}
        for (start, length), answer in ranges.items():
            tried = _elsewhere(path, lambda other, n=length, s=start: _lockf(other, fcntl.LOCK_EX, n, s))  # type: ignore[misc]
            assert tried == answer
        assert _lockf(file, fcntl.LOCK_UN, 5, 22) == 0
        assert _elsewhere(path, lambda other: _lockf(other, fcntl.LOCK_EX, 5, 22)) == 0
        assert _elsewhere(path, lambda other: _lockf(other, fcntl.LOCK_EX, 1, 21)) == errno.EAGAIN


def test_the_holder_of_a_lock_can_be_asked_for(path: Path) -> None:
    with opened(path, os.O_RDWR) as file:
        assert _lockf(file, fcntl.LOCK_EX, 10, 20) == 0

        def ask() -> tuple[int, int, int, int]:
            with opened(path, os.O_RDWR) as other:
                asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                kind, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(other, fcntl.F_GETLK, asked))
                return kind, start, length, pid

        assert in_child(ask) == (fcntl.F_WRLCK, 20, 10, os.getpid())


def test_a_lock_of_an_open_file_description_keeps_another_description_out(path: Path) -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with opened(path, os.O_RDWR) as one, opened(path, os.O_RDWR) as two:
        assert _errno(lambda: fcntl.fcntl(one, F_OFD_SETLK, lock)) == 0
        assert _errno(lambda: fcntl.fcntl(two, F_OFD_SETLK, lock)) == errno.EAGAIN


def test_a_lock_for_writing_needs_a_descriptor_for_writing(path: Path) -> None:
    with opened(path) as file:
        assert _lockf(file, fcntl.LOCK_EX) == errno.EBADF
        assert _lockf(file, fcntl.LOCK_SH) == 0
        assert _flock(file, fcntl.LOCK_EX) == 0


@pytest.mark.parametrize("how", ["flock", "fcntl"])
def test_processes_that_wait_for_a_lock_count_without_losing_one(here: Path, how: str) -> None:
    path = touch(here / "counter", data=b"0")
    take = fcntl.flock if how == "flock" else fcntl.lockf

    def count() -> None:
        for _ in range(40):
            with opened(path, os.O_RDWR) as file:
                take(file, fcntl.LOCK_EX)
                number = int(os.read(file, 20)) + 1
                os.pwrite(file, str(number).encode(), 0)
                take(file, fcntl.LOCK_UN)

    children: list[Child[None]] = [start_child(count) for _ in range(3)]
    for child in children:
        child.result()
    assert read(path) == b"120"
