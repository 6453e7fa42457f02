"""The failover controller of a machine as a process of its own: the real one, between simulated ports.

Beats travel over two networks, the one that the mounts use and the one of the clients, and may be held back and sent again.
What they prove is judged by the real `core.beats`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs.core.beats import Beat, Hearing, Verdict
from mirrorfs.errors import ControlError, MirrorfsError
from mirrorfs.failover import Controller
from mirrorfs.failover_config import FailoverConfig, ServiceConfig
from mirrorfs.failover_memory import Memory
from mirrorfs.status import describe
from mirrorfs.watch import Condition
from tests.sim.kernel import running
from tests.sim.processes import Running
from tests.sim.services import SimulatedAddresses, SimulatedServices

if TYPE_CHECKING:
    from tests.sim.machine import Machine

_LOOK_S: Final = 0.25
NETWORKS: Final = (0, 1)
_BEAT_S: Final = 0.5
_GAP_S: Final = 0.05
_DETECTION_S: Final = 3.0
_MOST_HELD_BACK: Final = 50
#: One beat in so many is kept on its way, or by somebody, and arrives once more.
_SENT_AGAIN: Final = 30


class Kept(Memory):
    """A memory whose file is on the machine's disk; that it is written safely has tests of its own."""

    def __init__(self, machine: "Machine", settings: FailoverConfig) -> None:
        self._machine = machine
        super().__init__(Path("/"), max_failovers=settings.max_failovers, window_s=settings.failover_window_s)

    def _read(self) -> dict[str, Any]:
        return self._machine.controller_memory

    def _write(self) -> None:
        self._machine.controller_memory = self._content()


class SimulatedWatch:
    """Stands in for `watch.MountWatch`."""

    def __init__(self, machine: "Machine", process: Running) -> None:
        self.condition = Condition.STOPPED
        self.status: dict[str, Any] | None = None
        self.controller: Controller
        self._machine = machine
        self._process = process
        self._owed_s = 0.0

    def begin(self) -> None:
        """Look now and then."""
        if self._process.dead:
            return
        if self._process.runs:
            self._look()
        self._machine.world.clock.call_later(_LOOK_S, self.begin)

    def _look(self) -> None:
        mount = self._machine.process
        before = self.condition, self.status
        if mount is None or mount.dead or mount.node is None:
            self._owed_s, self.condition, self.status = 0.0, Condition.STOPPED, None
        elif mount.runs:
            self._owed_s, self.condition = 0.0, Condition.ANSWERS
            with mount.entered():
                self.status = describe(mount.node) | {"path": "/data", "pid": mount.pid}
        else:
            self._owed_s += _LOOK_S
            if self._owed_s >= _DETECTION_S:
                self.condition = Condition.HUNG
        if (self.condition, self.status) != before:
            self.controller.wake()

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        """A command for the node, answered in its own process."""
        mount = self._machine.process
        if mount is None or mount.node is None:
            raise ControlError("no node listens")
        promotion, keeper = mount.node.promotion, mount.node.keeper
        answered = trio.Event()
        outcome: list[str | MirrorfsError] = []

        async def answer() -> None:
            running.set(mount)
            await trio.lowlevel.checkpoint()  # a process that stands still does not even begin
            try:
                with mount.call():
                    if command == "promote":
                        outcome.append(await promotion.promote(**({"yes": False, "force": False} | arguments)))
                        epoch = keeper.record.epoch
                        if epoch is not None and len(epoch.in_sync) == 1:
                            self._machine.world.promoted.add(epoch.tag)
                    else:
                        outcome.append(await promotion.demote(force=False))
            except MirrorfsError as error:
                outcome.append(error)
            if mount.dead and command == "promote":
                self._machine.world.interrupted.add(self._machine.name)
            answered.set()

        self._machine.world.nursery.start_soon(answer)
        with trio.move_on_after(timeout_s):
            await answered.wait()
        if not outcome or mount.dead:
            raise ControlError(f"the node has not answered {command}")
        if isinstance(outcome[0], MirrorfsError):
            raise outcome[0]
        return {"message": outcome[0]}


