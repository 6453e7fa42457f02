"""Pausing the replication by hand, for the maintenance of one node, and resuming it.

A pause is made and kept by the primary. First it records that it is alone, and paused, in one write; until that is durable
every change still waits for the peer, so that the application notices nothing. Then, with no await in between, it goes on
alone and tells the peer, behind all that it has sent: the peer has everything up to that point, records that it is outdated
from here on (so that nobody promotes it but by force), and only then the link ends.
"""

import logging
import time
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs.core import epochs, packing
from mirrorfs.core.epochs import Hello, Standing
from mirrorfs.core.modes import Mode
from mirrorfs.core.pauses import Pause, may_serve
from mirrorfs.core.wire import Kind
from mirrorfs.errors import ClaimLostError, ConfirmationNeededError, MirrorfsError, NoAnswerError, ProtocolError
from mirrorfs.peer import Link

if TYPE_CHECKING:
    from mirrorfs.node import Node

log = logging.getLogger(__name__)

_ANSWER_S: Final = 10.0


class Pausing:
    """The pause of one node's replication: its own, or the other node's, which keeps this one off."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._theirs: Pause | None = None
        self._confirmed = trio.Event()
        self.wants_resume = False

    @property
    def pause(self) -> Pause | None:
        """The pause that keeps the two nodes apart, as far as this one knows."""
        node = self._node
        if node.keeper.record.paused_at:
            return Pause(node.name, node.keeper.record.paused_at)
        return self._theirs if node.primary is None else None

    @property
    def reason(self) -> str:
        """The own pause in words, and how to end it."""
        return in_words(Pause(self._node.name, self._node.keeper.record.paused_at))

    # ---- what an operator asks for

    async def begin(self, *, yes: bool) -> str:
        """Pause, here or by asking the primary; returns what was done, or raises what stands against it."""
        node = self._node
        if node.config.peer is None:
            raise MirrorfsError("no other node is configured: there is nothing to pause")
        if self.pause is not None:
            return in_words(self.pause)
        peer = node.config.peer.name
        primary, other = (node.name, peer) if node.primary is not None else (peer, node.name)
        if node.primary is None and (node.standby is None or not node.connected):
            raise MirrorfsError(f"{node.name} neither serves nor follows, so there is nothing to pause: {node.reason}")
        if not yes:
            raise ConfirmationNeededError(
                f"until `mirrorfs resume`, what is written is on {primary} only, and {other} cannot take over (--yes pauses)"
            )
        if node.primary is None:
            return await self._ask_primary()
        return await self._begin_here()

    async def _begin_here(self) -> str:
        node = self._node
        async with node.promotion.lock:
            primary, link, peer = node.primary, node.link, node.peer_name
            if primary is None:
                raise MirrorfsError(f"{node.name} is not the primary any more: nothing was paused")
            if primary.mode in (Mode.FROZEN, Mode.LOST):
                raise MirrorfsError(
                    f"writes are frozen here ({primary.loss}): nothing can be paused until the other node is back"
                )
            grant = await node.arbitration.claim() if node.arbitration.decides else None
            if node.primary is not primary or primary.mode in (Mode.FROZEN, Mode.LOST):
                raise MirrorfsError(f"{peer} was lost meanwhile: nothing was paused")
            primary.settle_all()
            with trio.CancelScope(shield=True):
                await node.keeper.begin_pause(wrote=primary.stream is not None and primary.stream.awaited, grant=grant)
            # What was acknowledged while that was written is on both nodes. No await from here to the message.
            if primary.disk_is_bad or node.primary is not primary:
                raise MirrorfsError(f"this node cannot go on alone: {primary.loss}")
            in_sync = primary.mode is Mode.MIRRORED
            primary.part()
            self._confirmed = trio.Event()
            node.peer_joined = False
            if link is not None and in_sync:
                link.send_message(Kind.PAUSE, packing.pack_record(node.keeper.record))
            log.info("%s", self.reason, extra={"event": "paused"})
            node.enter(self.reason)
            if link is None:
                return self.reason
            if in_sync:
                with trio.move_on_after(node.config.replication.ack_timeout_s):
                    await self._confirmed.wait()
            link.close(self.reason)
        if in_sync and not self._confirmed.is_set():
            return (
                f"{self.reason}; {peer} has not confirmed that it knows, so do not promote it: its `mirrorfs promote` would "
                "ask for --yes and not refuse"
            )
        return self.reason

    async def begin_when_asked(self) -> None:
        """The standby's operator wants a pause; what stands against it is told to it."""
        try:
            await self._begin_here()
        except MirrorfsError as error:
            log.warning("not paused: %s", error, extra={"event": "pause-refused", "reason": str(error)})
            if self._node.link is not None:
                self._node.link.send_message(Kind.REFUSED, str(error))

    async def _ask_primary(self) -> str:
        node = self._node
        link = node.link
        assert link is not None
        node.refusal = ""
        link.send_message(Kind.PAUSE_WANTED)
        with trio.move_on_after(_ANSWER_S):
            while self._theirs is None and not node.refusal:
                await node.role_changed.wait()
            if self._theirs is not None:
                return in_words(self._theirs)
            raise MirrorfsError(f"{node.peer_name} did not pause: {node.refusal}")
        raise MirrorfsError(f"{node.peer_name} did not pause within {_ANSWER_S:g} s; see its log")

    async def resume(self) -> str:
        """End the pause, here or by asking the node that made it; returns what was done."""
        node = self._node
        if node.keeper.record.paused_at:
            await self._end("resumed by hand")
            return f"replication goes on: {node.peer_name} is brought up to date as soon as it is connected"
        pause = self.pause
        if pause is None:
            return f"replication is not paused, as far as {node.name} knows"
        self.wants_resume = True
        try:
            with trio.move_on_after(_ANSWER_S):
                while not node.connected:
                    await node.role_changed.wait()
                return f"replication goes on: {node.name} is brought up to date by {pause.node}"
        finally:
            self.wants_resume = False
        raise MirrorfsError(f"{pause.node} cannot be reached: run `mirrorfs resume` on it")

    async def _end(self, why: str) -> None:
        node = self._node
        await node.keeper.end_pause()
        node.reason = f"{why}: waiting for {node.peer_name}"
        log.info("%s", node.reason, extra={"event": "resumed"})

    # ---- what the other node says

    def on_connected(self) -> None:
        """The two go on together."""
        self._theirs = None
        self._node.announce()

    async def on_pause(self, theirs: epochs.Record, link: Link) -> None:
        """The primary goes on alone; this node has everything up to here, and records that it lacks what comes."""
        node = self._node
        if node.standby is None or not node.standby.in_sync:
            raise ProtocolError("PAUSE for a node that is not in sync")
        epoch = theirs.epoch
        assert epoch is not None
        pause = Pause(epoch.primary, epoch.began)
        await node.keeper.adopt(theirs, Standing.OUTDATED, in_words(pause))
        link.send_message(Kind.PAUSED)
        self._theirs, node.standby = pause, None
        node.enter(in_words(pause))

    def on_confirmed(self) -> None:
        """The other node knows durably that it is left behind."""
        self._confirmed.set()

    async def keep_off(self, pause: Pause, mine: Hello, theirs: Hello) -> None:
        """The two have met, and would go on together but for the pause."""
        node = self._node
        async with node.promotion.lock:
            if mine != node.hello() or node.link is not None:
                return
            if pause.node != node.name:
                self._theirs = pause
                if node.primary is not None:
                    await node.stop_leading(in_words(pause))  # it would have to follow: what it serves is the past
                elif node.reason != in_words(pause):
                    node.enter(in_words(pause))
            elif theirs.resume:
                await self._end(f"resumed by hand on {theirs.node}")
            elif node.primary is None and may_serve(theirs):
                await self._serve_alone()

    async def _serve_alone(self) -> None:
        """The paused node was restarted; the other one knows itself behind, and the arbiter does if there is one."""
        node = self._node
        try:
            grant = await node.arbitration.claim() if node.arbitration.decides else None
        except (ClaimLostError, NoAnswerError) as error:
            node.explain(f"{self.reason}; it does not serve: {error}")
            return
        await node.keeper.begin(node.name, frozenset({node.keeper.me()}), wrote=node.keeper.wrote_alone, grant=grant)
        await node.lead(self.reason)


def in_words(pause: Pause) -> str:
    """What it is, and what to run to end it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(pause.since))
    return f"replication is paused by hand since {since}: {pause.node} is alone; `mirrorfs resume` ends the pause"


def describe(pause: Pause) -> dict[str, Any]:
    """For `mirrorfs status`."""
    return {"node": pause.node, "by": "hand", "since": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(pause.since))}
