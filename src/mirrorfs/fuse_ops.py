"""FUSE requests -> operations -> replicate -> errno.

One class for all sessions. Reads are answered from this node's tree; changes go to the `Primary` of the node, and are refused
with EROFS while it has none. What the kernel may keep is long-lived on the primary, where nobody else changes files, and
nothing on any other node.
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.errors import MirrorfsError, NotPrimaryError
from mirrorfs.handles import Handle, Listing
from mirrorfs.replication import Primary
from mirrorfs.space import Space
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_CACHE_S: Final = 86_400.0
_ACL_ACCESS: Final = b"system.posix_acl_access"
_ACL_DEFAULT: Final = b"system.posix_acl_default"
_NAME_MAX: Final = 255

P = ParamSpec("P")
R = TypeVar("R")


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


def _answered(
    handler: Callable[Concatenate["FuseOperations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["FuseOperations", P], Coroutine[Any, Any, R]]:
    """The one boundary where errors become errnos: any other exception would end pyfuse3's main loop."""

    @functools.wraps(handler)
    async def answer(self: "FuseOperations", *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except MirrorfsError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            log.exception("a defect in %s", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return answer  # type: ignore[return-value]  # functools.wraps forgets that `self` may be given by position only


class FuseOperations(pyfuse3.Operations):
    """The file system that applications see."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, tree: Tree, host: Host) -> None:
        super().__init__()
        self._tree = tree
        self._host = host
        self._files: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._next_handle = 1

    @property
    def handles(self) -> Collection[Handle]:
        """The files that applications have open."""
        return self._files.values()

    # ---- helpers

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

    def _entry(self, known: Known, *, number: int = ids.ROOT) -> pyfuse3.EntryAttributes:
        """The attributes of a file; nothing is to be kept of what the kernel knows by a provisional `number`."""
        status = self._tree.stat(known)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = known.id
        entry.st_mode = status.st_mode
        entry.st_nlink = status.st_nlink
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_rdev = status.st_rdev
        entry.st_size = status.st_size
        entry.st_blksize = status.st_blksize
        entry.st_blocks = status.st_blocks
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        timeout = 0.0 if self._host.primary is None or ids.is_provisional(number) else _CACHE_S
        entry.attr_timeout = timeout
        entry.entry_timeout = timeout
        return entry

    def _looked_up(self, parent: int, name: bytes, known: Known) -> pyfuse3.EntryAttributes:
        """The answer that makes the kernel know a file under a name."""
        entry = self._entry(known)
        known.lookups += 1
        if (parent, name) not in known.names:
            known.names.append((parent, name))
        known.special = bool(entry.st_mode & (stat.S_ISUID | stat.S_ISGID))
        return entry

    def _mode_of_new(self, parent: int, mode: int, ctx: pyfuse3.RequestContext) -> int:
        """The mode asked for, less the umask unless the directory's default ACL takes its place."""
        if not ctx.umask:
            return mode
        try:
            self._tree.xattr(self._tree.table.get(parent), _ACL_DEFAULT)
        except OSError:
            return mode & ~ctx.umask
        return mode

    def _group_of_new(self, parent: int, gid: int) -> tuple[int, bool]:
        """The group of a new file, and whether the directory hands its own down."""
        above = self._tree.stat(self._tree.table.get(parent))
        inherits = bool(above.st_mode & stat.S_ISGID)
        return (above.st_gid if inherits else gid), inherits

    def _numbered(self, what: Handle) -> int:
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self._files[number] = what
        return number

    def _clearer(self, known: Known, ctx: pyfuse3.RequestContext) -> int:
        """The mode bits that a write by this caller takes away: as the kernel's setattr_should_drop_sgid() has it."""
        if ctx.uid == 0:
            return 0
        if self._in_group(self._tree.stat(known).st_gid, ctx):
            return stat.S_ISUID
        return stat.S_ISUID | stat.S_ISGID

    def _in_group(self, gid: int, ctx: pyfuse3.RequestContext) -> bool:
        if gid == ctx.gid:
            return True
        try:
            return gid in pyfuse3.get_sup_groups(ctx.pid)
        except OSError:  # of another pid namespace, or gone already
            return False

    def _without_special(self, known: Known, clears: int) -> int | None:
        """The mode that a write leaves, None if that is the present one."""
        if not clears:
            return None
        mode = stat.S_IMODE(self._tree.stat(known).st_mode)
        fresh = mode & ~clears
        if mode & stat.S_IXGRP:
            fresh &= ~stat.S_ISGID
        return None if fresh == mode else fresh

    # ---- names

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        parent = self._id(parent_inode)
        known = self._tree.lookup(parent, name)
        if name in (b".", b".."):
            entry = self._entry(known)
            known.lookups += 1
            return entry
        return self._looked_up(parent, name, known)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            if number != ids.ROOT:
                try:
                    self._tree.table.forgotten(number, count)
                except OSError as error:
                    log.error("cannot close what the kernel forgot: %s", error)

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return await self._make(self._id(parent_inode), name, mode, rdev, ctx)

    @_answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return await self._make(self._id(parent_inode), name, mode, 0, ctx)

    async def _make(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        primary = self._primary()
        mode = self._mode_of_new(parent, mode, ctx)
        gid, inherits = self._group_of_new(parent, ctx.gid)
        if inherits and stat.S_ISDIR(mode):
            mode |= stat.S_ISGID
        change = ops.MakeNode(parent, name, self._host.new_id(), mode, ctx.uid, gid, rdev)
        return self._looked_up(parent, name, await primary.change(change))

    @_answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        primary = self._primary()
        parent = self._id(parent_inode)
        gid, _ = self._group_of_new(parent, ctx.gid)
        change = ops.Symlink(parent, name, self._host.new_id(), target, ctx.uid, gid)
        return self._looked_up(parent, name, await primary.change(change))

    @_answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.readlink(self._tree.table.get(inode))

    @_answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        known, parent = self._tree.table.get(inode), self._id(new_parent_inode)
        await self._primary().change(ops.Link(known.id, parent, new_name))
        return self._looked_up(parent, new_name, known)

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._primary().change(ops.Unlink(self._id(parent_inode), name))

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._primary().change(ops.RemoveDirectory(self._id(parent_inode), name))

    @_answered
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

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._tree.table.get(inode), number=inode)

    @_answered
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        primary = self._primary(None if fh is None else self._files.get(fh))
        known = self._tree.table.get(inode)
        mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else None
        if fields.update_size and mode is None:
            mode = self._without_special(known, self._clearer(known, ctx))
        change = ops.SetAttributes(
            known.id,
            mode=mode,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if change == ops.SetAttributes(known.id):
            # Nothing but "kill the special bits": chown(2) with -1 and -1, which clears them as any chown does.
            status = self._tree.stat(known)
            change = ops.SetAttributes(known.id, uid=status.st_uid, gid=status.st_gid)
        await primary.change(change, known)
        return self._entry(known, number=inode)

    @_answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        primary = self._primary()
        known = self._tree.table.get(inode)
        await primary.change(ops.SetXattr(known.id, name, value), known)
        if name == _ACL_ACCESS and ctx.uid != 0:
            await self._clear_foreign_setgid(primary, known, ctx)

    async def _clear_foreign_setgid(self, primary: Primary, known: Known, ctx: pyfuse3.RequestContext) -> None:
        """An ACL that was set by somebody outside the file's group takes its setgid bit away, as chmod(2) does."""
        status = self._tree.stat(known)
        if not status.st_mode & stat.S_ISGID or self._in_group(status.st_gid, ctx):
            return
        await primary.change(ops.SetAttributes(known.id, mode=stat.S_IMODE(status.st_mode) & ~stat.S_ISGID), known)

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.xattr(self._tree.table.get(inode), name)

    @_answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        names = self._tree.xattrs(self._tree.table.get(inode))
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    @_answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        known = self._tree.table.get(inode)
        await self._primary().change(ops.RemoveXattr(known.id, name), known)

    @_answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        space = self._host.space()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = space.block_size
        answer.f_blocks = space.total // space.block_size
        answer.f_bfree = space.free // space.block_size
        answer.f_bavail = space.available // space.block_size
        answer.f_files = space.files
        answer.f_ffree = answer.f_favail = space.files_free
        answer.f_namemax = _NAME_MAX
        return answer

    # ---- files

    @_answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        primary = self._primary()
        parent = self._id(parent_inode)
        gid, _ = self._group_of_new(parent, ctx.gid)
        mode = stat.S_IFREG | stat.S_IMODE(self._mode_of_new(parent, mode, ctx))
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

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return await self._open(self._tree.table.get(inode), flags, ctx, number=inode)

    async def _open(self, known: Known, flags: int, ctx: pyfuse3.RequestContext, *, number: int = ids.ROOT) -> pyfuse3.FileInfo:
        handle = Handle(known, flags, self._host.reign, self._clearer(known, ctx))
        if handle.writable or flags & os.O_TRUNC:
            primary = self._primary()
            if flags & os.O_TRUNC:
                mode = self._without_special(known, handle.clears)
                await primary.change(ops.SetAttributes(known.id, mode=mode, size=0), known)
        self._tree.table.hold(known)
        keep = self._host.primary is not None and not ids.is_provisional(number)
        return pyfuse3.FileInfo(fh=self._numbered(handle), keep_cache=keep)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        known = self._files[fh].known
        data = self._tree.read_cached(known, off, size)
        if data is not None:
            return data
        descriptor = self._tree.table.hold(known)
        try:
            return await trio.to_thread.run_sync(os.pread, descriptor, size, off)
        finally:
            self._tree.table.let_go(known)

    @_answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._files[fh]
        primary = self._primary(handle)
        known = handle.known
        if known.special and handle.clears:
            mode = self._without_special(known, handle.clears)
            if mode is not None:
                await primary.change(ops.SetAttributes(known.id, mode=mode), known)
        handle.unsettled = True
        written: int = await primary.change(ops.Write(known.id, off, buf), known)
        if handle.sync:
            # The kernel sends no FSYNC for asynchronous O_DIRECT writes.
            await primary.sync(known, handle.data_sync)
        return written

    @_answered
    async def flush(self, fh: int) -> None:
        self._settle(self._files[fh])

    def _settle(self, handle: Handle) -> None:
        primary = self._host.primary
        if handle.unsettled and primary is not None:
            primary.settle(handle.known.id)
            handle.unsettled = False

    @_answered
    async def release(self, fh: int) -> None:
        handle = self._files.pop(fh)
        self._settle(handle)
        self._tree.table.let_go(handle.known)

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._files[fh]
        if handle.writable:
            # Of an earlier reign it may have written what is durable nowhere: no answer but an error is true.
            await self._primary(handle).sync(handle.known, datasync)
        elif self._host.primary is not None:
            await self._host.primary.sync(handle.known, datasync)

    # ---- directories

    @_answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        known = self._tree.table.get(inode)
        self._tree.table.hold(known)
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self._listings[number] = Listing(known)
        return number

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0 or not listing.names:
            listing.names = [b".", b"..", *self._tree.names(listing.known)]
        for index in range(start_id, len(listing.names)):
            name = listing.names[index]
            try:
                known = self._listed(listing.known, name)
                entry = self._entry(known)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ESTALE, errno.EXDEV):
                    continue  # removed since the listing began, or something that is mounted underneath
                if index > start_id:
                    return  # what is in the answer counts; the error comes with the next request
                raise
            if not pyfuse3.readdir_reply(token, name, entry, index + 1):
                self._tree.table.drop_unused(known)
                return
            if index > 1:
                known.lookups += 1
                known.special = bool(entry.st_mode & (stat.S_ISUID | stat.S_ISGID))
                if (listing.known.id, name) not in known.names:
                    known.names.append((listing.known.id, name))

    def _listed(self, directory: Known, name: bytes) -> Known:
        if name == b".":
            return directory
        if name == b"..":
            return directory if directory.gone else self._tree.table.get(self._tree.parent_of(directory))
        return self._tree.lookup(directory.id, name)

    @_answered
    async def releasedir(self, fh: int) -> None:
        self._tree.table.let_go(self._listings.pop(fh).known)

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        primary = self._host.primary
        if primary is not None:
            await primary.sync(self._listings[fh].known, datasync)
