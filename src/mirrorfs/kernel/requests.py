"""The requests of the kernel as a table: which call of the file system each is, and how its answer looks in bytes.

The entries read the body of a request, a memoryview that is good until the call first waits, and return the coroutine that
serves it. What that returns is the answer's bytes; `KernelAnswers` makes those that describe files.
"""

import errno
import os
import stat
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mirrorfs.kernel import protocol
from mirrorfs.kernel.protocol import Opcode, SetAttr
from mirrorfs.space import Space

if TYPE_CHECKING:
    from mirrorfs.fuse_ops import FuseOperations

_NS: Final = 1_000_000_000
_NAME_MAX: Final = 255
#: Of WRITE: the handle is a guess, the data comes from a mapping.
_WRITE_CACHE: Final = 1
#: What serves a request: it returns the bytes of the answer, in the end.
Serving = Coroutine[Any, Any, Any]
Call = Callable[["FuseOperations", int, memoryview, "Caller"], Serving]


class Caller:
    """Who asks: what pyfuse3.RequestContext is in the other session."""

    __slots__ = ("gid", "pid", "uid", "umask")

    def __init__(self, uid: int, gid: int, pid: int) -> None:
        self.uid, self.gid, self.pid, self.umask = uid, gid, pid, 0


class Fields(NamedTuple):
    """Which attributes a SETATTR is about: as pyfuse3.SetattrFields."""

    update_mode: bool
    update_uid: bool
    update_gid: bool
    update_size: bool
    update_atime: bool
    update_mtime: bool


class Attributes(NamedTuple):
    """What a SETATTR sets them to: as pyfuse3.EntryAttributes."""

    st_mode: int
    st_uid: int
    st_gid: int
    st_size: int
    st_atime_ns: int
    st_mtime_ns: int


class Listed:
    """The answer to a READDIRPLUS while it is filled."""

    __slots__ = ("left", "parts")

    def __init__(self, size: int) -> None:
        self.left = size
        self.parts: list[bytes] = []

    def add(self, name: bytes, entry: bytes, following: int) -> bool:
        """One more entry; False if it has no room."""
        size = len(entry) + protocol.DIRENT.size + len(name)
        padding = -size % 8
        if size + padding > self.left:
            return False
        self.left -= size + padding
        ino, mode = _INO_MODE(entry)
        self.parts += (entry, protocol.DIRENT.pack(ino, following, len(name), mode >> 12 & 15), name, bytes(padding))
        return True


def _INO_MODE(entry: bytes) -> tuple[int, int]:  # noqa: N802
    attributes = protocol.ATTR.unpack_from(entry, protocol.ENTRY_HEAD.size)
    return attributes[0], attributes[9]


class KernelAnswers:
    """Answers as bytes. `can_forget_nothing` says whether the kernel can be made to forget that there was no such name."""

    def __init__(self) -> None:
        self.can_forget_nothing = False

    def attributes(self, number: int, status: os.stat_result, timeout_s: int) -> bytes:
        """The attributes of a file, which the kernel may keep for so long."""
        return protocol.ATTR_HEAD.pack(timeout_s, 0, 0) + _attr(number, status)

    def entry(self, number: int, status: os.stat_result, timeout_s: int) -> bytes:
        """A name that leads to this file; the kernel may keep both for so long."""
        return protocol.ENTRY_HEAD.pack(number, 0, timeout_s, timeout_s, 0, 0) + _attr(number, status)

    def nothing(self, timeout_s: int) -> bytes | None:
        """A name that leads to nothing, which the kernel may keep for so long; None if it cannot."""
        if not self.can_forget_nothing:
            return None
        return protocol.ENTRY_HEAD.pack(0, 0, timeout_s, 0, 0, 0) + bytes(protocol.ATTR.size)

    def opened(self, handle: int, *, keep: bool, direct: bool) -> bytes:
        """An open file. With `keep`, what is cached of it is good; with `direct`, nothing is cached."""
        flags = (protocol.Open.DIRECT_IO if direct else 0) | (protocol.Open.KEEP_CACHE if keep else 0)
        return protocol.OPEN_OUT.pack(handle, flags, 0)

    def room(self, space: Space) -> bytes:
        """Sizes of the file system."""
        size = space.block_size
        blocks = space.total // size, space.free // size, space.available // size
        return protocol.STATFS_OUT.pack(*blocks, space.files, space.files_free, size, _NAME_MAX, size, 0)

    def list_entry(self, listed: Listed, name: bytes, entry: bytes, following: int) -> bool:
        """One more entry in a listing; False if it has no room."""
        return listed.add(name, entry, following)


