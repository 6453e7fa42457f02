"""What people do to a pair: start it, promote, mend what is broken; and what must be true when all is quiet."""

import random
from collections.abc import Callable
from typing import Final

import trio

from mirrorfs.core.epochs import Standing
from mirrorfs.core.modes import Mode
from mirrorfs.errors import ConfirmationNeededError, MirrorfsError, RefusedError
from mirrorfs.node import Node
from mirrorfs.status import describe
from tests.sim.application import Application, found_on
from tests.sim.machine import Machine
from tests.sim.world import Violation, World

_PATIENCE_S: Final = 300.0
_LOOK_S: Final = 0.5
#: How long nodes are left to find together before a person acts.
_WAIT_S: Final = 8.0


class Pair:
    """Both machines of a world, and the applications."""

    def __init__(self, world: World, applications: int = 2) -> None:
        self.world = world
        self.a, self.b = world.machines.values()
        self._are_running = False
        self.dice = random.Random(f"operator {world.seed}")
        self.applications = [
            Application(world, b"c%d" % number, random.Random(f"application {number} {world.seed}"))
            for number in range(applications)
        ]

    # ---- looking

    async def until(
        self, condition: Callable[[], bool], what: str, *, patience_s: float = _PATIENCE_S, look_s: float = 0.05
    ) -> None:
        """Wait for something; Violation if it does not come."""
        end = trio.current_time() + patience_s
        while not condition():
            self.world.judge()
            if trio.current_time() > end:
                states = ", ".join(f"{name}: {self.state(machine)}" for name, machine in self.world.machines.items())
                raise Violation(f"waited {patience_s:g} s for {what} ({states})")
            await trio.sleep(look_s)

    @staticmethod
    def state(machine: Machine) -> str:
        """What a machine says of itself."""
        node = machine.node
        return "down" if node is None else f"{node.state} ({node.split_brain or node.reason})"

    def other(self, machine: Machine) -> Machine:
        """The other machine."""
        return self.b if machine is self.a else self.a

    @property
    def primary(self) -> Machine | None:
        """The machine that serves, if there is exactly one."""
        serving = self.world.serving()
        return serving[0] if len(serving) == 1 else None

    @property
    def is_mirrored(self) -> bool:
        """Whether one node serves and the other is its standby."""
        machine = self.primary
        if machine is None or machine.node is None or machine.node.primary is None:
            return False
        standby = self.other(machine).node
        if machine.node.primary.mode is not Mode.MIRRORED or not machine.node.peer_joined:
            return False
        return standby is not None and standby.standby is not None and standby.standby.in_sync

    # ---- acting

    async def up(self) -> None:
        """Start both, make the volume on the first, and wait until they are mirrored."""
        for machine in (self.a, self.b):
            await machine.start()
        await self.until(lambda: self.a.node is not None and self.a.node.connected, "the first meeting")
        await self.promote(self.a)
        await self.mirrored()

    async def mirrored(self) -> None:
        """Wait until the pair is mirrored."""
        await self.until(lambda: self.is_mirrored, "the pair to be mirrored")

    async def promote(self, machine: Machine, *, yes: bool = True, force: bool = False) -> str:
        """`mirrorfs promote` on a machine."""
        node = machine.node
        assert node is not None
        self.world.note(f"{machine.name}: promote" + " --yes" * yes + " --force" * force)
        process = machine.process
        assert process is not None
        try:
            answer = ""
            with process.entered(), process.call():
                answer = await node.promotion.promote(yes=yes, force=force)
        except MirrorfsError as error:
            self.world.note(f"{machine.name}: {type(error).__name__}: {error}")
            raise
        self.world.note(f"{machine.name}: {answer}")
        if not process.dead and node.keeper.record.epoch is not None:
            self.world.promoted.add(node.keeper.record.epoch.tag)
        return answer

    def may_be_promoted(self, machine: Machine) -> bool:
        """Whether the one who sees everything knows that nothing that was acknowledged is missing there."""
        node, other = machine.node, self.other(machine)
        if node is None or node.keeper.record.epoch is None or node.keeper.record.standing is not Standing.IN_SYNC:
            return False
        if machine.lost_memory or not node.keeper.record.epoch.has(machine.name):
            return False
        ours = self.world.ledger_of(node.keeper.record)
        record = other.node.keeper.record if other.node is not None else self.world.record_of(other)
        return not self.world.claim_of(other, record).missing_in(ours)

    async def furnished(self) -> Application:
        """Start both, and let an application make a few directories that a checkpoint covers; returns it."""
        await self.up()
        application = self.applications[0]
        application.use(self.a)
        await application.make_directory(None, application.name)
        for name in (b"x", b"y", b"z"):
            await application.make_directory(application.find(), name)
        await self.checkpoint()
        return application

    async def checkpoint(self) -> None:
        """Let a checkpoint pass."""
        await trio.sleep(2 * self.world.options.checkpoint_interval_s + 1)

    async def write_for(self, seconds: float) -> None:
        """Let the applications write for a while; they write on afterwards."""
        if not self._are_running:
            self._are_running = True
            for application in self.applications:
                self.world.nursery.start_soon(application.run, 0.02)
        for application in self.applications:
            application.budget = 60
        await trio.sleep(seconds)

    async def fail_over(self, machine: Machine) -> None:
        """Promote a machine when its node has noticed that the other is gone."""
        await self.until(lambda: machine.node is not None and not machine.node.connected, "the other's loss to be noticed")
        await self.promote(machine)

    async def solo(self, machine: Machine) -> None:
        """Wait until a machine's node serves alone."""
        await self.until(lambda: machine.node is not None and machine.node.state == "solo", f"{machine.name} to be alone")

    async def down(self, machine: Machine) -> None:
        """Wait until a machine is down."""
        await self.until(lambda: machine.process is None, f"{machine.name} to be down")

    # ---- mending

    async def make_whole(self) -> None:
        """Heal the network, start what is down, promote where a person must, until the pair is mirrored."""
        self.heal()
        end, waited = trio.current_time() + _PATIENCE_S, 0.0
        while not self.is_mirrored:
            self.world.judge()
            if trio.current_time() > end:
                states = ", ".join(f"{name}: {self.state(machine)}" for name, machine in self.world.machines.items())
                raise Violation(f"the pair does not become whole again ({states})")
            for machine in self.world.machines.values():
                if machine.process is None:
                    await machine.start()
            await trio.sleep(_LOOK_S)
            waited = 0.0 if self.primary is not None and not self.is_split else waited + _LOOK_S
            if waited > _WAIT_S:
                await self.decide()
                waited = 0.0

    def heal(self) -> None:
        """Mend what surrounds the nodes."""
        self.world.network.heal()
        for machine in self.world.machines.values():
            machine.traps.clear()
            machine.data.capacity_blocks = None
            machine.data.delay_s = 0.0
            machine.data.fails_to_sync = machine.data.fails_to_punch = machine.data.fails_to_write = False

    @property
    def is_split(self) -> bool:
        """Whether a node says that there are two histories."""
        return any(machine.node is not None and machine.node.split_brain for machine in (self.a, self.b))

    async def decide(self) -> None:
        """What a person does about a pair that nobody serves."""
        if self.is_split:
            await self._end_split()
            return
        nodes = [machine for machine in (self.a, self.b) if machine.node is not None]
        for machine in sorted(nodes, key=self.may_be_promoted, reverse=True):
            try:
                await self.promote(machine)
                return
            except RefusedError as error:
                if "no answer" in str(error):
                    return  # from the arbiter, yet
                if self.may_be_promoted(machine) and len(nodes) == 2 and "nobody knows" not in str(error):
                    self.world.blame(f"a promotion of {machine.name} is refused without need: {error}")
            except MirrorfsError:
                return  # not now
        # Nobody has everything: a person takes what there is.
        self.world.may_lose = True
        best = max(nodes, key=self._worth)
        if best.node is not None:
            self.world.note(f"{best.name}: nobody has everything")
            await self.promote(best, force=True)
        self.world.may_lose = False

    async def _end_split(self) -> None:
        """A person chooses one side of a split brain."""
        self.check_split()
        winner = self.primary or self.dice.choice((self.a, self.b))
        loser = self.other(winner)
        self.world.note(f"{winner.name} is to be kept")
        if self.primary is None:
            try:
                await self.promote(winner)
            except (RefusedError, ConfirmationNeededError):
                self.world.may_lose = True
                await self.promote(winner, force=True)
                self.world.may_lose = False
        await loser.stop()
        loser.forget()
        await loser.start(discard_local_data=True)

    def _worth(self, machine: Machine) -> tuple[bool, bool, bool]:
        """What a person looks at who has to take one side."""
        node = machine.node
        has_history = node is not None and node.keeper.record.epoch is not None
        return self.may_be_promoted(machine), has_history, not machine.lost_memory

    def check_split(self) -> None:
        """A split brain is one only if each side has what the other lacks, or a promotion was forced."""
        a, b = self.a.node, self.b.node
        if a is None or b is None:
            return
        records = a.keeper.record, b.keeper.record
        if any(epoch.forced for record in records for epoch in record.epochs) or self.world.was_reckless:
            return
        ledgers = [self.world.ledger_of(record) for record in records]
        causes = []
        for mine, other in ((0, 1), (1, 0)):
            # What was acknowledged counts even if it was lost since, and so does a promotion by hand, and what was under way.
            known = {epoch.tag for epoch in records[other].epochs}
            own = {epoch.tag for epoch in records[mine].epochs} - known
            has_acted = own & (self.world.promoted | self.world.acknowledged_by.keys() | self.world.awaited)
            may_have = (a, b)[mine].name in self.world.interrupted
            causes.append(bool(has_acted) or may_have or not ledgers[mine].seen <= ledgers[other].seen)
        if not all(causes):
            self.world.blame(f"a split brain without a cause: {a.split_brain or b.split_brain}")

    # ---- quiet

    async def quiet(self) -> None:
        """Let the applications pause, and check everything that can be seen of a pair that is mirrored."""
        for application in self.applications:
            await application.quiet()
        await self.make_whole()
        await self.until(self._is_settled, "the pair to settle")
        self.check_equal()
        for application in self.applications:
            application.paused = False
        self.world.judge()

    def _is_settled(self) -> bool:
        node = self.primary.node if self.primary is not None else None
        return node is not None and node.primary is not None and self.is_mirrored and node.primary.settled

    def check_equal(self) -> None:
        """Both trees are the same, hold what was acknowledged, and nobody says otherwise."""
        primary = self.primary
        assert primary is not None
        node, other = primary.node, self.other(primary)
        assert node is not None
        mine = found_on(primary)
        for difference in mine.differences(found_on(other)):
            self.world.blame(f"the trees of {primary.name} and {other.name} differ: {difference}")
        for problem in self.world.ledger_of(node.keeper.record).settle(mine, self.world.is_foreign):
            self.world.blame(f"{primary.name} lost something: {problem}")
        for machine in (primary, other):
            assert machine.node is not None
            self._check_status(machine.node)
        self.world.note("quiet: the trees are equal")

    def _check_status(self, node: Node) -> None:
        status = describe(node)
        if status["in_sync"] != ["a", "b"]:
            self.world.blame(f"{node.name} says that {status['in_sync']} are in sync, when both are")
