"""One task of trio that serves what must not wait for trio: /dev/fuse, the peer's connection, finished syncs.

It waits for all of them with one epoll. While there is work it takes turns with trio: a turn of a millisecond, then
whatever else is due. When it has run out of work it looks again for a short while before it sleeps, since a processor that
has gone idle needs longer to wake up than a peer to answer; for each second so spent in vain it must have worked three.
"""

import os
import select
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Final

import trio

from mirrorfs.strand import Strands

#: One turn, in seconds, before trio's own tasks are run; and if one of them has become ready to run meanwhile.
_TURN_S: Final = 0.001
_SHORT_TURN_S: Final = 0.0002
#: So long it looks again before it sleeps, and so much of that may be saved up.
_LOOK_S: Final = 0.0003
_MOST_CREDIT_S: Final = 0.01
_CREDIT_OF_WORK: Final = 1 / 3
#: Threads that wait for the interpreter get it after so long.
_SWITCH_S: Final = 0.0005
#: Tasks of trio wake each other: they are let run so often in a row, before the next turn.
_ROUNDS: Final = 3


class _Ready(trio.abc.Instrument):
    """The tasks of trio that are ready to run and have not run yet, besides the reactor's own."""

    def __init__(self) -> None:
        self.own: trio.lowlevel.Task | None = None
        self._tasks = set[trio.lowlevel.Task]()

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        if task is not self.own:
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._tasks.discard(task)


class Reactor:
    """Serves file descriptors and strands. A descriptor's `serve` reads what is there, without waiting."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Callable[[], None]] = {}
        self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._kick, select.EPOLLIN)
        self._sources[self._kick] = self._kicked
        self._sleeps = False
        self._credit_s = 0.0
        self._ready = _Ready()
        self.strands = Strands(self.wake)

    def add(self, descriptor: int, serve: Callable[[], None]) -> None:
        """Call `serve` whenever `descriptor` is readable, until `remove`."""
        self._sources[descriptor] = serve
        self._epoll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptor: int) -> None:
        """Look at it no more; not later than it is closed."""
        if self._sources.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def wake(self) -> None:
        """There is a strand that can go on."""
        if self._sleeps:
            self._sleeps = False
            os.eventfd_write(self._kick, 1)

    def _kicked(self) -> None:
        os.eventfd_read(self._kick)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._ready.own = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self._ready)
        try:
            async with trio.open_nursery() as nursery:
                self.strands.nursery = nursery
                task_status.started()
                while True:
                    if self._turn():
                        await self._let_others_run()
                    else:
                        await self._sleep()
        finally:
            sys.setswitchinterval(before)
            trio.lowlevel.remove_instrument(self._ready)
            self.strands.end()
            self.strands.nursery = None

    def close(self) -> None:
        """Give the descriptors back."""
        self._epoll.close()
        os.close(self._kick)

    async def _let_others_run(self) -> None:
        for _ in range(_ROUNDS):
            await trio.lowlevel.checkpoint()
            if not self._ready:
                return

    async def _sleep(self) -> None:
        self._sleeps = True
        try:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
        finally:
            self._sleeps = False

    def _turn(self) -> bool:
        """Work until the turn is over, or there is no more; True in the first case."""
        poll, sources, strands = self._epoll.poll, self._sources, self.strands
        began = worked = perf_counter()
        look_at = began + _SHORT_TURN_S
        while True:
            busy = strands.run_ready()
            for descriptor, _ in poll(0):
                serve = sources.get(descriptor)
                if serve is not None:
                    serve()
                    busy = True
                    while strands.ready:
                        strands.run_ready()
            now = perf_counter()
            if busy:
                self._credit_s = min(self._credit_s + (now - worked) * _CREDIT_OF_WORK, _MOST_CREDIT_S)
                worked = now
                if now > look_at:
                    if now - began > _TURN_S or self._ready:
                        return True
                    look_at = now + _SHORT_TURN_S
            elif self._ready:
                return True  # a resync, for one: it has work, and none of it comes by way of a descriptor
            elif self._credit_s < _LOOK_S:
                return False  # a look that is too short is always in vain: save up for a whole one
            elif now - worked > _LOOK_S:
                self._credit_s -= now - worked
                return False
            else:
                os.sched_yield()  # who is waited for may need this very processor
