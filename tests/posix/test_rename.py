"""rename(2) and renameat2(2)."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.posix.support import (
    BOTH,
    CTIME,
    FORMATS,
    KINDS,
    NEITHER,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    as_alice,
    make,
    mkdir,
    opened,
    pass_tick,
    read,
    refused,
    renameat2,
    touch,
    watching,
)

NOT_DIRECTORIES = [kind for kind in KINDS if kind != "directory"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_renamed_stays_the_same_thing(here: Path, kind: str) -> None:
    make(kind, here / "old")
    before = os.lstat(here / "old")
    with watching(here) as parent:
        os.rename(here / "old", here / "new")
    after = os.lstat(here / "new")
    assert os.listdir(here) == ["new"]
    assert (after.st_ino, after.st_mode, after.st_nlink) == (before.st_ino, before.st_mode, before.st_nlink)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert parent.changed == BOTH


@pytest.mark.parametrize("kind", KINDS)
def test_a_rename_moves_the_ctime_of_what_is_renamed(here: Path, kind: str) -> None:
    make(kind, here / "old")
    mkdir(here / "to")
    before = pass_tick(here / "old").st_ctime_ns
    with watching(here) as source, watching(here / "to") as target:
        os.rename(here / "old", here / "to" / "new")
    assert os.lstat(here / "to" / "new").st_ctime_ns > before
    assert (source.changed, target.changed) == (BOTH, BOTH)


@pytest.mark.parametrize("old", NOT_DIRECTORIES)
@pytest.mark.parametrize("new", NOT_DIRECTORIES)
def test_anything_but_a_directory_replaces_anything_but_a_directory(here: Path, old: str, new: str) -> None:
    make(old, here / "old")
    make(new, here / "new")
    number = os.lstat(here / "old").st_ino
    os.rename(here / "old", here / "new")
    assert os.listdir(here) == ["new"]
    assert os.lstat(here / "new").st_ino == number
    assert stat.S_IFMT(os.lstat(here / "new").st_mode) == FORMATS[old]


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
def test_directories_and_other_things_do_not_replace_each_other(here: Path, kind: str) -> None:
    make(kind, here / "thing")
    mkdir(here / "directory")
    with watching(here) as parent, watching(here / "thing") as thing, watching(here / "directory") as directory:
        with refused(errno.EISDIR):
            os.rename(here / "thing", here / "directory")
        with refused(errno.ENOTDIR):
            os.rename(here / "directory", here / "thing")
    assert (parent.changed, thing.changed, directory.changed) == (NEITHER, NEITHER, NEITHER)


def test_a_directory_replaces_an_empty_directory(here: Path) -> None:
    mkdir(here / "old")
    touch(here / "old" / "file")
    mkdir(here / "new")
    os.rename(here / "old", here / "new")
    assert os.listdir(here) == ["new"]
    assert os.listdir(here / "new") == ["file"]
    assert here.stat().st_nlink == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_does_not_replace_one_that_holds_anything(here: Path, kind: str) -> None:
    mkdir(here / "old")
    mkdir(here / "new")
    make(kind, here / "new" / "name")
    with watching(here) as parent, watching(here / "new") as target, refused(errno.ENOTEMPTY):
        os.rename(here / "old", here / "new")
    assert (parent.changed, target.changed) == (NEITHER, NEITHER)


def test_a_directory_is_not_moved_below_itself(here: Path) -> None:
    os.makedirs(here / "a" / "b" / "c")
    for target in ("a/x", "a/b/x", "a/b/c/x", "a/b/c"):
        with refused(errno.EINVAL):
            os.rename(here / "a", here / target)


def test_a_directory_does_not_replace_one_that_it_lies_in(here: Path) -> None:
    os.makedirs(here / "a" / "b" / "c")
    for source in ("a/b", "a/b/c"):
        with refused(errno.ENOTEMPTY):
            os.rename(here / source, here / "a")


@pytest.mark.parametrize("suffix", ["/.", "/.."])
def test_dots_are_not_renamed(here: Path, suffix: str) -> None:
    mkdir(here / "directory")
    with refused(errno.EBUSY):
        os.rename(f"{here}/directory{suffix}", here / "new")
    with refused(errno.EBUSY):
        os.rename(here / "directory", f"{here}/directory{suffix}")


def test_moving_a_directory_moves_a_link_from_one_parent_to_the_other(here: Path) -> None:
    os.makedirs(here / "one" / "moving" / "below")
    mkdir(here / "two")
    os.rename(here / "one" / "moving", here / "two" / "moved")
    links = {name: (here / name).stat().st_nlink for name in ("one", "two", "two/moved")}
    assert links == {"one": 2, "two": 3, "two/moved": 3}
    assert os.path.samefile(here / "two" / "moved" / "..", here / "two")


def test_replacing_a_directory_in_another_parent_keeps_the_links_right(here: Path) -> None:
    os.makedirs(here / "one" / "moving")
    os.makedirs(here / "two" / "replaced")
    os.rename(here / "one" / "moving", here / "two" / "replaced")
    assert [(here / name).stat().st_nlink for name in ("one", "two", "two/replaced")] == [2, 3, 2]


def test_a_rename_to_itself_changes_nothing(here: Path) -> None:
    touch(here / "file", data=b"data")
    mkdir(here / "directory")
    with watching(here) as parent, watching(here / "file") as file, watching(here / "directory") as directory:
        os.rename(here / "file", here / "file")
        os.rename(here / "directory", here / "directory")
    assert (parent.changed, file.changed, directory.changed) == (NEITHER, NEITHER, NEITHER)


def test_a_rename_to_another_name_of_the_same_file_leaves_both(here: Path) -> None:
    touch(here / "one", data=b"data")
    os.link(here / "one", here / "two")
    with watching(here) as parent, watching(here / "one") as file:
        os.rename(here / "one", here / "two")
    assert sorted(os.listdir(here)) == ["one", "two"]
    assert (parent.changed, file.changed) == (NEITHER, NEITHER)
    assert (here / "one").stat().st_nlink == 2


def test_a_replaced_file_loses_a_link_and_moves_its_ctime(here: Path) -> None:
    touch(here / "old")
    touch(here / "replaced")
    os.link(here / "replaced", here / "kept")
    with watching(here / "kept") as kept:
        os.rename(here / "old", here / "replaced")
    assert kept.changed == CTIME
    assert (here / "kept").stat().st_nlink == 1


def test_a_file_replaced_while_open_lives_on(here: Path) -> None:
    touch(here / "target", data=b"old")
    touch(here / "fresh", data=b"new")
    with opened(here / "target", os.O_RDWR) as file:
        os.rename(here / "fresh", here / "target")
        assert os.pread(file, 10, 0) == b"old"
        assert os.fstat(file).st_nlink == 0
        os.pwrite(file, b"still", 0)
        assert os.pread(file, 10, 0) == b"still"
    assert read(here / "target") == b"new"


def test_an_open_file_follows_its_rename(here: Path) -> None:
    with opened(here / "old", os.O_CREAT | os.O_RDWR) as file:
        os.rename(here / "old", here / "new")
        os.write(file, b"data")
    assert read(here / "new") == b"data"


def test_open_files_below_a_renamed_directory_are_still_theirs(here: Path) -> None:
    os.makedirs(here / "old" / "deep")
    with opened(here / "old" / "deep" / "file", os.O_CREAT | os.O_RDWR) as file:
        os.rename(here / "old", here / "new")
        mkdir(here / "old")
        os.write(file, b"data")
        os.fchmod(file, 0o600)
    assert read(here / "new" / "deep" / "file") == b"data"
    with refused(errno.ENOENT):
        os.stat(here / "old" / "deep")


def test_a_symbolic_link_is_renamed_not_its_target(here: Path) -> None:
    touch(here / "file", data=b"data")
    (here / "link").symlink_to("file")
    os.rename(here / "link", here / "moved")
    assert (here / "moved").is_symlink()
    touch(here / "other")
    os.rename(here / "other", here / "moved")
    assert read(here / "file") == b"data"
    assert not (here / "moved").is_symlink()


def test_a_slash_is_for_directories_only(here: Path) -> None:
    mkdir(here / "directory")
    touch(here / "file")
    os.rename(f"{here}/directory/", f"{here}/moved/")
    for source, target in (("file/", "new"), ("file", "new/")):
        with refused(errno.ENOTDIR):
            os.rename(f"{here}/{source}", f"{here}/{target}")
    assert sorted(os.listdir(here)) == ["file", "moved"]


def test_a_rename_does_not_leave_the_file_system(here: Path) -> None:
    touch(here / "file")
    with refused(errno.EXDEV):
        os.rename(here / "file", f"/dev/shm/{os.getpid()}-renamed")


def test_a_directory_that_one_may_not_write_cannot_change_its_parent(here: Path) -> None:
    # Its ".." would have to be written.
    mkdir(here / "one", 0o777)
    mkdir(here / "two", 0o777)
    mkdir(here / "one" / "roots", 0o755)
    with refused(errno.EACCES):
        as_alice(lambda: os.rename(here / "one" / "roots", here / "two" / "roots"))
    as_alice(lambda: os.rename(here / "one" / "roots", here / "one" / "renamed"))


@pytest.mark.parametrize("closed", ["one", "two"])
def test_both_directories_must_be_writable(here: Path, closed: str) -> None:
    for name in ("one", "two"):
        mkdir(here / name, 0o755 if name == closed else 0o777)
    touch(here / "one" / "file", 0o666)
    with refused(errno.EACCES):
        as_alice(lambda: os.rename(here / "one" / "file", here / "two" / "file"))


@pytest.mark.parametrize("kind", KINDS)
def test_noreplace_moves_to_a_free_name(here: Path, kind: str) -> None:
    make(kind, here / "old")
    renameat2(here / "old", here / "new", RENAME_NOREPLACE)
    assert os.listdir(here) == ["new"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["file", "directory"])
def test_noreplace_leaves_what_exists(here: Path, source: str, kind: str) -> None:
    make(source, here / "old")
    make(kind, here / "new")
    with watching(here) as parent, watching(here / "new") as target, refused(errno.EEXIST):
        renameat2(here / "old", here / "new", RENAME_NOREPLACE)
    assert (parent.changed, target.changed) == (NEITHER, NEITHER)


def test_noreplace_to_itself_says_that_it_exists(here: Path) -> None:
    touch(here / "file")
    with refused(errno.EEXIST):
        renameat2(here / "file", here / "file", RENAME_NOREPLACE)


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("two", KINDS)
def test_exchange_swaps_anything_with_anything(here: Path, one: str, two: str) -> None:
    mkdir(here / "a")
    mkdir(here / "b")
    make(one, here / "a" / "name")
    make(two, here / "b" / "name")
    numbers = os.lstat(here / "a" / "name").st_ino, os.lstat(here / "b" / "name").st_ino
    with watching(here / "a") as first, watching(here / "b") as second:
        renameat2(here / "a" / "name", here / "b" / "name", RENAME_EXCHANGE)
    assert (first.changed, second.changed) == (BOTH, BOTH)
    assert (os.lstat(here / "b" / "name").st_ino, os.lstat(here / "a" / "name").st_ino) == numbers
    assert (here / "a").stat().st_nlink == 2 + (two == "directory")
    assert (here / "b").stat().st_nlink == 2 + (one == "directory")


def test_exchange_within_one_directory_keeps_contents_with_their_files(here: Path) -> None:
    touch(here / "a", data=b"first")
    touch(here / "b", data=b"second")
    with opened(here / "a") as file:
        renameat2(here / "a", here / "b", RENAME_EXCHANGE)
        assert os.read(file, 10) == b"first"
    assert (read(here / "a"), read(here / "b")) == (b"second", b"first")


def test_exchange_needs_both_names(here: Path) -> None:
    touch(here / "file")
    for source, target in (("file", "missing"), ("missing", "file")):
        with refused(errno.ENOENT):
            renameat2(here / source, here / target, RENAME_EXCHANGE)


def test_exchange_with_something_below_itself_is_refused(here: Path) -> None:
    os.makedirs(here / "a" / "b")
    for source, target in (("a", "a/b"), ("a/b", "a")):
        with refused(errno.EINVAL):
            renameat2(here / source, here / target, RENAME_EXCHANGE)


@pytest.mark.parametrize("flags", [RENAME_NOREPLACE | RENAME_EXCHANGE, 0x80000000])
def test_rename_flags_that_make_no_sense_are_refused(here: Path, flags: int) -> None:
    touch(here / "file")
    with refused(errno.EINVAL):
        renameat2(here / "file", here / "new", flags)