def _attr(number: int, status: os.stat_result) -> bytes:
    atime_s, atime_ns = divmod(status.st_atime_ns, _NS)
    mtime_s, mtime_ns = divmod(status.st_mtime_ns, _NS)
    ctime_s, ctime_ns = divmod(status.st_ctime_ns, _NS)
    return protocol.ATTR.pack(
        number,
        status.st_size,
        status.st_blocks,
        atime_s & _U64,
        mtime_s & _U64,
        ctime_s & _U64,
        atime_ns,
        mtime_ns,
        ctime_ns,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        _kernel_device(status.st_rdev) if status.st_rdev else 0,
        status.st_blksize,
        0,
    )


_U64: Final = (1 << 64) - 1


def _kernel_device(number: int) -> int:
    """A device number as the kernel packs it in 32 bits (new_encode_dev)."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _device(number: int) -> int:
    return os.makedev((number & 0xFFF00) >> 8, (number & 0xFF) | ((number >> 12) & 0xFFF00))


def _name(body: memoryview) -> bytes:
    return bytes(body[:-1])


def _names(body: memoryview) -> tuple[bytes, bytes]:
    first, second, _ = bytes(body).split(b"\0")
    return first, second


async def _answer_nothing(call: Serving) -> bytes:
    await call
    return b""


# ---- names


def _lookup(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _raw(fs.lookup)(fs, node, _name(body), caller)


def _mknod(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    mode, rdev, caller.umask, _ = protocol.MKNOD_IN.unpack_from(body)
    return _raw(fs.mknod)(fs, node, _name(body[protocol.MKNOD_IN.size :]), mode, _device(rdev), caller)


def _mkdir(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    mode, caller.umask = protocol.MKDIR_IN.unpack_from(body)
    return _raw(fs.mkdir)(fs, node, _name(body[protocol.MKDIR_IN.size :]), mode | stat.S_IFDIR, caller)


def _symlink(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    name, target = _names(body)
    return _raw(fs.symlink)(fs, node, name, target, caller)


def _readlink(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _raw(fs.readlink)(fs, node, caller)


def _link(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    (file,) = protocol.LINK_IN.unpack_from(body)
    return _raw(fs.link)(fs, file, node, _name(body[protocol.LINK_IN.size :]), caller)


def _unlink(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _answer_nothing(_raw(fs.unlink)(fs, node, _name(body), caller))


def _rmdir(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _answer_nothing(_raw(fs.rmdir)(fs, node, _name(body), caller))


def _rename(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    (parent,) = protocol.RENAME_IN.unpack_from(body)
    old, new = _names(body[protocol.RENAME_IN.size :])
    return _answer_nothing(_raw(fs.rename)(fs, node, old, parent, new, 0, caller))


def _rename2(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    parent, flags, _ = protocol.RENAME2_IN.unpack_from(body)
    old, new = _names(body[protocol.RENAME2_IN.size :])
    return _answer_nothing(_raw(fs.rename)(fs, node, old, parent, new, flags, caller))


# ---- attributes


def _getattr(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _raw(fs.getattr)(fs, node, caller)


async def _with_birth(call: Coroutine[Any, Any, tuple[int, bytes, int]]) -> bytes:
    number, status, timeout_s = await call
    mask, blksize, nlink, uid, gid, mode, _, *rest = protocol.STATX.unpack(status)
    found = protocol.STATX.pack(mask, blksize, nlink, uid, gid, mode, number, *rest)
    return protocol.STATX_HEAD.pack(timeout_s, 0, 0) + found


def _statx(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _with_birth(fs.statx(node))


def _setattr(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = protocol.SETATTR_IN.unpack_from(body)
    now = fs.now_ns() if valid & (SetAttr.ATIME_NOW | SetAttr.MTIME_NOW) else 0
    fields = Fields(
        bool(valid & SetAttr.MODE),
        bool(valid & SetAttr.UID),
        bool(valid & SetAttr.GID),
        bool(valid & SetAttr.SIZE),
        bool(valid & (SetAttr.ATIME | SetAttr.ATIME_NOW)),
        bool(valid & (SetAttr.MTIME | SetAttr.MTIME_NOW)),
    )
    attributes = Attributes(
        mode,
        uid,
        gid,
        size,
        now if valid & SetAttr.ATIME_NOW else _nanoseconds(atime, atime_ns),
        now if valid & SetAttr.MTIME_NOW else _nanoseconds(mtime, mtime_ns),
    )
    return _raw(fs.setattr)(fs, node, attributes, fields, fh if valid & SetAttr.FH else None, caller)


def _nanoseconds(seconds: int, nanoseconds: int) -> int:
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * _NS + nanoseconds


def _setxattr(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    size, flags = protocol.SETXATTR_IN.unpack_from(body)
    rest = bytes(body[protocol.SETXATTR_IN.size :])
    name = rest[: rest.index(b"\0")]
    value = rest[len(name) + 1 : len(name) + 1 + size]
    return _answer_nothing(_raw(fs.setxattr)(fs, node, name, value, caller, flags))


async def _sized(call: Coroutine[Any, Any, bytes], size: int) -> bytes:
    """An answer of a size that the caller has room for, or that it only wants to know."""
    value = await call
    if not size:
        return protocol.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value


def _getxattr(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    size, _ = protocol.GETXATTR_IN.unpack_from(body)
    return _sized(_raw(fs.getxattr)(fs, node, _name(body[protocol.GETXATTR_IN.size :]), caller), size)


async def _joined(call: Coroutine[Any, Any, list[bytes]]) -> bytes:
    return b"".join(name + b"\0" for name in await call)


def _listxattr(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    size, _ = protocol.GETXATTR_IN.unpack_from(body)
    return _sized(_joined(_raw(fs.listxattr)(fs, node, caller)), size)


def _removexattr(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _answer_nothing(_raw(fs.removexattr)(fs, node, _name(body), caller))


def _statfs(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _raw(fs.statfs)(fs, caller)


# ---- files


async def _created(call: Coroutine[Any, Any, tuple[bytes, bytes]]) -> bytes:
    opened, entry = await call
    return entry + opened


def _create(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    flags, mode, caller.umask, _ = protocol.CREATE_IN.unpack_from(body)
    return _created(_raw(fs.create)(fs, node, _name(body[protocol.CREATE_IN.size :]), mode, flags, caller))


def _open(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    flags, _ = protocol.OPEN_IN.unpack_from(body)
    return _raw(fs.open)(fs, node, flags, caller)


def _read(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, offset, size, *_ = protocol.READ_IN.unpack_from(body)
    return _raw(fs.read)(fs, fh, offset, size)


async def _count(call: Coroutine[Any, Any, int]) -> bytes:
    return protocol.WRITE_OUT.pack(await call, 0)


def _write(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, offset, size, _, _, flags, _ = protocol.WRITE_IN.unpack_from(body)
    at = protocol.WRITE_IN.size
    return _count(_raw(fs.write)(fs, fh, offset, body[at : at + size], flags))


def _release(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _answer_nothing(_raw(fs.release)(fs, protocol.RELEASE_IN.unpack_from(body)[0]))


def _fsync(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, flags, _ = protocol.FSYNC_IN.unpack_from(body)
    return _answer_nothing(_raw(fs.fsync)(fs, fh, bool(flags & protocol.FSYNC_DATA_ONLY)))


def _fallocate(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, offset, size, mode, _ = protocol.FALLOCATE_IN.unpack_from(body)
    return _answer_nothing(fs.fallocate(fh, mode, offset, size))


async def _place(call: Coroutine[Any, Any, int]) -> bytes:
    return protocol.LSEEK_OUT.pack(await call)


def _lseek(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, offset, whence, _ = protocol.LSEEK_IN.unpack_from(body)
    return _place(fs.lseek(fh, offset, whence))


def _copy_file_range(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    source, source_offset, _, target, offset, size, _ = protocol.COPY_FILE_RANGE_IN.unpack_from(body)
    return _count(fs.copy_file_range(source, source_offset, target, offset, size))


# ---- directories


async def _handle(call: Coroutine[Any, Any, int]) -> bytes:
    return protocol.OPEN_OUT.pack(await call, 0, 0)


def _opendir(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _handle(_raw(fs.opendir)(fs, node, caller))


async def _listed(fs: "FuseOperations", fh: int, offset: int, size: int) -> bytes:
    listed = Listed(size)
    await _raw(fs.readdir)(fs, fh, offset, listed)
    return b"".join(listed.parts)


def _readdirplus(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, offset, size, *_ = protocol.READ_IN.unpack_from(body)
    return _listed(fs, fh, offset, size)


def _releasedir(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    return _answer_nothing(_raw(fs.releasedir)(fs, protocol.RELEASE_IN.unpack_from(body)[0]))


def _fsyncdir(fs: "FuseOperations", node: int, body: memoryview, caller: Caller) -> Serving:
    fh, flags, _ = protocol.FSYNC_IN.unpack_from(body)
    return _answer_nothing(_raw(fs.fsyncdir)(fs, fh, bool(flags & protocol.FSYNC_DATA_ONLY)))


def _raw(method: Any) -> Callable[..., Serving]:
    """A call of the file system without the boundary that it has for pyfuse3: errors come as they are."""
    raw: Callable[..., Serving] = method.__wrapped__
    return raw


#: What is not here gets ENOSYS, and FLUSH so once: the kernel writes mapped pages back at a close in any case.
TABLE: Final[dict[int, Call]] = {
    Opcode.LOOKUP: _lookup,
    Opcode.GETATTR: _getattr,
    Opcode.SETATTR: _setattr,
    Opcode.READLINK: _readlink,
    Opcode.SYMLINK: _symlink,
    Opcode.MKNOD: _mknod,
    Opcode.MKDIR: _mkdir,
    Opcode.UNLINK: _unlink,
    Opcode.RMDIR: _rmdir,
    Opcode.RENAME: _rename,
    Opcode.LINK: _link,
    Opcode.OPEN: _open,
    Opcode.READ: _read,
    Opcode.WRITE: _write,
    Opcode.STATFS: _statfs,
    Opcode.RELEASE: _release,
    Opcode.FSYNC: _fsync,
    Opcode.SETXATTR: _setxattr,
    Opcode.GETXATTR: _getxattr,
    Opcode.LISTXATTR: _listxattr,
    Opcode.REMOVEXATTR: _removexattr,
    Opcode.OPENDIR: _opendir,
    Opcode.RELEASEDIR: _releasedir,
    Opcode.FSYNCDIR: _fsyncdir,
    Opcode.CREATE: _create,
    Opcode.FALLOCATE: _fallocate,
    Opcode.READDIRPLUS: _readdirplus,
    Opcode.RENAME2: _rename2,
    Opcode.LSEEK: _lseek,
    Opcode.COPY_FILE_RANGE: _copy_file_range,
    Opcode.STATX: _statx,
}
