"""A file system in memory that behaves as ext4 does for root: what the exerciser expects of the real one.

Every method changes the model as the system call changes the disk, or raises the OSError that the call must end with and
changes nothing. Where several errors apply, the order is that of Linux.
"""

import os
import stat
from dataclasses import dataclass, field
from errno import (
    EEXIST,
    EINVAL,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENODATA,
    ENOENT,
    ENOTDIR,
    ENOTEMPTY,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
)
from typing import NamedTuple, NoReturn

from tests.random.renameat2 import RENAME_EXCHANGE, RENAME_NOREPLACE

UMASK = 0o022
NAME_MAX = 255
MAX_LINKS_FOLLOWED = 40


@dataclass(eq=False, kw_only=True, slots=True)
class Node:
    """What all kinds of files have; `mtime_ns` and `inode` are None while nobody can know them."""

    mode: int
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    mtime_ns: int | None = None
    inode: int | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def has_type(self, kind: int) -> bool:
        return stat.S_IFMT(self.mode) == kind


@dataclass(eq=False, kw_only=True, slots=True)
class File(Node):
    """A regular file."""

    data: bytearray = field(default_factory=bytearray)
    stored_through_map: bool = False  # and not synced: a later writeback may move the mtime once more

    def write(self, offset: int, data: bytes) -> None:
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.mtime_ns = None

    def truncate(self, size: int) -> None:
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))
        self.mtime_ns = None

    def store(self, offset: int, data: bytes) -> None:
        """Change the file through a shared mapping."""
        self.write(offset, data)
        self.stored_through_map = True


@dataclass(eq=False, kw_only=True, slots=True)
class Directory(Node):
    """A directory; the root has no parent, one that was removed keeps its last."""

    entries: dict[bytes, Node] = field(default_factory=dict)
    parent: "Directory | None" = None
    name: bytes = b""

    @property
    def path(self) -> bytes:
        """From the root, without a leading slash; empty for the root."""
        parts: list[bytes] = []
        here = self
        while here.parent is not None:
            parts.append(here.name)
            here = here.parent
        return b"/".join(reversed(parts))

    def is_within(self, other: Node) -> bool:
        here: Directory | None = self
        while here is not None and here is not other:
            here = here.parent
        return here is other


@dataclass(eq=False, kw_only=True, slots=True)
class Symlink(Node):
    """A symbolic link."""

    target: bytes


@dataclass(eq=False, kw_only=True, slots=True)
class Special(Node):
    """A fifo, a socket or a device."""

    rdev: int = 0


class Place(NamedTuple):
    """Where a path leads: the directory, the last name, and what is there."""

    parent: Directory
    name: bytes
    node: Node | None


def refuse(number: int) -> NoReturn:
    """Raise the OSError that is expected of the real call."""
    raise OSError(number, os.strerror(number))


