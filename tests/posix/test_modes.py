"""chmod and chown, and the setuid and setgid bits, which nobody may keep who should not."""

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOB,
    CREW,
    CTIME,
    NEITHER,
    as_alice,
    make,
    mkdir,
    mode_of,
    opened,
    owner_of,
    refused,
    touch,
    watching,
)

HERS = (ALICE, ALICE)


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "socket", "character device"])
@pytest.mark.parametrize("mode", [0o000, 0o111, 0o640, 0o777, 0o1755, 0o2755, 0o4755, 0o7777])
def test_chmod_sets_all_twelve_bits_and_moves_only_the_ctime(here: Path, kind: str, mode: int) -> None:
    make(kind, here / "name")
    with watching(here / "name") as target, watching(here) as parent:
        os.chmod(here / "name", mode)
    assert mode_of(here / "name") == mode
    assert (target.changed, parent.changed) == (CTIME, NEITHER)


def test_chmod_follows_a_symbolic_link(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    os.chmod(here / "link", 0o600)
    assert mode_of(here / "file") == 0o600
    assert mode_of(here / "link") == 0o777


@pytest.mark.parametrize("owner", [(0, 0), (BOB, BOB), (BOB, ALICE)])
def test_only_the_owner_changes_a_mode(here: Path, owner: tuple[int, int]) -> None:
    touch(here / "file", 0o666, owner=owner)
    with watching(here / "file") as target, refused(errno.EPERM):
        as_alice(lambda: os.chmod(here / "file", 0o600))
    assert target.changed == NEITHER
    with refused(errno.EPERM):
        as_alice(lambda: _with(here / "file", lambda file: os.fchmod(file, 0o600)))


def test_the_owner_changes_a_mode_without_any_permission(here: Path) -> None:
    touch(here / "file", 0o000, owner=HERS)
    as_alice(lambda: os.chmod(here / "file", 0o444))
    assert mode_of(here / "file") == 0o444


def test_a_mode_is_changed_through_a_descriptor_opened_for_reading(here: Path) -> None:
    touch(here / "file")
    with opened(here / "file") as file:
        os.fchmod(file, 0o4711)
    with opened(mkdir(here / "directory")) as directory:
        os.fchmod(directory, 0o1700)
    assert (mode_of(here / "file"), mode_of(here / "directory")) == (0o4711, 0o1700)


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize(("groups", "kept"), [((CREW,), True), ((), False)], ids=["member", "outsider"])
def test_chmod_keeps_setgid_only_for_a_member_of_the_group(here: Path, kind: str, groups: tuple[int, ...], kept: bool) -> None:
    make(kind, here / "name", owner=(ALICE, CREW))
    as_alice(lambda: os.chmod(here / "name", 0o2755), groups)
    assert mode_of(here / "name") == (0o2755 if kept else 0o0755)


def test_a_user_may_set_setuid_and_sticky_on_an_own_file(here: Path) -> None:
    touch(here / "file", owner=HERS)
    as_alice(lambda: os.chmod(here / "file", 0o5755))
    assert mode_of(here / "file") == 0o5755


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket", "block device"])
@pytest.mark.parametrize(
    ("asked", "got"),
    [((BOB, CREW), (BOB, CREW)), ((-1, CREW), (0, CREW)), ((BOB, -1), (BOB, 0)), ((2**32 - 2, 2**31), None)],
)
def test_root_changes_owner_and_group_and_moves_only_the_ctime(
    here: Path, kind: str, asked: tuple[int, int], got: tuple[int, int] | None
) -> None:
    make(kind, here / "name")
    with watching(here / "name") as target, watching(here) as parent:
        os.lchown(here / "name", *asked)
    assert owner_of(here / "name") == (got or asked)
    assert (target.changed, parent.changed) == (CTIME, NEITHER)


def test_minus_one_leaves_both_owners(here: Path) -> None:
    touch(here / "file", owner=(ALICE, CREW))
    os.chown(here / "file", -1, -1)
    as_alice(lambda: os.chown(here / "file", -1, -1))
    assert owner_of(here / "file") == (ALICE, CREW)


def test_chown_follows_a_symbolic_link_and_lchown_does_not(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    os.chown(here / "link", ALICE, ALICE)
    os.lchown(here / "link", BOB, BOB)
    assert owner_of(here / "file") == (ALICE, ALICE)
    assert owner_of(here / "link") == (BOB, BOB)


@pytest.mark.parametrize(
    ("asked", "groups", "refusal"),
    [
        ((BOB, -1), (), True),
        ((0, -1), (), True),
        ((ALICE, -1), (), False),
        ((-1, CREW), (), True),
        ((-1, CREW), (CREW,), False),
        ((ALICE, CREW), (CREW,), False),
        ((BOB, CREW), (CREW,), True),
        ((-1, ALICE), (), False),
    ],
)
def test_a_user_gives_an_own_file_only_to_own_groups(
    here: Path, asked: tuple[int, int], groups: tuple[int, ...], refusal: bool
) -> None:
    touch(here / "file", owner=HERS)
    with watching(here / "file") as target:
        if refusal:
            with refused(errno.EPERM):
                as_alice(lambda: os.chown(here / "file", *asked), groups)
        else:
            as_alice(lambda: os.chown(here / "file", *asked), groups)
    assert target.changed == (NEITHER if refusal else CTIME)
    wanted = tuple(new if new != -1 else old for new, old in zip(asked, HERS, strict=True))
    assert owner_of(here / "file") == (HERS if refusal else wanted)


@pytest.mark.parametrize("asked", [(ALICE, -1), (-1, ALICE), (BOB, BOB)])
def test_a_user_does_not_change_the_owner_of_someone_elses_file(here: Path, asked: tuple[int, int]) -> None:
    touch(here / "file", 0o666, owner=(BOB, BOB))
    with refused(errno.EPERM):
        as_alice(lambda: os.chown(here / "file", *asked), [BOB])


@pytest.mark.parametrize("as_whom", ["root", "owner"])
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("file", 0o4755, 0o0755),
        ("file", 0o2755, 0o0755),
        ("file", 0o6755, 0o0755),
        ("file", 0o6711, 0o0711),
        ("file", 0o4644, 0o0644),
        ("file", 0o1755, 0o1755),
        ("directory", 0o6755, 0o6755),
        ("directory", 0o2770, 0o2770),
    ],
)
def test_a_new_group_clears_setuid_and_setgid_of_a_program_but_not_of_a_directory(
    here: Path, kind: str, before: int, after: int, as_whom: str
) -> None:
    make(kind, here / "name", owner=HERS)
    os.chmod(here / "name", before)
    if as_whom == "root":
        os.chown(here / "name", -1, CREW)
    else:
        as_alice(lambda: os.chown(here / "name", -1, CREW), [CREW])
    assert mode_of(here / "name") == after


