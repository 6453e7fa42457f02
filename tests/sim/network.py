"""The network between the two machines: ordered connections that can be cut in either direction, and healed.

A cut says nothing to either end, as a cable that was pulled: what is sent waits and arrives when it is healed, unless an end
has given the connection up before.
"""

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import LinkLostError, MirrorfsError, ProtocolError
from tests.sim.clock import SimulatedClock
from tests.sim.kernel import running

if TYPE_CHECKING:
    from tests.sim.processes import Process

_GREETING_S: Final = 5.0
_REDIAL_S: Final = 0.3
_KIND_AT: Final = 4


class End:
    """One end of a connection."""

    def __init__(self, network: "Network", process: "Process") -> None:
        self.network = network
        self.process = process
        self.other: End
        self.inbox: deque[bytes] = deque()
        self.arrived = trio.Event()
        self.closed = False
        self.ended = False
        self._way: deque[bytes | None] = deque()
        self._is_carried = False
        self.gone = False

    @property
    def waiting_bytes(self) -> int:
        """What has not arrived yet."""
        return sum(len(data) for data in self._way if data)

    @property
    def is_heard(self) -> bool:
        """Whether the heartbeats of the other end come through."""
        return not self.other.gone and self.other.process.stopped is None and not self.network.is_cut(self.other, self)

    def send(self, data: bytes) -> None:
        if not self.closed and not self.process.dead:
            self._put(data)

    def close(self) -> None:
        """The other end is told, if it can be reached."""
        if not self.closed:
            self.closed = True
            self._wake()
            self._put(None)

    def break_off(self, *, told: bool) -> None:
        """The process has ended: with the machine, nobody tells the other end."""
        self.closed = True
        self._wake()
        if told:
            keep = self.network.dice.randint(0, len(self._way))
            while len(self._way) > keep:
                self._way.pop()
            self._put(None)
        else:
            self.gone = True
            self._way.clear()

    def _wake(self) -> None:
        self.arrived.set()

    def _put(self, data: bytes | None) -> None:
        """On its way to the other end, in order; None ends the connection."""
        self._way.append(data)
        self._carry()

    def _carry(self) -> None:
        if self._way and not self._is_carried:
            self._is_carried = True
            self.network.clock.call_later(self.network.latency_s(), partial(self.arrive, len(self._way)))

    def arrive(self, count: int) -> None:
        """So much of what is on its way is there, unless the network is cut: then once it is healed."""
        if self.network.is_cut(self, self.other):
            self.network.when_healed(partial(self.arrive, count))
            return
        self._is_carried = False
        for _ in range(min(count, len(self._way))):
            data = self._way.popleft()
            if data is None:
                self.other.ended = True
                self._way.clear()
                break
            self.other.inbox.append(data)
        self.other._wake()
        self._carry()

    async def read(self) -> bytes:
        """What has arrived; LinkLostError when there will be no more."""
        while True:
            if self.closed:
                raise LinkLostError("the connection was closed")
            if self.inbox:
                data = b"".join(self.inbox)
                self.inbox.clear()
                return data
            if self.ended:
                raise LinkLostError("the connection was closed")
            self.arrived = trio.Event()
            await self.arrived.wait()


