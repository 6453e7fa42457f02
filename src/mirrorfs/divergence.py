"""What this node changed on its own, found in its tree by the marks of the dirty set: to be shown, or to be kept aside.

Files are found here, in the thread of the table; their data is read elsewhere, through descriptors of its own. Whoever takes a
descriptor closes it.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from pyroaring import BitMap64

from mirrorfs.core.differences import (
    DIGEST_SIZE,
    FileSeen,
    Seen,
    blocks_of,
    pack_file,
    pack_names,
    ranges_of,
    whole_marks,
)
from mirrorfs.core.dirty import BLOCK, FileMarks, Generation, Located
from mirrorfs.core.ids import ROOT, epoch_of
from mirrorfs.lost import Batch, Ranges, needed_bytes
from mirrorfs.table import Known
from mirrorfs.tree import Tree

#: A file of no more than this is kept whole, whatever of it was changed: that is what a person can use.
_WHOLE_BYTES: Final = 16 << 20
_NAMES_PER_ITEM: Final = 500
#: Blocks of one file that are looked at; of more than these all count as different.
MAX_BLOCKS: Final = 32 << 10
_DEPTH: Final = 4096
_READ_BLOCKS: Final = 256


@dataclass(frozen=True, slots=True)
class Version:
    """A file as this side has it. `ranges` are the bytes of it that this side changed, None: all. `descriptor` is O_PATH."""

    path: bytes
    descriptor: int
    ranges: Ranges | None


@dataclass(frozen=True, slots=True)
class Sight:
    """A marked file, to be looked at: its marked `blocks` are read from `descriptor`, which is O_PATH."""

    number: int
    path: bytes
    descriptor: int
    blocks: BitMap64


class Finder:
    """Finds files of the tree by their ids: by handle, or where this node or the other one has them."""

    def __init__(
        self, tree: Tree, located: Mapping[int, Located], places: Mapping[int, list[tuple[int, bytes]]] | None = None
    ) -> None:
        self.tree = tree
        self._located = located
        self._places = places or {}

    def find(self, number: int, depth: int = 0) -> Known | None:
        """The file with this id, None if it is not here any more."""
        if number == ROOT:
            return self.tree.table.get(ROOT)
        located = self._located.get(number)
        known = self.tree.find(number, located.handle if located else b"")
        if known is not None or depth > _DEPTH:
            return known
        for above, name in self._entries_of(number, depth):
            return self.tree.lookup(above.id, name)
        return None

    def _entries_of(self, number: int, depth: int = 0) -> Iterator[tuple[Known, bytes]]:
        """Directories and names in them that lead to a file."""
        located = self._located.get(number)
        candidates: list[tuple[Known | None, bytes]] = []
        if located is not None and located.parent:
            candidates.append((self.tree.find(located.parent, located.parent_handle), located.name))
        for parent, name in self._places.get(number, ()):
            candidates.append((self.find(parent, depth + 1), name))
        for above, name in candidates:
            if above is not None and self.tree.holds(above, name, number):
                yield above, name

    def path(self, known: Known) -> bytes:
        """A path from the root of the volume; one that says so where no name is known."""
        names: list[bytes] = []
        at = known
        while at.id != ROOT and len(names) < _DEPTH:
            place = self._place(at)
            if place is None:
                names.append(b"(a name that is not known of file %x)" % at.id)
                break
            above, name = place
            names.append(name)
            if at is not known:
                self.tree.table.drop_unused(at)
            at = above
        return b"/" + b"/".join(reversed(names))

    def _place(self, known: Known) -> tuple[Known, bytes] | None:
        for place in self._entries_of(known.id):
            return place
        try:
            parent, name = self.tree.place_of(known)
            return self.tree.table.get(parent), name
        except OSError:
            return None

    def look(self, directory: Known, name: bytes) -> Known | None:
        """The file of that name, None if there is none."""
        try:
            return self.tree.lookup(directory.id, name)
        except FileNotFoundError:
            return None

    def descriptor(self, known: Known) -> int:
        """An O_PATH descriptor of its own for a file."""
        return os.open(self.tree.table.proc(known), os.O_PATH | os.O_CLOEXEC)


# ---- what is to be kept aside


def own_versions(finder: Finder, marks: Generation, new_from: int) -> Iterator[Version]:
    """Everything that this node made or changed, as its marks say; files with an id of `new_from` or more were made since.

    An old file that only got a name comes with no ranges. Where the exact names are not known, only what is new comes.
    """
    return _Own(finder, marks, new_from).versions()


class _Own:
    def __init__(self, finder: Finder, marks: Generation, new_from: int) -> None:
        self._finder = finder
        self._marks = marks
        self._new_from = new_from
        self._told: set[int] = set()

    def versions(self) -> Iterator[Version]:
        for number, names in self._marks.names.items():
            if number in self._told and number >= self._new_from:
                continue  # all of a new directory was told
            directory = self._finder.find(number)
            if directory is not None:
                yield from self._names(directory, self._finder.path(directory), names)
        for number in self._marks.files:
            known = None if number in self._told else self._finder.find(number)
            if known is not None:
                yield self._version(known, self._finder.path(known))

    def _names(self, directory: Known, path: bytes, names: set[bytes] | None) -> Iterator[Version]:
        directory.kept += 1
        try:
            for name in sorted(self._finder.tree.names(directory) if names is None else names):
                known = self._finder.look(directory, name)
                if known is None:
                    continue
                is_new, at = known.id >= self._new_from, path.rstrip(b"/") + b"/" + name
                if known.id in self._told or not (is_new or names is not None or known.id in self._marks.files):
                    self._finder.tree.table.drop_unused(known)
                    continue
                enter = is_new and known.is_directory
                yield self._version(known, at)
                if enter:
                    inside = self._finder.look(directory, name)
                    if inside is not None:
                        yield from self._names(inside, at, set(self._finder.tree.names(inside)))
        finally:
            directory.kept -= 1
            self._finder.tree.table.drop_unused(directory)

    def _version(self, known: Known, path: bytes) -> Version:
        self._told.add(known.id)
        ranges: Ranges | None = None
        if known.id < self._new_from:
            size = self._finder.tree.stat(known).st_size
            ranges = ranges_of(blocks_of(self._marks.files.get(known.id), size), size)
        version = Version(path, self._finder.descriptor(known), ranges)
        self._finder.tree.table.drop_unused(known)
        return version


def all_versions(root: int) -> Iterator[Version]:
    """Every file below the directory `root`, whole: where nobody knows what was changed. Blocks for the disk."""
    yield Version(b"/", os.open(".", os.O_PATH | os.O_CLOEXEC, dir_fd=root), None)
    for above, directories, files, descriptor in os.fwalk(b".", dir_fd=root, follow_symlinks=False):
        for name in sorted(directories + files):
            look = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            yield Version(os.path.join(above, name)[1:], look, None)


def _is_whole(version: Version) -> bool:
    """Whether all of a file is kept though not all of it was changed."""
    if not version.ranges:
        return version.ranges is None
    allocated = os.fstat(version.descriptor).st_blocks * 512
    return allocated <= max(_WHOLE_BYTES, 2 * sum(end - start for start, end in version.ranges))


def room_for(version: Version) -> int:
    """Bytes that `keep` of this version may take; closes its descriptor."""
    try:
        return needed_bytes(version.descriptor, ranges=version.ranges, whole=_is_whole(version))
    finally:
        os.close(version.descriptor)


def keep(batch: Batch, version: Version) -> None:
    """Keep one version aside, and close its descriptor. Blocks for the disk."""
    try:
        batch.keep(version.path, version.descriptor, ranges=version.ranges, whole=_is_whole(version))
    finally:
        os.close(version.descriptor)


# ---- what is to be shown


def sights(finder: Finder, marks: Generation, first_new: int, common_epoch: int) -> Iterator[list[Any] | Sight]:
    """What stands here where `marks` are, those of both nodes: packed names, and files that are still to be looked at.

    Files with an id of `first_new` or more carry no marks of their own. One that was made in `common_epoch`, the last that both
    nodes know, or before may be on both, and is looked at as a whole.
    """
    for number, names in marks.names.items():
        directory = finder.find(number)
        if directory is not None:
            yield from _seen_names(finder, directory, finder.path(directory), names, first_new, common_epoch)
    for number, changed in marks.files.items():
        known = finder.find(number)
        if known is not None and not known.gone:
            yield _sight(finder, known, finder.path(known), changed)
            finder.tree.table.drop_unused(known)


def _sight(finder: Finder, known: Known, path: bytes, marks: FileMarks) -> Sight:
    blocks = blocks_of(marks, finder.tree.stat(known).st_size)
    return Sight(known.id, path, finder.descriptor(known), blocks)


def _seen_names(
    finder: Finder, directory: Known, path: bytes, names: set[bytes] | None, first_new: int, common_epoch: int
) -> Iterator[list[Any] | Sight]:
    found: list[tuple[bytes, Seen]] = []
    new: list[bytes] = []
    directory.kept += 1
    try:
        for name in sorted(finder.tree.names(directory) if names is None else names):
            known = finder.look(directory, name)
            if known is None:
                continue
            status = finder.tree.stat(known)
            found.append((name, Seen(known.id, status.st_mode, status.st_size if stat.S_ISREG(status.st_mode) else 0)))
            if known.id >= first_new:
                if known.is_directory:
                    new.append(name)
                if epoch_of(known.id) <= common_epoch:
                    yield _sight(finder, known, path.rstrip(b"/") + b"/" + name, whole_marks())
            finder.tree.table.drop_unused(known)
            if len(found) == _NAMES_PER_ITEM:
                yield pack_names(directory.id, path, found)
                found = []
        yield pack_names(directory.id, path, found)
        for name in new:
            inside = finder.look(directory, name)
            if inside is not None:
                at = path.rstrip(b"/") + b"/" + name
                yield from _seen_names(finder, inside, at, None, first_new, common_epoch)
    finally:
        directory.kept -= 1
        finder.tree.table.drop_unused(directory)


def look_at(sight: Sight) -> list[Any]:
    """The packed file of a sight, its marked blocks read; closes its descriptor. Blocks for the disk."""
    try:
        status = os.fstat(sight.descriptor)
        proc = f"/proc/self/fd/{sight.descriptor}"
        digest = blake2b(repr((status.st_mode, status.st_uid, status.st_gid)).encode(), digest_size=DIGEST_SIZE)
        for name in sorted(os.listxattr(proc)):
            if not name.startswith("trusted.mirrorfs"):
                digest.update(repr((name, os.getxattr(proc, name))).encode())
        regular = stat.S_ISREG(status.st_mode)
        digests: dict[int, bytes] | None = {}
        if regular and sight.blocks:
            digests = _digests(proc, sight.blocks) if len(sight.blocks) <= MAX_BLOCKS else None
        size = status.st_size if regular else 0
        return pack_file(sight.number, FileSeen(sight.path, status.st_mode, size, digest.digest(), digests))
    finally:
        os.close(sight.descriptor)


def _digests(proc: str, blocks: BitMap64) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    descriptor = os.open(proc, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in ranges_of(blocks, 1 << 63):
            for at in range(start, end, _READ_BLOCKS * BLOCK):
                data = os.pread(descriptor, min(_READ_BLOCKS * BLOCK, end - at), at)
                for first in range(0, len(data), BLOCK):
                    digest = blake2b(data[first : first + BLOCK], digest_size=DIGEST_SIZE).digest()
                    found[(at + first) // BLOCK] = digest
    finally:
        os.close(descriptor)
    return found
