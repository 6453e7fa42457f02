"""The surroundings of the demo and the benchmark: a place of their own, left clean however they end."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def place(given: Path | None) -> Iterator[Path]:
    """A directory to work in: the given one, else a fresh one that is removed at the end if it is empty then.

    What is made meanwhile can be searched by every user, and SIGTERM and SIGHUP end the program as Ctrl-C does, so that
    what stands in `finally` is done.
    """
    old_mask = os.umask(0o022)
    # Not in /tmp, which may be a tmpfs: that is no file system to judge a mirror of disks on.
    directory = given or Path(tempfile.mkdtemp(prefix="mirrorfs-", dir="/var/tmp"))
    old_handlers = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        if given is None:
            directory.chmod(0o755)
        yield directory
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        os.umask(old_mask)
        if given is None:
            with contextlib.suppress(OSError):  # gone with the lab, or its leftovers are to be looked at
                directory.rmdir()


def _end(number: int, frame: FrameType | None) -> None:
    # Once: a second one (timeout(1) sends two) would break the cleaning off.
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)
