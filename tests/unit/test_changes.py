"""Who waits for a change of mode hears of it, whenever it comes."""

import math
import os
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from mirrorfs.changes import Changes
from mirrorfs.config import ReplicationConfig
from mirrorfs.core import operations as ops
from mirrorfs.core.modes import Mode
from mirrorfs.errors import FrozenError
from mirrorfs.fuse_ops import FuseOperations
from mirrorfs.handles import Handle
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


async def _ends_when_interrupted(waiting: Coroutine[Any, Any, None]) -> bool:
    """Whether it ends with EINTR when it is interrupted; the end of the freeze ends it otherwise."""
    strands, ended, errors = Strands(lambda: None), trio.Event(), list[BaseException | None]()

    def done(result: object, error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    async with trio.open_nursery() as strands.nursery:
        strands.start(waiting, done, 1)
        await trio.testing.wait_all_tasks_blocked()
        strand = strands.find(1)
        assert strand is not None
        strand.interrupt()
        await ended.wait()
    assert isinstance(errors[0], InterruptedError | FrozenError)
    return isinstance(errors[0], InterruptedError)


@pytest.mark.parametrize(
    ("waiting", "is_given_up"),
    [
        (Changes._admitted, True),
        (partial(Changes._acknowledged, sequence=1), False),
        (partial(Changes._acknowledged, sequence=1, may_give_up=True), True),
    ],
    ids=["a change that is not made yet", "a change that is made", "a sync"],
)
async def test_what_is_made_is_not_given_up_in_a_freeze(
    autojump_clock: trio.testing.MockClock, waiting: Callable[[Changes], Coroutine[Any, Any, None]], is_given_up: bool
) -> None:
    changes = _changes(Mode.FROZEN)
    changes.stream, changes.copier = None, None
    assert await _ends_when_interrupted(waiting(changes)) is is_given_up


class _Half:
    """A primary whose changes succeed at once, and whose syncs have to be waited for."""

    async def write(self, known: Any, offset: int, data: bytes) -> int:
        return len(data)

    async def change(self, change: Any, known: Any) -> int:
        return change.size if isinstance(change, ops.CopyRange) else 0

    async def sync(self, known: Any, data_only: bool) -> None:
        await _changes(Mode.FROZEN)._wait_for_change(may_give_up=True)


@pytest.mark.parametrize("asked", ["write", "write once", "fallocate", "copy", "fsync"])
async def test_a_sync_that_follows_a_change_in_one_request_is_not_given_up(
    autojump_clock: trio.testing.MockClock, asked: str
) -> None:
    file_system: Any = object.__new__(FuseOperations)
    file_system._host = SimpleNamespace(primary=_Half(), reign=1)
    known: Any = SimpleNamespace(id=1, special=False)
    flags = os.O_RDWR | (0 if asked == "write once" else os.O_SYNC)
    file_system._files = {1: Handle(known, flags, 1, 0)}
    write = file_system.write.__wrapped__
    calls: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "write": lambda: write(file_system, 1, 0, b"data"),
        "write once": lambda: write(file_system, 1, 0, b"data", os.O_DSYNC),
        "fallocate": lambda: file_system.fallocate(1, 0, 0, 1),
        "copy": lambda: file_system.copy_file_range(1, 0, 1, 0, 1),
        "fsync": lambda: file_system.fsync.__wrapped__(file_system, 1, False),
    }
    assert await _ends_when_interrupted(calls[asked]()) is (asked == "fsync")
