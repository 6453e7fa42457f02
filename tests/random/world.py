"""The real directory beside its model: doing a thing in both, and comparing them."""

import os
import stat
from collections import deque
from collections.abc import Callable
from errno import errorcode
from pathlib import Path
from typing import NoReturn, TypeVar

from tests.random.model import Directory, File, Model, Node, Special, Symlink

SIZE_LIMIT = 256 * 1024
RECENT = 20

T = TypeVar("T")


class World:
    """A directory and what should be in it. Whatever differs is an AssertionError that says how to get there again."""

    def __init__(self, root: Path, seed: int) -> None:
        """Take an empty directory into use."""
        if os.listdir(root):
            raise ValueError(f"{root} is not empty")
        self._root = os.fsencode(root)
        self._seed = seed
        self._step = 0
        self.recent: deque[str] = deque(maxlen=RECENT)
        status = os.stat(root)
        self.model = Model(Directory(mode=status.st_mode, uid=status.st_uid, gid=status.st_gid, nlink=2))

    def real(self, path: bytes) -> bytes:
        """The real path of one that is relative to the root."""
        return self._root + b"/" + path if path else self._root

    def note(self, operation: str) -> None:
        """Say what is done next."""
        self.recent.append(f"{self._step}: {operation}")

    def fail(self, what: str) -> NoReturn:
        operations = "\n  ".join(self.recent)
        raise AssertionError(
            f"seed {self._seed}, step {self._step}, in {self.recent[-1]}: {what}\nthe last operations:\n  {operations}"
        )

    def agree(self, predict: Callable[[], object], perform: Callable[[], T]) -> T | None:
        """Do a thing in the model and for real: both succeed, or both end with the same error. None if they fail."""
        expected = 0
        try:
            predict()
        except OSError as error:
            expected = error.errno or 0
        result, found = None, 0
        try:
            result = perform()
        except OSError as error:
            found = error.errno or 0
        if found != expected:
            self.fail(f"{_outcome(expected)} expected, {_outcome(found)} found")
        return result

    def expect(self, what: str, expected: object, found: object) -> None:
        if expected != found:
            self.fail(f"{what}: {expected!r} expected, {found!r} found")

    def expect_bytes(self, what: str, offset: int, expected: bytes | bytearray, found: bytes) -> None:
        """Compare contents; `offset` is where in the file they begin."""
        if expected == found:
            return
        if len(expected) != len(found):
            self.fail(f"{what}: {len(expected)} bytes at {offset} expected, {len(found)} found")
        bad = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
        first, last = bad[0], bad[-1]
        self.fail(
            f"{what}: {len(bad)} bytes differ from {offset + first} to {offset + last}: "
            f"{expected[first : first + 8].hex()} expected, {found[first : first + 8].hex()} found"
        )

    def expect_status(self, what: str, node: Node, status: os.stat_result) -> None:
        """Compare everything that stat tells and the model knows."""
        for name, expected, found in (
            ("mode", oct(node.mode), oct(status.st_mode)),
            ("uid", node.uid, status.st_uid),
            ("gid", node.gid, status.st_gid),
            ("nlink", node.nlink, status.st_nlink),
        ):
            if expected != found:
                self.fail(f"{name} of {what}: {expected} expected, {found} found")
        if node.mtime_ns is not None:
            self.expect(f"mtime of {what}", node.mtime_ns, status.st_mtime_ns)
        match node:
            case File():
                self.expect(f"size of {what}", len(node.data), status.st_size)
            case Symlink():
                self.expect(f"size of {what}", len(node.target), status.st_size)
            case Special() if not stat.S_ISFIFO(node.mode) and not stat.S_ISSOCK(node.mode):
                self.expect(f"device of {what}", node.rdev, status.st_rdev)
        if node.inode is None:
            node.inode = status.st_ino
        self.expect(f"inode number of {what}", node.inode, status.st_ino)

    def expect_xattrs(self, what: str, node: Node, real: bytes | int) -> None:
        follow = isinstance(real, int)
        found = {name: os.getxattr(real, name, follow_symlinks=follow) for name in _listed(real, follow)}
        self.expect(f"extended attributes of {what}", node.xattrs, found)

    def expect_contents(self, what: str, node: File, real: bytes, *, follow: bool = False) -> None:
        fd = os.open(real, os.O_RDONLY | (0 if follow else os.O_NOFOLLOW))
        try:
            self.expect_bytes(what, 0, node.data, read_fully(fd, SIZE_LIMIT * 2, 0))
        finally:
            os.close(fd)

    def expect_entries(self, directory: Directory) -> None:
        """Compare what a directory lists: names, types, inode numbers as far as they are known."""
        what = f"directory {directory.path!r}"
        with os.scandir(self.real(directory.path)) as listing:
            entries = list(listing)
        names = [entry.name for entry in entries]
        if len(names) != len(directory.entries) or set(names) != directory.entries.keys():
            self.expect(f"names in {what}", sorted(directory.entries), sorted(names))
        for entry in entries:
            node = directory.entries[entry.name]
            self.expect(f"type of {entry.name!r} in {what}", isinstance(node, Directory), _is_directory(entry))
            self.expect(f"type of {entry.name!r} in {what}", isinstance(node, Symlink), entry.is_symlink())
            if node.inode is not None:
                self.expect(f"inode number of {entry.name!r} in {what}", node.inode, entry.inode())

    def check_tree(self) -> None:
        """Compare everything."""
        seen: dict[int, Node] = {}
        for directory in self.model.directories:
            self.expect_entries(directory)
            if directory is self.model.root:
                self._check_node(b"", directory, seen)
            prefix = directory.path + b"/" if directory.path else b""
            for name, node in directory.entries.items():
                self._check_node(prefix + name, node, seen)

    def _check_node(self, path: bytes, node: Node, seen: dict[int, Node]) -> None:
        what, real = repr(path), self.real(path)
        self.expect_status(what, node, os.lstat(real))
        if node.inode is not None and seen.setdefault(node.inode, node) is not node:
            self.fail(f"{what} has the inode number of another file, {node.inode}")
        self.expect_xattrs(what, node, real)
        match node:
            case File():
                self.expect_contents(what, node, real)
            case Symlink():
                self.expect(f"target of {what}", node.target, os.readlink(real))


def read_fully(fd: int, length: int, offset: int) -> bytes:
    """Read up to `length` bytes, fewer only at the end of the file."""
    data = os.pread(fd, length, offset)
    while data and len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def _listed(real: bytes | int, follow: bool) -> list[str]:
    """The names of the attributes that are a model's business: not what a security module or an ACL adds."""
    names = os.listxattr(real, follow_symlinks=follow)
    return [name for name in names if name.startswith(("user.", "trusted."))]


def _is_directory(entry: os.DirEntry[bytes]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _outcome(number: int) -> str:
    return errorcode.get(number, str(number)) if number else "success"
