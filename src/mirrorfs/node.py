"""One node of a pair: one link at a time, one role at a time.

Roles: `waiting` (nobody may write here), leading (`Primary`), following (`Standby`). A role changes only here; each change is
durable before it shows.
"""

import contextlib
import errno
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio

from mirrorfs import __version__, backing
from mirrorfs.activity import Activity
from mirrorfs.arbiter import Arbiter
from mirrorfs.arbitration import Arbitration
from mirrorfs.config import Config
from mirrorfs.conversation import Conversation
from mirrorfs.core import epochs, packing, pauses
from mirrorfs.core.epochs import Hello, Standing
from mirrorfs.core.modes import Mode
from mirrorfs.errors import (
    JournalError,
    LinkLostError,
    MirrorfsError,
    ProtocolError,
)
from mirrorfs.fuse_ops import FuseOperations
from mirrorfs.housekeeping import keep_house
from mirrorfs.keeper import Keeper
from mirrorfs.lost import LostStore
from mirrorfs.measures import Measures
from mirrorfs.pausing import Pausing
from mirrorfs.peer import Link, dial, greet, listen
from mirrorfs.preview import Preview
from mirrorfs.promotion import Promotion
from mirrorfs.replication import Primary
from mirrorfs.resync.progress import Progress
from mirrorfs.session import NoSession, Session
from mirrorfs.space import Space
from mirrorfs.split_brain import SplitBrain
from mirrorfs.standby import Standby
from mirrorfs.tree import Tree, no_finder, no_new_ids
from mirrorfs.trust import Trust
from mirrorfs.verify.verifier import Verifier

log = logging.getLogger(__name__)

_SYNC_INTERVAL_S = 0.5
_KEPT_OFF_S = 1.0


