"""What a returning node says of its own dirty set: marks, and the way to each marked file as it stands or stood here."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import trio
from pyroaring import BitMap64

from mirrorfs.core import ids
from mirrorfs.core.dirty import END, EXTENT, DirtySet, FileMarks, Generation, Located
from mirrorfs.core.soundness import is_name
from mirrorfs.core.wire import Frame, message, raw
from mirrorfs.errors import ProtocolError
from mirrorfs.search import Hit, find_names
from mirrorfs.table import Known
from mirrorfs.tree import Tree

_MAX_NAMES: Final = 1000
_MAX_BLOCKS_SIZE: Final = 64 << 10
_PER_FRAME: Final = 200
_DEPTH: Final = 4096
_MAX_WANTED: Final = 4000

#: A file and the directory entry by which the reporting node knows it.
Step = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class Report:
    """The marks of the other node, and for each marked file and the directories above it, where that node has it: of a file
    with several names, by all of them."""

    marks: Generation
    places: dict[int, list[tuple[int, bytes]]]


async def pack(dirty: DirtySet, tree: Tree) -> Iterator[list[Any]]:
    """The report as messages of bounded size, for msgpack."""
    wanted = await _many_named(dirty, tree)
    hits = await trio.to_thread.run_sync(find_names, tree.root, wanted.keys()) if wanted else {}
    return _pack(dirty, tree, _places(wanted, hits, tree))


def _pack(dirty: DirtySet, tree: Tree, several: dict[int, list[tuple[int, bytes]]]) -> Iterator[list[Any]]:
    told: set[int] = {ids.ROOT}
    items: list[Any] = []
    marks = dirty.all()
    for directory, names in marks.names.items():
        exact = None if names is None or len(names) > _MAX_NAMES else sorted(names)
        items.append([_way(directory, dirty, tree, told), directory, exact])
        if len(items) >= _PER_FRAME or (exact and len(exact) > 100):
            yield items
            items = []
    for file, changed in marks.files.items():
        way: list[Step] = []
        for parent, name in several.get(file, ())[:_MAX_NAMES]:
            way += [(file, parent, name), *_way(parent, dirty, tree, told)]
        items.append([way or _way(file, dirty, tree, told), file, *_pack_file(changed)])
        if len(items) >= _PER_FRAME or len(items[-1][2]) > 1000 or len(way) > 20:
            yield items
            items = []
    if items:
        yield items


def _pack_file(marks: FileMarks) -> tuple[bytes, bytes, int]:
    blocks = marks.blocks.serialize()
    if len(blocks) <= _MAX_BLOCKS_SIZE:
        return blocks, marks.extents.serialize(), marks.tail
    coarse = BitMap64(marks.extents)
    per_extent = EXTENT // 4096
    for block in marks.blocks:
        coarse.add(block // per_extent)
    return BitMap64().serialize(), coarse.serialize(), marks.tail


async def _many_named(dirty: DirtySet, tree: Tree) -> dict[int, int]:
    """Marked files that have several names here, or one that is not known, by inode number: the other node may have removed
    the one that is known."""
    found: dict[int, int] = {}
    for count, number in enumerate(dirty.all().files):
        if count % 256 == 255:
            await trio.lowlevel.checkpoint()
        located = dirty.located.get(number)
        known = tree.find(number, located.handle if located else b"")
        if known is None:
            continue
        status = tree.stat(known)
        if not known.is_directory and (status.st_nlink > 1 or not _is_placed(known, located, tree)):
            found[status.st_ino] = number
        tree.table.drop_unused(known)
    return found


def _is_placed(known: Known, located: Located | None, tree: Tree) -> bool:
    if located is not None and located.parent:
        above = tree.find(located.parent, located.parent_handle)
        if above is not None and tree.holds(above, located.name, known.id):
            return True
    try:
        tree.place_of(known)
    except OSError:
        return False
    return True


def _places(wanted: dict[int, int], hits: dict[int, list[Hit]], tree: Tree) -> dict[int, list[tuple[int, bytes]]]:
    """Parents and names of files that were found by their inode numbers."""
    found: dict[int, list[tuple[int, bytes]]] = {}
    for inode, ways in hits.items():
        for way, name in ways:
            with suppress(OSError):  # moved since
                parent = ids.ROOT
                for step in way:
                    parent = tree.lookup(parent, step).id
                if not ids.is_provisional(parent):
                    found.setdefault(wanted[inode], []).append((parent, name))
    return found


def _way(number: int, dirty: DirtySet, tree: Tree, told: set[int]) -> list[Step]:
    """The steps that lead to a file, from below, up to one that was told already."""
    steps: list[Step] = []
    while number not in told and len(steps) < _DEPTH:
        told.add(number)
        place = _place(number, dirty, tree)
        if place is None:
            break
        steps.append((number, *place))
        number = place[0]
    return steps


def _place(number: int, dirty: DirtySet, tree: Tree) -> tuple[int, bytes] | None:
    located = dirty.located.get(number)
    if located is not None and located.parent:
        above = tree.find(located.parent, located.parent_handle)
        if above is not None and tree.holds(above, located.name, number):
            return located.parent, located.name
    known = tree.find(number, located.handle if located else b"")
    if known is not None:
        try:
            parent, name = tree.place_of(known)
            if not ids.is_provisional(parent):
                return parent, name
            tree.table.drop_unused(tree.table.get(parent))  # it is set aside: where that is has no id and is in no tree
        except OSError:
            pass  # gone, or known by no name
        finally:
            tree.table.drop_unused(known)
    return (located.parent, located.name) if located is not None and located.parent else None


def unpack(messages: Iterable[Any]) -> Report:
    """The report in these messages; ProtocolError if they are none."""
    marks, places = Generation(), dict[int, list[tuple[int, bytes]]]()
    try:
        for items in messages:
            for way, number, *content in items:
                for file, parent, name in way:
                    places.setdefault(_id(file), []).append((_id(parent), _name(name)))
                if len(content) == 1:
                    (names,) = content
                    mine = marks.names.setdefault(_id(number), set())
                    marks.names[number] = None if names is None or mine is None else mine | set(map(_name, names))
                else:
                    blocks, extents, tail = content
                    changed = FileMarks()
                    changed.blocks = BitMap64.deserialize(blocks)
                    changed.extents = BitMap64.deserialize(extents)
                    changed.tail = _tail(tail)
                    marks.file(_id(number)).add(changed)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"a malformed HOT: {error}") from error
    return Report(marks, places)


def pack_wanted(wanted: list[tuple[int, list[bytes] | None]]) -> Iterator[list[Any]]:
    """Directories and names in them, None for all that were gathered, as messages of bounded size."""
    items: list[Any] = []
    count = 0
    for directory, names in wanted:
        items.append([directory, names])
        count += 1 + len(names or ())
        if count >= _MAX_WANTED:
            yield items
            items, count = [], 0
    if items:
        yield items


def unpack_wanted(frame: Frame) -> list[tuple[int, set[bytes] | None]]:
    """What `pack_wanted` has packed; ProtocolError if it is not that."""
    try:
        return [(_id(directory), None if names is None else set(map(_name, names))) for directory, names in message(frame)]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"a malformed {frame.kind.name}: {error}") from error


def _id(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 63:
        raise ValueError(f"{value!r} is no file id")
    return value


def _name(value: Any) -> bytes:
    if not is_name(value):
        raise ValueError(f"{value!r} is no name"[:100])
    return raw(value)


def _tail(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no extent"[:100])
    return min(value, END)
