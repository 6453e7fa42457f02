"""Coroutines that are run by hand, for what must be answered in microseconds: a request of the kernel, a message of the peer.

A task of trio costs more than such a request. A strand is a coroutine that the reactor runs at once, as far as it gets without
waiting; most end there. What it waits for takes `waker()` and calls it, and then the reactor runs the strand on. Code that may
run in a strand waits in two ways only: `pause`, which works in a task too, and, before anything of trio's (a sleep, a lock, a
cancel scope, a worker thread), `in_task`, from which on the rest of the strand runs in a task of trio.

Strands run in the trio thread, one at a time; what lies between two awaits is atomic, as it is between tasks.

Who waits for a strand may have got a signal (`Strand.interrupt`). Whether that ends the wait is up to him, as
`Strands.gives_up` says, and to what is waited in: only where giving up leaves nothing half done (`interruptible`).
"""

import errno
import os
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any, Final

import trio

_PAUSE: Final = object()
_TASK: Final = object()
_KEPT: Final = object()

#: How often somebody who has got a signal is looked at again: another one may follow, and nobody is told of that.
_LOOK_S: Final = 0.25

#: The strand that runs at this moment.
_running: "Strand | None" = None
#: In a task: the strand that it is the rest of.
_rest: ContextVar["Strand | None"] = ContextVar("_rest", default=None)


class Strands:
    """The strands of one process: those that can go on, and a nursery for those that need trio. `woken` is called when one
    can go on."""

    def __init__(self, woken: Callable[[], None]) -> None:
        self.ready: deque[Strand] = deque()
        self.nursery: trio.Nursery | None = None
        #: Whether a caller who has got a signal waits for nothing any more.
        self.gives_up: Callable[[int], bool] = lambda caller: True
        self._paused: set[Strand] = set()
        self._in_tasks: set[Strand] = set()
        self._woken = woken

    def start(
        self,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any, BaseException | None], None],
        key: int = 0,
        caller: int = 0,
    ) -> None:
        """Run a coroutine as far as it gets now; `done` is given its result, or what it raised. Until then `find` knows it by
        its key, unless that is 0; `caller` is who waits for it, for `gives_up`."""
        Strand(self, coroutine, done, key, caller).run()

    def run_ready(self) -> bool:
        """Run those that can go on; False if there are none."""
        ready = self.ready
        if not ready:
            return False
        for _ in range(len(ready)):
            ready.popleft().run()
        return True

    def wake(self, strand: "Strand") -> None:
        """What it waited for has happened."""
        self._paused.discard(strand)
        self.ready.append(strand)
        self._woken()

    def paused(self, strand: "Strand") -> None:
        """It waits for something."""
        self._paused.add(strand)

    def move(self, strand: "Strand") -> None:
        """The rest of it runs in a task."""
        assert self.nursery is not None
        self._in_tasks.add(strand)
        self.nursery.start_soon(strand.run_in_task)

    def has_ended(self, strand: "Strand") -> None:
        """The task of one that was moved is at its end."""
        self._in_tasks.discard(strand)

    def find(self, key: int) -> "Strand | None":
        """The one with this key, if it has not ended. It is looked for one by one: nothing is kept for it while strands run."""
        return next((strand for strand in chain(self._in_tasks, self._paused, self.ready) if strand.key == key), None)

    def end(self) -> None:
        """Nothing will wake them any more: give up what still waits. Nobody is told."""
        for strand in (*self._paused, *self.ready):
            strand.end()
        self._paused.clear()
        self.ready.clear()