def test_setgid_without_group_execute_survives_a_chown_by_root(here: Path) -> None:
    touch(here / "file", 0o2644)
    os.chown(here / "file", -1, CREW)
    assert mode_of(here / "file") == 0o2644


CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda file: os.write(file, b"x"),
    "pwrite beyond the end": lambda file: os.pwrite(file, b"x", 10_000),
    "writev": lambda file: os.writev(file, [b"x", b"y"]),
    "ftruncate": lambda file: os.ftruncate(file, 1),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


@every_change
@pytest.mark.parametrize(
    ("before", "after"), [(0o4777, 0o0777), (0o2777, 0o0777), (0o6777, 0o0777), (0o4666, 0o0666), (0o1777, 0o1777)]
)
@pytest.mark.parametrize("owner", [HERS, (BOB, BOB)], ids=["own", "foreign"])
def test_a_change_by_a_user_clears_setuid_and_setgid(
    here: Path, owner: tuple[int, int], before: int, after: int, change: Callable[[int], object]
) -> None:
    touch(here / "file", before, owner=owner, data=b"data")
    as_alice(lambda: _with(here / "file", change, os.O_RDWR))
    assert mode_of(here / "file") == after


@every_change
def test_a_change_by_root_keeps_setuid_and_setgid(here: Path, change: Callable[[int], object]) -> None:
    touch(here / "file", 0o6777, owner=HERS, data=b"data")
    _with(here / "file", change, os.O_RDWR)
    assert mode_of(here / "file") == 0o6777


@pytest.mark.parametrize("how", ["by name", "at open", "at open for reading"])
def test_truncating_a_file_clears_setuid_and_setgid_for_a_user_and_not_for_root(here: Path, how: str) -> None:
    def truncate(path: Path) -> None:
        if how == "by name":
            os.truncate(path, 1)
        else:
            os.close(os.open(path, os.O_TRUNC | (os.O_WRONLY if how == "at open" else os.O_RDONLY)))

    for name in ("users", "roots"):
        touch(here / name, 0o6777, data=b"data")
    as_alice(lambda: truncate(here / "users"))
    truncate(here / "roots")
    assert (mode_of(here / "users"), mode_of(here / "roots")) == (0o0777, 0o6777)


def test_reading_keeps_setuid(here: Path) -> None:
    touch(here / "file", 0o6777, data=b"data")
    as_alice(lambda: _with(here / "file", lambda file: os.read(file, 10)))
    assert mode_of(here / "file") == 0o6777


@every_change
def test_a_change_takes_the_capabilities_from_a_program(here: Path, change: Callable[[int], object]) -> None:
    touch(here / "file", 0o777, data=b"data")
    net_bind_service = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr(here / "file", "security.capability", net_bind_service)
    assert os.getxattr(here / "file", "security.capability") == net_bind_service
    _with(here / "file", change, os.O_RDWR)
    assert "security.capability" not in os.listxattr(here / "file")


def test_a_new_owner_takes_the_capabilities_from_a_program(here: Path) -> None:
    touch(here / "file", 0o777)
    os.setxattr(here / "file", "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    os.chown(here / "file", ALICE, ALICE)
    assert "security.capability" not in os.listxattr(here / "file")


def _with(path: Path, use: Callable[[int], object], flags: int = os.O_RDONLY) -> None:
    with opened(path, flags) as file:
        use(file)
