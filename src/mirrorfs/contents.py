"""What changes the data of a file: it is written, allocated, copied from another. What was really done of it, and what is left.

Everything here is synchronous and raises OSError as the backing store gives it.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from mirrorfs import backing
from mirrorfs.core import operations as ops
from mirrorfs.table import Table

#: A system call that fails so may have done a part of its work; others refuse before they begin.
_IN_THE_MIDDLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)


class PartialChangeError(Exception):
    """A change of several steps failed after some of them: `done` is what really happened, `error` what failed."""

    def __init__(self, done: ops.SetAttributes, error: OSError) -> None:
        super().__init__(str(error))
        self.done = done
        self.error = error


def write(table: Table, change: ops.Write) -> int:
    """Returns how many bytes were written."""
    known = table.get(change.file)
    known.version += 1
    return os.pwrite(table.data(known), change.data, change.offset)


def allocate(table: Table, change: ops.Allocate) -> None:
    """EOPNOTSUPP for a mode that is not of `ALLOCATE_MODES`; PartialChangeError if there was not room enough, and the file has
    grown all the same."""
    if change.mode not in ops.ALLOCATE_MODES:
        raise unsupported()
    known = table.get(change.file)
    known.version += 1
    descriptor = table.data(known)
    before = os.fstat(descriptor).st_size
    try:
        backing.allocate(descriptor, change.mode, change.offset, change.size)
    except OSError as error:
        after = os.fstat(descriptor).st_size
        if after != before and not is_unsure(change, error):
            raise PartialChangeError(ops.SetAttributes(change.file, size=after), error) from error
        raise


def copy_range(table: Table, change: ops.CopyRange) -> int:
    """Returns how many bytes were copied: fewer if the source ends, or as the file system likes."""
    source, target = table.get(change.source), table.get(change.file)
    target.version += 1
    descriptor = table.hold(source)  # the one that is opened next might close it
    try:
        return os.copy_file_range(
            descriptor, table.data(target), change.size, offset_src=change.source_offset, offset_dst=change.offset
        )
    finally:
        table.let_go(source)


def bounded(change: ops.Change) -> ops.Change:
    """As much of a change as is made at once: a copy is cut."""
    return replace(change, size=min(change.size, ops.MAX_COPY)) if isinstance(change, ops.CopyRange) else change


def make(change: ops.Change, apply: Callable[[ops.Change], Any]) -> tuple[ops.Change, Any, OSError | None]:
    """Make a change by `Tree.apply`; returns what has really changed, the result, and what failed then.

    A full disk takes a part of what is written. Raises OSError if nothing was changed.
    """
    try:
        result = apply(change)
    except PartialChangeError as partly:
        return partly.done, None, partly.error
    if isinstance(change, ops.Write) and result < len(change.data):
        change = replace(change, data=change.data[:result])
    elif isinstance(change, ops.CopyRange) and result < change.size:
        change = replace(change, size=result)
    return change, result, None


def apply_all(change: ops.Write | ops.CopyRange, apply: Callable[[ops.Write | ops.CopyRange], int]) -> None:
    """Make all of a change that the primary has made: where a part was made, the next call does the rest or says why not."""
    left = len(change.data) if isinstance(change, ops.Write) else change.size
    while (count := apply(change)) < left:
        if not count:
            raise OSError(errno.ENODATA, "the source of a copy ends before it does at the primary")
        left -= count
        match change:
            case ops.Write():
                change = replace(change, offset=change.offset + count, data=change.data[count:])
            case ops.CopyRange():
                at, offset = change.source_offset + count, change.offset + count
                change = replace(change, source_offset=at, offset=offset, size=left)


def is_unsure(change: ops.Change, error: OSError) -> bool:
    """Whether nobody knows which bytes a change that failed has made zeros."""
    zeroing = isinstance(change, ops.Allocate) and change.mode & (ops.PUNCH_HOLE | ops.ZERO_RANGE)
    return bool(zeroing) and error.errno in _IN_THE_MIDDLE


def unsupported() -> OSError:
    """What a kernel takes for "do it by other means"."""
    return OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