class Network:
    """All connections, and what is cut."""

    def __init__(self, dice: random.Random, clock: SimulatedClock) -> None:
        self.dice = dice
        self.clock = clock
        self.healed = trio.Event()
        self._held_up: list[Callable[[], None]] = []
        self._cuts: set[tuple[str, str]] = set()
        self._listening: dict[str, tuple[Process, Callable[[End, str], Any], trio.Nursery]] = {}
        self._ends: list[End] = []

    def latency_s(self) -> float:
        return self.dice.choice((0.0001, 0.0001, 0.0005, 0.002))

    def is_cut(self, sender: End, receiver: End) -> bool:
        return self.cuts(sender.process.machine.name, receiver.process.machine.name)

    def cuts(self, sender: str, receiver: str) -> bool:
        """Whether nothing gets from one to the other."""
        return (sender, receiver) in self._cuts

    def cut(self, sender: str, receiver: str) -> None:
        """Nothing gets from one to the other any more."""
        self._cuts.add((sender, receiver))

    def heal(self) -> None:
        """Everything gets through again."""
        self._cuts.clear()
        self.healed.set()
        self.healed = trio.Event()
        held_up, self._held_up = self._held_up, []
        for arrive in held_up:
            arrive()

    def when_healed(self, call: Callable[[], None]) -> None:
        """Call something when nothing is cut any more."""
        self._held_up.append(call)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut."""
        return not self._cuts

    def drop(self, process: "Process", *, told: bool) -> None:
        """A process has ended."""
        for end in [end for end in self._ends if end.process is process]:
            end.break_off(told=told)
            self._ends.remove(end)
        self._listening = {name: entry for name, entry in self._listening.items() if entry[0] is not process}

    async def listen(self, process: "Process", visitor: Callable[[End, str], Any]) -> None:
        async with trio.open_nursery() as nursery:
            self._listening[process.machine.name] = process, visitor, nursery
            await trio.sleep_forever()

    def connect(self, process: "Process", name: str) -> End | None:
        """A connection to the machine of that name, None if it cannot be reached."""
        entry = self._listening.get(name)
        if entry is None or self._cuts:
            return None
        listener, visitor, nursery = entry
        near, far = End(self, process), End(self, listener)
        near.other, far.other = far, near
        for end in (near, far):
            self._ends.append(end)

        async def visit() -> None:
            running.set(listener)
            try:
                await visitor(far, process.machine.name)
            finally:
                far.close()

        nursery.start_soon(visit)
        return near


class SimulatedLink:
    """Stands in for `peer.Link`, on an `End` instead of a socket."""

    def __init__(self, connection: End, decoder: wire.Decoder, *, ack_timeout_s: float, stall_timeout_s: float) -> None:
        self._end = connection
        self._decoder = decoder
        self._early = True
        self._listening = False
        self._ack_timeout_s = ack_timeout_s
        self._closing = trio.Event()
        self._serve: Callable[[Frame], bool] = lambda frame: False
        self._served: Callable[[], None] = lambda: None
        self.streams = 0
        self.version = wire.NEWEST
        self.read_at = perf_counter()
        self.failure: MirrorfsError | None = None
        self.bytes_sent = 0

    @property
    def queued_bytes(self) -> int:
        return self._end.waiting_bytes

    def send(self, frame: wire.Encoded) -> None:
        if self.failure is not None:
            return
        header, payload = frame
        self.bytes_sent += len(header) + len(payload)
        self._end.send(header + payload)
        self._end.process.at(f"sent:{Kind(header[_KIND_AT]).name}")

    def send_message(self, kind: Kind, content: object = None) -> None:
        self.send(wire.encode_message(kind, content))

    def serve(self, serve: Callable[[Frame], bool], served: Callable[[], None], reactor: None) -> None:
        self._serve, self._served = serve, served

    async def receive(self) -> list[Frame]:
        while True:
            data = b"" if self._early else await self._read()
            self.read_at = perf_counter()
            self._early = False
            left: list[Frame] = []
            for frame in self._decoder.feed(data):
                if left or not self._serve(frame):
                    left.append(frame)
            if left:
                return left
            self._served()
            await trio.lowlevel.checkpoint()

    async def _read(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        self._listening = True
        try:
            return await self._end.read()
        except LinkLostError:
            raise self.failure or LinkLostError("the connection was closed") from None
        finally:
            self._listening = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                task_status.started()
                await self._closing.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def close(self, why: str = "this node closed the connection") -> None:
        if self.failure is None:
            self.failure = LinkLostError(why)
            self._closing.set()
            self._end.close()

    def dispose(self) -> None:
        self.close()

    async def _watch(self) -> None:
        step = self._ack_timeout_s / 10
        silence = 0.0
        while True:
            await trio.sleep(step)
            silence = silence + step if self._listening and not self._end.is_heard else 0.0
            if silence > self._ack_timeout_s:
                self.close(f"nothing was heard for {self._ack_timeout_s:g} s (ack_timeout)")
                return


async def greet(connection: End, hello: dict[str, Any], trust: object, **_: bool) -> tuple[dict[str, Any], wire.Decoder]:
    """Stands in for `peer.greet`."""
    decoder = wire.Decoder()
    connection.send(b"".join(wire.encode_message(Kind.HELLO, hello)))
    with trio.move_on_after(_GREETING_S):
        while True:
            for frame in decoder.feed(await connection.read()):
                content = wire.message(frame)
                assert isinstance(content, dict)
                return content, decoder
    raise ProtocolError(f"it did not greet within {_GREETING_S:g} s")


async def dial(process: "Process", name: str, visitor: Callable[[End, str], Any]) -> None:
    """Stands in for `peer.dial`."""
    network = process.machine.world.network
    while True:
        await trio.sleep(network.latency_s())
        end = network.connect(process, name)
        if end is not None:
            try:
                await visitor(end, name)
            finally:
                end.close()
        elif not network.is_whole:
            await network.healed.wait()
        await trio.sleep(_REDIAL_S)
