"""What a node says of its own tree when both are compared: names, attributes, hashes. The same on both nodes.

Whatever is told here says the same of two equal trees, and of two trees that differ, another thing: times of access and of
inode changes are left out, since they are each node's own.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from heapq import nsmallest
from typing import Any, Final

from mirrorfs.core import ids
from mirrorfs.resync.hashes import hashes
from mirrorfs.table import Known
from mirrorfs.tree import Tree

#: Names in one answer: with the longest of names, less than a frame can hold.
NAMES_AT_ONCE: Final = 10_000
_DIGEST_SIZE: Final = 16
_MAX_XATTRS: Final = 3 << 20
#: What `attributes` tells, in its order.
FIELDS: Final = ("id", "type and mode", "uid", "gid", "device", "size", "mtime", "target", "extended attributes")


def open_to_read(tree: Tree, known: Known) -> int:
    """A descriptor of a file's data or names, to be closed by the caller; reading through it leaves its atime alone."""
    kind = os.O_DIRECTORY if known.is_directory else 0
    return os.open(tree.table.proc(known), os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC | kind)


def names_after(directory: int, after: bytes) -> tuple[list[bytes], bool]:
    """The first names in a directory that are greater than `after`, in order, and whether those are all.

    Can take long: call it from a worker thread.
    """
    found = nsmallest(NAMES_AT_ONCE + 1, (name for name in map(os.fsencode, os.listdir(directory)) if name > after))
    return found[:NAMES_AT_ONCE], len(found) <= NAMES_AT_ONCE


def fresh_hashes(descriptor: int, offset: int, size: int) -> bytes:
    """`resync.hashes` of what is on the disk: the kernel gives up what it has cached of it, unless it is yet to be written.

    Blocks for the disk: call it from a worker thread.
    """
    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
    return hashes(descriptor, offset, size)


def all_fresh_hashes(descriptors: Sequence[int], offset: int, size: int) -> list[bytes | int]:
    """`fresh_hashes` of each of these files, or the number of the error; a negative descriptor is such a number already."""
    found: list[bytes | int] = []
    for descriptor in descriptors:
        try:
            found.append(fresh_hashes(descriptor, offset, size) if descriptor >= 0 else -descriptor)
        except OSError as error:
            found.append(error.errno or errno.EIO)
    return found


def find(tree: Tree, directory: Known, name: bytes) -> Known | None:
    """The file of that name; None if there is none that belongs to the mirror."""
    try:
        return tree.lookup(directory.id, name)
    except FileNotFoundError:
        return None


def attributes(tree: Tree, known: Known) -> list[Any]:
    """The attributes of a file (`FIELDS`); the id is 0 if the file is no part of the mirror."""
    status = tree.stat(known)
    return [0 if ids.is_provisional(known.id) else known.id, *_of_status(status), _target(tree, known), _digest(tree, known)]


def of_stranger(tree: Tree, directory: Known, name: bytes) -> list[Any]:
    """The attributes of a file that somebody put there underneath; empty if there is none."""
    try:
        status = os.stat(name, dir_fd=tree.table.descriptor(directory), follow_symlinks=False)
    except FileNotFoundError:
        return []
    return [0, *_of_status(status), b"", b""]


def description(tree: Tree, known: Known) -> list[Any]:
    """Mode, uid, gid, size, mtime and extended attributes of a file, in full; E2BIG if one message cannot hold them."""
    status = tree.stat(known)
    mode, uid, gid, _, size, mtime_ns = _of_status(status)
    xattrs = [(key, tree.xattr(known, key)) for key in tree.xattrs(known)]
    if sum(len(key) + len(value) for key, value in xattrs) > _MAX_XATTRS:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return [mode, uid, gid, size, mtime_ns, xattrs]


def _of_status(status: os.stat_result) -> Iterable[int]:
    is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    return (
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_rdev if is_device else 0,
        status.st_size if stat.S_ISREG(status.st_mode) else 0,
        status.st_mtime_ns,
    )


def _target(tree: Tree, known: Known) -> bytes:
    return tree.readlink(known) if stat.S_ISLNK(known.kind) else b""


def _digest(tree: Tree, known: Known) -> bytes:
    keys = sorted(tree.xattrs(known))
    if not keys:
        return b""
    digest = blake2b(digest_size=_DIGEST_SIZE)
    for key in keys:
        value = tree.xattr(known, key)
        digest.update(b"%d %d " % (len(key), len(value)) + key + value)
    return digest.digest()
