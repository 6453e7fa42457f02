"""What the mount is measured by: how much was asked of it, and how long that took, here, on the other node and between.

Of the changes one in seven is timed: to look at a clock costs as much as a good part of what a small write does here. The
measures are the node's own, from its start on, whatever roles it has.
"""

from time import perf_counter
from typing import Any, Final

from mirrorfs.core.histogram import BOUNDS_S, Histogram

#: One in so many changes is timed; not a number that what an application does is likely to repeat itself in.
EVERY: Final = 7


class Sample:
    """One change, or sync, that is timed: its moments, as they come.

    The trip to the peer begins when it is sent and ends when the peer's word on it is taken in. What the peer says that it
    spent is a part of that; the rest is the way there and back. What is sent before it is made here is made during the trip.
    """

    __slots__ = ("_began", "_making", "_sending", "local_s", "peer_s", "wire_s")

    def __init__(self) -> None:
        self._began = self._sending = self._making = perf_counter()
        self.local_s = 0.0
        #: None until the peer has said it, and for ever if it is alone or the peer does not say.
        self.peer_s: float | None = None
        self.wire_s: float | None = None

    def sends(self) -> None:
        """It is about to be sent."""
        self._sending = perf_counter()

    def makes(self) -> None:
        """It is about to be made here."""
        self._making = perf_counter()

    def made(self) -> None:
        """It is made here."""
        self.local_s = perf_counter() - self._making

    def answered(self, spent_us: int | None) -> None:
        """The peer has acknowledged it, after so many microseconds of its own."""
        if spent_us is not None:
            trip_s = perf_counter() - self._sending
            self.peer_s = min(spent_us / 1e6, trip_s)  # two clocks: not more than there was
            self.wire_s = trip_s - self.peer_s

    def total_s(self) -> float:
        """For how long the application has waited until now."""
        return perf_counter() - self._began


class _Latency:
    """Where the time of one kind of request goes."""

    def __init__(self) -> None:
        self.total, self.local, self.wire, self.peer = Histogram(), Histogram(), Histogram(), Histogram()

    def add(self, sample: Sample) -> None:
        self.total.add(sample.total_s())
        self.local.add(sample.local_s)
        if sample.peer_s is not None and sample.wire_s is not None:
            self.wire.add(sample.wire_s)
            self.peer.add(sample.peer_s)

    def describe(self) -> dict[str, Any]:
        return {
            "total": self.total.describe(),
            "local": self.local.describe(),
            "wire": self.wire.describe(),
            "peer": self.peer.describe(),
        }


class Measures:
    """The measures of one mount. `changes` and `syncs` are what was asked for, failed or not; bytes are those of writes that
    returned."""

    def __init__(self) -> None:
        self.changes = 0
        self.syncs = 0
        self.bytes_written = 0
        self._change = _Latency()
        self._sync = _Latency()

    def begin_change(self) -> Sample | None:
        """A change is asked for; a sample if it is to be timed."""
        self.changes += 1
        return None if self.changes % EVERY else Sample()

    def begin_sync(self) -> Sample:
        """A sync is asked for; each is timed."""
        self.syncs += 1
        return Sample()

    def end_change(self, sample: Sample) -> None:
        """A change that is timed is about to be answered."""
        self._change.add(sample)

    def end_sync(self, sample: Sample) -> None:
        """A sync is about to be answered."""
        self._sync.add(sample)

    def describe(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "bytes_written": self.bytes_written,
            "changes": self.changes,
            "syncs": self.syncs,
            "bounds_s": list(BOUNDS_S),
            "latency": {"change": self._change.describe(), "sync": self._sync.describe()},
        }
