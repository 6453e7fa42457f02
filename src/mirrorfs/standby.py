"""The standby's side: apply the primary's stream in order, acknowledge, sync when told.

A connection's frames are applied by one task, in order; once the link has ended none is applied any more. A result
that is not the primary's is divergence: the node records durably that it is outdated before it says so, and applies nothing
more.
"""

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Final, get_args

import trio

from mirrorfs import contents
from mirrorfs.activity import Activity
from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.dirty import END, Extents, Located
from mirrorfs.core.epochs import Record, Standing
from mirrorfs.core.packing import unpack_record
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import JournalError, LinkLostError, ProtocolError
from mirrorfs.keeper import Keeper
from mirrorfs.lost import LostStore
from mirrorfs.peer import Link
from mirrorfs.resync.full import Target
from mirrorfs.resync.hashes import hashes
from mirrorfs.resync.quick_target import Returning
from mirrorfs.resync.reports import pack_wanted
from mirrorfs.syncing import Syncs
from mirrorfs.tree import Tree
from mirrorfs.witness import Witness

log = logging.getLogger(__name__)

_OPERATIONS: Final = frozenset(wire.OPERATION_OF)
_FILES_PER_FRAME: Final = 10_000
#: The disk of a target begins after so much, and not when the checkpoint at the end waits for it.
_WRITE_BACK_BYTES: Final = 8 << 20
_LIVE: Final = (*get_args(ops.Change), ops.Times, ops.Introduce)
#: What is applied as soon as it is read; all else has to wait for something.
_AT_ONCE: Final = frozenset(wire.KIND_OF[kind] for kind in (*_LIVE, ops.Sync))


