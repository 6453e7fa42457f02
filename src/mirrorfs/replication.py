"""The primary's side: apply a change here, put it on the stream, wait for the peer, answer.

What lies between two awaits is atomic. `Primary.change` applies, numbers and sends with no await in between, so the order of
the stream is the order in which the changes happened here; a new `await` in `_make` would need a new argument for that.
"""

import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs import contents
from mirrorfs.activity import Activity
from mirrorfs.checkpoint import make_checkpoint
from mirrorfs.config import Config
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import Head, first_new
from mirrorfs.core.epochs import Member
from mirrorfs.core.modes import Mode
from mirrorfs.core.wire import Frame
from mirrorfs.errors import FrozenError, NotPrimaryError, ProtocolError
from mirrorfs.introductions import Introductions
from mirrorfs.keeper import Keeper
from mirrorfs.marking import Marking
from mirrorfs.peer import Link
from mirrorfs.resync.full import Copier
from mirrorfs.resync.quick import CatchUp
from mirrorfs.resync.reports import Report
from mirrorfs.settling import Settling
from mirrorfs.strand import in_task
from mirrorfs.stream import Stream
from mirrorfs.syncing import Syncs
from mirrorfs.table import Known
from mirrorfs.tree import Tree

if TYPE_CHECKING:
    from mirrorfs.arbitration import Grant

log = logging.getLogger(__name__)
#: Changes wait while more than this is on its way to a node that is being brought in sync.
_MAX_QUEUED_BYTES: Final = 32 << 20


