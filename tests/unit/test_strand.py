"""Coroutines by hand: they run at once as far as they get, wait without trio, and go into a task for what is trio's."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
import trio

from mirrorfs.strand import Strands, done_in_part, in_task, interruptible, is_strand, pause, waker


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


# ---- interrupted


KEY = 7


async def _wait_interruptibly(begun: trio.Event, first: Gate | None = None) -> None:
    if first is not None:
        await first.wait()
    await in_task()
    begun.set()
    with interruptible():
        await trio.sleep_forever()


def _interrupt(strands: Strands) -> None:
    strand = strands.find(KEY)
    assert strand is not None
    strand.interrupt()


def _is_interrupted(outcome: Outcome) -> bool:
    [(_, error)] = outcome.results
    return isinstance(error, InterruptedError) and error.errno == errno.EINTR


async def test_what_waits_and_may_be_given_up_ends_when_it_is_interrupted(strands: Strands) -> None:
    outcome, begun = Outcome(), trio.Event()
    async with trio.open_nursery() as strands.nursery:
        strands.start(_wait_interruptibly(begun), outcome, KEY)
        await begun.wait()
        _interrupt(strands)
    assert _is_interrupted(outcome)
    assert strands.find(KEY) is None


async def test_an_interrupt_counts_that_comes_before_the_wait_that_may_be_given_up(strands: Strands) -> None:
    outcome, begun, gate = Outcome(), trio.Event(), Gate()
    async with trio.open_nursery() as strands.nursery:
        strands.start(_wait_interruptibly(begun, gate), outcome, KEY)
        _interrupt(strands)  # it is paused
        gate.open()
        _interrupt(strands)  # it can go on
        strands.run_ready()
        _interrupt(strands)  # its task has not begun
    assert begun.is_set()
    assert _is_interrupted(outcome)


async def test_who_goes_on_waiting_after_a_signal_may_give_up_later(
    strands: Strands, autojump_clock: trio.testing.MockClock
) -> None:
    outcome, begun, asked, dying = Outcome(), trio.Event(), list[int](), False

    def gives_up(caller: int) -> bool:
        asked.append(caller)
        return dying

    strands.gives_up = gives_up
    async with trio.open_nursery() as strands.nursery:
        strands.start(_wait_interruptibly(begun), outcome, KEY, 4711)
        await begun.wait()
        await trio.sleep(10)
        assert asked == [], "nobody is asked for before there was a signal"
        _interrupt(strands)
        await trio.sleep(10)
        assert outcome.results == []
        dying = True
    assert set(asked) == {4711}
    assert _is_interrupted(outcome)


@pytest.mark.parametrize("moment", ["before it", "after it", "in the wait"])
async def test_what_is_done_in_part_is_not_given_up(
    strands: Strands, moment: str, autojump_clock: trio.testing.MockClock
) -> None:
    outcome, begun, gate = Outcome(), trio.Event(), Gate()

    async def wait() -> None:
        await gate.wait()
        done_in_part()
        await gate.wait()
        await _wait_interruptibly(begun)

    async with trio.open_nursery() as nursery:
        strands.nursery = nursery
        strands.start(wait(), outcome, KEY)
        for now in ("before it", "after it"):
            if moment == now:
                _interrupt(strands)
            gate.open()
            strands.run_ready()
        await begun.wait()
        if moment == "in the wait":
            _interrupt(strands)
        await trio.sleep(3600)
        assert outcome.results == []
        nursery.cancel_scope.cancel()
    assert strands.find(KEY) is None


async def test_what_is_not_interruptible_goes_on_and_the_next_wait_is_given_up(strands: Strands) -> None:
    outcome, begun, event, steps = Outcome(), trio.Event(), trio.Event(), []

    async def wait() -> None:
        await in_task()
        begun.set()
        await event.wait()
        steps.append("not given up")
        with interruptible():
            await trio.sleep_forever()

    async with trio.open_nursery() as strands.nursery:
        strands.start(wait(), outcome, KEY)
        await begun.wait()
        _interrupt(strands)
        await trio.testing.wait_all_tasks_blocked()
        assert outcome.results == []
        event.set()
    assert steps == ["not given up"]
    assert _is_interrupted(outcome)


async def test_in_a_task_that_was_no_strand_nobody_interrupts() -> None:
    done_in_part()
    with interruptible():
        await trio.lowlevel.checkpoint()
