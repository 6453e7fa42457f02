"""The session: /dev/fuse read and answered by the reactor, one strand a request.

A request lies in a buffer of its own until its strand first waits: what it needs after that it has copied. So one buffer is
enough, and a write goes from it to the file and to the peer.
"""

import errno
import logging
import os
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs import backing
from mirrorfs.answers import Answers, errno_of
from mirrorfs.core import ids
from mirrorfs.errors import MirrorfsError
from mirrorfs.kernel import protocol
from mirrorfs.kernel.protocol import Init, Notify, Opcode
from mirrorfs.kernel.requests import TABLE, Caller, KernelAnswers
from mirrorfs.reactor import Reactor
from mirrorfs.syncing import syncs_of
from mirrorfs.table import Known

if TYPE_CHECKING:
    from mirrorfs.fuse_ops import FuseOperations

log = logging.getLogger(__name__)

_MAX_WRITE: Final = 1 << 20
_MAX_PAGES: Final = _MAX_WRITE // 4096
#: The kernel wants room for a write with its header.
_BUFFER_SIZE: Final = _MAX_WRITE + 4096
#: Asynchronous requests (O_DIRECT with AIO, readahead) that may be under way, and from which number on the kernel holds back.
_BACKGROUND: Final = 256
_CONGESTED: Final = 192
_WANTED: Final = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.EXPORT_SUPPORT
    | Init.BIG_WRITES
    | Init.DONT_MASK
    | Init.DO_READDIRPLUS
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.POSIX_ACL
    | Init.MAX_PAGES
    | Init.EXPLICIT_INVAL_DATA
    | Init.HANDLE_KILLPRIV_V2
    | Init.INIT_EXT
    | Init.DIRECT_IO_ALLOW_MMAP
)
_NEEDED: Final = Init.DONT_MASK | Init.EXPLICIT_INVAL_DATA | Init.HANDLE_KILLPRIV_V2 | Init.MAX_PAGES
#: Requests served in a row before the reactor looks at the peer's connection.
_IN_A_ROW: Final = 16


def is_supported() -> bool:
    """Whether the running kernel has what this session needs: Linux 5.11."""
    major, minor, *_ = os.uname().release.split(".")
    return (int(major), int(minor.split("-")[0])) >= (5, 11)