class SimulatedHeart:
    """Stands in for `heartbeat.Heartbeats`."""

    def __init__(self, machine: "Machine", process: Running, controller: Controller) -> None:
        self._world = machine.world
        self._machine = machine
        self._process = process
        self._controller = controller
        self._session = machine.world.beats.randbytes(8)
        self._hearing = Hearing(self._session)
        self._sequence = 0
        self._began = self._sent_at = trio.current_time()
        self._is_poked = False
        #: What has arrived while the process stood still.
        self._waiting: list[Beat] = []

    def begin(self) -> None:
        """Beat regularly."""
        if self._process.dead:
            return
        if self._process.runs:
            self._send()
        self._world.clock.call_later(_BEAT_S, self.begin)

    def poke(self) -> None:
        """Say what is new at once, yet not without end."""
        if not self._is_poked:
            self._is_poked = True
            self._world.clock.call_later(max(0.0, self._sent_at + _GAP_S - trio.current_time()), self._send_early)

    def _send_early(self) -> None:
        self._is_poked = False
        if self._process.runs:
            self._send()

    def _send(self) -> None:
        with self._process.entered():
            content = self._controller.say()
        self._sequence += 1
        self._sent_at = trio.current_time()
        for network in NETWORKS:
            beat = Beat(
                "data",
                self._machine.name,
                self._session,
                self._hearing.taken_up,
                self._sequence,
                self._hearing.echoes,
                network,
                content,
            )
            for delay_s in self._delays():
                self._world.clock.call_later(delay_s, partial(self._arrive, beat))

    def _delays(self) -> Iterator[float]:
        dice = self._world.beats
        if dice.random() >= self._world.beat_loss:
            yield dice.choice((0.0005, 0.002, 0.02, 0.2))
        if dice.randrange(_SENT_AGAIN) == 0:
            yield dice.uniform(0.0, 30.0)

    def _arrive(self, beat: Beat) -> None:
        other = self._machine.other
        if not self._world.carries(beat.network, self._machine, other) or other.heart is None:
            return
        other.heart.take(beat)

    def take(self, beat: Beat) -> None:
        """A beat has arrived."""
        if self._process.dead:
            return
        self._waiting = [*self._waiting[-_MOST_HELD_BACK:], beat]
        if self._process.runs:
            self._read()

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        for beat in waiting:
            if self._hearing.step(beat, trio.current_time()) is Verdict.FRESH:
                with self._process.entered():
                    self._controller.hear(beat.content)

    @property
    def silent_s(self) -> float:
        """Seconds since the other controller was heard, or since the start."""
        self._read()
        now = trio.current_time()
        return self._hearing.silent_for(now) if self._hearing.heard_ever else now - self._began

    @property
    def networks(self) -> dict[str, bool]:
        """Which networks carry."""
        up = self._hearing.networks(trio.current_time(), _DETECTION_S)
        return {str(network): network in up for network in NETWORKS}


class ControllerProcess(Running):
    """One run of `mirrorfs controller`."""

    def __init__(self, machine: "Machine", settings: FailoverConfig) -> None:
        machine.world.controllers += 1
        super().__init__(machine, f"{machine.name}.controller.{machine.world.controllers}")
        assert machine.controller is None, machine.name
        machine.controller = self
        machine.world.note(f"{self.name}: starts")
        self.scope = trio.CancelScope()
        with self.entered():
            watch = SimulatedWatch(machine, self)
            self.addresses = SimulatedAddresses(machine, self)
            self.controller = Controller(
                machine.config(),
                settings,
                Kept(machine, settings),
                watch,
                self.addresses,
                SimulatedServices(machine),
            )
            watch.controller = self.controller
            self.heart = self.controller.heart = SimulatedHeart(machine, self, self.controller)
            watch.begin()
            self.heart.begin()
            self.addresses.begin()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """From start to end."""
        running.set(self)
        task_status.started()
        with self.scope:
            await self.controller.run()

    def end(self) -> None:
        """SIGKILL."""
        self.dead = True
        self.scope.cancel()
        self.go_on()


def settings_of(preferred: str, max_failovers: int) -> FailoverConfig:
    """How the controllers of a run are configured."""
    return FailoverConfig(
        Path("/key"),
        detection_timeout_s=_DETECTION_S,
        failback="preferred" if preferred else "manual",
        preferred=preferred,
        failback_after_s=4.0,
        max_failovers=max_failovers,
        services=(ServiceConfig("database", start="start", restarts=2, restart_window_s=60.0),),
    )
