"""A checkpoint: both nodes sync, and what came before is dirty no more."""

import trio

from mirrorfs.activity import Activity
from mirrorfs.core import operations as ops
from mirrorfs.keeper import Keeper
from mirrorfs.stream import Stream
from mirrorfs.tree import Tree


async def make_checkpoint(stream: Stream, tree: Tree, activity: Activity, keeper: Keeper, *, peer_number: int) -> bool:
    """Sync on both nodes and let the old generation of the dirty set go; False if the peer was lost before it had synced.

    `peer_number` is the peer's last checkpoint: the new one gets a greater number. Raises OSError if this node's disk failed.
    """
    dirty = activity.dirty
    number, new_from = max(dirty.head.number, peer_number) + 1, keeper.next_id()
    dirty.cut(new_from)
    tree.note_checkpoint(number)
    sequence = stream.put_flush(ops.Checkpoint(number, new_from))
    await trio.to_thread.run_sync(tree.syncfs)
    if not await stream.flushed(sequence) or stream.broken:
        return False
    await activity.checkpointed(number, keeper.record.volume_id)
    return True
