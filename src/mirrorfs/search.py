"""Looking for the names of files by their inode numbers: the last resort, where all names that were known of a file are gone.

That is a file with several names that lost the one by which it was marked. To read all directories costs far less than a full
copy.
"""

import errno
import os
from collections.abc import Set as AbstractSet
from contextlib import suppress

#: The names that lead from the root to a directory, and the name in it.
Hit = tuple[tuple[bytes, ...], bytes]


def find_names(root: int, inodes: AbstractSet[int]) -> dict[int, list[Hit]]:
    """All names below the directory `root` of the files with these inode numbers: ways from the root, and the last name.

    Blocks for the disk: call it from a worker thread. What is renamed meanwhile may be missed.
    """
    found: dict[int, list[Hit]] = {}
    pending: list[tuple[bytes, ...]] = [()]
    while pending:
        way = pending.pop()
        with suppress(OSError):  # gone since
            descriptor = os.open(b"/".join(way) or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            pending.append((*way, name))
                        elif entry.inode() in inodes:
                            found.setdefault(entry.inode(), []).append((way, name))
            finally:
                os.close(descriptor)
    return found


def _readable(directory: int) -> int:
    return os.open(f"/proc/self/fd/{directory}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def name_in(directory: int, inode: int) -> bytes:
    """A name of the file with this inode number in a directory, by any descriptor of it; ESTALE if it has none there."""
    readable = _readable(directory)
    try:
        with os.scandir(readable) as entries:
            for entry in entries:
                if entry.inode() == inode:
                    return os.fsencode(entry.name)
    finally:
        os.close(readable)
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def directories_in(directory: int) -> list[bytes]:
    """The names of the directories in a directory, by any descriptor of it."""
    readable = _readable(directory)
    try:
        with os.scandir(readable) as entries:
            return [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    finally:
        os.close(readable)
