"""The FUSE session of pyfuse3: mounting, the main loop, telling the kernel to forget what it has cached.

pyfuse3 leaves a file system no say in the flags of INIT. Two of them matter here: DONT_MASK, without which the kernel applies
the umask where a default ACL takes its place, and HANDLE_KILLPRIV_V2, without which it asks for an attribute before every
write. So the mount is made here, and libfuse gets a socket first (`/dev/fd/N` as the mount point, as it documents): the INIT
request is handed to it, the flags are added to its answer, and then /dev/fuse is put in the socket's place.
"""

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

from mirrorfs import backing
from mirrorfs.answers import Answers, Pyfuse3Answers
from mirrorfs.errors import MirrorfsError
from mirrorfs.reactor import Reactor
from mirrorfs.syncing import Syncs, ThreadSyncs
from mirrorfs.table import Known

#: Requests that may wait at once. While writes are frozen they wait here, and reads and statfs must still get through.
_MAX_TASKS: Final = 10_000
_REQUEST_SIZE: Final = 1 << 20
#: linux/fuse.h: the header of a request and of an answer, and where `flags` stands in fuse_init_in and fuse_init_out.
_IN_HEADER: Final = 40
_OUT_HEADER: Final = 16
_INIT_FLAGS: Final = 12
_DONT_MASK: Final = 1 << 6
_HANDLE_KILLPRIV_V2: Final = 1 << 28

_wait_fuse_readable: Any = pyfuse3._wait_fuse_readable  # type: ignore[attr-defined]


class Pyfuse3Session:
    """One mount, from `mount` to `close`. pyfuse3 can have one in a process."""

    def __init__(self) -> None:
        self.answers: Answers = Pyfuse3Answers()
        self.syncs: Syncs = ThreadSyncs()
        self.reactor: Reactor | None = None
        self._fuse = -1
        self._mounted = False
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll = select.poll()

    def mount(self, operations: pyfuse3.Operations, path: Path, volume: str) -> None:
        """Mount over `path`; MirrorfsError if the kernel will not."""
        try:
            self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            backing.mount_fuse(self._fuse, path, volume)
            pyfuse3.init(operations, f"/dev/fd/{self._far.fileno()}", set())
            self._mounted = True
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise MirrorfsError(f"{path}: cannot be mounted: {why}. Is /dev/fuse there, and is this root?") from error

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """pyfuse3 runs by itself, and the peer's connection has a task of its own."""
        task_status.started()

    async def serve(self) -> None:
        """Serve requests until the file system is unmounted."""
        await self._negotiate()
        pyfuse3._wait_fuse_readable = self._wait_and_look_again  # type: ignore[attr-defined]
        await pyfuse3.main(max_tasks=_MAX_TASKS)

    def close(self) -> None:
        """Give back what the session held. Unmounts nothing: it has been done, or would hit what is mounted below."""
        if self._mounted:
            self._far.detach()  # libfuse closes it
            pyfuse3.close(unmount=False)
        else:
            self._far.close()
        if self._fuse >= 0:
            os.close(self._fuse)
        self._near.close()

    async def invalidate(self, files: Iterable[Known]) -> None:
        """Make the kernel forget the names, attributes and pages that it has of these files.

        From a thread, since the kernel may need an answer from this process before it can.
        """
        told = [known for known in files if known.lookups]
        cached = [(known, list(known.names)) for known in told]
        await trio.to_thread.run_sync(_forget_all, told, cached, limiter=_invalidating)

    async def _negotiate(self) -> None:
        """Let libfuse answer INIT over the socket, add to what it asks for, then give it /dev/fuse."""
        ended = trio.Event()

        async def first() -> None:
            await pyfuse3.main()
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.lowlevel.wait_readable(self._fuse)
            request = os.read(self._fuse, _REQUEST_SIZE)
            (offered,) = struct.unpack_from("<I", request, _IN_HEADER + _INIT_FLAGS)
            self._near.send(request)
            await trio.lowlevel.wait_readable(self._near)
            answer = bytearray(self._near.recv(_REQUEST_SIZE))
            (wanted,) = struct.unpack_from("<I", answer, _OUT_HEADER + _INIT_FLAGS)
            wanted |= offered & (_DONT_MASK | _HANDLE_KILLPRIV_V2)
            struct.pack_into("<I", answer, _OUT_HEADER + _INIT_FLAGS, wanted)
            os.write(self._fuse, answer)
            while not ended.is_set():
                trio.lowlevel.notify_closing(self._far)  # the readers of the first main loop end
                await trio.lowlevel.checkpoint()
        os.dup2(self._fuse, self._far.fileno(), inheritable=False)
        os.close(self._fuse)
        self._fuse = -1
        self._poll.register(self._far.fileno(), select.POLLIN)

    async def _wait_and_look_again(self) -> bool:
        """Wait for a request, and look again right before pyfuse3 reads it.

        pyfuse3 reads /dev/fuse blocking, with the GIL held: if the client was killed since the wait, the process would stand
        still. Looking once more leaves a window of microseconds instead of one of a whole turn of the loop.
        """
        while await _wait_fuse_readable():
            if self._poll.poll(0):
                return True
        return False


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


_invalidating: Final = trio.CapacityLimiter(2)