class Strand:
    """One coroutine that is run by hand."""

    __slots__ = ("_caller", "_coroutine", "_done", "_interrupted", "_strands", "_waits_in", "key")

    def __init__(
        self,
        strands: Strands,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any, BaseException | None], None],
        key: int,
        caller: int,
    ) -> None:
        self._strands = strands
        self._coroutine = coroutine
        self._done = done
        self.key = key
        self._caller = caller
        self._interrupted = False
        #: The scope of what may be given up at this moment, or that nothing may any more.
        self._waits_in: object = None

    def run(self) -> None:
        """Run it as far as it gets."""
        global _running  # noqa: PLW0603
        before, _running = _running, self
        try:
            trap = self._coroutine.send(None)
        except StopIteration as stop:
            _running = before
            self._done(stop.value, None)
            return
        except BaseException as error:
            _running = before
            self._done(None, error)
            return
        _running = before
        if trap is _TASK:
            self._strands.move(self)
        else:
            assert trap is _PAUSE, f"a strand waits for trio outside of a task: {trap!r}"

    def wake(self) -> None:
        """What it waited for has happened: it goes on as soon as the reactor comes to it."""
        self._strands.wake(self)

    def pausing(self) -> None:
        """It is about to wait."""
        self._strands.paused(self)

    async def run_in_task(self) -> None:
        """Run the rest of it, as a part of the present task."""
        _rest.set(self)
        try:
            result = await _rest_of(self._coroutine)
        except trio.Cancelled:
            raise
        except BaseException as error:
            self._done(None, error)
        else:
            self._done(result, None)
        finally:
            self._strands.has_ended(self)

    def interrupt(self) -> None:
        """Whoever it is for has got a signal: if he gives up, so does it what it is `interruptible` in, now or later."""
        self._interrupted = True
        if isinstance(self._waits_in, trio.CancelScope):
            self._give_up(self._waits_in)

    def _give_up(self, scope: trio.CancelScope) -> None:
        """End the wait as soon as the caller does not wait for it."""
        if self._strands.gives_up(self._caller):
            scope.cancel()
        else:
            assert self._strands.nursery is not None
            self._strands.nursery.start_soon(self._give_up_later, scope)

    async def _give_up_later(self, scope: trio.CancelScope) -> None:
        await trio.sleep(_LOOK_S)
        while self._waits_in is scope:
            if self._strands.gives_up(self._caller):
                scope.cancel()
                return
            await trio.sleep(_LOOK_S)

    def keep(self) -> None:
        """It is not given up any more."""
        self._waits_in = _KEPT

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """As the function of that name."""
        if self._waits_in is _KEPT:
            yield
            return
        with trio.CancelScope() as scope:
            self._waits_in = scope
            if self._interrupted:
                self._give_up(scope)
            try:
                yield
            finally:
                self._waits_in = None
        if scope.cancelled_caught:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    def end(self) -> None:
        """Give it up."""
        self._coroutine.close()


@types.coroutine
def _rest_of(coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a coroutine that has begun already: `await` takes none of these."""
    step, value = coroutine.send, None
    while True:
        try:
            trap = step(value)
        except StopIteration as stop:
            return stop.value
        try:
            value, step = (yield trap), coroutine.send
        except BaseException as error:
            value, step = error, coroutine.throw


@types.coroutine
def _trap(what: object) -> Generator[Any, Any, None]:
    yield what


async def in_task() -> None:
    """From here on this runs in a task of trio, and may use all that trio has."""
    if _running is not None:
        await _trap(_TASK)


@contextmanager
def interruptible() -> Iterator[None]:
    """In a task: what is waited for in here may be given up, since nothing has been done yet. InterruptedError if whoever it is
    for gives up, now or before. What was never a strand is waited for by nobody who could say so."""
    strand = _rest.get()
    if strand is None:
        yield
    else:
        with strand.interruptible():
            yield


def done_in_part() -> None:
    """A part of what was asked for has been done: from here on the rest is waited for, `interruptible` or not."""
    strand = _running or _rest.get()
    if strand is not None:
        strand.keep()


def is_strand() -> bool:
    """Whether this runs in a strand."""
    return _running is not None


def waker() -> Callable[[], None]:
    """What lets the caller go on who is about to `pause`; to be called once."""
    if _running is not None:
        return _running.wake
    return partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())


async def pause(give_up: Callable[[], None]) -> None:
    """Wait until the `waker` is called. If the task is cancelled before, `give_up` is: the waker must not be used then."""
    if _running is not None:
        _running.pausing()
        await _trap(_PAUSE)
        return

    def abort(_: Any) -> trio.lowlevel.Abort:
        give_up()
        return trio.lowlevel.Abort.SUCCEEDED

    await trio.lowlevel.wait_task_rescheduled(abort)
