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
from mirrorfs.core import epochs, ids, wire
from mirrorfs.core.epochs import Hello, Member, Standing
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import (
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
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_SPACE_INTERVAL_S = 1.0
_MAX_SETBACK_S = 30.0


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
        if keeper.record.volume_id:
            self._use_volume(keeper.record.volume_id)

    # ---- small things

    def _use_volume(self, volume_id: str) -> None:
        self.tree.set_volume(bytes.fromhex(volume_id))
        self.tree.stamp(self._under.tree, os.fstat(self._under.tree).st_ino, ids.ROOT)

    def _enter(self, reason: str) -> None:
        """A role has begun or ended."""
        self.reason = reason
        self.since = time.time()
        log.info("%s: %s", self.state, reason)
        self._announce()

    def _announce(self) -> None:
        self.role_changed.set()
        self.role_changed = trio.Event()

    def unpin_all(self) -> None:
        """On a new stream no file counts as introduced."""
        for known in self.tree.table.all():
            known.pinned = False
            self.tree.table.drop_unused(known)

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
        self._use_volume(self.keeper.record.volume_id)
        await session.invalidate(self.tree.table.all())
        primary = Primary(
            self.tree,
            self.keeper,
            freeze_on_loss=self.config.replication.on_peer_loss == "freeze",
            freeze_timeout_s=self.config.replication.freeze_timeout_s,
            disk_failed=self._disk_failed,
        )
        if mirror_to is not None:
            primary.mirror_to(mirror_to)
        await self.keeper.reserve_ahead()
        self.tree.new_id = self._found_id
        self.standby = None
        self.reign += 1
        self.primary = primary
        self._enter(reason)

    async def stop_leading(self, reason: str) -> None:
        """Not the primary any more, as the record already says; changes that wait are refused, the kernel forgets all."""
        primary, self.primary = self.primary, None
        self.tree.new_id = lambda: None
        if primary is not None:
            primary.enter(Mode.ENDED)
        self._enter(reason)
        await session.invalidate(self.tree.table.all())

    async def _disk_failed(self, error: OSError) -> None:
        """A sync failed here: this node must not be a source while the other is whole."""
        if self.primary is None:
            return
        text = f"the disk of this node failed: {error.strerror}"
        log.error("%s", text)
        await self.keeper.stand(Standing.OUTDATED, text)
        with contextlib.suppress(MirrorfsError):
            await self.promotion.hand_over(disk_failure=text)
            return
        await self.stop_leading(text)

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
        if self.link is not None:
            why = verdict.reason if isinstance(verdict, epochs.Refuse) else f"{theirs.node} is connected already"
            self._tell_once(f"{host}: connection refused: {why}")
            return
        if mine != self._hello():
            return  # something changed during the greeting: greet again
        link = Link(
            connection,
            decoder,
            ack_timeout_s=self.config.replication.ack_timeout_s,
            stall_timeout_s=self.config.replication.stall_timeout_s,
        )
        self.link, self.peer = link, theirs
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                await self._guarded(link, self._converse, link, verdict, mine, nursery)
                nursery.cancel_scope.cancel()
        finally:
            link.close()
            with trio.CancelScope(shield=True):
                await self._link_ended(str(link.failure))

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
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            # Well formed, and it makes no sense; or a defect here, which must not end the mount either.
            log.exception("%s: the connection is ended: what it sent makes no sense", self.peer_name)
            link.close(f"a message that makes no sense: {error!r}")

    def _recognised(self, content: dict[str, Any]) -> Hello:
        try:
            hello = epochs.unpack_hello(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a malformed HELLO: {error!r}") from error
        peer = self.config.peer
        if hello.volume == self.config.volume and hello.node not in (self.config.node.name, peer.name if peer else ""):
            raise ProtocolError(f"it says that it is {hello.node!r}, which is no node of {self.config.file}")
        return hello

    async def _link_ended(self, reason: str) -> None:
        peer, self.link, self._peer_space = self.peer, None, None
        self.peer_joined = False
        self.peer_lost_at = time.strftime("%Y-%m-%d %H:%M:%S")
        if self.primary is not None:
            before = self.primary.mode
            await self.primary.peer_lost(reason)
            if before is not self.primary.mode:
                self._enter(f"{peer.node if peer else 'the peer'} was lost: {reason}")
        elif self.standby is not None:
            failure, self.standby = self.standby.failure, None
            self._setbacks += bool(failure)
            self._enter(f"out of sync: {failure}" if failure else f"the primary was lost: {reason}")

    async def _converse(self, link: Link, verdict: epochs.Verdict, mine: Hello, nursery: trio.Nursery) -> None:
        theirs = self.peer
        assert theirs is not None
        match verdict:
            case epochs.Refuse(reason):
                self._tell_once(f"{theirs.node}: {reason}")
                if self.primary is None:
                    self.reason = reason
                await trio.sleep(1)
                return
            case epochs.Wait(reason):
                if self.primary is None:
                    self.reason = reason
                self._tell_once(reason)
            case epochs.SplitBrain(reason, stops):
                await self._split(reason, stops)
            case epochs.Resume(primary, reason):
                self.split_brain = ""
                if primary == self.config.node.name:
                    await self._source(link, theirs, reason)
                elif self.primary is not None:
                    if mine != self._hello():
                        return  # something was acknowledged here since: greet again
                    await self.stop_leading(reason)
                else:
                    self.reason = f"waiting for {primary}: {reason}"
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
        if self.primary is not None and stops == self.config.node.name:
            await self.stop_leading(text)
        self.reason = text

    async def _source(self, link: Link, theirs: Hello, reason: str) -> None:
        """Bring the other node to the same tree and let it follow."""
        async with self.promotion.lock:
            epoch = self.keeper.record.epoch
            assert epoch is not None
            if self.primary is None or epoch.has(theirs.node):
                await self.keeper.begin(self.config.node.name, frozenset({self.keeper.me()}), wrote=self.keeper.wrote_alone)
            if self.primary is None:
                await self.lead(reason)
        link.send_message(Kind.FOLLOW, epochs.pack_record(self.keeper.record))

    async def _copy(self, link: Link, theirs: Hello) -> None:
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
                nursery.start_soon(self.promotion.hand_over_when_asked)
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
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        await self.keeper.adopt(theirs, Standing.RESYNCING, f"a copy from {self.peer_name} began at {since}")
        self._discard = False
        self._use_volume(theirs.volume_id)
        await trio.to_thread.run_sync(empty_orphans, self._under.orphans)
        self.unpin_all()
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
        """Look for the other node, or run alone where none is configured."""
        peer, own = self.config.peer, self.config.node
        nursery.start_soon(self._housekeeping)
        if peer is None:
            await self._begin_alone()
        elif own.name < peer.name:
            await nursery.start(listen, own.address, own.port, self._visit)
        else:
            nursery.start_soon(dial, own.address, peer.address, peer.port, self._visit)

    async def _begin_alone(self) -> None:
        record = self.keeper.record
        if record.standing is not Standing.IN_SYNC:
            self._enter(f"this node is {record.standing.value}: {record.reason}")
            return
        await self.keeper.begin(
            self.config.node.name, frozenset({self.keeper.me()}), wrote=True, volume_id=os.urandom(16).hex()
        )
        await self.lead("no peer is configured: this node runs alone")

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
