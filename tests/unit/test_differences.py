"""Two sides of a split brain, put side by side: what is equal is left out, what differs is told by side."""

import stat
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core.differences import FileSeen, Seen, Side, add_to, blocks_of, compare, pack_file, pack_names, ranges_of
from mirrorfs.core.dirty import BLOCK, EXTENT, FileMarks, Generation
from mirrorfs.errors import ProtocolError

FILE = stat.S_IFREG | 0o644
OLD, NEW = 100, 10_000


def _side(*names: tuple[bytes, int], **files: FileSeen) -> Side:
    side = Side()
    side.names[1] = {name: Seen(number, FILE, 10) for name, number in names}
    side.directories[1] = b"/"
    side.files = {int(key[1:]): seen for key, seen in files.items()}
    return side


def _seen(path: bytes, *blocks: bytes, attributes: bytes = b"a") -> FileSeen:
    return FileSeen(path, FILE, len(blocks) * BLOCK, attributes, {at: block * 8 for at, block in enumerate(blocks)})


def _compare(ours: Side, theirs: Side, mine: Generation, other: Generation) -> dict[str, Any]:
    found = compare(("one", "two"), (ours, theirs), (mine, other), NEW)
    return {difference["path"]: difference for difference in found}


def _marks(number: int, *blocks: int) -> Generation:
    marks = Generation()
    for block in blocks:
        marks.write(number, block * BLOCK, 1)
    return marks


def test_each_side_is_told_the_differing_blocks_that_it_changed_itself() -> None:
    ours, theirs = _side(f100=_seen(b"/x", b"1", b"2", b"3")), _side(f100=_seen(b"/x", b"1", b"X", b"Y"))
    found = _compare(ours, theirs, _marks(OLD, 0, 1), _marks(OLD, 2))
    assert found["/x"]["changed_by"] == ["one", "two"]
    assert found["/x"]["one"]["ranges"] == [(BLOCK, 2 * BLOCK)], "block 0 is marked and is the same on both"
    assert found["/x"]["two"]["ranges"] == [(2 * BLOCK, 3 * BLOCK)]


def test_what_is_marked_and_equal_is_left_out() -> None:
    side = _side((b"x", OLD), f100=_seen(b"/x", b"1"))
    marks = _marks(OLD, 0)
    marks.name(1, b"x")
    assert _compare(side, side, marks, marks) == {}


def test_attributes_that_differ_are_a_difference_without_ranges() -> None:
    ours, theirs = _side(f100=_seen(b"/x", attributes=b"a")), _side(f100=_seen(b"/x", attributes=b"b"))
    found = _compare(ours, theirs, _marks(OLD), Generation())
    assert (found["/x"]["one"]["ranges"], found["/x"]["one"]["attributes"]) == ([], True)


def test_without_digests_all_that_is_marked_counts() -> None:
    seen = FileSeen(b"/x", FILE, 3 * BLOCK, b"a", None)
    ours, theirs = _side(f100=seen), _side(f100=FileSeen(b"/x", FILE, 2 * BLOCK, b"a", None))
    found = _compare(ours, theirs, _marks(OLD, 0, 2), Generation())
    assert found["/x"]["one"]["ranges"] == [(0, BLOCK), (2 * BLOCK, 3 * BLOCK)]


def test_names_that_lead_elsewhere_are_told_with_who_changed_them() -> None:
    mine, other = Generation(), Generation()
    mine.name(1, b"made")
    other.name(1, b"removed")
    found = _compare(_side((b"made", NEW), (b"removed", OLD)), _side(), mine, other)
    assert (found["/made"]["changed_by"], found["/made"]["two"]) == (["one"], None)
    assert found["/made"]["one"]["ranges"] == [(0, 10)]
    assert (found["/removed"]["changed_by"], found["/removed"]["one"]["ranges"]) == (["two"], [])


def test_coarse_marks_are_blocks_within_the_size() -> None:
    marks = FileMarks()
    marks.extents.add(1)
    assert ranges_of(blocks_of(marks, EXTENT + 10), EXTENT + 10) == [(EXTENT, EXTENT + 10)]
    assert not blocks_of(marks, EXTENT)
    marks.tail = 0
    assert ranges_of(blocks_of(marks, 5), 5) == [(0, 5)]
    assert not blocks_of(None, 5)


def test_what_was_packed_is_what_is_taken_in() -> None:
    side = Side()
    items = [
        pack_names(1, b"/d", [(b"x", Seen(5, FILE, 7))]),
        pack_names(1, b"/d", [(b"y", Seen(6, FILE, 8))]),
        pack_file(5, _seen(b"/d/x", b"1", b"2")),
        pack_file(6, FileSeen(b"/d/y", FILE, 9, b"a", None)),
    ]
    add_to(side, msgpack.unpackb(msgpack.packb(items)))
    assert side.names == {1: {b"x": Seen(5, FILE, 7), b"y": Seen(6, FILE, 8)}}
    assert side.files == {5: _seen(b"/d/x", b"1", b"2"), 6: FileSeen(b"/d/y", FILE, 9, b"a", None)}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.binary(max_size=20) | st.text(max_size=5),
        lambda children: st.lists(children, max_size=7),
        max_leaves=30,
    )
)
def test_anything_else_is_a_named_error(items: Any) -> None:
    try:
        add_to(Side(), items)
    except ProtocolError:
        return
    assert items == [] or isinstance(items, list | str | bytes)


@pytest.mark.parametrize(
    "items",
    [
        [[0, -1, b"/", []]],
        [[0, 1, b"/", [[b"x", 1, 1]]]],
        [[1, 1, b"/", 1, 1, b"", [[1, 2], b"short"]]],
        [[1, 1, "text", 1, 1, b"", None]],
        [7],
    ],
)
def test_nonsense_is_a_named_error(items: Any) -> None:
    with pytest.raises(ProtocolError):
        add_to(Side(), items)
