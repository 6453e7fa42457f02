"""Faults of a lab: met before a disk call, after it or in the middle of it, and only by a node that was started for it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mirrorfs.errors import MirrorfsError
from mirrorfs.journal import Journal
from mirrorfs.lab.faults import Fault, Faults, Kind
from mirrorfs.lab.pair import Lab, wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Two hosts on which nothing runs."""
    with Lab.create(tmp_path / "lab") as made:
        yield made


def _met(lab: Lab, fault: Fault) -> None:
    """The first epoch of a new node meets the fault, and the node has ended."""
    faults = Faults(lab.one.home / "faults")
    faults.enable()
    lab.one.start()
    faults.arm(fault)
    with pytest.raises(MirrorfsError, match="is armed already"):
        faults.arm(fault)
    with suppress(MirrorfsError):
        lab.one.promote(yes=True)
    wait_for(lambda: not lab.one.pids(), "node one has ended")
    assert faults.fired == fault
    assert fault.label in faults.passed()


@pytest.mark.parametrize(("kind", "there"), [(Kind.KILL_BEFORE, False), (Kind.KILL_AFTER, True), (Kind.EIO, False)])
def test_the_call_was_made_if_the_node_was_killed_after_it_and_not_otherwise(lab: Lab, kind: Kind, there: bool) -> None:
    _met(lab, Fault("record:rename", kind))
    assert (Journal(lab.one.state_dir).read() is not None) == there


def test_half_of_a_torn_write_has_reached_the_file(lab: Lab) -> None:
    _met(lab, Fault("record:write", Kind.TORN_WRITE))
    torn = (lab.one.state_dir / "record.new").read_bytes()
    lab.one.start()
    lab.one.promote(yes=True)
    whole = (lab.one.state_dir / "record").read_bytes()
    assert whole[:8] == torn[:8]
    assert 8 < len(torn) < len(whole)


def test_a_node_that_was_started_before_it_could_be_given_faults_meets_none(lab: Lab) -> None:
    lab.one.start()
    faults = Faults(lab.one.home / "faults")
    faults.enable()
    faults.arm(Fault("record:write", Kind.KILL_BEFORE))
    lab.one.promote(yes=True)
    assert faults.fired is None
    assert faults.passed() == []
    faults.disarm()
