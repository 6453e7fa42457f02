"""Time of a run: it stands still while anything can run, and then jumps to whatever is due next.

`SimulatedClock.sleep` stands in for `trio.sleep`: a run sleeps some thousand times, and a timer in a heap costs a fifth of the
cancel scope that trio makes for each.
"""

import contextlib
import heapq
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import trio
from trio.lowlevel import Abort, Task

from tests.sim.kernel import running

_runner: Final[Any] = importlib.import_module("trio._core._run")


class _Timer(list[Any]):
    """When, which, whose: comparable by the first two."""


class SimulatedClock(trio.abc.Clock):
    """A clock for `trio.run`, in seconds from 0."""

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[_Timer] = []
        self._count = itertools.count()

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Asked when nothing can run: go to whatever is due next."""
        timers = self._timers
        while timers and timers[0][2] is None:
            heapq.heappop(timers)
        due = min(deadline, timers[0][0]) if timers else deadline
        if due == math.inf:
            return math.inf
        self._now = max(self._now, due)
        while timers and timers[0][0] <= self._now:
            whose = heapq.heappop(timers)[2]
            if isinstance(whose, Task):
                trio.lowlevel.reschedule(whose)
            elif whose is not None:
                whose()
        return 0.0

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something then, in no task."""
        heapq.heappush(self._timers, _Timer((self._now + seconds, next(self._count), call)))

    async def sleep(self, seconds: float) -> None:
        """Stands in for `trio.sleep`."""
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
            return
        timer = self._wake_after(seconds)

        def abort(_: object) -> Abort:
            timer[2] = None
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def pass_by(self, seconds: float) -> None:
        """Sleep, and let no cancellation shorten it."""
        if seconds > 0:
            self._wake_after(seconds)
            await trio.lowlevel.wait_task_rescheduled(lambda _: Abort.FAILED)

    def _wake_after(self, seconds: float) -> _Timer:
        timer = _Timer((self._now + seconds, next(self._count), trio.lowlevel.current_task()))
        heapq.heappush(self._timers, timer)
        return timer


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """trio's scheduler shuffles by the seed, and leaves the tasks of processes that stand still where they are."""
    state = _runner._r.getstate()
    _runner._r.seed(f"scheduler {seed}")
    reschedule = _runner.Runner.reschedule

    def held_back(runner: Any, task: Task, *outcome: Any) -> None:
        reschedule(runner, task, *outcome)
        process = task.context.get(running)
        if process is not None and process.stopped is not None:
            process.stopped.append(runner.runq.pop())

    try:
        with (
            mock.patch.object(_runner, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
            mock.patch.object(_runner.Runner, "reschedule", held_back),
        ):
            yield
    finally:
        _runner._r.setstate(state)


def let_run(tasks: list[Task]) -> None:
    """The tasks of a process that stood still go on, where they would have gone on then."""
    runq = _runner.GLOBAL_RUN_CONTEXT.runner.runq
    runq.extend(tasks)