class Node:
    """One node of a pair, from start to end."""

    def __init__(
        self,
        config: Config,
        under: backing.Backing,
        keeper: Keeper,
        activity: Activity,
        nursery: trio.Nursery,
        *,
        discard_local_data: bool,
        arbiter: Arbiter | None = None,
        session: Session | None = None,
    ) -> None:
        self.session = session or NoSession()
        self.config = config
        self.keeper = keeper
        self.activity = activity
        self.measures = Measures()
        self.tree = Tree(under.tree)
        self.primary: Primary | None = None
        self.standby: Standby | None = None
        self.reign = 0
        self.operations = FuseOperations(self.tree, self, self.session.answers)
        self.name = config.node.name
        self.root = under.tree
        self.orphans = under.orphans
        self.lost = LostStore(Path(f"/proc/self/fd/{under.lost}"))  # its path lies under the mount
        self._under = under
        self.nursery = nursery
        self.discard_local_data = discard_local_data
        self.link: Link | None = None
        self.peer: Hello | None = None
        #: Which mirrorfs the other node is; empty if it does not say so.
        self.peer_version = ""
        self.peer_joined = False
        self.peer_space: Space | None = None
        self.peer_progress: Progress | None = None
        self.peer_lost_at = "the start of this node"
        self.reason = "just started"
        self.split_brain = ""
        self.since = time.time()
        self.refusal = ""
        self.setbacks = 0
        self._told: set[str] = set()
        self.promotion = Promotion(self)
        self.split = SplitBrain(self)
        self.pausing = Pausing(self)
        self.preview = Preview(self)
        self.arbitration = Arbitration(self, keeper, arbiter)
        #: Whether this node followed in sync until the link ended, and nothing has happened since.
        self.lost_in_sync = False
        #: Keys of the configuration that the other node has otherwise, in words.
        self.differences: list[str] = []
        self.verifier = Verifier(self, config.node.state_dir)
        #: What somebody should look after, in words; empty if nothing.
        self.warning = ""
        self.trust = Trust(config.node.keys)
        self.role_changed = trio.Event()
        self.verdict: epochs.Verdict | None = None
        volume = bytes.fromhex(keeper.record.volume_id)
        self._is_own_tree = not volume or self.tree.is_of(volume)
        if volume and self._is_own_tree:
            self.tree.set_volume(volume)
        activity.belongs_to(keeper.record.volume_id, self.tree)

    # ---- small things

    def use_volume(self, volume_id: str) -> None:
        """The tree is of this volume from now on; noted in the tree before any record says so."""
        self.tree.set_volume(bytes.fromhex(volume_id))
        self._is_own_tree = True

    def enter(self, reason: str) -> None:
        """A role has begun or ended."""
        self.reason = reason
        self.since = time.time()
        log.info("%s: %s", self.state, reason, extra={"event": "state-changed", "state": self.state, "epoch": self.epoch})
        self.announce()

    def frozen(self, reason: str) -> None:
        """Why writes are frozen."""
        if self.primary is not None and reason != self.reason:
            self.primary.loss = reason
            self.enter(reason)

    def explain(self, reason: str) -> None:
        """Why this node is what it is, in more detail than when it became that."""
        if self.primary is None:
            self.reason = reason

    def on_refusal(self, reason: str) -> None:
        """The primary does not hand over."""
        self.refusal = reason
        log.warning("%s: %s", self.peer_name, reason, extra={"event": "request-refused", "peer": self.peer_name})
        self.announce()

    def announce(self) -> None:
        """Wake up who waits for a change of roles, or for the other node."""
        self.role_changed.set()
        self.role_changed = trio.Event()

    @property
    def connected(self) -> bool:
        """Whether the other node is connected, as far as this one knows."""
        return self.link is not None and self.link.failure is None

    @property
    def knows_its_role(self) -> bool:
        """Whether it leads or follows, or a person has to say which."""
        needs_person = isinstance(self.verdict, epochs.Wait | epochs.SplitBrain)
        return self.primary is not None or self.standby is not None or needs_person

    @property
    def epoch(self) -> int:
        """The number of the newest epoch that this node knows; 0 before the volume is made."""
        epoch = self.keeper.record.epoch
        return epoch.number if epoch else 0

    def tell_once(self, text: str, extra: Mapping[str, object] | None = None) -> None:
        """One line in the log, however often it happens; `extra` as for `logging`."""
        if text not in self._told:
            if len(self._told) > 100:
                self._told.clear()
            self._told.add(text)
            log.warning("%s", text, extra=extra)

    @property
    def state(self) -> str:
        """One word for what this node is now."""
        if self.primary is not None:
            if self.primary.mode is Mode.FROZEN:
                return "waiting"
            return "solo" if self.primary.mode is Mode.ALONE else "primary"
        if self.standby is not None:
            return "standby" if self.standby.in_sync else "resyncing"
        return "waiting"

    def space(self) -> Space:
        """The smaller of both nodes."""
        own = self.own_space()
        if self.peer_space is None or self.primary is None or self.primary.mode is not Mode.MIRRORED:
            return own
        return own.smaller(self.peer_space)

    def own_space(self) -> Space:
        """Room on this node."""
        return Space.of(self.tree.statvfs())

    def new_id(self) -> int:
        """The id of a file that an application makes."""
        return self.keeper.new_id()

    def _found_id(self) -> int:
        """The id for a file that has none; while mirrored there is no such file, unless somebody made it underneath."""
        if self.primary is not None and self.primary.is_whole:
            self.tell_once(
                "a file was put into the directory underneath while mirrored: it is on this node only and is not shown; "
                "take it away and write it through the mount"
            )
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self.keeper.new_id()

    # ---- roles

    async def lead(self, reason: str, *, mirror_to: Link | None = None) -> None:
        """Become the primary; the epoch that says so is durable already. With `mirror_to`, the peer has the same tree."""
        assert self.primary is None
        self.tree.new_id = self._found_id
        self.tree.adopt_provisional()
        await self.session.invalidate(self.tree.table.all())
        primary = Primary(
            self.tree,
            self.keeper,
            self.activity,
            config=self.config,
            disk_failed=self._on_disk_failure,
            syncs=self.session.syncs,
            measures=self.measures,
        )
        self.tree.on_found = primary.found
        if self.arbitration.is_asked:
            primary.ask_alone = lambda wrote: self.nursery.start_soon(self._go_on_alone, primary, wrote)
        if mirror_to is not None:
            primary.mirror_to(mirror_to)
        await self.keeper.reserve_ahead()
        self.standby = None
        self.reign += 1
        self.primary = primary
        self.enter(reason)

    async def _go_on_alone(self, primary: Primary, wrote: bool) -> None:
        await self.arbitration.go_on_alone(primary, wrote=wrote)

    async def stop_leading(self, reason: str) -> None:
        """Not the primary any more, as the record already says; changes that wait are refused, the kernel forgets all."""
        primary, self.primary = self.primary, None
        self.tree.new_id, self.tree.on_found = no_new_ids, no_finder
        if primary is not None:
            primary.retire()
        self.enter(reason)
        await self.session.invalidate(self.tree.table.all())

    def _on_disk_failure(self, error: OSError) -> None:
        self.nursery.start_soon(self._leave_after_disk_failure, f"the disk of this node failed: {error.strerror}")

    async def _leave_after_disk_failure(self, text: str) -> None:
        """A sync failed here: this node must not be a source while the other is whole."""
        log.error("%s", text, extra={"event": "disk-failed"})
        try:
            await self.keeper.stand(Standing.OUTDATED, text)
            with contextlib.suppress(MirrorfsError):
                await self.promotion.hand_over(disk_failed=True)
                return
            async with self.promotion.lock:
                if self.primary is not None:
                    await self.stop_leading(text)
        except JournalError:
            return  # the daemon ends, as `Keeper.failed` had it
        if self.link is not None:
            self.link.close(text)

    # ---- the link

    def hello(self) -> Hello:
        """What this node says of itself now."""
        return Hello(
            volume=self.config.volume,
            node=self.config.node.name,
            boot=self.keeper.boot,
            record=self.keeper.record,
            serving=self.primary is not None,
            empty=self.tree.is_empty,
            discard_local_data=self.discard_local_data,
            dirty=self.activity.dirty.head,
            resume=self.pausing.wants_resume,
            marked=self.activity.marked,
            peer_marked=self.tree.notes.peer_marked,
        )

    @property
    def _listens(self) -> bool:
        """Whether the other node dials this one."""
        return self.config.peer is not None and self.config.node.name < self.config.peer.name

    async def _visit(self, connection: socket.socket, host: str) -> None:
        """Serve one connection from greeting to end."""
        mine = self.hello()
        try:
            greeting = packing.pack_hello(mine) | {"settings": dict(self.config.shared), "version": __version__}
            content, channel = await greet(
                connection,
                greeting,
                self.trust,
                server_side=self._listens,
                encrypted=self.config.encrypted,
            )
            theirs = self._recognised(content)
            verdict = epochs.meet(mine, theirs)
        except (ProtocolError, LinkLostError) as error:
            self.tell_once(f"{host}: connection refused: {error}", {"event": "connection-refused", "host": host})
            return
        if isinstance(verdict, epochs.Refuse):
            self._refuse(host, verdict.reason)
            await trio.sleep(1)
            return
        if self.link is not None:
            self.tell_once(
                f"{host}: connection refused: {theirs.node} is connected already", {"event": "connection-refused", "host": host}
            )
            return
        pause = pauses.pause_between(verdict, mine, theirs)
        if pause is not None:
            await self.pausing.keep_off(pause, mine, theirs)
            await trio.sleep(_KEPT_OFF_S)
            return
        if mine != self.hello() or self.promotion.lock.locked():
            return  # something changed during the greeting, or is about to: greet again
        link = Link(
            connection,
            channel,
            ack_timeout_s=self.config.replication.ack_timeout_s,
            stall_timeout_s=self.config.replication.stall_timeout_s,
        )
        self.link, self.peer, self.verdict = link, theirs, verdict
        self.peer_version = packing.version_in(content)
        log.info("%s is connected", theirs.node, extra={"event": "peer-connected", "peer": theirs.node})
        self.announce()
        self.lost_in_sync = False
        self.pausing.on_connected()
        try:
            await Conversation(self, link, verdict, mine, theirs).run()
        finally:
            if trio.current_effective_deadline() == -math.inf and self.primary is not None:
                # It is this node that ends, whatever the reason: the peer is not lost, and may be promoted with all that was
                # acknowledged. What still waits must not be acknowledged by an epoch in which this node is alone.
                self.primary.retire()
            link.close()
            with trio.CancelScope(shield=True):
                await self._link_ended(str(link.failure))

    def _refuse(self, host: str, reason: str) -> None:
        self.tell_once(f"{host}: connection refused: {reason}", {"event": "connection-refused", "host": host})
        if self.primary is None and self.link is None:
            self.reason = reason

    def _recognised(self, content: dict[str, Any]) -> Hello:
        try:
            hello = packing.unpack_hello(content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"a malformed HELLO: {error!r}") from error
        peer = self.config.peer
        self._compare_settings(hello.node, content.get("settings"))
        if hello.volume == self.config.volume and hello.node not in (self.config.node.name, peer.name if peer else ""):
            raise ProtocolError(f"it says that it is {hello.node!r}, which is no node of {self.config.file}")
        return hello

    def _compare_settings(self, who: str, theirs: object) -> None:
        """The two files should say the same: what differs is told, and nothing is done by itself while it does."""
        mine = self.config.shared
        if not isinstance(theirs, dict) or not mine:
            return
        keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        self.differences = [
            f"{key} is {mine.get(key, 'missing')} here and {theirs.get(key, 'missing')} on {who}" for key in map(str, keys[:10])
        ]
        for difference in self.differences:
            self.tell_once(f"the configuration differs: {difference}", {"event": "configuration-differs", "peer": who})

    async def _link_ended(self, reason: str) -> None:
        log.info(
            "%s is not connected any more: %s",
            self.peer_name,
            reason,
            extra={"event": "peer-lost", "peer": self.peer_name, "reason": reason},
        )
        self.link, self.peer_space, self.peer_progress, self.verdict = None, None, None, None
        self.split.link_ended()
        self.peer_joined = False
        self.peer_lost_at = time.strftime("%Y-%m-%d %H:%M:%S")
        primary = self.primary
        if primary is not None:
            before = primary.mode
            with contextlib.suppress(JournalError):  # then the daemon ends, as `Keeper.failed` had it
                await primary.peer_lost(reason)
            if self.primary is primary and before is not primary.mode:
                self.enter(f"{self.peer_name} was lost: {reason}")
        elif self.standby is not None:
            failure, in_sync, self.standby = self.standby.failure, self.standby.in_sync, None
            self.lost_in_sync = in_sync and not failure
            self.setbacks += bool(failure)
            self.enter(f"out of sync: {failure}" if failure else f"the primary was lost: {reason}")

    @property
    def peer_name(self) -> str:
        """The other node, for a sentence."""
        return self.config.peer.name if self.config.peer else "the other node"

    # ---- from start to end

    async def begin(self, nursery: trio.Nursery) -> None:
        """Look for the other node, or run alone where none is configured."""
        peer, own = self.config.peer, self.config.node
        if self.keeper.record.paused_at:
            self.enter(f"{self.pausing.reason}; `mirrorfs promote` makes it serve again if {self.peer_name} cannot be asked")
        nursery.start_soon(self._housekeeping)
        nursery.start_soon(self._sync_idle)
        nursery.start_soon(self.verifier.keep_schedule)
        nursery.start_soon(self.arbitration.keep_published)
        if peer is None:
            await self._begin_alone()
        elif self._listens:
            listening = partial(listen, peer=peer.address, is_connected=lambda: self.connected)
            await nursery.start(listening, own.address, own.port, self._visit)
        else:
            nursery.start_soon(dial, own.address, peer.address, peer.port, self._visit)

    async def check_tree(self) -> None:
        """MirrorfsError unless the record is this tree's: an empty disk, or one that is not mounted, must never be a source."""
        if self._is_own_tree:
            return
        if not self.discard_local_data:
            raise MirrorfsError(
                f"{self._under.base}: not the directory that the record in {self.config.node.state_dir} belongs to: is its "
                "disk mounted? If the disk was replaced, start with --discard-local-data to have it copied from the other node"
            )
        self.tree.set_volume(bytes.fromhex(self.keeper.record.volume_id))
        await self.keeper.stand(Standing.OUTDATED, "its directory was replaced")

    async def _begin_alone(self) -> None:
        record, name = self.keeper.record, self.config.node.name
        decision = epochs.may_promote(record, name, self.keeper.boot, peer=None, met=None, lost_at="")
        if not isinstance(decision, epochs.Allowed):
            self.enter(decision.reason)
            return
        volume_id = record.volume_id or os.urandom(16).hex()
        self.use_volume(volume_id)
        await self.keeper.begin(name, frozenset({self.keeper.me()}), wrote=True, volume_id=volume_id)
        await self.lead("no peer is configured: this node runs alone")

    async def _sync_idle(self) -> None:
        """Keep the number of descriptors with unsynced writes that nobody has open within bounds."""
        while True:
            await trio.sleep(_SYNC_INTERVAL_S)
            if not self.tree.table.is_crowded:
                continue
            versions = self.tree.table.unsynced_idle()
            try:
                await trio.to_thread.run_sync(self.tree.write_back)
            except OSError as error:
                if self.primary is not None:
                    self.primary.disk_failed(error)
                elif self.standby is not None:
                    await self.standby.sync_failed(error)
                continue
            self.tree.table.note_synced(versions)

    async def _housekeeping(self) -> None:
        while True:
            primary = self.primary
            if primary is None:
                await self.role_changed.wait()
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_house, primary, self.config.replication.checkpoint_interval_s)
                while self.primary is primary:
                    await self.role_changed.wait()
                nursery.cancel_scope.cancel()

    async def finish(self) -> None:
        """Let the peer have what is on the stream before the link ends."""
        primary = self.primary
        if primary is not None and primary.mode is Mode.MIRRORED and primary.stream is not None:
            primary.settle_all()
            with trio.move_on_after(self.config.replication.ack_timeout_s):
                await primary.stream.applied(primary.stream.sent)
