"""POSIX ACLs: what they permit, how chmod and they share the mode, and what new things inherit."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.posix.support import (
    ACL_ACCESS,
    ACL_DEFAULT,
    ALICE,
    BOB,
    CREW,
    CTIME,
    acl,
    as_alice,
    as_bob,
    errno_of,
    get_acl,
    make,
    mkdir,
    mode_of,
    refused,
    set_acl,
    touch,
    watching,
)

WIDE = f"u::rwx u:{ALICE}:rw- g::r-- g:{CREW}:rwx m::rwx o::---"
"""For a directory's default ACL: every kind of entry."""


def _may(path: Path, groups: tuple[int, ...] = ()) -> str:
    """What ALICE may do with a file, as "rwx" with dashes; tried by opening where there is a way to."""

    def tries() -> str:
        reads = not errno_of(lambda: os.close(os.open(path, os.O_RDONLY)))
        writes = not errno_of(lambda: os.close(os.open(path, os.O_WRONLY)))
        runs = os.access(path, os.X_OK)
        return "".join(flag if yes else "-" for flag, yes in (("r", reads), ("w", writes), ("x", runs)))

    return as_alice(tries, groups)


@pytest.mark.parametrize(
    ("text", "groups", "may"),
    [
        (f"u::rwx u:{ALICE}:r-x g::rwx m::rwx o::rwx", (), "r-x"),
        (f"u::rwx u:{ALICE}:--- g::rwx m::rwx o::rwx", (CREW,), "---"),
        (f"u::rwx u:{ALICE}:rwx g::--- m::r-- o::rwx", (), "r--"),
        (f"u::rwx u:{ALICE}:rwx g::rwx m::--- o::---", (), "---"),
        (f"u::rwx u:{BOB}:rwx g::rwx m::rwx o::--x", (), "--x"),
        (f"u::rwx g::--- g:{CREW}:rw- m::rwx o::---", (CREW,), "rw-"),
        (f"u::rwx g::--- g:{CREW}:rw- m::r-- o::rwx", (CREW,), "r--"),
        (f"u::rwx g::--- g:{CREW}:rw- m::rwx o::--x", (), "--x"),
        (f"u::rwx g::--- g:{CREW}:--- m::rwx o::rwx", (CREW,), "---"),
        (f"u::rwx g::--- g:{CREW}:r-- g:{CREW + 1000}:-w- m::rwx o::---", (CREW, CREW + 1000), "rw-"),
        ("u::rwx g::--- m::rwx o::rwx", (0,), "---"),
        ("u::rwx g::rw- m::rwx o::---", (0,), "rw-"),
        ("u::rwx g::rw- m::-wx o::---", (0,), "-w-"),
    ],
)
def test_the_entry_that_fits_decides_within_the_mask(here: Path, text: str, groups: tuple[int, ...], may: str) -> None:
    touch(here / "file", 0o600)
    set_acl(here / "file", text)
    # Opening for both at once is refused where two group entries give one each; the helper opens for each alone.
    assert _may(here / "file", groups) == may


@pytest.mark.parametrize(("owner_bits", "may"), [("rwx", "rwx"), ("r--", "r--"), ("---", "---")])
def test_the_owner_has_the_owners_entry_whatever_the_mask(here: Path, owner_bits: str, may: str) -> None:
    touch(here / "file", owner=(ALICE, ALICE))
    set_acl(here / "file", f"u::{owner_bits} u:{ALICE}:-w- g::rwx m::--- o::rwx")
    assert _may(here / "file") == may


def test_an_acl_lets_a_user_into_a_directory_and_change_it(here: Path) -> None:
    mkdir(here / "private", 0o700)
    set_acl(here / "private", f"u::rwx u:{ALICE}:rwx g::--- m::rwx o::---")
    as_alice(lambda: touch(here / "private" / "hers"))
    with refused(errno.EACCES):
        as_bob(lambda: os.stat(here / "private" / "hers"))
    set_acl(here / "private", f"u::rwx u:{ALICE}:--x g::--- m::rwx o::---")
    as_alice(lambda: os.stat(here / "private" / "hers"))
    with refused(errno.EACCES):
        as_alice(lambda: os.unlink(here / "private" / "hers"))
    with refused(errno.EACCES):
        as_alice(lambda: os.listdir(here / "private"))


def test_an_acl_is_read_as_it_was_set_and_moves_the_ctime(here: Path) -> None:
    touch(here / "file", 0o640)
    text = f"u::rw- u:{BOB}:r-- u:{ALICE}:rw- g::r-- g:{CREW}:--x m::rwx o::---"
    with watching(here / "file") as target:
        set_acl(here / "file", text)
    assert target.changed == CTIME
    assert get_acl(here / "file") == text
    assert os.listxattr(here / "file") == [ACL_ACCESS]


