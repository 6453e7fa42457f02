"""A random run of a pair with an arbiter and with nobody who decides: each node asks for the role by itself."""

import random
from contextlib import suppress
from typing import Final

import trio

from mirrorfs.errors import MirrorfsError
from tests.sim.machine import Machine
from tests.sim.pair import Pair
from tests.sim.random_run import LABELS
from tests.sim.world import Options, World

_ASK_S: Final = 0.5


def options_of(seed: int) -> Options:
    """How the pair of a seed is configured."""
    dice = random.Random(f"arbitrated {seed}")
    return Options(checkpoint_interval_s=dice.choice((0.5, 2.0, 10.0)), arbiter=True)


class Nemesis:
    """What happens to two servers and their arbiter."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.world = pair.world
        self.dice = random.Random(f"arbitrated nemesis {pair.world.seed}")

    async def strike(self) -> None:
        """One thing that happens."""
        machine = self.dice.choice((self.pair.a, self.pair.b))
        what = self.dice.choice(
            ["cut"] * 4 + ["cut one way", "isolate", "isolate", "isolate", "crash", "crash", "power", "heal", "heal"]
            + ["arbiter down", "arbiter lossy", "arbiter away", "arbiter away", "arbiter back"]
            + ["trap", "trap", "start", "start", "hand over", "lag"]
        )  # fmt: skip
        self.world.note(f"nemesis: {what} {machine.name}")
        network, store, other = self.world.network, self.world.arbiter, self.pair.other(machine)
        match what:
            case "cut" | "isolate":
                network.cut("a", "b")
                network.cut("b", "a")
                if what == "isolate":
                    store.cut_off.add(machine.name)
            case "cut one way":
                network.cut(machine.name, other.name)
            case "crash":
                machine.crash()
            case "power":
                machine.lose_power()
            case "heal":
                network.heal()
            case "arbiter down":
                store.is_down = True
            case "arbiter lossy":
                store.loss = 0.4
            case "arbiter away":
                store.cut_off.add(machine.name)
            case "arbiter back":
                store.heal()
            case "trap":
                machine.traps[self.dice.choice(LABELS)] = self.dice.choice(("crash", "power"))
            case "start":
                for each in (machine, other):
                    if each.process is None:
                        await each.start()
            case "lag":
                await self._grow_while_the_arbiter_is_away()
            case "hand over":
                if self.pair.is_mirrored and machine.node is not None and machine.node.primary is None:
                    with suppress(MirrorfsError):
                        await self.pair.promote(machine, yes=False)

    async def _grow_while_the_arbiter_is_away(self) -> None:
        """It comes back when the two cannot see each other again: what it holds is the epoch of before."""
        network, store = self.world.network, self.world.arbiter
        store.is_down = True
        network.heal()
        for each in (self.pair.a, self.pair.b):
            if each.process is None:
                await each.start()
        await trio.sleep(4.0)
        network.cut("a", "b")
        network.cut("b", "a")
        await trio.sleep(3.0)
        store.heal()


async def ask_for_ever(pair: Pair, machine: Machine) -> None:
    """What the controller of a node does: ask for the role whenever the other node is lost."""
    while True:
        await trio.sleep(_ASK_S)
        node, process = machine.node, machine.process
        if node is None or process is None or node.primary is not None or node.connected or node.keeper.record.epoch is None:
            continue
        with suppress(MirrorfsError), process.entered(), process.call():
            await node.promotion.promote(yes=False, force=False, automatic=True)
            pair.world.note(f"{machine.name}: promoted by itself")


async def story(world: World) -> None:
    """Rounds of writing and trouble; after each the network is mended, and the pair becomes whole with nobody's help."""
    pair = Pair(world, applications=1)
    nemesis = Nemesis(pair)
    dice = random.Random(f"arbitrated story {world.seed}")
    await pair.up()
    for machine in (pair.a, pair.b):
        world.nursery.start_soon(ask_for_ever, pair, machine)
    world.nursery.start_soon(pair.applications[0].run, 0.05)
    for _ in range(dice.randint(1, 2)):
        pair.applications[0].budget = 20
        await trio.sleep(dice.uniform(0, 2))
        for _ in range(dice.randint(1, 5)):
            await nemesis.strike()
            await trio.sleep(dice.choice((0.0, 0.01, 0.5, 2.0, 4.0)))
            _check_history(pair)
        world.arbiter.heal()
        await pair.make_whole()
        _check_history(pair)
        await pair.quiet()


def _check_history(pair: Pair) -> None:
    """With an arbiter there is one history, unless a person forced another."""
    pair.world.judge()
    nodes = [machine.node for machine in (pair.a, pair.b) if machine.node is not None]
    if any(epoch.forced for node in nodes for epoch in node.keeper.record.epochs):
        return
    for node in nodes:
        if node.split_brain:
            pair.world.blame(f"a split brain in spite of the arbiter: {node.split_brain}")
    pair.world.judge()
