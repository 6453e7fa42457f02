"""What a promotion would do: whether anything stands against it, what could be missing, who has files open, how long it takes.

Nothing is changed. Times are not guessed: the trip to the other node or to the arbiter, and a durable record, are timed now.
"""

import contextlib
import os
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs.core.wire import Kind
from mirrorfs.errors import MirrorfsError, ProtocolError

if TYPE_CHECKING:
    from mirrorfs.node import Node

_MOST_PATHS: Final = 20
_ANSWER_S: Final = 5.0
#: Durable records in a row: of a handover, two epochs and the ids; of a promotion, a claim at the arbiter, an epoch, the ids.
_RECORDS: Final = 3
#: Trips in a row: of a handover, the request and the drained stream; to an arbiter, the look and the swap.
_TRIPS: Final = 2


class Preview:
    """Previews for one node."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._asking = trio.Lock()
        self._answered = trio.Event()
        self._open_there: dict[str, Any] | None = None

    async def describe(self, *, yes: bool, force: bool, automatic: bool = False) -> dict[str, Any]:
        """In plain values, times in seconds. `against` is the line with which `promote` would end, and `exit_status` its exit
        status."""
        async with self._asking:
            return await self._describe(yes=yes, force=force, automatic=automatic)

    async def _describe(self, *, yes: bool, force: bool, automatic: bool) -> dict[str, Any]:
        node = self._node
        found: dict[str, Any] = {"node": node.name, "against": "", "exit_status": 0}
        if node.primary is not None:
            return found | {"does": "nothing", "missing": "", "open": open_files(node), "role_s": 0.0}
        record_s = await node.keeper.time_a_record()
        if node.standby is not None and node.connected:
            missing, trip_s = await self._of_handover(found, force=force)
        else:
            missing, trip_s = await self._of_promotion(found, yes=yes, force=force, automatic=automatic)
        return found | {"missing": missing, "open": self._open_there, "role_s": _RECORDS * record_s + _TRIPS * trip_s}

    async def _of_handover(self, found: dict[str, Any], *, force: bool) -> tuple[str, float]:
        node = self._node
        found["does"] = "switch-over"
        began = trio.current_time()
        await self._ask_what_is_open()
        trip_s = trio.current_time() - began
        try:
            node.promotion.check_handover(force=force)
        except MirrorfsError as error:
            _note(found, error)
            return str(error), trip_s
        return "", trip_s

    async def _of_promotion(self, found: dict[str, Any], *, yes: bool, force: bool, automatic: bool) -> tuple[str, float]:
        node = self._node
        found["does"] = "promotion"
        self._open_there = None
        began = trio.current_time()
        stands_against = await node.arbitration.stands_against(automatic=automatic)
        trip_s = trio.current_time() - began if node.arbitration.decides else 0.0
        missing = node.promotion.could_miss() or stands_against
        try:
            node.promotion.decide(yes=yes, force=force, automatic=automatic)
            if stands_against and not force:
                found["against"], found["exit_status"] = f"{stands_against} (--force promotes all the same)", 3
        except MirrorfsError as error:
            _note(found, error)
        return missing, trip_s

    async def _ask_what_is_open(self) -> None:
        link = self._node.link
        self._open_there, self._answered = None, trio.Event()
        if link is not None:
            link.send_message(Kind.LIST_OPEN)
            with trio.move_on_after(_ANSWER_S):
                await self._answered.wait()

    def on_answer(self, content: object) -> None:
        """The primary has told what applications have open there."""
        match content:
            case {"node": str(), "files": int(), "writing": int(), "paths": list(paths)} if all(
                isinstance(path, str) for path in paths
            ):
                assert isinstance(content, dict)
                self._open_there = content
                self._answered.set()
            case _:
                raise ProtocolError("a malformed OPEN_FILES")


def _note(found: dict[str, Any], error: MirrorfsError) -> None:
    found["against"], found["exit_status"] = str(error), error.exit_status


def open_files(node: "Node") -> dict[str, Any]:
    """What applications have open on this node: how many handles, how many of them for writing, and the paths of some."""
    handles = node.operations.handles
    above = os.readlink(f"/proc/self/fd/{node.root}")
    # Each file once, however often it is open: the primary's requests wait meanwhile.
    files = dict.fromkeys(handle.known for handle in sorted(handles, key=lambda handle: not handle.writable))
    paths: list[str] = []
    for known in islice(files, _MOST_PATHS):
        with contextlib.suppress(OSError):  # it lost its last name, on a file system that does not open it any more
            where = os.readlink(f"/proc/self/fd/{node.tree.table.descriptor(known)}")
            paths.append(os.fsencode(where.removeprefix(above)).decode(errors="replace"))
    writing = sum(handle.writable for handle in handles)
    return {"node": node.name, "files": len(handles), "writing": writing, "paths": paths}
