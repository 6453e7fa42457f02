"""A pair with its controllers, as it stands at a site: a service behind an address, clients, and a person who is called."""

from typing import Final

import trio

from mirrorfs.core.controller import Posture
from mirrorfs.failover import Controller
from tests.sim.controllers import ControllerProcess, settings_of
from tests.sim.machine import Machine
from tests.sim.pair import Pair
from tests.sim.services import Client
from tests.sim.world import Violation, World

_LOOK_S: Final = 0.5
_PATIENCE_S: Final = 400.0
#: How long the controllers are left to themselves before a person comes.
_WAIT_S: Final = 30.0


class Site(Pair):
    """Both machines, their controllers, the client."""

    def __init__(self, world: World, *, preferred: str = "", max_failovers: int = 3) -> None:
        super().__init__(world, applications=0)
        self.client = Client(world)
        self.settings = settings_of(preferred, max_failovers)
        #: Whether something happened after which only a person can know what to do.
        self.needs_a_person = False
        #: Whether the arbiter was set back, which is to lose it: what it granted since, it may grant again.
        self.may_split = False

    # ---- looking

    @staticmethod
    def controller_of(machine: Machine) -> Controller | None:
        """The controller that runs on a machine."""
        return machine.controller.controller if machine.controller is not None else None

    def posture(self, machine: Machine) -> Posture | None:
        """What the controller of a machine is doing."""
        controller = self.controller_of(machine)
        return controller.posture if controller is not None else None

    @property
    def is_served(self) -> bool:
        """Whether the pair is mirrored, and clients reach the service there and nowhere else."""
        primary = self.primary
        if primary is None or not self.is_mirrored or self.world.reached is not primary:
            return False
        other = primary.other
        return (
            self.posture(primary) is Posture.SERVING
            and self.posture(other) is Posture.IDLE
            and primary.service is not None
            and primary.service.works
            and other.service is None
            and not other.has_address
        )

    def describe(self) -> str:
        """Both machines, for a person."""
        return ", ".join(
            f"{machine.name}: {self.state(machine)}, {self.posture(machine)}, service {machine.service is not None}, "
            f"address {machine.has_address}"
            for machine in (self.a, self.b)
        )

    # ---- acting

    async def start_controller(self, machine: Machine) -> None:
        """Start `mirrorfs controller` on a machine."""
        process = ControllerProcess(machine, self.settings)
        await self.world.nursery.start(process.run)

    async def open(self) -> None:
        """Everything is started; returns when a client is served."""
        await self.up()
        for machine in (self.a, self.b):
            await self.start_controller(machine)
        self.world.nursery.start_soon(self.client.run)
        await self.until(lambda: self.client.answered > 0, "a client to be served")

    def heal(self) -> None:
        """Mend what surrounds the nodes."""
        super().heal()
        self.world.arbiter.heal()
        self.world.parted.clear()
        self.world.beat_loss = 0.0
        for machine in (self.a, self.b):
            machine.service_is_broken = False
            for process in (machine.process, machine.controller):
                if process is not None:
                    process.go_on()

    async def restart(self) -> None:
        """Start what is down."""
        for machine in (self.a, self.b):
            if machine.process is None:
                await machine.start()
            if machine.controller is None:
                await self.start_controller(machine)

    def release(self) -> None:
        """A person has looked: `mirrorfs maintenance off`."""
        for machine in (self.a, self.b):
            controller = self.controller_of(machine)
            if controller is not None and machine.controller is not None:
                with machine.controller.entered():
                    controller.maintain(on=False)

    async def make_whole(self) -> None:
        """Mend everything around; the controllers do the rest, or else a person is called."""
        self.heal()
        self.release()
        end, waited = trio.current_time() + _PATIENCE_S, 0.0
        while not self.is_served:
            self.world.judge()
            if trio.current_time() > end:
                raise Violation(f"clients are not served again ({self.describe()})")
            await self.restart()
            await trio.sleep(_LOOK_S)
            waited += _LOOK_S
            if waited >= _WAIT_S:
                await self._help()
                waited = 0.0

    async def _help(self) -> None:
        if not self.needs_a_person and not self._waits_for_a_person:
            self.world.blame(f"a person is needed for nothing ({self.describe()})")
        self.world.note(f"a person comes ({self.describe()})")
        self.release()
        if not self.world.serving() or self.is_split:
            await self.decide()

    @property
    def _waits_for_a_person(self) -> bool:
        controllers = [controller for m in (self.a, self.b) if (controller := self.controller_of(m)) is not None]
        return any(controller.posture is Posture.HELD or controller.describe()["maintenance"] for controller in controllers)

    async def quiet(self) -> None:
        """No more requests; then everything is compared."""
        self.client.paused = True
        await self.until(lambda: not any(m.service and m.service.is_busy for m in (self.a, self.b)), "the last answer")
        await super().quiet()
        self.client.paused = False
        answered = self.client.answered
        await self.until(lambda: self.client.answered > answered, "a client to be served")
