"""Coroutines by hand: they run at once as far as they get, wait without trio, and go into a task for what is trio's."""

from collections.abc import Callable
from typing import Any

import pytest
import trio

from mirrorfs.strand import Strands, in_task, is_strand, pause, waker


class Outcome:
    """What became of a strand."""

    def __init__(self) -> None:
        self.results: list[tuple[Any, BaseException | None]] = []

    def __call__(self, result: Any, error: BaseException | None) -> None:
        self.results.append((result, error))


class Gate:
    """Something to wait for."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.given_up = 0

    async def wait(self) -> None:
        wake = waker()
        self.waiting.append(wake)

        def give_up() -> None:
            self.waiting.remove(wake)
            self.given_up += 1

        await pause(give_up)

    def open(self) -> None:
        waiting, self.waiting = self.waiting, []
        for wake in waiting:
            wake()


@pytest.fixture
def strands() -> Strands:
    return Strands(lambda: None)


async def test_what_need_not_wait_is_done_at_once(strands: Strands) -> None:
    async def answer() -> int:
        return 42

    outcome = Outcome()
    strands.start(answer(), outcome)
    assert outcome.results == [(42, None)]


async def test_what_is_raised_is_told(strands: Strands) -> None:
    async def fail() -> None:
        raise OSError(5, "no")

    outcome = Outcome()
    strands.start(fail(), outcome)
    [(_, error)] = outcome.results
    assert isinstance(error, OSError)


async def test_a_strand_that_waits_goes_on_when_it_is_woken(strands: Strands) -> None:
    gate, outcome = Gate(), Outcome()

    async def wait_twice() -> str:
        await gate.wait()
        await gate.wait()
        return "done"

    strands.start(wait_twice(), outcome)
    assert not strands.run_ready()
    gate.open()
    assert outcome.results == []  # not within the one who wakes it
    assert strands.run_ready()
    gate.open()
    strands.run_ready()
    assert outcome.results == [("done", None)]


async def test_the_one_who_serves_is_told_that_there_is_something_to_run() -> None:
    woken: list[bool] = []
    strands, gate = Strands(lambda: woken.append(True)), Gate()
    strands.start(gate.wait(), Outcome())
    assert woken == []
    gate.open()
    assert woken == [True]


async def test_the_rest_of_a_strand_runs_in_a_task_with_all_that_trio_has(strands: Strands) -> None:
    outcome, ended = Outcome(), trio.Event()
    seen: list[bool] = []

    async def sleep() -> str:
        seen.append(is_strand())
        await in_task()
        seen.append(is_strand())
        with trio.move_on_after(0):
            await trio.sleep_forever()
        with pytest.raises(ZeroDivisionError):
            await trio.to_thread.run_sync(lambda: 1 // 0)
        ended.set()
        return "slept"

    async with trio.open_nursery() as nursery:
        strands.nursery = nursery
        strands.start(sleep(), outcome)
        assert outcome.results == []
        await ended.wait()
    assert outcome.results == [("slept", None)]
    assert seen == [True, False]


async def test_a_task_waits_in_the_same_way_and_may_be_cancelled() -> None:
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.wait)
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    with trio.move_on_after(0):
        await gate.wait()
    assert gate.given_up == 1
    assert gate.waiting == []


async def test_in_a_task_there_is_no_way_to_go() -> None:
    await in_task()
    assert not is_strand()


async def test_a_strand_that_starts_another_is_the_one_that_runs_again_afterwards(strands: Strands) -> None:
    gate, inner, outer = Gate(), Outcome(), Outcome()

    async def start_another() -> None:
        strands.start(gate.wait(), inner)
        await gate.wait()

    strands.start(start_another(), outer)
    assert len(gate.waiting) == 2
    gate.open()
    strands.run_ready()
    assert len(inner.results) == len(outer.results) == 1


async def test_what_waits_at_the_end_is_given_up_and_cleans_up(strands: Strands) -> None:
    gate, cleaned = Gate(), []

    async def hold() -> None:
        try:
            await gate.wait()
        finally:
            cleaned.append(True)

    outcome = Outcome()
    strands.start(hold(), outcome)
    strands.end()
    assert cleaned == [True]
    assert outcome.results == []


async def test_a_strand_that_uses_trio_outside_of_a_task_is_a_defect(strands: Strands) -> None:
    async def sleep() -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    with pytest.raises(AssertionError, match="outside of a task"):
        strands.start(sleep(), Outcome())
