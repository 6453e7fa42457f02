"""The composition root of `mirrorfs mount`: one mount, one link at a time, one role at a time.

Roles: `waiting` (nobody may write here), leading (`Primary`), following (`Standby`). A role changes only here; each change is
durable before it shows.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from mirrorfs import backing, control, session
from mirrorfs.config import Config
from mirrorfs.core import epochs, ids, wire
from mirrorfs.core.epochs import Hello, Member, Standing
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import (
    ConfirmationNeededError,
    LinkLostError,
    MirrorfsError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from mirrorfs.fuse_ops import FuseOperations
from mirrorfs.journal import Journal
from mirrorfs.keeper import Keeper
from mirrorfs.peer import Link, dial, greet, listen
from mirrorfs.replication import Mode, Primary
from mirrorfs.resync import Target, empty_orphans
from mirrorfs.standby import Standby, record_in
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_HANDOVER_S = 10.0
_SPACE_INTERVAL_S = 1.0


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

    def __init__(self, config: Config, under: backing.Backing, keeper: Keeper, *, discard_local_data: bool) -> None:
        self.config = config
        self.keeper = keeper
        self.tree = Tree(under.tree)
        self.primary: Primary | None = None
        self.standby: Standby | None = None
        self.reign = 0
        self.operations = FuseOperations(self.tree, self)
        self._under = under
        self._discard = discard_local_data
        self._link: Link | None = None
        self._peer: Hello | None = None
        self._peer_joined = False
        self._peer_space: NodeSpace | None = None
        self._peer_lost_at = "the start of this node"
        self._reason = "just started"
        self._split_brain = ""
        self._since = time.time()
        self._told: set[str] = set()
        self._promoting = trio.Lock()
        self._role_changed = trio.Event()
        self._stop = trio.Event()
        if keeper.record.volume_id:
            self._use_volume(keeper.record.volume_id)

    # ---- small things

    def _use_volume(self, volume_id: str) -> None:
        self.tree.set_volume(bytes.fromhex(volume_id))
        self.tree.stamp(self._under.tree, os.fstat(self._under.tree).st_ino, ids.ROOT)

    def _enter(self, reason: str) -> None:
        """A role has begun or ended."""
        self._reason = reason
        self._since = time.time()
        log.info("%s: %s", self.state, reason)
        self._role_changed.set()
        self._role_changed = trio.Event()

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
            return "primary" if self.primary.mode is Mode.MIRRORED else "solo"
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
            raise OSError(5, os.strerror(5))
        return self.keeper.new_id()

    # ---- roles

    async def _lead(self, reason: str, *, mirror_to: Link | None = None) -> None:
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

    async def _stop_leading(self, reason: str) -> None:
        """Not the primary any more, as the record already says; changes that wait are refused, the kernel forgets all."""
        primary, self.primary = self.primary, None
        self.tree.new_id = lambda: None
        if primary is not None:
            primary.enter(Mode.ENDED)
        self._enter(reason)
        await session.invalidate(self.tree.table.all())

    async def _disk_failed(self, error: OSError) -> None:
        """A sync failed here: this node must not be a source while the other is whole."""
        text = f"the disk of this node failed: {error.strerror}"
        log.error("%s", text)
        await self.keeper.stand(Standing.OUTDATED, text)
        if self._link is not None and self._peer_joined:
            with contextlib.suppress(MirrorfsError):
                await self._hand_over(without_me=True)
                return
        await self._stop_leading(text)

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
        if self._link is not None:
            self._tell_once(f"{host}: connection refused: {theirs.node} is connected already")
            return
        if mine != self._hello():
            return  # something changed during the greeting: greet again
        link = Link(
            connection,
            decoder,
            ack_timeout_s=self.config.replication.ack_timeout_s,
            stall_timeout_s=self.config.replication.stall_timeout_s,
        )
        self._link, self._peer = link, theirs
        reason = "this node closed the connection"
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                try:
                    await self._converse(link, verdict, theirs, nursery)
                except (LinkLostError, ProtocolError) as error:
                    reason = str(error)
                nursery.cancel_scope.cancel()
        finally:
            link.close()
            with trio.CancelScope(shield=True):
                await self._link_ended(reason)

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
        peer, self._link, self._peer_space = self._peer, None, None
        self._peer_joined = False
        self._peer_lost_at = time.strftime("%Y-%m-%d %H:%M:%S")
        if self.primary is not None:
            before = self.primary.mode
            await self.primary.peer_lost(reason)
            if before is not self.primary.mode:
                self._enter(f"{peer.node if peer else 'the peer'} was lost: {reason}")
        elif self.standby is not None:
            self.standby = None
            self._enter(f"the primary was lost: {reason}")

    async def _converse(self, link: Link, verdict: epochs.Verdict, theirs: Hello, nursery: trio.Nursery) -> None:
        match verdict:
            case epochs.Refuse(reason):
                self._tell_once(f"{theirs.node}: {reason}")
                if self.primary is None:
                    self._reason = reason
                await trio.sleep(1)
                return
            case epochs.Wait(reason):
                if self.primary is None:
                    self._reason = reason
                self._tell_once(reason)
            case epochs.SplitBrain(reason, stops):
                await self._split(reason, stops)
            case epochs.Resume(primary, reason):
                self._split_brain = ""
                if primary == self.config.node.name:
                    await self._source(link, theirs, reason, nursery)
                elif self.primary is not None:
                    # Nothing was acknowledged in this node's own epoch; the hello that said so is still true.
                    await self._stop_leading(reason)
                else:
                    self._reason = f"waiting for {primary}: {reason}"
        nursery.start_soon(self._send_space, link)
        while True:
            for frame in await link.receive():
                await self._on_frame(frame, link, nursery)
            if self.standby is not None:
                self.standby.acknowledge()
            await trio.lowlevel.checkpoint()

    async def _split(self, reason: str, stops: str) -> None:
        text = f"split brain: {reason}; neither side's data is touched"
        self._split_brain = text
        self._tell_once(text)
        if self.primary is not None and stops == self.config.node.name:
            await self._stop_leading(text)
        self._reason = text

    async def _source(self, link: Link, theirs: Hello, reason: str, nursery: trio.Nursery) -> None:
        """Bring the other node to the same tree and let it follow."""
        if self.primary is None:
            record = self.keeper.record
            await self.keeper.begin(self.config.node.name, frozenset({self.keeper.me()}), wrote=self.keeper.wrote_alone)
            assert record.volume_id
            await self._lead(reason)
        else:
            epoch = self.keeper.record.epoch
            assert epoch is not None
            if epoch.has(theirs.node):
                await self.keeper.begin(self.config.node.name, frozenset({self.keeper.me()}), wrote=self.keeper.wrote_alone)
        link.send_message(Kind.FOLLOW, epochs.pack_record(self.keeper.record))

    async def _copy(self, link: Link, theirs: Hello) -> None:
        primary = self.primary
        if primary is None:
            return
        started = time.monotonic()
        log.info("bringing %s in sync", theirs.node)
        copier = await primary.begin_copy(link)
        try:
            await copier.run()
            if not await primary.join(Member(theirs.node, theirs.boot)):
                return
        except OSError as error:
            log.error("cannot copy to %s: %s", theirs.node, error.strerror)
            link.close(f"the copy failed: {error.strerror}")
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
                await self._follow(record_in(frame), link, nursery)
            case Kind.FOLLOWING:
                assert self._peer is not None
                nursery.start_soon(self._copy, link, self._peer)
            case Kind.JOIN:
                if self.standby is None:
                    raise ProtocolError("JOIN for a node that does not follow")
                await self.standby.join(record_in(frame))
                self._enter(f"in sync with {self._peer_name()}")
            case Kind.JOINED:
                self._peer_joined = True
                self._enter(f"{self._peer_name()} is in sync")
            case Kind.HANDOVER_WANTED:
                nursery.start_soon(self._hand_over_when_asked)
            case Kind.HANDOVER:
                await self._take_over(record_in(frame), link)
            case Kind.FAILED:
                log.error("%s is out of sync: %s", self._peer_name(), wire.message(frame))
            case Kind.REFUSED:
                log.warning("%s: %s", self._peer_name(), wire.message(frame))
            case _:
                raise ProtocolError(f"{frame.kind.name} where it means nothing")

    def _peer_name(self) -> str:
        return self._peer.node if self._peer else "the other node"

    async def _follow(self, theirs: epochs.Record, link: Link, nursery: trio.Nursery) -> None:
        """Become a copy of the other node."""
        if self.primary is not None:
            raise ProtocolError("FOLLOW for a node that is the primary")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        await self.keeper.adopt(theirs, Standing.RESYNCING, f"a copy from {self._peer_name()} began at {since}")
        self._discard = False
        self._use_volume(theirs.volume_id)
        await trio.to_thread.run_sync(empty_orphans, self._under.orphans)
        for known in self.tree.table.all():
            known.pinned = False
        await session.invalidate(self.tree.table.all())
        self.standby = Standby(
            self.tree,
            self.keeper,
            link,
            nursery,
            target=Target(self.tree, self._under.orphans),
            before_first=trio.lowlevel.checkpoint,
        )
        self._enter(f"copying from {self._peer_name()}")
        link.send_message(Kind.FOLLOWING)

    # ---- moving the role

    async def _hand_over_when_asked(self) -> None:
        try:
            await self._hand_over()
        except MirrorfsError as error:
            log.warning("not handed over: %s", error)
            if self._link is not None:
                self._link.send_message(Kind.REFUSED, str(error))

    async def _hand_over(self, *, without_me: bool = False) -> None:
        """Give the role to the in-sync peer: drained, durable, told. Afterwards this node follows."""
        async with self._promoting:
            primary, link, peer = self.primary, self._link, self._peer
            if primary is None or link is None or peer is None or primary.mode is not Mode.MIRRORED or not self._peer_joined:
                raise RefusedError("the other node is not in sync: nothing can be handed over")
            primary.loss = f"handing over to {peer.node}"
            if not await primary.drain():
                raise MirrorfsError(f"{peer.node} was lost while the stream was drained; this node goes on")
            members = {Member(peer.node, peer.boot)} | (set() if without_me else {self.keeper.me()})
            await self.keeper.begin(peer.node, frozenset(members))
            link.send_message(Kind.HANDOVER, epochs.pack_record(self.keeper.record))
            if primary.stream is not None:
                primary.stream.end()
            invalidated = trio.Event()
            self.standby = Standby(self.tree, self.keeper, link, self._nursery, target=None, before_first=invalidated.wait)
            for known in self.tree.table.all():
                known.pinned = False
            await self._stop_leading(f"handed over to {peer.node}")
            invalidated.set()

    async def _take_over(self, theirs: epochs.Record, link: Link) -> None:
        """The primary has handed over: its record names this node."""
        if self.standby is None or not self.standby.in_sync:
            raise ProtocolError("HANDOVER to a node that is not in sync")
        self.standby.acknowledge()
        await self.keeper.adopt(theirs, Standing.IN_SYNC, "")
        for known in self.tree.table.all():
            known.pinned = False
        epoch = self.keeper.record.epoch
        assert epoch is not None
        assert self._peer is not None
        self._peer_joined = epoch.has(self._peer.node)
        await self._lead(f"taken over from {self._peer.node}", mirror_to=link if self._peer_joined else None)

    async def promote(self, *, yes: bool, force: bool) -> str:
        """Become the primary on an operator's word; returns what was done, or raises what stands against it."""
        name, peer = self.config.node.name, self.config.peer
        if self.primary is not None:
            return f"{name} is the primary already"
        if self.standby is not None and self._link is not None:
            return await self._ask_for_handover(force=force)
        async with self._promoting:
            decision = epochs.may_promote(
                self.keeper.record,
                name,
                self.keeper.boot,
                peer=peer.name if peer else None,
                peer_seen=self._link is not None and not self._split_brain,
                lost_at=self._peer_lost_at,
            )
            forced = False
            if isinstance(decision, epochs.Forbidden):
                if not force:
                    raise RefusedError(f"{decision.reason} (--force promotes all the same)")
                forced = True
            elif isinstance(decision, epochs.AskFirst) and not (yes or force):
                raise ConfirmationNeededError(f"{decision.reason} (--yes promotes)")
            elif self._split_brain and not (yes or force):
                raise ConfirmationNeededError(f"{self._split_brain}; --yes goes on with this node's history")
            if self._peer is not None and self._link is not None and self._peer.serving:
                raise MirrorfsError(f"{self._peer.node} is the primary: run `mirrorfs demote` there first")
            new = self.keeper.record.epoch is None
            await self.keeper.begin(
                name,
                frozenset({self.keeper.me()}),
                forced=forced,
                wrote=peer is not None,
                volume_id=os.urandom(16).hex(),
            )
            await self._lead("promoted by hand" if not forced else "promoted by force")
            if self._link is not None:
                self._link.close("promoted: greeting again")
        epoch = self.keeper.record.epoch
        assert epoch is not None
        return f"{name} is the primary in epoch {epoch.number}" + (" of a new volume" if new else "")

    async def _ask_for_handover(self, *, force: bool) -> str:
        standby, link = self.standby, self._link
        assert standby is not None
        assert link is not None
        if not standby.in_sync:
            raise RefusedError(
                f"this node is being resynced ({self.keeper.record.reason}) and {self._peer_name()} is the primary: wait until it "
                "is in sync" + ("; to promote it by force, stop the primary first" if force else "")
            )
        link.send_message(Kind.HANDOVER_WANTED)
        with trio.move_on_after(_HANDOVER_S):
            while self.primary is None and self._link is link:
                await self._role_changed.wait()
            if self.primary is not None:
                return f"{self.config.node.name} is the primary, taken over from {self._peer_name()}"
            raise MirrorfsError("the primary was lost during the handover: look at `mirrorfs status` and promote again")
        raise MirrorfsError(f"{self._peer_name()} did not hand over within {_HANDOVER_S:g} s; see its log")

    async def demote(self, *, force: bool) -> str:
        """Give the primary's role up: to an in-sync peer, or with `force` to nobody."""
        if self.primary is None:
            return f"{self.config.node.name} is not the primary"
        if self._peer_joined and self.primary.mode is Mode.MIRRORED:
            await self._hand_over()
            return f"handed over to {self._peer_name()}"
        if not force:
            raise RefusedError("no other node is in sync, so nobody could take over (--force stops writes all the same)")
        await self._stop_leading("demoted by hand: `mirrorfs promote --yes` makes it the primary again")
        if self._link is not None:
            self._link.close("demoted: greeting again")
        return f"{self.config.node.name} is waiting"

    # ---- what the commands ask

    async def on_command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer a command from the control socket."""
        match command:
            case "status":
                return self.status()
            case "promote":
                return {"message": await self.promote(yes=bool(arguments.get("yes")), force=bool(arguments.get("force")))}
            case "demote":
                return {"message": await self.demote(force=bool(arguments.get("force")))}
            case "unmount":
                return {"message": await self.unmount()}
            case _:
                raise UsageError(f"this node does not know the command {command!r}: is it of another version?")

    def status(self) -> dict[str, Any]:
        """The node as it is now, for `mirrorfs status`."""
        epoch = self.keeper.record.epoch
        status: dict[str, Any] = {
            "volume": self.config.volume,
            "node": self.config.node.name,
            "state": self.state,
            "epoch": epoch.number if epoch else 0,
            "in_sync": self._in_sync_names(),
            "since": _iso(self._since),
            "reason": self._reason,
            "dirty_bytes": 0,
            "peer": self._peer_status(),
            "open_files": self.operations.open_files,
        }
        if self._split_brain:
            status["split_brain"] = self._split_brain
        if epoch is not None:
            status["epoch_tag"], status["primary"] = epoch.tag, epoch.primary
        primary = self.primary
        if primary is not None:
            status["settled"] = primary.settled
            if primary.copier is not None:
                copier = primary.copier
                status["dirty_bytes"] = max(copier.bytes_found - copier.bytes_done, 0)
                status["resync"] = {
                    "bytes_done": copier.bytes_done,
                    "bytes_total": max(copier.bytes_found, copier.bytes_done),
                    "files_done": copier.files_done,
                    "files_total": copier.files_found,
                }
        return status

    def _in_sync_names(self) -> list[str]:
        record = self.keeper.record
        if record.epoch is None or record.standing is not Standing.IN_SYNC:
            return (
                [] if record.epoch is None else sorted(m.node for m in record.epoch.in_sync if m.node != self.config.node.name)
            )
        return sorted(m.node for m in record.epoch.in_sync)

    def _peer_status(self) -> dict[str, Any]:
        if self.config.peer is None:
            return {"name": None, "state": "none"}
        state = "disconnected"
        if self._link is not None:
            state = "connected"
            if self.primary is not None:
                state = "standby" if self._peer_joined else "resyncing" if self.primary.copier is not None else "connected"
            elif self.standby is not None:
                state = "primary"
        return {"name": self.config.peer.name, "state": state}

    # ---- from start to end

    async def unmount(self) -> str:
        """End cleanly: nobody may have a file open."""
        path = self._path
        if self.primary is not None:
            self.primary.settle_all()
        try:
            await trio.to_thread.run_sync(backing.unmount, path)
        except OSError as error:
            raise MirrorfsError(
                f"{path}: cannot be unmounted: {error.strerror}: `fuser -m {path}` shows who uses it"
            ) from error
        self._stop.set()
        return f"{path} is unmounted"

    async def run(self, path: Path) -> None:
        """Mount, serve until unmounted or told to stop."""
        self._path = path
        session.mount(self.operations, path, self.config.volume)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._serve_mount)
                await nursery.start(control.serve, self.config.node.control, self.on_command)
                nursery.start_soon(self._stop_on_signal)
                nursery.start_soon(self._housekeeping)
                await self._begin(nursery)
                _notify_systemd("READY=1")
                await self._stop.wait()
                await self._finish()
                nursery.cancel_scope.cancel()
        finally:
            session.close()
            with contextlib.suppress(OSError):
                backing.detach_mount(path) if os.path.ismount(path) else None

    async def _serve_mount(self) -> None:
        await session.serve()
        self._stop.set()

    async def _begin(self, nursery: trio.Nursery) -> None:
        peer, own = self.config.peer, self.config.node
        if peer is None:
            await self._begin_alone()
        elif own.name < peer.name:
            await nursery.start(listen, own.address, own.port, self._visit)
        else:
            nursery.start_soon(dial, own.address, peer.address, peer.port, self._visit)

    async def _begin_alone(self) -> None:
        record = self.keeper.record
        if record.standing is not Standing.IN_SYNC:
            self._reason = f"this node is {record.standing.value}: {record.reason}"
            return
        await self.keeper.begin(
            self.config.node.name,
            frozenset({self.keeper.me()}),
            wrote=True,
            volume_id=os.urandom(16).hex(),
        )
        await self._lead("no peer is configured: this node runs alone")

    async def _housekeeping(self) -> None:
        while True:
            primary = self.primary
            if primary is None:
                await self._role_changed.wait()
                continue
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(primary.run)
                    while self.primary is primary:
                        await self._role_changed.wait()
                    scope.cancel()

    async def _stop_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                log.info("asked to stop")
                await trio.to_thread.run_sync(backing.detach_mount, self._path)
                self._stop.set()

    async def _finish(self) -> None:
        """Let the peer have what is on the stream before the link ends."""
        primary = self.primary
        if primary is not None and primary.mode is Mode.MIRRORED and primary.stream is not None:
            primary.settle_all()
            with trio.move_on_after(self.config.replication.ack_timeout_s):
                await primary.stream.applied(primary.stream.sent)


def _iso(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(unix_s))


def _notify_systemd(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


async def run(config: Config, path: Path, *, discard_local_data: bool) -> None:
    """`mirrorfs mount`: everything from the lock to the unmount. Raises MirrorfsError for what a person can mend."""
    os.umask(0)
    path = path.absolute()
    state = config.node.state_dir
    if path == state or path in state.parents:
        raise MirrorfsError(
            f"{config.file}: nodes.{config.node.name}.state_dir: {state} lies on the mount {path}: put it elsewhere"
        )
    under = backing.adopt(path, config.node.backing)
    try:
        names = sorted(n.name for n in (config.node, config.peer) if n is not None)
        keeper = Keeper(Journal(state), config.node.name, names.index(config.node.name))
        await Node(config, under, keeper, discard_local_data=discard_local_data).run(path)
    finally:
        under.close()
