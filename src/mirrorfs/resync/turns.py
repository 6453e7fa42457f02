"""Changes of names and the rounds that make the names equal take turns, so that the rounds come to an end."""

from typing import Final

import trio

from mirrorfs.core import operations as ops

#: For so many names that a round has brought, the application may change one.
_BROUGHT_PER_CHANGED: Final = 2
#: No change waits longer: the target of a resync may be slow, and the application must not be as slow.
_LONGEST_WAIT_S: Final = 0.1


class Turns:
    """What the application changes in a round is what the next one has to bring. The first brings what has gathered, however
    long it takes, and nothing waits for it; from the second on each is at most half as large as the one before."""

    def __init__(self) -> None:
        self._rounds = 0
        self._brought = 0
        self._changed = trio.Event()

    def begin_round(self) -> None:
        """What was brought in the round before counts no more."""
        self._rounds += 1
        self._brought = 0

    def brought(self, count_names: int) -> None:
        """So many names were looked at or placed."""
        self._brought += count_names
        self._let_look()

    def end(self) -> None:
        """The names are equal: nothing waits any more."""
        self._rounds = 0
        self._let_look()

    async def take(self, change: ops.Change) -> None:
        """Wait until the change may be made, if it is one of names; 0.1 s at most."""
        if isinstance(change, ops.OfFile) or self._rounds < 2:
            return
        cost = _BROUGHT_PER_CHANGED * (2 if isinstance(change, ops.Rename | ops.Link) else 1)
        with trio.move_on_after(_LONGEST_WAIT_S):
            while self._rounds >= 2 and self._brought < cost:
                await self._changed.wait()
        self._brought -= cost

    def _let_look(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