class Standby:
    """This node while it follows a primary over one link.

    `before_first` is awaited before the first operation is applied: until then the kernel may hold what this node told it as
    a primary.
    """

    def __init__(
        self,
        tree: Tree,
        keeper: Keeper,
        activity: Activity,
        link: Link,
        nursery: trio.Nursery,
        *,
        target: Target | Returning | None,
        lost: LostStore,
        before_first: Callable[[], Awaitable[None]],
        syncs: Syncs,
    ) -> None:
        self._syncs = syncs
        self._failed: OSError | contents.PartialChangeError | None = None
        self.tree = tree
        self.target = target
        self.applied = 0
        self._told = 0  # how far the primary knows that this node has come
        self._silent = 0  # and that far it hears of it with the results of syncs
        self.bytes_copied = 0
        self._bytes_written_back = 0
        self._writing_back = trio.Lock()
        self.failure = ""
        self._keeper = keeper
        self._activity = activity
        self._new_from = 0
        self._link = link
        self._nursery = nursery
        self._before_first = before_first
        self._begun = False
        self._reign = link.streams
        self._is_timed = link.version >= wire.TIMED
        self._witness = Witness(tree, link, nursery, self._reign, lost)

    @property
    def in_sync(self) -> bool:
        """Whether this node has everything that was acknowledged."""
        return self.target is None

    @property
    def kind(self) -> str:
        """The resync that this node is the target of."""
        return "full" if isinstance(self.target, Target) else "quick"

    def handles(self, frame: Frame) -> bool:
        """Whether the frame belongs to the stream."""
        return frame.kind in _OPERATIONS

    def take_now(self, frame: Frame) -> bool:
        """Apply one frame of the stream if that needs no waiting; if not, `take` is to do it."""
        if frame.kind not in _AT_ONCE or self.target is not None or not self._begun:
            return False
        operation = self._in_order(frame)
        try:
            if isinstance(operation, ops.Sync):
                self._start_flush(operation, frame.sequence)
                if self.applied in (self._told, self._silent):
                    self._silent = frame.sequence
            else:
                self._apply(operation)
        except (OSError, contents.PartialChangeError) as error:
            self._failed = error
            return False
        self.applied = frame.sequence
        return True

    def _in_order(self, frame: Frame) -> ops.Operation:
        if frame.sequence != self.applied + 1:
            raise ProtocolError(f"number {frame.sequence} on the stream where {self.applied + 1} was due")
        return wire.decode_operation(frame)

    async def take(self, frame: Frame) -> None:
        """Apply one frame of the stream; LinkLostError after a divergence."""
        operation = self._in_order(frame)
        if not self._begun:
            await self._before_first()
            self._begun = True
        try:
            if self._failed is not None:
                raise self._failed
            match operation:
                case ops.Sync() | ops.Checkpoint():
                    self._start_flush(operation, frame.sequence)
                case ops.Compare():
                    self._start_compare(operation, frame.sequence)
                case ops.Marked():
                    self.tree.notes.peer_marked = operation.number
                case ops.Checkpointed():
                    self._activity.cleared(operation.number, self._new_from)
                    self._nursery.start_soon(self._save_activity)
                case _ if self.in_sync and self._witness.handles(operation):
                    await self._witness.take(operation, frame.sequence)
                case _:
                    if isinstance(operation, ops.Entry) and isinstance(self.target, Returning):
                        await self._mark_lacked(operation, self.target)
                    self._apply(operation)
                    if isinstance(operation, ops.NamesEqual) and isinstance(self.target, Returning):
                        await self.target.empty_aside()
        except contents.PartialChangeError as partly:
            await self._diverged(operation, frame.sequence, partly.error)
        except OSError as error:
            await self._diverged(operation, frame.sequence, error)
        self.applied = frame.sequence

    def _apply(self, operation: ops.Operation) -> None:
        if self.target is not None and self.target.handles(operation):
            self.target.apply(operation)
            if isinstance(operation, ops.CopyData):
                self.bytes_copied += len(operation.data)
            elif isinstance(operation, ops.Whole):
                self.bytes_copied += sum(len(file.data) for file in operation.files)
            if self.bytes_copied - self._bytes_written_back >= _WRITE_BACK_BYTES and not self._writing_back.locked():
                self._bytes_written_back = self.bytes_copied
                self._nursery.start_soon(self._write_back)
        elif not isinstance(operation, _LIVE):
            raise ProtocolError(f"{type(operation).__name__} outside a resync")
        elif isinstance(operation, ops.Write | ops.CopyRange):
            contents.apply_all(operation, self.tree.apply)
        else:
            self.tree.apply(operation)
            if isinstance(operation, ops.MakeNode | ops.Symlink):
                self.tree.table.pin(self.tree.table.get(operation.file))

    async def _mark_lacked(self, entry: ops.Entry, target: Returning) -> None:
        """A file that should be here is about to be made: if the resync ends before its data is here, the next one must know.

        What is newer than this node's set is brought over in any case.
        """
        dirty = self._activity.dirty
        if entry.file >= dirty.head.new_from or not target.lacks(entry):
            return
        above = self.tree.table.handle(self.tree.table.get(entry.parent))
        located = Located(entry.file, b"", entry.parent, above, entry.name)
        await self._activity.make_durable([located, Extents(entry.file, 0, END)])
        dirty.now.file(entry.file).tail = 0
        await trio.lowlevel.checkpoint_if_cancelled()  # the link may have ended meanwhile, and this node may lead

    def acknowledge(self) -> None:
        """Tell the primary how far this node has come."""
        if isinstance(self.target, Returning):
            self._tell_files(Kind.LACKED, self.target.lacked)
            for message in pack_wanted(self.target.wanted):
                self._answer(Kind.WANTED, message)
            self.target.wanted.clear()
        elif self.target is not None:
            self._tell_files(Kind.KEPT, self.target.kept)
        if self.applied not in (self._told, self._silent):
            self._told = self.applied
            spent_us = int((perf_counter() - self._link.read_at) * 1e6) if self._is_timed else 0
            self._link.send(wire.encode(Frame(Kind.ACK, self.applied, spent_us, self._reign)))

    def _tell_flushed(self, sequence: int, read_at: float) -> None:
        """The sync is done that was read at that moment."""
        self._told = self.applied
        spent_us = int((perf_counter() - read_at) * 1e6) if self._is_timed else None
        self._link.send(wire.encode_flushed(sequence, self.applied, self._reign, spent_us))

    async def _save_activity(self) -> None:
        """Nobody waits for it: what stands on disk until then says more than need be."""
        with suppress(JournalError):  # then the daemon ends, as `Keeper.failed` had it
            await self._activity.save()

    def _tell_files(self, kind: Kind, files: list[int]) -> None:
        for at in range(0, len(files), _FILES_PER_FRAME):
            self._answer(kind, files[at : at + _FILES_PER_FRAME])
        files.clear()

    def _answer(self, kind: Kind, content: object) -> None:
        self._link.send(wire.encode_message(kind, content, offset=self._reign))

    async def _diverged(self, operation: ops.Operation, sequence: int, error: OSError) -> None:
        what = f"{type(operation).__name__} {sequence} failed here: {error.strerror}"
        resyncing = self.target is not None
        self.failure = what
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            await self._activity.distrust()  # the trees differ where nobody knows of it
        await self._keeper.stand(Standing.RESYNCING if resyncing else Standing.OUTDATED, f"{what} ({moment})")
        log.error("out of sync: %s", what, extra={"event": "out-of-sync", "node_out_of_sync": self._keeper.me().node})
        self._link.send_message(Kind.FAILED, what)
        await trio.lowlevel.checkpoint()
        self._link.close(what)
        raise LinkLostError(what)

    # ---- syncs run in threads and are acknowledged by themselves, so that a slow disk never blocks the changes behind them

    def _start_flush(self, operation: ops.Flush, sequence: int) -> None:
        read_at = self._link.read_at
        if isinstance(operation, ops.Checkpoint):
            self._new_from = operation.new_from
            self.tree.notes.checkpoint = operation.number
            self._nursery.start_soon(self._flush, sequence, read_at, self.tree.syncfs, None, operation.number)
            return
        known = self.tree.table.find(operation.file)
        if known is None or known.gone:
            self._nursery.start_soon(self._flush, sequence, read_at, self.tree.write_back, None)
            return
        version = known.version
        descriptor = self.tree.table.hold_to_sync(known)

        def done() -> None:
            known.synced = max(known.synced, version)
            if known.is_directory:
                os.close(descriptor)
            self.tree.table.let_go(known)

        def ended(code: int) -> None:
            done()
            if code < 0:
                # At once: of several syncs of a file that end together, the kernel lets one fail.
                self.failure = f"a sync failed here: {os.strerror(-code)}"
                self._nursery.start_soon(self.sync_failed, OSError(-code, os.strerror(-code)))
            elif not self.failure:
                self._tell_flushed(sequence, read_at)

        if self._syncs.begin(descriptor, operation.data_only, ended):
            return
        sync = partial(os.fdatasync if operation.data_only else os.fsync, descriptor)
        self._nursery.start_soon(self._flush, sequence, read_at, sync, done)

    async def _flush(
        self,
        sequence: int,
        read_at: float,
        sync: Callable[[], None],
        done: Callable[[], None] | None,
        checkpoint: int = 0,
    ) -> None:
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(sync)
            if checkpoint:
                async with self._writing_back:
                    pass  # what it was told is not told again
        except OSError as error:
            with trio.CancelScope(shield=True):
                await self.sync_failed(error)
            return
        finally:
            if done is not None:
                done()
        if self.failure:
            return
        if checkpoint:
            await self._activity.synced(checkpoint, self._keeper.record.volume_id)
        self._tell_flushed(sequence, read_at)

    async def _write_back(self) -> None:
        async with self._writing_back:
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(self.tree.write_back)
                except OSError as error:
                    await self.sync_failed(error)

    def _start_compare(self, compare: ops.Compare, sequence: int) -> None:
        known = self.tree.table.get(compare.file)
        descriptor = os.dup(self.tree.table.data(known))
        self._nursery.start_soon(self._compare, compare, sequence, descriptor)

    async def _compare(self, compare: ops.Compare, sequence: int, descriptor: int) -> None:
        try:
            answer = await trio.to_thread.run_sync(hashes, descriptor, compare.offset, compare.size)
        except OSError as error:
            await self.sync_failed(error)
            return
        finally:
            os.close(descriptor)
        self._link.send(wire.encode(Frame(Kind.HASHES, sequence, offset=self._reign, payload=answer)))

    async def sync_failed(self, error: OSError) -> None:
        """A sync failed, and is never tried again: the kernel has dropped what it could not write."""
        self.failure = f"a sync failed here: {error.strerror}"
        await self._keeper.stand(Standing.OUTDATED, self.failure)
        log.error("out of sync: %s", self.failure, extra={"event": "out-of-sync", "node_out_of_sync": self._keeper.me().node})
        self._link.close(self.failure)

    # ---- joining

    async def join(self, theirs: Record) -> None:
        """The copy is complete and this node is in the in-sync set: know it durably, then say so."""
        self._activity.cleared(self._activity.dirty.head.number, self._new_from)
        await self._activity.save()
        await self._keeper.adopt(theirs, Standing.IN_SYNC, "")
        target, self.target = self.target, None
        self.tree.table.begin_era()
        self._link.send_message(Kind.JOINED)
        if target is not None:
            # Not awaited: the primary waits for this node's acknowledgements already.
            self._nursery.start_soon(target.clean_up)


def record_in(frame: Frame) -> Record:
    """The record that a frame carries; ProtocolError if it is none."""
    return record_of(wire.message(frame), frame.kind)


def record_of(content: Any, kind: Kind) -> Record:
    """The record in the content of a frame of that kind; ProtocolError if it is none."""
    try:
        record = unpack_record(content)
        if not record.epochs or not record.volume_id:
            raise ValueError("no epochs")
        return record
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"a malformed {kind.name}: {error!r}") from error
