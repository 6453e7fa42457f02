"""A full copy while the application runs, inside the ordered stream.

The source introduces files by `Entry` and sends their data by `CopyData`, both as they stand at that point of the stream. A
live change to a file that has been introduced follows on the stream; a change to one that has not is left out, since the copy
will read the result of it later. A change of names becomes what stands there now: `Entry` for a name that holds something,
`Vanish` for one that does not. So at the moment when nothing is left to introduce or to copy, the trees are equal at that point
of the stream, and nothing had to be frozen.

Two invariants carry this. Every directory that was introduced stands at the target where it stands at the source; and no file
that was introduced is deleted at the target while the source may still introduce another name of it: it waits in `orphans`.
"""

import errno
import logging
import os
import stat
from collections import deque
from collections.abc import Callable
from typing import assert_never

from mirrorfs.config import ResyncConfig
from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.resync.making import Maker
from mirrorfs.resync.sending import DEFAULT, Sender, ids_in
from mirrorfs.resync.survey import Survey, data_bytes
from mirrorfs.search import name_in
from mirrorfs.stream import Stream
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)


class Copier(Sender):
    """The source's side. `introduced` are the files that the target knows by id; `note_unsettled` takes an id whose times the
    target must be told once more."""

    kind = "full"

    def __init__(
        self, tree: Tree, stream: Stream, *, settings: ResyncConfig = DEFAULT, note_unsettled: Callable[[int], None]
    ) -> None:
        super().__init__(tree, stream, settings)
        self._survey: Survey | None = None
        self._unlisted = 0
        self._estimates: dict[int, int] = {}
        self.introduced: set[int] = set()
        self._note_unsettled = note_unsettled
        self._directories: deque[int] = deque()
        self._files: deque[int] = deque()
        self._held: dict[int, Known] = {}
        self._entered: dict[int, int] = {}
        self._kept: set[int] = set()
        self._finished = False

    @property
    def expected(self) -> tuple[int, int] | None:
        """How many bytes and files there are in all: what was found, once every directory was listed; before that, what a
        survey has counted."""
        if self.introduced and not self._unlisted:
            return self.bytes_found, self.files_found
        counted = self._survey.counted if self._survey else None
        return counted and (max(counted[0], self.bytes_found), max(counted[1], self.files_found))

    # ---- live changes

    def tells(self, change: ops.Change) -> bool:
        """Whether the target is told of a live change as it is: never, `send` does it."""
        return False

    def send(self, change: ops.Change, lost: Known | None) -> int:
        """Send what the target needs of a change that was just made here; returns the last sequence number (0: nothing).

        `lost` is the file that lost a name by it.
        """
        match change:
            case ops.MakeNode() | ops.Symlink() | ops.Link():
                self._name_holds(change.parent, change.name)
            case ops.Unlink() | ops.RemoveDirectory():
                self._vanish(change.parent, change.name, gone=lost is not None and lost.gone)
            case ops.Rename():
                self._name_holds(change.new_parent, change.new_name, moved=True)
                if change.flags & ops.RENAME_EXCHANGE or self._is_still_there(change.parent, change.name):
                    self._name_holds(change.parent, change.name, moved=True)
                else:
                    self._vanish(change.parent, change.name)
            case ops.Write() | ops.SetAttributes() | ops.SetXattr() | ops.RemoveXattr() | ops.Allocate():
                if change.file in self.introduced:
                    return self.stream.put(change)
                return 0
            case ops.CopyRange():  # the target may not have the source's data yet: a primary makes none now
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            case _:
                assert_never(change)
        return self.stream.sent

    def _name_holds(self, parent: int, name: bytes, *, moved: bool = False) -> None:
        """Tell what stands under a name now, if the target has the directory or has the file elsewhere."""
        known = self.tree.lookup(parent, name)
        if moved and known.id in self.introduced:
            self._introduce_directory(parent)
        if parent in self.introduced:
            self.introduce(parent, name, known)
        else:
            self.tree.table.drop_unused(known)

    def _is_still_there(self, parent: int, name: bytes) -> bool:
        """Whether the old name of a rename leads to a file yet: rename(2) does nothing with two names of one file."""
        try:
            self.tree.peek(self.tree.table.get(parent), name)
        except FileNotFoundError:
            return False
        return True

    def _introduce_directory(self, number: int) -> None:
        """Introduce a directory and those above it: something that the target has was moved there."""
        if number in self.introduced:
            return
        known = self.tree.table.get(number)
        parent = self.tree.parent_of(known)
        self._introduce_directory(parent)
        self.introduce(parent, self.tree.name_in(parent, known), known)

    def _vanish(self, parent: int, name: bytes, *, gone: bool = False) -> None:
        if parent in self.introduced:
            self.stream.put(ops.Vanish(parent, name, gone))

    # ---- the copy

    def introduce(self, parent: int, name: bytes, known: Known) -> None:
        """Send the entry of a file as it stands; its data or its names are queued if this is its first mention."""
        first = known.id not in self.introduced
        status = self.put_entry(parent, name, known, self.xattrs_of(known) if first else ())
        regular, directory = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
        if parent:
            self._note_unsettled(parent)
            if known.lookups:
                known.add_name(parent, name, oldest=True)  # one more way to introduce it later
        if not first:
            return
        self.introduced.add(known.id)
        self._note_unsettled(known.id)
        self.files_found += 1
        if directory:
            self._unlisted += not self._finished
            self._queue(self._directories, known)
        elif regular and status.st_size:
            self.bytes_found += data_bytes(status)
            self._estimates[known.id] = data_bytes(status)
            self._entered[known.id] = self.stream.sent
            self._queue(self._files, known)
        else:
            self.files_done += 1

    def _queue(self, queue: deque[int], known: Known) -> None:
        if self._finished:
            self.files_done += 1
            return  # made since: it was empty then, and all that came after is on the stream
        known.kept += 1
        self._held[known.id] = known
        queue.append(known.id)

    def _done(self, known: Known) -> None:
        del self._held[known.id]
        known.kept -= 1
        self.files_done += 1
        self.tree.table.drop_unused(known)

    async def run(self) -> None:
        """Introduce and copy everything; afterwards the trees are equal at this point of the stream."""
        try:
            root = self.tree.table.get(ids.ROOT)
            self._survey = Survey(self.tree.root)
            self.introduce(0, b"", root)
            while self._files or self._directories:
                if self._files:
                    known = self._held[self._files.popleft()]
                    await self._copy_file(known)
                else:
                    known = self._held[self._directories.popleft()]
                    await self._copy_directory(known)
                    self._unlisted -= 1
                self._note_unsettled(known.id)
                self._done(known)
            self._finished = True
        finally:
            if self._survey is not None:
                self._survey.stop()
            for known in list(self._held.values()):
                self._done(known)

    async def _copy_directory(self, directory: Known) -> None:
        if directory.gone:
            return
        names = self.tree.names(directory)
        for count, name in enumerate(names):
            if count % 16 == 0:
                await self.pace()
                if directory.gone:
                    return
            try:
                known = self.tree.lookup(directory.id, name)
            except FileNotFoundError:
                continue  # gone since; if it was introduced, the live change has told
            self.introduce(directory.id, name, known)
        self.stream.put(ops.DirectoryDone(directory.id))

    async def _copy_file(self, known: Known) -> None:
        """Send the data of one file, its holes left out; whatever is written meanwhile is on the stream already.

        What the target has kept of a file is compared, and only blocks that differ are sent. It says so before it acknowledges.
        """
        before = self.bytes_done
        await self.stream.applied(self._entered.pop(known.id, 0))
        if known.id in self._kept:
            await self.compare_range(known, 0, self.tree.stat(known).st_size)
        else:
            await self.copy_range(known, 0, 1 << 63, holes=False)
        self.put_capability(known)
        self.settle_estimate(self._estimates.pop(known.id), before)

    def on_frame(self, frame: Frame) -> bool:
        """Take in what the target answers; False if it is no answer to a full copy."""
        if frame.kind is not Kind.KEPT:
            return super().on_frame(frame)
        self._kept.update(ids_in(frame))  # the target has these files there already
        return True


