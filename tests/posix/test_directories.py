"""Reading directories: every name once, also while they change, through buffers of any size."""

import errno
import os
import stat
from collections import Counter
from pathlib import Path

import pytest

from tests.posix.support import (
    FORMATS,
    KINDS,
    all_entries,
    getdents,
    in_child,
    make,
    mkdir,
    opened,
    refused,
    start_child,
    touch,
)

MANY = int(os.environ.get("MIRRORFS_TEST_ENTRIES", "5000"))
"""How many entries the large directory has; MIRRORFS_TEST_ENTRIES=100000 is the full test."""


def _fill(directory: Path, count: int) -> set[bytes]:
    with opened(directory, os.O_PATH) as parent:
        for number in range(count):
            os.mknod(f"entry-{number}", dir_fd=parent)
    return {f"entry-{number}".encode() for number in range(count)}


def test_a_large_directory_lists_every_entry_once_and_can_be_emptied(here: Path) -> None:
    names = _fill(here, MANY)
    found = Counter(entry.name for entry in all_entries(here))
    assert found.keys() == names | {b".", b".."}
    assert max(found.values()) == 1
    assert len(os.listdir(here)) == MANY
    # Removed as `rm -r` does it: batch by batch, while the listing goes on.
    with opened(here, os.O_RDONLY | os.O_DIRECTORY) as directory:
        while batch := getdents(directory):
            for entry in batch:
                if entry.name not in (b".", b".."):
                    os.unlink(entry.name, dir_fd=directory)
    left = os.listdir(here)
    assert len(left) < MANY
    for name in left:
        os.unlink(here / name)
    assert [entry.name for entry in sorted(all_entries(here), key=lambda entry: entry.name)] == [b".", b".."]


@pytest.mark.parametrize("buffer_bytes", [300, 1000, 4096, 1 << 20])
def test_a_buffer_of_any_size_reads_every_entry_once(here: Path, buffer_bytes: int) -> None:
    names = _fill(here, 300) | {b".", b".."}
    assert Counter(entry.name for entry in all_entries(here, buffer_bytes)) == Counter(names)


def test_a_buffer_too_small_for_an_entry_is_refused(here: Path) -> None:
    touch(here / ("n" * 200))
    with opened(here, os.O_RDONLY | os.O_DIRECTORY) as directory, refused(errno.EINVAL):
        while getdents(directory, 32):
            pass


def test_what_stays_is_listed_once_while_other_names_come_and_go(here: Path) -> None:
    staying = _fill(here, 400)

    def come_and_go() -> None:
        for number in range(300):
            touch(here / f"churn-{number}")
            if number >= 5:
                os.rename(here / f"churn-{number - 5}", here / f"moved-{number - 5}")
                os.unlink(here / f"moved-{number - 5}")

    child = start_child(come_and_go)
    for _ in range(8):
        found = Counter(entry.name for entry in all_entries(here, 600))
        assert {name for name in found if name.startswith(b"entry-")} == staying
        assert {found[name] for name in staying} == {1}
        assert max(found[b"."], found[b".."]) == 1
    child.result()


def test_names_removed_and_made_between_two_reads_do_not_disturb_the_others(here: Path) -> None:
    names = _fill(here, 200)
    with opened(here, os.O_RDONLY | os.O_DIRECTORY) as directory:
        first = getdents(directory, 2000)
        seen = [entry.name for entry in first]
        removed = sorted(names - set(seen))[::2]
        for name in removed:
            os.unlink(name, dir_fd=directory)
        for number in range(100):
            os.mknod(f"new-{number}", dir_fd=directory)
        while batch := getdents(directory, 2000):
            seen += [entry.name for entry in batch]
    found = Counter(seen)
    assert max(found.values()) == 1
    assert names - set(removed) <= found.keys()


def test_a_listing_can_go_on_from_any_entry(here: Path) -> None:
    _fill(here, 150)
    with opened(here, os.O_RDONLY | os.O_DIRECTORY) as directory:
        entries = []
        while batch := getdents(directory, 700):
            entries += batch
        for index in (100, 3, 148, 50, 0):
            os.lseek(directory, entries[index].position, os.SEEK_SET)
            assert getdents(directory, 300)[0].name == entries[index + 1].name
        os.lseek(directory, entries[-1].position, os.SEEK_SET)
        assert getdents(directory) == []


