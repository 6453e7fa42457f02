"""A change of the primary: apply it here, put it on the stream, wait for the peer, answer.

What lies between two awaits is atomic. `Changes.change` applies, numbers and sends with no await in between, so the order of
the stream is the order in which the changes happened here; a new `await` in `_make` would need a new argument for that.

All of it may run in a strand: what it waits for, it waits for by `pause`, or goes into a task before.
"""

import errno
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import trio

from mirrorfs import contents
from mirrorfs.activity import Activity
from mirrorfs.config import Config
from mirrorfs.core import operations as ops
from mirrorfs.core.modes import Mode
from mirrorfs.errors import FrozenError, NotPrimaryError
from mirrorfs.foresight import Foresight
from mirrorfs.introductions import Introductions
from mirrorfs.keeper import Keeper
from mirrorfs.marking import Marking
from mirrorfs.measures import EVERY, Measures, Sample
from mirrorfs.resync.full import Copier
from mirrorfs.resync.quick import CatchUp
from mirrorfs.settling import Settling
from mirrorfs.strand import in_task, interruptible
from mirrorfs.stream import Stream
from mirrorfs.syncing import Syncs
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)
#: Changes wait while more than this is on its way to a node that is being brought in sync.
_MAX_QUEUED_BYTES: Final = 32 << 20
#: What a file system answers that has gone down, or whose disk has.
_BAD_DISK: Final = frozenset((errno.EIO, errno.EROFS, errno.EUCLEAN, errno.ESHUTDOWN, errno.ENXIO, errno.ENODEV, errno.EBADMSG))


