"""The verdicts of two nodes that meet: told as stories, and checked for what holds in all of them."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core import epochs, packing
from mirrorfs.core.epochs import Forbidden, Refuse, Resume, SplitBrain, Standing, meet
from tests.unit.stories import VOLUME, Node, assert_resumes, assert_split, assert_waits, mirrored, verdict

# ---- the beginning


def test_two_new_nodes_wait_for_a_person() -> None:
    assert "mirrorfs promote" in assert_waits(Node("one", empty=True), Node("two", empty=True))


def test_an_empty_node_follows_the_one_that_was_promoted() -> None:
    one = Node("one", serving=True)
    one.begins(one, wrote=True)
    assert_resumes(one, Node("two", empty=True), "one")


def test_a_node_with_files_and_no_history_follows_only_if_it_was_told_to_discard_them() -> None:
    one, two = Node("one", serving=True), Node("two")
    one.begins(one, wrote=True)
    found = verdict(one, two)
    assert isinstance(found, Refuse)
    assert "--discard-local-data" in found.reason
    two.discard = True
    assert_resumes(one, two, "one")


def test_an_empty_node_waits_with_a_standby_that_nobody_promoted() -> None:
    _, two = mirrored()
    assert "`mirrorfs promote` on two" in assert_waits(Node("one", empty=True), two)


def test_an_empty_node_follows_the_last_primary_that_lost_nothing_since() -> None:
    one, _ = mirrored()
    one.restarts()
    assert_resumes(one, Node("two", empty=True), "one")


def test_an_empty_node_in_the_place_of_a_standby_waits_with_a_primary_whose_machine_was_restarted() -> None:
    one, _ = mirrored()
    one.restarts(machine=True)
    assert "one may not have everything" in assert_waits(one, Node("two", empty=True))


def test_an_empty_node_follows_a_primary_that_was_alone_before_its_machine_was_restarted() -> None:
    one, _ = mirrored()
    one.begins(one, wrote=True)
    one.restarts(machine=True)
    assert_resumes(one, Node("two", empty=True), "one")


@pytest.mark.parametrize("standing", [Standing.RESYNCING, Standing.OUTDATED])
def test_an_empty_node_waits_with_a_primary_that_knows_itself_behind(standing: Standing) -> None:
    one, _ = mirrored()
    one.restarts()
    one.record = replace(one.record, standing=standing)
    assert_waits(one, Node("two", empty=True))


# ---- who does not belong together


def test_nodes_of_different_volumes_refuse_each_other() -> None:
    one, two = mirrored()
    assert isinstance(meet(one.hello(), replace(two.hello(), volume="orders")), Refuse)


def test_two_volumes_of_the_same_name_refuse_each_other() -> None:
    one, two = mirrored()
    two.record = replace(two.record, volume_id=VOLUME[::-1])
    found = verdict(one, two)
    assert isinstance(found, Refuse)
    assert "different volumes" in found.reason


def test_two_nodes_of_the_same_name_refuse_each_other() -> None:
    one, _ = mirrored()
    assert isinstance(verdict(one, replace(one)), Refuse)


# ---- a link that breaks and comes back


def test_a_link_that_broke_for_a_moment_goes_on_with_the_primary() -> None:
    one, two = mirrored()
    assert_resumes(one, two, "one")


def test_a_standby_that_was_away_follows_the_primary_that_went_on_alone() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    assert_resumes(one, two, "one")


def test_a_standby_that_was_promoted_is_followed_by_the_old_primary_that_comes_back() -> None:
    one, two = mirrored()
    one.restarts()
    two.begins(two, wrote=True)
    two.serving = True
    assert_resumes(one, two, "two")


def test_an_old_primary_that_only_froze_follows_the_standby_that_was_promoted() -> None:
    one, two = mirrored()
    two.begins(two)
    two.serving = True
    assert one.serving
    assert_resumes(one, two, "two")


def test_an_old_primary_that_acknowledged_nothing_alone_follows_although_it_had_gone_on() -> None:
    one, two = mirrored()
    one.begins(one)
    two.begins(two, wrote=True)
    two.serving = True
    assert_resumes(one, two, "two")


def test_the_one_that_acknowledged_something_is_followed_whoever_it_is() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.begins(two)
    two.serving = True
    assert_resumes(one, two, "one")


# ---- restarts


def test_after_both_nodes_were_restarted_the_last_primary_serves() -> None:
    one, two = mirrored()
    one.restarts()
    assert_resumes(one, two, "one")


@pytest.mark.parametrize("primary", ["one", "two"])
def test_after_a_power_failure_of_both_the_last_primary_serves(primary: str) -> None:
    one, two = mirrored()
    if primary == "two":
        one.begins(one, two, primary=two)
        two.adopts(one)
    one.restarts(machine=True)
    two.restarts(machine=True)
    assert_resumes(one, two, primary)


def test_a_growth_that_only_a_primary_recorded_before_its_machine_was_restarted_leaves_both_waiting() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.adopts(one, Standing.RESYNCING)
    one.begins(one, two)
    one.restarts(machine=True)
    assert "--force" in assert_waits(one, two)


def test_a_growth_that_only_the_primary_recorded_does_not_keep_it_from_serving_while_its_machine_stays_up() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.adopts(one, Standing.RESYNCING)
    one.begins(one, two)
    one.restarts()
    assert_resumes(one, two, "one")


@pytest.mark.parametrize("standing", [Standing.RESYNCING, Standing.OUTDATED])
def test_a_node_whose_machine_was_restarted_does_not_serve_while_the_other_is_not_whole(standing: Standing) -> None:
    one, two = mirrored()
    one.restarts(machine=True)
    two.record = replace(two.record, standing=standing)
    assert "--force" in assert_waits(one, two)


def test_a_node_whose_machine_did_not_restart_is_better_than_one_whose_did() -> None:
    one, two = mirrored()
    one.restarts(machine=True)
    assert_resumes(one, two, "two")


def test_a_node_that_is_behind_does_not_serve_when_both_come_back() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    one.restarts(machine=True)
    assert_resumes(one, two, "one")


def test_a_node_that_was_being_resynced_does_not_serve_when_both_come_back() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.adopts(one, Standing.RESYNCING)
    one.restarts()
    assert_resumes(one, two, "one")


def test_an_outdated_primary_gives_way_to_its_standby() -> None:
    one, two = mirrored()
    one.restarts()
    one.record = replace(one.record, standing=Standing.OUTDATED)
    assert_resumes(one, two, "two")


def test_two_incomplete_trees_wait_for_a_person() -> None:
    one, two = mirrored()
    one.restarts()
    one.record = replace(one.record, standing=Standing.OUTDATED)
    two.record = replace(two.record, standing=Standing.RESYNCING)
    assert "--force" in assert_waits(one, two)


# ---- handing over


def test_a_handover_that_never_arrived_is_dropped_and_either_may_go_on() -> None:
    one, two = mirrored()
    one.begins(one, two, primary=two)
    one.restarts()
    assert_resumes(one, two, "two")


def test_a_handover_that_never_arrived_and_a_promotion_are_no_split_brain() -> None:
    one, two = mirrored()
    one.begins(one, two, primary=two)
    one.restarts()
    two.begins(two, wrote=True)
    two.serving = True
    assert_resumes(one, two, "two")


# ---- split brains


def test_two_nodes_that_both_acknowledged_changes_alone_are_a_split_brain_and_the_old_primary_stops() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.begins(two, wrote=True)
    two.serving = True
    assert_split(one, two, stops="one")


def test_a_split_brain_stays_one_after_both_were_restarted() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.begins(two, wrote=True)
    one.restarts(machine=True)
    two.restarts(machine=True)
    assert_split(one, two, stops="one")


def test_a_forced_promotion_that_may_have_skipped_changes_is_a_split_brain() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    one.restarts()
    two.begins(two, forced=True, wrote=True)
    two.serving = True
    assert_split(one, two, stops="one")


def test_a_forced_promotion_is_a_split_brain_for_a_node_that_was_in_sync_before() -> None:
    one, two = mirrored()
    one.restarts()
    two.begins(two, forced=True)
    two.serving = True
    assert_split(one, two, stops="one")


def test_a_forced_promotion_of_a_node_that_was_being_copied_to_is_a_split_brain() -> None:
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.adopts(one, Standing.RESYNCING)
    one.restarts()
    two.begins(two, forced=True, wrote=True)
    two.serving = True
    assert_split(one, two, stops="one")


def test_two_that_both_serve_in_one_epoch_are_a_split_brain_and_the_wrong_one_stops() -> None:
    one, two = mirrored()
    two.serving = True
    assert_split(one, two, stops="two")


def test_a_node_that_acknowledged_something_in_an_epoch_of_the_other_is_a_split_brain_and_stops() -> None:
    one, two = mirrored()
    two.writes_alone()
    assert_split(one, two, stops="two")


# ---- what holds for all


_STANDINGS = st.sampled_from(Standing)


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[Node, Node]:
    """Two nodes after any series of what may happen to them, sensible or not."""
    one, two = Node("one"), Node("two")
    for node in draw(st.lists(st.sampled_from([one, two]), max_size=7)):
        other = two if node is one else one
        match draw(st.sampled_from(["begin", "alone", "both", "force", "adopt", "stand", "restart", "reboot"])):
            case "begin" | "alone" as what:
                node.begins(node, wrote=what == "alone")
            case "both":
                node.begins(node, other)
                other.adopts(node)
            case "force":
                node.begins(node, forced=True, wrote=draw(st.booleans()))
            case "adopt" if other.record.epochs:
                node.adopts(other, draw(_STANDINGS))
            case "stand":
                node.record = replace(node.record, standing=draw(_STANDINGS))
            case "restart":
                node.restarts()
            case "reboot":
                node.restarts(machine=True)
            case _:
                pass
    for node in (one, two):
        node.serving = bool(node.record.epochs) and draw(st.booleans())
        node.empty, node.discard = draw(st.booleans()), draw(st.booleans())
    return one, two


@given(_pairs())
def test_both_nodes_come_to_the_same_verdict(pair: tuple[Node, Node]) -> None:
    one, two = pair
    assert meet(one.hello(), two.hello()) == meet(two.hello(), one.hello())


@given(_pairs())
def test_two_nodes_that_both_acknowledged_what_the_other_does_not_know_are_never_put_together(pair: tuple[Node, Node]) -> None:
    one, two = pair
    known = [{epoch.tag for epoch in node.record.epochs} for node in pair]
    alone = [one.record.wrote - known[1], two.record.wrote - known[0]]
    if all(alone) and one.record.volume_id == two.record.volume_id:
        assert isinstance(meet(one.hello(), two.hello()), SplitBrain)


@given(_pairs())
def test_whoever_serves_after_the_verdict_has_a_complete_tree_or_served_before(pair: tuple[Node, Node]) -> None:
    found = meet(*(node.hello() for node in pair))
    if isinstance(found, Resume):
        (primary,) = (node for node in pair if node.name == found.primary)
        assert primary.serving or primary.record.standing is Standing.IN_SYNC
        assert primary.record.epochs


@given(_pairs())
def test_a_node_that_lost_its_memory_does_not_serve_in_the_newest_epoch_unless_its_whole_set_is_there(
    pair: tuple[Node, Node],
) -> None:
    found = meet(*(node.hello() for node in pair))
    if not isinstance(found, Resume):
        return
    primary, _ = sorted(pair, key=lambda node: node.name != found.primary)
    epoch = primary.record.epoch
    assert epoch is not None
    if not primary.serving and primary.member() not in epoch.in_sync:
        whole = {node.name for node in pair if node.record.epochs and node.record.standing is Standing.IN_SYNC}
        assert {member.node for member in epoch.in_sync} <= whole


@given(_pairs())
def test_no_node_is_promoted_past_an_epoch_that_the_other_tells_it_of(pair: tuple[Node, Node]) -> None:
    one, two = pair
    if any(not one.record.knows(epoch) for epoch in two.record.epochs):
        assert isinstance(one.may_promote(met=two), Forbidden)


@given(_pairs())
def test_a_record_and_a_greeting_come_back_from_msgpack_as_they_were(pair: tuple[Node, Node]) -> None:
    for node in pair:
        assert packing.unpack_record(msgpack.unpackb(msgpack.packb(packing.pack_record(node.record)))) == node.record
        assert packing.unpack_hello(msgpack.unpackb(msgpack.packb(packing.pack_hello(node.hello())))) == node.hello()


@pytest.mark.parametrize("volume_id", ["v", VOLUME[1:], VOLUME + "00", "g" * 32, " " * 32, VOLUME[:-2] + "é9", 7, None, b""])
def test_a_record_of_a_volume_whose_id_is_not_32_hexadecimal_digits_is_refused(volume_id: object) -> None:
    packed = packing.pack_record(mirrored()[0].record)
    with pytest.raises(ValueError):
        packing.unpack_record(packed | {"volume_id": volume_id})
    assert packing.unpack_record(packed | {"volume_id": ""}).volume_id == ""


def test_a_history_is_bounded_and_forgets_its_oldest_epochs_and_what_was_written_in_them() -> None:
    one = Node("one")
    for _ in range(epochs.HISTORY + 10):
        one.begins(one, wrote=True)
    assert len(one.record.epochs) == len(one.record.wrote) == epochs.HISTORY
    assert one.record.epoch is not None
    assert one.record.epoch.number == epochs.HISTORY + 10


def test_of_a_fork_in_which_nothing_was_acknowledged_goes_on_who_has_not_lost_its_memory() -> None:
    one, two = Node("one"), Node("two")
    two.begins(one, two)
    one.adopts(two)
    two.begins(two)
    two.begins(two)
    one.begins(one)
    two.boot = "another"
    found = meet(one.hello(), two.hello())
    assert isinstance(found, Resume)
    assert found.primary == "one"


# ---- a history that was given up


def _split() -> tuple[Node, Node]:
    """Both went on alone and acknowledged changes, two by force; two serves."""
    one, two = mirrored()
    one.begins(one, wrote=True)
    two.begins(two, wrote=True, forced=True)
    one.serving, two.serving = False, True
    assert isinstance(verdict(one, two), SplitBrain)
    return one, two


def test_who_gives_its_history_up_follows_the_other_whatever_stood_between_them() -> None:
    one, two = _split()
    one.record = one.record.yielding("two", "given up")
    assert_resumes(one, two, "two")
    two.serving = False
    assert_resumes(one, two, "two")
    two.restarts(machine=True)
    assert_resumes(one, two, "two")


def test_a_node_that_served_gives_way_to_the_one_that_stopped() -> None:
    one, two = _split()
    two.serving, two.record = False, two.record.yielding("one", "given up")
    assert_resumes(one, two, "one")


def test_a_node_never_follows_one_with_no_history_or_no_whole_tree_though_it_gave_up_its_own() -> None:
    one, two = _split()
    one.record = one.record.yielding("two", "given up")
    two.serving = False
    two.record = replace(two.record, standing=Standing.RESYNCING)
    assert "promote --force" in assert_waits(one, two)
    assert_waits(one, Node("two", empty=True))


def test_two_that_gave_up_for_each_other_wait_for_a_person() -> None:
    one, two = _split()
    two.serving = False
    one.record, two.record = one.record.yielding("two", "given up"), two.record.yielding("one", "given up")
    assert "both given their history up" in assert_waits(one, two)


def test_a_node_that_gave_its_history_up_is_promoted_by_force_only() -> None:
    one, _ = _split()
    one.record = one.record.yielding("two", "given up")
    assert isinstance(one.may_promote(), Forbidden)


def test_the_sides_of_a_split_brain_are_the_epochs_since_the_last_common_one() -> None:
    one, two = _split()
    assert [epoch.primary for epoch in epochs.since_fork(one.hello(), two.hello())] == ["one"]
    assert [epoch.forced for epoch in epochs.since_fork(two.hello(), one.hello())] == [True]


def test_a_record_from_before_histories_could_be_given_up_is_still_read() -> None:
    one, _ = _split()
    packed = packing.pack_record(one.record)
    del packed["yields_to"]
    assert packing.unpack_record(packed) == one.record
    given_up = one.record.yielding("two", "given up")
    assert packing.unpack_record(packing.pack_record(given_up)) == given_up


# ---- who was set back


def test_a_node_with_fewer_marks_than_the_other_knows_of_was_set_back() -> None:
    one, two = (node.hello() for node in mirrored())
    assert epochs.who_forgot(replace(one, marked=7), replace(two, peer_marked=7)) == ""
    for left, right in (
        (replace(one, marked=6), replace(two, peer_marked=7)),
        (replace(two, peer_marked=7), replace(one, marked=6)),
    ):
        assert epochs.who_forgot(left, right) == "one"
    assert epochs.who_forgot(replace(one, peer_marked=1), two) == "two"


def test_a_count_of_marks_makes_no_other_node_of_one() -> None:
    one, _ = (node.hello() for node in mirrored())
    assert replace(one, marked=7, peer_marked=3) == one
    packed = packing.unpack_hello(packing.pack_hello(replace(one, marked=7, peer_marked=3)))
    assert (packed.marked, packed.peer_marked) == (7, 3)
