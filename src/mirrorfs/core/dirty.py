"""The dirty set: what might the other node not durably have?

Two things are kept apart. The *exact* marks (names of a directory, 4 KiB blocks of a file, "its attributes") are in memory
only and say what a resync has to bring over. The *hot* marks are coarse (a directory, a file's attributes, a 4 MiB extent of
a file) and are durable on disk before the first change that they cover: whatever is dirty is hot, so after a crash the hot
marks take the place of the exact ones. A busy application touches few extents, and a change to what is hot costs no disk
call.

A file that was made since `new_from` needs no mark at all: ids grow, it is wholly dirty, and its name is in a marked
directory or in one that is new itself. That holds for what this node made as the primary that it is; what another made before
it is marked as any old file, since the mark that leads to it is on the other's disk and may be dropped there already.

The exact marks are in two generations. `cut` begins a new one; when both nodes have synced what came before the cut,
`checkpointed` drops the old. What is hot stays so for one generation longer, since what was busy most likely still is.

No I/O here: who calls makes the marks durable (`cold` says which) before a change, and notes it afterwards.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pyroaring import BitMap64

from mirrorfs.core import ids
from mirrorfs.core import operations as ops

BLOCK: Final = 4096
EXTENT: Final = 4 << 20
#: As `Extents.last`: up to wherever the file ends or ended.
END: Final = 1 << 62
#: More changed names than this in one directory are "all".
MAX_NAMES: Final = 100_000
#: A change of more extents is marked up to the end of the file.
_MANY_EXTENTS: Final = 256


@dataclass(frozen=True, slots=True)
class Names:
    """Hot: names in this directory may have changed."""

    directory: int

    @property
    def number(self) -> int:
        """The id of the directory."""
        return self.directory


@dataclass(frozen=True, slots=True)
class Attributes:
    """Hot: the attributes of this file may have changed."""

    file: int

    @property
    def number(self) -> int:
        """The id of the file."""
        return self.file


@dataclass(frozen=True, slots=True)
class Extents:
    """Hot: the extents `first` to `last` of this file, both counted in units of `EXTENT`; `last` may be `END`."""

    file: int
    first: int
    last: int

    @property
    def number(self) -> int:
        """The id of the file."""
        return self.file


Mark = Names | Attributes | Extents


@dataclass(frozen=True, slots=True)
class Located:
    """How a marked file can be found again: its file handle on this node, and a directory entry that leads to it.

    `parent` is 0 where no entry is known (and for the root). A place may be out of date; whoever uses it looks.
    """

    file: int
    handle: bytes
    parent: int = 0
    parent_handle: bytes = b""
    name: bytes = b""


Entry = Mark | Located


@dataclass(frozen=True, slots=True)
class Head:
    """What the whole set stands for.

    This node has, durably, all that came before checkpoint `number`. The set holds all changes that this node made as the
    primary since checkpoint `base`, files with an id of `new_from` or more included. A set that is not `complete` says nothing.
    """

    volume_id: str = ""
    number: int = 0
    base: int = 0
    new_from: int = 0
    complete: bool = False


class FileMarks:
    """The exact marks of one file; that it is here at all means that its attributes are dirty.

    `blocks` (4 KiB) are known to differ or may; `extents` (4 MiB) were hot at a crash and are compared; from extent `tail` on
    all are.
    """

    __slots__ = ("blocks", "extents", "tail")

    def __init__(self) -> None:
        self.blocks = BitMap64()
        self.extents = BitMap64()
        self.tail = END

    def add(self, other: "FileMarks") -> None:
        """Take the other's marks in."""
        self.blocks |= other.blocks
        self.extents |= other.extents
        self.tail = min(self.tail, other.tail)

    @property
    def estimated_bytes(self) -> int:
        """How much has to be sent or compared, as far as that is known without the file's size."""
        return len(self.blocks) * BLOCK + len(self.extents) * EXTENT

    def compared_ranges(self, size: int) -> Iterator[tuple[int, int]]:
        """The ranges (start, end) in bytes that have to be compared, within `size`."""
        for extent in self.extents:
            if extent < self.tail and extent * EXTENT < size:
                yield extent * EXTENT, min((extent + 1) * EXTENT, size)
        if self.tail < END and self.tail * EXTENT < size:
            yield self.tail * EXTENT, size

    def block_ranges(self, size: int) -> Iterator[tuple[int, int]]:
        """The ranges (start, end) in bytes of the dirty blocks, within `size`, neighbours joined."""
        start = end = 0
        for block in self.blocks:
            at = block * BLOCK
            if at >= size:
                break
            if at != end:
                if end > start:
                    yield start, end
                start = at
            end = at + BLOCK
        if end > start:
            yield start, min(end, size)


