"""docs/HANDSHAKE.md says what the code does, and no case behind its rows breaks a promise."""

import itertools
from collections.abc import Iterator

import pytest

from mirrorfs.core.epochs import HISTORY, Allowed, Forbidden, Resume, SplitBrain, meet
from tests.unit import handshake_table
from tests.unit.situations import FAMILIES, IN_MEMORY, Family, Phrases, Player, promotions
from tests.unit.stories import Node, mirrored, verdict

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)


def test_the_page_is_what_the_code_says_now() -> None:
    expected = handshake_table.page()
    assert handshake_table.PAGE.read_text() == expected, "run: python -m tests.unit.handshake_table --write"


@each_family
def test_both_nodes_come_to_the_same_verdict_in_every_case(family: Family) -> None:
    for phrases, (a, b) in family.cases().items():
        assert meet(a.hello(), b.hello()) == meet(b.hello(), a.hello()), phrases


def _resumed(family: Family) -> Iterator[tuple[Phrases, Player, Player]]:
    """The cases in which somebody follows: the case, who serves and who follows."""
    for phrases, (a, b) in family.cases().items():
        found = meet(a.hello(), b.hello())
        if isinstance(found, Resume):
            yield (phrases, a, b) if found.primary == a.name else (phrases, b, a)


@each_family
def test_nobody_follows_who_acknowledged_changes_in_an_epoch_that_the_other_does_not_know(family: Family) -> None:
    for phrases, primary, follower in _resumed(family):
        unknown = {epoch.tag for epoch in follower.record.epochs if not primary.record.knows(epoch)}
        assert not follower.record.wrote & unknown, phrases


@each_family
def test_whoever_follows_has_no_acknowledged_change_that_the_primary_has_not(family: Family) -> None:
    for phrases, primary, follower in _resumed(family):
        missing = follower.holds - primary.holds
        if {member.node for member in primary.own_epoch.in_sync} == {primary.name}:
            missing -= {IN_MEMORY}  # who was alone loses what was not fsynced with its machine, as any file system does
        assert not missing, phrases


def test_a_primary_that_only_froze_is_not_followed_by_the_node_that_was_promoted_and_does_not_serve_now() -> None:
    one, two = mirrored()
    two.begins(two, wrote=True)
    two.restarts()
    found = verdict(one, two)
    assert not (isinstance(found, Resume) and found.primary == "one")


def test_no_case_is_promoted_without_force_past_an_epoch_that_the_other_tells_it_of() -> None:
    for phrases, question in promotions().items():
        theirs = question.met.record.epochs if question.met else ()
        if any(not question.a.record.knows(epoch) for epoch in theirs):
            assert isinstance(question.answer(), Forbidden), phrases


def test_no_case_is_promoted_without_a_word_while_the_other_node_cannot_be_reached() -> None:
    for phrases, question in promotions().items():
        if question.peer is not None and question.met is None:
            assert not isinstance(question.answer(), Allowed), phrases


def test_every_case_is_in_exactly_one_row_and_rows_are_as_wide_as_can_be() -> None:
    axes = [["x", "y"], ["1", "2", "3"], ["-", "+"]]
    outcomes = {case: ("odd" if case == ("x", "2", "+") else "even",) for case in itertools.product(*axes)}
    del outcomes["y", "3", "-"]  # cannot be
    assert handshake_table.rows(axes, outcomes) == [
        ("x; 1, or 3", ("even",)),
        ("x; 2; -", ("even",)),
        ("x; 2; +", ("odd",)),
        ("y", ("even",)),
    ]


def test_a_fork_that_is_older_than_what_one_of_the_nodes_remembers_is_still_a_split_brain() -> None:
    one, two = Node("one"), Node("two")
    one.begins(one, two)
    two.adopts(one)
    one.begins(one, wrote=True)
    for _ in range(HISTORY + 2):
        two.begins(two, wrote=True)
    assert isinstance(verdict(one, two), SplitBrain)
