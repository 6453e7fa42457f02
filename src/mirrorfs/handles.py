"""What an application has open: files and directories."""

import os

from mirrorfs.table import Known


class Handle:
    """An open file: what the later requests on it do not say themselves.

    `clears` are the mode bits that a write through it takes away, besides setgid where the group may execute.
    """

    __slots__ = ("clears", "data_sync", "known", "reign", "sync", "writable")

    def __init__(self, known: Known, flags: int, reign: int, clears: int) -> None:
        self.known = known
        self.clears = clears
        self.reign = reign
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.sync = bool(flags & os.O_DSYNC)
        self.data_sync = flags & os.O_SYNC != os.O_SYNC


class Listing:
    """An open directory: the names as they were when the listing began."""

    __slots__ = ("known", "names")

    def __init__(self, known: Known) -> None:
        self.known = known
        self.names: list[bytes] = []
