"""What differs between the two sides of a split brain: the marks of both, and what each side has there, put side by side.

Marks say what a side may have changed since the last checkpoint that both have. What is equal all the same is left out, as far
as it was looked at.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from pyroaring import BitMap64

from mirrorfs.core.dirty import BLOCK, END, EXTENT, FileMarks, Generation
from mirrorfs.core.wire import raw
from mirrorfs.errors import ProtocolError

#: Bytes of the digest of one block.
DIGEST_SIZE: Final = 8
_NAMES: Final = 0
_FILE: Final = 1


@dataclass(frozen=True, slots=True)
class Seen:
    """What stands under a name: id, mode as of stat(2), size in bytes of a regular file."""

    id: int
    mode: int
    size: int


@dataclass(frozen=True, slots=True)
class FileSeen:
    """A marked file: where it is and what it is like. `digests` are those of its marked blocks; None if they are too many."""

    path: bytes
    mode: int
    size: int
    attributes: bytes
    digests: dict[int, bytes] | None


@dataclass(slots=True)
class Side:
    """What one side has where one of both may have changed something."""

    names: dict[int, dict[bytes, Seen]] = field(default_factory=dict)
    directories: dict[int, bytes] = field(default_factory=dict)
    files: dict[int, FileSeen] = field(default_factory=dict)


def pack_names(directory: int, path: bytes, names: Iterable[tuple[bytes, Seen]]) -> list[Any]:
    """What stands in a directory under marked names, for msgpack."""
    return [_NAMES, directory, path, [[name, seen.id, seen.mode, seen.size] for name, seen in names]]


def pack_file(number: int, seen: FileSeen) -> list[Any]:
    """A marked file, for msgpack."""
    runs = None if seen.digests is None else [list(seen.digests), b"".join(seen.digests.values())]
    return [_FILE, number, seen.path, seen.mode, seen.size, seen.attributes, runs]


def add_to(side: Side, items: Any) -> None:
    """Take in what the other node has packed; ProtocolError if it is not that."""
    try:
        for kind, number, path, *content in items:
            if kind == _NAMES:
                (names,) = content
                there = side.names.setdefault(_number(number), {})
                there.update((raw(name), Seen(_number(file), _number(mode), _number(size))) for name, file, mode, size in names)
                side.directories[number] = raw(path)
            else:
                mode, size, attributes, runs = content
                side.files[_number(number)] = FileSeen(
                    raw(path), _number(mode), _number(size), raw(attributes), None if runs is None else _digests(*runs)
                )
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"a malformed SPLIT_TOLD: {error}") from error


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is no number")
    return value


def _digests(blocks: list[int], digests: bytes) -> dict[int, bytes]:
    if len(digests) != len(blocks) * DIGEST_SIZE:
        raise ValueError("not a digest for each block")
    return {_number(block): digests[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE] for at, block in enumerate(blocks)}


def whole_marks() -> FileMarks:
    """Marks that say that all of a file may have changed."""
    marks = FileMarks()
    marks.tail = 0
    return marks


def blocks_of(marks: FileMarks | None, size: int) -> BitMap64:
    """The blocks of a file of that size that are marked, coarsely or exactly."""
    inside, count = BitMap64(), (size + BLOCK - 1) // BLOCK
    if marks is None or not count:
        return inside
    inside.add_range(0, count)
    found = BitMap64(marks.blocks)
    per_extent = EXTENT // BLOCK
    for extent in marks.extents:
        found.add_range(extent * per_extent, (extent + 1) * per_extent)
    if marks.tail < END:
        found.add_range(min(marks.tail * per_extent, count), count)
    return found & inside


def ranges_of(blocks: BitMap64, size: int) -> list[tuple[int, int]]:
    """Blocks as ranges (start, end) in bytes, neighbours joined."""
    marks = FileMarks()
    marks.blocks = blocks
    return list(marks.block_ranges(size))


def compare(
    nodes: tuple[str, str], sides: tuple[Side, Side], marks: tuple[Generation, Generation], first_new: int
) -> list[dict[str, Any]]:
    """What differs, by path, in plain values.

    Each has `path`, `changed_by` (the nodes that did it since the fork) and for each node what it has there, None for nothing:
    `path` there, `what`, `size`, the `ranges` of it that this side changed and that differ, `attributes` if those differ.
    Files with an id of `first_new` or more were made since.
    """
    found: dict[bytes, dict[str, Any]] = {}
    for directory in sides[0].names | sides[1].names:
        ours, theirs = (side.names.get(directory, {}) for side in sides)
        path = sides[0].directories.get(directory) or sides[1].directories.get(directory, b"")
        for name in ours | theirs:
            seen = ours.get(name), theirs.get(name)
            if seen[0] is None or seen[1] is None or seen[0].id != seen[1].id:
                full = path.rstrip(b"/") + b"/" + name
                by = [node for node, its in zip(nodes, marks, strict=True) if its.has_name(directory, name)]
                by = by or [node for node, its in zip(nodes, seen, strict=True) if its is not None]
                found[full] = {
                    "path": _text(full),
                    "changed_by": by,
                    **{node: _of_name(full, its, first_new) for node, its in zip(nodes, seen, strict=True)},
                }
    for number in sorted(sides[0].files | sides[1].files):
        own = [its.files.get(number) or (whole_marks() if number >= first_new else None) for its in marks]
        _compare_file(found, number, nodes, sides, own)
    return [found[path] for path in sorted(found)]


def _of_name(path: bytes, seen: Seen | None, first_new: int) -> dict[str, Any] | None:
    if seen is None:
        return None
    is_new = stat.S_ISREG(seen.mode) and seen.id >= first_new
    return {
        "path": _text(path),
        "what": KINDS.get(stat.S_IFMT(seen.mode), "file"),
        "size": seen.size,
        "ranges": [(0, seen.size)] if is_new and seen.size else [],
    }


def _compare_file(
    found: dict[bytes, dict[str, Any]],
    number: int,
    nodes: tuple[str, str],
    sides: tuple[Side, Side],
    marks: list[FileMarks | None],
) -> None:
    seen = sides[0].files.get(number), sides[1].files.get(number)
    there = [its for its in seen if its is not None]
    if not there:
        return
    differing = _differing(*seen)
    if not differing and len(there) == 2 and there[0].attributes == there[1].attributes and there[0].size == there[1].size:
        return
    path = there[0].path
    entry = found.setdefault(path, {"path": _text(path), "changed_by": [], **dict.fromkeys(nodes)})
    for node, its, mine in zip(nodes, seen, marks, strict=True):
        if mine is not None and node not in entry["changed_by"]:
            entry["changed_by"] = sorted([*entry["changed_by"], node])
        if its is not None:
            blocks = blocks_of(mine, its.size)
            side = entry[node] = entry[node] or {}
            side["path"] = _text(its.path)
            side["what"], side["size"] = KINDS.get(stat.S_IFMT(its.mode), "file"), its.size
            side["ranges"] = ranges_of(blocks if differing is None else blocks & differing, its.size)
            side["attributes"] = len(there) == 2 and there[0].attributes != there[1].attributes


def _differing(ours: FileSeen | None, theirs: FileSeen | None) -> BitMap64 | None:
    """The marked blocks that differ; None if that was not looked at."""
    if ours is None or theirs is None or ours.digests is None or theirs.digests is None:
        return None
    blocks = ours.digests.keys() | theirs.digests.keys()
    return BitMap64(block for block in blocks if ours.digests.get(block) != theirs.digests.get(block))


#: What a file is, in a word.
KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
