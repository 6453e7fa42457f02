"""Who waits for a change of mode hears of it, whenever it comes."""

import math

import pytest
import trio

from mirrorfs.changes import Changes
from mirrorfs.config import ReplicationConfig
from mirrorfs.core.modes import Mode
from mirrorfs.errors import FrozenError
from mirrorfs.strand import Strands


def _changes(mode: Mode) -> Changes:
    """Only what waiting needs."""
    changes = object.__new__(Changes)
    changes.loss = "a test"
    changes.waits_for_grant = False
    changes._settings = ReplicationConfig()
    changes._frozen_at = math.inf
    changes._changed = trio.Event()
    changes.enter(mode)
    return changes


async def test_a_change_of_mode_between_the_look_and_the_task_that_waits_is_not_missed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    changes, strands, ended = _changes(Mode.LOST), Strands(lambda: None), trio.Event()
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            strands.nursery = nursery
            strands.start(changes._wait_for_change(), lambda result, error: ended.set())
            changes.enter(Mode.ALONE)  # its task has not run yet
            await ended.wait()


async def test_who_waits_in_a_freeze_is_told_when_it_lasts_too_long(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(FrozenError):
        await _changes(Mode.FROZEN)._wait_for_change()
