"""How fast a resync may go: a bound on bytes a second, as a token bucket."""

import math
from typing import Final

import trio

#: What may pass at once after an idle time, in seconds of the rate.
_BURST_S: Final = 0.1


class Bucket:
    """Lets `rate` bytes a second through on average; what passes at once puts the bucket into debt, and the next one waits."""

    def __init__(self, rate_bytes_per_s: float = math.inf) -> None:
        self._rate = rate_bytes_per_s
        self._level = rate_bytes_per_s * _BURST_S
        self._filled_at = trio.current_time()

    async def take(self, count_bytes: int) -> None:
        """Return when these bytes may have passed."""
        if self._rate == math.inf:
            return
        now = trio.current_time()
        self._level = min(self._level + (now - self._filled_at) * self._rate, self._rate * _BURST_S) - count_bytes
        self._filled_at = now
        if self._level < 0:
            await trio.sleep(-self._level / self._rate)
