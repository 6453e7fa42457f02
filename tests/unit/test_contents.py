"""What changes the data of a file: on both nodes the same, and never more than what is marked."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirrorfs import backing, contents
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import BLOCK, EXTENT, DirtySet, Extents, Head
from mirrorfs.tree import Tree

_ONE, _TWO = 2, 3
_PUNCH, _ZERO = ops.PUNCH_HOLE | ops.KEEP_SIZE, ops.ZERO_RANGE
_FILES = st.sampled_from([_ONE, _TWO])
_OFFSETS = st.sampled_from([0, 1, BLOCK - 1, BLOCK, 5000, 3 * BLOCK, EXTENT - 1, EXTENT, EXTENT + 100])
_SIZES = st.sampled_from([1, 100, BLOCK - 1, BLOCK, 3 * BLOCK, EXTENT, EXTENT + BLOCK])
_CHANGES = st.one_of(
    st.builds(ops.Write, _FILES, _OFFSETS, st.sampled_from([b"x", b"yz" * 3000, bytes(100)])),
    st.builds(ops.Allocate, _FILES, st.sampled_from(sorted(ops.ALLOCATE_MODES)), _OFFSETS, _SIZES),
    st.builds(ops.CopyRange, _FILES, _OFFSETS, _FILES, _OFFSETS, _SIZES),
    st.builds(ops.SetAttributes, _FILES, size=_OFFSETS),
)


def _tree(path: Path) -> Tree:
    path.mkdir()
    tree = Tree(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    tree.set_volume(b"v" * 16)
    for number, name in ((_ONE, b"one"), (_TWO, b"two")):
        tree.apply(ops.MakeNode(1, name, number, 0o100644, 0, 0)).lookups += 1
    return tree


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[tuple[Tree, Tree]]:
    """Two trees with two empty files each, as on the two nodes."""
    pair = _tree(tmp_path / "primary"), _tree(tmp_path / "standby")
    yield pair
    for tree in pair:
        tree.table.clear()
        os.close(tree.root)


def _content(tree: Tree, number: int) -> bytes:
    descriptor = tree.table.data(tree.table.get(number))
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _make_on_both(trees: tuple[Tree, Tree], change: ops.Change) -> ops.Change | None:
    """As a primary and its standby make a change; returns what was changed, None if nothing was."""
    primary, standby = trees
    try:
        made, _, failure = contents.make(change, primary.apply)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some modes on some file systems; a copy onto itself
            raise
        return None
    assert failure is None
    if isinstance(made, ops.Write | ops.CopyRange):
        contents.apply_all(made, standby.apply)
    else:
        standby.apply(made)
    return made


@pytest.mark.root
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_CHANGES, min_size=1, max_size=5))
def test_whatever_changes_is_marked_and_is_the_same_on_both_nodes(trees: tuple[Tree, Tree], changes: list[ops.OfFile]) -> None:
    primary, standby = trees
    for number in (_ONE, _TWO):
        _make_on_both(trees, ops.SetAttributes(number, size=0))
        for offset in (0, EXTENT - 2 * BLOCK):
            _make_on_both(trees, ops.Write(number, offset, bytes([number]) * 5 * BLOCK))
    for change in changes:
        dirty = DirtySet(Head(new_from=1 << 40, complete=True))
        before = _content(primary, change.file)
        dirty.heat(dirty.cold(change, len(before)))
        made = _make_on_both(trees, change)
        if made is not None:
            dirty.note(made, len(before))
        after = _content(primary, change.file)
        assert all(_content(standby, number) == _content(primary, number) for number in (_ONE, _TWO))
        others = _different_blocks(before, after)
        if made is None:
            assert before == after
        else:
            assert others <= set(dirty.now.files[change.file].blocks)
        hot = [mark for mark in dirty.hot() if isinstance(mark, Extents)]
        for extent in {block * BLOCK // EXTENT for block in others}:
            assert any(mark.first <= extent <= mark.last for mark in hot), (change, extent)
        assert {mark.number for mark in dirty.hot()} == {change.file}


def _different_blocks(one: bytes, two: bytes) -> set[int]:
    size = max(len(one), len(two))
    one, two = one.ljust(size, b"\0"), two.ljust(size, b"\0")
    return {at // BLOCK for at in range(0, size, BLOCK) if one[at : at + BLOCK] != two[at : at + BLOCK]}


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1 - (1 << 30)])
@pytest.mark.parametrize("mode", sorted(ops.ALLOCATE_MODES))
def test_a_range_that_goes_far_behind_the_end_of_a_file_is_marked_only_up_to_it(mode: int, size: int) -> None:
    dirty, change = DirtySet(Head(new_from=9, complete=True)), ops.Allocate(5, mode, 1 << 30, size)
    dirty.heat(dirty.cold(change, 5 << 30))
    dirty.note(change, 5 << 30)
    zeroed = bool(mode & (ops.PUNCH_HOLE | ops.ZERO_RANGE))
    assert len(dirty.now.files[5].blocks) == ((4 << 30) // BLOCK if zeroed else 0)
    assert len(dirty.hot()) == (2 if zeroed else 1)
    assert dirty.cold(change, 5 << 30) == []


def test_what_reserves_room_marks_no_data() -> None:
    dirty = DirtySet(Head(new_from=9, complete=True))
    dirty.note(ops.Allocate(5, 0, 0, 1 << 30), 4096)
    assert list(dirty.now.files[5].blocks) == []


@pytest.mark.root
def test_a_mode_that_the_kernel_never_sends_is_refused_and_changes_nothing(trees: tuple[Tree, Tree]) -> None:
    tree, _ = trees
    tree.apply(ops.Write(_ONE, 0, b"data"))
    for mode in (ops.PUNCH_HOLE, 0x08, 0x20, 0x40, ops.ZERO_RANGE | ops.PUNCH_HOLE):
        with pytest.raises(OSError, match="not supported") as refused:
            tree.apply(ops.Allocate(_ONE, mode, 0, 1 << 20))
        assert refused.value.errno == errno.EOPNOTSUPP
    assert _content(tree, _ONE) == b"data"


@pytest.mark.root
def test_a_change_of_data_is_a_new_version_that_has_to_be_synced(trees: tuple[Tree, Tree]) -> None:
    tree, _ = trees
    known = tree.table.get(_TWO)
    for change in (ops.Write(_TWO, 0, b"data"), ops.Allocate(_TWO, 0, 0, 9), ops.CopyRange(_ONE, 0, _TWO, 0, 9)):
        before = known.version
        tree.apply(change)
        assert known.version == before + 1


@pytest.mark.root
def test_a_file_that_grew_before_the_room_was_out_has_grown_on_both_nodes(
    trees: tuple[Tree, Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, mode: int, offset: int, size: int) -> None:
        os.ftruncate(descriptor, offset + size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(backing, "allocate", full)
    made, result, failure = contents.make(ops.Allocate(_ONE, 0, 0, 8192), trees[0].apply)
    assert (made, result) == (ops.SetAttributes(_ONE, size=4096), None)
    assert failure is not None
    assert failure.errno == errno.ENOSPC


@pytest.mark.root
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("mode", [_PUNCH, _ZERO])
def test_of_zeroing_that_failed_in_the_middle_nobody_says_what_it_has_done(
    trees: tuple[Tree, Tree], monkeypatch: pytest.MonkeyPatch, mode: int, number: int
) -> None:
    def fail(descriptor: int, *_: int) -> None:
        os.ftruncate(descriptor, 4096)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(backing, "allocate", fail)
    change = ops.Allocate(_ONE, mode, 0, 8192)
    with pytest.raises(OSError, match=os.strerror(number)) as failed:
        contents.make(change, trees[0].apply)
    assert contents.is_unsure(change, failed.value)


def test_what_is_refused_before_it_begins_is_not_unsure() -> None:
    def failed(number: int) -> OSError:
        return OSError(number, os.strerror(number))

    assert not contents.is_unsure(ops.Allocate(5, _PUNCH, 0, 1), failed(errno.EOPNOTSUPP))
    assert not contents.is_unsure(ops.Allocate(5, 0, 0, 1), failed(errno.ENOSPC))
    assert not contents.is_unsure(ops.Write(5, 0, b"data"), failed(errno.ENOSPC))


@given(st.binary(min_size=1, max_size=40), st.lists(st.integers(1, 7), min_size=40))
def test_a_standby_goes_on_until_all_that_the_primary_made_is_made(data: bytes, counts: list[int]) -> None:
    for change in (ops.Write(5, 100, data), ops.CopyRange(6, 7, 5, 100, len(data))):
        source, found, left = b"skipped" + data, bytearray(140), iter(counts)

        def apply(change: Any, found: bytearray = found, left: Any = left, source: bytes = source) -> int:
            if isinstance(change, ops.Write):
                given = change.data
            else:
                given = source[change.source_offset : change.source_offset + change.size]
            given = given[: next(left)]
            found[change.offset : change.offset + len(given)] = given
            return len(given)

        contents.apply_all(change, apply)
        assert found == bytearray(100) + data + bytes(40 - len(data))


def test_a_source_that_is_shorter_than_at_the_primary_is_an_error() -> None:
    with pytest.raises(OSError, match="ends before"):
        contents.apply_all(ops.CopyRange(6, 0, 5, 0, 10), lambda change: 0 if change.offset else 4)


def test_one_copy_is_bounded_and_says_what_was_copied() -> None:
    change = contents.bounded(ops.CopyRange(6, 1, 5, 2, 1 << 40))
    assert change == ops.CopyRange(6, 1, 5, 2, ops.MAX_COPY)
    assert contents.make(change, lambda _: 17) == (ops.CopyRange(6, 1, 5, 2, 17), 17, None)
    assert contents.bounded(ops.Allocate(5, 0, 0, 1 << 40)) == ops.Allocate(5, 0, 0, 1 << 40)


@pytest.mark.root
def test_times_are_those_of_the_primary_to_the_nanosecond(trees: tuple[Tree, Tree]) -> None:
    tree, _ = trees
    tree.apply(ops.Times(((_ONE, 1_234_567_890_123_456_789), (1, 987_654_321_987_654_321))))
    assert tree.stat(tree.table.get(_ONE)).st_mtime_ns == 1_234_567_890_123_456_789
    assert tree.stat(tree.table.get(1)).st_mtime_ns == 987_654_321_987_654_321
    with pytest.raises(OSError, match="Stale"):
        tree.apply(ops.Times(((99, 5),)))
