"""What `mirrorfs status` shows of a resync and of a pause, as text and on a terminal."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mirrorfs.words import duration, in_units, on_a_terminal, resync_in_words, share_done, status_in_words

RESYNC: dict[str, Any] = {
    "kind": "quick",
    "bytes_done": 3 << 29,
    "bytes_total": 6 << 30,
    "files_done": 30,
    "files_total": 1234,
    "totals_are_known": True,
    "bytes_per_second": 100 << 20,
    "seconds_left": 47,
}
STATUS: dict[str, Any] = {
    "volume": "v",
    "node": "one",
    "state": "solo",
    "epoch": 3,
    "in_sync": ["one"],
    "since": "2025-01-02T03:04:05+0000",
    "peer": {"name": "two", "state": "resyncing"},
    "dirty_bytes": 0,
    "reason": "two was lost",
}


def _shown(found: dict[str, Any]) -> list[str]:
    """The lines that a terminal of 100 columns shows."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(on_a_terminal(found))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_resync_is_one_line_with_rate_and_time() -> None:
    assert resync_in_words(RESYNC) == "1.5 GiB of 6.0 GiB, 30 of 1234 files, 100.0 MiB/s, 47 s left"


def test_what_is_not_known_yet_is_not_said() -> None:
    unknown = RESYNC | {"totals_are_known": False, "bytes_per_second": None, "seconds_left": None}
    assert resync_in_words(unknown) == "1.5 GiB of at least 6.0 GiB, 30 of at least 1234 files"


def test_the_terminal_shows_a_bar_as_long_as_the_share_that_is_done() -> None:
    *text, empty, bar = _shown(STATUS | {"resync": RESYNC})
    assert "\n".join(text) == status_in_words(STATUS | {"resync": RESYNC})
    assert empty == ""
    assert bar.startswith("quick ")
    assert bar.endswith("25 %")
    assert bar.count("━") == 10, "of 40, without colours for the rest"


def test_the_terminal_shows_no_bar_without_a_resync() -> None:
    assert "\n".join(_shown(STATUS)) == status_in_words(STATUS)


def test_a_bar_of_a_total_that_is_not_known_has_no_percentage() -> None:
    assert "%" not in "\n".join(_shown(STATUS | {"resync": RESYNC | {"totals_are_known": False}}))


@pytest.mark.parametrize(
    ("done", "total", "shown"), [(0, 1000, "0 %"), (999, 1000, "99 %"), (1000, 1000, "100 %"), (2000, 1000, "100 %")]
)
def test_a_percentage_is_never_more_than_is_done_nor_than_a_hundred(done: int, total: int, shown: str) -> None:
    assert _shown(STATUS | {"resync": RESYNC | {"bytes_done": done, "bytes_total": total}})[-1].endswith(f" {shown}")


def test_without_bytes_the_files_count() -> None:
    assert share_done(RESYNC | {"bytes_done": 0, "bytes_total": 0, "files_done": 1, "files_total": 4}) == 0.25
    assert share_done(RESYNC | {"bytes_total": 0, "files_total": 0}) is None


@given(done=st.integers(-10, 1 << 62), total=st.integers(0, 1 << 62))
def test_a_share_is_from_none_to_all(done: int, total: int) -> None:
    share = share_done(RESYNC | {"bytes_done": done, "bytes_total": total})
    assert share is None or 0 <= share <= 1


def test_a_pause_is_a_line_that_says_how_it_ends() -> None:
    found = status_in_words(STATUS | {"paused": {"node": "one", "by": "hand", "since": "2025-01-02T03:04:05+0000"}})
    assert "\npaused   by hand since 2025-01-02T03:04:05+0000: one is alone until `mirrorfs resume`\n" in found


def test_the_peer_is_shown_with_what_is_spoken_with_it_if_that_is_known() -> None:
    shown = ("two (standby, protocol 7)", "two (standby)")
    for peer, line in zip(({"protocol": 7, "version": "0.1.0"}, {}), shown, strict=True):
        assert f"\npeer     {line}\n" in status_in_words(STATUS | {"peer": {"name": "two", "state": "standby"} | peer})


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_a_time_has_its_two_largest_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count_bytes", "shown"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")]
)
def test_an_amount_has_a_fitting_unit(count_bytes: int, shown: str) -> None:
    assert in_units(count_bytes) == shown
