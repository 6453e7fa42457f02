"""fsync and fdatasync without a thread each: handed to the kernel (io_submit(2)), which tells the reactor when they are done.

Where the kernel has no such thing, and where there is no reactor, worker threads do it.
"""

import ctypes
import errno
import logging
import os
import struct
from collections.abc import Callable
from typing import Final, Protocol

import trio

from mirrorfs.reactor import Reactor
from mirrorfs.strand import in_task, pause, waker

log = logging.getLogger(__name__)

#: So many may be under way; more wait for worker threads.
_AT_ONCE: Final = 256
#: linux/aio_abi.h: struct iocb, struct io_event, and the commands.
_IOCB: Final = struct.Struct("<QIiHhIQQqQII")
_EVENT: Final = struct.Struct("<QQqq")
_FSYNC: Final = 2
_FDSYNC: Final = 3
_RESFD: Final = 1
#: System call numbers, which are not the same everywhere.
_CALLS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}

_libc = ctypes.PyDLL(None, use_errno=True)


class Syncs(Protocol):
    """Makes files durable."""

    async def sync(self, descriptor: int, data_only: bool) -> None:
        """fsync, or fdatasync; OSError if it failed. The descriptor stays open as long."""

    def begin(self, descriptor: int, data_only: bool, done: Callable[[int], None]) -> bool:
        """Begin one, and call `done` with 0 or a negative errno; False if it cannot be begun without a task that waits."""

    def close(self) -> None:
        """Give everything back; waits for what is under way."""


class ThreadSyncs:
    """Each in a worker thread."""

    def begin(self, descriptor: int, data_only: bool, done: Callable[[int], None]) -> bool:
        """There is none without a task."""
        return False

    def close(self) -> None:
        """There is nothing to give back."""

    async def sync(self, descriptor: int, data_only: bool) -> None:
        """fsync, or fdatasync; OSError if it failed."""
        await in_task()
        await trio.to_thread.run_sync(os.fdatasync if data_only else os.fsync, descriptor)


class KernelSyncs:
    """Handed to the kernel, all at once; OSError where it cannot be."""

    def __init__(self, reactor: Reactor) -> None:
        setup, self._destroy, self._getevents, self._submit = _CALLS[os.uname().machine]
        self._context = ctypes.c_ulong()
        if _libc.syscall(setup, _AT_ONCE, ctypes.byref(self._context)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self._threads = ThreadSyncs()
        self._reactor = reactor
        self._done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waiting: dict[int, Callable[[int], None]] = {}
        self._next = 1
        self._block = ctypes.create_string_buffer(_IOCB.size)
        self._blocks = (ctypes.c_void_p * 1)(ctypes.addressof(self._block))
        self._events = ctypes.create_string_buffer(_EVENT.size * _AT_ONCE)
        reactor.add(self._done, self._finish)

    def close(self) -> None:
        """Give everything back; waits for what is under way."""
        self._reactor.remove(self._done)
        _libc.syscall(self._destroy, self._context)
        os.close(self._done)

    async def sync(self, descriptor: int, data_only: bool) -> None:
        """fsync, or fdatasync; OSError if it failed."""
        result: list[int] = []
        wake = waker()

        def done(code: int) -> None:
            result.append(code)
            if not given_up:
                wake()

        given_up: list[bool] = []
        if not self.begin(descriptor, data_only, done):
            await self._threads.sync(descriptor, data_only)
            return
        await pause(lambda: given_up.append(True))
        if result[0] < 0:
            raise OSError(-result[0], os.strerror(-result[0]))

    def begin(self, descriptor: int, data_only: bool, done: Callable[[int], None]) -> bool:
        """Begin one, and call `done` with 0 or a negative errno; False if it cannot be begun here. The kernel holds the file by
        itself: the descriptor may be closed."""
        if len(self._waiting) >= _AT_ONCE:
            return False
        number, self._next = self._next, self._next + 1
        command = _FDSYNC if data_only else _FSYNC
        _IOCB.pack_into(self._block, 0, number, 0, 0, command, 0, descriptor, 0, 0, 0, 0, _RESFD, self._done)
        if _libc.syscall(self._submit, self._context, 1, self._blocks) != 1:
            code = ctypes.get_errno()
            if code not in (errno.EAGAIN, errno.EINVAL, errno.EOPNOTSUPP):
                log.error("io_submit: %s", os.strerror(code))
            return False
        self._waiting[number] = done
        return True

    def _finish(self) -> None:
        """Some are done."""
        os.eventfd_read(self._done)
        while True:
            count = _libc.syscall(self._getevents, self._context, 0, _AT_ONCE, self._events, None)
            for index in range(max(count, 0)):
                number, _, code, _ = _EVENT.unpack_from(self._events, index * _EVENT.size)
                try:
                    self._waiting.pop(number)(code)
                except Exception:
                    log.exception("a defect in what waits for a sync")
            if count < _AT_ONCE:
                return


def syncs_of(reactor: Reactor | None) -> Syncs:
    """The best there is."""
    if reactor is not None:
        try:
            return KernelSyncs(reactor)
        except (OSError, KeyError) as error:
            log.info("syncs are done by threads: the kernel takes none: %s", error)
    return ThreadSyncs()