class Generation:
    """Exact marks: changed names by directory (None: all of them), changed files."""

    def __init__(self, names: Mapping[int, set[bytes] | None] | None = None) -> None:
        self.names = {directory: None if some is None else set(some) for directory, some in (names or {}).items()}
        self.files: dict[int, FileMarks] = {}

    def __bool__(self) -> bool:
        return bool(self.names or self.files)

    def add(self, other: "Generation") -> None:
        """Take the other's marks in."""
        for directory, names in other.names.items():
            mine = self.names.setdefault(directory, set())
            self.names[directory] = None if mine is None or names is None else mine | names
        for file, marks in other.files.items():
            self.file(file).add(marks)

    def file(self, number: int) -> FileMarks:
        """The marks of a file, made if there are none."""
        marks = self.files.get(number)
        if marks is None:
            marks = self.files[number] = FileMarks()
        return marks

    def name(self, directory: int, name: bytes) -> None:
        """A name of a directory has changed."""
        names = self.names.setdefault(directory, set())
        if names is not None:
            names.add(name)
            if len(names) > MAX_NAMES:
                self.names[directory] = None

    def has_name(self, directory: int, name: bytes) -> bool:
        """Whether the name is marked."""
        names = self.names.get(directory, ())
        return names is None or name in names

    def write(self, number: int, offset: int, size: int) -> None:
        """Bytes of a file have changed."""
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        blocks = self.file(number).blocks
        if first < last:
            blocks.add_range(first, last + 1)
        elif size:
            blocks.add(first)

    def note(self, change: ops.Change, new_from: int, old_size: int = 0) -> None:
        """Mark what a change has changed; `old_size` is as for `operations.bytes_changed`.

        A `Link` does not know by which other name the peer can find the file: that name is marked apart (`name`).
        """
        match change:
            case ops.MakeNode() | ops.Symlink():
                self.name(change.parent, change.name)
                if change.file < new_from:
                    self.file(change.file)  # its id was taken before a cut, so it does not count as new
            case ops.Link() | ops.Unlink() | ops.RemoveDirectory():
                self.name(change.parent, change.name)
            case ops.Rename():
                self.name(change.parent, change.name)
                self.name(change.new_parent, change.new_name)
            case _:
                if change.file < new_from:
                    self.write(change.file, *ops.bytes_changed(change, old_size))


_NAMES: Final = -1
_ATTRIBUTES: Final = -2
_Key = tuple[int, int]


