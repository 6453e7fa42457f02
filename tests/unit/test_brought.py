"""What a quick resync has brought over leaves the dirty set for good with a checkpoint, and comes back without one."""

from collections.abc import Set

from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import BLOCK, EXTENT, DirtySet, Extents, Head
from mirrorfs.resync.brought import Brought

FILE = 5
_BLOCKS = st.sets(st.integers(0, 5000), max_size=20)


def _dirty(blocks: Set[int], extents: Set[int] = frozenset()) -> DirtySet:
    dirty = DirtySet(Head(new_from=100, complete=True), [Extents(FILE, extent, extent) for extent in sorted(extents)])
    for block in blocks:
        dirty.note(ops.Write(FILE, block * BLOCK, b"x"))
    return dirty


def _blocks(dirty: DirtySet) -> set[int]:
    return set(dirty.all().file(FILE).blocks)


@given(_BLOCKS, _BLOCKS, st.integers(0, 5000))
def test_nothing_that_was_not_made_durable_is_lost(before: set[int], meanwhile: set[int], until: int) -> None:
    dirty = _dirty(before)
    brought = Brought(dirty)
    brought.begin(FILE)
    for block in meanwhile:
        dirty.note(ops.Write(FILE, block * BLOCK, b"x"))
    brought.sent(FILE, until * BLOCK, compared=False)
    assert brought.begin_checkpoint() or not {block for block in before if block < until}
    brought.give_back()
    assert _blocks(dirty) == before | meanwhile
    assert FILE in dirty.all().files, "its attributes too"


@given(_BLOCKS, _BLOCKS, st.integers(0, 5000))
def test_a_checkpoint_settles_what_was_sent_before_it_and_no_more(before: set[int], after: set[int], until: int) -> None:
    dirty = _dirty(before)
    brought = Brought(dirty)
    brought.begin(FILE)
    brought.sent(FILE, until * BLOCK, compared=False)
    brought.begin_checkpoint()
    brought.end(FILE)
    for block in after:
        dirty.note(ops.Write(FILE, block * BLOCK, b"x"))
    brought.end_checkpoint()
    brought.give_back()
    assert _blocks(dirty) == {block for block in before if block >= until} | after


@given(st.sets(st.integers(0, 50), min_size=1, max_size=10), st.integers(0, 50))
def test_extents_that_were_compared_are_settled_by_a_checkpoint(extents: set[int], until: int) -> None:
    dirty = _dirty(set(), extents)
    brought = Brought(dirty)
    brought.begin(FILE)
    brought.sent(FILE, until * EXTENT, compared=True)
    brought.begin_checkpoint()
    brought.end_checkpoint()
    brought.give_back()
    assert set(dirty.all().file(FILE).extents) == {extent for extent in extents if extent >= until}


def test_a_tail_moves_with_what_was_compared() -> None:
    dirty = _dirty(set())
    dirty.now.file(FILE).tail = 2
    brought = Brought(dirty)
    brought.begin(FILE)
    brought.sent(FILE, 7 * EXTENT, compared=True)
    brought.begin_checkpoint()
    brought.end_checkpoint()
    brought.give_back()
    assert dirty.all().file(FILE).tail == 7


def test_what_is_taken_up_after_the_end_stays_marked() -> None:
    dirty = _dirty({1, 2})
    brought = Brought(dirty)
    brought.give_back()
    brought.begin(FILE)
    brought.sent(FILE, 2 * BLOCK, compared=False)
    brought.end(FILE)
    assert _blocks(dirty) == {1, 2}


def test_what_was_under_way_at_the_end_may_still_be_reported() -> None:
    dirty = _dirty({1, 2})
    brought = Brought(dirty)
    brought.begin(FILE)
    brought.give_back()
    brought.sent(FILE, 3 * BLOCK, compared=False)
    brought.end(FILE)
    assert _blocks(dirty) == {1, 2}


def test_a_checkpoint_for_nothing_is_not_made() -> None:
    brought = Brought(_dirty({1}))
    assert not brought.begin_checkpoint()
    brought.begin(FILE)
    assert not brought.begin_checkpoint()
    brought.end(FILE)
    assert brought.begin_checkpoint()