class Target(Maker):
    """The target's side: applies the copy and the live changes between it.

    `stale` holds, for each directory that was here before, the names that the source has not spoken of; `kept` are files that
    were here already, with data that may or may not be the source's, since it was last emptied.
    """

    def __init__(self, tree: Tree, orphans: int) -> None:
        super().__init__(tree, orphans)
        self.stale: dict[int, set[bytes]] = {}
        self.kept: list[int] = []

    def handles(self, operation: ops.Operation) -> bool:
        """Whether the operation is one of the resync: all are."""
        return True

    def apply(self, change: ops.Operation) -> None:
        """Apply one operation of the stream while the copy runs; OSError if this node cannot hold it."""
        match change:
            case ops.Entry():
                self._entry(change)
            case ops.CopyData():
                self.copy_data(change)
            case ops.CopyHole():
                self.copy_hole(change)
            case ops.Vanish():
                self._clear(change.parent, change.name, gone=change.gone)
            case ops.DirectoryDone():
                self._directory_done(change.directory)
            case ops.Write() | ops.SetAttributes() | ops.SetXattr() | ops.RemoveXattr() | ops.Allocate():
                self.tree.apply(change)
            case _:
                raise OSError(errno.EPROTO, f"{type(change).__name__} during a resync")

    def _entry(self, entry: ops.Entry) -> None:
        if entry.file == ids.ROOT:
            self._root(entry)
            return
        known = self.tree.table.find(entry.file)
        if known is not None and self.tree.table.is_pinned(known):
            if self._introduced_here(entry.parent, entry.name) is not known:
                self._place(known, entry)
            return
        if stat.S_ISDIR(entry.mode) and self._is_stale_directory(entry.parent, entry.name):
            known = self._reuse_directory(entry)
        elif stat.S_ISREG(entry.mode) and self._is_stale_copy(entry):
            known = self._reuse_file(entry)
        else:
            self._clear(entry.parent, entry.name)
            known = self.make(entry)
        self.tree.table.pin(known)

    def _root(self, entry: ops.Entry) -> None:
        root = self.tree.table.get(ids.ROOT)
        self.tree.table.pin(root)
        self.stale[ids.ROOT] = set(self.tree.names(root))
        self.attributes(root, entry)

    def _introduced_here(self, parent: int, name: bytes) -> Known | None:
        """The file that the source has put under this name. The ids of what was here before do not count."""
        if name in self.stale.get(parent, ()):
            return None
        try:
            return self.tree.lookup(parent, name)
        except FileNotFoundError:
            return None

    def _is_stale_directory(self, parent: int, name: bytes) -> bool:
        if name not in self.stale.get(parent, ()):
            return False
        directory = self.tree.table.descriptor(self.tree.table.get(parent))
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)

    def _place(self, known: Known, entry: ops.Entry) -> None:
        """A file that is here already gets one more name; a directory moves."""
        self._clear(entry.parent, entry.name)
        directory = self.tree.table.descriptor(self.tree.table.get(entry.parent))
        if known.is_directory:
            above = os.open("..", os.O_PATH | os.O_DIRECTORY, dir_fd=self.tree.table.descriptor(known))
            try:
                name = name_in(above, self.tree.stat(known).st_ino)
                os.rename(name, entry.name, src_dir_fd=above, dst_dir_fd=directory)
            finally:
                os.close(above)
        else:
            self.tree.apply(ops.Link(known.id, entry.parent, entry.name))

    def _is_stale_copy(self, entry: ops.Entry) -> bool:
        """Whether an earlier copy, or an earlier life of the pair, has left this very file there."""
        if entry.name not in self.stale.get(entry.parent, ()):
            return False
        return self.tree.peek(self.tree.table.get(entry.parent), entry.name)[0] == entry.file

    def _reuse_file(self, entry: ops.Entry) -> Known:
        """The file keeps its data, which the source will compare with its own."""
        self.stale[entry.parent].discard(entry.name)
        self.tree.table.unbind(entry.file)
        known = self.tree.lookup(entry.parent, entry.name)
        self.attributes(known, entry)
        self.resize(known, entry.size)
        self.kept.append(entry.file)
        return known

    def _reuse_directory(self, entry: ops.Entry) -> Known:
        """A directory of the same name was here: it becomes the source's, and its names have to be spoken of."""
        self.stale[entry.parent].discard(entry.name)
        above = self.tree.table.descriptor(self.tree.table.get(entry.parent))
        descriptor = os.open(entry.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        self.tree.stamp(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_ino, entry.file)
        self.tree.table.unbind(entry.file)
        known = self.tree.table.add(entry.file, stat.S_IFDIR, descriptor)
        self.stale[entry.file] = set(self.tree.names(known))
        self.attributes(known, entry)
        return known

    def _clear(self, parent: int, name: bytes, *, gone: bool = False) -> None:
        """Take away whatever stands under a name: what may still be needed waits in `orphans`."""
        here = self._introduced_here(parent, name)
        directory = self.tree.table.descriptor(self.tree.table.get(parent))
        self.stale.get(parent, set()).discard(name)
        try:
            is_directory = stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return
        if is_directory or (here is not None and not gone):
            self.set_aside(self.tree.table.get(parent), name)
        else:
            os.unlink(name, dir_fd=directory)
            if here is not None:
                here.gone = self.tree.stat(here).st_nlink == 0

    def _directory_done(self, number: int) -> None:
        for name in list(self.stale.pop(number, ())):
            self._clear(number, name)
