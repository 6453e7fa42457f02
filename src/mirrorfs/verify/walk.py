"""One walk over the whole tree: what differs between the two nodes, at one point of the stream each.

Directory by directory. Its names are those that either node lists; each is looked at on both nodes at one point, so a name that
comes or goes meanwhile is there on both or on none. The data of a file is compared by hashes of what is on the disks, which
may be of two moments; a block whose hashes differ is read on both nodes at one point before it counts.

A file that is moved while the walk runs may be left out of it, never the other way round.
"""

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from mirrorfs import evidence
from mirrorfs.core import ids
from mirrorfs.core.dirty import BLOCK
from mirrorfs.resync.hashes import COMPARED, HASH_SIZE
from mirrorfs.resync.layout import segments
from mirrorfs.table import Known
from mirrorfs.verify.asking import Asking, Hashes, Place, TheirError

#: Bytes of data whose hashes are asked for at once, at most, and a tenth of a second's at a low rate; of a hole, which is
#: compared without reading anything.
_PIECE: Final = 1 << 20
_HOLE_PIECE: Final = 64 << 20
_NAMES_AT_ONCE: Final = 64
#: What looking at one name counts for, in bytes: at the default rate the two nodes are kept busy a tenth of the time.
_NAME_COST: Final = 16 << 10
_MAX_SHOWN: Final = 20

