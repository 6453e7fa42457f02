"""The structs and flags of /dev/fuse as data: linux/fuse.h, protocol 7.33 (Linux 5.11) and later, as far as used here."""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

MAJOR: Final = 7
#: What is spoken here, and the least that the kernel must speak: from 7.33 on it has HANDLE_KILLPRIV_V2.
MINOR: Final = 44
LEAST_MINOR: Final = 33
#: From here on one message makes the kernel look every name up again (Linux 6.16).
MINOR_WITH_EPOCHS: Final = 44

IN_HEADER: Final = Struct("<IIQQIIIHH")  # length, opcode, unique, node id, uid, gid, pid, length of extensions, padding
OUT_HEADER: Final = Struct("<IiQ")  # length, negative errno, unique


class Opcode(IntEnum):
    """What the kernel asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    STATX = 52


class Notify(IntEnum):
    """What the kernel is told without having asked."""

    INVALIDATE_INODE = 2
    INVALIDATE_ENTRY = 3
    INCREASE_EPOCH = 8


class Init(IntFlag):
    """Flags of INIT; from bit 32 on they stand in `flags2`."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36


class SetAttr(IntFlag):
    """Which fields of a SETATTR count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


class Open(IntFlag):
    """What the answer to an OPEN says of the file."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1


FSYNC_DATA_ONLY: Final = 1
#: Of INVALIDATE_ENTRY: the name is looked up again before it is used, and nothing below it is dropped. Before Linux 6.2 it
#: counts for nothing, and the name is dropped with all below it.
EXPIRE_ONLY: Final = 1

# Requests, after the header. Names follow, each with a zero byte at its end.
INIT_IN: Final = Struct("<IIII")  # major, minor, max_readahead, flags; flags2 follows in longer ones
INIT_IN_EXT: Final = Struct("<IIIII")
FORGET_IN: Final = Struct("<Q")
FORGET_ONE: Final = Struct("<QQ")  # node id, count
BATCH_FORGET_IN: Final = Struct("<II")  # count
MKNOD_IN: Final = Struct("<IIII")  # mode, rdev, umask
MKDIR_IN: Final = Struct("<II")  # mode, umask
RENAME_IN: Final = Struct("<Q")  # new parent
RENAME2_IN: Final = Struct("<QII")  # new parent, flags
LINK_IN: Final = Struct("<Q")  # node id
SETATTR_IN: Final = Struct("<IIQQQQQQIIIIIIII")
OPEN_IN: Final = Struct("<II")  # flags
CREATE_IN: Final = Struct("<IIII")  # flags, mode, umask
RELEASE_IN: Final = Struct("<QIIQ")  # handle
READ_IN: Final = Struct("<QQIIQII")  # handle, offset, size
WRITE_IN: Final = Struct("<QQIIQII")  # handle, offset, size; the data follows
FSYNC_IN: Final = Struct("<QII")  # handle, flags
SETXATTR_IN: Final = Struct("<II")  # size, flags
GETXATTR_IN: Final = Struct("<II")  # size
FALLOCATE_IN: Final = Struct("<QQQII")  # handle, offset, length, mode
LSEEK_IN: Final = Struct("<QQII")  # handle, offset, whence
COPY_FILE_RANGE_IN: Final = Struct("<QQQQQQQ")  # handle, offset, node id, handle, offset, length, flags
INTERRUPT_IN: Final = Struct("<Q")  # unique

# Answers, after the header.
#: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment,
#: flags2
INIT_OUT: Final = Struct("<IIIIHHIIHHI28x")
#: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
ATTR: Final = Struct("<QQQQQQIIIIIIIIII")
#: node id, generation, seconds for which the name and the attributes hold, their nanoseconds; ATTR follows
ENTRY_HEAD: Final = Struct("<QQQQII")
#: seconds for which they hold, their nanoseconds; ATTR follows
ATTR_HEAD: Final = Struct("<QII")
#: seconds for which it holds, their nanoseconds; STATX follows
STATX_HEAD: Final = Struct("<QII16x")
#: As statx(2), without attributes and what comes after the device number: mask, blksize, nlink, uid, gid, mode, ino, size,
#: blocks, the four times, major and minor of rdev
STATX: Final = Struct("<II8xIIIH2xQQQ8x64sII120x")
OPEN_OUT: Final = Struct("<QII")  # handle, flags
WRITE_OUT: Final = Struct("<II")  # size
GETXATTR_OUT: Final = Struct("<II")  # size
LSEEK_OUT: Final = Struct("<Q")  # offset
STATFS_OUT: Final = Struct("<QQQQQIIII24x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
DIRENT: Final = Struct("<QQII")  # ino, offset of the next, length of the name, type; the name follows, padded to 8 bytes
INVALIDATE_INODE: Final = Struct("<Qqq")  # node id, offset, length
INVALIDATE_ENTRY: Final = Struct("<QII")  # parent, length of the name, flags
