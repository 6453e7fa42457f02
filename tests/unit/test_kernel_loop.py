"""The session without a kernel: requests are frames on a socket, and so are the answers."""

import errno
import os
import socket
import stat
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from mirrorfs.core import ids
from mirrorfs.kernel import protocol
from mirrorfs.kernel.loop import KernelSession, is_dying
from mirrorfs.kernel.protocol import Opcode
from mirrorfs.reactor import Reactor
from mirrorfs.strand import in_task, interruptible
from mirrorfs.table import Known


class FileSystem:
    """One whose fallocate has to be waited for."""

    def __init__(self) -> None:
        self.asked = trio.Event()

    async def fallocate(self, fh: int, mode: int, offset: int, size: int) -> None:
        await in_task()
        self.asked.set()
        with interruptible():
            await trio.sleep_forever()


class Kernel:
    """What is on the other side of /dev/fuse."""

    def __init__(self, there: socket.socket) -> None:
        self._there = trio.socket.from_stdlib_socket(there)

    async def ask(self, opcode: Opcode, unique: int, body: bytes) -> None:
        header = protocol.IN_HEADER.pack(protocol.IN_HEADER.size + len(body), opcode, unique, 1, 0, 0, 1, 0, 0)
        await self._there.send(header + body)

    async def answer(self) -> tuple[int, int]:
        """To which request, and its errno."""
        with trio.fail_after(30):
            _, error, unique = protocol.OUT_HEADER.unpack_from(await self._there.recv(100))
        return unique, -error


@pytest.fixture
async def file_system() -> FileSystem:
    return FileSystem()


@pytest.fixture
async def kernel(nursery: trio.Nursery, file_system: Any) -> AsyncIterator[Kernel]:
    reactor = Reactor()
    session = KernelSession(reactor)
    reactor.strands.gives_up = lambda caller: True  # who asks here has no process
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (here, there):
        end.setblocking(False)
    session._fs, session._fuse = file_system, os.dup(here.fileno())
    here.close()
    await nursery.start(session.run)
    nursery.start_soon(session.serve)
    yield Kernel(there)
    nursery.cancel_scope.cancel()
    there.close()


async def test_a_request_that_waits_is_answered_with_eintr_when_it_is_interrupted(
    kernel: Kernel, file_system: FileSystem
) -> None:
    await kernel.ask(Opcode.FALLOCATE, 10, bytes(protocol.FALLOCATE_IN.size))
    await file_system.asked.wait()
    await kernel.ask(Opcode.INTERRUPT, 11, protocol.INTERRUPT_IN.pack(10))
    assert await kernel.answer() == (10, errno.EINTR)  # and none to the interrupt itself


async def test_an_interrupt_right_behind_its_request_is_not_lost(kernel: Kernel) -> None:
    await kernel.ask(Opcode.FALLOCATE, 10, bytes(protocol.FALLOCATE_IN.size))
    await kernel.ask(Opcode.INTERRUPT, 11, protocol.INTERRUPT_IN.pack(10))
    assert await kernel.answer() == (10, errno.EINTR)


async def test_an_interrupt_of_what_is_not_known_is_to_be_said_again(kernel: Kernel) -> None:
    await kernel.ask(Opcode.INTERRUPT, 11, protocol.INTERRUPT_IN.pack(10))
    assert await kernel.answer() == (11, errno.EAGAIN)


@pytest.mark.parametrize("provisional", [False, True])
def test_names_are_expired_one_by_one_unless_some_may_be_known_under_another_number(provisional: bool) -> None:
    session = KernelSession(Reactor())
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session._fuse = os.dup(here.fileno())
    here.close()
    known = [Known(number, stat.S_IFDIR) for number in (7, ids.PROVISIONAL | 8 if provisional else 8)]
    for file in known:
        file.lookups = 1
    session._forget_all(known, [(known[0].id, [(9, b"below")]), (known[1].id, [(ids.ROOT, b"top")])])
    session.close()
    frames = list(iter(lambda: there.recv(200), b""))
    there.close()
    told = [protocol.OUT_HEADER.unpack_from(frame)[1] for frame in frames]
    assert told == [protocol.Notify.INVALIDATE_ENTRY] * 2 + [protocol.Notify.INVALIDATE_INODE] * 2
    names = [protocol.INVALIDATE_ENTRY.unpack_from(frame, protocol.OUT_HEADER.size) for frame in frames[:2]]
    flags = 0 if provisional else protocol.EXPIRE_ONLY
    assert names == [(ids.ROOT, 3, flags), (9, 5, flags)]


def test_who_lives_and_who_is_not_known_is_not_about_to_end() -> None:
    assert not is_dying(os.getpid())
    assert not is_dying(0)
