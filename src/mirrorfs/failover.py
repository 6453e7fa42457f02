"""The failover controller of a node: look, ask `core.controller` what follows, do it.

A process of its own, so that somebody notices when the mount stalls as a whole. What it needs is given to it: the watch of the
mount, the heartbeats, the addresses, the services. It waits for none of them while it looks: what takes time is a task, and
how far that has come is what the next look sees.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, Protocol, assert_never

import trio

from mirrorfs.application import AddressPort, Application, ServicePort, kill, start_time
from mirrorfs.config import Config
from mirrorfs.core.controller import Do, Limits, Mount, Posture, Rule, Services, View, next_rule
from mirrorfs.errors import MirrorfsError, RefusedError, UsageError
from mirrorfs.failover_config import FailoverConfig
from mirrorfs.failover_memory import Memory
from mirrorfs.watch import Condition

log = logging.getLogger(__name__)

LOOK_S: Final = 0.1
_REQUEST_S: Final = 30.0
_STATES: Final = {"primary": Mount.LEADS, "solo": Mount.LEADS, "standby": Mount.FOLLOWS, "resyncing": Mount.BEHIND}
#: More rules than this in one look would be two that undo each other.
_MOST_RULES: Final = 10
_UNDER_WAY: Final = "it is under way: `mirrorfs status` says how far"
#: A rule is not logged again while it is one of so many that were taken last.
_TOLD: Final = 4


class MountPort(Protocol):
    """The mount of this node, as `watch.MountWatch`."""

    @property
    def condition(self) -> Condition:
        """Whether it answers."""

    @property
    def status(self) -> dict[str, Any] | None:
        """What it said last."""

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        """A command; raises the error of the node."""


class HeartPort(Protocol):
    """The heartbeats, as `heartbeat.Heartbeats`."""

    @property
    def silent_s(self) -> float:
        """Seconds since anything was heard."""

    @property
    def networks(self) -> dict[str, bool]:
        """Which networks carry heartbeats."""

    def poke(self) -> None:
        """Say what is new at once."""


@dataclass(slots=True)
class _Peer:
    """What the other controller said last; before it has said anything, nothing follows from that."""

    mount: Mount = Mount.WAITING
    posture: Posture = Posture.IDLE
    asks: bool = False
    refuses: str = ""
    #: Whether its addresses are there, as far as it says so: earlier versions do not.
    reachable: bool = True
    #: Whether its mount is the primary and mirrors to nobody.
    alone: bool = False
    stop_s: float | None = None


class Controller:
    """One node's controller, from start to end."""

    def __init__(
        self,
        config: Config,
        settings: FailoverConfig,
        memory: Memory,
        mount: MountPort,
        addresses: AddressPort,
        services: ServicePort,
    ) -> None:
        self.config = config
        self.posture = Posture.IDLE
        self.reason = "just started"
        self.application = Application(settings, memory, addresses, services, self.wake)
        self.heart: HeartPort
        self._settings = settings
        self._memory = memory
        self._mount = mount
        self._limits = Limits(detection_s=settings.detection_timeout_s)
        self._peer = _Peer()
        self._nursery: trio.Nursery
        self._news = trio.Event()
        now = trio.current_time()
        self._now = self._entered = self._linked_at = now
        self._since = time.time()
        self._failing_over_since = 0.0
        self._frozen_at = self._standby_at = self._answered_at = 0.0
        self._take = self._give = self._released = self._refused = False
        self._refusal = ""
        #: The primary that was lost has gone on alone since.
        self._outdated = False
        self._victim: tuple[int, str] | None = None
        self._told: deque[Rule] = deque(maxlen=_TOLD)

    # ---- from start to end

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and act until cancelled."""
        # From now on: that the mount took long to answer gave the other controller no time to be heard.
        self._linked_at = trio.current_time()
        await self.application.look()
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                self.look()
                news = self._news
                with trio.move_on_after(LOOK_S):
                    await news.wait()

    async def stop(self) -> None:
        """A clean end: nothing runs here afterwards, unless in maintenance."""
        if self.application.state is not Services.DOWN and not self._memory.maintenance:
            await self.application.stop()

    def wake(self) -> None:
        """Something is new: look at once."""
        self._news.set()
        self._news = trio.Event()

    # ---- looking

    def look(self) -> None:
        """Take every rule that holds."""
        for _ in range(_MOST_RULES):
            view = self.view()
            rule = next_rule(self.posture, view)
            if rule is None:
                if self.posture is Posture.IDLE and view.mount is Mount.FOLLOWS and view.hears:
                    self._end_failover(done=False)  # the other node is there again
                return
            self._take_rule(rule)
        log.error("the controller does not come to rest in %s", self.posture)

    def _take_rule(self, rule: Rule) -> None:
        # What is tried again every second is told once.
        level = logging.DEBUG if rule in self._told else logging.INFO
        extra = {"event": "posture-changed", "posture": str(rule.then), "before": str(rule.posture), "reason": rule.name}
        log.log(level, "%s -> %s: %s", rule.posture, rule.then, rule.name, extra=extra)
        self._told.append(rule)
        self._note_failover(rule)
        keeps = self._refused and rule.then is Posture.IDLE
        if rule.posture is Posture.GIVING and self._refused:
            self._refusal = self.application.trouble
        self.posture, self.reason = rule.then, rule.name
        self._entered, self._since = trio.current_time(), time.time()
        self._refused, self._released = keeps, False
        self._answered_at = 0.0
        for do in rule.do:
            self._do(do)
        self.heart.poke()
        self.wake()

    def _note_failover(self, rule: Rule) -> None:
        """One begins when the role is first asked for, and not each time that it is asked for again."""
        if rule.then is Posture.TAKING and not self._failing_over_since:
            self._failing_over_since = trio.current_time()
            log.warning("failing over: %s", rule.name, extra={"event": "failover-begun", "reason": rule.name})
        elif rule.then in (Posture.SERVING, Posture.HELD, Posture.YIELDING):
            self._end_failover(done=rule.then is Posture.SERVING)

    def _end_failover(self, *, done: bool) -> None:
        began, self._failing_over_since = self._failing_over_since, 0.0
        if not began:
            return
        took_s = round(trio.current_time() - began, 1)
        if done:
            log.warning("failed over in %.1f s", took_s, extra={"event": "failover-ended", "seconds": took_s})
        else:
            trouble = self.application.trouble or self.reason
            log.warning("not failed over: %s", trouble, extra={"event": "failover-given-up", "reason": trouble})

    def _see_mount(self) -> Mount:
        match self._mount.condition:
            case Condition.STOPPED:
                return Mount.STOPPED
            case Condition.HUNG:
                return Mount.HUNG
            case Condition.ANSWERS:
                status = self._mount.status or {}
                if status.get("frozen"):
                    return Mount.FROZEN
                return _STATES.get(str(status.get("state")), Mount.WAITING)
            case condition:
                assert_never(condition)

    def _watch_times(self) -> None:
        now, mount, status = trio.current_time(), self._see_mount(), self._mount.status or {}
        self._now = now
        if mount not in (Mount.STOPPED, Mount.HUNG) and status.get("peer", {}).get("state") != "disconnected":
            self._linked_at = now
        if self._linked_at == now and self._peer.mount is Mount.LEADS and not self._peer.alone:
            self._outdated = False  # it mirrors to this node; that it stopped says nothing of what it did before
        self._frozen_at = (self._frozen_at or now) if mount is Mount.FROZEN else 0.0
        self._standby_at = (self._standby_at or now) if mount is Mount.FOLLOWS else 0.0
        if mount not in (Mount.STOPPED, Mount.HUNG) and "pid" in status:
            pid = status["pid"]
            if self._victim is None or self._victim[0] != pid:
                self._victim = pid, start_time(pid)
        elif mount is Mount.STOPPED:
            self._victim = None

    def view(self) -> View:
        """What is seen now."""
        self._watch_times()
        now, mount = self._now, self._see_mount()
        preferred = self._settings.failback == "preferred" and self._settings.preferred == self.config.node.name
        ready = bool(self._standby_at) and now - self._standby_at >= self._settings.failback_after_s
        return View(
            mount=mount,
            services=self.application.state,
            unlinked_s=now - self._linked_at,
            frozen_s=now - self._frozen_at if self._frozen_at else 0.0,
            silent_s=self.heart.silent_s,
            peer_mount=self._peer.mount,
            peer_posture=self._peer.posture,
            told_to_take=self._take,
            told_to_give=self._give or (self._peer.asks and not self._refusal),  # a refusal stands until it asks anew
            peer_refuses=bool(self._peer.refuses),
            released=self._released,
            maintenance=self._memory.maintenance,
            may_fail_over=self._memory.failovers.left(time.time()) > 0,
            prefers=preferred and ready,
            unwell=self.application.unwell,
            refused=self._refused,
            in_posture_s=now - self._entered,
            answered_s=now - self._answered_at if self._answered_at else 0.0,
            limits=self._limits,
        )

    # ---- acting

    def _do(self, do: Do) -> None:
        match do:
            case Do.START:
                self.application.begin(self._nursery)
            case Do.STOP:
                self.application.end(self._nursery, self._fence)
            case Do.PROMOTE:
                arguments = {"automatic": True, "outdated": self._outdated}
                self._nursery.start_soon(self._request, self.posture, "promote", arguments)
            case Do.TAKE_OVER:
                self._nursery.start_soon(self._request, self.posture, "promote", {})
            case Do.HAND_OVER:
                self._nursery.start_soon(self._request, self.posture, "demote", {})
            case Do.COUNT:
                self._memory.count_failover(time.time())
            case Do.FORGET:
                self._take = self._give = False

    async def _request(self, posture: Posture, command: str, arguments: dict[str, Any]) -> None:
        try:
            await self._mount.ask(command, timeout_s=_REQUEST_S, **arguments)
        except MirrorfsError as error:
            self.application.complain(str(error))
            if self.posture is posture:
                self._refused = True
        if self.posture is posture:
            self._answered_at = trio.current_time()
        self.wake()

    def _fence(self) -> None:
        """A mount that hangs keeps the services in calls that no signal ends; it follows again when it is started anew."""
        if self._see_mount() is Mount.HUNG and self._victim is not None:
            log.error("the mount hangs: process %d is killed", self._victim[0], extra={"event": "mount-killed"})
            kill(*self._victim)

    # ---- the other controller

    def say(self) -> dict[str, Any]:
        """What the next heartbeat carries."""
        return {
            "posture": str(self.posture),
            "mount": str(self._see_mount()),
            "asks": self.posture is Posture.ASKING,
            "refuses": self._refusal if self._peer.asks else "",
            "maintenance": [self._memory.maintenance_count, self._memory.maintenance],
            "macs": self.application.macs(),
            "reachable": self.application.is_reachable,
            "alone": self._see_mount() is Mount.LEADS and (self._mount.status or {}).get("state") == "solo",
            "stop_s": self._memory.stop_s,
        }

    def hear(self, content: dict[str, Any]) -> None:
        """What the other controller says; what makes no sense is ignored as a whole."""
        try:
            mount, posture = Mount(content["mount"]), Posture(content["posture"])
            count, on = content["maintenance"]
            macs = tuple(str(mac) for mac in content["macs"])
            before = self._peer
            stop_s = content.get("stop_s")
            self._peer = _Peer(
                mount,
                posture,
                bool(content["asks"]),
                str(content["refuses"]),
                bool(content.get("reachable", True)),
                bool(content.get("alone", False)),
                None if stop_s is None else float(stop_s),
            )
            self._outdated |= self._peer.alone
            if self._memory.hear(int(count), bool(on), macs):
                self._released = not on
        except (KeyError, TypeError, ValueError) as error:
            log.debug("a heartbeat that makes no sense: %r", error)
            return
        if not self._peer.asks:
            self._refusal = ""
        if before != self._peer:
            self.wake()

    # ---- what a person asks for

    async def promote(self, *, yes: bool, force: bool) -> str:
        """Have the application here: a switch-over if the other node is there, else what the mount makes of it."""
        view = self.view()
        if view.mount is Mount.LEADS:
            return f"{self.config.node.name} is the primary already"
        if view.mount is Mount.FOLLOWS and view.hears and not force:
            return await self._take_it(self._limits.ask_s)
        answer = await self._mount.ask("promote", timeout_s=_REQUEST_S, yes=yes, force=force)
        self.wake()
        return str(answer["message"])

    async def preview(self, *, yes: bool, force: bool) -> dict[str, Any]:
        """What `promote` would do, services and addresses included; changes nothing."""
        view = self.view()
        found = await self._mount.ask("promote", timeout_s=_REQUEST_S, dry_run=True, yes=yes, force=force)
        moves = view.mount is Mount.FOLLOWS and view.hears and not force
        return found | {
            "services": {"stop_s": self._peer.stop_s if moves else 0.0, "start_s": self._memory.start_s},
        }

    async def switch_over(self, within_s: float, *, wait: bool = True) -> str:
        """Move the application to the other node, whichever that is, and wait until it is served at its addresses there.

        `wait`: else only until it is under way. Raises RefusedError if it cannot be moved, MirrorfsError if it does not serve
        there within `within_s` seconds; what is under way goes on then.
        """
        view = self.view()
        if view.mount is not Mount.LEADS:
            if view.mount is not Mount.FOLLOWS or not view.hears:
                raise RefusedError(
                    f"{self.config.node.name} is not in sync ({view.mount}), or the other controller is not heard"
                )
            return await self._take_it(within_s, wait=wait)
        if not view.peer_can_take:
            raise RefusedError("the other node cannot take over now: look at `mirrorfs status` on both")
        began, gone, self._give = trio.current_time(), False, True
        self.wake()
        try:
            with trio.move_on_after(within_s):
                while not self._peer_serves or self.posture is not Posture.IDLE:
                    if not wait and self.posture in (Posture.YIELDING, Posture.GIVING):
                        return _UNDER_WAY
                    gone |= self.posture is Posture.IDLE and self._see_mount() is not Mount.LEADS
                    if not self._give and self.posture in (Posture.SERVING, Posture.STARTING):
                        came_back = "the other node could not start it: look at `mirrorfs status` there" if gone else ""
                        raise MirrorfsError(f"not given: {came_back or self.application.trouble or self.reason}")
                    if self._peer.posture is Posture.HELD:
                        raise MirrorfsError("the other node does not serve, it is held: `mirrorfs status` there says why")
                    await self._news.wait()
                return f"the other node serves, after {trio.current_time() - began:.1f} s"
        finally:
            self._give = False  # not by surprise, when the other node is able again, or when nobody waits for it any more
        lacks = "serves without its addresses" if self._peer.posture is Posture.SERVING else "does not serve"
        raise MirrorfsError(f"the other node {lacks} after {within_s:g} s: look at `mirrorfs status` there")

    @property
    def _peer_serves(self) -> bool:
        return self._peer.posture is Posture.SERVING and self._peer.reachable

    async def _take_it(self, within_s: float, *, wait: bool = True) -> str:
        if self.posture is Posture.HELD:
            why = self.application.trouble or self.reason
            raise RefusedError(f"{self.config.node.name} is held ({why}): `mirrorfs maintenance off` ends that")
        began, self._take = trio.current_time(), True
        self.wake()
        try:
            with trio.move_on_after(within_s):
                while self.posture is not Posture.SERVING or not self.application.is_reachable:
                    await self._news.wait()
                    if not wait and self.posture in (Posture.ASKING, Posture.STARTING, Posture.SERVING):
                        return _UNDER_WAY
                    if not self._take and self.posture in (Posture.IDLE, Posture.HELD):
                        raise MirrorfsError(f"not taken over: {self._peer.refuses or self.application.trouble or self.reason}")
                return f"{self.config.node.name} serves, after {trio.current_time() - began:.1f} s"
        finally:
            self._take = False
        if self.posture is Posture.ASKING:
            raise MirrorfsError(f"the other node did not give it within {within_s:g} s: look at its `mirrorfs status`")
        lacks = "serves without its addresses" if self.posture is Posture.SERVING else "does not serve"
        trouble = self.application.trouble or "look at `mirrorfs status`"
        raise MirrorfsError(f"{self.config.node.name} {lacks} after {within_s:g} s: {trouble}")

    def maintain(self, *, on: bool) -> str:
        """Do nothing automatically, on both nodes, or do it again; ends a hold too."""
        self._memory.set_maintenance(on)
        self._released = not on
        self.heart.poke()
        self.wake()
        return "maintenance: nothing is done automatically until `mirrorfs maintenance off`" if on else "maintenance has ended"

    async def on_command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer a command from the control socket."""
        match command:
            case "status":
                return self.describe()
            case "promote" if arguments.get("dry_run"):
                return await self.preview(yes=bool(arguments.get("yes")), force=bool(arguments.get("force")))
            case "promote":
                return {"message": await self.promote(yes=bool(arguments.get("yes")), force=bool(arguments.get("force")))}
            case "switchover":
                within_s = float(arguments.get("within_s", self._limits.ask_s))
                return {"message": await self.switch_over(within_s, wait=bool(arguments.get("wait", True)))}
            case "maintenance":
                message = self.maintain(on=bool(arguments.get("on")))
                await self._memory.saved()  # a person's word outlives the controller
                return {"message": message}
            case _:
                raise UsageError(f"this controller does not know the command {command!r}: is it of another version?")

    def describe(self) -> dict[str, Any]:
        """The controller as it is now, in plain values."""
        silent_s = self.heart.silent_s
        return {
            "posture": str(self.posture),
            "because": self.reason,
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._since)),
            "mount": str(self._see_mount()),
            "services": str(self.application.state),
            "addresses": "up" if self.application.is_reachable else "down",
            "trouble": self.application.address_trouble or self.application.trouble,
            "maintenance": self._memory.maintenance,
            "failovers_left": self._memory.failovers.left(time.time()),
            "peer": {
                "heard": silent_s < self._limits.detection_s,
                "posture": str(self._peer.posture),
                "mount": str(self._peer.mount),
                "alone": self._peer.alone,
            },
            "networks": self.heart.networks,
        }
