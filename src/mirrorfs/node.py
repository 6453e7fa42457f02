"""One node of a pair: one link at a time, one role at a time.

Roles: `waiting` (nobody may write here), leading (`Primary`), following (`Standby`). A role changes only here; each change is
durable before it shows.
"""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from mirrorfs import backing, session
from mirrorfs.config import Config
from mirrorfs.core import epochs, wire
from mirrorfs.core.epochs import Hello, Member, Standing
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import (
    JournalError,
    LinkLostError,
    MirrorfsError,
    ProtocolError,
)
from mirrorfs.fuse_ops import FuseOperations
from mirrorfs.keeper import Keeper
from mirrorfs.peer import Link, dial, greet, listen
from mirrorfs.promotion import Promotion
from mirrorfs.replication import Mode, Primary
from mirrorfs.resync import Target, empty_orphans
from mirrorfs.standby import Standby, record_in
from mirrorfs.tree import Tree, no_new_ids

log = logging.getLogger(__name__)

_SPACE_INTERVAL_S = 1.0
_MAX_SETBACK_S = 30.0
_SYNC_INTERVAL_S = 0.5


@dataclass(slots=True)
class NodeSpace:
    """Room on a file system, in bytes and files."""

    block_size: int
    total: int
    free: int
    available: int
    files: int
    files_free: int


