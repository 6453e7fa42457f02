"""FUSE requests -> operations -> replicate -> errno.

One class for all sessions. Reads are answered from this node's tree; changes go to the `Primary` of the node, and are refused
with EROFS while it has none. What the kernel may keep is long-lived on the primary, where nobody else changes files, and
nothing on any other node.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, Protocol

import pyfuse3
import trio

from mirrorfs import backing
from mirrorfs.answers import Answers, answered
from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.errors import NotPrimaryError
from mirrorfs.handles import Handle, Listing
from mirrorfs.privileges import cleared_by, group_of_new, in_group, mode_of_new, without_special
from mirrorfs.replication import Primary
from mirrorfs.space import Space
from mirrorfs.strand import done_in_part, in_task
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_CACHE_S: Final = 86_400
_ACL_ACCESS: Final = b"system.posix_acl_access"


class Host(Protocol):
    """The node, as the file system sees it."""

    @property
    def primary(self) -> Primary | None:
        """Set while this node is the primary."""

    @property
    def reign(self) -> int:
        """Grows each time that this node becomes the primary."""

    def new_id(self) -> int:
        """The id of a new file."""

    def space(self) -> Space:
        """The smaller of both nodes."""


class FuseOperations(pyfuse3.Operations):
    """The file system that applications see."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, tree: Tree, host: Host, answers: Answers) -> None:
        super().__init__()
        self._tree = tree
        self._answers = answers
        self._host = host
        self._files: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._next_handle = 1

    @property
    def handles(self) -> Collection[Handle]:
        """The files that applications have open."""
        return self._files.values()

    # ---- helpers

    @staticmethod
    def now_ns() -> int:
        """The time that utimensat(2) sets for UTIME_NOW, in nanoseconds since 1970."""
        return time.time_ns()

    def _primary(self, handle: Handle | None = None) -> Primary:
        primary = self._host.primary
        if primary is None:
            raise NotPrimaryError("this node is not the primary")
        if handle is not None and handle.reign != self._host.reign:
            # Opened before the other node was the primary: what its owner knows of the file may be history.
            raise NotPrimaryError("opened in an earlier reign of this node")
        return primary

    def _id(self, number: int) -> int:
        """The id of what the kernel knows by `number`."""
        return self._tree.table.get(number).id

    def _timeout_s(self, number: int = ids.ROOT) -> int:
        """How long the kernel may keep what it is told; nothing of what it knows by a provisional `number`."""
        return 0 if self._host.primary is None or ids.is_provisional(number) else _CACHE_S

    def _attributes(self, known: Known, number: int) -> Any:
        return self._answers.attributes(known.id, self._tree.stat(known), self._timeout_s(number))

    def _looked_up(self, parent: int, name: bytes, known: Known) -> Any:
        """The answer that makes the kernel know a file under a name."""
        status = self._tree.stat(known)
        entry = self._answers.entry(known.id, status, self._timeout_s())
        known.lookups += 1
        if name not in (b".", b".."):
            self._named(known, (parent, name), status)
        return entry

    def _named(self, known: Known, place: tuple[int, bytes], status: os.stat_result) -> None:
        known.add_name(*place)
        known.special = bool(status.st_mode & (stat.S_ISUID | stat.S_ISGID))

    def _numbered(self, what: Handle) -> int:
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self._files[number] = what
        return number

    # ---- names

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> Any:
        parent = self._id(parent_inode)
        try:
            known = self._tree.lookup(parent, name)
        except FileNotFoundError:
            timeout_s = self._timeout_s()
            nothing = self._answers.nothing(timeout_s) if timeout_s else None
            if nothing is None:
                raise
            return nothing
        return self._looked_up(parent, name, known)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self.forgotten(inode_list)

    def forgotten(self, inode_list: Iterable[tuple[int, int]]) -> None:
        """The kernel has forgotten these numbers so many times each."""
        for number, count in inode_list:
            if number != ids.ROOT:
                try:
                    self._tree.table.forgotten(number, count)
                except OSError as error:
                    log.error("cannot close what the kernel forgot: %s", error)

    @answered
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext) -> Any:
        return await self._make(self._id(parent_inode), name, mode, rdev, ctx)

    @answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Any:
        return await self._make(self._id(parent_inode), name, mode, 0, ctx)

    async def _make(self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext) -> Any:
        primary = self._primary()
        mode = mode_of_new(self._tree, parent, mode, ctx)
        gid, inherits = group_of_new(self._tree, parent, ctx.gid)
        if inherits and stat.S_ISDIR(mode):
            mode |= stat.S_ISGID
        change = ops.MakeNode(parent, name, self._host.new_id(), mode, ctx.uid, gid, rdev)
        return self._looked_up(parent, name, await primary.change(change))

    @answered
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext) -> Any:
        primary = self._primary()
        parent = self._id(parent_inode)
        gid, _ = group_of_new(self._tree, parent, ctx.gid)
        change = ops.Symlink(parent, name, self._host.new_id(), target, ctx.uid, gid)
        return self._looked_up(parent, name, await primary.change(change))

    @answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.readlink(self._tree.table.get(inode))

    @answered
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext) -> Any:
        known, parent = self._tree.table.get(inode), self._id(new_parent_inode)
        await self._primary().change(ops.Link(known.id, parent, new_name))
        return self._looked_up(parent, new_name, known)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._primary().change(ops.Unlink(self._id(parent_inode), name))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._primary().change(ops.RemoveDirectory(self._id(parent_inode), name))

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:  # the six are pyfuse3's
        if flags not in (0, pyfuse3.RENAME_NOREPLACE, pyfuse3.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        await self._primary().change(
            ops.Rename(self._id(parent_inode_old), name_old, self._id(parent_inode_new), name_new, flags)
        )

    # ---- attributes

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Any:
        return self._attributes(self._tree.table.get(inode), inode)

    async def statx(self, inode: int) -> tuple[int, bytes, int]:
        """statx(2) with the birth time, for the kernel session: the id, a struct statx, and how many seconds the kernel may
        keep it."""
        known = self._tree.table.get(inode)
        return known.id, backing.statx(self._tree.table.descriptor(known)), self._timeout_s(inode)

    @answered
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> Any:
        primary = self._primary(None if fh is None else self._files.get(fh))
        known = self._tree.table.get(inode)
        mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else None
        if fields.update_size and mode is None:
            mode = without_special(self._tree, known, cleared_by(self._tree, known, ctx))
        change = ops.SetAttributes(
            known.id,
            mode=mode,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        told = (
            fields.update_mode,
            fields.update_uid,
            fields.update_gid,
            fields.update_size,
            fields.update_atime,
            fields.update_mtime,
        )
        if mode is None and not any(told):
            # Nothing but "kill the special bits": chown(2) with -1 and -1, which clears them as any chown does.
            status = self._tree.stat(known)
            change = ops.SetAttributes(known.id, uid=status.st_uid, gid=status.st_gid)
        await primary.change(change, known)
        return self._attributes(known, inode)

    @answered
    async def setxattr(  # `flags` as in setxattr(2); pyfuse3 has none
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext, flags: int = 0
    ) -> None:
        primary = self._primary()
        known = self._tree.table.get(inode)
        if flags:
            self._check_there(known, name, flags)
        await primary.change(ops.SetXattr(known.id, name, value), known)
        if name == _ACL_ACCESS and ctx.uid != 0:
            await self._clear_foreign_setgid(primary, known, ctx)

    def _check_there(self, known: Known, name: bytes, flags: int) -> None:
        try:
            self._tree.xattr(known, name)
        except OSError as error:
            if error.errno == errno.ENODATA and not flags & os.XATTR_REPLACE:
                return
            raise
        if flags & os.XATTR_CREATE:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    async def _clear_foreign_setgid(self, primary: Primary, known: Known, ctx: pyfuse3.RequestContext) -> None:
        """An ACL that was set by somebody outside the file's group takes its setgid bit away, as chmod(2) does."""
        status = self._tree.stat(known)
        if not status.st_mode & stat.S_ISGID or in_group(status.st_gid, ctx):
            return
        done_in_part()
        await primary.change(ops.SetAttributes(known.id, mode=stat.S_IMODE(status.st_mode) & ~stat.S_ISGID), known)

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.xattr(self._tree.table.get(inode), name)

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        names = self._tree.xattrs(self._tree.table.get(inode))
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        known = self._tree.table.get(inode)
        await self._primary().change(ops.RemoveXattr(known.id, name), known)

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> Any:
        return self._answers.room(self._host.space())

    # ---- files

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[Any, Any]:
        primary = self._primary()
        parent = self._id(parent_inode)
        gid, _ = group_of_new(self._tree, parent, ctx.gid)
        mode = stat.S_IFREG | stat.S_IMODE(mode_of_new(self._tree, parent, mode, ctx))
        change = ops.MakeNode(parent, name, self._host.new_id(), mode, ctx.uid, gid)
        try:
            known = await primary.change(change)
            flags &= ~os.O_TRUNC
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            known = self._tree.lookup(parent, name)
        entry = self._looked_up(parent, name, known)
        try:
            return await self._open(known, flags, ctx), entry
        except BaseException:
            self._tree.table.forget(known, 1)
            raise

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> Any:
        return await self._open(self._tree.table.get(inode), flags, ctx, number=inode)

    async def _open(self, known: Known, flags: int, ctx: pyfuse3.RequestContext, *, number: int = ids.ROOT) -> Any:
        handle = Handle(known, flags, self._host.reign, cleared_by(self._tree, known, ctx))
        if handle.writable or flags & os.O_TRUNC:
            primary = self._primary()
            if flags & os.O_TRUNC:
                mode = without_special(self._tree, known, handle.clears)
                await primary.change(ops.SetAttributes(known.id, mode=mode, size=0), known)
        self._tree.table.hold(known)
        is_primary = self._host.primary is not None
        keep = is_primary and not ids.is_provisional(number)
        return self._answers.opened(self._numbered(handle), keep=keep, direct=not is_primary)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]  # any buffer will do
        known = self._files[fh].known
        data = self._tree.read_cached(known, off, size)
        if data is not None:
            return data
        await in_task()
        descriptor = self._tree.table.hold(known)
        try:
            return await trio.to_thread.run_sync(os.pread, descriptor, size, off)
        finally:
            self._tree.table.let_go(known)

    @answered
    async def write(self, fh: int, off: int, buf: bytes | memoryview, flags: int = 0) -> int:
        handle = self._files[fh]
        primary = self._primary(handle)
        known = handle.known
        if known.special and handle.clears:
            mode = without_special(self._tree, known, handle.clears)
            if mode is not None:
                buf = bytes(buf)  # what lies in it after a wait is another request
                await primary.change(ops.SetAttributes(known.id, mode=mode), known)
        written = await primary.write(known, off, buf)
        if handle.sync:
            # The kernel sends no FSYNC for asynchronous O_DIRECT writes.
            done_in_part()
            await primary.sync(known, handle.data_sync)
        elif flags & os.O_DSYNC:  # asked for with this write (RWF_DSYNC)
            done_in_part()
            await primary.sync(known, flags & os.O_SYNC != os.O_SYNC)
        return written

    async def fallocate(self, fh: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2). This and the next two are the kernel session's: pyfuse3 has none of them."""
        handle = self._files[fh]
        primary = self._primary(handle)
        await primary.change(ops.Allocate(handle.known.id, mode, offset, size), handle.known)
        if handle.sync:
            done_in_part()
            await primary.sync(handle.known, handle.data_sync)

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; the kernel does the others by itself."""
        known = self._files[fh].known
        descriptor = self._tree.table.data(known) if known.kind == stat.S_IFREG else self._tree.table.descriptor(known)
        return os.lseek(descriptor, offset, whence)

    async def copy_file_range(self, source_fh: int, source_offset: int, fh: int, offset: int, size: int) -> int:
        """copy_file_range(2): returns the bytes that were copied, which may be fewer than asked for."""
        source, handle = self._files[source_fh], self._files[fh]
        primary = self._primary(handle)
        change = ops.CopyRange(source.known.id, source_offset, handle.known.id, offset, size)
        copied: int = await primary.change(change, handle.known)
        if handle.sync:
            done_in_part()
            await primary.sync(handle.known, handle.data_sync)
        return copied

    @answered
    async def release(self, fh: int) -> None:
        handle = self._files.pop(fh)
        self._tree.table.let_go(handle.known)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._files[fh]
        if handle.writable:
            # Of an earlier reign it may have written what is durable nowhere: no answer but an error is true.
            await self._primary(handle).sync(handle.known, datasync)
        elif self._host.primary is not None:
            await self._host.primary.sync(handle.known, datasync)

    # ---- directories

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        known = self._tree.table.get(inode)
        self._tree.table.hold(known)
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self._listings[number] = Listing(known)
        return number

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0 or not listing.names:
            listing.names = [b".", b"..", *self._tree.names(listing.known)]
        for index in range(start_id, len(listing.names)):
            name = listing.names[index]
            try:
                known = self._listed(listing.known, name)
                status = self._tree.stat(known)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ESTALE, errno.EXDEV):
                    continue  # removed since the listing began, or something that is mounted underneath
                if index > start_id:
                    return  # what is in the answer counts; the error comes with the next request
                raise
            entry = self._answers.entry(known.id, status, self._timeout_s())
            if not self._answers.list_entry(token, name, entry, index + 1):
                self._tree.table.drop_unused(known)
                return
            if index > 1:
                known.lookups += 1
                self._named(known, (listing.known.id, name), status)

    def _listed(self, directory: Known, name: bytes) -> Known:
        if name == b".":
            return directory
        if name == b"..":
            return directory if directory.gone else self._tree.table.get(self._tree.parent_of(directory))
        return self._tree.lookup(directory.id, name)

    @answered
    async def releasedir(self, fh: int) -> None:
        self._tree.table.let_go(self._listings.pop(fh).known)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        primary = self._host.primary
        if primary is not None:
            await primary.sync(self._listings[fh].known, datasync)
