"""What is counted and what is timed, with a clock that stands still unless it is told to go on."""

from typing import Any

import pytest

from mirrorfs import measures
from mirrorfs.core.histogram import BOUNDS_S
from mirrorfs.measures import EVERY, Measures, Sample


class _Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def passes(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(measures, "perf_counter", clock)
    return clock


def _sums(found: Measures, kind: str) -> dict[str, Any]:
    latency = found.describe()["latency"][kind]
    return {part: (sum(values["counts"]), pytest.approx(values["sum_s"])) for part, values in latency.items()}


def _sent_first(clock: _Clock, sample: Sample, spent_us: int | None) -> None:
    """2 ms of work here in a trip of 5 ms, and 1 ms until the application is answered."""
    sample.sends()
    sample.makes()
    clock.passes(0.002)
    sample.made()
    clock.passes(0.003)
    sample.answered(spent_us)
    clock.passes(0.001)


def test_one_change_in_seven_is_timed_and_each_sync() -> None:
    found = Measures()
    assert sum(found.begin_change() is not None for _ in range(10 * EVERY)) == 10
    assert (found.changes, EVERY) == (70, 7)
    assert all(isinstance(found.begin_sync(), Sample) for _ in range(3))
    assert found.syncs == 3


def test_the_time_of_a_change_that_is_sent_first_is_split_into_its_parts(clock: _Clock) -> None:
    found, sample = Measures(), Sample()
    _sent_first(clock, sample, 1500)
    found.end_change(sample)
    assert _sums(found, "change") == {"total": (1, 0.006), "local": (1, 0.002), "peer": (1, 0.0015), "wire": (1, 0.0035)}
    assert _sums(found, "sync") == dict.fromkeys(("total", "local", "peer", "wire"), (0, 0.0))


def test_what_was_waited_for_here_before_it_was_sent_is_no_part_of_the_wire(clock: _Clock) -> None:
    found, sample = Measures(), Sample()
    clock.passes(10)  # frozen
    sample.makes()
    clock.passes(0.002)
    sample.made()
    sample.sends()
    clock.passes(0.004)
    sample.answered(1000)
    found.end_change(sample)
    assert _sums(found, "change") == {"total": (1, 10.006), "local": (1, 0.002), "peer": (1, 0.001), "wire": (1, 0.003)}


def test_a_slow_disk_here_is_no_part_of_the_wire(clock: _Clock) -> None:
    found = Measures()
    sample = found.begin_sync()
    sample.sends()
    sample.makes()
    clock.passes(0.003)
    sample.answered(2000)
    clock.passes(0.997)
    sample.made()
    found.end_sync(sample)
    assert _sums(found, "sync") == {"total": (1, 1.0), "local": (1, 1.0), "peer": (1, 0.002), "wire": (1, 0.001)}


def test_alone_or_with_a_peer_that_does_not_say_there_is_no_peer_and_no_wire(clock: _Clock) -> None:
    found, alone, old = Measures(), Sample(), Sample()
    alone.makes()
    clock.passes(0.002)
    alone.made()
    found.end_change(alone)
    _sent_first(clock, old, None)
    found.end_change(old)
    counts = {part: count for part, (count, _) in _sums(found, "change").items()}
    assert counts == {"total": 2, "local": 2, "peer": 0, "wire": 0}


def test_a_peer_that_says_more_than_there_was_is_believed_as_far_as_that(clock: _Clock) -> None:
    found, sample = Measures(), Sample()
    _sent_first(clock, sample, 1 << 40)
    found.end_change(sample)
    assert _sums(found, "change") == {"total": (1, 0.006), "local": (1, 0.002), "peer": (1, 0.005), "wire": (1, 0.0)}


def test_what_is_told_has_exactly_these_parts() -> None:
    empty = {"counts": [0] * (len(BOUNDS_S) + 1), "sum_s": 0.0}
    parts = dict.fromkeys(("total", "local", "wire", "peer"), empty)
    assert Measures().describe() == {
        "bytes_written": 0,
        "changes": 0,
        "syncs": 0,
        "bounds_s": list(BOUNDS_S),
        "latency": {"change": parts, "sync": parts},
    }
