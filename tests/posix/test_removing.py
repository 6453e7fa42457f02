"""unlink and rmdir, and files and directories that are in use when their last name goes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOTH,
    NEITHER,
    as_alice,
    in_child,
    make,
    mkdir,
    mode_of,
    opened,
    owner_of,
    refused,
    touch,
    watching,
)


def test_a_directory_is_not_unlinked(here: Path) -> None:
    mkdir(here / "directory")
    with watching(here) as parent, refused(errno.EISDIR):
        os.unlink(here / "directory")
    assert parent.changed == NEITHER


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo", "socket"])
def test_only_a_directory_is_removed_as_one(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with watching(here) as parent, refused(errno.ENOTDIR):
        os.rmdir(here / "name")
    assert parent.changed == NEITHER


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket", "character device"])
def test_a_directory_that_holds_anything_is_not_removed(here: Path, kind: str) -> None:
    mkdir(here / "directory")
    make(kind, here / "directory" / "name")
    with watching(here) as parent, watching(here / "directory") as target, refused(errno.ENOTEMPTY):
        os.rmdir(here / "directory")
    assert (parent.changed, target.changed) == (NEITHER, NEITHER)


@pytest.mark.parametrize(
    ("suffix", "code"), [("/.", errno.EINVAL), ("/..", errno.ENOTEMPTY), ("/./.", errno.EINVAL), ("/../.", errno.EINVAL)]
)
def test_dots_are_not_removed(here: Path, suffix: str, code: int) -> None:
    mkdir(here / "directory")
    with refused(code):
        os.rmdir(f"{here}/directory{suffix}")


@pytest.mark.parametrize("suffix", ["/.", "/.."])
def test_dots_are_not_unlinked(here: Path, suffix: str) -> None:
    mkdir(here / "directory")
    with refused(errno.EISDIR):
        os.unlink(f"{here}/directory{suffix}")


def test_a_slash_after_a_directory_does_not_keep_it_from_being_removed(here: Path) -> None:
    mkdir(here / "directory")
    os.rmdir(f"{here}/directory///")
    assert os.listdir(here) == []


@pytest.mark.parametrize(("kind", "code"), [("file", errno.ENOTDIR), ("fifo", errno.ENOTDIR), ("directory", errno.EISDIR)])
def test_a_slash_after_a_name_keeps_it_from_being_unlinked(here: Path, kind: str, code: int) -> None:
    make(kind, here / "name")
    with refused(code):
        os.unlink(f"{here}/name/")


def test_a_link_to_a_directory_is_not_removed_as_a_directory(here: Path) -> None:
    mkdir(here / "directory")
    (here / "link").symlink_to("directory")
    for spelling in ("link", "link/"):
        with refused(errno.ENOTDIR):
            os.rmdir(f"{here}/{spelling}")
    with refused(errno.ENOTDIR):
        os.unlink(f"{here}/link/")
    os.unlink(here / "link")
    assert os.listdir(here) == ["directory"]


def test_unlinking_a_link_leaves_its_target(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    with watching(here / "file") as target:
        os.unlink(here / "link")
    assert target.changed == NEITHER


def test_a_file_that_one_may_not_read_can_be_removed_from_ones_own_directory(here: Path) -> None:
    own = mkdir(here / "own", 0o700, owner=(ALICE, ALICE))
    touch(own / "roots", 0o000)
    as_alice(lambda: os.unlink(own / "roots"))
    assert os.listdir(own) == []


def test_someone_elses_full_directory_cannot_be_removed_from_ones_own(here: Path) -> None:
    own = mkdir(here / "own", 0o700, owner=(ALICE, ALICE))
    mkdir(own / "roots", 0o700)
    touch(own / "roots" / "file")
    with refused(errno.ENOTEMPTY):
        as_alice(lambda: os.rmdir(own / "roots"))
    os.unlink(own / "roots" / "file")
    as_alice(lambda: os.rmdir(own / "roots"))


def test_an_unlinked_file_that_is_open_can_be_read_and_written(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.write(file, b"before")
        os.unlink(here / "file")
        os.write(file, b" and after")
        assert os.pread(file, 100, 0) == b"before and after"
        assert os.fstat(file).st_size == 16
        os.fsync(file)
        os.ftruncate(file, 6)
        assert os.pread(file, 100, 0) == b"before"


def test_an_unlinked_file_that_is_open_has_no_links_and_moves_its_ctime(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        number = os.fstat(file).st_ino
        with watching(file) as target:
            os.unlink(here / "file")
        assert target.changed == {"ctime"}
        assert os.fstat(file).st_nlink == 0
        assert os.fstat(file).st_ino == number


def test_an_unlinked_file_that_is_open_takes_new_attributes(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.unlink(here / "file")
        os.fchmod(file, 0o640)
        os.fchown(file, ALICE, ALICE)
        os.utime(file, ns=(1_000_000_001, 2_000_000_002))
        os.setxattr(file, "user.a", b"value")
        assert (mode_of(file), owner_of(file)) == (0o640, (ALICE, ALICE))
        assert os.fstat(file).st_mtime_ns == 2_000_000_002
        assert (os.getxattr(file, "user.a"), os.listxattr(file)) == (b"value", ["user.a"])
        os.removexattr(file, "user.a")
        assert os.listxattr(file) == []


def test_an_unlinked_file_can_be_opened_again_through_its_descriptor(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as file:
        os.write(file, b"data")
        os.unlink(here / "file")
        with opened(f"/proc/self/fd/{file}", os.O_RDWR) as again:
            assert os.read(again, 10) == b"data"
            os.write(again, b"!")
        assert os.pread(file, 10, 0) == b"data!"


def test_a_new_file_under_the_name_of_an_unlinked_one_is_another_file(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as old:
        os.write(old, b"old")
        os.unlink(here / "file")
        touch(here / "file", data=b"new one")
        assert os.pread(old, 10, 0) == b"old"
        assert os.fstat(old).st_ino != os.stat(here / "file").st_ino
        os.pwrite(old, b"OLD", 0)
        assert (here / "file").read_bytes() == b"new one"


def test_a_file_that_kept_one_of_its_names_is_linked_again_from_it(here: Path) -> None:
    with opened(here / "one", os.O_CREAT | os.O_RDWR) as file:
        os.link(here / "one", here / "two")
        os.unlink(here / "one")
        os.write(file, b"data")
        assert (here / "two").read_bytes() == b"data"
        assert os.fstat(file).st_nlink == 1


def test_a_removed_directory_that_is_open_is_empty_and_takes_nothing_new(here: Path) -> None:
    mkdir(here / "gone")
    with opened(here / "gone", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.rmdir(here / "gone")
        assert os.listdir(directory) == []
        assert os.fstat(directory).st_nlink == 0
        attempts: list[Callable[[], object]] = [
            lambda: os.mkdir("a", dir_fd=directory),
            lambda: os.symlink("a", "a", dir_fd=directory),
            lambda: os.open("a", os.O_CREAT | os.O_WRONLY, dir_fd=directory),
            lambda: os.mkfifo("a", dir_fd=directory),
            lambda: os.stat("a", dir_fd=directory),
        ]
        for attempt in attempts:
            with refused(errno.ENOENT):
                attempt()


def test_the_working_directory_can_be_removed(here: Path) -> None:
    mkdir(here / "gone")

    def leave_it() -> None:
        os.chdir(here / "gone")
        os.rmdir(here / "gone")
        for attempt in (os.getcwd, lambda: os.mkdir("a"), lambda: os.open("a", os.O_CREAT | os.O_WRONLY)):
            with refused(errno.ENOENT):
                attempt()
        assert os.listdir(".") == []
        os.chdir("..")
        assert os.path.samefile(".", here)

    in_child(leave_it)
    assert os.listdir(here) == []


def test_unlinking_one_of_two_names_changes_only_that_one(here: Path) -> None:
    touch(here / "one", data=b"data")
    os.link(here / "one", here / "two")
    with watching(here) as parent:
        os.unlink(here / "one")
    assert parent.changed == BOTH
    assert (here / "two").read_bytes() == b"data"
    with refused(errno.ENOENT):
        os.stat(here / "one")
