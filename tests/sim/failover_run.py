"""A random run of a site: servers, an arbiter, controllers, a service behind an address, and what happens to all of them."""

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from mirrorfs.errors import MirrorfsError
from tests.sim.machine import Machine
from tests.sim.processes import Running
from tests.sim.random_run import LABELS
from tests.sim.site import Site
from tests.sim.world import Options, World

#: The part of the sites that have an arbiter; the others fail over without one, and two histories are no surprise there.
_ARBITRATED: Final = 0.85
_PAUSES_S: Final = (0.0, 0.01, 0.5, 2.0, 4.0, 8.0)


def options_of(seed: int) -> Options:
    """How the pair of a seed is configured."""
    dice = random.Random(f"failover {seed}")
    interval_s, arbiter = dice.choice((0.5, 2.0, 10.0)), dice.random() < _ARBITRATED
    return Options(checkpoint_interval_s=interval_s, arbiter=arbiter, allow_unarbitrated=not arbiter)


Blow = Callable[[Machine], Awaitable[None]]


class Nemesis:
    """What happens to a site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.world = site.world
        self.dice = random.Random(f"failover nemesis {site.world.seed}")
        # Each run knows some of the blows only: what takes a few of a kind in a row would hardly ever happen otherwise.
        often = self._blows()
        known = self.dice.sample(list(often), self.dice.randint(4, len(often)))
        self._often = {blow: often[blow] for blow in known}

    async def strike(self) -> None:
        """One thing that happens."""
        machine = self.dice.choice((self.site.a, self.site.b))
        (blow,) = self.dice.choices(list(self._often), list(self._often.values()))
        self.world.note(f"nemesis: {blow.__name__[1:].replace('_', ' ')}: {machine.name}")
        await blow(machine)

    def _blows(self) -> dict[Blow, int]:
        return {
            self._crash: 2,
            self._power: 2,
            self._trap: 3,
            self._disks: 1,
            self._stall: 2,
            self._pause_of_a_host: 2,
            self._restart: 4,
            self._cut: 3,
            self._cut_one_way: 1,
            self._isolate: 3,
            self._part: 1,
            self._heal: 3,
            self._arbiter_down: 1,
            self._arbiter_lossy: 1,
            self._arbiter_away: 2,
            self._arbiter_back: 1,
            self._lag: 1,
            self._arbiter_restored: 1,
            self._arbiter_replaced: 1,
            self._controller_crash: 2,
            self._controller_stall: 1,
            self._beats_are_lost: 1,
            self._clock: 2,
            self._service_crash: 2,
            self._service_breaks: 1,
            self._switch_over: 3,
            self._take_it: 1,
            self._maintenance: 1,
            self._moves_in_maintenance: 1,
        }

    # ---- machines and mounts

    async def _crash(self, machine: Machine) -> None:
        machine.crash()

    async def _power(self, machine: Machine) -> None:
        self.site.needs_a_person = True
        machine.lose_power()

    async def _trap(self, machine: Machine) -> None:
        what = self.dice.choice(("crash", "power"))
        self.site.needs_a_person |= what == "power"
        machine.traps[self.dice.choice(LABELS)] = what

    async def _disks(self, machine: Machine) -> None:
        """A machine is replaced while the other one serves."""
        if self.site.primary is machine.other:
            self.site.needs_a_person = True
            machine.lose_disks()

    async def _stall(self, machine: Machine) -> None:
        self._stand_still(machine.process)

    async def _pause_of_a_host(self, machine: Machine) -> None:
        """A host stands still, and is cut off when it goes on: it does not know yet that it was given up."""
        for process in (machine.process, machine.controller):
            if process is not None:
                process.stand_still()
        await self._cut(machine)
        await trio.sleep(self.dice.choice((3.0, 7.0, 12.0)))
        for process in (machine.process, machine.controller):
            if process is not None:
                process.go_on()

    async def _controller_stall(self, machine: Machine) -> None:
        self._stand_still(machine.controller)

    def _stand_still(self, process: Running | None) -> None:
        if process is not None:
            process.stand_still()
            self.world.clock.call_later(self.dice.choice((0.5, 2.0, 5.0, 12.0, 25.0)), process.go_on)

    async def _restart(self, machine: Machine) -> None:
        await self.site.restart()

    async def _clock(self, machine: Machine) -> None:
        machine.clock_offset_s += self.dice.choice((-86_400.0, -3600.0, -5.0, 5.0, 3600.0, 86_400.0))

    # ---- networks

    async def _cut(self, machine: Machine) -> None:
        self.world.network.cut("a", "b")
        self.world.network.cut("b", "a")

    async def _cut_one_way(self, machine: Machine) -> None:
        self.world.network.cut(machine.name, machine.other.name)

    async def _isolate(self, machine: Machine) -> None:
        await self._cut(machine)
        self.world.parted.add(machine.name)
        self.world.arbiter.cut_off.add(machine.name)

    async def _part(self, machine: Machine) -> None:
        self.world.parted.add(machine.name)

    async def _beats_are_lost(self, machine: Machine) -> None:
        self.world.beat_loss = self.dice.choice((0.3, 1.0))

    async def _heal(self, machine: Machine) -> None:
        self.world.network.heal()
        self.world.parted.clear()
        self.world.beat_loss = 0.0

    # ---- the arbiter

    async def _arbiter_down(self, machine: Machine) -> None:
        self.world.arbiter.is_down = True

    async def _arbiter_lossy(self, machine: Machine) -> None:
        self.world.arbiter.loss = 0.4

    async def _arbiter_away(self, machine: Machine) -> None:
        self.world.arbiter.cut_off.add(machine.name)

    async def _arbiter_back(self, machine: Machine) -> None:
        self.world.arbiter.heal()

    async def _arbiter_restored(self, machine: Machine) -> None:
        self.site.may_split = self.site.needs_a_person = True
        self.world.arbiter.restore()

    async def _arbiter_replaced(self, machine: Machine) -> None:
        self.world.arbiter.replace()

    async def _lag(self, machine: Machine) -> None:
        """The arbiter is away while both get in sync again; when they are parted once more it still holds the epoch in which
        one was alone."""
        if self.dice.random() < 0.5:
            await self._cut(machine)
            await trio.sleep(6.0)
        self.world.arbiter.is_down = True
        await self._heal(machine)
        await self.site.restart()
        await trio.sleep(4.0)
        await self._cut(machine)
        await trio.sleep(3.0)
        self.world.arbiter.heal()

    # ---- controllers, services, people

    async def _controller_crash(self, machine: Machine) -> None:
        machine.kill_controller()

    async def _service_crash(self, machine: Machine) -> None:
        if machine.service is not None:
            machine.service.crash()

    async def _service_breaks(self, machine: Machine) -> None:
        machine.service_is_broken = True
        await self._service_crash(machine)

    async def _switch_over(self, machine: Machine) -> None:
        self._ask(machine, "switchover")

    async def _take_it(self, machine: Machine) -> None:
        self._ask(machine, "promote")

    async def _maintenance(self, machine: Machine) -> None:
        self._ask(machine, "maintenance")

    async def _moves_in_maintenance(self, machine: Machine) -> None:
        """To a node that cannot start the service, or by a controller that has not taken it up; and back."""
        self._ask(machine, "maintenance")
        await trio.sleep(1.0)
        if self.dice.random() < 0.5:
            machine.other.service_is_broken = True
        else:
            machine.kill_controller()
            await self.site.restart()
        for _ in range(2):
            await trio.sleep(self.dice.choice((1.0, 3.0)))
            self._ask(machine, "switchover")
            await trio.sleep(self.dice.choice((2.0, 8.0)))

    def _ask(self, machine: Machine, command: str) -> None:
        process, controller = machine.controller, self.site.controller_of(machine)
        if process is None or controller is None:
            return

        async def ask() -> None:
            with process.entered():
                await trio.lowlevel.checkpoint()
                with suppress(MirrorfsError):
                    answer = await controller.on_command(command, {"on": True})
                    self.world.note(f"{process.name}: {answer['message']}")

        self.world.nursery.start_soon(ask)


async def story(world: World) -> None:
    """Rounds of trouble; after each everything around is mended, and clients are served again with nobody's help."""
    dice = random.Random(f"failover story {world.seed}")
    site = Site(world, preferred=dice.choice(("", "", "", "a")), max_failovers=dice.choice((1, 3, 10)))
    nemesis = Nemesis(site)
    await site.open()
    if not world.options.arbiter:
        site.may_split = site.needs_a_person = True
    for _ in range(dice.randint(1, 2)):
        await trio.sleep(dice.uniform(0, 2))
        for _ in range(dice.randint(1, 6)):
            await nemesis.strike()
            await trio.sleep(dice.choice(_PAUSES_S))
            _check_history(site)
        await site.make_whole()
        _check_history(site)
        await site.quiet()
        site.needs_a_person = site.may_split = not world.options.arbiter


def _check_history(site: Site) -> None:
    """With an arbiter there is one history, unless a person forced another."""
    site.world.judge()
    nodes = [machine.node for machine in (site.a, site.b) if machine.node is not None]
    if site.may_split or any(epoch.forced for node in nodes for epoch in node.keeper.record.epochs):
        return
    for node in nodes:
        if node.split_brain:
            site.world.blame(f"a split brain in spite of the arbiter: {node.split_brain}")
    site.world.judge()
