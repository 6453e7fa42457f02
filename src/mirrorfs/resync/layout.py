"""Where a file has data and where it has holes."""

import errno
import os
from collections.abc import Iterator


def segments(descriptor: int, start: int, end: int) -> Iterator[tuple[bool, int, int]]:
    """Data (True) and holes of a file between two offsets: (is data, first, last)."""
    while start < end:
        try:
            data = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        if data > start:
            yield False, start, min(data, end)
            start = data
            continue
        stop = min(os.lseek(descriptor, start, os.SEEK_HOLE), end)
        yield True, start, stop
        start = stop
