"""Moving the primary's role by hand: promote, demote, and the handover between two nodes that are in sync."""

import logging
import os
from typing import TYPE_CHECKING, Final

import trio

from mirrorfs.core import epochs, packing
from mirrorfs.core.epochs import Member, Standing
from mirrorfs.core.wire import Kind
from mirrorfs.errors import (
    ClaimLostError,
    ConfirmationNeededError,
    JournalError,
    MirrorfsError,
    NoAnswerError,
    ProtocolError,
    RefusedError,
)
from mirrorfs.peer import Link
from mirrorfs.standby import Standby

if TYPE_CHECKING:
    from mirrorfs.arbitration import Grant
    from mirrorfs.node import Node

log = logging.getLogger(__name__)

_HANDOVER_S: Final = 10.0


class Promotion:
    """The moves of one node's role; one at a time."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.lock = trio.Lock()

    async def hand_over_when_asked(self) -> None:
        """The standby wants the role; a refusal is told to it."""
        try:
            await self.hand_over()
        except MirrorfsError as error:
            if not isinstance(error, JournalError):  # then the node ends and says why
                log.warning("not handed over: %s", error, extra={"event": "handover-refused", "reason": str(error)})
            if self._node.link is not None:
                self._node.link.send_message(Kind.REFUSED, str(error))

    async def hand_over(self, *, disk_failed: bool = False) -> None:
        """Give the role to the in-sync peer: drained, durable, told. Afterwards this node follows.

        After its disk failed it does not: it is out of the in-sync set, and outdated by its record.
        """
        node = self._node
        async with self.lock:
            primary, link, peer = node.primary, node.link, node.peer
            if primary is None or link is None or peer is None or not node.peer_joined:
                raise RefusedError("the other node is not in sync: nothing can be handed over")
            primary.loss = f"handing over to {peer.node}"
            if not await primary.drain():
                raise MirrorfsError(f"{peer.node} was lost while the stream was drained; this node goes on")
            # Nothing waits for an acknowledgement now, and nothing may begin: what comes is refused from here on, so that a
            # link that breaks below leaves a node that has given the role up, and a record that says to whom.
            primary.retire()
            members = {Member(peer.node, peer.boot)} | (set() if disk_failed else {node.keeper.me()})
            with trio.CancelScope(shield=True):
                await node.keeper.begin(peer.node, frozenset(members))
                link.streams += 1
                link.send_message(Kind.HANDOVER, packing.pack_record(node.keeper.record))
                await self._follow_on(link, peer.node, disk_failed=disk_failed)

    async def _follow_on(self, link: Link, peer: str, *, disk_failed: bool) -> None:
        """Follow the node that was handed over to, on the same link; its changes wait until the kernel has forgotten all."""
        node = self._node
        invalidated = trio.Event()
        if node.link is link and not disk_failed:
            node.standby = Standby(
                node.tree,
                node.keeper,
                node.activity,
                link,
                node.nursery,
                target=None,
                lost=node.lost,
                before_first=invalidated.wait,
                syncs=node.session.syncs,
            )
        node.tree.table.begin_era()
        try:
            await node.stop_leading(f"handed over to {peer}")
            log.info("the role is handed over to %s", peer, extra={"event": "handed-over", "peer": peer, "epoch": node.epoch})
        finally:
            invalidated.set()

    async def take_over(self, theirs: epochs.Record, link: Link) -> None:
        """The primary has handed over: its record names this node."""
        node = self._node
        async with self.lock:
            if node.standby is None or not node.standby.in_sync or node.peer is None:
                raise ProtocolError("HANDOVER to a node that is not in sync")
            node.standby.acknowledge()
            await node.keeper.adopt(theirs, Standing.IN_SYNC, "")
            link.streams += 1
            node.tree.table.begin_era()
            epoch = node.keeper.record.epoch
            assert epoch is not None
            node.peer_joined = epoch.has(node.peer.node)
            await node.lead(f"taken over from {node.peer.node}", mirror_to=link if node.peer_joined else None)
            extra = {"event": "taken-over", "peer": node.peer.node, "epoch": node.epoch}
            log.info("the role is taken over from %s", node.peer.node, extra=extra)
            if not node.peer_joined:
                link.close("taken over: greeting again")

    async def promote(self, *, yes: bool, force: bool, automatic: bool = False, outdated: bool = False) -> str:
        """Become the primary on an operator's word, or on a controller's (`automatic`): nobody can be asked then.

        `outdated`: the controller has heard that the lost primary went on alone, so that what it wrote since is missing here.
        Returns what was done, or raises what stands against it.
        """
        if outdated:
            self._node.lost_in_sync = False  # also for a controller that has heard nothing of it, since it was started later
        try:
            return await self._promote(yes=yes, force=force, automatic=automatic)
        except (RefusedError, ConfirmationNeededError) as error:
            # A controller asks again every second.
            extra = {"event": "promotion-refused", "reason": str(error), "automatic": automatic}
            if automatic:
                self._node.tell_once(f"not promoted: {error}", extra)
            else:
                log.warning("not promoted: %s", error, extra=extra)
            raise

    async def _promote(self, *, yes: bool, force: bool, automatic: bool) -> str:
        node = self._node
        name = node.config.node.name
        if node.primary is not None:
            return f"{name} is the primary already"
        if node.standby is not None and node.connected:
            return await self._ask_for_handover(force=force)
        async with self.lock:
            if node.primary is not None:
                return f"{name} is the primary already"
            new, grant = node.keeper.record.epoch is None, None
            if new:
                # Before the decision: the other node may come while the arbiter is asked, with the volume.
                await node.arbitration.check_new(force=force)
            forced = self.decide(yes=yes, force=force, automatic=automatic)
            if not new and (automatic or node.arbitration.decides):
                grant, forced = await self._granted(force=force, forced=forced)
            volume_id = node.keeper.record.volume_id or os.urandom(16).hex()
            node.use_volume(volume_id)
            if forced:
                await node.activity.distrust()  # what is missing here is in nobody's dirty set
            await node.keeper.begin(
                name,
                frozenset({node.keeper.me()}),
                forced=forced,
                wrote=node.config.peer is not None,
                volume_id=volume_id,
                standing=Standing.IN_SYNC,
                grant=grant,
            )
            await node.lead("promoted by force" if forced else "promoted by itself" if automatic else "promoted by hand")
            extra = {"event": "promoted", "epoch": node.epoch, "forced": forced, "automatic": automatic, "new": new}
            log.info("%s was promoted", name, extra=extra)
            if node.link is not None:
                node.link.close("promoted: greeting again")
        epoch = node.keeper.record.epoch
        assert epoch is not None
        return f"{name} is the primary in epoch {epoch.number}" + (" of a new volume" if new else "")

    async def promote_new(self) -> str:
        """The one promotion that makes a new volume, where nothing can be lost by it: both nodes are here and have no history,
        and the other one has no files. Nobody has to be asked then. Raises RefusedError, MirrorfsError while that one is away.
        """
        node, met = self._node, self._met
        if node.keeper.record.epoch is not None:
            raise RefusedError(f"{node.config.volume} is not new, its roles stay as they are (`mirrorfs status`)")
        if met is None:
            raise MirrorfsError(f"{node.peer_name} is not connected yet: run `mirrorfs promote` here when it is")
        if not (met.empty or met.discard_local_data):
            raise RefusedError(
                f"{met.node} has files in its directory too: run `mirrorfs promote` on the node whose files are to be kept, "
                "after the directory of the other one was emptied, or that was started with --discard-local-data"
            )
        return await self.promote(yes=False, force=False)

    async def _granted(self, *, force: bool, forced: bool) -> "tuple[Grant | None, bool]":
        """What the arbiter says, and whether the promotion is by force then; raises RefusedError if it stands against it."""
        arbitration = self._node.arbitration
        try:
            try:
                return await arbitration.claim(force=forced), forced
            except ClaimLostError:
                if not force:
                    raise
                return await arbitration.claim(force=True), True
        except ClaimLostError as error:
            raise RefusedError(f"{error}: what it acknowledged is missing here (--force promotes all the same)") from None
        except NoAnswerError as error:
            if force:
                return None, True  # it is claimed as soon as somebody answers
            raise RefusedError(f"nobody knows whether {self._node.peer_name} went on: {error} (--force promotes)") from None

    def decide(self, *, yes: bool, force: bool, automatic: bool) -> bool:
        """Raise what stands against a promotion; returns whether it is one by force."""
        node, met = self._node, self._met
        if met is not None and isinstance(node.verdict, epochs.Resume) and node.verdict.primary == met.node:
            raise MirrorfsError(f"{met.node} is the primary or about to be: promote again when this node follows it")
        if node.keeper.record.epoch is None and met is not None and met.record.epochs:
            # Not by force either: there is nothing here that could be kept.
            raise RefusedError(f"this node holds nothing of the volume yet and {met.node} does: promote {met.node}")
        decision = self._verdict(met)
        if isinstance(decision, epochs.Forbidden) and not force:
            raise RefusedError(f"{decision.reason} (--force promotes all the same)")
        if automatic:
            if isinstance(decision, epochs.Forbidden) or force:
                raise RefusedError("by force only on an operator's word")
            self._check_automatic(decision)
            return False
        if not (yes or force):
            if node.split_brain:
                raise ConfirmationNeededError(f"{node.split_brain}; --yes goes on with this node's history")
            if isinstance(decision, epochs.AskFirst) and (not node.arbitration.decides or node.keeper.record.epoch is None):
                raise ConfirmationNeededError(f"{decision.reason} (--yes promotes)")
        return isinstance(decision, epochs.Forbidden)

    @property
    def _met(self) -> epochs.Hello | None:
        node = self._node
        return node.peer if node.connected and not node.split_brain else None

    def _verdict(self, met: epochs.Hello | None) -> epochs.Allowed | epochs.AskFirst | epochs.Forbidden:
        node, peer = self._node, self._node.config.peer
        return epochs.may_promote(
            node.keeper.record,
            node.config.node.name,
            node.keeper.boot,
            peer=peer.name if peer else None,
            met=met,
            lost_at=node.peer_lost_at,
        )

    def could_miss(self) -> str:
        """What this node may not have of what was acknowledged, as far as it can know without an arbiter; "" for nothing."""
        match self._verdict(self._met):
            case epochs.Forbidden(reason):
                return reason
            case epochs.AskFirst(reason) if not self._node.arbitration.decides:
                return reason
            case _:
                return self._node.split_brain

    def check_handover(self, *, force: bool) -> None:
        """RefusedError if the primary, which is connected, cannot hand over to this node."""
        node = self._node
        assert node.standby is not None
        if not node.standby.in_sync:
            advice = "; to promote it by force, stop the primary first" if force else ""
            raise RefusedError(
                f"this node is being resynced ({node.keeper.record.reason}) and {node.peer_name} is the primary: wait "
                f"until it is in sync{advice}"
            )

    def _check_automatic(self, decision: epochs.Allowed | epochs.AskFirst) -> None:
        """Raise what stands against a promotion that no person answers for."""
        node = self._node
        if node.split_brain:
            raise RefusedError(node.split_brain)
        if node.keeper.record.epoch is None:
            raise RefusedError("the volume is new: an operator says which node's files are kept, by `mirrorfs promote` there")
        if node.keeper.record.paused_at:
            raise RefusedError(node.pausing.reason)
        if node.differences:
            raise RefusedError(
                f"the nodes do not have the same configuration ({node.differences[0]}): nothing is done by itself"
            )
        if node.arbitration.decides:
            return
        if not node.config.arbiter.allow_unarbitrated:
            raise RefusedError("there is no arbiter and allow_unarbitrated is not set: an operator has to promote")
        if isinstance(decision, epochs.AskFirst) and not node.lost_in_sync:
            raise RefusedError(f"{decision.reason}; an operator has to promote (`mirrorfs promote --yes`)")

    async def _ask_for_handover(self, *, force: bool) -> str:
        node = self._node
        self.check_handover(force=force)
        link = node.link
        assert link is not None
        node.refusal = ""
        link.send_message(Kind.HANDOVER_WANTED)
        with trio.move_on_after(_HANDOVER_S):
            while node.primary is None and node.link is link and node.connected and not node.refusal:
                await node.role_changed.wait()
            if node.primary is not None:
                return f"{node.config.node.name} is the primary, taken over from {node.peer_name}"
            if node.refusal:
                raise RefusedError(f"{node.peer_name} did not hand over: {node.refusal}")
            raise MirrorfsError("the primary was lost during the handover: look at `mirrorfs status` and promote again")
        raise MirrorfsError(f"{node.peer_name} did not hand over within {_HANDOVER_S:g} s; see its log")

    async def demote(self, *, force: bool) -> str:
        """Give the primary's role up: to an in-sync peer, or with `force` to nobody."""
        node = self._node
        if node.primary is None:
            return f"{node.config.node.name} is not the primary"
        if node.peer_joined:
            await self.hand_over()
            return f"handed over to {node.peer_name}"
        if not force:
            raise RefusedError("no other node is in sync, so nobody could take over (--force stops writes all the same)")
        async with self.lock:
            await node.stop_leading("demoted by hand: `mirrorfs promote --yes` makes it the primary again")
        if node.link is not None:
            node.link.close("demoted: greeting again")
        return f"{node.config.node.name} is waiting"
