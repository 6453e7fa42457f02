"""A machine with two disks, and the processes of mirrorfs that run on it, one after the other."""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from tests.sim.disk import Disk, Image
from tests.sim.kernel import running
from tests.sim.processes import Process

if TYPE_CHECKING:
    from tests.sim.controllers import ControllerProcess, SimulatedHeart
    from tests.sim.services import Service
    from tests.sim.world import World

NAMES: Final = ("a", "b")


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
        self.clock_offset_s = 0.0
        self.controller: ControllerProcess | None = None
        self.controller_memory: dict[str, Any] = {}
        self.service: Service | None = None
        self.service_is_broken = False
        #: Until when the kernel keeps the virtual address.
        self.address_until = 0.0
        self._dice = dice
        self._boot = 1
        self._count = 0

    @property
    def node(self) -> Node | None:
        """The node that runs here, once it does."""
        return self.process.node if self.process is not None and not self.process.dead else None

    @property
    def other(self) -> "Machine":
        """The other one."""
        (other,) = (machine for machine in self.world.machines.values() if machine is not self)
        return other

    @property
    def heart(self) -> "SimulatedHeart | None":
        """The heartbeats of the controller that runs here."""
        return self.controller.heart if self.controller is not None else None

    @property
    def has_address(self) -> bool:
        """Whether the virtual address is here."""
        return trio.current_time() < self.address_until

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
        self.kill_controller()
        if self.service is not None:
            self.service.end()
            self.service = None
        self.address_until = 0.0
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
            process.go_on()
            self.world.network.drop(process, told=told)
            self.world.kernel.close_all(process)

    def lose_disks(self) -> None:
        """The machine is replaced by a new one of the same name."""
        self.lose_power()
        self.data, self.state = Disk(self._dice), Disk(self._dice)
        self.controller_memory = {}
        self.lost_memory = False

    def kill_controller(self) -> None:
        """SIGKILL; its addresses and its service stay."""
        controller, self.controller = self.controller, None
        if controller is not None:
            self.world.note(f"{controller.name}: is killed")
            controller.end()

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

    def config(self) -> Config:
        """How its node is configured."""

        def node(name: str) -> NodeConfig:
            return NodeConfig(name, name, 1, None, Path("/"), Path("/"), Path("/"), (name,), Path("/"))

        other = NAMES[1 - NAMES.index(self.name)]
        options = self.world.options
        return Config(
            Path("mirrorfs.toml"),
            "data",
            node(self.name),
            node(other),
            ReplicationConfig(checkpoint_interval_s=options.checkpoint_interval_s, on_peer_loss=options.on_peer_loss),
            resync=ResyncConfig(rate_limit_bytes_per_s=options.resync_bytes_per_s),
            arbiter=ArbiterConfig(kind="etcd" if options.arbiter else "none", allow_unarbitrated=options.allow_unarbitrated),
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
        return Node(self.config(), under, keeper, activity, nursery, discard_local_data=discard_local_data, arbiter=arbiter)
