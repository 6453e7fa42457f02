"""What every call that takes a path answers when the path itself is the trouble."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import as_alice, mkdir, refused, touch

Call = Callable[[str, str], object]


def _opened(path: str, flags: int) -> None:
    os.close(os.open(path, flags, 0o644))


# Each takes the path under test and the path of a file that exists.
USING: dict[str, Call] = {
    "stat": lambda path, _: os.stat(path),
    "lstat": lambda path, _: os.lstat(path),
    "open": lambda path, _: _opened(path, os.O_RDONLY),
    "open for writing": lambda path, _: _opened(path, os.O_WRONLY),
    "listdir": lambda path, _: os.listdir(path),
    "chdir": lambda path, _: os.chdir(path),
    "truncate": lambda path, _: os.truncate(path, 0),
    "chmod": lambda path, _: os.chmod(path, 0o600),
    "chown": lambda path, _: os.chown(path, -1, -1),
    "lchown": lambda path, _: os.lchown(path, -1, -1),
    "utime": lambda path, _: os.utime(path),
    "utime of a link": lambda path, _: os.utime(path, follow_symlinks=False),
    "readlink": lambda path, _: os.readlink(path),
    "unlink": lambda path, _: os.unlink(path),
    "rmdir": lambda path, _: os.rmdir(path),
    "rename from": os.rename,
    "link from": lambda path, other: os.link(path, other + "-link"),
    "statvfs": lambda path, _: os.statvfs(path),
    "getxattr": lambda path, _: os.getxattr(path, "user.a"),
    "setxattr": lambda path, _: os.setxattr(path, "user.a", b"1"),
    "listxattr": lambda path, _: os.listxattr(path),
    "removexattr": lambda path, _: os.removexattr(path, "user.a"),
}
MAKING: dict[str, Call] = {
    "open to create": lambda path, _: _opened(path, os.O_CREAT | os.O_WRONLY),
    "open to create exclusively": lambda path, _: _opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
    "mkdir": lambda path, _: os.mkdir(path),
    "mkfifo": lambda path, _: os.mkfifo(path),
    "mknod of a file": lambda path, _: os.mknod(path, stat.S_IFREG | 0o644),
    "mknod of a socket": lambda path, _: os.mknod(path, stat.S_IFSOCK | 0o644),
    "symlink": lambda path, _: os.symlink("target", path),
    "link to": lambda path, other: os.link(other, path),
    "rename to": lambda path, other: os.rename(other, path),
}
ALL = USING | MAKING
NOT_FOLLOWING = {"lstat", "lchown", "utime of a link", "readlink", "unlink", "rmdir", "rename from", "link from"}
REMOVING = {"unlink", "rmdir", "rename from"}

every_call = pytest.mark.parametrize("call", ALL.values(), ids=ALL.keys())
every_using_call = pytest.mark.parametrize("call", USING.values(), ids=USING.keys())
every_making_call = pytest.mark.parametrize("call", MAKING.values(), ids=MAKING.keys())


@pytest.fixture
def other(here: Path) -> str:
    """A file that exists."""
    return str(touch(here / "other", 0o666))


@every_call
def test_a_prefix_that_is_a_file_is_not_a_directory(here: Path, other: str, call: Call) -> None:
    touch(here / "file")
    with refused(errno.ENOTDIR):
        call(f"{here}/file/name", other)


@every_call
def test_a_prefix_that_is_missing_is_not_found(here: Path, other: str, call: Call) -> None:
    with refused(errno.ENOENT):
        call(f"{here}/missing/name", other)


@every_using_call
def test_a_name_that_is_missing_is_not_found(here: Path, other: str, call: Call) -> None:
    with refused(errno.ENOENT):
        call(f"{here}/missing", other)


@every_call
def test_an_empty_path_is_not_found(other: str, call: Call) -> None:
    with refused(errno.ENOENT):
        call("", other)


@every_call
def test_a_name_of_256_bytes_is_too_long(here: Path, other: str, call: Call) -> None:
    with refused(errno.ENAMETOOLONG):
        call(f"{here}/{'n' * 256}", other)


@every_call
def test_a_prefix_of_256_bytes_is_too_long(here: Path, other: str, call: Call) -> None:
    with refused(errno.ENAMETOOLONG):
        call(f"{here}/{'n' * 256}/name", other)


@every_making_call
def test_a_name_of_255_bytes_can_be_made(here: Path, other: str, call: Call) -> None:
    name = "n" * 255
    call(f"{here}/{name}", other)
    assert name in os.listdir(here)


@every_call
def test_a_path_of_4096_bytes_is_too_long(here: Path, other: str, call: Call) -> None:
    with refused(errno.ENAMETOOLONG):
        call(_padded(here, "name", 4096), other)


@every_making_call
def test_a_path_of_4095_bytes_can_be_made(here: Path, other: str, call: Call) -> None:
    call(_padded(here, "name", 4095), other)
    assert "name" in os.listdir(here)


def _padded(directory: Path, name: str, length: int) -> str:
    missing = length - len(str(directory)) - len(name) - 1
    return f"{directory}/{'./' * (missing // 2)}{'/' * (missing % 2)}{name}"


@every_call
def test_a_prefix_that_loops_is_given_up(here: Path, other: str, call: Call) -> None:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    with refused(errno.ELOOP):
        call(f"{here}/a/name", other)


@pytest.mark.parametrize("name", sorted(set(USING) - NOT_FOLLOWING))
def test_a_link_that_loops_is_given_up_where_it_is_followed(here: Path, other: str, name: str) -> None:
    (here / "loop").symlink_to("loop")
    with refused(errno.ELOOP):
        USING[name](f"{here}/loop", other)


@pytest.mark.parametrize("name", sorted(set(USING) - NOT_FOLLOWING))
def test_a_dangling_link_is_not_found_where_it_is_followed(here: Path, other: str, name: str) -> None:
    (here / "dangling").symlink_to("nowhere")
    with refused(errno.ENOENT):
        USING[name](f"{here}/dangling", other)


@every_call
def test_a_prefix_without_search_permission_is_denied(here: Path, other: str, call: Call) -> None:
    os.chmod(here, 0o777)
    closed = mkdir(here / "closed", 0o666)
    touch(closed / "name", 0o666)
    with refused(errno.EACCES):
        as_alice(lambda: call(f"{closed}/name", other))


@every_making_call
def test_nothing_can_be_made_in_a_directory_without_write_permission(here: Path, call: Call) -> None:
    outside = mkdir(here / "outside", 0o777)
    other = str(touch(outside / "other", 0o666))
    closed = mkdir(here / "closed", 0o755)
    with watched_listing(closed), refused(errno.EACCES):
        as_alice(lambda: call(f"{closed}/name", other))


@pytest.mark.parametrize("name", sorted(REMOVING))
def test_nothing_can_be_removed_from_a_directory_without_write_permission(here: Path, name: str) -> None:
    outside = mkdir(here / "outside", 0o777)
    closed = mkdir(here / "closed", 0o755)
    if name == "rmdir":
        mkdir(closed / "name", 0o777)
    else:
        touch(closed / "name", 0o666)
    with watched_listing(closed), refused(errno.EACCES):
        as_alice(lambda: USING[name](f"{closed}/name", f"{outside}/other"))


@pytest.mark.parametrize("name", sorted(REMOVING))
def test_removing_what_is_missing_from_a_closed_directory_says_that_it_is_missing(here: Path, name: str) -> None:
    with refused(errno.ENOENT):
        as_alice(lambda: USING[name](f"{here}/missing", f"{here}/other"))


@pytest.mark.parametrize("name", sorted(set(MAKING) - {"open to create", "rename to", "link to"}))
def test_making_what_exists_in_a_closed_directory_says_that_it_exists(here: Path, other: str, name: str) -> None:
    with refused(errno.EEXIST):
        as_alice(lambda: MAKING[name](other, ""))


@pytest.mark.parametrize("name", sorted(set(MAKING) - {"open to create", "rename to"}))
@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_exists_cannot_be_made_again(here: Path, other: str, name: str, kind: str) -> None:
    match kind:
        case "file":
            touch(here / "name")
        case "directory":
            mkdir(here / "name")
        case _:
            (here / "name").symlink_to("nowhere")
    with watched_listing(here), refused(errno.EEXIST):
        MAKING[name](f"{here}/name", other)


class watched_listing:  # noqa: N801  reads as a phrase where it is used
    """The names in a directory and its times must be the same after the block as before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        self._before = self._state()

    def __exit__(self, *_: object) -> None:
        assert self._state() == self._before

    def _state(self) -> tuple[list[str], int, int]:
        attributes = self._directory.stat()
        return sorted(os.listdir(self._directory)), attributes.st_mtime_ns, attributes.st_ctime_ns
