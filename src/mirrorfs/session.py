"""The FUSE session of pyfuse3: mounting, the main loop, telling the kernel to forget what it has cached."""

import contextlib
import select
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

from mirrorfs.errors import MirrorfsError
from mirrorfs.table import Known

_OPTIONS: Final = {"default_permissions", "allow_other", "suid", "dev", "subtype=mirrorfs"}

#: Requests that may wait at once. While writes are frozen they wait here, and reads and statfs must still get through.
_MAX_TASKS: Final = 10_000

_wait_fuse_readable: Any = pyfuse3._wait_fuse_readable  # type: ignore[attr-defined]


async def _wait_and_look_again() -> bool:
    """Wait for a request, and look again right before pyfuse3 reads it.

    pyfuse3 reads /dev/fuse blocking, with the GIL held: if the client was killed since the wait, the process would stand
    still. Looking once more leaves a window of microseconds instead of one of a whole turn of the loop.
    """
    while await _wait_fuse_readable():
        if _poll is None or _poll.poll(0):
            return True
    return False


_poll: "select.poll | None" = None


def mount(operations: pyfuse3.Operations, path: Path, volume: str) -> None:
    """Mount over `path`; MirrorfsError if the kernel will not."""
    global _poll  # noqa: PLW0603  (pyfuse3 itself has one session a process)
    before = _fuse_descriptors()
    try:
        pyfuse3.init(operations, str(path), {*_OPTIONS, f"fsname={volume}"})
    except RuntimeError as error:
        raise MirrorfsError(f"{path}: cannot be mounted: {error}. Is /dev/fuse there, and is this root?") from error
    _poll = select.poll()
    for descriptor in _fuse_descriptors() - before:
        _poll.register(descriptor, select.POLLIN)
    pyfuse3._wait_fuse_readable = _wait_and_look_again  # type: ignore[attr-defined]


def _fuse_descriptors() -> set[int]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()) == "/dev/fuse":
                found.add(int(link.name))
    return found


async def serve() -> None:
    """Serve requests until the file system is unmounted."""
    await pyfuse3.main(max_tasks=_MAX_TASKS)


def close() -> None:
    """Give back what the session held. Unmounts nothing: it has been done, or would hit what is mounted below."""
    pyfuse3.close(unmount=False)


def _forget_all(files: list[Known], cached: list[tuple[Known, list[tuple[int, bytes]]]]) -> None:
    # The names in the root first: with each, the kernel drops all that it knows below it.
    for of_root in (True, False):
        for known, names in cached:
            for parent, name in names:
                if (parent == pyfuse3.ROOT_INODE) is of_root and (of_root or known.lookups):
                    with contextlib.suppress(OSError):
                        pyfuse3.invalidate_entry(parent, name)
    for known in files:
        if known.lookups:
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(known.id)


async def invalidate(files: Iterable[Known]) -> None:
    """Make the kernel forget the names, attributes and pages that it has of these files.

    From a thread, since the kernel may need an answer from this process before it can.
    """
    told = [known for known in files if known.lookups]
    cached = [(known, list(known.names)) for known in told]
    await trio.to_thread.run_sync(_forget_all, told, cached, limiter=_invalidating)


_invalidating: Final = trio.CapacityLimiter(2)