class DirtySet:
    """The dirty set of one node. See the module's text."""

    def __init__(self, head: Head, entries: Iterable[Entry] = ()) -> None:
        """The set as it was on disk: every mark hot, and dirty."""
        self.head = head
        #: Files from here on need no durable mark; ahead of `head.new_from` from a cut until its checkpoint, and for a node
        #: that began to lead since the last one.
        self.new_from = head.new_from
        self.old = Generation()
        self.now = Generation()
        #: Changes are tracked: the set is complete, or a checkpoint that will make it so has begun.
        self.tracking = head.complete
        self.located: dict[int, Located] = {}
        self._at: dict[tuple[int, bytes], int] = {}
        self._age = 0
        self._hot: dict[_Key, int] = {}
        self._tails: dict[int, tuple[int, int]] = {}
        for entry in entries:
            if isinstance(entry, Located):
                self.locate(entry)
            else:
                self.heat([entry])
                self._mark(self.now, entry)

    @staticmethod
    def _mark(generation: Generation, mark: Mark) -> None:
        match mark:
            case Names():
                generation.names[mark.directory] = None
            case Attributes():
                generation.file(mark.file)
            case Extents():
                marks = generation.file(mark.file)
                if mark.last == END:
                    marks.tail = min(marks.tail, mark.first)
                else:
                    marks.extents.add_range(mark.first, mark.last + 1)

    def locate(self, located: Located) -> None:
        """Remember how a marked file can be found."""
        self.located[located.file] = located
        if located.parent:
            self._at[located.parent, located.name] = located.file

    def _lose_place(self, parent: int, name: bytes) -> Located | None:
        """A name leads to another file from now on, or to none; returns the file that it led to, if that is remembered."""
        file = self._at.pop((parent, name), None)
        located = None if file is None else self.located.get(file)
        if located is not None and (located.parent, located.name) == (parent, name):
            self.located[located.file] = replace(located, parent=0, parent_handle=b"", name=b"")
            return located
        return None

    def _move_place(self, located: Located | None, parent: int, name: bytes) -> None:
        if located is not None:
            above = self.located.get(parent)
            self.locate(replace(located, parent=parent, parent_handle=above.handle if above else b"", name=name))

    # ---- before a change: what must be durable

    def cold(self, change: ops.Change, old_size: int = 0) -> list[Mark]:
        """The marks that must be durable before this change, and are not; `old_size` as for `Generation.note`."""
        match change:
            case ops.MakeNode() | ops.Symlink():
                return self._cold_names(change.parent) + self._cold_attributes(change.file)
            case ops.Link() | ops.Unlink() | ops.RemoveDirectory():
                return self._cold_names(change.parent)
            case ops.Rename():
                if change.parent == change.new_parent:
                    return self._cold_names(change.parent)
                return self._cold_names(change.parent) + self._cold_names(change.new_parent)
            case _:
                offset, size = ops.bytes_changed(change, old_size)
                if not size:
                    return self._cold_attributes(change.file)
                first, last = offset // EXTENT, (offset + size - 1) // EXTENT
                if isinstance(change, ops.SetAttributes) or last - first > _MANY_EXTENTS:
                    return self._cold_attributes(change.file) + self._cold_tail(change.file, first)
                return self._cold_extents(change.file, first, last)

    def is_hot(self, file: int, offset: int, size: int) -> bool:
        """Whether a write may be made at once: what it makes dirty is durably marked. Often False where `cold` says more."""
        if file >= self.new_from:
            return True
        first = offset // EXTENT
        if (offset + size - 1) // EXTENT != first or (file, first) not in self._hot:
            return False
        self._hot[file, first] = self._age
        return True

    def cold_names(self, directory: int) -> list[Mark]:
        """As `cold`, for a directory of which a name changes."""
        return self._cold_names(directory)

    def _cold_extents(self, file: int, first: int, last: int) -> list[Mark]:
        hot = self._hot
        if file >= self.new_from:
            return []
        if first >= last and (file, first) in hot:
            hot[file, first] = self._age
            return []
        tail = self._tails.get(file)
        if tail is not None and first >= tail[0]:
            self._tails[file] = (tail[0], self._age)
            return []
        missing = [extent for extent in range(first, last + 1) if (file, extent) not in hot]
        for extent in range(first, last + 1):
            if extent not in missing:
                hot[file, extent] = self._age
        return [Extents(file, missing[0], missing[-1])] if missing else []

    def _cold_tail(self, file: int, first: int) -> list[Mark]:
        tail = self._tails.get(file)
        if file >= self.new_from:
            return []
        if tail is not None and tail[0] <= first:
            self._tails[file] = (tail[0], self._age)
            return []
        return [Extents(file, first, END)]

    def _cold_names(self, directory: int) -> list[Mark]:
        if directory >= self.new_from:
            return []
        if (directory, _NAMES) in self._hot:
            self._hot[directory, _NAMES] = self._age
            return []
        return [Names(directory)]

    def _cold_attributes(self, file: int) -> list[Mark]:
        if file >= self.new_from:
            return []
        if (file, _ATTRIBUTES) in self._hot:
            self._hot[file, _ATTRIBUTES] = self._age
            return []
        return [Attributes(file)]

    # ---- after a change

    def note(self, change: ops.Change, old_size: int = 0) -> None:
        """A change was made: what it changed is dirty, and files are where it has put them."""
        self.now.note(change, self.new_from, old_size)
        match change:
            case ops.Unlink() | ops.RemoveDirectory():
                self._lose_place(change.parent, change.name)
            case ops.Rename():
                moved = self._lose_place(change.parent, change.name)
                other = self._lose_place(change.new_parent, change.new_name)
                self._move_place(moved, change.new_parent, change.new_name)
                if change.flags & ops.RENAME_EXCHANGE:
                    self._move_place(other, change.parent, change.name)
            case _:
                pass

    def heat(self, entries: Iterable[Entry]) -> None:
        """These entries are durable."""
        for entry in entries:
            match entry:
                case Located():
                    self.locate(entry)
                case Names():
                    self._hot[entry.directory, _NAMES] = self._age
                case Attributes():
                    self._hot[entry.file, _ATTRIBUTES] = self._age
                case Extents():
                    if entry.last == END:
                        first, _ = self._tails.get(entry.file, (END, 0))
                        self._tails[entry.file] = (min(first, entry.first), self._age)
                    else:
                        for extent in range(entry.first, entry.last + 1):
                            self._hot[entry.file, extent] = self._age

    def hot(self) -> list[Mark]:
        """Everything that is hot, neighbouring extents joined."""
        marks: list[Mark] = []
        for file, what in sorted(self._hot):
            if what == _NAMES:
                marks.append(Names(file))
            elif what == _ATTRIBUTES:
                marks.append(Attributes(file))
            elif marks and isinstance(last := marks[-1], Extents) and (last.file, last.last + 1) == (file, what):
                marks[-1] = replace(last, last=what)
            else:
                marks.append(Extents(file, what, what))
        marks += [Extents(file, first, END) for file, (first, _) in self._tails.items()]
        return marks

    def entries(self) -> list[Entry]:
        """What a log that is written afresh has to hold."""
        marks = self.hot()
        files = {mark.number for mark in marks}
        located: list[Entry] = [self.located[file] for file in files if file in self.located]
        return located + marks

    # ---- reigns and checkpoints

    def begin_reign(self, next_id: int) -> None:
        """This node leads from here on. No mark of its own leads to what the primary before made: only what is made from
        `next_id` on needs none."""
        self.new_from = max(self.new_from, next_id)

    def cut(self, new_from: int) -> None:
        """What comes from here on is of a new generation; files with ids from `new_from` on are its new ones."""
        self.old.add(self.now)
        self.now = Generation()
        self.new_from = max(self.new_from, new_from)
        self.tracking = True
        self._age += 1

    def checkpointed(self, number: int) -> None:
        """Both nodes have synced what came before the last `cut`: it is dirty no more; what nothing touched lately cools."""
        self.old = Generation()
        self.head = replace(self.head, number=number, base=number, new_from=self.new_from, complete=True)
        self._hot = {key: age for key, age in self._hot.items() if age >= self._age - 1}
        self._tails = {file: tail for file, tail in self._tails.items() if tail[1] >= self._age - 1}
        files = {file for file, _ in self._hot} | set(self._tails) | set(self.now.files) | set(self.now.names)
        self.located = {file: at for file, at in self.located.items() if file in files}
        self._at = {(at.parent, at.name): file for file, at in self.located.items() if at.parent}

    def take(self, number: int) -> FileMarks:
        """Take the marks of a file out of the set: it is being brought over."""
        taken = FileMarks()
        for generation in (self.old, self.now):
            marks = generation.files.pop(number, None)
            if marks is not None:
                taken.add(marks)
        return taken

    def resynced(self, number: int) -> None:
        """Both nodes have synced, in the middle of a resync: what is marked still is all that may differ since."""
        self.head = replace(self.head, number=number, base=number)

    def synced(self, number: int) -> None:
        """As the standby: all that came before checkpoint `number` is durable here."""
        self.head = replace(self.head, number=number)

    def all(self) -> Generation:
        """Everything that is dirty, as a set of its own."""
        both = Generation()
        both.add(self.old)
        both.add(self.now)
        return both

    @property
    def dirty_bytes(self) -> int:
        """Bytes in dirty blocks and in extents that have to be compared; new files are not counted."""
        return sum(marks.estimated_bytes for generation in (self.old, self.now) for marks in generation.files.values())

    @property
    def dirty_names(self) -> int:
        """Changed names; a directory of which all may have changed counts as one."""
        return sum(len(names or (b"",)) for generation in (self.old, self.now) for names in generation.names.values())


def is_quick(source: Head, target: Head) -> bool:
    """Whether the two sets together hold all that may differ between the nodes that they are of.

    Both nodes have all that came before the lower of their two numbers; each set must reach back to it. A node that was
    restored from an older snapshot has a number below the base of the other's set.
    """
    if not (source.complete and target.complete and source.volume_id == target.volume_id):
        return False
    return max(source.base, target.base) <= min(source.number, target.number)


def first_new(source: Head, target: Head) -> int:
    """Files with this id or a greater one may be new to either node."""
    return max(min(source.new_from, target.new_from), ids.ROOT + 1)
