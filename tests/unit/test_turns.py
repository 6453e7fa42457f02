"""Changes of names beside the rounds of a quick resync, on a clock that only the test moves."""

from itertools import pairwise

import trio
import trio.testing

from mirrorfs.core import operations as ops
from mirrorfs.resync.turns import Turns

_UNLINK = ops.Unlink(1, b"name")
_RENAME = ops.Rename(1, b"name", 1, b"other", 0)


async def _waited_s(turns: Turns, change: ops.Change) -> float:
    began = trio.current_time()
    await turns.take(change)
    return trio.current_time() - began


def _in_round(count: int) -> Turns:
    turns = Turns()
    for _ in range(count):
        turns.begin_round()
    return turns


async def test_the_first_round_holds_nothing_up(autojump_clock: trio.testing.MockClock) -> None:
    turns = _in_round(1)
    assert sum([await _waited_s(turns, _UNLINK) for _ in range(100)]) == 0


async def test_from_the_second_on_a_name_may_be_changed_for_two_that_were_brought(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = _in_round(2)
    turns.brought(6)
    assert [await _waited_s(turns, change) for change in (_UNLINK, _RENAME)] == [0, 0]
    assert await _waited_s(turns, _UNLINK) > 0


async def test_what_was_brought_in_a_round_does_not_count_in_the_next(autojump_clock: trio.testing.MockClock) -> None:
    turns = _in_round(2)
    turns.brought(100)
    turns.begin_round()
    assert await _waited_s(turns, _UNLINK) > 0


async def test_a_change_of_data_never_waits(autojump_clock: trio.testing.MockClock) -> None:
    assert await _waited_s(_in_round(5), ops.Write(7, 0, b"data")) == 0


async def test_no_change_waits_longer_than_a_tenth_of_a_second(autojump_clock: trio.testing.MockClock) -> None:
    turns = _in_round(2)
    assert all([0 < await _waited_s(turns, _RENAME) <= 0.11 for _ in range(5)])


async def test_who_waits_goes_on_at_once_when_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    turns = _in_round(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.take, _UNLINK)
        await trio.testing.wait_all_tasks_blocked()
        turns.end()
        began = trio.current_time()
    assert trio.current_time() - began < 0.01


async def test_rounds_end_beside_an_application_that_is_much_faster(autojump_clock: trio.testing.MockClock) -> None:
    turns, left, rounds, are_equal = Turns(), 1000, list[int](), False

    async def change() -> None:
        nonlocal left
        while True:
            await trio.sleep(0.0001)
            await turns.take(_UNLINK)
            left += 1

    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            while left:
                turns.begin_round()
                rounds.append(left)
                batch, left = left, 0
                for _ in range(batch):
                    await trio.sleep(0.001)
                    turns.brought(1)
            are_equal = True
            nursery.cancel_scope.cancel()
    assert are_equal
    assert all(after <= before // 2 + 1 for before, after in pairwise(rounds[1:]))
