"""The exerciser finds nothing wrong with a plain directory, and finds what is wrong with one that lies."""

import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.random import names
from tests.random.machine import Exerciser

pytestmark = pytest.mark.root


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_plain_directory_agrees_with_the_model(tmp_path: Path, seed: int) -> None:
    Exerciser(tmp_path, seed).run(1000)


def test_a_seed_always_gives_the_same_operations(tmp_path: Path) -> None:
    recent = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        exerciser = Exerciser(tmp_path / name, 4)
        exerciser.run(500)
        recent.append(list(exerciser.recent))
    assert recent[0] == recent[1]


def test_a_run_can_be_continued(tmp_path: Path) -> None:
    exerciser = Exerciser(tmp_path, 5)
    exerciser.run(200)
    exerciser.run(200)


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="not empty"):
        Exerciser(tmp_path, 1)


def _lose_the_last_byte_of_write_number_100(true: Callable[..., Any]) -> Callable[..., Any]:
    done = 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal done
        true(fd, data[:-1] if done == 99 else data, offset)
        done += 1
        return len(data)

    return pwrite


def _fail(_: Callable[..., Any]) -> Callable[..., Any]:
    def call(*_args: object, **_options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return call


def _do_nothing(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_args, **_options: None


def _keep_setuid(true: Callable[..., Any]) -> Callable[..., Any]:
    def chown(path: Any, uid: int, gid: int, *, follow_symlinks: bool) -> None:
        mode = os.stat(path, follow_symlinks=follow_symlinks).st_mode
        true(path, uid, gid, follow_symlinks=follow_symlinks)
        if not stat.S_ISLNK(mode):
            os.chmod(path, stat.S_IMODE(mode))

    return chown


def _keep_whole_microseconds(true: Callable[..., Any]) -> Callable[..., Any]:
    def utime(path: Any, *, ns: tuple[int, int], follow_symlinks: bool) -> None:
        true(path, ns=(ns[0], ns[1] // 1000 * 1000), follow_symlinks=follow_symlinks)

    return utime


def _ignore_flags(true: Callable[..., Any]) -> Callable[..., Any]:
    return lambda old, new, _flags: true(old, new, 0)


def _copy_instead_of_linking(_: Callable[..., Any]) -> Callable[..., Any]:
    def link(old: bytes, new: bytes, *, follow_symlinks: bool) -> None:
        status = os.stat(old, follow_symlinks=follow_symlinks)
        os.mknod(new, status.st_mode, status.st_rdev)

    return link


def _map_privately(true: Callable[..., Any]) -> Callable[..., Any]:
    def map_file(fd: int, length: int, flags: int = mmap.MAP_SHARED, *rest: int, **options: int) -> Any:
        return true(fd, length, mmap.MAP_PRIVATE if fd >= 0 else flags, *rest, **options)

    return map_file


@pytest.mark.parametrize(
    ("module", "name", "lie"),
    [
        (os, "pwrite", _lose_the_last_byte_of_write_number_100),
        (os, "fsync", _fail),
        (os, "unlink", _do_nothing),
        (os, "ftruncate", _do_nothing),
        (os, "removexattr", _do_nothing),
        (os, "chown", _keep_setuid),
        (os, "utime", _keep_whole_microseconds),
        (os, "link", _copy_instead_of_linking),
        (names, "renameat2", _ignore_flags),
        (mmap, "mmap", _map_privately),
    ],
)
def test_a_file_system_that_lies_is_caught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    lie: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    exerciser = Exerciser(tmp_path, 7)
    monkeypatch.setattr(module, name, lie(getattr(module, name)))
    with pytest.raises(AssertionError, match=r"^seed 7, step \d+, in \d+: .*") as caught:
        exerciser.run(2000)
    assert "the last operations:\n  " in str(caught.value)
