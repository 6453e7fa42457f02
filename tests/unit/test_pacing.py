"""The rate limit of a resync, on a clock that only the test moves."""

import math

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.resync.pacing import Bucket

MIB = 1 << 20


async def _taken_s(bucket: Bucket, *counts: int) -> float:
    """How long these take one after the other."""
    began = trio.current_time()
    for count in counts:
        await bucket.take(count)
    return trio.current_time() - began


async def test_without_a_limit_nothing_waits(autojump_clock: trio.testing.MockClock) -> None:
    assert await _taken_s(Bucket(), *[1 << 30] * 1000) == 0
    assert await _taken_s(Bucket(math.inf), 1 << 40) == 0


async def test_a_long_run_goes_at_the_rate(autojump_clock: trio.testing.MockClock) -> None:
    bucket = Bucket(10 * MIB)
    took_s = await _taken_s(bucket, *[MIB // 2] * 2000)
    assert 99.8 <= took_s <= 100


async def test_one_piece_that_is_larger_than_the_burst_delays_what_follows(autojump_clock: trio.testing.MockClock) -> None:
    bucket = Bucket(MIB)
    assert 3.89 <= await _taken_s(bucket, 4 * MIB) <= 3.91
    assert 0.99 <= await _taken_s(bucket, MIB) <= 1.01


async def test_an_idle_time_saves_up_no_more_than_a_tenth_of_a_second(autojump_clock: trio.testing.MockClock) -> None:
    bucket = Bucket(10 * MIB)
    await trio.sleep(3600)
    assert await _taken_s(bucket, MIB) == 0
    assert 0.99 <= await _taken_s(bucket, 10 * MIB) <= 1.01


async def test_small_pieces_below_the_rate_do_not_wait(autojump_clock: trio.testing.MockClock) -> None:
    bucket = Bucket(MIB)
    for _ in range(100):
        assert await _taken_s(bucket, 4096) == 0
        await trio.sleep(0.01)


@given(rate=st.floats(1024, 1 << 40), counts=st.lists(st.integers(0, 4 * MIB), max_size=50))
def test_whatever_is_taken_stays_below_rate_and_burst(rate: float, counts: list[int]) -> None:
    async def take() -> float:
        return await _taken_s(Bucket(rate), *counts)

    took_s = trio.run(take, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sum(counts) <= rate * (took_s + 0.1) * 1.0001 + 1
