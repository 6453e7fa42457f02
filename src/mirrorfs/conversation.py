"""One greeted connection, from the verdict on both nodes to its end.

The verdict says who serves. The other node is asked to follow, and durably gives up what it was before the first serves or
copies anything; then the copy, the join, and the stream. Frames are taken in by one task, in order.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs import preview
from mirrorfs.core import epochs, packing, wire
from mirrorfs.core.dirty import is_quick
from mirrorfs.core.epochs import Hello, Member, Standing
from mirrorfs.core.modes import Mode
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import JournalError, LinkLostError, MirrorfsError, ProtocolError
from mirrorfs.peer import Link
from mirrorfs.resync import reports
from mirrorfs.resync.finding import CannotCatchUpError
from mirrorfs.resync.full import Target
from mirrorfs.resync.making import empty_orphans
from mirrorfs.resync.progress import Progress
from mirrorfs.resync.quick_target import Returning
from mirrorfs.space import Space
from mirrorfs.standby import Standby, record_in, record_of

if TYPE_CHECKING:
    from mirrorfs.node import Node

log = logging.getLogger(__name__)

_NEWS_INTERVAL_S: Final = 1.0
_MAX_SETBACK_S: Final = 30.0


class Conversation:
    """What is said on one link. `mine` is what this node said of itself in the greeting, `theirs` what the other did."""

    def __init__(self, node: "Node", link: Link, verdict: epochs.Verdict, mine: Hello, theirs: Hello) -> None:
        self._node = node
        self._link = link
        self._verdict = verdict
        self._mine = mine
        self._theirs = theirs
        self._quick = False
        self._hot: list[Any] = []

    async def run(self) -> None:
        """Serve the link until it ends; whatever goes wrong on it ends no more than the link."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._link.run)
            await self._guarded(self._converse, nursery)
            nursery.cancel_scope.cancel()

    async def _guarded(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        link, who = self._link, self._theirs.node
        try:
            await task(*arguments)
        except LinkLostError as error:
            link.close(str(error))
        except JournalError:
            # The node ends and says why, as `Keeper.failed` has it. The other one is not lost: nothing goes on without it.
            if self._node.primary is not None:
                self._node.primary.retire()
            link.close("this node ends")
        except MirrorfsError as error:
            log.error("%s: the connection is ended: %s", who, error)
            link.close(str(error))
        except OSError as error:
            log.error("%s: the connection is ended: %s", who, error)
            link.close(error.strerror or str(error))
        except Exception as error:
            # Well formed, and it makes no sense; or a defect here, which must not end the mount either.
            log.exception("%s: the connection is ended: what it sent makes no sense", who)
            link.close(f"a message that makes no sense: {error!r}")

    async def _converse(self, nursery: trio.Nursery) -> None:
        node, link = self._node, self._link
        if not await self._act_on_verdict():
            return
        nursery.start_soon(self._guarded, self._send_news)
        link.serve(self._serve, self._served, node.session.reactor)
        while True:
            for frame in await link.receive():
                await self._on_frame(frame, nursery)
            self._served()
            await trio.lowlevel.checkpoint()

    def _serve(self, frame: Frame) -> bool:
        """Take a frame in if that needs no waiting."""
        node = self._node
        if node.standby is not None:
            return node.standby.take_now(frame)
        # Answers are kept for those who wait for them.
        return node.primary is not None and node.primary.on_frame(frame.owned() if frame.payload else frame)

    def _served(self) -> None:
        """All frames that came together are taken in."""
        if self._node.standby is not None:
            self._node.standby.acknowledge()

    async def _act_on_verdict(self) -> bool:
        """False if the nodes have to greet again."""
        node = self._node
        match self._verdict:
            case epochs.Wait(reason):
                node.split_brain = ""
                node.explain(reason)
                node.tell_once(reason)
            case epochs.SplitBrain(reason, stops):
                await self._split(reason, stops)
            case epochs.Resume(primary, reason):
                node.split_brain = ""
                if primary == node.name:
                    await self._ask_to_follow()
                elif node.primary is not None:
                    if self._mine != node.hello():
                        return False  # something was acknowledged here since
                    await node.stop_leading(reason)
                else:
                    node.explain(f"waiting for {primary}: {reason}")
            case epochs.Refuse():
                raise AssertionError("refused before")
        return True

    async def _split(self, reason: str, stops: str) -> None:
        node = self._node
        node.split_brain = f"split brain: {reason}; neither side's data is touched (`mirrorfs split-brain show`)"
        node.tell_once(node.split_brain, {"event": "split-brain", "peer": self._theirs.node})
        if node.primary is not None and stops == node.name and self._theirs.serving:
            await node.stop_leading(node.split_brain)

    async def _send_news(self) -> None:
        while True:
            self._link.send_message(Kind.SPACE, self._node.own_space().pack())
            primary = self._node.primary
            if primary is not None and primary.copier is not None:
                self._link.send_message(Kind.PROGRESS, primary.copier.progress.pack())
            await trio.sleep(_NEWS_INTERVAL_S)

    async def _on_frame(self, frame: Frame, nursery: trio.Nursery) -> None:
        node = self._node
        if node.standby is not None and node.standby.handles(frame):
            await node.standby.take(frame)
            return
        if node.primary is not None and node.primary.on_frame(frame):
            return
        if node.split.handles(frame):
            node.split.on_frame(frame, self._link, lambda task, link: nursery.start_soon(self._guarded, task, link))
            return
        match frame.kind:
            case Kind.SPACE:
                node.peer_space = Space.unpack(wire.message(frame))
            case Kind.PROGRESS:
                node.peer_progress = Progress.unpack(wire.message(frame))
            case Kind.ACK | Kind.FLUSHED | Kind.ANSWER | Kind.HASHES | Kind.LACKED | Kind.KEPT | Kind.WANTED:
                pass  # of a stream that has ended
            case Kind.FOLLOW:
                content = wire.message(frame)
                if not isinstance(content, dict) or not isinstance(content.get("quick"), bool):
                    raise ProtocolError("a malformed FOLLOW")
                nursery.start_soon(self._guarded, self._follow, record_of(content.get("record"), frame.kind), content["quick"])
            case Kind.HOT:
                self._hot.append(wire.message(frame))
            case Kind.FOLLOWING:
                nursery.start_soon(self._guarded, self._copy)
            case Kind.JOIN:
                if node.standby is None:
                    raise ProtocolError("JOIN for a node that does not follow")
                await node.standby.join(record_in(frame))
                node.setbacks = 0
                node.enter(f"in sync with {self._theirs.node}")
            case Kind.JOINED if node.primary is None or node.primary.mode is not Mode.MIRRORED:
                pass  # paused, or lost, in the meantime
            case Kind.JOINED:
                node.peer_joined = True
                log.info("%s has joined", self._theirs.node, extra={"event": "peer-joined", "peer": self._theirs.node})
                node.enter(f"{self._theirs.node} is in sync")
            case Kind.LIST_OPEN:
                self._link.send_message(Kind.OPEN_FILES, preview.open_files(node))
            case Kind.OPEN_FILES:
                node.preview.on_answer(wire.message(frame))
            case Kind.HANDOVER_WANTED:
                # Not a task of the link: once begun, a handover is finished whether the link lives or not.
                node.nursery.start_soon(node.promotion.hand_over_when_asked)
            case Kind.HANDOVER:
                await node.promotion.take_over(record_in(frame), self._link)
            case Kind.PAUSE_WANTED:
                node.nursery.start_soon(node.pausing.begin_when_asked)
            case Kind.PAUSE:
                await node.pausing.on_pause(record_in(frame), self._link)
            case Kind.PAUSED:
                node.pausing.on_confirmed()
            case Kind.FAILED:
                extra = {"event": "out-of-sync", "node_out_of_sync": self._theirs.node}
                log.error("%s is out of sync: %s", self._theirs.node, wire.message(frame), extra=extra)
            case Kind.REFUSED:
                node.on_refusal(str(wire.message(frame)))
            case _:
                raise ProtocolError(f"{frame.kind.name} where it means nothing")

    # ---- the source's side

    async def _ask_to_follow(self) -> None:
        node = self._node
        async with node.promotion.lock:
            epoch = node.keeper.record.epoch
            assert epoch is not None
            if node.primary is not None and epoch.has(self._theirs.node):
                await node.keeper.begin_alone()
        self._link.streams += 1
        mine, theirs = node.hello(), self._theirs
        self._quick = is_quick(mine.dirty, theirs.dirty) and not theirs.discard_local_data
        if self._quick and (forgot := epochs.who_forgot(mine, theirs)):
            log.warning(
                "%s was set back, to a snapshot or a backup: what it did since is not in its journal",
                forgot,
                extra={"event": "node-set-back", "node_set_back": forgot},
            )
            self._quick = False
            await node.activity.distrust()  # should this link end now, the next meeting may not see it any more
        self._link.send_message(Kind.FOLLOW, {"record": packing.pack_record(node.keeper.record), "quick": self._quick})

    async def _copy(self) -> None:
        """The other node follows: serve if nobody does, and bring it to the same tree."""
        node, verdict, theirs = self._node, self._verdict, self._theirs
        async with node.promotion.lock:
            if not (isinstance(verdict, epochs.Resume) and verdict.primary == node.name):
                raise ProtocolError("FOLLOWING from a node that was not asked to follow")
            if node.primary is None:
                await node.keeper.begin_alone()
                await node.lead(verdict.reason)
            primary = node.primary
            await node.keeper.take_claims(theirs.record.claims)
        if primary is None:
            return
        started = time.monotonic()
        log.info(
            "bringing %s in sync, %s",
            theirs.node,
            "by what may differ" if self._quick else "by a full copy",
            extra={"event": "resync-begun", "peer": theirs.node, "quick": self._quick},
        )
        report, self._hot = reports.unpack(self._hot) if self._quick else None, []
        room_bytes = node.peer_space.free if node.peer_space is not None else 0
        copier = await primary.begin_copy(self._link, theirs.dirty, report, room_bytes)
        joined = False
        try:
            await copier.run()
            joined = await primary.join(Member(theirs.node, theirs.boot))
        except CannotCatchUpError:
            await node.activity.distrust()
            raise
        finally:
            if not joined:
                extra = {"event": "resync-broken-off", "peer": theirs.node}
                log.warning("the resync of %s was broken off", theirs.node, extra=extra)
        if not joined:
            return
        self._link.send_message(Kind.JOIN, packing.pack_record(node.keeper.record))
        took_s = time.monotonic() - started
        log.info(
            "%s: %d files, %d bytes copied, %d bytes compared in %.2f s",
            theirs.node,
            copier.files_done,
            copier.bytes_sent,
            copier.bytes_compared,
            took_s,
            extra={"event": "resync-ended", "peer": theirs.node, "files": copier.files_done, "bytes": copier.bytes_sent},
        )

    # ---- the target's side

    async def _follow(self, record: epochs.Record, quick: bool) -> None:
        """Become a copy of the other node; after failures, such as a full disk, not at once."""
        node = self._node
        if node.setbacks:
            delay_s = min(0.5 * 2**node.setbacks, _MAX_SETBACK_S)
            node.explain(f"{node.reason}; the copy is tried again in {delay_s:g} s")
            await trio.sleep(delay_s)
        async with node.promotion.lock:
            if node.primary is not None:
                raise ProtocolError("FOLLOW for a node that is the primary")
            mine = node.keeper.record
            if any(epoch.tag in mine.wrote and not record.remembers(epoch) for epoch in mine.epochs):
                raise ProtocolError("FOLLOW for a node that acknowledged changes which the other does not know of")
            await self._become_target(record, quick)
        self._link.send_message(Kind.FOLLOWING)

    async def _become_target(self, record: epochs.Record, quick: bool) -> None:
        node = self._node
        self._link.streams += 1
        node.use_volume(record.volume_id)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        reason = f"a {'quick resync' if quick else 'copy'} from {self._theirs.node} began at {since}"
        # What an interrupted quick resync has set aside is still needed by the next.
        is_continued = quick and node.keeper.record.standing is Standing.RESYNCING
        if not quick:
            await node.activity.distrust()
        await node.keeper.adopt(record, Standing.RESYNCING, reason)
        node.arbitration.begin_anew()
        node.discard_local_data, node.peer_progress = False, None
        if not is_continued:
            await trio.to_thread.run_sync(empty_orphans, node.orphans)
        node.tree.table.begin_era()
        node.tree.table.close_idle()
        await node.session.invalidate(node.tree.table.all())
        if quick:
            for items in await reports.pack(node.activity.dirty, node.tree):
                self._link.send_message(Kind.HOT, items)
                await trio.lowlevel.checkpoint()
        node.standby = Standby(
            node.tree,
            node.keeper,
            node.activity,
            self._link,
            node.nursery,
            target=(Returning if quick else Target)(node.tree, node.orphans),
            lost=node.lost,
            before_first=trio.lowlevel.checkpoint,
            syncs=node.session.syncs,
        )
        node.enter(f"{'catching up with' if quick else 'copying from'} {self._theirs.node}")
