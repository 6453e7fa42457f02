"""What an arbiter's record means to a node."""

from dataclasses import replace

import pytest

from mirrorfs.core import claims, packing
from mirrorfs.core.claims import AskPeer, Found, Lost, NoArbiter, Swap
from mirrorfs.core.epochs import Epoch, Member, Record, Seen

VOLUME = "ab" * 16
ONE, TWO = Member("one", "boot 1"), Member("two", "boot 2")


def epoch(number: int, primary: str, *members: Member, tag: str = "") -> Epoch:
    return Epoch(number, tag or f"tag {number} of {primary}", primary, frozenset(members), False, 1.0)


FIRST = epoch(1, "one", ONE)
BOTH = epoch(2, "one", ONE, TWO)
RECORD = Record(volume_id=VOLUME, epochs=(FIRST, BOTH), arbiter=Seen("c", 100, 90))


def found(what: Epoch | None, *, cluster: str = "c", revision: int = 100, key: int = 90, volume: str = VOLUME) -> Found:
    return Found(Seen(cluster, revision, key if what else 0), volume if what else "", what)


def test_who_finds_what_it_knows_may_swap_it_for_the_next() -> None:
    assert claims.to_go_on(RECORD, found(BOTH)) == Swap(90, 3)


def test_growth_that_the_arbiter_was_not_told_does_not_stand_against_it() -> None:
    """Who wants to go on has to swap the record of before, and so has the other one: one of them wins."""
    assert claims.to_go_on(RECORD, found(FIRST)) == Swap(90, 3)


def test_the_epoch_of_the_other_node_is_a_race_that_is_lost() -> None:
    theirs = epoch(3, "two", TWO)
    assert claims.to_go_on(RECORD, found(theirs, revision=120, key=120)) == Lost("two was granted epoch 3 by the arbiter")


def test_an_own_claim_that_was_never_answered_is_known() -> None:
    record = replace(RECORD, claims=("mine",))
    assert claims.to_go_on(record, found(epoch(3, "one", ONE, tag="mine"), revision=130, key=130)) == Swap(130, 4)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (found(None), "no record"),
        (found(BOTH, cluster="other"), "another cluster"),
        (found(BOTH, revision=99), "restored from a backup"),
        (found(BOTH, revision=200, key=89), "restored from a backup"),
        (found(BOTH, volume="cd" * 16), "another volume"),
    ],
)
def test_what_is_not_the_arbiter_of_before_decides_nothing(what: Found, why: str) -> None:
    decision = claims.to_go_on(RECORD, what)
    assert isinstance(decision, NoArbiter)
    assert why in decision.reason


def test_an_operator_may_go_on_against_whatever_stands_there() -> None:
    theirs = epoch(7, "two", TWO)
    assert claims.to_go_on(RECORD, found(theirs, cluster="other"), force=True) == Swap(90, 8)
    assert claims.to_go_on(RECORD, found(None), force=True) == Swap(0, 3)


def test_a_primary_publishes_what_is_not_there_yet() -> None:
    assert claims.to_publish(RECORD, found(BOTH), mirrored=True) is None
    assert claims.to_publish(RECORD, found(FIRST), mirrored=True) == Swap(90, 2)
    assert claims.to_publish(RECORD, found(FIRST), mirrored=False) == Swap(90, 2)


@pytest.mark.parametrize("what", [found(None), found(BOTH, cluster="other"), found(FIRST, revision=1)])
def test_to_an_arbiter_that_is_new_or_set_back_a_mirrored_primary_writes_if_its_peer_was_granted_nothing(what: Found) -> None:
    """By the one before, that is, of which nothing is known here any more."""
    assert claims.to_publish(RECORD, what, mirrored=True) == AskPeer(what.seen.key_revision)
    assert claims.to_publish(RECORD, what, mirrored=False) == Swap(what.seen.key_revision, 2), "it was granted its epoch"


def test_only_with_its_peer_in_sync_a_primary_overwrites_what_it_does_not_know() -> None:
    theirs = found(epoch(3, "two", TWO))
    assert claims.to_publish(RECORD, theirs, mirrored=True) == AskPeer(90), "the peer may have been granted it just now"
    assert claims.to_publish(RECORD, theirs, mirrored=False) == Lost("two was granted epoch 3 by the arbiter")
    assert isinstance(claims.to_publish(RECORD, found(BOTH, volume="cd" * 16), mirrored=False), Lost)


def test_a_record_survives_the_way_to_the_arbiter_and_back() -> None:
    assert claims.unpack(claims.pack(VOLUME, BOTH)) == (VOLUME, BOTH)
    for value in (b"", b"no", b"{}", b'{"volume_id": "x", "epoch": [1]}', b"[]"):
        with pytest.raises(ValueError, match="not a record"):
            claims.unpack(value)


def test_what_is_known_of_the_arbiter_is_kept_with_the_record() -> None:
    record = replace(RECORD, claims=("a", "b"))
    assert packing.unpack_record(packing.pack_record(record)) == record