Range = tuple[int, int]
#: The state of one thing on this node and on the other, as `evidence.attributes`; empty for nothing.
_Pair = tuple[list[Any], list[Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs at one path: `what` in words, `ranges` of bytes (first, last + 1), and what came of repairing it."""

    path: bytes
    what: str
    ranges: tuple[Range, ...] = ()
    repair: str = ""
    repaired: bool = False

    def __str__(self) -> str:
        parts = [self.what] if self.what else []
        if self.ranges:
            shown = ", ".join(f"{first}-{last - 1}" for first, last in self.ranges[:_MAX_SHOWN])
            more = f" and {len(self.ranges) - _MAX_SHOWN} more ranges" if len(self.ranges) > _MAX_SHOWN else ""
            parts.append(f"content differs in bytes {shown}{more}")
        repair = f" ({self.repair})" if self.repair else ""
        return f"{shown_path(self.path)}: {'; '.join(parts)}{repair}"


def shown_path(path: bytes) -> str:
    """A path of any bytes as one line of printable text."""
    text = path.decode("utf-8", "backslashreplace") or "."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


#: Puts a file right, given where its content differs; whether it did, and what to tell of that.
Mend = Callable[[Place, Sequence[Range]], Awaitable[tuple[bool, str]]]


@dataclass(slots=True)
class _Level:
    """A directory on the way down: the directories in it that are still to be entered, and who introduced it."""

    directory: Known
    path: bytes
    introduced: bool = False
    pending: list[bytes] = field(default_factory=list)


class Walk:
    """Compares everything. `own` and `peer` are the nodes' names; `found` is called with each difference."""

    def __init__(
        self,
        asking: Asking,
        own: str,
        peer: str,
        *,
        rate_bytes_per_s: float,
        found: Callable[[Difference], None],
        mend: Mend | None = None,
    ) -> None:
        self.asking = asking
        self.tree = asking.tree
        self.files_done = self.bytes_done = 0
        self._new_from = asking.primary.keeper.next_id()
        self._own = own
        self._peer = peer
        self._rate_bytes_per_s = rate_bytes_per_s
        self._piece_bytes = max(COMPARED, int(min(_PIECE, rate_bytes_per_s / 10)) // COMPARED * COMPARED)
        self._found = found
        self._mend = mend
        self._levels: list[_Level] = []
        self._linked: set[int] = set()
        self._next_at = trio.current_time()

    async def run(self) -> None:
        """Compare everything, once; RefusedError if the pair does not stay mirrored."""
        try:
            root = self.tree.table.get(ids.ROOT)
            self._go_down(_Level(root, b""))
            await self._root(root)
            await self._directory(self._levels[-1])
            while self._levels:
                level = self._levels[-1]
                if level.pending:
                    await self._enter(level, level.pending.pop())
                else:
                    self._go_up()
        finally:
            while self._levels:
                self._go_up()

    # ---- directories

    def _go_down(self, level: _Level) -> None:
        level.directory.kept += 1
        self._levels.append(level)

    def _go_up(self) -> None:
        level = self._levels.pop()
        if level.introduced:
            self.asking.forget(level.directory.id)
        level.directory.kept -= 1
        self.tree.table.drop_unused(level.directory)

    async def _enter(self, above: _Level, name: bytes) -> None:
        known = None if above.directory.gone else evidence.find(self.tree, above.directory, name)
        if known is None or not known.is_directory or any(level.directory is known for level in self._levels):
            return
        level = _Level(known, _joined(above.path, name))
        self._go_down(level)
        level.introduced = self.asking.introduce(above.directory.id, name, known.id)
        await self._directory(level)

    async def _root(self, root: Known) -> None:
        for own, theirs in await self.asking.look(root, ()):
            await self._judge(Place(root, b"", root, b""), own, theirs)

    async def _directory(self, level: _Level) -> None:
        """Look at everything in one directory."""
        try:
            after, complete = b"", False
            while not (complete or level.directory.gone):
                names, complete = await self._names(level.directory, after)
                for at in range(0, len(names), _NAMES_AT_ONCE):
                    await self._some(level, names[at : at + _NAMES_AT_ONCE])
                after = names[-1] if names else after
        except OSError as error:
            if not level.directory.gone:
                self._unreadable(level.path, error)

    async def _names(self, directory: Known, after: bytes) -> tuple[list[bytes], bool]:
        """The next names that either node has, and whether those are all."""
        descriptor = evidence.open_to_read(self.tree, directory)
        try:
            own, own_complete = await trio.to_thread.run_sync(evidence.names_after, descriptor, after)
        finally:
            os.close(descriptor)
        if directory.gone:
            return [], True
        theirs, their_complete = await self.asking.names(directory, after)
        last = min(
            [names[-1] for names, complete in ((own, own_complete), (theirs, their_complete)) if not complete], default=None
        )
        return sorted(name for name in {*own, *theirs} if last is None or name <= last), last is None

    async def _some(self, level: _Level, names: list[bytes]) -> None:
        """Look at some names of a directory: both nodes are asked once for all of them, and once for all small files."""
        names = [name for name in names if not self._is_new(level.directory, name)]
        if not names:
            return
        try:
            looked = await self.asking.look(level.directory, names)
        except OSError as error:
            await self._one_by_one(level, names, error)
            return
        pairs = dict(zip(names, looked, strict=False))
        places: dict[bytes, Place] = {}
        try:
            for name, (own, theirs) in pairs.items():
                if (own or theirs) and not self._strange(own, theirs):
                    self._take(level, name, own, places)
            equal = await self._equal_small(places, pairs)
            for name, (own, theirs) in pairs.items():
                self.files_done += bool(own or theirs)
                if name in places:
                    await self._judge(places[name], own, theirs, data_is_equal=name in equal)
                elif (own or theirs) and (strange := self._strange(own, theirs)):
                    self._found(Difference(_joined(level.path, name), strange, repair=self._no_repair()))
        finally:
            for place in places.values():
                place.known.kept -= 1
                self.tree.table.drop_unused(place.known)
        await self._pace(_NAME_COST * len(names))

    def _is_new(self, directory: Known, name: bytes) -> bool:
        """Whether that was made since the walk began. It is left to the next one: an application that makes files faster
        than they are compared would keep this one from its end."""
        if directory.gone:
            return False
        try:
            number, _ = self.tree.peek(directory, name)
        except OSError:
            return False
        return number is not None and number >= self._new_from

    async def _one_by_one(self, level: _Level, names: list[bytes], error: OSError) -> None:
        """One of these names cannot be looked at: the others can."""
        if len(names) > 1:
            for name in names:
                await self._some(level, [name])
        elif not level.directory.gone:
            self._unreadable(_joined(level.path, names[0]), error)

    def _take(self, level: _Level, name: bytes, own: list[Any], places: dict[bytes, Place]) -> None:
        """Note what stands under a name, unless it was moved since; it was the same on both nodes then."""
        known = None if level.directory.gone else evidence.find(self.tree, level.directory, name)
        if known is None or known.id != own[0]:
            return
        known.kept += 1
        places[name] = Place(level.directory, name, known, _joined(level.path, name))
        if known.is_directory:
            level.pending.append(name)

    async def _equal_small(self, places: dict[bytes, Place], pairs: dict[bytes, _Pair]) -> set[bytes]:
        """The names of the small files whose data has the same hash on both nodes."""
        small = {name: place for name, place in places.items() if 0 < max(pair[5] for pair in pairs[name]) <= COMPARED}
        try:
            standing = [place for place in small.values() if self.asking.stands(place)]
            if not standing:
                return set()
            found = await self.asking.hashes(standing, 0, COMPARED)
        except OSError:
            return set()  # whatever it is, it will be told of the file that it is about
        self.bytes_done += sum(pairs[place.entry][0][5] for place in standing)
        await self._pace(sum(pairs[place.entry][0][5] for place in standing))
        return {place.entry for place, (own, theirs) in zip(standing, found, strict=True) if own == theirs and _is_hash(own)}

    def _strange(self, own: list[Any], theirs: list[Any]) -> str:
        """How two things under one name are not the same file at all; empty if they are."""
        if own and own[0] == 0:
            return f"on {self._own} it was put there underneath, and is no part of the mirror"
        if theirs and theirs[0] == 0:
            return f"on {self._peer} it was put there underneath, and is no part of the mirror"
        if not (own and theirs):
            return f"only on {self._own if own else self._peer}"
        if own[0] != theirs[0]:
            return f"another file on {self._peer} (id {theirs[0]:x}) than on {self._own} (id {own[0]:x})"
        if (stat.S_IFMT(own[1]), own[4], own[7]) != (stat.S_IFMT(theirs[1]), theirs[4], theirs[7]):
            return f"of another type, device or target on {self._peer} than on {self._own}"
        return ""

    async def _judge(self, place: Place, own: list[Any], theirs: list[Any], *, data_is_equal: bool = False) -> None:
        """Compare two states of one file, and its data."""
        what = "; ".join(
            f"{name} {_value(name, mine)} on {self._own}, {_value(name, other)} on {self._peer}"
            for name, mine, other in zip(evidence.FIELDS, own, theirs, strict=True)
            if mine != other
        )
        ranges: list[Range] = []
        try:
            if stat.S_ISREG(own[1]) and not data_is_equal and self._is_first(place.known):
                ranges = await self._data(place, max(own[5], theirs[5]))
            repaired, repair = False, ""
            if (what or ranges) and self._mend is not None:
                repaired, repair = await self._mend(place, ranges)
        except OSError as error:
            if self.asking.stands(place):
                self._unreadable(place.path, error, what)
            return
        if what or ranges:
            self._found(Difference(place.path, what, tuple(ranges), repair, repaired))

    def _is_first(self, known: Known) -> bool:
        """Whether the data of a file has not been looked at under another name."""
        if self.tree.stat(known).st_nlink > 1:
            if known.id in self._linked:
                return False
            self._linked.add(known.id)
        return True

    def _unreadable(self, path: bytes, error: OSError, what: str = "") -> None:
        node = self._peer if isinstance(error, TheirError) else self._own
        text = f"cannot be compared: {node} says: {error.strerror or error}"
        self._found(Difference(path, f"{what}; {text}" if what else text, repair=self._no_repair()))

    def _no_repair(self) -> str:
        return "" if self._mend is None else "not repaired: only a full copy can, see docs/GUARANTEES.md"

    # ---- data

    async def _data(self, place: Place, size: int) -> list[Range]:
        """Where the data of a file differs, in bytes (first, last + 1) and units of 4 KiB."""
        found: list[Range] = []
        descriptor = evidence.open_to_read(self.tree, place.known)
        try:
            offset, size = 0, max(size, os.fstat(descriptor).st_size)  # what is appended meanwhile is for the next walk
            while offset < size and self.asking.stands(place):
                is_data, end = self._piece(descriptor, offset)
                own, theirs = _hashes(*(await self.asking.hashes([place], offset, end - offset))[0])
                for at in range(0, max(len(own), len(theirs)), HASH_SIZE):
                    if own[at : at + HASH_SIZE] != theirs[at : at + HASH_SIZE]:
                        found += await self._blocks(place, offset + at // HASH_SIZE * COMPARED)
                length = max(min(end, os.fstat(descriptor).st_size) - offset, 0) if is_data else 0
                self.bytes_done += length
                await self._pace(length or _NAME_COST)
                offset = end
        finally:
            os.close(descriptor)
        return _merged(found)

    def _piece(self, descriptor: int, offset: int) -> tuple[bool, int]:
        """Whether data or a hole begins there, and where to end: both in units that have a hash of their own."""
        is_data, _, last = next(segments(descriptor, offset, offset + _HOLE_PIECE))
        if is_data or last - offset < _PIECE:
            return True, offset + self._piece_bytes
        return False, last - last % COMPARED

    async def _blocks(self, place: Place, offset: int) -> list[Range]:
        """Where the data between two hashes differs: as both nodes have it at one point of the stream."""
        data = await self.asking.data(place, offset, COMPARED)
        await self._pace(COMPARED)
        if data is None:
            return []
        own, theirs = data
        return [
            (offset + at, offset + min(at + BLOCK, max(len(own), len(theirs))))
            for at in range(0, max(len(own), len(theirs)), BLOCK)
            if own[at : at + BLOCK] != theirs[at : at + BLOCK]
        ]

    async def _pace(self, cost: int) -> None:
        """Wait until so many bytes more may be read."""
        now = trio.current_time()
        self._next_at = max(self._next_at, now - 0.1) + cost / self._rate_bytes_per_s
        await trio.sleep(max(self._next_at - now, 0))


def _is_hash(hashes: Hashes) -> bool:
    """Whether a file was read, and had something in it."""
    return isinstance(hashes, bytes) and hashes != b""


def _hashes(own: Hashes, theirs: Hashes) -> tuple[bytes, bytes]:
    if isinstance(own, int):
        raise OSError(own, os.strerror(own))
    if isinstance(theirs, int):
        raise TheirError(theirs, os.strerror(theirs))
    return own, theirs


def _joined(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def _merged(ranges: list[Range]) -> list[Range]:
    merged: list[Range] = []
    for first, last in ranges:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _value(name: str, value: Any) -> str:
    match name:
        case "type and mode":
            return f"{value:o}"
        case "size":
            return f"{value} bytes"
        case "mtime":
            return f"{value} ns"
        case "extended attributes":
            return "none" if not value else f"with hash {value.hex()[:8]}"
    return str(value)