def test_the_mask_is_what_the_mode_shows_for_the_group(here: Path) -> None:
    touch(here / "file", 0o600)
    set_acl(here / "file", f"u::rwx u:{ALICE}:rwx g::--- m::rw- o::--x")
    assert mode_of(here / "file") == 0o761


def test_chmod_changes_the_mask_and_not_the_groups_entry(here: Path) -> None:
    touch(here / "file")
    set_acl(here / "file", f"u::rw- u:{ALICE}:rw- g::r-- m::rw- o::---")
    os.chmod(here / "file", 0o714)
    assert get_acl(here / "file") == f"u::rwx u:{ALICE}:rw- g::r-- m::--x o::r--"
    assert _may(here / "file") == "---"
    os.chmod(here / "file", 0o664)
    assert _may(here / "file") == "rw-"


def test_an_acl_that_says_no_more_than_a_mode_becomes_the_mode(here: Path) -> None:
    touch(here / "file", 0o600)
    set_acl(here / "file", "u::rwx g::r-x o::--x")
    assert (mode_of(here / "file"), get_acl(here / "file"), os.listxattr(here / "file")) == (0o751, "", [])


def test_a_removed_acl_leaves_the_mode_with_the_mask(here: Path) -> None:
    touch(here / "file")
    set_acl(here / "file", f"u::rw- u:{ALICE}:rw- g::--- m::rw- o::---")
    os.removexattr(here / "file", ACL_ACCESS)
    assert (mode_of(here / "file"), get_acl(here / "file")) == (0o660, "")
    assert _may(here / "file") == "---"


def test_only_the_owner_sets_and_removes_an_acl(here: Path) -> None:
    text = f"u::rw- u:{ALICE}:rw- g::rw- m::rw- o::rw-"
    touch(here / "file", 0o666, owner=(BOB, BOB))
    set_acl(here / "file", text)
    for attempt in (
        lambda: set_acl(here / "file", "u::rw- g::rw- o::rw-"),
        lambda: os.removexattr(here / "file", ACL_ACCESS),
    ):
        with refused(errno.EPERM):
            as_alice(attempt)
    assert as_alice(lambda: get_acl(here / "file")) == text
    as_bob(lambda: os.removexattr(here / "file", ACL_ACCESS))


@pytest.mark.parametrize(
    "value",
    [
        acl("u::rw- g::r--"),
        acl(f"u::rw- u:{ALICE}:r-- g::r-- o::r--"),
        acl("u::rw- u::rw- g::r-- o::r--"),
        acl("g::r-- u::rw- o::r--"),
        acl("u::rw- g::r-- o::r--")[:-1],
        b"\x02",
        b"\xff" * 28,
    ],
)
def test_an_acl_that_is_none_is_refused(here: Path, value: bytes) -> None:
    touch(here / "file", 0o640)
    with refused(errno.EINVAL, errno.EOPNOTSUPP):
        os.setxattr(here / "file", ACL_ACCESS, value)
    assert (mode_of(here / "file"), get_acl(here / "file")) == (0o640, "")


def test_only_a_directory_has_a_default_acl(here: Path) -> None:
    touch(here / "file")
    with refused(errno.EACCES):
        set_acl(here / "file", WIDE, ACL_DEFAULT)


def test_a_symbolic_link_has_no_acl(here: Path) -> None:
    (here / "link").symlink_to("nowhere")
    with refused(errno.EOPNOTSUPP):
        os.setxattr(here / "link", ACL_ACCESS, acl("u::rw- g::r-- o::r--"), follow_symlinks=False)


def test_a_default_acl_does_not_concern_its_directory(here: Path) -> None:
    mkdir(here / "directory", 0o750)
    set_acl(here / "directory", f"u::--- u:{ALICE}:rwx g::--- m::rwx o::rwx", ACL_DEFAULT)
    assert mode_of(here / "directory") == 0o750
    with refused(errno.EACCES):
        as_alice(lambda: os.listdir(here / "directory"))


@pytest.mark.parametrize("kind", ["file", "fifo", "socket"])
def test_a_new_file_inherits_the_default_acl_within_its_own_mode(here: Path, kind: str) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    modes = {"file": 0o100000, "fifo": 0o010000, "socket": 0o140000}
    os.mknod(here / "directory" / "name", modes[kind] | 0o666)
    assert get_acl(here / "directory" / "name") == f"u::rw- u:{ALICE}:rw- g::r-- g:{CREW}:rwx m::rw- o::---"
    assert mode_of(here / "directory" / "name") == 0o660


@pytest.mark.parametrize(("mode", "mask"), [(0o777, "rwx"), (0o640, "r--"), (0o600, "---")])
def test_an_opened_new_file_inherits_the_default_acl(here: Path, mode: int, mask: str) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    os.close(os.open(here / "directory" / "file", os.O_CREAT | os.O_WRONLY, mode))
    owner = "rwx" if mode == 0o777 else "rw-"
    expected = f"u::{owner} u:{ALICE}:rw- g::r-- g:{CREW}:rwx m::{mask} o::---"
    assert get_acl(here / "directory" / "file") == expected
    assert get_acl(here / "directory" / "file", ACL_DEFAULT) == ""


