"""A random run: applications that write, and a nemesis that does what happens to servers, in rounds."""

import math
import random
from contextlib import suppress
from typing import Final

import trio

from mirrorfs.errors import MirrorfsError
from tests.sim.machine import Machine, Snapshot
from tests.sim.pair import Pair
from tests.sim.world import Options, World

LABELS: Final = (
    *("record:open", "record:rename", "record:fsync-directory", "ids:rename"),
    *("dirty-append:write", "dirty-append:fsync", "dirty:rename", "dirty:fsync-directory"),
    *("call:syncfs", "call:syncfs", "call:syncfs", "call:fsync", "call:hashes"),
    *("sent:JOIN", "sent:JOINED", "sent:FOLLOW", "sent:FOLLOWING", "sent:HANDOVER", "sent:CHECKPOINT", "sent:CHECKPOINTED"),
    *("sent:FLUSHED", "sent:ACK", "sent:WRITE", "sent:RENAME", "sent:GATHER", "sent:GATHERED", "sent:ENTRY"),
    *("sent:NAMES_EQUAL", "sent:REFRESH", "sent:COPY_DATA", "sent:HOT", "sent:INTRODUCE", "sent:MAKE_NODE", "sent:UNLINK"),
    *("sent:VANISH", "sent:DIRECTORY_DONE", "sent:COMPARE", "sent:HASHES", "sent:WHOLE", "sent:WANTED"),
)


def options_of(seed: int) -> Options:
    """How the pair of a seed is configured."""
    dice = random.Random(f"options {seed}")
    return Options(
        checkpoint_interval_s=dice.choice((0.5, 2.0, 10.0)),
        on_peer_loss=dice.choice(("continue", "continue", "continue", "freeze")),
        descriptors=dice.choice((20_000, 20_000, 40)),
        resync_bytes_per_s=dice.choice((math.inf, 2e6, 2e5)),
    )


class Nemesis:
    """Does what happens to servers, at random."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.world = pair.world
        self.dice = random.Random(f"nemesis {pair.world.seed}")
        self.snapshots: dict[str, Snapshot] = {}

    async def strike(self) -> None:
        """One thing that happens."""
        what = self.dice.choice(
            [self._crash] * 3
            + [self._lose_power] * 3
            + [self._lose_both] * 2
            + [self._cut] * 3
            + [self._cut_one_way, self._heal, self._heal]
            + [self._trap] * 5
            + [self._start] * 4
            + [self._fail_over] * 4
            + [self._hand_over] * 2
            + [self._stop, self._snapshot, self._restore, self._fill, self._slow]
        )
        await what(self.dice.choice((self.pair.a, self.pair.b)))

    async def _crash(self, machine: Machine) -> None:
        self.world.note(f"nemesis: kill {machine.name}")
        machine.crash()

    async def _lose_power(self, machine: Machine) -> None:
        self.world.note(f"nemesis: {machine.name} loses power")
        machine.lose_power()

    async def _lose_both(self, machine: Machine) -> None:
        await self._lose_power(machine)
        await self._lose_power(self.pair.other(machine))

    async def _cut(self, machine: Machine) -> None:
        self.world.note("nemesis: cut the network")
        self.world.network.cut("a", "b")
        self.world.network.cut("b", "a")

    async def _cut_one_way(self, machine: Machine) -> None:
        other = self.pair.other(machine)
        self.world.note(f"nemesis: cut the network from {machine.name} to {other.name}")
        self.world.network.cut(machine.name, other.name)

    async def _heal(self, machine: Machine) -> None:
        self.world.note("nemesis: heal the network")
        self.world.network.heal()

    async def _trap(self, machine: Machine) -> None:
        label, what = self.dice.choice(LABELS), self.dice.choice(("crash", "power"))
        self.world.note(f"nemesis: {what} of {machine.name} at the next {label}")
        machine.traps[label] = what

    async def _start(self, machine: Machine) -> None:
        for each in (machine, self.pair.other(machine)):
            if each.process is None:
                await each.start()
                return

    async def _fail_over(self, machine: Machine) -> None:
        """What a controller or a person does that knows better than the nodes."""
        if not self.world.serving() and self.pair.may_be_promoted(machine):
            with suppress(MirrorfsError):
                await self.pair.promote(machine)

    async def _hand_over(self, machine: Machine) -> None:
        node = machine.node
        if self.pair.is_mirrored and node is not None and node.primary is None:
            with suppress(MirrorfsError):
                await self.pair.promote(machine, yes=False)

    async def _stop(self, machine: Machine) -> None:
        self.world.note(f"nemesis: stop {machine.name}")
        await machine.stop()

    async def _snapshot(self, machine: Machine) -> None:
        self.world.note(f"nemesis: snapshot of {machine.name}")
        self.snapshots[machine.name] = machine.snapshot()

    async def _restore(self, machine: Machine) -> None:
        """A snapshot is put back while the other node serves and will bring this one up to date."""
        snapshot = self.snapshots.pop(machine.name, None)
        if snapshot is not None and self.pair.primary is self.pair.other(machine):
            state = self.dice.random() < 0.5
            machine.crash()
            self.world.note(f"nemesis: {machine.name} is restored from a snapshot, " + ("state too" if state else "data only"))
            machine.restore(snapshot, state=state)

    async def _fill(self, machine: Machine) -> None:
        machine.data.capacity_blocks = machine.data.used_blocks + self.dice.randint(0, 20)
        self.world.note(f"nemesis: the disk of {machine.name} has room for {machine.data.capacity_blocks} blocks")

    async def _slow(self, machine: Machine) -> None:
        machine.data.delay_s = self.dice.choice((0.05, 0.5))
        self.world.note(f"nemesis: the disk of {machine.name} takes {machine.data.delay_s:g} s")


async def story(world: World) -> None:
    """Rounds of writing and trouble; after each, everything is mended and checked."""
    pair = Pair(world)
    nemesis = Nemesis(pair)
    dice = random.Random(f"story {world.seed}")
    await pair.up()
    pause_s = dice.choice((0.005, 0.05, 0.3))
    for application in pair.applications:
        world.nursery.start_soon(application.run, pause_s)
    world.nursery.start_soon(_write_back, world)
    for _ in range(dice.randint(2, 5)):
        for application in pair.applications:
            application.budget = dice.choice((20, 50, 100))
        await trio.sleep(dice.uniform(0, 60) * pause_s)
        for _ in range(dice.randint(1, 6)):
            await nemesis.strike()
            await trio.sleep(dice.choice((0.0, 0.001, 0.01, 0.1, 1.0, 3.0)))
            world.judge()
        await pair.make_whole()
        await pair.quiet()


async def _write_back(world: World) -> None:
    """What kernels do by themselves."""
    dice = random.Random(f"write back {world.seed}")
    while True:
        await trio.sleep(dice.uniform(0, 4))
        machine = dice.choice(list(world.machines.values()))
        for disk in (machine.data, machine.state):
            disk.write_back()