def test_a_rewound_listing_shows_what_is_there_now(here: Path) -> None:
    touch(here / "old")
    with opened(here, os.O_RDONLY | os.O_DIRECTORY) as directory:
        assert {entry.name for entry in getdents(directory)} == {b".", b"..", b"old"}
        os.rename(here / "old", here / "new")
        touch(here / "another")
        os.lseek(directory, 0, os.SEEK_SET)
        assert {entry.name for entry in getdents(directory)} == {b".", b"..", b"new", b"another"}


def test_two_listings_of_one_directory_do_not_disturb_each_other(here: Path) -> None:
    names = _fill(here, 100) | {b".", b".."}
    seen: tuple[list[bytes], list[bytes]] = ([], [])
    with opened(here, os.O_DIRECTORY) as one, opened(here, os.O_DIRECTORY) as two:
        active = True
        while active:
            batches = getdents(one, 300), getdents(two, 500)
            active = any(batches)
            for names_seen, batch in zip(seen, batches, strict=True):
                names_seen += [entry.name for entry in batch]
    assert [Counter(names_seen) for names_seen in seen] == [Counter(names)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_has_the_number_and_the_type_of_what_it_names(here: Path, kind: str) -> None:
    make(kind, here / "name")
    [entry] = [entry for entry in all_entries(here) if entry.name == b"name"]
    assert entry.inode == os.lstat(here / "name").st_ino
    assert entry.type == FORMATS[kind] >> 12


def test_dot_and_dot_dot_are_the_directory_and_its_parent(here: Path) -> None:
    mkdir(here / "directory")
    entries = {entry.name: entry for entry in all_entries(here / "directory")}
    assert entries[b"."].inode == os.stat(here / "directory").st_ino
    assert entries[b".."].inode == os.stat(here).st_ino
    assert {entry.type for entry in entries.values()} == {stat.S_IFDIR >> 12}


def test_dot_dot_follows_a_directory_to_its_new_parent(here: Path) -> None:
    mkdir(here / "one")
    mkdir(here / "two")
    mkdir(here / "one" / "moving")
    with opened(here / "one" / "moving", os.O_DIRECTORY) as moving:
        os.rename(here / "one" / "moving", here / "two" / "moved")
        assert os.path.samestat(os.stat("..", dir_fd=moving), os.stat(here / "two"))
    entries = {entry.name: entry.inode for entry in all_entries(here / "two" / "moved")}
    assert entries[b".."] == os.stat(here / "two").st_ino


def test_only_a_directory_is_listed(here: Path) -> None:
    touch(here / "file")
    with opened(here / "file") as file, refused(errno.ENOTDIR):
        getdents(file)


def test_a_name_made_or_removed_by_another_process_is_seen_at_once(here: Path) -> None:
    for number in range(10):
        in_child(lambda number=number: touch(here / f"{number}"))  # type: ignore[misc]
        assert (here / f"{number}").exists()
        assert os.listdir(here) == [f"{number}"]
        in_child(lambda number=number: os.unlink(here / f"{number}"))  # type: ignore[misc]
        assert not (here / f"{number}").exists()
        assert os.listdir(here) == []


def test_a_missing_name_that_was_asked_for_is_found_when_it_is_made(here: Path) -> None:
    with refused(errno.ENOENT):
        os.stat(here / "name")
    touch(here / "name")
    assert (here / "name").is_file()
    os.unlink(here / "name")
    with refused(errno.ENOENT):
        os.stat(here / "name")
    os.mkdir(here / "name")
    assert (here / "name").is_dir()


def test_directories_deeper_than_a_path_can_say_are_made_and_used(here: Path) -> None:
    depth, name = 20, "d" * 250

    def descend() -> None:
        os.chdir(here)
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        touch("file", data=b"deep")
        with refused(errno.ENAMETOOLONG):
            os.stat("/".join([str(here), *[name] * depth]))
        with opened("file") as file:
            assert os.read(file, 10) == b"deep"
        os.rename("file", "renamed")
        os.unlink("renamed")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir(name)
        assert os.path.samefile(".", here)

    in_child(descend)


def test_calls_relative_to_a_directory_follow_it_through_a_rename(here: Path) -> None:
    mkdir(here / "old")
    with opened(here / "old", os.O_PATH | os.O_DIRECTORY) as directory:
        os.rename(here / "old", here / "new")
        os.mkdir("a", dir_fd=directory)
        os.symlink("a", "b", dir_fd=directory)
        os.rename("b", "c", src_dir_fd=directory, dst_dir_fd=directory)
        os.link("c", "d", src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        os.unlink("c", dir_fd=directory)
    assert sorted(os.listdir(here / "new")) == ["a", "d"]
