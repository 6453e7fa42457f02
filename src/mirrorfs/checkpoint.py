"""A checkpoint: both nodes sync, and what came before is dirty no more."""

import trio

from mirrorfs.activity import Activity
from mirrorfs.core import operations as ops
from mirrorfs.keeper import Keeper
from mirrorfs.stream import Stream
from mirrorfs.tree import Tree


async def make_checkpoint(
    stream: Stream, tree: Tree, activity: Activity, keeper: Keeper, number: int, *, empties: bool = True
) -> bool:
    """Sync on both nodes and let the old generation of the dirty set go; False if the peer was lost before it had synced.

    `number` is greater than that of any checkpoint that either node knows. Unless it `empties` the dirty set, that stays: the
    peer has not all of it yet. Raises OSError if this node's disk failed.
    """
    dirty = activity.dirty
    new_from = keeper.next_id() if empties else dirty.head.new_from
    if empties:
        dirty.cut(new_from)
    tree.notes.checkpoint = number
    sequence = stream.put_flush(ops.Checkpoint(number, new_from))
    await trio.to_thread.run_sync(tree.syncfs)
    if not await stream.flushed(sequence) or stream.broken:
        return False
    await activity.checkpointed(number, keeper.record.volume_id, empties=empties)
    return True
