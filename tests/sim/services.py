"""What the clients of a pair see: a service that writes to the mount of its machine, an address, and who asks it.

The service lives where its controller starts it, and outlives that controller. A call that waits for a mount which stands still
ends with the mount and not before, whatever signal the service is sent.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from mirrorfs.errors import MirrorfsError
from mirrorfs.vip import Conflict
from tests.sim.application import Application
from tests.sim.kernel import running
from tests.sim.processes import Process, Running

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.world import World

ADDRESS: Final = "10.0.0.1"
NAME: Final = "database"
_LIFETIME_S: Final = 4.0
_RENEW_S: Final = 1.0
_CHECK_S: Final = 1.0
_STOP_S: Final = 10.0
_CLIENT_S: Final = 5.0


class Service:
    """One run of the service, on the mount that was there when it was started."""

    def __init__(self, machine: "Machine", process: "Process") -> None:
        world = machine.world
        world.services += 1
        self.machine = machine
        self.process = process
        self.crashed = False
        self.is_over = False
        self.is_busy = False
        self._asked: deque[trio.Event] = deque()
        self._news = trio.Event()
        self._application = _Application(self, random.Random(f"service {world.services} {world.seed}"))

    @property
    def works(self) -> bool:
        """Whether it answers, and to a check too."""
        return not self.crashed and not self.is_over and self.process.runs and self.machine.process is self.process

    def ask(self) -> trio.Event:
        """A client wants a change; the event is its answer, whatever that is."""
        answered = trio.Event()
        self._asked.append(answered)
        self._news.set()
        return answered

    def crash(self) -> None:
        """It ends, as far as the mount lets it."""
        self.crashed = True
        self._news.set()

    def end(self) -> None:
        """It is told to end."""
        self.is_over = True
        self._news.set()

    async def run(self) -> None:
        """Answer until it is over."""
        running.set(None)
        while not self.is_over and not self.crashed:
            if not self._asked:
                self._news = trio.Event()
                await self._news.wait()
                continue
            answered = self._asked.popleft()
            self.is_busy = True
            await self._application.step()
            self.is_busy = False
            answered.set()
        if self.is_over and self.machine.service is self:
            self.machine.service = None  # killed before, and let go by the mount only now


class _Application(Application):
    """What a service does to its files; all services own the same ones, as only one of them can write."""

    def __init__(self, service: Service, dice: random.Random) -> None:
        super().__init__(service.machine.world, b"c0", dice)
        self._service = service

    def serving(self) -> "Machine | None":
        service = self._service
        serves = service.machine in self.world.serving() and service.machine.process is service.process
        return service.machine if serves else None


class SimulatedServices:
    """Stands in for `services.Services`: one service."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._world = machine.world

    async def start_all(self) -> None:
        """Start it; it needs a mount that takes changes."""
        machine = self._machine
        await trio.sleep(self._world.beats.choice((0.05, 0.3, 1.0)))
        if machine.service is not None:
            raise MirrorfsError("something of it is still there")
        if machine.service_is_broken:
            raise MirrorfsError("it does not start")
        process = machine.process
        if process is None or not process.runs or machine not in self._world.serving():
            raise MirrorfsError("its directory cannot be written")
        service = machine.service = Service(machine, process)
        self._world.note(f"{machine.name}: the service is up")
        self._world.nursery.start_soon(service.run)

    async def stop_all(self) -> list[str]:
        """Stop it; what waits for the mount cannot be."""
        service = self._machine.service
        if service is None:
            return []
        service.end()
        await trio.sleep(self._world.beats.choice((0.05, 0.3)))
        waited = 0.0
        while service.is_busy:
            if waited >= _STOP_S:
                return ["service database did not stop: a process did not end on SIGKILL"]
            await trio.sleep(0.1)
            waited += 0.1
        if self._machine.service is service:
            self._machine.service = None
            self._world.note(f"{self._machine.name}: the service is down")
        return []

    async def restart(self, name: str) -> None:
        """Stop it, start it."""
        complaints = await self.stop_all()
        if complaints:
            raise MirrorfsError(f"what was there is not gone: {complaints[0]}")
        await self.start_all()

    async def running(self) -> dict[str, bool]:
        """Whether it is there."""
        await trio.lowlevel.checkpoint()
        service = self._machine.service
        return {NAME: service is not None and service.works}

    async def left(self, running: Mapping[str, bool]) -> list[str]:
        """Whether anything is left of it."""
        await trio.lowlevel.checkpoint()
        return [NAME] if self._machine.service is not None else []

    async def watch(self, on_unwell: Callable[[str, str], None]) -> None:
        """Tell once of each run that does not answer."""
        told: Service | None = None
        failed = 0
        while True:
            await trio.sleep(_CHECK_S)
            service = self._machine.service
            failed = failed + 1 if service is None or not service.works else 0
            if failed >= 2 and service is not told:
                told = service
                on_unwell(NAME, "it does not answer")


class SimulatedAddresses:
    """Stands in for `vip.Addresses`: one address, which the kernel drops unless it is renewed."""

    def __init__(self, machine: "Machine", process: Running) -> None:
        self.trouble = ""
        self.is_up = False
        self._machine = machine
        self._world = machine.world
        self._process = process

    def begin(self) -> None:
        """Renew it regularly."""
        if self._process.dead:
            return
        if self._process.runs and self.is_up:
            self._machine.address_until = trio.current_time() + _LIFETIME_S
        self._world.clock.call_later(_RENEW_S, self.begin)

    async def conflicts(self) -> list[Conflict]:
        """Who else answers for it, if that can be heard."""
        await trio.sleep(0.1)
        other = self._machine.other
        if other.has_address and self._world.carries(1, other, self._machine):
            return [Conflict(ADDRESS, _mac(other))]
        return []

    async def raise_all(self) -> None:
        """Put it on the interface, and announce it."""
        await trio.sleep(0.01)
        self.is_up = True
        self._machine.address_until = trio.current_time() + _LIFETIME_S
        self._world.announced = self._machine
        self._world.note(f"{self._machine.name}: has the address")

    async def drop_all(self) -> None:
        """Take it away."""
        await trio.sleep(0.01)
        if self.is_up or self._machine.has_address:
            self._world.note(f"{self._machine.name}: drops the address")
        self.is_up = False
        self._machine.address_until = 0.0

    def macs(self) -> list[str]:
        """Of its interface."""
        return [_mac(self._machine)]


def _mac(machine: "Machine") -> str:
    return f"mac of {machine.name}"


class Client:
    """Who asks the service behind the address, again and again, and waits for each answer for a while."""

    def __init__(self, world: "World") -> None:
        self.paused = False
        self.answered = 0
        self._world = world
        self._dice = random.Random(f"client {world.seed}")

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await trio.sleep(self._dice.choice((0.02, 0.1, 0.5)))
            if not self.paused:
                await self._ask()

    async def _ask(self) -> None:
        machine = self._world.reached
        if machine is None or machine.service is None or not machine.service.works:
            return
        answer = machine.service.ask()
        with trio.move_on_after(_CLIENT_S):
            await answer.wait()
            self.answered += 1
