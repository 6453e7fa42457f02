"""Who may search, list and change a directory, sticky directories, and access(2)."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOB,
    CREW,
    NEITHER,
    RENAME_EXCHANGE,
    as_alice,
    as_bob,
    errno_of,
    in_child,
    make,
    mkdir,
    refused,
    renameat2,
    touch,
    watching,
)

OWNERS = {"alice": (ALICE, ALICE), "bob": (BOB, BOB), "root": (0, 0)}


@pytest.mark.parametrize("mode", range(8))
@pytest.mark.parametrize("who", ["owner", "group", "other"])
def test_read_lists_a_directory_search_reaches_into_it_and_write_with_search_changes_it(
    here: Path, who: str, mode: int
) -> None:
    shift = {"owner": 6, "group": 3, "other": 0}[who]
    owner = {"owner": (ALICE, 0), "group": (0, CREW), "other": (0, 0)}[who]
    inside = mkdir(here / "directory", 0o777, owner=owner)
    for name in ("file", "doomed"):
        touch(inside / name, 0o666)
    others = 0o777 & ~(7 << shift) if mode != 7 else 0
    os.chmod(inside, others | mode << shift)

    attempts: dict[str, Callable[[], object]] = {
        "list": lambda: os.listdir(inside),
        "stat": lambda: os.stat(inside / "file"),
        "make": lambda: os.mkdir(inside / "new"),
        "rename": lambda: os.rename(inside / "file", inside / "renamed"),
        "remove": lambda: os.unlink(inside / "doomed"),
        "enter": lambda: os.chdir(inside),
    }
    may = {"list": 4, "stat": 1, "make": 3, "rename": 3, "remove": 3, "enter": 1}
    expected = {name: 0 if mode & bits == bits else errno.EACCES for name, bits in may.items()}
    assert as_alice(lambda: {name: errno_of(attempt) for name, attempt in attempts.items()}, [CREW]) == expected


def test_root_needs_no_permission(here: Path) -> None:
    inside = mkdir(here / "directory", 0o000, owner=(ALICE, ALICE))
    touch(inside / "file", 0o000, owner=(ALICE, ALICE), data=b"data")
    assert (inside / "file").read_bytes() == b"data"
    assert os.listdir(inside) == ["file"]
    with refused(errno.EACCES):
        os.execv(inside / "file", ["file"])


def test_a_program_without_execute_permission_does_not_run(here: Path) -> None:
    program = touch(here / "program", 0o744, data=b"#!/bin/sh\nexit 0\n")
    with refused(errno.EACCES):
        as_alice(lambda: os.execv(program, ["program"]))


@pytest.mark.parametrize("mode", range(8))
def test_access_answers_as_the_permissions_are(here: Path, mode: int) -> None:
    touch(here / "file", mode, owner=(BOB, BOB))

    def answers() -> list[bool]:
        return [os.access(here / "file", bits) for bits in range(8)]

    assert as_alice(answers) == [mode & bits == bits for bits in range(8)]


def test_access_of_root_to_run_asks_for_one_execute_bit(here: Path) -> None:
    touch(here / "file", 0o666)
    assert os.access(here / "file", os.R_OK | os.W_OK)
    assert not os.access(here / "file", os.X_OK)
    os.chmod(here / "file", 0o001)
    assert os.access(here / "file", os.X_OK)


def test_access_asks_for_the_real_user_unless_told_otherwise(here: Path) -> None:
    touch(here / "file", 0o600)

    def answers() -> tuple[bool, bool]:
        os.setresuid(ALICE, 0, 0)
        return os.access(here / "file", os.R_OK), os.access(here / "file", os.R_OK, effective_ids=True)

    assert in_child(answers) == (False, True)


def test_a_descriptor_opened_before_a_chmod_keeps_its_rights(here: Path) -> None:
    own = touch(here / "file", 0o600, owner=(ALICE, ALICE))

    def write_after_chmod() -> int:
        descriptor = os.open(own, os.O_RDWR)
        os.chmod(own, 0)
        assert errno_of(lambda: os.open(own, os.O_RDONLY)) == errno.EACCES
        return os.write(descriptor, b"data")

    assert as_alice(write_after_chmod) == 4


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])
@pytest.mark.parametrize("thing_of", OWNERS)
@pytest.mark.parametrize("directory_of", OWNERS)
@pytest.mark.parametrize("sticky", [True, False], ids=["sticky", "plain"])
def test_in_a_sticky_directory_only_its_owner_and_the_owner_of_a_thing_remove_or_rename_it(
    here: Path, sticky: bool, directory_of: str, thing_of: str, kind: str
) -> None:
    directory = mkdir(here / "shared", 0o1777 if sticky else 0o777, owner=OWNERS[directory_of])
    thing = make(kind, directory / "thing", owner=OWNERS[thing_of])
    own = make(kind, directory / "own", owner=OWNERS["alice"])
    remove = os.rmdir if kind == "directory" else os.unlink
    # Each attempt that succeeds leaves "own" and "thing" as the next one needs them.
    attempts: list[Callable[[], object]] = [
        lambda: _there_and_back(thing, directory / "renamed"),
        lambda: _exchange_twice(thing, own),
        lambda: _replace(thing, own, kind),
        lambda: remove(thing),
    ]
    may = not sticky or "alice" in (directory_of, thing_of)
    with watching(directory) as parent:
        answers = as_alice(lambda: [errno_of(attempt) for attempt in attempts])
    assert answers == [0 if may else errno.EPERM] * len(attempts)
    assert may or parent.changed == NEITHER


def _exchange_twice(path: Path, other: Path) -> None:
    renameat2(path, other, RENAME_EXCHANGE)
    renameat2(path, other, RENAME_EXCHANGE)


def _replace(path: Path, by: Path, kind: str) -> None:
    os.rename(by, path)
    make(kind, by)


def _there_and_back(path: Path, other: Path) -> None:
    os.rename(path, other)
    os.rename(other, path)


def test_root_removes_anything_from_a_sticky_directory(here: Path) -> None:
    directory = mkdir(here / "shared", 0o1777, owner=(ALICE, ALICE))
    for kind in ("file", "directory"):
        make(kind, directory / kind, owner=(BOB, BOB))
    os.unlink(directory / "file")
    os.rmdir(directory / "directory")


def test_the_sticky_rule_comes_after_the_permission_and_before_the_kind(here: Path) -> None:
    directory = mkdir(here / "shared", 0o1755)
    mkdir(directory / "directory")
    with refused(errno.EACCES):
        as_alice(lambda: os.unlink(directory / "directory"))
    os.chmod(directory, 0o1777)
    with refused(errno.EPERM):
        as_alice(lambda: os.unlink(directory / "directory"))


def test_a_user_may_be_kept_out_by_the_group_although_others_are_let_in(here: Path) -> None:
    touch(here / "file", 0o604, owner=(0, CREW))
    with refused(errno.EACCES):
        as_alice(lambda: os.open(here / "file", os.O_RDONLY), [CREW])
    as_bob(lambda: os.open(here / "file", os.O_RDONLY))
