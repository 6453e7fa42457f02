"""What a primary does by itself now and then: tell times, reserve ids, write marks that nobody waits for, make checkpoints."""

from typing import Final

import trio

from mirrorfs.core import operations as ops
from mirrorfs.core.modes import Mode
from mirrorfs.replication import Primary
from mirrorfs.resync.quick import CatchUp

_SETTLE_INTERVAL_S: Final = 0.1


async def keep_house(primary: Primary, checkpoint_interval_s: float) -> None:
    """Runs until it is cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_checkpoint_often, primary, checkpoint_interval_s)
        while True:
            await trio.sleep(_SETTLE_INTERVAL_S)
            if primary.mode in (Mode.MIRRORED, Mode.ALONE):
                primary.settle_all()
            await primary.keeper.reserve_ahead()
            await primary.activity.flush()


async def _checkpoint_often(primary: Primary, interval_s: float) -> None:
    while True:
        await trio.sleep(interval_s)
        dirty = primary.activity.dirty
        if primary.mode is Mode.MIRRORED and primary.stream is not None and (dirty.now or dirty.old):
            stream = primary.stream
            if await primary.checkpoint(stream):
                stream.put(ops.Checkpointed(primary.activity.dirty.head.number))
        elif isinstance(primary.copier, CatchUp) and primary.copier.live:
            await _checkpoint_within(primary, primary.copier)


async def _checkpoint_within(primary: Primary, copier: CatchUp) -> None:
    """Should the resync end early, what it has brought over so far need not be brought again."""
    if copier.brought.begin_checkpoint() and await primary.checkpoint(copier.stream, empties=False):
        copier.brought.end_checkpoint()
