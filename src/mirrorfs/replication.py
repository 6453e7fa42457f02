"""The primary's side of a pair: the peer comes, is brought to the same tree, joins, and is lost."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from mirrorfs.activity import Activity
from mirrorfs.changes import Changes
from mirrorfs.checkpoint import make_checkpoint
from mirrorfs.config import Config
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import Head, first_new
from mirrorfs.core.epochs import Member
from mirrorfs.core.modes import Mode
from mirrorfs.core.wire import Frame
from mirrorfs.errors import ProtocolError
from mirrorfs.introductions import Introductions
from mirrorfs.keeper import Keeper
from mirrorfs.measures import Measures
from mirrorfs.peer import Link
from mirrorfs.resync.full import Copier
from mirrorfs.resync.quick import CatchUp
from mirrorfs.resync.reports import Report
from mirrorfs.stream import Stream
from mirrorfs.syncing import Syncs
from mirrorfs.tree import Tree

if TYPE_CHECKING:
    from mirrorfs.arbitration import Grant

log = logging.getLogger(__name__)


class Primary(Changes):
    """This node while it is the primary."""

    def __init__(
        self,
        tree: Tree,
        keeper: Keeper,
        activity: Activity,
        *,
        config: Config,
        disk_failed: Callable[[OSError], None],
        syncs: Syncs,
        measures: Measures,
    ) -> None:
        super().__init__(tree, keeper, activity, config=config, disk_failed=disk_failed, syncs=syncs, measures=measures)
        activity.on_marked = self._tell_marked
        self._unsent_from = keeper.next_id()
        activity.dirty.begin_reign(self._unsent_from)
        self._last_number = 0
        self.ask_alone: Callable[[bool], None] | None = None  # given whether changes are under way; None: it need not ask

    # ---- checkpoints and marks

    async def checkpoint(self, stream: Stream, *, empties: bool = True) -> bool:
        """Make a checkpoint with the peer; False if it did not come about: what is dirty stays so."""
        self.settle_all()
        self._last_number = max(self.activity.dirty.head.number, self._last_number) + 1
        try:
            done = await make_checkpoint(stream, self.tree, self.activity, self.keeper, self._last_number, empties=empties)
        except OSError as error:
            self.disk_failed(error)
            return False
        return done and self._is_present(stream)

    def _tell_marked(self, count: int) -> None:
        """What is sent from here on may rely on marks that a node which is restored from a snapshot has no more."""
        if self.stream is not None:
            self.stream.put(ops.Marked(count))

    # ---- the peer comes and goes

    async def begin_copy(self, link: Link, theirs: Head, report: Report | None, room_bytes: int) -> Copier | CatchUp:
        """Begin to bring a following peer to the same tree: what its report and the own dirty set say, or without one
        everything. It has room for `room_bytes`.

        The peer does not count until `join`.
        """
        if self.mode not in (Mode.ALONE, Mode.FROZEN) or self.stream is not None:
            raise ProtocolError("FOLLOWING from a node that was not asked to follow")
        stream, introductions = self._begin_stream(link)
        self._last_number = theirs.number
        if self.waits_for_grant:
            self.enter(Mode.ALONE)  # the peer has recorded that it follows: nobody else has to be asked
        if report is None:
            self.copier = Copier(self.tree, stream, settings=self._resync, note_unsettled=self._times.add)
        else:
            self.copier = CatchUp(
                self.tree,
                stream,
                self.activity.dirty,
                report,
                settings=self._resync,
                first_new=first_new(self.activity.dirty.head, theirs),
                unsent_from=self._unsent_from,
                room_bytes=room_bytes,
                introduce=introductions.by_entry,
                note_introduced=introductions.known.add,
                note_unsettled=self._times.add,
            )
        return self.copier

    def mirror_to(self, link: Link) -> None:
        """Begin a stream to a peer that has the same tree at this moment and is in the in-sync set."""
        self._begin_stream(link)
        self.enter(Mode.MIRRORED)

    def _begin_stream(self, link: Link) -> tuple[Stream, Introductions]:
        self.stream = Stream(link)
        self._introductions = Introductions(self.tree, self.stream)
        self._tell_marked(self.activity.marked)
        return self.stream, self._introductions

    async def join(self, peer: Member) -> bool:
        """The copy is complete: make a checkpoint, then let the peer into the in-sync set; False if it was lost meanwhile."""
        stream = self.stream
        if stream is None or not self._is_present(stream):
            return False
        self._flush_both = True  # what is fsynced from here on is fsynced on both
        if not await self.checkpoint(stream):
            return False
        self.settle_all()
        self.tree.notes.peer_marked = 0  # what it knew before is here; it may be a new node, which begins to count
        await self.keeper.begin(self.keeper.me().node, frozenset({self.keeper.me(), peer}))
        if not self._is_present(stream):
            if self.mode is not Mode.ENDED:
                await self.keeper.begin(self.keeper.me().node, frozenset({self.keeper.me()}), wrote=True)
            return False
        # From here on every acknowledgement waits for the peer; the peer learns it in the stream, after all it depends on.
        self.copier = None
        self._flush_both = False
        self._introductions = Introductions(self.tree, stream)
        self.enter(Mode.MIRRORED)
        return True

    def _is_present(self, stream: Stream) -> bool:
        """Whether this stream is the present one, and alive."""
        return stream is self.stream and not stream.broken and self.mode is not Mode.ENDED

    async def peer_lost(self, reason: str) -> None:
        """The link to the peer has ended."""
        counted = self.copier is None  # an acknowledgement needed the peer's
        awaited = self.stream is not None and self.stream.awaited
        if self._end_stream() is not None and counted and self.mode is not Mode.ENDED:
            return await self._go_on_without(reason, wrote=awaited)
        epoch = self.keeper.record.epoch
        if self.mode is Mode.ALONE and epoch is not None and len(epoch.in_sync) > 1:
            await self.keeper.begin_alone()
        return None

    def _end_stream(self) -> Stream | None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.end()
            if isinstance(self.copier, CatchUp):
                self.copier.brought.give_back()
            self._unsent_from = self.keeper.next_id()  # a resync that was broken off may have sent what is older
        self.copier, self._flush_both = None, False
        return stream

    async def _go_on_without(self, reason: str, *, wrote: bool) -> None:
        if self.disk_is_bad:
            return  # frozen, until the node has stopped
        self.loss = reason
        if self._settings.on_peer_loss == "freeze":
            self.enter(Mode.FROZEN)
            log.warning(
                "the peer is lost (%s): writes are frozen (on_peer_loss = freeze)", reason, extra={"event": "writes-frozen"}
            )
            return
        if self.ask_alone is not None:
            self.enter(Mode.FROZEN)
            log.warning(
                "the peer is lost (%s): writes are frozen until the arbiter has answered",
                reason,
                extra={"event": "writes-frozen"},
            )
            self.waits_for_grant = True
            self.ask_alone(wrote)
            return
        self.enter(Mode.LOST)
        await self.go_on_alone(None, wrote=wrote)

    async def go_on_alone(self, grant: "Grant | None", *, wrote: bool) -> None:
        """Nobody else goes on: record it, then acknowledge alone; with `wrote`, what was under way is acknowledged by that."""
        before = self.mode
        epoch = await self.keeper.begin(self.keeper.me().node, frozenset({self.keeper.me()}), wrote=wrote, grant=grant)
        log.warning(
            "the peer is lost (%s): going on alone in epoch %d",
            self.loss,
            epoch.number,
            extra={"event": "went-on-alone", "epoch": epoch.number, "reason": self.loss},
        )
        if self.mode is before:
            self.enter(Mode.ALONE)

    def part(self) -> None:
        """Be alone from here on, as the record says already."""
        self._end_stream()
        self.enter(Mode.ALONE)

    def retire(self) -> None:
        """This node is not the primary any more: who waits is refused, nothing is sent any more."""
        self.enter(Mode.ENDED)
        self._end_stream()
        self._times.forget_all()

    async def drain(self) -> bool:
        """Freeze, and wait until the peer has everything; False if it was lost meanwhile."""
        stream = self.stream
        assert stream is not None
        self.settle_all()
        self.enter(Mode.FROZEN)
        return await stream.drained()

    def on_frame(self, frame: Frame) -> bool:
        """Take in what the peer says about the stream; False if the frame is not about that."""
        if self.stream is None or frame.offset != self.stream.number:
            return False
        return self.stream.on_frame(frame) or (self.copier is not None and self.copier.on_frame(frame))
