"""Times in buckets of fixed bounds, seven a decade: how often something took how long, in room that does not grow.

Bounds that never change can be added up over nodes and over time, as a collector of metrics does.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Final

_A_DECADE: Final = ("1", "1.4", "2", "2.7", "3.7", "5", "7")
#: What a bucket reaches up to, itself included, in seconds: from 5 us to 10 s. One more bucket has what took longer.
BOUNDS_S: Final = tuple(
    bound for exponent in range(-6, 2) for digits in _A_DECADE if 5e-6 <= (bound := float(f"{digits}e{exponent}")) <= 10
)


class Histogram:
    """How often what was measured lay in each bucket, and the sum of it all in seconds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def describe(self) -> dict[str, Any]:
        """The histogram as plain values; the counts are each bucket's own, not those of all below it too."""
        return {"counts": list(self.counts), "sum_s": self.sum_s}


def quantile(counts: Sequence[int], q: float) -> float | None:
    """The time in seconds that a share `q`, from 0 to 1, of what was counted did not exceed; None if nothing was.

    Within a bucket all is taken to be spread evenly. What took longer than the last bound counts as that bound.
    """
    assert len(counts) == len(BOUNDS_S) + 1, len(counts)
    assert 0 <= q <= 1, q
    total = sum(counts)
    if not total:
        return None
    wanted, below = q * total, 0
    for index, (upper_s, count) in enumerate(zip(BOUNDS_S, counts, strict=False)):
        if count and below + count >= wanted:
            lower_s = BOUNDS_S[index - 1] if index else 0.0
            return lower_s + (upper_s - lower_s) * (wanted - below) / count
        below += count
    return BOUNDS_S[-1]
