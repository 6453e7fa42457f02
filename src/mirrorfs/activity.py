"""The dirty set of this node in memory and on disk, kept the same: what a change may dirty is on stable storage before it is
made.

Marks that are asked for while the disk is busy are written together. A log that can no longer be written ends the node, as the
record of epochs does.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import trio

from mirrorfs.core.dirty import DirtySet, Entry, Head
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.errors import DirtyLogDamagedError, JournalError
from mirrorfs.keeper import Keeper
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)


class Activity:
    """Owns the dirty set; every change of what is on disk goes through here, one at a time.

    `on_marked` is called with `marked` when more marks have become durable, before anything relies on them.
    """

    def __init__(self, store: DirtyLog, keeper: Keeper) -> None:
        self._store = store
        self._keeper = keeper
        self._writing = trio.Lock()
        self._threads = trio.CapacityLimiter(1)  # of its own: a slow disk under the tree must not delay a mark
        self._waiting: list[Entry] = []
        self._asked = 0
        self._written = 0
        self.dirty = self._load()
        self.on_marked: Callable[[int], None] = lambda count: None

    def _load(self) -> DirtySet:
        try:
            found = self._store.load()
        except DirtyLogDamagedError as error:
            log.error("%s", error)
            found = None
        return DirtySet(*found) if found is not None else DirtySet(Head())

    def belongs_to(self, volume_id: str, tree: Tree) -> None:
        """Trust the set only if it is of this volume, and the tree has not been exchanged for an older or newer one since."""
        head, noted = self.dirty.head, tree.notes.checkpoint
        if not head.complete:
            return
        if head.volume_id != volume_id:
            self.dirty = DirtySet(Head())
        elif not head.number <= noted <= head.number + 2:
            # More: the node ended between the note in the tree and that in the log, and the peer may have been one ahead.
            log.error(
                "the directory is at checkpoint %d, its journal at %d: one of them was restored from a backup or a snapshot; "
                "the nodes will be compared in full",
                noted,
                head.number,
            )
            self.dirty = DirtySet(replace(head, complete=False))

    # ---- marks

    @property
    def marked(self) -> int:
        """How many records of marks this node has ever written."""
        return self._store.marked

    async def make_durable(self, entries: Iterable[Entry]) -> None:
        """Return when these are on stable storage; JournalError if they are not, and then the node ends."""
        self.ask(entries)
        mine = self._asked
        async with self._writing:
            if self._written < mine:
                await self._append()

    def ask(self, entries: Iterable[Entry]) -> None:
        """Have these written with the next marks; nobody waits for them."""
        before = len(self._waiting)
        self._waiting += entries
        self._asked += len(self._waiting) - before

    async def flush(self) -> None:
        """Write what was asked for and nobody waits for."""
        if self._waiting:
            await self.make_durable(())

    async def _append(self) -> None:
        batch, self._waiting = self._waiting, []
        asked = self._asked
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._write, batch, limiter=self._threads)
        self._written = asked
        self.dirty.heat(batch)
        self.on_marked(self.marked)

    def _write(self, batch: list[Entry]) -> None:
        try:
            if self._store.size_bytes:
                self._store.append(batch)
            else:
                self._store.rewrite(self.dirty.head, batch)
        except JournalError as error:
            self._keeper.failed(error)
            raise

    # ---- the whole

    async def save(self) -> None:
        """Write the log afresh: the head as it is, and what is hot."""
        async with self._writing:
            await self._save()

    async def _save(self) -> None:
        head, entries = self.dirty.head, self.dirty.entries()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._rewrite, head, entries, limiter=self._threads)

    def _rewrite(self, head: Head, entries: list[Entry]) -> None:
        try:
            self._store.rewrite(head, entries)
        except JournalError as error:
            self._keeper.failed(error)
            raise

    async def checkpointed(self, number: int, volume_id: str, *, empties: bool = True) -> None:
        """As the primary: both nodes have synced what came before the last cut, or without `empties`, what a resync has
        brought over."""
        async with self._writing:
            if number <= self.dirty.head.number:
                return  # a later one was faster
            if empties:
                self.dirty.checkpointed(number)
            else:
                self.dirty.resynced(number)
            self.dirty.head = replace(self.dirty.head, volume_id=volume_id)
            await self._save()

    async def synced(self, number: int, volume_id: str) -> None:
        """As the standby: this node has synced what came before checkpoint `number`."""
        async with self._writing:
            if number > self.dirty.head.number:
                self.dirty.head = replace(self.dirty.head, number=number, volume_id=volume_id)
                await self._save()

    def cleared(self, number: int, new_from: int) -> None:
        """As the standby: checkpoint `number` is durable on both nodes. On disk that is seen with the next `save`: what stands
        there until then says more than need be."""
        if self.dirty.head.number == number:
            self.dirty = DirtySet(replace(self.dirty.head, base=number, new_from=new_from, complete=True))

    async def distrust(self) -> None:
        """What the set says is not all that may differ: only a full copy can help."""
        if self.dirty.head.complete:
            self.dirty = DirtySet(replace(self.dirty.head, complete=False))
            await self.save()

    def close(self) -> None:
        """Give the file back."""
        self._store.close()
