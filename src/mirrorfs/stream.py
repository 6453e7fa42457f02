"""The sending side of the ordered stream of operations: numbers, acknowledgements, results of flushes,
answers."""

from collections import deque
from collections.abc import Callable

import trio

from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.peer import Link


class Stream:
    """The ordered stream of one reign over one link: sequence numbers from 1, acknowledgements, results of flushes,
    answers."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.number = link.streams  # tells this stream's acknowledgements from an earlier one's on the same link
        self.sent = 0
        self.acknowledged = 0
        self.broken = False
        self._waiters: deque[tuple[int, trio.lowlevel.Task, bool]] = deque()
        self._flushes: dict[int, tuple[trio.Event, list[int]]] = {}
        self._answers: dict[int, tuple[trio.Event, list[Frame]]] = {}

    @property
    def awaited(self) -> bool:
        """Whether a change is acknowledged as soon as the peer has applied what was sent, or is gone; housekeeping never is."""
        return any(answers for _, _, answers in self._waiters)

    def put(self, operation: ops.Operation) -> int:
        """Send an operation and return its sequence number."""
        self.sent += 1
        self.link.send(wire.encode_operation(operation, self.sent))
        return self.sent

    def put_flush(self, operation: ops.Flush) -> int:
        """Send a sync, whose result `flushed` will wait for."""
        sequence = self.put(operation)
        self._flushes[sequence] = (trio.Event(), [])
        return sequence

    async def applied(self, sequence: int, *, answers: bool = False) -> bool:
        """Wait until the peer has applied everything up to `sequence`; False if the link was lost before. With `answers`, a
        change is acknowledged after it."""
        if self.acknowledged >= sequence:
            return True
        if self.broken:
            return False
        waiter = (sequence, trio.lowlevel.current_task(), answers)
        self._waiters.append(waiter)

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._waiters.remove(waiter)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return self.acknowledged >= sequence

    async def flushed(self, sequence: int) -> bool:
        """Wait until the peer's disk has everything up to the sync `sequence`; False if the link was lost before."""
        done, result = self._flushes[sequence]
        try:
            await done.wait()
        finally:
            del self._flushes[sequence]
        return result == [0]

    def ask(self, question: ops.Question) -> int:
        """Send a question, whose answer `answer` will wait for."""
        sequence = self.put(question)
        self._answers[sequence] = (trio.Event(), [])
        return sequence

    async def answer(self, sequence: int) -> Frame | None:
        """Wait for the answer to the question `sequence`; None if the link was lost before."""
        answered, answer = self._answers[sequence]
        try:
            if not self.broken:
                await answered.wait()
        finally:
            del self._answers[sequence]
        return answer[0] if answer else None

    async def drained(self) -> bool:
        """Wait until the peer has applied, and synced, everything that was sent; False if the link was lost before."""
        for event, _ in list(self._flushes.values()):
            await event.wait()
        return await self.applied(self.sent) and not self.broken

    def on_frame(self, frame: Frame) -> bool:
        """Take in what the peer says about the stream; False if the frame is not about that."""
        match frame.kind:
            case Kind.ACK:
                self.on_ack(frame.sequence)
            case Kind.FLUSHED:
                self.on_flushed(frame.sequence)
            case Kind.ANSWER:
                self.on_answer(frame)
            case _:
                return False
        return True

    def on_ack(self, sequence: int) -> None:
        """The peer has applied everything up to `sequence`."""
        self.acknowledged = sequence
        while self._waiters and self._waiters[0][0] <= sequence:
            trio.lowlevel.reschedule(self._waiters.popleft()[1])

    def on_flushed(self, sequence: int) -> None:
        """The peer's sync `sequence` has succeeded."""
        if sequence in self._flushes:
            event, result = self._flushes[sequence]
            result.append(0)
            event.set()

    def on_answer(self, frame: Frame) -> None:
        """The peer's answer to a question has come."""
        if frame.sequence in self._answers:
            answered, answer = self._answers[frame.sequence]
            answer.append(frame)
            answered.set()

    def end(self) -> None:
        """The link is lost: everybody who waits is told."""
        self.broken = True
        while self._waiters:
            trio.lowlevel.reschedule(self._waiters.popleft()[1])
        for event, _ in (*self._flushes.values(), *self._answers.values()):
            event.set()
