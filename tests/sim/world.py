"""Two machines, a network, a clock: all that a run consists of, and what it is checked against.

A `World` replaces, for as long as it is entered, what mirrorfs knows of the outside: system calls, time, threads, sockets, the
kernel's caches. Everything else is the code that runs in production. All chance comes from the seed.
"""

import contextlib
import functools
import hashlib
import importlib
import logging
import math
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final, Literal

import trio

from mirrorfs import backing, failover
from mirrorfs.core.epochs import Epoch, Record, Standing
from mirrorfs.core.modes import Mode
from mirrorfs.journal import Journal
from mirrorfs.keeper import Keeper
from mirrorfs.node import Node
from tests.sim.arbiter import ArbiterStore
from tests.sim.clock import SimulatedClock, deterministic
from tests.sim.disk import Disk
from tests.sim.kernel import Kernel, running
from tests.sim.ledger import Found, Ledger
from tests.sim.machine import NAMES, Machine
from tests.sim.network import Network, SimulatedLink, dial, greet
from tests.sim.processes import Process, Running

#: Rooms of mirrorfs that do not run in the simulator; all others get a simulated `os`, `time`, `shutil` and `backing`.
_OUTSIDE: Final = (
    *("arbiter", "backing", "checks", "cli", "commands", "config", "control", "daemon", "heartbeat", "journal_show", "lab"),
    *("kernel", "lost", "neighbours", "peer", "pyfuse3_session", "reactor", "services", "session", "vip", "watch"),
)
_SERVING: Final = (Mode.MIRRORED, Mode.ALONE, Mode.LOST)
_EIO: Final = 5
_LONGEST_S: Final = 3600.0
#: Controllers look less often than they do, which is all the same to them and faster.
_LOOK_S: Final = 0.25


class Violation(Exception):  # noqa: N818  # it is a finding, not an error
    """A promise was broken, or a run did not come to its end."""


@dataclass(frozen=True, slots=True)
class Options:
    """What differs between runs besides chance."""

    checkpoint_interval_s: float = 10.0
    on_peer_loss: Literal["continue", "freeze"] = "continue"
    descriptors: int = 20_000
    resync_bytes_per_s: float = math.inf
    arbiter: bool = False
    #: Without an arbiter: a standby may be promoted by itself all the same.
    allow_unarbitrated: bool = False


class _Notes(logging.Handler):
    """What mirrorfs logs, into the log of the run."""

    def __init__(self, world: "World") -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = running.get()
        if not isinstance(process, Running) or process.dead:
            return
        text = record.getMessage()
        self._world.note(f"{process.name}: {record.levelname.lower()}: {text}")
        if record.exc_info or "a defect" in text:
            self._world.blame(f"{process.name}: {text}", record.exc_info[1] if record.exc_info else None)


