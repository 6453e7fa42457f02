"""Giving a history up for that of the other node: this node's own versions are kept aside, then the record says so.

In this order, and each step durable before the next: a crash in between leaves a node that has given nothing up, and a batch of
versions that the next try puts itself in the place of. Nothing of the tree is touched; the resync that follows does that.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

import trio

from mirrorfs import backing
from mirrorfs.activity import Activity
from mirrorfs.config import Config
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.divergence import Finder, Version, all_versions, keep, own_versions, room_for
from mirrorfs.errors import ConfirmationNeededError, MirrorfsError
from mirrorfs.journal import Journal
from mirrorfs.keeper import Keeper
from mirrorfs.lost import Batch, LostStore
from mirrorfs.tree import Tree

#: So many files are looked at, or kept, before the node does something else.
_PIECE: Final = 64


class Yielding:
    """What a node needs to give its history up; one at a time, and only while it does not serve (`require_room`: always)."""

    def __init__(self, tree: Tree, root: int, keeper: Keeper, activity: Activity, lost: LostStore) -> None:
        self._tree = tree
        self._root = root
        self._keeper = keeper
        self._activity = activity
        self._lost = lost

    async def require_room(self) -> None:
        """MirrorfsError unless all that would be kept fits; nothing has been touched then.

        What an earlier try has kept, which went no further, is let go: all of it is in the tree still.
        """
        record, count_bytes, count = self._keeper.record, 0, 0
        assert record.epoch is not None
        assert not record.yields_to
        await trio.to_thread.run_sync(self._lost.forget_earlier, record.epoch.tag)

        def add(version: Version) -> None:
            nonlocal count_bytes, count
            count_bytes, count = count_bytes + room_for(version), count + 1

        with _told():
            await self._for_each(add)
        what = "this node's own versions of what differs" if self._is_known else "what differs is not known, and all files"
        await trio.to_thread.run_sync(self._lost.require_room, count_bytes, count, what)

    async def give_up(self, winner: str) -> str:
        """Keep this node's versions and record that it yields to `winner`; returns what was kept. After an error, nothing."""
        await self.require_room()
        epoch = self._keeper.record.epoch
        assert epoch is not None
        with _told():
            count = await self._keep(winner, epoch.tag)
        kept = f"{count} of its own versions are kept, see `mirrorfs lost list`" if count else "it had no changes of its own"
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        await self._keeper.yield_to(winner, f"it gave its history up for that of {winner} at {moment}; {kept}")
        return kept

    async def _keep(self, winner: str, key: str) -> int:
        batch = await trio.to_thread.run_sync(self._begin, winner, key)
        try:
            await self._for_each(lambda version: keep(batch, version))
            if batch.count:
                await trio.to_thread.run_sync(batch.commit)
            return batch.count
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(batch.abort)

    def _begin(self, winner: str, key: str) -> Batch:
        return self._lost.begin(f"split brain, the history of {winner} was kept", key=key)

    @property
    def _is_known(self) -> bool:
        """Whether the marks say all that this node did on its own."""
        return self._activity.dirty.head.complete

    async def _for_each(self, action: Callable[[Version], None]) -> None:
        """Do something with every version, in worker threads; it closes the version's descriptor."""
        if not self._is_known:
            await trio.to_thread.run_sync(_do, action, all_versions(self._root))
            return
        dirty = self._activity.dirty
        versions = own_versions(Finder(self._tree, dirty.located), dirty.all(), dirty.head.new_from)
        while piece := list(islice(versions, _PIECE)):
            await trio.to_thread.run_sync(_do, action, iter(piece))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MirrorfsError(f"its own versions cannot be kept aside: {error.strerror}. Nothing was touched") from error


def _do(action: Callable[[Version], None], versions: Iterator[Version]) -> None:
    try:
        for version in versions:
            action(version)
    finally:
        for version in versions:  # after an error: theirs are open still
            os.close(version.descriptor)


def place_of(config: Config) -> Path:
    """Where the files underneath are while the node does not run; MirrorfsError if that is not known."""
    noted = Journal(config.node.state_dir).read_place()
    if noted is None and config.node.backing is None:
        raise MirrorfsError(f"{config.node.state_dir}: this node has never run, so there is nothing to be found")
    base = Path(noted) if noted is not None else config.node.backing
    assert base is not None
    try:
        if (base / "tree").is_dir():
            return base
    except OSError as error:
        raise MirrorfsError(f"{base}: cannot be reached: {error.strerror}: is a dead mount in the way?") from error
    raise MirrorfsError(f"{base}: the files underneath are not there: is their disk mounted?")


def give_up_offline(config: Config, winner: str, *, yes: bool) -> str:
    """Give the history up on a node that does not run; it takes effect when the nodes meet. Returns what was done.

    ConfirmationNeededError without `yes`, MirrorfsError if it cannot be.
    """
    if not yes:
        raise ConfirmationNeededError(
            f"{config.node.name} sets its own versions of what it changed aside, and becomes a copy of {winner} when they meet "
            "(--yes does it)"
        )
    state, base = config.node.state_dir.resolve(), place_of(config)
    journal = Journal(state)
    locks = [backing.lock_file(state / "lock", f"{state}: a mirrorfs process uses it")]
    try:
        locks.append(backing.lock_file(base / "lock", f"{base}: a mirrorfs process uses it"))
        locks.append(os.open(base / "tree", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        return trio.run(_give_up_offline, config, journal, base, locks[-1], winner)
    finally:
        for descriptor in locks:
            os.close(descriptor)


async def _give_up_offline(config: Config, journal: Journal, base: Path, root: int, winner: str) -> str:
    keeper = Keeper(journal, config.node.name, 0)
    record = keeper.record
    if record.epoch is None:
        raise MirrorfsError("this node has no history that it could give up")
    if record.yields_to == winner:
        return f"it has given its history up for that of {winner} already"
    tree = Tree(root)
    volume = bytes.fromhex(record.volume_id)
    if not tree.is_of(volume):
        raise MirrorfsError(f"{base}: not the directory that the record belongs to: is its disk mounted?")
    tree.set_volume(volume)
    activity = Activity(DirtyLog(config.node.state_dir), keeper)
    activity.belongs_to(record.volume_id, tree)
    try:
        kept = await Yielding(tree, root, keeper, activity, LostStore(base / "lost")).give_up(winner)
        return f"{config.node.name} will follow {winner} when they meet: {kept}"
    finally:
        activity.close()
