"""Names of any bytes, and the slashes and dots of a path."""

import errno
import os
from pathlib import Path

import pytest

from tests.posix.support import make, mkdir, read, refused, touch

STRANGE = [
    b" ",
    b"  leading and trailing  ",
    b"...",
    b"..name",
    b".hidden",
    b"-rf",
    b"line\nbreak",
    b"tab\tand\rreturn",
    b"\\back\\slash",
    b"quo'te\"s`",
    b"*?[glob]",
    b"%s%n$HOME",
    b"\x01",
    b"\x7f",
    b"\xff\xfe",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    "é".encode(),
    "e\u0301".encode(),
    "名前".encode(),
    "\U0001f300".encode(),
    b"\xff" * 255,
    b"n" * 255,
    b"CON",
    b"name.",
    b"name~",
    b"#name#",
    b".fuse_hidden0000000100000001",
    b".nfs0001",
]


@pytest.mark.parametrize("name", STRANGE, ids=repr)
def test_a_name_is_kept_byte_for_byte(here: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(here), name)
    touch(path, data=b"data")
    assert os.listdir(os.fsencode(here)) == [name]
    assert read(path) == b"data"
    os.rename(path, path[:-1] + b"+" if len(name) > 1 else path + b"+")
    [renamed] = os.listdir(os.fsencode(here))
    os.rename(os.path.join(os.fsencode(here), renamed), path)
    os.unlink(path)
    assert os.listdir(os.fsencode(here)) == []


@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_every_byte_but_slash_and_nul_is_allowed_in_a_name(here: Path, kind: str) -> None:
    names = {bytes([byte]) for byte in range(1, 256)} - {b"/", b"."}
    for name in names:
        make(kind, os.path.join(os.fsencode(here), name))
    assert set(os.listdir(os.fsencode(here))) == names


def test_names_that_differ_in_case_or_normal_form_are_different(here: Path) -> None:
    names = ["name", "Name", "NAME", "é", "e\u0301", "ſ", "s"]
    for name in names:
        touch(here / name, data=name.encode())
    assert sorted(os.listdir(here)) == sorted(names)
    assert all(read(here / name) == name.encode() for name in names)


@pytest.mark.parametrize(
    "spelling", ["file", "./file", ".//./file", "directory/../file", "directory/./..//file", "link/../file"]
)
def test_dots_and_slashes_are_only_ways_to_say_it(here: Path, spelling: str) -> None:
    touch(here / "file", data=b"data")
    mkdir(here / "directory")
    (here / "link").symlink_to("directory")
    assert read(f"{here}/{spelling}") == b"data"


def test_dot_dot_after_a_link_is_the_parent_of_its_target(here: Path) -> None:
    os.makedirs(here / "a" / "b")
    touch(here / "a" / "file", data=b"in a")
    (here / "link").symlink_to("a/b")
    assert read(f"{here}/link/../file") == b"in a"


@pytest.mark.parametrize("spelling", [".", "./", "..", "../"])
def test_dots_are_not_made(here: Path, spelling: str) -> None:
    mkdir(here / "directory")
    with refused(errno.EEXIST):
        os.mkdir(f"{here}/directory/{spelling}")
    with refused(errno.EEXIST):
        os.symlink("target", f"{here}/directory/{spelling}")


def test_slashes_may_follow_a_directory_that_is_made(here: Path) -> None:
    os.mkdir(f"{here}/one/")
    os.mkdir(f"{here}/two///")
    assert sorted(os.listdir(here)) == ["one", "two"]
    with refused(errno.EEXIST):
        os.mkdir(f"{here}/one/")


def test_slashes_may_not_follow_anything_else_that_is_made(here: Path) -> None:
    touch(here / "file")
    with refused(errno.ENOENT):
        os.symlink("target", f"{here}/name/")
    with refused(errno.ENOENT):
        os.mkfifo(f"{here}/name/")
    with refused(errno.ENOENT):
        os.link(here / "file", f"{here}/name/")
    with refused(errno.ENOTDIR):
        os.link(f"{here}/file/", here / "name")
    assert os.listdir(here) == ["file"]


def test_a_slash_after_a_link_follows_it(here: Path) -> None:
    mkdir(here / "directory")
    touch(here / "file")
    for name in ("directory", "file", "nowhere"):
        (here / f"to-{name}").symlink_to(name)
    assert os.path.samestat(os.lstat(f"{here}/to-directory/"), os.stat(here / "directory"))
    with refused(errno.EINVAL):
        os.readlink(f"{here}/to-directory/")
    with refused(errno.ENOTDIR):
        os.lstat(f"{here}/to-file/")
    with refused(errno.ENOENT):
        os.lstat(f"{here}/to-nowhere/")
    with refused(errno.EEXIST):
        os.mkdir(f"{here}/to-nowhere/")


def test_a_link_is_relative_to_the_directory_that_it_lies_in(here: Path) -> None:
    mkdir(here / "directory")
    touch(here / "file", data=b"outer")
    touch(here / "directory" / "file", data=b"inner")
    (here / "directory" / "link").symlink_to("file")
    (here / "directory" / "up").symlink_to("../file")
    (here / "directory" / "absolute").symlink_to(here / "file")
    assert [read(here / "directory" / name) for name in ("link", "up", "absolute")] == [b"inner", b"outer", b"outer"]
    os.rename(here / "directory" / "link", here / "link")
    assert read(here / "link") == b"outer"
