"""A machine with two disks, and the processes of mirrorfs that run on it, one after the other."""

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from mirrorfs.activity import Activity
from mirrorfs.backing import Backing
from mirrorfs.config import Config, NodeConfig, ReplicationConfig, ResyncConfig
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.errors import JournalError, MirrorfsError
from mirrorfs.failover_config import ArbiterConfig
from mirrorfs.journal import Journal
from mirrorfs.keeper import Keeper
from mirrorfs.node import Node
from tests.sim.arbiter import SimulatedArbiter
from tests.sim.disk import Disk, Image, failure
from tests.sim.kernel import running

if TYPE_CHECKING:
    from tests.sim.world import World

NAMES: Final = ("a", "b")
_EIO: Final = 5


class Process:
    """One run of mirrorfs. `traps` are labels of calls, and what happens to the machine there."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self.machine = machine
        self.name = f"{machine.name}.{number}"
        self.dead = False
        self.node: Node | None = None
        self.stop = trio.Event()
        self.ended = trio.Event()
        self.failure: MirrorfsError | None = None
        self.scope = trio.CancelScope()
        self.calls: set[trio.CancelScope] = set()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A system call of an application: it ends at the latest when the process does."""
        with trio.CancelScope() as scope:
            self.calls.add(scope)
            try:
                yield
            finally:
                self.calls.discard(scope)

    def at(self, label: str) -> None:
        """Called at each label of the journals and after each frame that was sent."""
        what = self.machine.traps.pop(label, None)
        if what is not None and not self.dead:
            self.machine.world.note(f"{self.machine.name}: {what} at {label}")
            if what == "power":
                self.machine.lose_power()
            else:
                self.machine.crash()
        if self.dead:
            raise failure(_EIO)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot of a machine's volumes holds."""

    data: Image
    state: Image


class Machine:
    """One server. `lost_memory` says that power was lost since it was last known to have everything."""

    def __init__(self, world: "World", name: str, dice: random.Random) -> None:
        self.world = world
        self.name = name
        self.data = Disk(dice)
        self.state = Disk(dice)
        self.process: Process | None = None
        self.lost_memory = False
        self.traps: dict[str, str] = {}
        self._dice = dice
        self._boot = 1
        self._count = 0

    @property
    def node(self) -> Node | None:
        """The node that runs here, once it does."""
        return self.process.node if self.process is not None and not self.process.dead else None

    @property
    def boot(self) -> str:
        """This boot of the machine."""
        return f"boot-{self.name}-{self._boot}"

    # ---- what happens to it

    async def start(self, *, discard_local_data: bool = False) -> None:
        """Start mirrorfs; returns when it serves, or has ended."""
        assert self.process is None, self.name
        self._count += 1
        process = self.process = Process(self, self._count)
        self.world.note(f"{self.name}: starts" + (" with --discard-local-data" if discard_local_data else ""))
        await self.world.nursery.start(self._run, process, discard_local_data)

    def crash(self) -> None:
        """kill -9."""
        self._end(told=True)

    def lose_power(self) -> None:
        """The machine goes down, and what is in its memory with it."""
        self._end(told=False)
        self.data.lose_power()
        self.state.lose_power()
        self._boot += 1
        self.lost_memory = True

    def _end(self, *, told: bool) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.dead = True
            process.scope.cancel()
            for scope in list(process.calls):
                scope.cancel()
            self.world.network.drop(process, told=told)
            self.world.kernel.close_all(process)

    async def stop(self) -> None:
        """A clean end."""
        process = self.process
        if process is not None:
            process.stop.set()
            await process.ended.wait()

    def snapshot(self) -> Snapshot:
        """A snapshot of both disks, as of this moment."""
        return Snapshot(self.data.snapshot(), self.state.snapshot())

    def restore(self, snapshot: Snapshot, *, state: bool) -> None:
        """Put a snapshot back, of the data and perhaps of the state too."""
        assert self.process is None
        self.data.restore(snapshot.data)
        if state:
            self.state.restore(snapshot.state)
        self._boot += 1
        self.lost_memory = True

    def forget(self) -> None:
        """A person has moved the state directory away."""
        assert self.process is None
        self.state = Disk(self._dice)

    def copy_of_data(self) -> Image:
        """The files as the machine sees them now."""
        return copy.deepcopy(self.data.now)

    # ---- one run

    def _config(self) -> Config:
        def node(name: str) -> NodeConfig:
            return NodeConfig(name, name, 1, None, Path("/"), Path("/"), Path("/"), (name,))

        other = NAMES[1 - NAMES.index(self.name)]
        options = self.world.options
        return Config(
            Path("mirrorfs.toml"),
            "data",
            node(self.name),
            node(other),
            ReplicationConfig(checkpoint_interval_s=options.checkpoint_interval_s, on_peer_loss=options.on_peer_loss),
            resync=ResyncConfig(rate_limit_bytes_per_s=options.resync_bytes_per_s),
            arbiter=ArbiterConfig(kind="etcd" if options.arbiter else "none"),
        )

    async def _run(
        self, process: Process, discard_local_data: bool, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        running.set(process)
        started = False
        try:
            with process.scope:
                async with trio.open_nursery() as nursery:
                    node = self._node(process, nursery, discard_local_data)
                    await node.check_tree()
                    process.node = node
                    await node.begin(nursery)
                    task_status.started()
                    started = True
                    await process.stop.wait()
                    if process.failure is None:
                        await node.finish()
                    nursery.cancel_scope.cancel()
        except MirrorfsError as error:
            process.failure = error
        except BaseException as error:
            if not process.dead:
                if isinstance(error, Exception):
                    self.world.blame(f"{self.name}: mirrorfs ended with {error!r}", error)
                else:
                    raise
        finally:
            if self.process is process:
                self.world.note(f"{self.name}: ended" + (f": {process.failure}" if process.failure else ""))
                self._end(told=True)
            process.ended.set()
            if not started:
                task_status.started()

    def _node(self, process: Process, nursery: trio.Nursery, discard_local_data: bool) -> Node:
        kernel = self.world.kernel
        state = kernel.mount(process.name, self.state, process)
        journal = Journal(state, at=process.at)  # type: ignore[arg-type]  # a path on a simulated disk
        keeper = Keeper(journal, self.name, NAMES.index(self.name))
        keeper.boot = self.boot

        def failed(error: JournalError) -> None:
            process.failure = process.failure or error
            process.stop.set()

        keeper.failed = failed
        activity = Activity(DirtyLog(state, at=process.at), keeper)  # type: ignore[arg-type]
        roots = [kernel.open_root(self.data, name, process) for name in (b"tree", b"orphans")]
        under = Backing(Path("/"), roots[0], roots[1], -1, -1)
        arbiter = SimulatedArbiter(self.world.arbiter, self.name) if self.world.options.arbiter else None
        return Node(self._config(), under, keeper, activity, nursery, discard_local_data=discard_local_data, arbiter=arbiter)
