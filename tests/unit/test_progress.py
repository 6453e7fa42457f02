"""How far a resync has come: totals that are never less than what is done, a rate of late, a time only where it is known."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.errors import ProtocolError
from mirrorfs.resync.progress import Meter, Progress

COUNTS = st.integers(0, 1 << 60)


def _progress(**given: Any) -> Progress:
    counted = {
        "bytes_done": 0,
        "bytes_found": 100,
        "files_done": 0,
        "files_found": 10,
        "totals_are_known": True,
        "rate": 5.0,
    }
    return Progress.of("full", **(counted | given))


def test_the_time_left_follows_from_the_rate() -> None:
    assert _progress(bytes_done=50).seconds_left == 10
    assert _progress(bytes_done=100).seconds_left == 0


@pytest.mark.parametrize("given", [{"rate": None}, {"rate": 0.0}, {"totals_are_known": False}])
def test_the_time_left_is_unknown_without_a_rate_or_a_total(given: dict[str, Any]) -> None:
    assert _progress(**given).seconds_left is None


@given(
    bytes_done=COUNTS,
    bytes_found=COUNTS,
    files_done=COUNTS,
    files_found=COUNTS,
    known=st.booleans(),
    rate=st.none() | st.floats(0, 1e15),
)
def test_a_total_is_never_less_than_what_is_done_and_every_progress_travels(
    bytes_done: int, bytes_found: int, files_done: int, files_found: int, known: bool, rate: float | None
) -> None:
    found = Progress.of(
        "quick",
        bytes_done=bytes_done,
        bytes_found=bytes_found,
        files_done=files_done,
        files_found=files_found,
        totals_are_known=known,
        rate=rate,
    )
    assert found.bytes_done <= found.bytes_total
    assert found.files_done <= found.files_total
    assert Progress.unpack(msgpack.unpackb(msgpack.packb(found.pack()))) == found


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        [],
        ["other", 0, 0, 0, 0, True, None, None],
        ["full", 0, 0, 0, 0, True, None],
        ["full", 0, 0, 0, 0, True, None, None, 0],
        ["full", -1, 0, 0, 0, True, None, None],
        ["full", True, 0, 0, 0, True, None, None],
        ["full", 0, 0, 0, 0, 1, None, None],
        ["full", 0, 0, 0, 0, True, "1", None],
        ["full", 0, 0, 0, 0, True, None, 1.5],
    ],
)
def test_what_is_no_progress_is_refused(content: object) -> None:
    with pytest.raises(ProtocolError):
        Progress.unpack(content)


def test_a_rate_is_unknown_at_the_beginning() -> None:
    meter = Meter(100.0)
    assert meter.rate(100.0, 0) is None
    assert meter.rate(100.1, 5000) is None
    assert meter.rate(101.0, 5000) == 5000


def test_the_rate_is_that_of_the_last_seconds_and_not_since_the_beginning() -> None:
    meter = Meter(0.0)
    done = 0
    for tenth in range(1, 600):  # fast for a minute, then slow
        done += 1_000_000
        meter.note(tenth / 10, done)
    assert meter.rate(60.0, done) == pytest.approx(10_000_000, rel=0.05)
    for tenth in range(600, 800):
        done += 100
        meter.note(tenth / 10, done)
    assert meter.rate(80.0, done) == pytest.approx(1000, rel=0.05)


def test_a_resync_that_stands_still_has_no_rate_after_a_while() -> None:
    meter = Meter(0.0)
    for tenth in range(1, 100):
        meter.note(tenth / 10, tenth * 1000)
    meter.note(30.0, 100_000)
    meter.note(45.0, 100_000)
    assert meter.rate(60.0, 100_000) == 0


def test_a_count_that_is_taken_back_is_no_negative_rate() -> None:
    meter = Meter(0.0)
    meter.note(1.0, 1000)
    assert meter.rate(2.0, -10) == 0
