"""A simulated arbiter: one value, changed by compare-and-swap, and a network that loses or delays requests and answers."""

import random
from typing import TYPE_CHECKING, Final

import trio

from mirrorfs.arbiter import ArbiterUnreachableError, Reading

if TYPE_CHECKING:
    from tests.sim.world import World

_TIMEOUT_S: Final = 0.5


class ArbiterStore:
    """What the arbiter holds, and who reaches it."""

    def __init__(self, world: "World", dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        self.revision = 1
        self.key_revision = 0
        self.value: bytes | None = None
        self.is_down = False
        self._cluster = 1
        self._backups: list[tuple[int, int, bytes | None]] = []
        self.cut_off: set[str] = set()
        #: How often a request or its answer is lost, from 0 to 1.
        self.loss = 0.0

    def heal(self) -> None:
        """Everybody reaches it."""
        self.is_down, self.loss = False, 0.0
        self.cut_off.clear()

    def restore(self) -> None:
        """It is what it was some time ago; perhaps others have written to it since, so that this is not seen at once."""
        if self._backups:
            self.revision, self.key_revision, self.value = self.dice.choice(self._backups)
            self.revision += self.dice.choice((0, 0, 100))

    def replace(self) -> None:
        """There is another one in its place, with nothing in it."""
        self._cluster += 1
        self.revision, self.key_revision, self.value = 1, 0, None
        self._backups.clear()

    def reaches(self, name: str) -> bool:
        """Whether this request, or this answer, gets through."""
        return not self.is_down and name not in self.cut_off and self.dice.random() >= self.loss

    def reading(self) -> Reading:
        """What is there now."""
        return Reading(f"cluster {self._cluster}", self.revision, self.key_revision, self.value)

    def swap(self, name: str, expected: int, value: bytes) -> Reading | None:
        """Compare and swap."""
        if self.key_revision != expected:
            return None
        self._backups.append((self.revision, self.key_revision, self.value))
        self.revision += 1
        self.key_revision, self.value = self.revision, value
        self.world.note(f"arbiter: {name}: {value.decode()[58:]}")
        return self.reading()


class SimulatedArbiter:
    """Stands in for `arbiter.Etcd` on one machine."""

    name = "simulated arbiter"

    def __init__(self, store: ArbiterStore, machine: str) -> None:
        self._store = store
        self._machine = machine

    async def _travel(self) -> None:
        await trio.sleep(self._store.dice.choice((0.0005, 0.002, 0.02, 0.2)))

    async def _lost(self) -> ArbiterUnreachableError:
        await trio.sleep(_TIMEOUT_S)
        return ArbiterUnreachableError("no answer from the simulated arbiter")

    async def read(self) -> Reading:
        await self._travel()
        if not self._store.reaches(self._machine):
            raise await self._lost()
        reading = self._store.reading()
        await self._travel()
        if not self._store.reaches(self._machine):
            raise await self._lost()
        return reading

    async def swap(self, expected: int, value: bytes) -> Reading | None:
        store = self._store
        if store.dice.random() < 0.1:
            # On its way for long: whoever asked hears nothing, and it arrives all the same.
            store.world.nursery.start_soon(self._arrive_late, expected, value)
            raise await self._lost()
        await self._travel()
        if not store.reaches(self._machine):
            raise await self._lost()
        reading = store.swap(self._machine, expected, value)
        await self._travel()
        if not store.reaches(self._machine):
            raise await self._lost()
        return reading

    async def _arrive_late(self, expected: int, value: bytes) -> None:
        await trio.sleep(self._store.dice.uniform(0.0, 8.0))
        if not self._store.is_down:
            self._store.swap(self._machine, expected, value)

    async def aclose(self) -> None:
        """Nothing is held."""
