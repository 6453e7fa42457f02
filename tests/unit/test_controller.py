"""The controller's table: what is done in which situation, and that it comes to rest."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mirrorfs.core.controller import RULES, Budget, Do, Mount, Posture, Services, View, next_rule
from tests.unit import controller_table

P = Posture
PRIMARY = View(mount=Mount.LEADS, services=Services.UP, peer_mount=Mount.FOLLOWS)
FAILED = replace(PRIMARY, services=Services.FAILED)
STANDBY = View(mount=Mount.FOLLOWS, peer_mount=Mount.LEADS, peer_posture=P.SERVING)
#: The standby of a primary whose controller is not heard.
ORPHANED = replace(STANDBY, silent_s=15.0, in_posture_s=15.0)
#: The standby after its primary has gone with everything.
LEFT = replace(STANDBY, mount=Mount.WAITING, unlinked_s=3.0, silent_s=3.0)

views = st.builds(
    View,
    mount=st.sampled_from(Mount),
    services=st.sampled_from(Services),
    unlinked_s=st.sampled_from((0.0, 1.0, 10.0)),
    frozen_s=st.sampled_from((0.0, 0.5, 2.0)),
    silent_s=st.sampled_from((0.0, 10.0, 60.0)),
    peer_mount=st.sampled_from(Mount),
    peer_posture=st.sampled_from(Posture),
    told_to_take=st.booleans(),
    told_to_give=st.booleans(),
    peer_refuses=st.booleans(),
    released=st.booleans(),
    maintenance=st.booleans(),
    may_fail_over=st.booleans(),
    prefers=st.booleans(),
    unwell=st.booleans(),
    refused=st.booleans(),
    in_posture_s=st.sampled_from((0.0, 2.0, 200.0)),
)


def taken(posture: Posture, view: View) -> str:
    rule = next_rule(posture, view)
    return "" if rule is None else f"{rule.name} -> {rule.then}"


@pytest.mark.parametrize(
    ("posture", "view", "expected"),
    [
        (P.IDLE, STANDBY, ""),
        (P.SERVING, PRIMARY, ""),
        (P.IDLE, LEFT, "the other node is lost -> taking"),
        (P.IDLE, replace(LEFT, silent_s=2.9), ""),
        (P.IDLE, replace(LEFT, unlinked_s=0.0, silent_s=5.0), ""),
        (P.IDLE, replace(LEFT, silent_s=0.0, peer_mount=Mount.STOPPED), "the other node is lost -> taking"),
        (P.IDLE, replace(LEFT, silent_s=0.0, peer_mount=Mount.HUNG, unlinked_s=0.1), "the other node is lost -> taking"),
        (P.IDLE, replace(LEFT, silent_s=0.0, peer_mount=Mount.LEADS), ""),
        (P.IDLE, replace(LEFT, silent_s=0.0, peer_mount=Mount.FROZEN), "the other node is lost -> taking"),
        (P.IDLE, replace(LEFT, silent_s=0.0, peer_mount=Mount.FROZEN, unlinked_s=1.0), ""),
        (P.IDLE, replace(LEFT, maintenance=True), ""),
        (P.IDLE, replace(LEFT, may_fail_over=False), "the other node or its controller is lost, once too often -> held"),
        (P.IDLE, replace(LEFT, refused=True, in_posture_s=0.5), ""),
        (P.IDLE, replace(LEFT, services=Services.UP), "services are here, and the mount does not serve -> stopping"),
        (
            P.IDLE,
            replace(LEFT, services=Services.UP, maintenance=True),
            "services are here, and the mount does not serve -> stopping",
        ),
        (P.IDLE, replace(STANDBY, services=Services.UP), "services are here, and the mount does not serve -> stopping"),
        (P.IDLE, replace(PRIMARY, maintenance=True, mount=Mount.FROZEN, frozen_s=0.9), ""),
        (P.IDLE, replace(LEFT, mount=Mount.BEHIND), ""),
        (P.IDLE, replace(STANDBY, silent_s=14.0, in_posture_s=60.0), ""),
        (P.IDLE, ORPHANED, "the controller of the primary is gone -> taking"),
        (P.IDLE, replace(ORPHANED, in_posture_s=14.0), ""),
        (P.IDLE, replace(ORPHANED, may_fail_over=False), "the other node or its controller is lost, once too often -> held"),
        (P.IDLE, replace(STANDBY, told_to_take=True), "a person wants it here -> asking"),
        (P.IDLE, replace(STANDBY, told_to_take=True, maintenance=True), "a person wants it here -> asking"),
        (P.IDLE, replace(STANDBY, prefers=True), "this node is preferred -> asking"),
        (P.IDLE, replace(STANDBY, prefers=True, peer_posture=P.STARTING), ""),
        (P.IDLE, replace(STANDBY, prefers=True, may_fail_over=False), ""),
        (P.IDLE, replace(PRIMARY, services=Services.DOWN), "the mount leads -> starting"),
        (P.SERVING, replace(PRIMARY, told_to_give=True), "a person wants it there -> yielding"),
        (P.SERVING, replace(PRIMARY, told_to_give=True, peer_mount=Mount.BEHIND), ""),
        (P.SERVING, replace(PRIMARY, mount=Mount.FROZEN, frozen_s=0.9), ""),
        (P.SERVING, replace(PRIMARY, mount=Mount.FROZEN, frozen_s=1.0), "the mount does not serve -> stopping"),
        (P.SERVING, replace(PRIMARY, mount=Mount.WAITING), "the mount does not serve -> stopping"),
        (P.SERVING, replace(PRIMARY, mount=Mount.STOPPED, maintenance=True), "the mount does not serve -> stopping"),
        (P.SERVING, replace(PRIMARY, unwell=True), "a service stays unwell -> yielding"),
        (P.SERVING, replace(PRIMARY, unwell=True, peer_mount=Mount.BEHIND), ""),
        (P.STARTING, FAILED, "one does not start, the other node can have it -> yielding"),
        (P.STARTING, replace(FAILED, peer_mount=Mount.BEHIND), ""),
        (P.STARTING, replace(FAILED, peer_mount=Mount.WAITING, unlinked_s=1.0), ""),
        (P.STARTING, replace(FAILED, peer_mount=Mount.LEADS), ""),
        (P.STARTING, replace(FAILED, unlinked_s=1.0), ""),
        (P.STARTING, replace(FAILED, peer_mount=Mount.BEHIND, in_posture_s=15.0), "one does not start -> held"),
        (P.STARTING, replace(FAILED, peer_mount=Mount.BEHIND, silent_s=3.0), "one does not start -> held"),
        (P.STARTING, replace(FAILED, peer_mount=Mount.STOPPED), "one does not start -> held"),
        (P.STARTING, replace(FAILED, peer_mount=Mount.BEHIND, maintenance=True), "one does not start -> held"),
        (P.STARTING, replace(FAILED, peer_mount=Mount.BEHIND, may_fail_over=False), "one does not start -> held"),
        (P.STARTING, replace(FAILED, peer_posture=P.HELD), "one does not start -> held"),
        (P.GIVING, replace(PRIMARY, refused=True), "it is refused, or came back at once -> starting"),
        (P.GIVING, PRIMARY, ""),
        (P.GIVING, replace(PRIMARY, answered_s=1.0), "it is refused, or came back at once -> starting"),
        (P.TAKING, replace(STANDBY, answered_s=0.9), ""),
        (P.TAKING, replace(STANDBY, answered_s=1.0), "it was given away at once -> idle"),
        (P.GIVING, replace(STANDBY, peer_posture=P.IDLE), ""),
        (P.GIVING, replace(STANDBY, peer_posture=P.STARTING), "it is given -> idle"),
        (P.GIVING, replace(STANDBY, peer_posture=P.HELD), "it is given -> idle"),
        (P.GIVING, replace(STANDBY, peer_posture=P.IDLE, in_posture_s=120.0), "nobody begins there -> idle"),
        (P.GIVING, replace(STANDBY, peer_posture=P.IDLE, silent_s=3.0), "nobody begins there -> idle"),
        (P.GIVING, replace(STANDBY, peer_posture=P.IDLE, silent_s=3.0, maintenance=True), ""),
        (P.GIVING, replace(LEFT, silent_s=0.0, peer_posture=P.IDLE), "nobody begins there -> idle"),
        (P.IDLE, replace(PRIMARY, services=Services.DOWN, maintenance=True), ""),
        (P.IDLE, replace(PRIMARY, maintenance=True, peer_posture=P.GIVING), "the mount leads -> starting"),
        (P.IDLE, replace(PRIMARY, maintenance=True, told_to_give=True), "a person wants it there -> yielding"),
        (P.HELD, PRIMARY, ""),
        (P.HELD, replace(PRIMARY, told_to_give=True), "a person wants it there -> yielding"),
        (P.HELD, replace(PRIMARY, told_to_give=True, mount=Mount.WAITING), ""),
        (P.HELD, replace(PRIMARY, told_to_give=True, peer_mount=Mount.BEHIND), ""),
    ],
)
def test_a_situation_has_one_answer(posture: Posture, view: View, expected: str) -> None:
    assert taken(posture, view) == expected


@given(posture=st.sampled_from(Posture), view=views)
def test_nothing_is_started_where_the_mount_does_not_lead(posture: Posture, view: View) -> None:
    rule = next_rule(posture, view)
    if rule is not None and Do.START in rule.do:
        assert view.mount is Mount.LEADS


@given(posture=st.sampled_from((P.STARTING, P.SERVING)), view=views)
def test_a_mount_that_does_not_serve_stops_the_application_whatever_else_there_is(posture: Posture, view: View) -> None:
    if view.must_stop:
        assert taken(posture, view) == "the mount does not serve -> stopping"


@given(posture=st.sampled_from(Posture), view=views)
def test_in_maintenance_no_role_is_asked_for_and_nothing_counted(posture: Posture, view: View) -> None:
    assume(view.peer_posture is not P.GIVING)  # by a person's word
    rule = next_rule(posture, replace(view, maintenance=True))
    if rule is not None and posture is P.IDLE:
        assert not {Do.PROMOTE, Do.TAKE_OVER, Do.START} & set(rule.do)


@given(view=views)
def test_who_is_connected_never_takes_the_role_of_a_primary_for_lost(view: View) -> None:
    rule = next_rule(P.IDLE, replace(view, unlinked_s=0.0))
    assert rule is None or Do.PROMOTE not in rule.do


def test_every_posture_can_be_left_and_reached() -> None:
    assert {rule.posture for rule in RULES} == set(Posture) == {rule.then for rule in RULES}
    assert len({(rule.posture, rule.name) for rule in RULES}) == len(RULES)


def test_the_page_is_made_from_the_table() -> None:
    assert controller_table.PAGE.read_text() == controller_table.page()


def test_a_budget_is_for_a_while_and_a_clock_that_jumps_back_spends_nothing() -> None:
    budget = Budget(2, 60.0)
    for moment in (100.0, 110.0):
        assert budget.left(moment) > 0
        budget = budget.spend(moment)
    assert budget.left(120.0) == 0
    assert budget.left(161.0) == 1
    assert budget.left(0.0) == 2
    assert budget.spend(500.0).spent == (500.0,)
