"""The rate of a verify, with a clock that is wound by hand."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from mirrorfs.verify.asking import Asking
from mirrorfs.verify.walk import Difference, Walk


def _walk(rate_bytes_per_s: float) -> Any:
    primary = SimpleNamespace(keeper=SimpleNamespace(next_id=lambda: 2))
    asking = cast(Asking, SimpleNamespace(tree=None, primary=primary))
    return Walk(asking, "one", "two", rate_bytes_per_s=rate_bytes_per_s, found=lambda difference: None)


@pytest.mark.parametrize("pieces", [[1 << 20] * 100, [1, (50 << 20) - 2, 1, 50 << 20]])
async def test_a_walk_reads_no_faster_than_its_rate(autojump_clock: MockClock, pieces: list[int]) -> None:
    walk, began = _walk(10 << 20), trio.current_time()
    for piece in pieces:
        await walk._pace(piece)
    assert trio.current_time() - began == pytest.approx(10, abs=0.2)


async def test_time_in_which_nothing_was_read_is_not_made_up_for(autojump_clock: MockClock) -> None:
    walk = _walk(1 << 20)
    await trio.sleep(1000)
    began = trio.current_time()
    await walk._pace(10 << 20)
    assert trio.current_time() - began == pytest.approx(10, abs=0.2)


def test_a_difference_is_one_line_whatever_the_name_is() -> None:
    difference = Difference(b"a\nb/\xff", "mode 1 on one, 2 on two", ((0, 4096), (8192, 8200)), "repaired from one")
    assert str(difference) == (
        "a\\nb/\\xff: mode 1 on one, 2 on two; content differs in bytes 0-4095, 8192-8199 (repaired from one)"
    )
    many = Difference(b"", "", tuple((at, at + 1) for at in range(0, 200, 2)))
    assert str(many).startswith(".: content differs in bytes 0-0, 2-2, ")
    assert str(many).endswith("38-38 and 80 more ranges")
