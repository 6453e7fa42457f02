"""Where a file has data and where it has holes."""

import errno
import os
from collections.abc import Iterator


def segments(descriptor: int, start: int, end: int) -> Iterator[tuple[bool, int, int]]:
    """Data (True) and holes of a file between two offsets: (is data, first, last)."""
    while start < end:
        data = _seek(descriptor, start, os.SEEK_DATA, end)
        if data > start:
            yield False, start, min(data, end)
            start = data
            continue
        # A file that is truncated between the two calls has data as far as a read finds it: none.
        stop = min(_seek(descriptor, start, os.SEEK_HOLE, end), end)
        yield True, start, stop
        start = stop


def _seek(descriptor: int, start: int, what: int, end: int) -> int:
    """lseek, or `end` where the file ends before `start`."""
    try:
        return os.lseek(descriptor, start, what)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end
