"""Are two directory trees equal? What promise 6 of the design says about two nodes, looked at from outside.

Compared are names, types, contents, holes, modes, owners, mtimes, device numbers, targets of symbolic links, extended
attributes and the grouping of names into hard links. Times of access and of inode changes are each node's own.
"""

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from errno import ENXIO, ESTALE
from heapq import merge
from itertools import islice, zip_longest
from pathlib import Path

_GRAIN = 4096
_READ_BLOCK = 1 << 20
_IDENTITY = "trusted.mirrorfs"  # volume (16 bytes), backing inode (8 bytes), id (8 bytes)
_NOTES = ("trusted.mirrorfs.checkpoint", "trusted.mirrorfs.peer")  # of the root; each node's own
_IDENTITY_LENGTH = 32
_ID_LENGTH = 8
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}

_Inode = tuple[int, int]  # device and inode number


def differences(left: Path, right: Path, *, limit: int = 20) -> list[str]:
    """Compare two trees completely; return the first `limit` differences, one readable line each, none if they are equal.

    Neither tree may change meanwhile; one that does ends in an OSError. Symbolic links are never followed.
    """
    return list(islice(_Comparison(left, right).run(), limit))


@dataclass(slots=True)
class _Level:
    """A directory on the way down, with the subdirectories in it that are still to be looked at."""

    path: bytes
    inodes: tuple[_Inode, _Inode]
    pending: list[bytes] = field(default_factory=list)


class _Comparison:
    def __init__(self, left: Path, right: Path) -> None:
        self._roots = (left, right)
        self._fds: list[int] = []
        # The first common name of every inode with several names: two trees have the same groups of hard links exactly
        # if each name has the same first name on both sides.
        self._first_names: tuple[dict[_Inode, bytes], dict[_Inode, bytes]] = ({}, {})

    def run(self) -> Iterator[str]:
        """Walk both trees together, depth first.

        One descriptor on each side is enough for any depth: the way back up is '..', and it is checked.
        """
        try:
            for root in self._roots:
                self._fds.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
            yield from self._attributes(b"", b".", *self._stats(b"."))
            levels = [self._enter(b"")]
            yield from self._entries(levels[-1])
            while levels:
                level = levels[-1]
                if level.pending:
                    name = level.pending.pop()
                    self._move(name)
                    levels.append(self._enter(os.path.join(level.path, name)))
                    yield from self._entries(levels[-1])
                else:
                    levels.pop()
                    if levels:
                        self._move(b"..")
                        if self._enter(levels[-1].path).inodes != levels[-1].inodes:
                            raise OSError(ESTALE, "the tree changed while it was compared", os.fsdecode(level.path))
        finally:
            for fd in self._fds:
                os.close(fd)

    def _enter(self, path: bytes) -> _Level:
        left, right = (_inode(os.fstat(fd)) for fd in self._fds)
        return _Level(path, (left, right))

    def _move(self, name: bytes) -> None:
        for side, fd in enumerate(self._fds):
            self._fds[side] = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
            os.close(fd)

    def _stats(self, name: bytes) -> tuple[os.stat_result, os.stat_result]:
        left, right = (os.stat(name, dir_fd=fd, follow_symlinks=False) for fd in self._fds)
        return left, right

    def _entries(self, level: _Level) -> Iterator[str]:
        left, right = ({os.fsencode(name) for name in os.listdir(fd)} for fd in self._fds)
        for name in sorted(left | right):
            path = os.path.join(level.path, name)
            if name not in right:
                yield f"{_shown(path)}: only left"
            elif name not in left:
                yield f"{_shown(path)}: only right"
            else:
                yield from self._entry(level, path, name)
        level.pending.reverse()

    def _entry(self, level: _Level, path: bytes, name: bytes) -> Iterator[str]:
        stats = self._stats(name)
        kinds = [stat.S_IFMT(status.st_mode) for status in stats]
        if kinds[0] != kinds[1]:
            yield _line(path, "type", *(_KINDS.get(kind, oct(kind)) for kind in kinds))
            return
        if kinds[0] == stat.S_IFDIR:
            level.pending.append(name)
        else:
            firsts = self._note_names(path, stats)
            if firsts[0] != firsts[1]:
                yield _line(path, "is the same file as", *(_shown(first) for first in firsts))
            elif firsts[0] != path:
                return  # a further name of a file that has been compared
        yield from self._attributes(path, name, *stats)
        if kinds[0] == stat.S_IFREG:
            yield from self._contents(path, name)
        elif kinds[0] == stat.S_IFLNK:
            left, right = (os.readlink(name, dir_fd=fd) for fd in self._fds)
            if left != right:
                yield _line(path, "target", _shown(left), _shown(right))

    def _note_names(self, path: bytes, stats: tuple[os.stat_result, os.stat_result]) -> list[bytes]:
        return [
            names.setdefault(_inode(status), path) if status.st_nlink > 1 else path
            for names, status in zip(self._first_names, stats, strict=True)
        ]

    def _attributes(self, path: bytes, name: bytes, left: os.stat_result, right: os.stat_result) -> Iterator[str]:
        if left.st_mode != right.st_mode:
            yield _line(path, "mode", f"{stat.S_IMODE(left.st_mode):04o}", f"{stat.S_IMODE(right.st_mode):04o}")
        if (left.st_uid, left.st_gid) != (right.st_uid, right.st_gid):
            yield _line(path, "owner", f"{left.st_uid}:{left.st_gid}", f"{right.st_uid}:{right.st_gid}")
        if left.st_mtime_ns != right.st_mtime_ns:
            yield _line(path, "mtime", f"{left.st_mtime_ns} ns", f"{right.st_mtime_ns} ns")
        if stat.S_IFMT(left.st_mode) in (stat.S_IFCHR, stat.S_IFBLK) and left.st_rdev != right.st_rdev:
            yield _line(path, "device", *(f"{os.major(s.st_rdev)}:{os.minor(s.st_rdev)}" for s in (left, right)))
        ours, theirs = (_extended_attributes(fd, name) for fd in self._fds)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield _line(path, _shown(os.fsencode(key)), _value(ours.get(key)), _value(theirs.get(key)))

    def _contents(self, path: bytes, name: bytes) -> Iterator[str]:
        left = os.open(name, _OPEN_FILE, dir_fd=self._fds[0])
        try:
            right = os.open(name, _OPEN_FILE, dir_fd=self._fds[1])
            try:
                yield from _compare_files(path, left, right)
            finally:
                os.close(right)
        finally:
            os.close(left)


