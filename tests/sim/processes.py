"""Processes on the machines: what happens to any of them, and those of `mirrorfs mount`."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import Task

from mirrorfs.errors import MirrorfsError
from mirrorfs.node import Node
from tests.sim.clock import let_run
from tests.sim.disk import failure
from tests.sim.kernel import running

if TYPE_CHECKING:
    from tests.sim.machine import Machine

_EIO: Final = 5


class Running:
    """A process on a machine: what happens to it whatever it is."""

    def __init__(self, machine: "Machine", name: str) -> None:
        self.machine = machine
        self.name = name
        self.pid = machine.world.next_operation()
        self.dead = False
        self.stopped: list[Task] | None = None

    @property
    def clock_offset_s(self) -> float:
        """How far the wall clock of its machine is ahead."""
        return self.machine.clock_offset_s

    @property
    def runs(self) -> bool:
        """Whether it neither has ended nor stands still."""
        return not self.dead and self.stopped is None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What runs in here runs in this process."""
        token = running.set(self)
        try:
            yield
        finally:
            running.reset(token)

    def stand_still(self) -> None:
        """SIGSTOP, or a machine that is busy otherwise."""
        if self.runs:
            self.machine.world.note(f"{self.name}: stands still")
            self.stopped = []

    def go_on(self) -> None:
        """SIGCONT; also what a SIGKILL does to its tasks."""
        tasks, self.stopped = self.stopped, None
        if tasks is not None:
            if not self.dead:
                self.machine.world.note(f"{self.name}: goes on")
            let_run(tasks)


class Process(Running):
    """One run of mirrorfs. `traps` are labels of calls, and what happens to the machine there."""

    def __init__(self, machine: "Machine", number: int) -> None:
        super().__init__(machine, f"{machine.name}.{number}")
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
            except OSError:
                if not self.dead:
                    raise
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