class Changes:
    """The changes of this node while it is the primary, with or without a peer; `mode` says what they wait for.

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
        measures: Measures,
    ) -> None:
        self.tree = tree
        self.keeper = keeper
        self.activity = activity
        self.mode = Mode.ALONE
        self.stream: Stream | None = None
        self.copier: Copier | CatchUp | None = None
        self.loss = ""
        self.disk_is_bad = self.waits_for_grant = False
        self._settings, self._resync = config.replication, config.resync
        self._marking = Marking(tree, activity, self._admitted)
        self._disk_failed = disk_failed
        self._syncs = syncs
        self._measures = measures
        self._changed = trio.Event()
        self._frozen_at = math.inf
        self._introductions: Introductions | None = None
        self._times = Settling(tree, self._tell_times)
        self._flush_both = False
        self._foresight = Foresight(tree)

    # ---- what fuse_ops calls

    async def change(
        self, change: ops.Change, target: Known | None = None, *, only_if: Callable[[], bool] = lambda: True
    ) -> Any:
        """Make a change on both nodes and return what `Tree.apply` returns for it.

        A file that was made stays known until the next `await` of the caller, who tells the kernel of it before that.
        `target` is the file that a change of data or attributes is for. Unless `only_if` holds at the moment at which it would
        be made, nothing is. Raises OSError as the backing store gives it (EOPNOTSUPP for a copy that the peer cannot make),
        NotPrimaryError, FrozenError after `freeze_timeout`, or InterruptedError if the caller gives up before it is made.
        """
        sample = self._measures.begin_change()
        change = contents.bounded(change)
        if not self._is_open:
            change = ops.owned(change)
            await self._admitted(change)
        old_size = 0
        if self.activity.dirty.tracking:
            old_size, cold = self._marking.look(change, target)
            if cold:
                change = ops.owned(change)
                old_size = await self._marking.before(change, target)
        if not only_if():
            return None
        result, sequence, failure = self._make(change, target, old_size, sample)
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
        if sample is not None:
            self._measures.end_change(sample)
        return result

    async def write(self, known: Known, offset: int, data: bytes | bytearray | memoryview) -> int:
        """As `change` with a `Write`; returns the bytes written. Most of them go a shorter way."""
        size = len(data)
        dirty, measures = self.activity.dirty, self._measures
        if (
            self.mode is Mode.MIRRORED
            and not known.gone
            and known.id in self.there.known
            and size
            and (not dirty.tracking or dirty.is_hot(known.id, offset, size))
        ):
            # No await from here to the stream, as in `_make`; whatever is not as it should be is left to that.
            assert self.stream is not None
            descriptor = self.tree.table.data(known)
            if self._foresight.may_write(offset, size):
                known.version += 1
                measures.changes += 1
                sample = None if measures.changes % EVERY else Sample()  # as `begin_change`, without the call
                sequence = self.stream.put_write(known.id, offset, data)
                if sample is not None:
                    self.stream.note(sequence, sample.answered)
                    sample.makes()
                if known.id < dirty.new_from and dirty.tracking:
                    dirty.now.write(known.id, offset, size)
                self._times.add_known(known)
                failure = self._write_told(descriptor, offset, data)
                if sample is not None:
                    sample.made()
                await self._acknowledged(sequence)
                if failure is not None:
                    raise failure
                measures.bytes_written += size
                if sample is not None:
                    measures.end_change(sample)
                return size
        count: int = await self.change(ops.Write(known.id, offset, data), known)
        measures.bytes_written += count
        return count

    def _write_told(self, descriptor: int, offset: int, data: bytes | bytearray | memoryview) -> OSError | None:
        """Write what the peer was told of; returns what failed."""
        try:
            if os.pwrite(descriptor, data, offset) == len(data):
                return None
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as failed:
            error = failed
        self._not_made(error)
        return error

    def _not_made(self, error: OSError) -> None:
        """The peer was told of a change that could not be made here, and that is marked: it is brought to the same tree again.
        Who asked for it hears of the failure once the peer is out of the in-sync set."""
        self._foresight.was_wrong()
        if error.errno in _BAD_DISK:
            self.disk_failed(error)  # the other node has everything: it takes over
            return
        assert self.stream is not None
        self.stream.link.close(f"a change that the other node was told of failed here: {error.strerror}")

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

    def _make(
        self, change: ops.Change, target: Known | None, old_size: int, sample: Sample | None
    ) -> tuple[Any, int, OSError | None]:
        """Apply, number and send, or what is sure to succeed the other way round; no await in here."""
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
        sent = 0
        if told and self.copier is None and self._foresight.will_succeed(change):
            sent = self._send(change, sample=sample)
        if sample is not None:
            sample.makes()
        try:
            made, result, failure = contents.make(change, self.tree.apply)
        except OSError as error:
            if sent:
                self._marking.after(change, old_size)
                self._not_made(error)
                return None, sent, error
            self._note_failed(change, error, old_size, local)
            raise
        if sample is not None:
            sample.made()
        if isinstance(change, ops.Allocate | ops.CopyRange):
            self._foresight.look_again()
        if not sent:
            change = made
        elif made is not change:
            failure = failure or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._not_made(failure)
        if isinstance(result, Known) and result.gone and self._introductions is not None:
            self._introductions.known.discard(result.id)
        if local:
            return result, 0, failure
        self._marking.after(change, old_size)
        if not told:
            self._note_untold(change, old_size)
        if self.stream is not None:
            self._times.note(change)
        if sent:
            return result, sent, failure
        try:
            if told and isinstance(self.copier, CatchUp):
                self.copier.note_told(change)
            return result, self._send(change, result if isinstance(result, Known) else None, sample=sample), failure
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
        """fsync on both nodes at once; OSError if this node's disk failed.

        It may be given up in any freeze, also one that began meanwhile: it changes nothing, and an error only says that nobody
        knows whether what was written before is durable.
        """
        sample = self._measures.begin_sync()
        await self._admitted()
        stream, version = self.stream, known.version
        sequence = self._send_sync(known, data_only, sample)
        descriptor = self.tree.table.hold_to_sync(known)
        sample.makes()
        try:
            await self._syncs.sync(descriptor, data_only)
            sample.made()
            known.synced = max(known.synced, version)
            if sequence:
                assert stream is not None
                await stream.flushed(sequence)
            if self.disk_is_bad:  # the kernel tells one of several that wait for the same file
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            self.disk_failed(error)
            raise
        finally:
            if known.is_directory:
                os.close(descriptor)
            self.tree.table.let_go(known)
            if stream is not None:
                stream.forget_flush(sequence)
        if not sequence or stream is None or stream.broken:
            # Numbers of another stream mean nothing.
            await self._acknowledged(sequence if stream is self.stream else 0, may_give_up=True)
        self._measures.end_sync(sample)

    def _send_sync(self, known: Known, data_only: bool, sample: Sample) -> int:
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
        sample.sends()
        return self.stream.put_flush(ops.Sync(known.id, data_only), sample.answered)

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

    async def _admitted(self, change: ops.Change | None = None) -> None:
        """Wait until a change may begin: InterruptedError if who asked for it does not want to wait any more."""
        if self._is_open:
            return
        await in_task()
        while True:
            if self.mode is Mode.ENDED:
                raise NotPrimaryError("this node is not the primary any more")
            if self.mode is Mode.FROZEN:
                await self._wait_for_change(may_give_up=True)
            elif self.copier is not None and self.copier.stream.link.queued_bytes > _MAX_QUEUED_BYTES:
                await trio.sleep(0.005)
            elif change is not None and isinstance(self.copier, CatchUp):
                await self.copier.turns.take(change)
                change = None  # once
            else:
                return

    async def _acknowledged(self, sequence: int, *, may_give_up: bool = False) -> None:
        """Wait until the change with this number may be acknowledged.

        Without `may_give_up` until then, or to the end of a freeze, whatever the caller would like: the change is made here and
        the peer may have it, so EINTR, which says that nothing was done, would be a lie.
        """
        stream = self.stream
        while True:
            if self.mode is Mode.MIRRORED:
                if stream is not self.stream:
                    return  # the peer came in sync later, with this change in what was copied
                assert stream is not None
                if await stream.applied(sequence, answers=True):
                    return
                if self.mode is Mode.MIRRORED:
                    await self._wait_for_change(may_give_up=may_give_up)
            elif self.mode is Mode.ALONE:
                if not self.keeper.wrote_alone:
                    await in_task()
                    await self.keeper.note_written_alone()
                    continue
                return
            elif self.mode is Mode.ENDED:
                raise NotPrimaryError("this node is not the primary any more")
            else:
                await self._wait_for_change(may_give_up=may_give_up)

    async def _wait_for_change(self, *, may_give_up: bool = False) -> None:
        changed = self._changed  # of this moment, and not of that at which the task begins
        await in_task()
        with trio.move_on_at(self._frozen_at + self._settings.freeze_timeout_s if self._frozen_at < math.inf else math.inf):
            with interruptible() if may_give_up else nullcontext():
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

    def _send(self, change: ops.Change, lost: Known | None = None, sample: Sample | None = None) -> int:
        if self.stream is None:
            return 0
        if isinstance(self.copier, Copier):
            return self.copier.send(change, lost)
        if self.copier is not None and not self.copier.tells(change):
            return 0
        if sample is not None:
            sample.sends()
        sequence = self.stream.put(change)
        if sample is not None and self.mode is Mode.MIRRORED:  # else nobody waits for the peer
            self.stream.note(sequence, sample.answered)
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
