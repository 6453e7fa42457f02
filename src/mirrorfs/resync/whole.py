"""Small files travel whole: entry, attributes, times and data of many of them in one operation.

A file costs a handful of system calls on either node that way, and nothing is remembered of it: neither node knows it by its id
afterwards, so that the memory of a resync does not grow with the number of new files.
"""

import contextlib
import errno
import os
import stat
from typing import Final

from mirrorfs.core.dirty import BLOCK
from mirrorfs.core.operations import WholeFile
from mirrorfs.resync.hashes import COMPARED
from mirrorfs.tree import Tree

#: A file of no more bytes than this is small.
SMALL: Final = COMPARED
PER_FRAME: Final = 64
#: What one costs on the wire besides its data, about.
COST: Final = 256
#: So many are read from the disk at once.
READ_AT_ONCE: Final = 256
_MAX_XATTRS: Final = 16 << 10
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAKE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def read(tree: Tree, directory: int, name: bytes, first_new: int) -> WholeFile | None:
    """A regular file of a directory (a descriptor) as it stands; None if it has to travel another way.

    That is a file that has no id from `first_new` on, is large or has holes, or has several names. BlockingIOError if it is not
    in memory.
    """
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or size > min(SMALL, status.st_blocks * 512):
            return None
        descriptor = os.open(name, _READ, dir_fd=directory)
    except OSError:
        return None
    try:
        number = tree.id_of(descriptor, status)
        if number is None or number < first_new:
            return None
        data = bytearray(size)
        if size and os.preadv(descriptor, [data], 0, os.RWF_NOWAIT) != size:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        # A block that begins with another byte than zero is no hole.
        if not all(data[::BLOCK]) and os.lseek(descriptor, 0, os.SEEK_HOLE) < size:
            return None
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if names := tree.foreign(os.listxattr(descriptor)):
            xattrs = tuple((key, os.getxattr(descriptor, key)) for key in names)
            if sum(len(key) + len(value) for key, value in xattrs) > _MAX_XATTRS:
                return None
    except BlockingIOError:
        raise
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return WholeFile(name, number, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs, bytes(data))


def bring_into_memory(directory: int, names: list[bytes]) -> None:
    """Have small files of a directory (a descriptor) in memory, as far as they can be read. Blocks: call it from a worker
    thread."""
    with contextlib.ExitStack() as stack:
        opened = list[int]()
        for name in names:
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                    opened.append(os.open(name, _READ, dir_fd=directory))
                    stack.callback(os.close, opened[-1])
                    os.posix_fadvise(opened[-1], 0, SMALL, os.POSIX_FADV_WILLNEED)  # all of them at once
        for descriptor in opened:
            with contextlib.suppress(OSError):
                os.pread(descriptor, SMALL, 0)


def gives_attributes(path: str) -> bool:
    """Whether files that are made in a directory may get attributes from it (a default ACL, a label), which the source may not
    have: only a directory with attributes gives any."""
    return bool(Tree.foreign(os.listxattr(path)))


def make(tree: Tree, directory: int, file: WholeFile, *, given_attributes: bool) -> None:
    """Make a file in a directory (a descriptor), which may have `given_attributes` to it; FileExistsError if the name is taken,
    OSError if it cannot be made."""
    wanted, wanted_xattrs = stat.S_IMODE(file.mode), [name for name, _ in file.xattrs]
    descriptor = os.open(file.name, _MAKE, wanted & 0o777, dir_fd=directory)
    try:
        status = os.fstat(descriptor)
        tree.stamp(descriptor, status.st_ino, file.file)
        for name in tree.foreign(os.listxattr(descriptor)) if given_attributes else ():
            if name not in wanted_xattrs:
                os.removexattr(descriptor, name)
        # What is written and who owns it first: both take special bits and capabilities away.
        if file.data and os.pwrite(descriptor, file.data, 0) < len(file.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        owned = (status.st_uid, status.st_gid) == (file.uid, file.gid)
        if not owned:
            os.chown(descriptor, file.uid, file.gid)
        if not owned or stat.S_IMODE(status.st_mode) != wanted:
            os.chmod(descriptor, wanted)
        for name, value in file.xattrs:
            os.setxattr(descriptor, name, value)
        os.utime(descriptor, ns=(status.st_atime_ns, file.mtime_ns))
    except OSError:
        os.unlink(file.name, dir_fd=directory)
        raise
    finally:
        os.close(descriptor)