def _compare_files(path: bytes, left: int, right: int) -> Iterator[str]:
    sizes = [os.fstat(fd).st_size for fd in (left, right)]
    if sizes[0] != sizes[1]:
        yield _line(path, "size", *(f"{size} bytes" for size in sizes))
        return
    if any(ours != theirs for ours, theirs in zip_longest(_data_ranges(left), _data_ranges(right))):
        # What was allocated and never written is a hole to the kernel, but data as long as it is in the page cache.
        for fd in (left, right):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for ours, theirs in zip_longest(_data_ranges(left), _data_ranges(right)):
        if ours != theirs:
            yield _line(path, "holes, data at", *(f"{r[0]}-{r[1]}" if r else "nothing more" for r in (ours, theirs)))
            break
    done = 0
    for start, end in merge(_data_ranges(left), _data_ranges(right)):
        for offset in range(max(start, done), end, _READ_BLOCK):
            length = min(_READ_BLOCK, end - offset)
            blocks = _read(left, length, offset), _read(right, length, offset)
            if blocks[0] != blocks[1]:
                at = next((i for i, (a, b) in enumerate(zip(*blocks, strict=False)) if a != b), min(map(len, blocks)))
                yield _line(path, f"content at {offset + at}", *(block[at : at + 8].hex() for block in blocks))
                return
        done = max(done, end)


def _data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are not holes, in bytes, widened to whole grains and joined where they touch."""
    start = end = position = 0
    while True:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != ENXIO:
                raise
            break
        data = position - position % _GRAIN
        position = os.lseek(fd, position, os.SEEK_HOLE)
        if data > end:
            if end > start:
                yield start, end
            start = data
        end = position + -position % _GRAIN
    if end > start:
        yield start, end


def _read(fd: int, length: int, offset: int) -> bytes:
    block = os.pread(fd, length, offset)
    while len(block) < length and (more := os.pread(fd, length - len(block), offset + len(block))):
        block += more
    return block


def _extended_attributes(directory: int, name: bytes) -> dict[str, bytes]:
    """All extended attributes of an entry, the identity reduced to the part that is the same on both nodes."""
    # Links and devices cannot be opened to be asked, and there is no listxattrat in Python: /proc makes one.
    path = b"/proc/self/fd/%d/%s" % (directory, name)
    values = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
    if len(identity := values.get(_IDENTITY, b"")) == _IDENTITY_LENGTH:
        values[_IDENTITY] = identity[-_ID_LENGTH:]
    for note in _NOTES:
        values.pop(note, None)
    return values


def _inode(status: os.stat_result) -> _Inode:
    return status.st_dev, status.st_ino


def _line(path: bytes, what: str, left: str, right: str) -> str:
    return f"{_shown(path)}: {what}: left {left}, right {right}"


def _value(value: bytes | None) -> str:
    if value is None:
        return "absent"
    return "0x" + value[:40].hex() + (f"... ({len(value)} bytes)" if len(value) > 40 else "")


def _shown(path: bytes) -> str:
    """A name of any bytes as one line of printable text."""
    text = path.decode("utf-8", "backslashreplace") or "."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def main() -> None:
    """`python -m mirrorfs.lab.trees LEFT RIGHT`: exit status 1 if the trees differ."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m mirrorfs.lab.trees LEFT RIGHT")
    lines = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    for line in lines:
        print(line)
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
