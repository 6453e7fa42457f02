"""The node's record in memory and on disk, kept the same: nothing counts before it is durable."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from mirrorfs.core import ids
from mirrorfs.core.epochs import Epoch, Member, Record, Seen, Standing
from mirrorfs.errors import JournalError
from mirrorfs.journal import Journal

if TYPE_CHECKING:
    from mirrorfs.arbitration import Grant

log = logging.getLogger(__name__)

_RESERVE_AHEAD: Final = ids.BLOCK // 4
#: Tags that were asked for without an answer. An old one is remembered until an epoch is granted.
_CLAIMS: Final = 16


def boot_id() -> str:
    """What tells this boot of the machine from every other."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _later(mine: Seen | None, theirs: Seen | None) -> Seen | None:
    """What is known of the arbiter: of one cluster the later, of two that of the primary."""
    if mine is None or theirs is None or mine.cluster != theirs.cluster:
        return theirs or mine
    return max(mine, theirs, key=lambda seen: (seen.key_revision, seen.revision))


def _tell_epoch(epoch: Epoch) -> None:
    in_sync = ", ".join(sorted(member.node for member in epoch.in_sync))
    log.info(
        "epoch %d: %s is the primary, in sync: %s",
        epoch.number,
        epoch.primary,
        in_sync,
        extra={
            "event": "epoch-begun",
            "epoch": epoch.number,
            "primary": epoch.primary,
            "in_sync": in_sync,
            "forced": epoch.forced,
        },
    )