class Node:
    """One node of a pair, from start to end."""

    def __init__(
        self,
        config: Config,
        under: backing.Backing,
        keeper: Keeper,
        nursery: trio.Nursery,
        *,
        discard_local_data: bool,
    ) -> None:
        self.config = config
        self.keeper = keeper
        self.tree = Tree(under.tree)
        self.primary: Primary | None = None
        self.standby: Standby | None = None
        self.reign = 0
        self.operations = FuseOperations(self.tree, self)
        self._under = under
        self.nursery = nursery
        self._discard = discard_local_data
        self.link: Link | None = None
        self.peer: Hello | None = None
        self.peer_joined = False
        self._peer_space: NodeSpace | None = None
        self.peer_lost_at = "the start of this node"
        self.reason = "just started"
        self.split_brain = ""
        self.since = time.time()
        self.refusal = ""
        self._setbacks = 0
        self._told: set[str] = set()
        self.promotion = Promotion(self)
        self.role_changed = trio.Event()
        self.verdict: epochs.Verdict | None = None
        volume = bytes.fromhex(keeper.record.volume_id)
        self._is_own_tree = not volume or self.tree.is_of(volume)
        if volume and self._is_own_tree:
            self.tree.set_volume(volume)

    # ---- small things

    def use_volume(self, volume_id: str) -> None:
        """The tree is of this volume from now on; noted in the tree before any record says so."""
        self.tree.set_volume(bytes.fromhex(volume_id))
        self._is_own_tree = True

    def _enter(self, reason: str) -> None:
        """A role has begun or ended."""
        self.reason = reason
        self.since = time.time()
        log.info("%s: %s", self.state, reason)
        self._announce()

    def _announce(self) -> None:
        self.role_changed.set()
        self.role_changed = trio.Event()

    @property
    def connected(self) -> bool:
        """Whether the other node is connected, as far as this one knows."""
        return self.link is not None and self.link.failure is None

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            if len(self._told) > 100:
                self._told.clear()
            self._told.add(text)
            log.warning("%s", text)

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

    def space(self) -> NodeSpace:
        """The smaller of both nodes."""
        own = self._own_space()
        peer = self._peer_space
        if peer is None or self.primary is None or self.primary.mode is not Mode.MIRRORED:
            return own
        return NodeSpace(
            own.block_size,
            min(own.total, peer.total),
            min(own.free, peer.free),
            min(own.available, peer.available),
            min(own.files, peer.files),
            min(own.files_free, peer.files_free),
        )

    def _own_space(self) -> NodeSpace:
        s = self.tree.statvfs()
        return NodeSpace(
            s.f_frsize, s.f_blocks * s.f_frsize, s.f_bfree * s.f_frsize, s.f_bavail * s.f_frsize, s.f_files, s.f_ffree
        )

    def new_id(self) -> int:
        """The id of a file that an application makes."""
        return self.keeper.new_id()

    def _found_id(self) -> int:
        """The id for a file that has none; while mirrored there is no such file, unless somebody made it underneath."""
        if self.primary is not None and self.primary.mode is Mode.MIRRORED:
            self._tell_once(
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
        await session.invalidate(self.tree.table.all())
        primary = Primary(
            self.tree,
            self.keeper,
            freeze_on_loss=self.config.replication.on_peer_loss == "freeze",
            freeze_timeout_s=self.config.replication.freeze_timeout_s,
            disk_failed=self._on_disk_failure,
        )
        if mirror_to is not None:
            primary.mirror_to(mirror_to)
        await self.keeper.reserve_ahead()
        self.standby = None
        self.reign += 1
        self.primary = primary
        self._enter(reason)

    async def stop_leading(self, reason: str) -> None:
        """Not the primary any more, as the record already says; changes that wait are refused, the kernel forgets all."""
        primary, self.primary = self.primary, None
        self.tree.new_id = no_new_ids
        if primary is not None:
            primary.retire()
        self._enter(reason)
        await session.invalidate(self.tree.table.all())

    def _on_disk_failure(self, error: OSError) -> None:
        self.nursery.start_soon(self._leave_after_disk_failure, f"the disk of this node failed: {error.strerror}")

    async def _leave_after_disk_failure(self, text: str) -> None:
        """A sync failed here: this node must not be a source while the other is whole."""
        log.error("%s", text)
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

    def _hello(self) -> Hello:
        return Hello(
            volume=self.config.volume,
            node=self.config.node.name,
            boot=self.keeper.boot,
            record=self.keeper.record,
            serving=self.primary is not None,
            empty=self.tree.is_empty,
            discard_local_data=self._discard,
        )

    async def _visit(self, connection: socket.socket, host: str) -> None:
        """Serve one connection from greeting to end."""
        mine = self._hello()
        try:
            content, decoder = await greet(connection, epochs.pack_hello(mine))
            theirs = self._recognised(content)
            verdict = epochs.meet(mine, theirs)
        except (ProtocolError, LinkLostError) as error:
            self._tell_once(f"{host}: connection refused: {error}")
            return
        if isinstance(verdict, epochs.Refuse):
            self._refuse(f"{host}: connection refused: {verdict.reason}", verdict.reason)
            await trio.sleep(1)
            return
        if self.link is not None:
            self._tell_once(f"{host}: connection refused: {theirs.node} is connected already")
            return
        if mine != self._hello() or self.promotion.lock.locked():
            return  # something changed during the greeting, or is about to: greet again
        link = Link(
            connection,
            decoder,
            ack_timeout_s=self.config.replication.ack_timeout_s,
            stall_timeout_s=self.config.replication.stall_timeout_s,
        )
        self.link, self.peer, self.verdict = link, theirs, verdict
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                await self._guarded(link, self._converse, link, verdict, mine, nursery)
                nursery.cancel_scope.cancel()
        finally:
            link.close()
            with trio.CancelScope(shield=True):
                await self._link_ended(str(link.failure))

    def _refuse(self, text: str, reason: str) -> None:
        self._tell_once(text)
        if self.primary is None and self.link is None:
            self.reason = reason

    async def _guarded(self, link: Link, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a task of a link: whatever goes wrong in it ends the link, not the daemon."""
        try:
            await task(*arguments)
        except LinkLostError as error:
            link.close(str(error))
        except MirrorfsError as error:
            log.error("%s: the connection is ended: %s", self.peer_name, error)
            link.close(str(error))
        except OSError as error:
            log.error("%s: the connection is ended: %s", self.peer_name, error)
            link.close(error.strerror or str(error))
        except Exception as error:
            # Well formed, and it makes no sense; or a defect here, which must not end the mount either.
            log.exception("%s: the connection is ended: what it sent makes no sense", self.peer_name)
            link.close(f"a message that makes no sense: {error!r}")

    def _recognised(self, content: dict[str, Any]) -> Hello:
        try:
            hello = epochs.unpack_hello(content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"a malformed HELLO: {error!r}") from error
        peer = self.config.peer
        if hello.volume == self.config.volume and hello.node not in (self.config.node.name, peer.name if peer else ""):
            raise ProtocolError(f"it says that it is {hello.node!r}, which is no node of {self.config.file}")
        return hello

    async def _link_ended(self, reason: str) -> None:
        self.link, self._peer_space, self.verdict = None, None, None
        self.peer_joined = False
        self.peer_lost_at = time.strftime("%Y-%m-%d %H:%M:%S")
        primary = self.primary
        if primary is not None:
            before = primary.mode
            with contextlib.suppress(JournalError):  # then the daemon ends, as `Keeper.failed` had it
                await primary.peer_lost(reason)
            if self.primary is primary and before is not primary.mode:
                self._enter(f"{self.peer_name} was lost: {reason}")
        elif self.standby is not None:
            failure, self.standby = self.standby.failure, None
            self._setbacks += bool(failure)
            self._enter(f"out of sync: {failure}" if failure else f"the primary was lost: {reason}")

    async def _converse(self, link: Link, verdict: epochs.Verdict, mine: Hello, nursery: trio.Nursery) -> None:
        theirs = self.peer
        assert theirs is not None
        match verdict:
            case epochs.Wait(reason):
                if self.primary is None:
                    self.reason = reason
                self._tell_once(reason)
            case epochs.SplitBrain(reason, stops):
                await self._split(reason, stops)
            case epochs.Resume(primary, reason):
                self.split_brain = ""
                if primary == self.config.node.name:
                    await self._source(link, theirs)
                elif self.primary is not None:
                    if mine != self._hello():
                        return  # something was acknowledged here since: greet again
                    await self.stop_leading(reason)
                else:
                    self.reason = f"waiting for {primary}: {reason}"
            case epochs.Refuse():
                raise AssertionError("refused before")
        nursery.start_soon(self._guarded, link, self._send_space, link)
        while True:
            for frame in await link.receive():
                await self._on_frame(frame, link, nursery)
            if self.standby is not None:
                self.standby.acknowledge()
            await trio.lowlevel.checkpoint()

    async def _split(self, reason: str, stops: str) -> None:
        text = f"split brain: {reason}; neither side's data is touched"
        self.split_brain = text
        self._tell_once(text)
        if self.primary is not None and stops == self.config.node.name and self.peer is not None and self.peer.serving:
            await self.stop_leading(text)
        self.reason = text

    async def _source(self, link: Link, theirs: Hello) -> None:
        """Ask the other node to follow: it durably gives up what it was before this node serves or copies anything."""
        async with self.promotion.lock:
            epoch = self.keeper.record.epoch
            assert epoch is not None
            if self.primary is not None and epoch.has(theirs.node):
                await self.keeper.begin(self.config.node.name, frozenset({self.keeper.me()}), wrote=self.keeper.wrote_alone)
        link.streams += 1
        link.send_message(Kind.FOLLOW, epochs.pack_record(self.keeper.record))

    async def _copy(self, link: Link, theirs: Hello) -> None:
        """The other node follows: serve if nobody does, and bring it to the same tree."""
        async with self.promotion.lock:
            if not (isinstance(self.verdict, epochs.Resume) and self.verdict.primary == self.config.node.name):
                raise ProtocolError("FOLLOWING from a node that was not asked to follow")
            if self.primary is None:
                await self.keeper.begin(self.config.node.name, frozenset({self.keeper.me()}), wrote=self.keeper.wrote_alone)
                await self.lead(self.verdict.reason)
            primary = self.primary
        if primary is None:
            return
        started = time.monotonic()
        log.info("bringing %s in sync", theirs.node)
        copier = await primary.begin_copy(link)
        await copier.run()
        if not await primary.join(Member(theirs.node, theirs.boot)):
            return
        link.send_message(Kind.JOIN, epochs.pack_record(self.keeper.record))
        log.info(
            "%s: %d files, %d bytes copied in %.1f s",
            theirs.node,
            copier.files_done,
            copier.bytes_done,
            time.monotonic() - started,
        )

    async def _send_space(self, link: Link) -> None:
        while True:
            s = self._own_space()
            link.send_message(Kind.SPACE, [s.block_size, s.total, s.free, s.available, s.files, s.files_free])
            await trio.sleep(_SPACE_INTERVAL_S)

    async def _on_frame(self, frame: Frame, link: Link, nursery: trio.Nursery) -> None:
        if self.standby is not None and self.standby.handles(frame):
            await self.standby.take(frame)
            return
        if self.primary is not None and self.primary.on_frame(frame):
            return
        match frame.kind:
            case Kind.SPACE:
                self._peer_space = NodeSpace(*wire.message(frame))
            case Kind.ACK | Kind.FLUSHED:
                pass  # of a reign that has ended
            case Kind.FOLLOW:
                nursery.start_soon(self._guarded, link, self._follow, record_in(frame), link, nursery)
            case Kind.FOLLOWING:
                assert self.peer is not None
                nursery.start_soon(self._guarded, link, self._copy, link, self.peer)
            case Kind.JOIN:
                if self.standby is None:
                    raise ProtocolError("JOIN for a node that does not follow")
                await self.standby.join(record_in(frame))
                self._setbacks = 0
                self._enter(f"in sync with {self.peer_name}")
            case Kind.JOINED:
                self.peer_joined = True
                self._enter(f"{self.peer_name} is in sync")
            case Kind.HANDOVER_WANTED:
                self.nursery.start_soon(self.promotion.hand_over_when_asked)
            case Kind.HANDOVER:
                await self.promotion.take_over(record_in(frame), link)
            case Kind.FAILED:
                log.error("%s is out of sync: %s", self.peer_name, wire.message(frame))
            case Kind.REFUSED:
                self.refusal = str(wire.message(frame))
                log.warning("%s: %s", self.peer_name, self.refusal)
                self._announce()
            case _:
                raise ProtocolError(f"{frame.kind.name} where it means nothing")

    @property
    def peer_name(self) -> str:
        """The other node, for a sentence."""
        return self.peer.node if self.peer else "the other node"

    async def _follow(self, theirs: epochs.Record, link: Link, nursery: trio.Nursery) -> None:
        """Become a copy of the other node; after failures, such as a full disk, not at once."""
        if self._setbacks:
            delay_s = min(0.5 * 2**self._setbacks, _MAX_SETBACK_S)
            self.reason = f"{self.reason}; the copy is tried again in {delay_s:g} s"
            await trio.sleep(delay_s)
        async with self.promotion.lock:
            if self.primary is not None:
                raise ProtocolError("FOLLOW for a node that is the primary")
            await self._become_target(theirs, link, nursery)
        link.send_message(Kind.FOLLOWING)

    async def _become_target(self, theirs: epochs.Record, link: Link, nursery: trio.Nursery) -> None:
        mine = self.keeper.record
        if any(epoch.tag in mine.wrote and not theirs.knows(epoch) for epoch in mine.epochs):
            raise ProtocolError("FOLLOW for a node that acknowledged changes which the other does not know of")
        link.streams += 1
        self.use_volume(theirs.volume_id)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        await self.keeper.adopt(theirs, Standing.RESYNCING, f"a copy from {self.peer_name} began at {since}")
        self._discard = False
        await trio.to_thread.run_sync(empty_orphans, self._under.orphans)
        self.tree.table.begin_era()
        self.tree.table.close_idle()
        await session.invalidate(self.tree.table.all())
        self.standby = Standby(
            self.tree,
            self.keeper,
            link,
            nursery,
            target=Target(self.tree, self._under.orphans),
            before_first=trio.lowlevel.checkpoint,
        )
        self._enter(f"copying from {self.peer_name}")

    # ---- from start to end

    async def begin(self, nursery: trio.Nursery) -> None:
        """Look for the other node, or run alone where none is configured; MirrorfsError if the tree is not the record's."""
        peer, own = self.config.peer, self.config.node
        await self._check_tree()
        nursery.start_soon(self._housekeeping)
        nursery.start_soon(self._sync_idle)
        if peer is None:
            await self._begin_alone()
        elif own.name < peer.name:
            await nursery.start(listen, own.address, own.port, self._visit)
        else:
            nursery.start_soon(dial, own.address, peer.address, peer.port, self._visit)

    async def _check_tree(self) -> None:
        """The record must be this tree's: an empty disk, or one that is not mounted, must never become the source."""
        if self._is_own_tree:
            return
        if not self._discard:
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
            self._enter(decision.reason)
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
                await trio.to_thread.run_sync(self.tree.syncfs)
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
                nursery.start_soon(primary.run)
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