def test_a_new_directory_inherits_the_default_acl_for_itself_and_for_what_comes(here: Path) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    os.mkdir(here / "directory" / "below", 0o777)
    assert get_acl(here / "directory" / "below") == WIDE
    assert get_acl(here / "directory" / "below", ACL_DEFAULT) == WIDE
    os.makedirs(here / "directory" / "below" / "deeper")
    os.mknod(here / "directory" / "below" / "deeper" / "file", 0o100666)
    assert _may(here / "directory" / "below" / "deeper" / "file") == "---"
    set_acl(here / "directory" / "below", f"u::rwx u:{ALICE}:rwx g::--- m::rwx o::---")
    set_acl(here / "directory" / "below" / "deeper", f"u::rwx u:{ALICE}:rwx g::--- m::rwx o::---")
    assert _may(here / "directory" / "below" / "deeper" / "file") == "rw-"


def test_a_minimal_default_acl_gives_new_files_a_mode_only(here: Path) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", "u::rwx g::r-x o::---", ACL_DEFAULT)
    os.close(os.open(here / "directory" / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir(here / "directory" / "below", 0o777)
    assert (mode_of(here / "directory" / "file"), get_acl(here / "directory" / "file")) == (0o640, "")
    assert (mode_of(here / "directory" / "below"), get_acl(here / "directory" / "below")) == (0o750, "")


def test_a_symbolic_link_inherits_nothing(here: Path) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    os.symlink("nowhere", here / "directory" / "link")
    assert os.listxattr(here / "directory" / "link", follow_symlinks=False) == []
    assert mode_of(here / "directory" / "link") == 0o777


def test_what_is_moved_or_linked_into_a_directory_inherits_nothing(here: Path) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    touch(here / "moved", 0o640)
    touch(here / "linked", 0o640)
    os.rename(here / "moved", here / "directory" / "moved")
    os.link(here / "linked", here / "directory" / "linked")
    for name in ("moved", "linked"):
        assert (mode_of(here / "directory" / name), get_acl(here / "directory" / name)) == (0o640, "")


def test_a_removed_default_acl_is_no_longer_inherited(here: Path) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    os.removexattr(here / "directory", ACL_DEFAULT)
    assert os.listxattr(here / "directory") == []
    os.mknod(here / "directory" / "file", 0o100666)
    assert (mode_of(here / "directory" / "file"), get_acl(here / "directory" / "file")) == (0o666, "")


def test_a_default_acl_takes_the_place_of_the_umask(here: Path) -> None:
    mkdir(here / "directory")
    set_acl(here / "directory", WIDE, ACL_DEFAULT)
    os.umask(0o077)
    os.close(os.open(here / "directory" / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mknod(here / "directory" / "node", 0o100666)
    os.mkdir(here / "directory" / "below", 0o777)
    modes = {name: mode_of(here / "directory" / name) for name in ("file", "node", "below")}
    assert modes == {"file": 0o660, "node": 0o660, "below": 0o770}


def test_a_umask_counts_where_there_is_no_default_acl(here: Path) -> None:
    set_acl(here, f"u::rwx u:{ALICE}:rwx g::rwx m::rwx o::--x")
    os.umask(0o027)
    os.close(os.open(here / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    assert (mode_of(here / "file"), get_acl(here / "file")) == (0o640, "")


@pytest.mark.parametrize(("groups", "kept"), [((), False), ((CREW,), True)], ids=["outsider", "member"])
@pytest.mark.parametrize("text", ["u::rwx g::rwx o::r-x", f"u::rwx u:{BOB}:r-x g::rwx m::rwx o::r-x"])
def test_setting_an_acl_keeps_setgid_only_for_a_member_of_the_group(
    here: Path, text: str, groups: tuple[int, ...], kept: bool
) -> None:
    make("file", here / "file", owner=(ALICE, CREW))
    os.chmod(here / "file", 0o2755)
    as_alice(lambda: set_acl(here / "file", text), groups)
    assert mode_of(here / "file") == (0o2775 if kept else 0o0775)


def test_the_tools_of_the_system_agree(here: Path) -> None:
    try:
        subprocess.run(["setfacl", "-m", f"u:{ALICE}:rw", touch(here / "file", 0o600)], check=True)
    except FileNotFoundError:
        pytest.skip("setfacl is not installed")
    assert get_acl(here / "file") == f"u::rw- u:{ALICE}:rw- g::--- m::rw- o::---"
    shown = subprocess.run(["getfacl", "-ncpE", here / "file"], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["user::rw-", f"user:{ALICE}:rw-", "group::---", "mask::rw-", "other::---"]