class Keeper:
    """Changes the record, one change at a time; each returns when it is on stable storage.

    `failed` is called, in any thread, when the disk would not take it: what cannot be recorded must not be done, so the
    node has to end.
    """

    def __init__(self, journal: Journal, node: str, node_bit: int) -> None:
        self._journal = journal
        self._node = node
        self._node_bit = node_bit
        self._saving = trio.Lock()
        self._threads = trio.CapacityLimiter(2)  # of its own: a slow disk under the tree must not delay an epoch
        self.failed: Callable[[JournalError], None] = lambda error: None
        self.boot = boot_id()
        self.record = journal.load()
        self._ids_lock = threading.Lock()
        self._reserved = self._end_counter = self._next_counter = journal.load_ids()

    async def _save(self, change: Callable[[Record], Record]) -> None:
        async with self._saving:
            fresh = change(self.record)
            if fresh != self.record:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._write, fresh, limiter=self._threads)
                self.record = fresh

    def _write(self, fresh: Record) -> None:
        with self._reported():
            self._journal.save(fresh)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except JournalError as error:
            self.failed(error)
            raise

    async def begin(
        self,
        primary: str,
        in_sync: frozenset[Member],
        *,
        forced: bool = False,
        wrote: bool = False,
        volume_id: str = "",
        standing: Standing | None = None,
        paused: bool = False,
        grant: "Grant | None" = None,
    ) -> Epoch:
        """Begin a new epoch, durably; with `wrote`, changes are acknowledged alone in it from its first moment, and with
        `paused` the other node is kept off from that moment on.

        What this node knows of its own tree stays as it is unless `standing` says otherwise. With a `grant` it is the epoch
        that the arbiter granted; whatever was asked for before can be granted no more.
        """

        def change(record: Record) -> Record:
            number = record.epoch.number + 1 if record.epoch else 1
            tag = os.urandom(8).hex()
            if grant is not None:
                number, tag = max(number, grant.number), grant.tag
                record = replace(record, claims=(), arbiter=grant.seen)
            epoch = Epoch(number, tag, primary, in_sync, forced, time.time())
            fresh = replace(record, volume_id=record.volume_id or volume_id).begin(epoch)
            if standing is not None:
                fresh = replace(fresh, standing=standing, reason="", yields_to="")
            if paused:
                fresh = replace(fresh, paused_at=epoch.began)
            return replace(fresh, wrote=fresh.wrote | {epoch.tag}) if wrote else fresh

        await self._save(change)
        epoch = self.record.epoch
        assert epoch is not None
        _tell_epoch(epoch)
        return epoch

    async def begin_alone(self) -> Epoch:
        """Begin an epoch with this node alone in sync, in which it has acknowledged what it has so far."""
        return await self.begin(self._node, frozenset({self.me()}), wrote=self.wrote_alone)

    async def begin_pause(self, *, wrote: bool, grant: "Grant | None" = None) -> Epoch:
        """Begin an epoch with this node alone in sync, and keep the other one off: one write, so that neither is without the
        other after a crash."""
        wrote = wrote or self.wrote_alone
        return await self.begin(self._node, frozenset({self.me()}), wrote=wrote, paused=True, grant=grant)

    async def end_pause(self) -> None:
        """The other node may follow again, durably."""
        await self._save(lambda record: replace(record, paused_at=0.0))

    async def time_a_record(self) -> float:
        """How long a record takes to become durable now, in seconds; JournalError if it cannot."""
        return await trio.to_thread.run_sync(self._journal.time_a_record, limiter=self._threads)

    def me(self) -> Member:
        """This node in this boot."""
        return Member(self._node, self.boot)

    async def adopt(self, theirs: Record, standing: Standing, reason: str) -> None:
        """Take over the other node's history, durably, with this node's own standing in it. Who follows pauses nothing."""
        before = self.record.epoch
        await self._save(
            lambda record: replace(
                record,
                volume_id=theirs.volume_id,
                epochs=theirs.epochs,
                wrote=frozenset(),
                standing=standing,
                reason=reason,
                paused_at=0.0,
                yields_to="",
                arbiter=_later(record.arbiter, theirs.arbiter),
            )
        )
        if theirs.epoch is not None and (before is None or not theirs.epoch.same(before)):
            _tell_epoch(theirs.epoch)

    async def note_claim(self, tag: str) -> None:
        """This node is about to ask the arbiter for the epoch with this tag."""
        await self._save(
            lambda record: record if tag in record.claims else replace(record, claims=(*record.claims, tag)[-_CLAIMS:])
        )

    async def take_claims(self, theirs: tuple[str, ...]) -> None:
        """The other node follows, durably: what it asked the arbiter for and may still be granted counts as this node's."""
        await self._save(
            lambda record: replace(
                record, claims=(*record.claims, *(tag for tag in theirs if tag not in record.claims))[-_CLAIMS:]
            )
        )

    async def note_arbiter(self, seen: Seen) -> None:
        """Remember how the arbiter was when it held what is right; that its store has grown since then is not worth a write."""

        def change(record: Record) -> Record:
            known = record.arbiter
            is_same = known is not None and (known.cluster, known.key_revision) == (seen.cluster, seen.key_revision)
            return record if is_same else replace(record, arbiter=seen)

        await self._save(change)

    async def yield_to(self, winner: str, reason: str) -> None:
        """Give this node's history up for that of the other: nothing that it acknowledged alone counts any more."""
        await self._save(lambda record: record.yielding(winner, reason))

    async def stand(self, standing: Standing, reason: str) -> None:
        """Record what this node knows of its own tree."""
        await self._save(lambda record: replace(record, standing=standing, reason=reason))

    async def note_written_alone(self) -> None:
        """Record that a change is acknowledged in the current epoch with nobody else asked."""
        epoch = self.record.epoch
        assert epoch is not None
        await self._save(lambda record: replace(record, wrote=record.wrote | {epoch.tag}))

    @property
    def wrote_alone(self) -> bool:
        """Whether that has been recorded."""
        epoch = self.record.epoch
        return epoch is not None and epoch.tag in self.record.wrote

    # ---- ids of new files

    def next_id(self) -> int:
        """Files that this node makes from now on get ids of at least this."""
        epoch = self.record.epoch
        return ids.make(epoch.number if epoch else 0, self._node_bit, self._next_counter)

    def new_id(self) -> int:
        """The id of a new file; reserves the next block, here and now, when the last one is used up."""
        epoch = self.record.epoch
        assert epoch is not None
        if self._next_counter == self._end_counter:
            self._reserve()
        counter, self._next_counter = self._next_counter, self._next_counter + 1
        return ids.make(epoch.number, self._node_bit, counter)

    async def reserve_ahead(self) -> None:
        """Reserve the next block before it is needed, so that `new_id` need not wait for the disk."""
        if self._end_counter - self._next_counter < _RESERVE_AHEAD:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._reserve, limiter=self._threads)

    def _reserve(self) -> None:
        """Any thread: the lock makes the number on disk never go back."""
        with self._ids_lock, self._reported():
            reserved = self._reserved + ids.BLOCK
            self._journal.save_ids(reserved)
            self._reserved = self._end_counter = reserved
