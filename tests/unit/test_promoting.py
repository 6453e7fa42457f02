"""What an operator's word may do, and what it may not without `--force`: told as stories."""

from dataclasses import replace

import pytest

from mirrorfs.core.epochs import Allowed, AskFirst, Forbidden, Standing
from tests.unit.stories import Node, mirrored


def test_the_first_promotion_of_a_volume_needs_the_other_node_or_a_word() -> None:
    assert isinstance(Node("one").may_promote(peer=None), Allowed)
    assert isinstance(Node("one").may_promote(met=Node("two")), Allowed)
    assert isinstance(Node("one").may_promote(), AskFirst)


def test_a_node_that_was_in_sync_when_the_link_broke_asks_and_says_since_when() -> None:
    one, two = mirrored()
    found = two.may_promote(peer="one")
    assert isinstance(found, AskFirst)
    assert "since noon" in found.reason
    assert isinstance(two.may_promote(met=one), Allowed)


def test_a_standby_is_refused_while_the_other_tells_it_of_an_epoch_that_it_had_alone() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    one.restarts()
    one.record = replace(one.record, standing=Standing.OUTDATED, reason="an fsync failed")
    found = two.may_promote(met=one)
    assert isinstance(found, Forbidden)
    assert "one knows of epoch 3" in found.reason


def test_a_new_node_is_refused_while_the_other_tells_it_of_a_history() -> None:
    one, _ = mirrored()
    one.restarts()
    found = Node("two", empty=True).may_promote(met=one)
    assert isinstance(found, Forbidden)
    assert "one knows of epoch 2" in found.reason


def test_a_node_that_went_on_alone_is_allowed_while_the_other_knows_only_less() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    one.restarts()
    assert isinstance(one.may_promote(met=two), Allowed)


def test_a_node_that_was_alone_asks() -> None:
    one, _ = mirrored()
    one.begins(one)
    found = one.may_promote()
    assert isinstance(found, AskFirst)
    assert "alone in epoch 3" in found.reason


@pytest.mark.parametrize("standing", [Standing.RESYNCING, Standing.OUTDATED])
def test_a_node_that_knows_itself_behind_is_refused_with_the_reason(standing: Standing) -> None:
    _, two = mirrored()
    two.record = replace(two.record, standing=standing, reason="the disk was full")
    found = two.may_promote(peer="one")
    assert isinstance(found, Forbidden)
    assert standing.value in found.reason
    assert "the disk was full" in found.reason


def test_a_node_that_the_newest_epoch_leaves_out_is_refused() -> None:
    one, two = mirrored()
    one.begins(one)
    two.adopts(one)
    found = two.may_promote(peer="one")
    assert isinstance(found, Forbidden)
    assert "behind" in found.reason


def test_a_node_whose_machine_was_restarted_while_in_sync_is_refused_and_says_which_writes_may_be_missing() -> None:
    _, two = mirrored()
    two.restarts(machine=True)
    found = two.may_promote(peer="one")
    assert isinstance(found, Forbidden)
    assert "fsynced" in found.reason


def test_a_node_that_was_alone_before_its_machine_restarted_is_only_asked() -> None:
    one, _ = mirrored()
    one.begins(one)
    one.restarts(machine=True)
    assert isinstance(one.may_promote(), AskFirst)