class World:
    """One run."""

    def __init__(self, seed: int, options: Options) -> None:
        self.seed = seed
        self.options = options
        self.dice = random.Random(f"world {seed}")
        self.nursery: trio.Nursery
        self.network: Network
        self.clock = SimulatedClock()
        self.kernel = Kernel(self._dice("kernel"), self.clock.current_time)
        self.arbiter = ArbiterStore(self, self._dice("arbiter"))
        self.machines = {name: Machine(self, name, self._dice(name)) for name in NAMES}
        #: The network of the clients: who is cut off from it, and who said last that the address is its.
        self.parted: set[str] = set()
        self.announced: Machine | None = None
        self.beats = self._dice("beats")
        self.beat_loss = 0.0
        self.services = self.controllers = 0
        self.events: list[str] = []
        self.is_followed = False
        self.story = trio.CancelScope()
        self.problems: list[str] = []
        self.ledgers: dict[str, Ledger] = {}
        #: Whether a person takes whatever is there, and whether one ever promoted against better knowledge.
        self.may_lose = False
        self.was_reckless = False
        self._threads = self._dice("threads")
        self.acknowledged_by: dict[str, str] = {}
        #: Tags of epochs that began while changes were under way: those may have been acknowledged in them.
        self.awaited: set[str] = set()
        #: Tags of epochs that began by a promotion without the other node: that counts as something acknowledged.
        self.promoted: set[str] = set()
        #: Machines that went down in the middle of one: whether it is on their disk nobody knows.
        self.interrupted: set[str] = set()
        self._used_ids: set[int] = set()
        #: Tags of epochs that began on a node that was not in sync: nothing is promised of what it holds.
        self._mixtures: set[str] = set()
        #: Processes whose disk knows durably that they are alone in an epoch.
        self._durable: set[tuple[str, str]] = set()
        self._operation = 0
        self._began = 0.0
        self.acknowledged = 0

    def _dice(self, name: str) -> random.Random:
        return random.Random(f"{name} {self.seed}")

    # ---- the log

    def note(self, text: str) -> None:
        """One line of the log of this run."""
        self.events.append(f"{trio.current_time() - self._began:9.4f} {text}")
        if self.is_followed:
            print(self.events[-1], flush=True)

    def blame(self, text: str, error: BaseException | None = None) -> None:
        """A promise was broken."""
        self.note(f"BROKEN: {text}")
        where = "".join(traceback.format_tb(error.__traceback__)[-6:]) if error is not None else ""
        self.problems.append(f"{text}\n{where}".rstrip())
        self.story.cancel()

    def judge(self) -> None:
        """Violation if anything has gone wrong so far."""
        if self.problems:
            raise Violation("\n".join(self.problems))

    @property
    def digest(self) -> str:
        """A hash of all events."""
        return hashlib.sha256("\n".join(self.events).encode()).hexdigest()

    # ---- what mirrorfs is given instead of the world

    @contextlib.asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Run in this world; everything that runs in it ends with it."""
        logger = logging.getLogger("mirrorfs")
        notes, level = _Notes(self), logger.level
        self._began = trio.current_time()
        with contextlib.ExitStack() as stack:
            for target, name, value in self._replacements():
                stack.callback(_put_back, target, name, vars(target).get(name))
                setattr(target, name, value)
            logger.addHandler(notes)
            logger.setLevel(logging.INFO)
            propagate, logger.propagate = logger.propagate, False
            try:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    self.network = Network(self._dice("network"), self.clock)
                    try:
                        yield
                    finally:
                        for machine in self.machines.values():
                            machine.crash()
                            machine.kill_controller()
                        nursery.cancel_scope.cancel()
            finally:
                logger.removeHandler(notes)
                logger.setLevel(level)
                logger.propagate = propagate

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        kernel = self.kernel
        calls = SimpleNamespace(
            Backing=backing.Backing,
            handle_of=kernel.handle_of,
            open_handle=kernel.open_handle,
            rename2=kernel.rename2,
            allocate=kernel.allocate,
            syncfs=kernel.syncfs,
        )
        limits = SimpleNamespace(RLIMIT_NOFILE=0, getrlimit=lambda _: (self.options.descriptors, self.options.descriptors))
        simulated = {"os": kernel, "time": kernel.time_module(), "shutil": kernel, "backing": calls}
        for module, name in _uses():
            yield module, name, simulated[name]
        yield trio, "sleep", self.clock.sleep
        for name in ("journal", "dirty_log"):
            yield _module(name), "open", kernel.open_stream
        yield _module("keeper"), "boot_id", lambda: ""
        yield _module("table"), "resource", limits
        yield _module("standby"), "_WRITE_BACK_BYTES", 64 << 10
        yield _module("resync.full"), "Survey", _Survey
        yield trio.to_thread, "run_sync", self._in_thread
        node = _module("node")
        yield node, "Link", SimulatedLink
        yield node, "greet", greet
        yield node, "listen", self._listen
        yield node, "dial", self._dial
        yield failover, "LOOK_S", _LOOK_S
        yield failover, "start_time", lambda pid: ""
        yield failover, "kill", lambda pid, started: self._kill(pid)
        yield Keeper, "begin", self._wrap_begin(Keeper.begin)
        yield Keeper, "adopt", self._wrap_adopt(Keeper.adopt)
        yield Node, "lead", self._wrap_lead(Node.lead)

    def _kill(self, pid: int) -> None:
        for machine in self.machines.values():
            if machine.process is not None and machine.process.pid == pid:
                machine.crash()

    def carries(self, network: int, sender: Machine, receiver: Machine) -> bool:
        """Whether a network, 0 that of the mounts and 1 that of the clients, brings something from one to the other."""
        if network == 0:
            return not self.network.cuts(sender.name, receiver.name)
        return not {sender.name, receiver.name} & self.parted

    @property
    def reached(self) -> Machine | None:
        """The machine that the address leads to."""
        having = [machine for machine in self.machines.values() if machine.has_address and machine.name not in self.parted]
        return self.announced if self.announced in having else having[0] if having else None

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any, limiter: Any = None) -> Any:
        """A worker thread: it takes a while, and nobody else notices before it is done."""
        process = running.get()
        await trio.lowlevel.checkpoint_if_cancelled()
        if limiter is None:
            return await self._call(process, function, arguments)
        async with limiter:
            return await self._call(process, function, arguments)

    async def _call(self, process: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        slow = process.machine.data.delay_s if isinstance(process, Process) else 0
        await self.clock.pass_by(self._threads.choice((0.0001, 0.001, 0.001, 0.01)) + slow)
        if isinstance(process, Process):
            process.at(f"call:{getattr(function, '__name__', '')}")
        result = function(*arguments)
        await self.clock.pass_by(self._threads.choice((0.0, 0.0001, 0.001)))
        return result

    async def _listen(
        self,
        address: str,
        port: int,
        visitor: Any,
        *,
        peer: str,
        is_connected: Callable[[], bool],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        process = running.get()
        assert isinstance(process, Process)
        task_status.started()
        await self.network.listen(process, visitor)

    async def _dial(self, own_address: str, address: str, port: int, visitor: Any) -> None:
        process = running.get()
        assert isinstance(process, Process)
        await dial(process, address, visitor)

    # ---- what is watched: epochs

    def _wrap_begin(self, original: Any) -> Any:
        async def begin(keeper: Keeper, *arguments: Any, **options: Any) -> Epoch:
            before = keeper.record
            epoch: Epoch = await original(keeper, *arguments, **options)
            # Another epoch may have begun since `before`, while this one waited for it.
            now = keeper.record
            self._on_epoch(self._machine_of(keeper), replace(before, epochs=now.epochs[: now.epochs.index(epoch)]), epoch)
            return epoch

        return begin

    def _wrap_adopt(self, original: Any) -> Any:
        async def adopt(keeper: Keeper, theirs: Record, standing: Standing, reason: str) -> None:
            before, machine = keeper.record, self._machine_of(keeper)
            node = machine.node
            if node is not None and not node.discard_local_data and before.epoch is not None and theirs.epoch is not None:
                self._check_overwritten(machine, before, theirs)
            await original(keeper, theirs, standing, reason)
            if standing is Standing.IN_SYNC:
                machine.lost_memory = False

        return adopt

    def _wrap_lead(self, original: Any) -> Any:
        async def lead(node: Node, *arguments: Any, **options: Any) -> None:
            await original(node, *arguments, **options)
            if node is self.machines[node.name].node:
                self._on_lead(node)

        return lead

    @staticmethod
    def _name_of(keeper: Keeper) -> str:
        return keeper.me().node

    def _machine_of(self, keeper: Keeper) -> Machine:
        return self.machines[self._name_of(keeper)]

    def ledger_of(self, record: Record) -> Ledger:
        """What a node with this record would have to hold if it was in sync."""
        known = None
        for epoch in record.epochs:
            if epoch.tag in self.ledgers:
                known = self.ledgers[epoch.tag]
            elif epoch is record.epoch:
                # Durable, though the node died before it knew.
                known = self.ledgers[epoch.tag] = known.copy() if known is not None else Ledger()
        return known if known is not None else Ledger()

    def claim_of(self, machine: Machine, record: Record) -> Ledger:
        """The same, less what a machine lost with its memory."""
        ledger = self.ledger_of(record)
        if machine.lost_memory:
            ledger = ledger.copy()
            ledger.lose_memory()
        return ledger

    def _on_epoch(self, machine: Machine, before: Record, epoch: Epoch) -> None:
        members = ",".join(sorted(member.node for member in epoch.in_sync))
        self.note(f"{machine.name}: epoch {epoch.number} {epoch.tag}: primary {epoch.primary}, in sync {members}")
        if machine.process is not None and machine.process.calls:
            self.awaited.add(epoch.tag)
        was_behind = before.epoch is not None and not before.epoch.has(machine.name)
        if machine.process is not None and epoch.tag not in self.ledgers:
            self.ledgers[epoch.tag] = self.claim_of(machine, before).copy()
            if before.standing is not Standing.IN_SYNC or (was_behind):
                self._mixtures.add(epoch.tag)

    def _check_overwritten(self, machine: Machine, before: Record, theirs: Record) -> None:
        # Whoever was granted the role alone may have lost power since: what it had and had not fsynced is gone, and this node,
        # which may have it still, cannot go on in its place.
        has_had = self.options.arbiter
        missing = self.claim_of(machine, before).missing_in(self.ledger_of(theirs), or_has_had=has_had)
        if missing and before.standing is Standing.IN_SYNC:
            self.blame(f"{machine.name} gives up what it acknowledged and the other does not have: {missing[:5]}")
        self._check_intact_leads(machine, before, theirs)

    def _check_intact_leads(self, machine: Machine, before: Record, theirs: Record) -> None:
        """In one epoch, who has all of it does not follow who lost some of it with its memory."""
        (other,) = (each for each in self.machines.values() if each is not machine)
        mine, epoch = before.epoch, theirs.epoch
        if mine is None or epoch is None or not mine.same(epoch) or not mine.has(machine.name):
            return
        if before.standing is Standing.IN_SYNC and not machine.lost_memory and other.lost_memory:
            lost = self.ledger_of(before).copy().settle(Found(other.data.now), self.is_foreign)
            if lost:
                self.blame(f"{machine.name} follows {other.name}, which lost what was acknowledged: {lost[:5]}")

    def _on_lead(self, node: Node) -> None:
        machine = self.machines[node.name]
        record = node.keeper.record
        assert record.epoch is not None
        ledger = self.ledger_of(record)
        found = Found(machine.data.now)
        if record.epoch.tag in self._mixtures and (record.epoch.forced or self.may_lose):
            ledger.take_over(found)
            return
        for problem in ledger.settle(found, self.is_foreign):
            self.blame(f"{node.name} leads in epoch {record.epoch.number} without what was acknowledged: {problem}")
        machine.lost_memory = False

    # ---- what is watched: acknowledgements

    def next_operation(self) -> int:
        self._operation += 1
        return self._operation

    def use_id(self, number: int) -> None:
        """A new file gets this id."""
        if number in self._used_ids:
            self.blame(f"the id {number:x} is given twice")
        self._used_ids.add(number)

    def is_foreign(self, number: int) -> bool:
        """Whether no application was given this id."""
        return number not in self._used_ids

    def on_acknowledged(self, process: Process, *, changes: bool) -> Epoch | None:
        """A change was acknowledged by a node just now; returns the epoch, None if the node has ended meanwhile."""
        node = process.node
        if process.dead or node is None:
            return None
        epoch = node.keeper.record.epoch
        assert epoch is not None
        name = self.acknowledged_by.setdefault(epoch.tag, node.name)
        if name != node.name:
            self.blame(f"{name} and {node.name} both acknowledge in epoch {epoch.number} {epoch.tag}")
        self.acknowledged += 1
        if changes and len(epoch.in_sync) == 1:
            self._check_alone_is_durable(process, epoch)
        self._check_serving()
        return epoch

    def _check_alone_is_durable(self, process: Process, epoch: Epoch) -> None:
        if (process.name, epoch.tag) in self._durable:
            return
        stable = self._record_on(process.machine.state)
        if not stable.remembers(epoch) or epoch.tag not in stable.wrote:
            self.blame(f"{process.name} acknowledges alone in epoch {epoch.number}, which its disk does not know of")
        self._durable.add((process.name, epoch.tag))

    def _record_on(self, disk: Disk, *, now: bool = False) -> Record:
        """What the state of a machine says, or would say after a loss of power."""
        copy = Disk(random.Random(0))
        copy.restore(disk.now if now else disk.stable)
        anybody = SimpleNamespace(dead=False, stopped=None)
        path = self.kernel.mount("look", copy, anybody)
        try:
            return Journal(path).load()  # type: ignore[arg-type]  # a path on a simulated disk
        finally:
            self.kernel.close_all(anybody)

    def record_of(self, machine: Machine) -> Record:
        """What a machine that is down would know if it started."""
        return self._record_on(machine.state, now=True)

    def serving(self) -> list[Machine]:
        """Machines whose node takes changes."""
        return [m for m in self.machines.values() if m.node and m.node.primary and m.node.primary.mode in _SERVING]

    def _check_serving(self) -> None:
        tags = [machine.node.keeper.record.epochs[-1].tag for machine in self.serving() if machine.node]
        if len(set(tags)) < len(tags):
            self.blame("both nodes serve in one epoch")


class _Survey:
    """Counts nothing: it is a thread, and only an estimate comes of it."""

    counted = None

    def __init__(self, root: int) -> None:
        pass

    def stop(self) -> None:
        pass


def _put_back(target: Any, name: str, original: Any) -> None:
    if original is None:
        delattr(target, name)
    else:
        setattr(target, name, original)


@functools.cache
def _uses() -> list[tuple[Any, str]]:
    """Where the modules that run in the simulator name what is simulated."""
    names = sorted(name for name in sys.modules if name.startswith("mirrorfs."))
    rooms = [sys.modules[name] for name in names if name.split(".")[1] not in _OUTSIDE]
    real = {"os": os, "time": time, "shutil": shutil, "backing": backing}
    return [(room, name) for room in rooms for name, module in real.items() if getattr(room, name, None) is module]


def _module(name: str) -> Any:
    return importlib.import_module(f"mirrorfs.{name}")


def run(seed: int, story: Callable[[World], Any], options: Options | None = None, *, follow: bool = False) -> World:
    """Run one story in a world of its own; `problems` of what it returns are the promises that were broken."""
    world = World(seed, options or Options())
    world.is_followed = follow

    async def main() -> None:
        try:
            async with world.entered():
                world.story.deadline = trio.current_time() + _LONGEST_S
                with world.story:
                    await story(world)
                if world.story.cancelled_caught and not world.problems:
                    world.blame("the run did not come to its end")
        except Exception as error:
            found = error
            while isinstance(found, ExceptionGroup):
                found = found.exceptions[0]
            if not isinstance(found, Violation):
                world.blame(f"{type(found).__name__}: {found}", found)
            elif not world.problems:
                world.blame(str(found))

    with deterministic(seed):
        trio.run(main, clock=world.clock)
    return world
