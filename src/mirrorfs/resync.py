"""Bringing a peer to the same tree while the application runs: a plain full copy, inside the ordered stream.

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
import shutil
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, assert_never

import trio

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.stream import Stream
from mirrorfs.table import Known
from mirrorfs.tree import RENAME_EXCHANGE, Tree

log = logging.getLogger(__name__)

_PIECE: Final = 512 << 10
#: What may be on its way at once: a live change waits behind no more than this.
_MAX_IN_FLIGHT: Final = 4 << 20
_ENTRY_COST: Final = 4 << 10
_MAX_XATTRS: Final = 3 << 20


class Copier:
    """The source's side. `introduced` are the files that the target knows by id; `note_unsettled` takes an id whose times the
    target must be told once more."""

    def __init__(self, tree: Tree, stream: Stream, *, note_unsettled: Callable[[int], None]) -> None:
        self.tree = tree
        self.stream = stream
        self.introduced: set[int] = set()
        self.files_done = self.bytes_done = 0
        self.files_found = self.bytes_found = 0
        self._note_unsettled = note_unsettled
        self._directories: deque[int] = deque()
        self._files: deque[int] = deque()
        self._held: dict[int, Known] = {}
        self._on_the_way: deque[tuple[int, int]] = deque()
        self._on_the_way_bytes = 0
        self._finished = False

    # ---- live changes

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
                if change.flags & RENAME_EXCHANGE:
                    self._name_holds(change.parent, change.name, moved=True)
                else:
                    self._vanish(change.parent, change.name)
            case ops.Write() | ops.SetAttributes() | ops.SetXattr() | ops.RemoveXattr():
                if change.file in self.introduced:
                    return self.stream.put(change)
                return 0
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
        status = self.tree.stat(known)
        first = known.id not in self.introduced
        regular, directory = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
        xattrs = tuple((key, self.tree.xattr(known, key)) for key in self.tree.xattrs(known)) if first else ()
        if sum(len(key) + len(value) for key, value in xattrs) > _MAX_XATTRS:
            raise OSError(errno.E2BIG, f"the extended attributes of {os.fsdecode(name)!r} are too large to be copied")
        self.stream.put(
            ops.Entry(
                parent,
                name,
                known.id,
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                status.st_size if regular else 0,
                self.tree.readlink(known) if stat.S_ISLNK(status.st_mode) else b"",
                xattrs,
            )
        )
        if parent:
            self._note_unsettled(parent)
            if known.lookups and (parent, name) not in known.names:
                known.names.insert(0, (parent, name))  # one more way to introduce it later
        if not first:
            return
        self.introduced.add(known.id)
        self._note_unsettled(known.id)
        self.files_found += 1
        if directory:
            self._queue(self._directories, known)
        elif regular and status.st_size:
            self.bytes_found += status.st_blocks * 512
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
            self.introduce(0, b"", root)
            while self._files or self._directories:
                if self._files:
                    known = self._held[self._files.popleft()]
                    await self._copy_file(known)
                else:
                    known = self._held[self._directories.popleft()]
                    await self._copy_directory(known)
                self._note_unsettled(known.id)
                self._done(known)
            self._finished = True
        finally:
            for known in list(self._held.values()):
                self._done(known)

    async def _copy_directory(self, directory: Known) -> None:
        if directory.gone:
            return
        names = self.tree.names(directory)
        for count, name in enumerate(names):
            if count % 16 == 0:
                await self._pace()
                if directory.gone:
                    return
            try:
                known = self.tree.lookup(directory.id, name)
            except FileNotFoundError:
                continue  # gone since; if it was introduced, the live change has told
            self.introduce(directory.id, name, known)
        self.stream.put(ops.DirectoryDone(directory.id))

    async def _copy_file(self, known: Known) -> None:
        """Send the data of one file, its holes left out; whatever is written meanwhile is on the stream already."""
        offset = 0
        while not known.gone:
            descriptor = self.tree.table.data(known)
            try:
                start = os.lseek(descriptor, offset, os.SEEK_DATA)
                end = os.lseek(descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            data = await self._read(known, start, min(_PIECE, end - start))
            if data:
                self.stream.put(ops.CopyData(known.id, start, data))
                self.bytes_done += len(data)
            offset = start + max(len(data), 1)
            await self._pace(len(data))

    async def _read(self, known: Known, offset: int, size: int) -> bytes:
        """Read a piece as it stands at this point of the stream: no await follows the read that counts."""
        data = self.tree.read_cached(known, offset, size)
        if data is not None:
            return data
        version = known.version
        descriptor = self.tree.table.hold(known)
        try:
            data = await trio.to_thread.run_sync(os.pread, descriptor, size, offset)
            # If it was written meanwhile it is in memory now, or soon is: read it here.
            return data if known.version == version else os.pread(descriptor, size, offset)
        finally:
            self.tree.table.let_go(known)

    async def _pace(self, cost: int = _ENTRY_COST) -> None:
        """Leave room for the application: bound what is on its way, and give others their turn."""
        self._on_the_way.append((self.stream.sent, cost))
        self._on_the_way_bytes += cost
        while self._on_the_way_bytes > _MAX_IN_FLIGHT and not self.stream.broken:
            sequence, size = self._on_the_way.popleft()
            await self.stream.applied(sequence)
            self._on_the_way_bytes -= size
        await trio.lowlevel.checkpoint()


class Target:
    """The target's side: applies the copy and the live changes between it.

    `stale` holds, for each directory that was here before, the names that the source has not spoken of.
    """

    def __init__(self, tree: Tree, orphans: int) -> None:
        self.tree = tree
        self.stale: dict[int, set[bytes]] = {}
        self._orphans = orphans
        self._count = 0

    def apply(self, change: ops.Operation) -> None:
        """Apply one operation of the stream while the copy runs; OSError if this node cannot hold it."""
        match change:
            case ops.Entry():
                self._entry(change)
            case ops.CopyData():
                self._copy_data(change)
            case ops.Vanish():
                self._clear(change.parent, change.name, gone=change.gone)
            case ops.DirectoryDone():
                self._directory_done(change.directory)
            case ops.Write() | ops.SetAttributes() | ops.SetXattr() | ops.RemoveXattr():
                self.tree.apply(change)
            case _:
                raise OSError(errno.EPROTO, f"{type(change).__name__} during a resync")

    def _copy_data(self, change: ops.CopyData) -> None:
        written = self.tree.apply(ops.Write(change.file, change.offset, change.data))
        if written < len(change.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

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
        else:
            self._clear(entry.parent, entry.name)
            known = self._make(entry)
        self.tree.table.pin(known)

    def _root(self, entry: ops.Entry) -> None:
        root = self.tree.table.get(ids.ROOT)
        self.tree.table.pin(root)
        self.stale[ids.ROOT] = set(self.tree.names(root))
        self._attributes(root, entry)

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
                os.rename(self._own_name(above, known), entry.name, src_dir_fd=above, dst_dir_fd=directory)
            finally:
                os.close(above)
        else:
            self.tree.apply(ops.Link(known.id, entry.parent, entry.name))

    def _own_name(self, above: int, known: Known) -> bytes:
        wanted = self.tree.stat(known).st_ino
        readable = os.open(f"/proc/self/fd/{above}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(readable) as entries:
                for entry in entries:
                    if entry.inode() == wanted:
                        return os.fsencode(entry.name)
        finally:
            os.close(readable)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _reuse_directory(self, entry: ops.Entry) -> Known:
        """A directory of the same name was here: it becomes the source's, and its names have to be spoken of."""
        self.stale[entry.parent].discard(entry.name)
        above = self.tree.table.descriptor(self.tree.table.get(entry.parent))
        descriptor = os.open(entry.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        self.tree.stamp(descriptor, os.fstat(descriptor).st_ino, entry.file)
        self.tree.table.unbind(entry.file)
        known = self.tree.table.add(entry.file, stat.S_IFDIR, descriptor)
        self.stale[entry.file] = set(self.tree.names(known))
        self._attributes(known, entry)
        return known

    def _make(self, entry: ops.Entry) -> Known:
        self.tree.table.unbind(entry.file)
        if stat.S_ISLNK(entry.mode):
            known: Known = self.tree.apply(
                ops.Symlink(entry.parent, entry.name, entry.file, entry.target, entry.uid, entry.gid)
            )
        else:
            known = self.tree.apply(
                ops.MakeNode(entry.parent, entry.name, entry.file, entry.mode, entry.uid, entry.gid, entry.rdev)
            )
            if entry.size:
                self.tree.apply(ops.SetAttributes(entry.file, size=entry.size))
        self._attributes(known, entry)
        return known

    def _attributes(self, known: Known, entry: ops.Entry) -> None:
        wanted = dict(entry.xattrs)
        for name in self.tree.xattrs(known):
            if name not in wanted:
                self.tree.apply(ops.RemoveXattr(known.id, name))
        self.tree.apply(ops.SetAttributes(known.id, uid=entry.uid, gid=entry.gid))
        if not stat.S_ISLNK(entry.mode):
            self.tree.apply(ops.SetAttributes(known.id, mode=entry.mode))
        for name, value in wanted.items():
            self.tree.apply(ops.SetXattr(known.id, name, value))

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
            self._count += 1
            os.rename(name, b"%d" % self._count, src_dir_fd=directory, dst_dir_fd=self._orphans)
        else:
            os.unlink(name, dir_fd=directory)
            if here is not None:
                here.gone = self.tree.stat(here).st_nlink == 0

    def _directory_done(self, number: int) -> None:
        for name in list(self.stale.pop(number, ())):
            self._clear(number, name)

    async def clean_up(self) -> None:
        """The copy is complete and a new era has begun: what waits in `orphans` goes, and what nobody needs in the table."""
        for count, known in enumerate(self.tree.table.all()):
            self.tree.table.drop_unused(known)
            if count % 1000 == 999:
                await trio.lowlevel.checkpoint()
        try:
            await trio.to_thread.run_sync(empty_orphans, self._orphans)
        except OSError as error:
            log.warning("cannot delete what the resync has set aside: %s", error)


def empty_orphans(orphans: int) -> None:
    """Delete what a resync has set aside. Blocks: call it from a worker thread."""
    for name in os.listdir(orphans):
        try:
            os.unlink(name, dir_fd=orphans)
        except IsADirectoryError:
            with suppress(FileNotFoundError):
                shutil.rmtree(name, dir_fd=orphans)
