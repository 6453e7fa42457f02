"""A node and its arbiter: asking for the next epoch when the other node is lost, and keeping the record there up to date.

While both nodes are in sync nothing depends on the arbiter. It is looked at every `_LOOK_S` all the same, so that `status` can
say that it is gone, and so that one that was set back is given the present epoch before it is needed.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs.arbiter import Arbiter, ArbiterUnreachableError, Etcd, Isolation, Reading
from mirrorfs.config import Config
from mirrorfs.core import claims
from mirrorfs.core import operations as ops
from mirrorfs.core.claims import Found
from mirrorfs.core.epochs import Epoch, Seen
from mirrorfs.core.modes import Mode
from mirrorfs.errors import ClaimLostError, JournalError, MirrorfsError, NoAnswerError, RefusedError
from mirrorfs.keeper import Keeper
from mirrorfs.replication import Primary

if TYPE_CHECKING:
    from mirrorfs.node import Node

log = logging.getLogger(__name__)

_LOOK_S: Final = 10.0
_RETRY_S: Final = 0.5
#: Somebody else's swap that came in between is looked at again; two nodes cannot do that for long.
_TRIES: Final = 8


@dataclass(frozen=True, slots=True)
class Grant:
    """An epoch that the arbiter granted this node alone: to be begun with this number and tag."""

    number: int
    tag: str
    seen: Seen


def arbiter_of(config: Config) -> Arbiter | None:
    """The arbiter that the configuration names, if it names one."""
    if config.arbiter.kind == "none" or config.peer is None:
        return None
    return Etcd(config.arbiter, f"{config.arbiter.prefix.rstrip('/')}/{config.volume}")


class Arbitration:
    """What one node has to do with its arbiter, or without one."""

    def __init__(self, node: "Node", keeper: Keeper, arbiter: Arbiter | None) -> None:
        self._node = node
        self._keeper = keeper
        self._arbiter = arbiter
        self._isolation = Isolation(check) if (check := node.config.arbiter.isolation_check) else None
        self._published = ""
        self._tag = ""
        self._replaced = -1
        self._looked = -_LOOK_S
        self._failure = ""
        self._since = time.time()
        self._asking = trio.Lock()

    @property
    def decides(self) -> bool:
        """Whether there is an arbiter."""
        return self._arbiter is not None

    @property
    def is_asked(self) -> bool:
        """Whether a primary that loses its peer has to ask before it goes on alone."""
        return self._arbiter is not None or self._isolation is not None

    async def stands_against(self, *, automatic: bool = False) -> str:
        """What would stand against going on alone now, asked without claiming anything; "" if nothing does."""
        if self._arbiter is None:
            if automatic:
                try:
                    await self._check_isolation()
                except NoAnswerError as error:
                    return str(error)
            return ""
        try:
            found = await self._read(self._arbiter)
        except NoAnswerError as error:
            return str(error)
        if self._keeper.record.epoch is None:
            return "" if found.epoch is None else f"the arbiter ({self._arbiter.name}) knows a volume of that name"
        match claims.to_go_on(self._keeper.record, found):
            case claims.Lost(reason) | claims.NoArbiter(reason):
                return reason
            case claims.Swap():
                return ""

    async def check_new(self, *, force: bool) -> None:
        """A volume is about to be made: RefusedError if the arbiter knows one of that name. With `force` it is to be replaced
        there."""
        if self._arbiter is None:
            return
        try:
            found = await self._read(self._arbiter)
        except NoAnswerError:
            return  # it is asked again when the record is published
        if found.epoch is None:
            return
        if not force:
            raise RefusedError(
                f"the arbiter ({self._arbiter.name}) knows a volume of that name, which {found.epoch.primary} led last, and "
                "this node has nothing of it; --force makes a new one in its place"
            )
        self._replaced = found.seen.key_revision

    # ---- when the other node is lost

    def begin_anew(self) -> None:
        """This node follows, and its tags without an answer count as the other one's from now on: it must not ask with them."""
        self._tag, self._replaced = "", -1

    async def claim(self, *, force: bool = False, wanted: Callable[[], bool] = lambda: True) -> Grant | None:
        """Ask for an epoch of this node alone, as long as it is `wanted`. None where there is nobody to ask, and nothing stands
        against it.

        ClaimLostError if the other node went on; NoAnswerError if nobody knows: this node must not go on, and may ask again.
        """
        if self._arbiter is None:
            await self._check_isolation()
            return None
        async with self._asking:
            try:
                grant = await self._claim(self._arbiter, force=force, wanted=wanted)
            except NoAnswerError as error:
                self._note_failure(str(error))
                raise
            self._note_success()
            return grant

    async def _claim(self, arbiter: Arbiter, *, force: bool, wanted: Callable[[], bool]) -> Grant:
        # Durable before it is asked for, so that who crashes as the winner still knows its own. The same tag is asked for again
        # until it is answered.
        self._tag = self._tag or os.urandom(8).hex()
        await self._keeper.note_claim(self._tag)
        for _ in range(_TRIES):
            found = await self._read(arbiter)
            if not wanted():
                raise NoAnswerError("nobody wants to know any more")
            record = self._keeper.record
            match claims.to_go_on(record, found, force=force):
                case claims.Lost(reason):
                    raise ClaimLostError(reason)
                case claims.NoArbiter(reason):
                    raise NoAnswerError(f"the arbiter ({arbiter.name}) is not the one that decided before: {reason}")
                case claims.Swap(expected, number):
                    me = self._keeper.me()
                    epoch = Epoch(number, self._tag, me.node, frozenset({me}), force, time.time())
                    seen = await self._swap(arbiter, expected, epoch)
                    if seen is not None:
                        self._published, self._tag = epoch.tag, ""
                        return Grant(number, epoch.tag, seen)
        raise NoAnswerError(f"the record at the arbiter ({arbiter.name}) keeps changing")

    async def _check_isolation(self) -> None:
        if self._isolation is None:
            return
        try:
            reachable = await self._isolation.is_reachable()
        except MirrorfsError as error:
            raise NoAnswerError(str(error)) from None
        if not reachable:
            raise NoAnswerError(
                f"neither the other node nor {self._node.config.arbiter.isolation_check} (isolation_check) answers: it is this "
                "node that is cut off"
            )

    async def go_on_alone(self, primary: Primary, *, wrote: bool) -> None:
        """The peer of a primary is lost: ask until this node may go on alone, or has lost, or the peer is back."""
        node = self._node
        while node.primary is primary and primary.waits_for_grant:
            try:
                grant = await self.claim(wanted=lambda: node.primary is primary and primary.waits_for_grant)
                async with node.promotion.lock:
                    if node.primary is primary and primary.waits_for_grant:
                        await primary.go_on_alone(grant, wrote=wrote)
                        node.enter(f"{node.peer_name} was lost: {primary.loss}")
            except ClaimLostError as error:
                await self._stop(primary, f"deposed: {error}")
            except NoAnswerError as error:
                if primary.waits_for_grant:
                    node.frozen(f"frozen: {error}")
                await trio.sleep(_RETRY_S)
            except JournalError:
                return  # the daemon ends, as `Keeper.failed` had it

    async def _stop(self, primary: Primary, reason: str) -> None:
        node = self._node
        async with node.promotion.lock:
            if node.primary is primary:
                log.error("%s", reason, extra={"event": "deposed", "epoch": node.epoch})
                await node.stop_leading(reason)
        if node.link is not None:
            node.link.close(reason)

    # ---- while it serves

    async def keep_published(self) -> None:
        """Look at the record now and then, and bring it up to date while this node serves."""
        if self._arbiter is None:
            return
        while True:
            await trio.sleep(_RETRY_S)
            if self._needs_a_look():
                self._looked = trio.current_time()
                try:
                    async with self._asking:
                        await self._publish(self._arbiter)
                except NoAnswerError as error:
                    self._note_failure(str(error))
                except JournalError:
                    return
                else:
                    self._note_success()

    def _needs_a_look(self) -> bool:
        if trio.current_time() - self._looked >= _LOOK_S:
            return True
        epoch = self._keeper.record.epoch
        return self._serves() is not None and epoch is not None and epoch.tag != self._published

    def _serves(self) -> Primary | None:
        primary = self._node.primary
        return primary if primary is not None and primary.mode in (Mode.MIRRORED, Mode.ALONE) else None

    async def _publish(self, arbiter: Arbiter) -> None:
        found = await self._read(arbiter)
        if found.seen.key_revision == self._replaced:
            found = Found(found.seen)
        primary, record = self._serves(), self._keeper.record
        if primary is None or record.epoch is None:
            return
        match claims.to_publish(record, found, mirrored=primary.mode is Mode.MIRRORED):
            case None:
                await self._keeper.note_arbiter(found.seen)
                self._published = record.epoch.tag
            case claims.Swap(expected) | claims.AskPeer(expected) as answer:
                if isinstance(answer, claims.AskPeer) and not await _peer_follows(primary):
                    return
                seen = await self._swap(arbiter, expected, record.epoch)
                if seen is not None:
                    await self._keeper.note_arbiter(seen)
                    self._published = record.epoch.tag
            case claims.Lost(reason):
                await self._stop(primary, f"deposed: {reason}, and this node went on without asking")

    # ---- what is said to it

    async def _read(self, arbiter: Arbiter) -> Found:
        try:
            return _found(await arbiter.read())
        except ArbiterUnreachableError as error:
            raise NoAnswerError(str(error)) from None
        except ValueError as error:
            raise NoAnswerError(f"what stands at the arbiter ({arbiter.name}) is {error}") from None

    async def _swap(self, arbiter: Arbiter, expected: int, epoch: Epoch) -> Seen | None:
        try:
            reading = await arbiter.swap(expected, claims.pack(self._keeper.record.volume_id, epoch))
        except ArbiterUnreachableError as error:
            raise NoAnswerError(str(error)) from None
        return None if reading is None else Seen(reading.cluster, reading.revision, reading.key_revision)

    # ---- what is told of it

    def _note_failure(self, text: str) -> None:
        if not self._failure:
            self._since = time.time()
            log.warning("%s", text, extra={"event": "arbiter-lost"})
        self._failure = text

    def _note_success(self) -> None:
        if self._failure:
            self._since = time.time()
            log.info("the arbiter answers again", extra={"event": "arbiter-answers"})
        self._failure = ""

    def describe(self) -> dict[str, Any]:
        """For `mirrorfs status`."""
        settings = self._node.config.arbiter
        if self._arbiter is None:
            return {
                "kind": "none",
                "automatic": settings.allow_unarbitrated,
                "isolation_check": settings.isolation_check or None,
            }
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._since))
        return {
            "kind": settings.kind,
            "name": self._arbiter.name,
            "answers": not self._failure,
            "since": since,
            "why": self._failure,
        }

    async def aclose(self) -> None:
        """Give its connections back."""
        if self._arbiter is not None:
            await self._arbiter.aclose()


async def _peer_follows(primary: Primary) -> bool:
    """Whether the peer, in sync, acknowledges something that is sent only now."""
    stream = primary.stream
    if stream is None or primary.mode is not Mode.MIRRORED:
        return False
    acknowledged = await stream.applied(stream.put(ops.Marked(primary.activity.marked)))
    return acknowledged and primary.stream is stream and primary.mode is Mode.MIRRORED


def _found(reading: Reading) -> Found:
    seen = Seen(reading.cluster, reading.revision, reading.key_revision)
    if reading.value is None:
        return Found(seen)
    volume_id, epoch = claims.unpack(reading.value)
    return Found(seen, volume_id, epoch)
