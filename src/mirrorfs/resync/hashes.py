"""Hashes by which two nodes compare a range of a file: one for each 64 KiB, of its data and of where its holes are."""

import os
from hashlib import blake2b
from typing import Final

from mirrorfs.core.dirty import BLOCK
from mirrorfs.resync.layout import segments

#: Bytes for which there is one hash. Only blocks of this size that differ travel.
COMPARED: Final = 64 << 10
HASH_SIZE: Final = 16
_HOLE: Final = bytes(HASH_SIZE)


def hashes(descriptor: int, offset: int, size: int) -> bytes:
    """The hashes of `size` bytes from `offset` (a multiple of COMPARED) on, put together; shorter where the file ends.

    Two equal hashes mean equal data and equal holes (in units of 4 KiB). Blocks for the disk: call it from a worker thread.
    """
    found = []
    end = min(offset + size, os.fstat(descriptor).st_size)
    for start in range(offset, end, COMPARED):
        stop = min(start + COMPARED, end)
        layout = [
            ((first - start) // BLOCK, (last - start + BLOCK - 1) // BLOCK)
            for is_data, first, last in segments(descriptor, start, stop)
            if is_data
        ]
        if not layout:
            found.append(_HOLE)
            continue
        digest = blake2b(repr(layout).encode(), digest_size=HASH_SIZE)
        digest.update(os.pread(descriptor, stop - start, start))
        found.append(digest.digest())
    return b"".join(found)
