"""A pause by hand: what it keeps apart, and what it does not."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core import packing
from mirrorfs.core.epochs import Forbidden, SplitBrain, Standing
from mirrorfs.core.pauses import Pause, may_serve, pause_between
from tests.unit.stories import Node, mirrored, verdict


def _between(one: Node, two: Node) -> Pause | None:
    """The pause that stands between two nodes, on both the same."""
    found = pause_between(verdict(one, two), one.hello(), two.hello())
    assert found == pause_between(verdict(two, one), two.hello(), one.hello())
    return found


def _paused(*, told: bool = True) -> tuple[Node, Node]:
    """One has paused; two was told of it and is outdated, or has only lost the link."""
    one, two = mirrored()
    one.begins(one, wrote=True)
    one.record = replace(one.record, paused_at=7.0)
    if told:
        two.adopts(one, Standing.OUTDATED)
        two.record = replace(two.record, paused_at=0.0)
    return one, two


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("serving", [True, False])
def test_the_standby_is_kept_off_whether_it_was_told_or_not(told: bool, serving: bool) -> None:
    one, two = _paused(told=told)
    one.serving = serving
    assert _between(one, two) == Pause("one", 7.0)


def test_a_new_node_is_kept_off_too() -> None:
    one, _ = _paused()
    assert _between(one, Node("two", empty=True)) == Pause("one", 7.0)


def test_without_a_pause_nothing_is_kept_apart() -> None:
    one, two = mirrored()
    assert _between(one, two) is None


def test_a_node_that_has_to_follow_pauses_nothing() -> None:
    one, two = mirrored()
    one.record = replace(one.record, paused_at=7.0)
    two.begins(two, wrote=True)
    two.serving, one.serving = True, False
    assert _between(one, two) is None


def test_a_split_brain_is_found_in_spite_of_a_pause() -> None:
    one, two = _paused(told=False)
    two.begins(two, wrote=True)
    two.serving = True
    assert isinstance(verdict(one, two), SplitBrain)
    assert _between(one, two) is None


def test_a_standby_that_was_told_of_the_pause_is_not_promoted_but_by_force() -> None:
    _, two = _paused()
    assert isinstance(two.may_promote(peer="one"), Forbidden)


def test_the_paused_node_serves_by_itself_only_if_the_other_cannot_be_promoted() -> None:
    _, two = _paused()
    assert may_serve(two.hello())
    assert not may_serve(replace(two.hello(), serving=True))
    _, two = _paused(told=False)
    assert not may_serve(two.hello()), "`promote --yes` on two would be enough"


def test_a_record_from_before_there_were_pauses_has_none() -> None:
    packed = packing.pack_record(mirrored()[0].record)
    del packed["paused_at"]
    assert packing.unpack_record(packed).paused_at == 0


@given(st.floats())
def test_a_moment_that_is_none_is_no_record(moment: float) -> None:
    packed = packing.pack_record(mirrored()[0].record) | {"paused_at": moment}
    if 0 <= moment < 1e11:
        assert packing.unpack_record(packed).paused_at == moment
    else:
        with pytest.raises(ValueError, match="no time"):
            packing.unpack_record(packed)
