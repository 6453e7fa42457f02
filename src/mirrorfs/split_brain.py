"""A split brain, as the two nodes talk of it: what differs by side, and which side gives its history up.

While the link stands, either node may ask the other for its marks and for what it has where one of both has marks (SPLIT_ASK,
SPLIT_TOLD). The node that loses gives its history up by itself, told by an operator here or there (GIVE_UP, GIVEN_UP).
"""

import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs import errors
from mirrorfs.core import differences, wire
from mirrorfs.core.differences import Side
from mirrorfs.core.dirty import Generation, Head, first_new, is_quick
from mirrorfs.core.epochs import Epoch, since_fork, who_forgot
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.divergence import Finder, Sight, look_at, sights
from mirrorfs.errors import ConfirmationNeededError, MirrorfsError, ProtocolError, UsageError
from mirrorfs.peer import Link
from mirrorfs.resync import reports
from mirrorfs.yielding import Yielding

if TYPE_CHECKING:
    from mirrorfs.node import Node

log = logging.getLogger(__name__)

_KINDS: Final = frozenset({Kind.SPLIT_ASK, Kind.SPLIT_TOLD, Kind.GIVE_UP, Kind.GIVEN_UP})
_MAX_TOLD_BYTES: Final = 512 << 20
_MAX_QUEUED_BYTES: Final = 4 << 20
_ITEMS_PER_FRAME: Final = 8
_ANSWER_BYTES: Final = 600_000
_ANSWER_S: Final = 300.0


