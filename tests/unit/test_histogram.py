"""Buckets of times: which one something falls into, and what can be said of all of them afterwards."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core.histogram import BOUNDS_S, Histogram, quantile

_SECONDS = st.floats(0, 100)


def test_the_bounds_reach_from_five_microseconds_to_ten_seconds_in_even_steps() -> None:
    assert (BOUNDS_S[0], BOUNDS_S[-1]) == (5e-6, 10.0)
    assert all(1.3 < upper / lower < 1.5 for lower, upper in pairwise(BOUNDS_S))
    assert sum(1e-3 < bound <= 1e-2 for bound in BOUNDS_S) == 7


@pytest.mark.parametrize("index", range(len(BOUNDS_S)))
def test_a_bound_is_in_the_bucket_that_reaches_up_to_it(index: int) -> None:
    histogram = Histogram()
    histogram.add(BOUNDS_S[index])
    assert histogram.counts.index(1) == index
    histogram.add(BOUNDS_S[index] * 1.0001)
    assert histogram.counts[index + 1] == 1


def test_what_takes_no_time_and_what_takes_longer_than_all_bounds_is_counted_too() -> None:
    histogram = Histogram()
    histogram.add(0.0)
    histogram.add(11.0)
    assert (histogram.counts[0], histogram.counts[-1], histogram.sum_s) == (1, 1, 11.0)


@given(st.lists(_SECONDS, max_size=50))
def test_everything_is_counted_once_and_summed(times: list[float]) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.add(seconds)
    assert sum(histogram.counts) == len(times)
    assert histogram.sum_s == pytest.approx(sum(times))
    assert histogram.describe() == {"counts": histogram.counts, "sum_s": histogram.sum_s}


def test_what_it_says_of_itself_does_not_change_afterwards() -> None:
    histogram = Histogram()
    said = histogram.describe()
    histogram.add(1.0)
    assert sum(said["counts"]) == 0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_value_that_it_stands_for(times: list[float], q: float) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.add(seconds)
    found = quantile(histogram.counts, q)
    assert found is not None
    below = sum(seconds <= found * 1.5 + 5e-6 for seconds in times)
    above = sum(seconds >= found / 1.5 - 5e-6 for seconds in times)
    assert below >= q * len(times) - 1e-6
    assert above >= (1 - q) * len(times) - 1e-6


@given(st.lists(_SECONDS, min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_never_has_a_shorter_time(times: list[float], one: float, other: float) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.add(seconds)
    lower, upper = (quantile(histogram.counts, q) for q in sorted((one, other)))
    assert lower is not None
    assert upper is not None
    assert lower <= upper


def test_nothing_has_no_quantile_and_what_took_longest_counts_as_the_last_bound() -> None:
    histogram = Histogram()
    assert quantile(histogram.counts, 0.5) is None
    histogram.add(3600.0)
    assert quantile(histogram.counts, 0.5) == BOUNDS_S[-1]


def test_half_of_a_bucket_is_its_middle() -> None:
    counts = Histogram().counts
    counts[1] = 4
    assert quantile(counts, 0.5) == pytest.approx((BOUNDS_S[0] + BOUNDS_S[1]) / 2)
