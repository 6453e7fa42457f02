"""Extended attributes: user, trusted and security, their errnos and limits."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOB,
    NEITHER,
    as_alice,
    errno_of,
    make,
    mkdir,
    opened,
    refused,
    touch,
    watching,
)

NAMESPACES = ("user", "trusted", "security")
HIDDEN = "trusted.mirrorfs"


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("space", NAMESPACES)
@pytest.mark.parametrize("value", [b"", b"1", bytes(range(256)), b"v" * 3000], ids=["empty", "short", "bytes", "long"])
def test_an_attribute_keeps_its_value(here: Path, kind: str, space: str, value: bytes) -> None:
    make(kind, here / "name")
    os.setxattr(here / "name", f"{space}.a", value)
    assert os.getxattr(here / "name", f"{space}.a") == value
    assert os.listxattr(here / "name") == [f"{space}.a"]
    os.removexattr(here / "name", f"{space}.a")
    assert os.listxattr(here / "name") == []


@pytest.mark.parametrize("kind", ["symlink", "fifo", "socket", "character device"])
def test_everything_takes_trusted_attributes_of_root(here: Path, kind: str) -> None:
    make(kind, here / "name")
    os.setxattr(here / "name", "trusted.a", b"value", follow_symlinks=False)
    assert os.getxattr(here / "name", "trusted.a", follow_symlinks=False) == b"value"
    assert os.listxattr(here / "name", follow_symlinks=False) == ["trusted.a"]


@pytest.mark.parametrize("kind", ["symlink", "fifo", "socket", "character device"])
def test_only_files_and_directories_take_attributes_of_users(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with refused(errno.EPERM):
        os.setxattr(here / "name", "user.a", b"value", follow_symlinks=False)
    with refused(errno.ENODATA):
        os.getxattr(here / "name", "user.a", follow_symlinks=False)


def test_many_attributes_are_all_listed(here: Path) -> None:
    touch(here / "file")
    names = {f"user.{number:03}" for number in range(60)}
    for name in names:
        os.setxattr(here / "file", name, name.encode())
    assert set(os.listxattr(here / "file")) == names
    assert {os.getxattr(here / "file", name).decode() for name in names} == names


def test_a_new_value_replaces_the_old_whatever_the_lengths(here: Path) -> None:
    touch(here / "file")
    for value in (b"short", b"long" * 500, b"", b"middle" * 10):
        os.setxattr(here / "file", "user.a", value)
        assert os.getxattr(here / "file", "user.a") == value


def test_create_and_replace_say_what_must_be_there(here: Path) -> None:
    touch(here / "file")
    with watching(here / "file") as target, refused(errno.ENODATA):
        os.setxattr(here / "file", "user.a", b"1", os.XATTR_REPLACE)
    assert target.changed == NEITHER
    os.setxattr(here / "file", "user.a", b"2", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(here / "file", "user.a", b"3", os.XATTR_CREATE)
    assert os.getxattr(here / "file", "user.a") == b"2"
    os.setxattr(here / "file", "user.a", b"4", os.XATTR_REPLACE)
    assert os.getxattr(here / "file", "user.a") == b"4"


def test_flags_that_are_none_are_refused(here: Path) -> None:
    touch(here / "file")
    with refused(errno.EINVAL):
        os.setxattr(here / "file", "user.a", b"1", 4)


def test_a_missing_attribute_has_no_data(here: Path) -> None:
    touch(here / "file")
    for space in NAMESPACES:
        for attempt in (os.getxattr, os.removexattr):
            with refused(errno.ENODATA):
                attempt(here / "file", f"{space}.missing")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("user." + "n" * 251, errno.ERANGE),
        ("", errno.ERANGE),
        ("user.", errno.EINVAL),
        ("nothing", errno.EOPNOTSUPP),
        ("unknown.space", errno.EOPNOTSUPP),
    ],
)
def test_a_name_that_is_none_is_refused(here: Path, name: str, code: int) -> None:
    touch(here / "file")
    with refused(code):
        os.setxattr(here / "file", name, b"1")
    assert os.listxattr(here / "file") == []


def test_a_name_of_255_bytes_is_kept(here: Path) -> None:
    touch(here / "file")
    name = "user." + "n" * 250
    os.setxattr(here / "file", name, b"value")
    assert os.listxattr(here / "file") == [name]
    assert os.getxattr(here / "file", name) == b"value"


def test_a_name_of_any_bytes_is_kept(here: Path) -> None:
    touch(here / "file")
    name = b"user." + bytes(range(1, 200))
    os.setxattr(here / "file", name, b"value")
    assert [os.fsencode(listed) for listed in os.listxattr(here / "file")] == [name]


def test_a_value_beyond_every_limit_is_refused_and_leaves_the_old_one(here: Path) -> None:
    touch(here / "file")
    os.setxattr(here / "file", "user.a", b"old")
    with refused(errno.E2BIG):
        os.setxattr(here / "file", "user.a", bytes(65_537))
    # 64 KiB is the limit of Linux; ext4 has room for less.
    code = errno_of(lambda: os.setxattr(here / "file", "user.a", bytes(65_536)))
    assert code in (0, errno.ENOSPC, errno.E2BIG, errno.ERANGE)
    assert os.getxattr(here / "file", "user.a") == (b"old" if code else bytes(65_536))


def test_a_buffer_that_is_too_small_is_out_of_range_and_none_asks_for_the_size(here: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(touch(here / "file"))
    os.setxattr(path, "user.a", b"value")
    os.setxattr(path, "user.b", b"")
    small, large = ctypes.create_string_buffer(4), ctypes.create_string_buffer(100)
    assert libc.getxattr(path, b"user.a", None, ctypes.c_size_t(0)) == 5
    assert libc.getxattr(path, b"user.b", None, ctypes.c_size_t(0)) == 0
    assert libc.listxattr(path, None, ctypes.c_size_t(0)) == 14
    for answer in (
        libc.getxattr(path, b"user.a", small, ctypes.c_size_t(4)),
        libc.listxattr(path, small, ctypes.c_size_t(4)),
    ):
        assert (answer, ctypes.get_errno()) == (-1, errno.ERANGE)
    assert libc.getxattr(path, b"user.a", large, ctypes.c_size_t(100)) == 5
    assert libc.listxattr(path, large, ctypes.c_size_t(14)) == 14


@pytest.mark.parametrize(
    ("mode", "reads", "writes"), [(0o666, True, True), (0o664, True, False), (0o662, False, True), (0o660, False, False)]
)
def test_attributes_of_users_follow_the_permissions_of_the_file(here: Path, mode: int, reads: bool, writes: bool) -> None:
    touch(here / "file", mode)
    os.setxattr(here / "file", "user.a", b"value")
    attempts: list[Callable[[], object]] = [
        lambda: os.getxattr(here / "file", "user.a"),
        lambda: os.setxattr(here / "file", "user.b", b"1"),
        lambda: os.removexattr(here / "file", "user.a"),
        lambda: os.listxattr(here / "file"),
    ]
    denied = [not reads, not writes, not writes, False]
    expected = [errno.EACCES if refusal else 0 for refusal in denied]
    assert as_alice(lambda: [errno_of(attempt) for attempt in attempts]) == expected


def test_in_a_sticky_directory_only_its_owner_gives_it_attributes(here: Path) -> None:
    directory = mkdir(here / "shared", 0o1777, owner=(BOB, BOB))
    with refused(errno.EPERM):
        as_alice(lambda: os.setxattr(directory, "user.a", b"1"))
    os.chown(directory, ALICE, ALICE)
    as_alice(lambda: os.setxattr(directory, "user.a", b"1"))


def test_trusted_attributes_are_for_root_alone(here: Path) -> None:
    touch(here / "file", 0o666, owner=(ALICE, ALICE))
    os.setxattr(here / "file", "trusted.a", b"value")
    attempts: list[Callable[[], object]] = [
        lambda: os.getxattr(here / "file", "trusted.a"),
        lambda: os.setxattr(here / "file", "trusted.b", b"1"),
        lambda: os.removexattr(here / "file", "trusted.a"),
    ]
    answers = as_alice(lambda: [errno_of(attempt) for attempt in attempts])
    assert answers == [errno.ENODATA, errno.EPERM, errno.EPERM]
    assert os.listxattr(here / "file") == ["trusted.a"]


def test_trusted_attributes_are_listed_for_root_alone(here: Path) -> None:
    touch(here / "file", 0o666)
    os.setxattr(here / "file", "trusted.a", b"value")
    os.setxattr(here / "file", "user.a", b"value")
    assert as_alice(lambda: os.listxattr(here / "file")) == ["user.a"]
    assert sorted(os.listxattr(here / "file")) == ["trusted.a", "user.a"]


def test_security_attributes_are_changed_by_root_alone(here: Path) -> None:
    touch(here / "file", 0o666, owner=(ALICE, ALICE))
    os.setxattr(here / "file", "security.a", b"value")
    with refused(errno.EPERM):
        as_alice(lambda: os.setxattr(here / "file", "security.a", b"1"))
    assert as_alice(lambda: os.getxattr(here / "file", "security.a")) == b"value"


def test_attributes_are_reached_through_descriptors_and_followed_links(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    with opened(here / "file") as file:
        os.setxattr(file, "user.a", b"1")
        assert os.getxattr(here / "link", "user.a") == b"1"
        os.setxattr(here / "link", "user.b", b"2")
        assert sorted(os.listxattr(file)) == ["user.a", "user.b"]


def test_attributes_stay_through_renames_and_links(here: Path) -> None:
    touch(here / "file")
    os.setxattr(here / "file", "user.a", b"value")
    os.link(here / "file", here / "link")
    os.rename(here / "file", here / "renamed")
    assert os.getxattr(here / "link", "user.a") == b"value"
    os.setxattr(here / "renamed", "user.a", b"new")
    assert os.getxattr(here / "link", "user.a") == b"new"


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket", "character device"])
def test_the_attribute_that_a_mirror_keeps_its_ids_in_is_hidden(here: Path, on_fuse: bool, kind: str) -> None:
    make(kind, here / "name")
    assert os.listxattr(here / "name", follow_symlinks=False) == []
    with refused(errno.ENODATA):
        os.getxattr(here / "name", HIDDEN, follow_symlinks=False)
    with refused(errno.ENODATA, errno.EPERM, errno.EACCES):
        os.removexattr(here / "name", HIDDEN, follow_symlinks=False)
    if on_fuse:
        with refused(errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
            os.setxattr(here / "name", HIDDEN, b"mine", follow_symlinks=False)
