"""How far a resync has come, for `mirrorfs status` on both nodes."""

from collections import deque
from dataclasses import asdict, astuple, dataclass
from typing import Any, Final, Self

from mirrorfs.errors import ProtocolError

_WINDOW_S: Final = 10.0
_SAMPLE_S: Final = 0.25
_LEAST_S: Final = 0.5


class Meter:
    """The rate over the last seconds; moments are seconds on any clock that does not go back."""

    def __init__(self, now: float) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def note(self, now: float, done_bytes: int) -> None:
        """So many bytes were done until now."""
        if now - self._samples[-1][0] < _SAMPLE_S:
            return
        self._samples.append((now, done_bytes))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float, done_bytes: int) -> float | None:
        """Bytes a second until now, None if that is not known yet."""
        began, before = self._samples[0]
        if now - began < _LEAST_S:
            return None
        return max(done_bytes - before, 0) / (now - began)


@dataclass(frozen=True, slots=True)
class Progress:
    """A resync at one moment. Totals are what has been found so far, and never less than what is done; without
    `totals_are_known` they may still grow, and nobody knows how long it will take."""

    kind: str
    bytes_done: int
    bytes_total: int
    files_done: int
    files_total: int
    totals_are_known: bool
    bytes_per_second: int | None
    seconds_left: int | None

    @classmethod
    def of(
        cls,
        kind: str,
        *,
        bytes_done: int,
        bytes_found: int,
        files_done: int,
        files_found: int,
        totals_are_known: bool,
        rate: float | None,
    ) -> Self:
        """What follows from what was counted."""
        left = max(bytes_found - bytes_done, 0)
        return cls(
            kind,
            bytes_done,
            max(bytes_found, bytes_done),
            files_done,
            max(files_found, files_done),
            totals_are_known,
            None if rate is None else round(rate),
            round(left / rate) if rate is not None and rate >= 1 and totals_are_known else None,
        )

    def describe(self) -> dict[str, Any]:
        """For `mirrorfs status`."""
        return asdict(self)

    def pack(self) -> list[Any]:
        """As plain values, for msgpack."""
        return list(astuple(self))

    @classmethod
    def unpack(cls, content: Any) -> Self:
        """What `pack` packed; ProtocolError if it is not that."""
        match content:
            case ["full" | "quick", a, b, c, d, bool(), rate, left]:
                if all(type(number) is int and number >= 0 for number in (a, b, c, d, rate or 0, left or 0)):
                    return cls(*content)
        raise ProtocolError("a malformed PROGRESS")