class KernelSession:
    """One mount, from `mount` to `close`."""

    def __init__(self, reactor: Reactor) -> None:
        self._kernel_answers = KernelAnswers()
        self.answers: Answers = self._kernel_answers
        self._reactor = reactor
        reactor.strands.gives_up = is_dying
        self._fuse = -1
        self._fs: FuseOperations
        self._buffer = bytearray(_BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._ended = trio.Event()
        self.reactor: Reactor | None = reactor
        self.syncs = syncs_of(reactor)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what serves requests and the peer's connection."""
        await self._reactor.run(task_status=task_status)

    def mount(self, operations: "FuseOperations", path: Path, volume: str) -> None:
        """Mount over `path`; MirrorfsError if the kernel will not."""
        self._fs = operations
        try:
            self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            backing.mount_fuse(self._fuse, path, volume)
        except OSError as error:
            raise MirrorfsError(
                f"{path}: cannot be mounted: {error.strerror}. Is /dev/fuse there, and is this root?"
            ) from error

    async def serve(self) -> None:
        """Serve requests until the file system is unmounted."""
        self._reactor.add(self._fuse, self._readable)
        try:
            await self._ended.wait()
        finally:
            self._reactor.remove(self._fuse)

    def close(self) -> None:
        """Give back what the session held. Unmounts nothing: it has been done, or would hit what is mounted below."""
        if self._fuse >= 0:
            os.close(self._fuse)
            self._fuse = -1
        self.syncs.close()
        self._reactor.close()

    # ---- requests

    def _readable(self) -> None:
        for _ in range(_IN_A_ROW):
            try:
                size = os.readv(self._fuse, (self._buffer,))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue  # the one who asked has given up
                if error.errno != errno.ENODEV:
                    log.error("/dev/fuse: %s", error.strerror)
                self._ended.set()
                self._reactor.remove(self._fuse)
                return
            self._take(size)

    def _take(self, size: int) -> None:
        _, opcode, unique, node, uid, gid, pid, _, _ = protocol.IN_HEADER.unpack_from(self._buffer)
        body = self._view[protocol.IN_HEADER.size : size]
        call = TABLE.get(opcode)
        if call is None:
            self._take_other(opcode, unique, node, body)
            return
        try:
            coroutine = call(self._fs, node, body, Caller(uid, gid, pid))
        except Exception:
            log.exception("a request of the kernel (%d) that makes no sense", opcode)
            self._refuse(unique, errno.EIO)
            return
        self._reactor.strands.start(coroutine, partial(self._done, unique, opcode), unique, pid)

    def _done(self, unique: int, opcode: int, result: Any, error: BaseException | None) -> None:
        if error is None:
            self._answer(unique, result)
        else:
            self._refuse(unique, errno_of(error, Opcode(opcode).name.lower()))

    def _answer(self, unique: int, payload: bytes | memoryview) -> None:
        try:
            os.writev(self._fuse, (protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(payload), 0, unique), payload))
        except OSError as error:
            # Both say that the mount is ending.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("/dev/fuse: an answer was refused: %s", error.strerror)
                self._refuse(unique, errno.EIO)

    def _refuse(self, unique: int, number: int) -> None:
        try:
            os.write(self._fuse, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, -number, unique))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("/dev/fuse: an answer was refused: %s", error.strerror)

    def _take_other(self, opcode: int, unique: int, node: int, body: memoryview) -> None:
        match opcode:
            case Opcode.FORGET:
                self._fs.forgotten([(node, protocol.FORGET_IN.unpack_from(body)[0])])
            case Opcode.BATCH_FORGET:
                count, _ = protocol.BATCH_FORGET_IN.unpack_from(body)
                start = protocol.BATCH_FORGET_IN.size
                self._fs.forgotten(protocol.FORGET_ONE.iter_unpack(body[start : start + count * protocol.FORGET_ONE.size]))
            case Opcode.INTERRUPT:
                self._interrupt(unique, *protocol.INTERRUPT_IN.unpack_from(body))
            case Opcode.INIT:
                self._init(unique, body)
            case Opcode.DESTROY:
                self._answer(unique, b"")
            case _:
                self._refuse(unique, errno.ENOSYS)

    def _interrupt(self, unique: int, asked: int) -> None:
        """Who waits for the answer to the request `asked` has got a signal, and if that is to end him, ends only with it. If
        not, he goes on waiting: no file system of a disk answers a write with EINTR, and no application expects it.

        Whether it may be given up is for the request to know. Nobody else reads /dev/fuse, so a request is known here before
        it can be interrupted. One that is not has been answered, and then the kernel has no use for EAGAIN; where it has, it
        will say so again.
        """
        strand = self._reactor.strands.find(asked)
        if strand is None:
            self._refuse(unique, errno.EAGAIN)
        else:
            strand.interrupt()

    def _init(self, unique: int, body: memoryview) -> None:
        major, minor, readahead, offered = protocol.INIT_IN.unpack_from(body)
        if major == protocol.MAJOR and offered & Init.INIT_EXT:
            *_, more = protocol.INIT_IN_EXT.unpack_from(body)
            offered |= more << 32
        missing = _NEEDED & ~Init(offered)
        if major != protocol.MAJOR or minor < protocol.LEAST_MINOR or missing:
            log.error('the kernel speaks protocol %d.%d of FUSE, without %s: use session = "pyfuse3"', major, minor, missing)
            self._refuse(unique, errno.EPROTO)
            self._ended.set()
            return
        self._kernel_answers.can_forget_nothing = minor >= protocol.MINOR_WITH_EPOCHS
        flags = int(_WANTED) & offered
        answer = protocol.INIT_OUT.pack(
            protocol.MAJOR,
            min(minor, protocol.MINOR),
            readahead,
            flags & 0xFFFF_FFFF,
            _BACKGROUND,
            _CONGESTED,
            _MAX_WRITE,
            1,
            _MAX_PAGES,
            0,
            flags >> 32,
        )
        self._answer(unique, answer)

    # ---- making the kernel forget

    async def invalidate(self, files: Iterable[Known]) -> None:
        """Make the kernel forget the names, attributes and pages that it has of these files.

        From a thread, since the kernel may need an answer from this process before it can.
        """
        told = [known for known in files if known.lookups]
        cached = [(known.id, list(known.names)) for known in told]
        await trio.to_thread.run_sync(self._forget_all, told, cached, limiter=_invalidating)

    def _forget_all(self, files: list[Known], cached: list[tuple[int, list[tuple[int, bytes]]]]) -> None:
        if not self._kernel_answers.can_forget_nothing or not self._tell(Notify.INCREASE_EPOCH, b""):
            # Expired, a name loses neither what is mounted below it nor who works there. But of a directory that the kernel
            # has by a provisional number, it may have names that are noted under the real one: they go with all above.
            provisional = any(ids.is_provisional(number) for number, _ in cached)
            flags = 0 if provisional else protocol.EXPIRE_ONLY
            # The names in the root first: with each that is dropped, the kernel drops all that it knows below it.
            for of_root in (True, False):
                for _, names in cached:
                    for parent, name in names:
                        if (parent == ids.ROOT) is of_root:
                            entry = protocol.INVALIDATE_ENTRY.pack(parent, len(name), flags)
                            self._tell(Notify.INVALIDATE_ENTRY, entry + name + b"\0")
        for known in files:
            if known.lookups:
                self._tell(Notify.INVALIDATE_INODE, protocol.INVALIDATE_INODE.pack(known.id, 0, 0))

    def _tell(self, what: Notify, payload: bytes) -> bool:
        """False if the kernel knows nothing of it."""
        try:
            os.write(self._fuse, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(payload), what, 0) + payload)
        except OSError:
            return False
        return True


def is_dying(thread: int) -> bool:
    """Whether a signal is about to end this thread: then SIGKILL is pending for it, whichever signal it was. False for one that
    is not known here, as 0, which stands for one of another namespace of process ids."""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return False
    return any(
        int(line.split()[1], 16) & 1 << (signal.SIGKILL - 1)
        for line in status.splitlines()
        if line.startswith(("SigPnd:", "ShdPnd:"))
    )


_invalidating: Final = trio.CapacityLimiter(2)