class Primary:
    """This node while it is the primary.

    `disk_failed` is called when a sync failed here: the node must hand over or stop. It must not be awaited by a request, whose
    locks in the kernel a change of roles needs.
    """

    def __init__(
        self,
        tree: Tree,
        keeper: Keeper,
        activity: Activity,
        *,
        config: Config,
        disk_failed: Callable[[OSError], None],
        syncs: Syncs,
    ) -> None:
        self._syncs = syncs
        self.tree = tree
        self.keeper = keeper
        self.activity = activity
        activity.on_marked = self._tell_marked
        self._marking = Marking(tree, activity, self._admitted)
        self.mode = Mode.ALONE
        self.stream: Stream | None = None
        self.copier: Copier | CatchUp | None = None
        self.loss = ""
        self._settings, self._resync = config.replication, config.resync
        self._unsent_from = keeper.next_id()
        activity.dirty.begin_reign(self._unsent_from)
        self._last_number = 0
        self._disk_failed = disk_failed
        self._changed = trio.Event()
        self._frozen_at = math.inf
        self._introductions: Introductions | None = None
        self._times = Settling(tree, self._tell_times)
        self._flush_both = False
        self.disk_is_bad = self.waits_for_grant = False
        self.ask_alone: Callable[[bool], None] | None = None  # given whether changes are under way; None: it need not ask

    # ---- what fuse_ops calls

    async def change(
        self, change: ops.Change, target: Known | None = None, *, only_if: Callable[[], bool] = lambda: True
    ) -> Any:
        """Make a change on both nodes and return what `Tree.apply` returns for it.

        A file that was made stays known until the next `await` of the caller, who tells the kernel of it before that.
        `target` is the file that a change of data or attributes is for. Unless `only_if` holds at the moment at which it would
        be made, nothing is. Raises OSError as the backing store gives it (EOPNOTSUPP for a copy that the peer cannot make),
        NotPrimaryError, or FrozenError after `freeze_timeout`.
        """
        change = contents.bounded(change)
        if not self._is_open:
            change = ops.owned(change)
            await self._admitted()
        old_size = 0
        if self.activity.dirty.tracking:
            old_size, cold = self._marking.look(change, target)
            if cold:
                change = ops.owned(change)
                old_size = await self._marking.before(change, target)
        if not only_if():
            return None
        result, sequence, failure = self._make(change, target, old_size)
        if isinstance(result, Known):
            result.kept += 1
        try:
            await self._acknowledged(sequence)
        except BaseException:
            if isinstance(result, Known):
                result.kept -= 1
                self.tree.table.drop_unused(result)
            raise
        if isinstance(result, Known):
            result.kept -= 1
        if failure is not None:
            raise failure
        return result

    def _note_untold(self, change: ops.Change, old_size: int) -> None:
        """The target of a quick resync is not told of this change: what it makes dirty is brought over later."""
        if isinstance(self.copier, CatchUp):
            self.copier.note(change, old_size)
            if (other := self._marking.other_name(change)) is not None:
                self.copier.note_name(*other)

    @property
    def is_whole(self) -> bool:
        """Whether every name here is known to the peer: while mirrored, and in a quick resync once the names are equal."""
        return self.mode is Mode.MIRRORED or (isinstance(self.copier, CatchUp) and self.copier.live)

    def found(self, parent: int, name: bytes) -> None:
        """A file that nobody made through the mount got an id: the other node does not know it."""
        self._marking.found(parent, name)
        if isinstance(self.copier, CatchUp):
            self.copier.note_name(parent, name)

    def _is_told(self, change: ops.Change) -> bool:
        """Whether the peer is told of a change as it is."""
        return self.stream is not None and (self.copier is None or self.copier.tells(change))

    def _make(self, change: ops.Change, target: Known | None, old_size: int) -> tuple[Any, int, OSError | None]:
        """Apply, number and send; no await in here."""
        local = target is not None and target.gone  # a file without a name is nobody's but this node's
        told = not local and self._is_told(change)
        if isinstance(change, ops.CopyRange) and not local and not self._can_copy(change):
            raise contents.unsupported()  # the application's kernel reads and writes instead
        if told:
            try:
                self.there.before(change)
            except OSError as error:
                if self.copier is None:
                    raise
                # The application must not suffer for a target that is not in sync; what is not told is marked.
                told = False
                assert self.stream is not None
                self.stream.link.close(f"a change could not be introduced: {error.strerror}")
        try:
            change, result, failure = contents.make(change, self.tree.apply)
        except OSError as error:
            self._note_failed(change, error, old_size, local)
            raise
        if isinstance(result, Known) and result.gone and self._introductions is not None:
            self._introductions.known.discard(result.id)
        if local:
            return result, 0, failure
        self._marking.after(change, old_size)
        if not told:
            self._note_untold(change, old_size)
        if self.stream is not None:
            self._times.note(change)
        try:
            if told and isinstance(self.copier, CatchUp):
                self.copier.note_told(change)
            return result, self._send(change, result if isinstance(result, Known) else None), failure
        except OSError as error:
            # The change is made here: a target that cannot be told of it must be copied to again.
            assert self.stream is not None
            self.stream.link.close(f"a change could not be sent: {error.strerror}")
            return result, self.stream.sent, failure

    def _can_copy(self, change: ops.CopyRange) -> bool:
        """Whether the peer, if there is one, has what is copied."""
        return self.stream is None or (self.copier is None and not self.tree.table.get(change.source).gone)

    def _note_failed(self, change: ops.Change, error: OSError, old_size: int, local: bool) -> None:
        """A change of data failed: the file's modification time is another all the same, and perhaps some bytes are."""
        if local or not isinstance(change, ops.Write | ops.Allocate | ops.CopyRange):
            return
        unsure = contents.is_unsure(change, error)
        self._marking.after(change if unsure else ops.SetAttributes(change.file), old_size)
        if self.stream is not None:
            self._times.add(change.file)
            if unsure:  # what the peer has there is equal again when it has been brought over
                self.stream.link.close(f"a change failed in the middle: {error.strerror}")

    async def sync(self, known: Known, data_only: bool) -> None:
        """fsync on both nodes at once; OSError if this node's disk failed."""
        await self._admitted()
        stream, version = self.stream, known.version
        sequence = self._send_sync(known, data_only)
        descriptor = self.tree.table.hold_to_sync(known)
        try:
            await self._syncs.sync(descriptor, data_only)
            known.synced = max(known.synced, version)
            if sequence:
                assert stream is not None
                await stream.flushed(sequence)
        except OSError as error:
            self.disk_failed(error)
            raise
        finally:
            if known.is_directory:
                os.close(descriptor)
            self.tree.table.let_go(known)
            if stream is not None:
                stream.forget_flush(sequence)
        if sequence and stream is not None and not stream.broken:
            return
        await self._acknowledged(sequence if stream is self.stream else 0)  # numbers of another stream mean nothing

    def _send_sync(self, known: Known, data_only: bool) -> int:
        """Have the peer sync the file; 0 if it need not."""
        if self.stream is None or known.gone:
            return 0
        if not data_only:
            self._times.settle(known.id)
        if isinstance(self.copier, Copier):
            if not self._flush_both or known.id not in self.copier.introduced:
                return 0
        else:
            if self.copier is not None and not self._flush_both:
                return 0
            self.there.introduce(known.id)
        return self.stream.put_flush(ops.Sync(known.id, data_only))

    def disk_failed(self, error: OSError) -> None:
        """A sync failed here, and is never tried again: nothing more is acknowledged by this node."""
        self.loss = f"the disk of this node failed: {error.strerror}"
        if self.mode is not Mode.ENDED and not self.disk_is_bad:
            self.disk_is_bad = True
            self.enter(Mode.FROZEN)
            self._disk_failed(error)

    # ---- waiting

    @property
    def _is_open(self) -> bool:
        """Whether a change may begin at once."""
        return self.mode is Mode.MIRRORED or (self.mode is Mode.ALONE and self.copier is None)

    async def _admitted(self) -> None:
        """Wait until a change may begin."""
        if self._is_open:
            return
        await in_task()
        while True:
            if self.mode is Mode.ENDED:
                raise NotPrimaryError("this node is not the primary any more")
            if self.mode is Mode.FROZEN:
                await self._wait_for_change()
            elif self.copier is not None and self.copier.stream.link.queued_bytes > _MAX_QUEUED_BYTES:
                await trio.sleep(0.005)
            else:
                return

    async def _acknowledged(self, sequence: int) -> None:
        """Wait until the change with this number may be acknowledged."""
        stream = self.stream
        while True:
            if self.mode is Mode.MIRRORED:
                if stream is not self.stream:
                    return  # the peer came in sync later, with this change in what was copied
                assert stream is not None
                if await stream.applied(sequence, answers=True):
                    return
                if self.mode is Mode.MIRRORED:
                    await in_task()
                    await self._wait_for_change()
            elif self.mode is Mode.ALONE:
                if not self.keeper.wrote_alone:
                    await in_task()
                    await self.keeper.note_written_alone()
                    continue
                return
            elif self.mode is Mode.ENDED:
                raise NotPrimaryError("this node is not the primary any more")
            else:
                await in_task()
                await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        changed = self._changed
        with trio.move_on_at(self._frozen_at + self._settings.freeze_timeout_s if self._frozen_at < math.inf else math.inf):
            await changed.wait()
            return
        raise FrozenError(f"frozen for {self._settings.freeze_timeout_s:g} s (freeze_timeout): {self.loss}")

    def enter(self, mode: Mode) -> None:
        """Change the mode and let everybody who waits look again."""
        if mode in (Mode.FROZEN, Mode.LOST):
            if self._frozen_at == math.inf:
                self._frozen_at = trio.current_time()
        else:
            self._frozen_at = math.inf
        if mode is not Mode.FROZEN:
            self.waits_for_grant = False
        self.mode = mode
        self._changed.set()
        self._changed = trio.Event()

    # ---- sending

    @property
    def there(self) -> Introductions:
        """What the peer knows on the present stream."""
        assert self._introductions is not None
        return self._introductions

    def _send(self, change: ops.Change, lost: Known | None = None) -> int:
        if self.stream is None:
            return 0
        if isinstance(self.copier, Copier):
            return self.copier.send(change, lost)
        if self.copier is not None and not self.copier.tells(change):
            return 0
        sequence = self.stream.put(change)
        if isinstance(change, ops.MakeNode | ops.Symlink):
            self.there.known.add(change.file)
        return sequence

    # ---- times

    def _tell_times(self, change: ops.SetAttributes) -> None:
        if self._is_told(change):
            self.there.introduce(change.file)
        else:
            self._note_untold(change, 0)
        self._send(change)

    def settle(self, number: int) -> None:
        """A file was closed: nothing, `settle_all` is soon. To be deleted with its callers in `fuse_ops`."""

    def tell_time(self, number: int) -> None:
        """Settle one file's times now, if the node has somebody to tell."""
        if self.stream is not None and self.mode in (Mode.MIRRORED, Mode.ALONE):
            self._times.settle(number)

    def settle_all(self) -> None:
        """Settle everything."""
        if self.stream is None:
            self._times.forget_all()
        elif self.copier is None:
            self._times.settle_together(self.there.introduce, self.stream.put)
        else:
            self._times.settle_all()

    @property
    def settled(self) -> bool:
        """Whether the peer has been told all times, and has applied all that was sent."""
        return not self._times and (self.stream is None or self.stream.acknowledged == self.stream.sent)

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
            log.warning("the peer is lost (%s): writes are frozen (on_peer_loss = freeze)", reason)
            return
        if self.ask_alone is not None:
            self.enter(Mode.FROZEN)
            self.waits_for_grant = True
            self.ask_alone(wrote)
            return
        self.enter(Mode.LOST)
        await self.go_on_alone(None, wrote=wrote)

    async def go_on_alone(self, grant: "Grant | None", *, wrote: bool) -> None:
        """Nobody else goes on: record it, then acknowledge alone; with `wrote`, what was under way is acknowledged by that."""
        before = self.mode
        epoch = await self.keeper.begin(self.keeper.me().node, frozenset({self.keeper.me()}), wrote=wrote, grant=grant)
        log.warning("the peer is lost (%s): going on alone in epoch %d", self.loss, epoch.number)
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