class Model:
    """The tree. Paths are relative to its root, without a leading slash and without '.' and '..'."""

    def __init__(self, root: Directory) -> None:
        self.root = root
        self.directories = [root]

    def reach(self, path: bytes, *, follow: bool) -> Place:
        """Walk to the last name of a path, which need be neither there nor short enough."""
        pending = path.split(b"/")[::-1]
        here = self.root
        followed = 0
        while True:
            name = pending.pop()
            node = here.entries.get(name)
            if isinstance(node, Symlink) and (follow or pending):
                followed += 1
                if followed > MAX_LINKS_FOLLOWED:
                    refuse(ELOOP)
                pending += node.target.split(b"/")[::-1]
                continue
            if not pending:
                return Place(here, name, node)
            if len(name) > NAME_MAX:
                refuse(ENAMETOOLONG)
            if node is None:
                refuse(ENOENT)
            if not isinstance(node, Directory):
                refuse(ENOTDIR)
            here = node

    def find(self, path: bytes, *, follow: bool) -> Node:
        return _present(self.reach(path, follow=follow))

    def open(self, path: bytes, flags: int, mode: int) -> Node:
        create, exclusive = bool(flags & os.O_CREAT), bool(flags & os.O_EXCL)
        place = self.reach(path, follow=not (create and exclusive) and not flags & os.O_NOFOLLOW)
        if place.node is None and create:
            return self._enter(place, File(mode=stat.S_IFREG | mode & ~UMASK))
        node = _present(place)
        if create and exclusive:
            refuse(EEXIST)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        match node:
            case Symlink():
                refuse(ELOOP)
            case Directory():
                if writing or flags & (os.O_CREAT | os.O_TRUNC):
                    refuse(EISDIR)
            case _ if flags & os.O_DIRECTORY:
                refuse(ENOTDIR)
            case Special():
                # Every open here is non-blocking, and nobody reads any fifo.
                if node.has_type(stat.S_IFSOCK) or flags & os.O_ACCMODE == os.O_WRONLY:
                    refuse(ENXIO)
            case File() if flags & os.O_TRUNC:
                node.truncate(0)
        return node

    def mkdir(self, path: bytes, mode: int) -> None:
        place = self._vacant(path)
        directory = Directory(mode=stat.S_IFDIR | mode & 0o1777 & ~UMASK, nlink=2, parent=place.parent, name=place.name)
        directory.mode |= place.parent.mode & stat.S_ISGID
        self._enter(place, directory)
        place.parent.nlink += 1
        self.directories.append(directory)

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        self._enter(self._vacant(path), Special(mode=mode & ~UMASK, rdev=rdev))

    def symlink(self, target: bytes, path: bytes) -> None:
        self._enter(self._vacant(path), Symlink(mode=stat.S_IFLNK | 0o777, target=target))

    def readlink(self, path: bytes) -> bytes:
        node = self.find(path, follow=False)
        if not isinstance(node, Symlink):
            refuse(EINVAL)
        return node.target

    def link(self, old: bytes, new: bytes) -> None:
        node = self.find(old, follow=False)
        place = self._vacant(new)
        if isinstance(node, Directory):
            refuse(EPERM)
        place.parent.entries[place.name] = node
        place.parent.mtime_ns = None
        node.nlink += 1

    def unlink(self, path: bytes) -> None:
        place = self.reach(path, follow=False)
        if isinstance(_present(place), Directory):
            refuse(EISDIR)
        self._leave(place)

    def rmdir(self, path: bytes) -> None:
        place = self.reach(path, follow=False)
        node = _present(place)
        if not isinstance(node, Directory):
            refuse(ENOTDIR)
        if node.entries:
            refuse(ENOTEMPTY)
        self._leave(place)

    def rename(self, old_path: bytes, new_path: bytes, flags: int) -> None:
        old, new = self.reach(old_path, follow=False), self.reach(new_path, follow=False)
        moved = _present(old)
        if flags & RENAME_EXCHANGE:
            _present(new)
        elif len(new.name) > NAME_MAX:
            refuse(ENAMETOOLONG)
        replaced = new.node
        if replaced is not None and flags & RENAME_NOREPLACE:
            refuse(EEXIST)
        if new.parent.is_within(moved):
            refuse(EINVAL)
        if replaced is not None and old.parent.is_within(replaced):
            refuse(EINVAL if flags & RENAME_EXCHANGE else ENOTEMPTY)
        if moved is replaced:
            return
        if replaced is None or flags & RENAME_EXCHANGE:
            self._detach(old)
            if replaced is not None:
                self._detach(new)
                self._attach(old.parent, old.name, replaced)
            self._attach(new.parent, new.name, moved)
            return
        if isinstance(moved, Directory):
            if not isinstance(replaced, Directory):
                refuse(ENOTDIR)
            if replaced.entries:
                refuse(ENOTEMPTY)
        elif isinstance(replaced, Directory):
            refuse(EISDIR)
        self._leave(new)
        self._detach(old)
        self._attach(new.parent, new.name, moved)

    def truncate(self, path: bytes, size: int) -> None:
        node = self.find(path, follow=True)
        if isinstance(node, Directory):
            refuse(EISDIR)
        if not isinstance(node, File):
            refuse(EINVAL)
        node.truncate(size)

    def _vacant(self, path: bytes) -> Place:
        place = self.reach(path, follow=False)
        if len(place.name) > NAME_MAX:
            refuse(ENAMETOOLONG)
        if place.node is not None:
            refuse(EEXIST)
        return place

    def _enter(self, place: Place, node: Node) -> Node:
        if len(place.name) > NAME_MAX:
            refuse(ENAMETOOLONG)
        if place.parent.mode & stat.S_ISGID:
            node.gid = place.parent.gid
        place.parent.entries[place.name] = node
        place.parent.mtime_ns = None
        return node

    def _leave(self, place: Place) -> None:
        """Remove a name; the file may live on under others or in open descriptors."""
        node = _present(place)
        self._detach(place)
        if isinstance(node, Directory):
            self.directories.remove(node)
            node.nlink = 0
        else:
            node.nlink -= 1

    def _detach(self, place: Place) -> None:
        node = place.parent.entries.pop(place.name)
        place.parent.mtime_ns = None
        if isinstance(node, Directory):
            place.parent.nlink -= 1

    def _attach(self, parent: Directory, name: bytes, node: Node) -> None:
        parent.entries[name] = node
        parent.mtime_ns = None
        if isinstance(node, Directory):
            parent.nlink += 1
            node.parent, node.name = parent, name


def _present(place: Place) -> Node:
    if len(place.name) > NAME_MAX:
        refuse(ENAMETOOLONG)
    if place.node is None:
        refuse(ENOENT)
    return place.node


def change_mode(node: Node, mode: int) -> None:
    node.mode = stat.S_IFMT(node.mode) | mode


def change_owner(node: Node, uid: int, gid: int) -> None:
    """-1 leaves a number as it is. Even root's chown clears the bits that would lend the new owner's rights."""
    if uid != -1:
        node.uid = uid
    if gid != -1:
        node.gid = gid
    if not isinstance(node, Directory):
        node.mode &= ~stat.S_ISUID
        if node.mode & stat.S_IXGRP:
            node.mode &= ~stat.S_ISGID


def set_mtime(node: Node, mtime_ns: int) -> None:
    node.mtime_ns = None if isinstance(node, File) and node.stored_through_map else mtime_ns


def set_xattr(node: Node, name: str, value: bytes, flags: int) -> None:
    _check_namespace(node, name, EPERM)
    if name in node.xattrs and flags & os.XATTR_CREATE:
        refuse(EEXIST)
    if name not in node.xattrs and flags & os.XATTR_REPLACE:
        refuse(ENODATA)
    node.xattrs[name] = value


def get_xattr(node: Node, name: str) -> bytes:
    _check_namespace(node, name, ENODATA)
    if name not in node.xattrs:
        refuse(ENODATA)
    return node.xattrs[name]


def remove_xattr(node: Node, name: str) -> None:
    _check_namespace(node, name, EPERM)
    if name not in node.xattrs:
        refuse(ENODATA)
    del node.xattrs[name]


def _check_namespace(node: Node, name: str, not_here: int) -> None:
    namespace = name.partition(".")[0]
    if namespace == "user" and not isinstance(node, File | Directory):
        refuse(not_here)
    if namespace not in ("user", "trusted"):
        refuse(EOPNOTSUPP)