class _Told:
    """What the other node has told so far, of its marks and of what it has."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self.side = Side()
        self.head = Head()
        self.count_bytes = 0
        self.done = trio.Event()
        self.failure = ""

    def take(self, frame: Frame) -> bool:
        """Take one frame in; returns whether it was the last."""
        self.count_bytes += len(frame.payload)
        content = wire.message(frame)
        if self.count_bytes > _MAX_TOLD_BYTES or not isinstance(content, dict):
            raise ProtocolError(f"a malformed {frame.kind.name}, or far too many of them")
        if isinstance(items := content.get("marks"), list):
            self.marks.append(items)
        if isinstance(items := content.get("sights"), list):
            differences.add_to(self.side, items)
        return bool(content.get("done"))


class SplitBrain:
    """The split brain of one node, if there is one."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._asking = trio.Lock()
        self._asked = _Told()
        self._told: _Told | None = None
        self._given_up: trio.Event | None = None
        self._answer: dict[str, Any] = {}
        self._shown: list[dict[str, Any]] = []

    # ---- frames

    def handles(self, frame: Frame) -> bool:
        """Whether the frame speaks of a split brain."""
        return frame.kind in _KINDS

    def on_frame(self, frame: Frame, link: Link, start: Callable[[Callable[[Link], Awaitable[None]], Link], None]) -> None:
        """Take a frame in; `start` begins a task of the link."""
        match frame.kind:
            case Kind.SPLIT_ASK if not self._node.split_brain:
                raise ProtocolError("SPLIT_ASK where there is no split brain")
            case Kind.SPLIT_ASK:
                if self._asked.take(frame):
                    start(self._tell, link)
            case Kind.SPLIT_TOLD:
                if self._told is None:
                    return  # nobody waits for it any more
                if self._told.take(frame):
                    self._told.done.set()
            case Kind.GIVE_UP:
                # Not a task of the link: once begun it is finished whether the link lives or not.
                self._node.nursery.start_soon(self._give_up_when_told, link)
            case _:
                content = wire.message(frame)
                if not isinstance(content, dict):
                    raise ProtocolError("a malformed GIVEN_UP")
                if self._given_up is not None:
                    self._answer = content
                    self._given_up.set()

    def link_ended(self) -> None:
        """Nobody answers any more."""
        self._asked = _Told()
        if self._told is not None:
            self._told.failure = f"{self._node.peer_name} was lost before it had answered: try again"
            self._told.done.set()
        if self._given_up is not None:
            self._given_up.set()

    async def _tell(self, link: Link) -> None:
        """Tell the other node this one's marks, and what it has where one of both has marks."""
        asked, self._asked = self._asked, _Told()
        theirs = reports.unpack(asked.marks)
        await self._send_marks(link, Kind.SPLIT_TOLD)
        items: list[Any] = []
        async for item in self._sights(theirs):
            items.append(item)
            if len(items) == _ITEMS_PER_FRAME:
                await _send(link, Kind.SPLIT_TOLD, {"sights": items})
                items = []
        await _send(link, Kind.SPLIT_TOLD, {"sights": items, "done": True})

    async def _send_marks(self, link: Link, kind: Kind) -> None:
        for items in await reports.pack(self._node.activity.dirty, self._node.tree):
            await _send(link, kind, {"marks": items})

    async def _sights(self, theirs: reports.Report) -> Any:
        node = self._node
        dirty = node.activity.dirty
        both = Generation()
        both.add(dirty.all())
        both.add(theirs.marks)
        assert node.peer is not None
        limit = first_new(dirty.head, node.peer.dirty)
        mine, peer = node.keeper.record, node.peer.record
        common = max((epoch.number for epoch in mine.epochs if peer.remembers(epoch)), default=0)
        for found in sights(Finder(node.tree, dirty.located, theirs.places), both, limit, common):
            if isinstance(found, Sight):
                yield await trio.to_thread.run_sync(look_at, found)
            else:
                await trio.lowlevel.checkpoint()
                yield found

    # ---- what differs

    async def show(self, offset: int) -> dict[str, Any]:
        """What differs, from number `offset` on: as much of it as one answer can carry. 0 looks anew, others go on from there.

        MirrorfsError if there is no split brain, or the other node is not connected.
        """
        node = self._node
        if not node.split_brain:
            raise MirrorfsError("there is no split brain, as far as this node knows: `mirrorfs status` says what there is")
        link, peer = self._require_link()
        answer: dict[str, Any] = {"split_brain": node.split_brain, "sides": self.sides(), "complete": True, "note": ""}
        if not is_quick(node.activity.dirty.head, peer.dirty) or who_forgot(node.hello(), peer):
            answer["complete"] = False
            answer["note"] = (
                "which files differ is not known: one of the nodes was promoted by force or set back, or its journal was lost. "
                "Everything would have to be compared; whoever loses keeps what it can tell of its own, or all of its files"
            )
            return answer | {"differences": [], "total": 0}
        if offset == 0:
            with trio.move_on_after(_ANSWER_S) as waiting:
                self._shown = await self._compare(link)
            if waiting.cancelled_caught:
                raise MirrorfsError(f"{peer.node} has not told what it has within {_ANSWER_S:g} s, look at its log")
        page: list[dict[str, Any]] = []
        size = 0
        for difference in self._shown[offset:]:
            size += len(json.dumps(difference))
            if page and size > _ANSWER_BYTES:
                break
            page.append(difference)
        return answer | {"differences": page, "total": len(self._shown)}

    async def _compare(self, link: Link) -> list[dict[str, Any]]:
        node = self._node
        async with self._asking:
            told = self._told = _Told()
            try:
                await self._send_marks(link, Kind.SPLIT_ASK)
                await _send(link, Kind.SPLIT_ASK, {"done": True})
                await told.done.wait()
            finally:
                self._told = None
            if told.failure:
                raise MirrorfsError(told.failure)
            theirs = reports.unpack(told.marks)
            own = Side()
            async for item in self._sights(theirs):
                differences.add_to(own, [item])
            assert node.peer is not None
            dirty = node.activity.dirty
            limit = first_new(dirty.head, node.peer.dirty)
            return differences.compare((node.name, node.peer.node), (own, told.side), (dirty.all(), theirs.marks), limit)

    def sides(self) -> list[dict[str, Any]]:
        """Each node and its epochs since the last one that both know."""
        node = self._node
        if node.peer is None:
            return []
        mine, theirs = node.hello(), node.peer
        return [
            {"node": one.node, "epochs": [_in_values(epoch) for epoch in since_fork(one, other)]}
            for one, other in sorted(((mine, theirs), (theirs, mine)), key=lambda pair: pair[0].node)
        ]

    # ---- the end of it

    async def resolve(self, keep: str, *, yes: bool) -> str:
        """Keep the history of the node `keep`: the other one sets its own versions aside and follows. Returns what was done.

        ConfirmationNeededError without `yes`. MirrorfsError if that cannot be, and then nothing was touched.
        """
        node = self._node
        peer = node.config.peer
        if peer is None or keep not in (node.name, peer.name):
            raise UsageError(f"{keep}: no node of this volume: --keep takes the node whose history is to be kept")
        loser = peer.name if keep == node.name else node.name
        if node.keeper.record.yields_to == keep:
            return f"{loser} has given its history up for that of {keep} already"
        self._require_split_brain(loser)
        if not yes:
            raise ConfirmationNeededError(
                f"{keep}'s history is kept: {loser} stops, sets its own versions of what it changed aside (`mirrorfs lost` on "
                f"{loser}) and becomes a copy of {keep} (--yes does it)"
            )
        done = await (self._tell_to_give_up() if keep == node.name else self._give_up(keep))
        return f"{keep}'s history is kept, {loser} has given its own up: {done}"

    def _require_split_brain(self, loser: str) -> None:
        node = self._node
        if node.split_brain or (node.standby is None and not node.connected and loser == node.name):
            return  # without the other node, only a person can know
        if node.connected:
            raise MirrorfsError("there is no split brain: `mirrorfs status` says what there is")
        raise MirrorfsError(f"{loser} is not connected: run this on {loser}, or here when it is back")

    def _require_link(self) -> tuple[Link, Any]:
        node = self._node
        if node.link is None or node.peer is None or not node.connected:
            raise MirrorfsError(f"{node.peer_name} is not connected: what differs can only be told while both nodes are")
        return node.link, node.peer

    async def _tell_to_give_up(self) -> str:
        node = self._node
        if self._given_up is not None:
            raise MirrorfsError(f"{node.peer_name} was told already: wait for it")
        link, peer = self._require_link()
        self._answer, self._given_up = {}, trio.Event()
        try:
            link.send_message(Kind.GIVE_UP)
            await self._given_up.wait()
        finally:
            self._given_up = None
        match self._answer:
            case {"done": str(done)}:
                return done
            case {"error": [str(kind), str(message)]}:
                found = getattr(errors, kind, None)
                raise (found if isinstance(found, type) and issubclass(found, MirrorfsError) else MirrorfsError)(
                    f"{peer.node}: {message}"
                )
        raise MirrorfsError(f"{peer.node} was lost before it had answered: `mirrorfs status` says whether it follows now")

    async def _give_up_when_told(self, link: Link) -> None:
        answer: dict[str, Any]
        try:
            if not self._node.split_brain or self._node.peer is None:
                raise MirrorfsError("there is no split brain here")
            answer = {"done": await self._give_up(self._node.peer.node, close=False)}
        except MirrorfsError as error:
            answer = {"error": [type(error).__name__, str(error)]}
        link.send_message(Kind.GIVEN_UP, answer)
        if "done" in answer:
            await trio.lowlevel.checkpoint()
            link.close("its history was given up: greeting again")

    async def _give_up(self, winner: str, *, close: bool = True) -> str:
        """This node loses: nothing is served any more, what is its own is kept, then the record says so."""
        node = self._node
        yielding = Yielding(node.tree, node.root, node.keeper, node.activity, node.lost)
        async with node.promotion.lock:
            if node.keeper.record.epoch is None:
                raise MirrorfsError("this node has no history that it could give up")
            if node.standby is not None:
                raise MirrorfsError(f"this node follows {node.peer_name} already")
            await yielding.require_room()  # while the application still works: mostly that is all that can go wrong
            was_serving = node.primary is not None
            if was_serving:
                await node.stop_leading(f"its history is given up for that of {winner}")
            try:
                done = await yielding.give_up(winner)
            except MirrorfsError as error:
                log.error("the history was not given up: %s", error, extra={"event": "split-brain-unresolved"})
                if was_serving:
                    await node.keeper.begin_alone()
                    await node.lead("its history was not given up; it goes on")
                raise
            log.warning("%s: %s", node.keeper.record.reason, done, extra={"event": "split-brain-resolved", "kept": winner})
            node.enter(node.keeper.record.reason)
        if close and node.link is not None:
            node.link.close("its history was given up: greeting again")
        return done


def _in_values(epoch: Epoch) -> dict[str, Any]:
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(epoch.began))
    return {"number": epoch.number, "primary": epoch.primary, "began": began, "forced": epoch.forced}


async def _send(link: Link, kind: Kind, content: dict[str, Any]) -> None:
    """Send a frame when the network has room for it."""
    # A link tells nobody when its queue gets shorter.
    while link.queued_bytes > _MAX_QUEUED_BYTES and link.failure is None:  # noqa: ASYNC110
        await trio.sleep(0.01)
    link.send_message(kind, content)
    await trio.lowlevel.checkpoint()
