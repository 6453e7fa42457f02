"""The sending side of the ordered stream of operations: numbers, acknowledgements, results of flushes,
answers."""

from collections import deque
from collections.abc import Callable

import trio

from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.peer import Link
from mirrorfs.strand import pause, waker

#: Called with the microseconds that the peer spent on something as soon as its word on that has come; None: it did not say.
Noted = Callable[[int | None], None]


class _Flush:
    """A sync that the peer was told to make."""

    __slots__ = ("ended", "noted", "succeeded", "waiting")

    def __init__(self, noted: Noted | None) -> None:
        self.ended = self.succeeded = False
        self.noted = noted
        self.waiting: list[Callable[[], None]] = []

    async def wait(self) -> None:
        """Until its result is known, or the link has ended."""
        if not self.ended:
            wake = waker()
            self.waiting.append(wake)
            await pause(lambda: self.waiting.remove(wake))

    def end(self, *, succeeded: bool) -> None:
        """Let everybody who waits go on."""
        self.ended, self.succeeded = True, self.succeeded or succeeded
        waiting, self.waiting = self.waiting, []
        for wake in waiting:
            wake()


class Stream:
    """The ordered stream of one reign over one link: sequence numbers from 1, acknowledgements, results of flushes,
    answers."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.number = link.streams  # tells this stream's acknowledgements from an earlier one's on the same link
        self.sent = 0
        self.acknowledged = 0
        self.broken = False
        self._waiters: deque[tuple[int, Callable[[], None], bool]] = deque()
        self._noted: deque[tuple[int, Noted]] = deque()
        self._is_timed = link.version >= wire.TIMED
        self._flushes: dict[int, _Flush] = {}
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

    def put_write(self, file: int, offset: int, data: bytes | bytearray | memoryview) -> int:
        """As `put` of a `Write`."""
        self.sent += 1
        self.link.send(wire.encode_write(file, offset, data, self.sent))
        return self.sent

    def put_flush(self, operation: ops.Flush, noted: Noted | None = None) -> int:
        """Send a sync, whose result `flushed` will wait for; `noted` is called when it is there, if it succeeded."""
        sequence = self.put(operation)
        self._flushes[sequence] = _Flush(noted)
        return sequence

    def note(self, sequence: int, noted: Noted) -> None:
        """Call `noted` when the peer says that it has applied what was sent last, `sequence`; never, if it says so no more."""
        self._noted.append((sequence, noted))

    async def applied(self, sequence: int, *, answers: bool = False) -> bool:
        """Wait until the peer has applied everything up to `sequence`; False if the link was lost before. With `answers`, a
        change is acknowledged after it."""
        if self.acknowledged >= sequence:
            return True
        if self.broken:
            return False
        waiter = (sequence, waker(), answers)
        self._waiters.append(waiter)
        await pause(lambda: self._waiters.remove(waiter))
        return self.acknowledged >= sequence

    async def flushed(self, sequence: int) -> bool:
        """Wait until the peer's disk has everything up to the sync `sequence`; False if the link was lost before."""
        flush = self._flushes[sequence]
        try:
            await flush.wait()
        finally:
            self.forget_flush(sequence)
        return flush.succeeded

    def forget_flush(self, sequence: int) -> None:
        """Nobody waits for its result any more, unless to see everything drained."""
        flush = self._flushes.pop(sequence, None)
        if flush is not None:
            flush.end(succeeded=False)

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
        for flush in list(self._flushes.values()):
            await flush.wait()
        return await self.applied(self.sent) and not self.broken

    def on_frame(self, frame: Frame) -> bool:
        """Take in what the peer says about the stream; False if the frame is not about that."""
        match frame.kind:
            case Kind.ACK:
                self.on_ack(frame.sequence, frame.file if self._is_timed else None)
            case Kind.FLUSHED:
                spent_us = wire.spent_on_flush_us(frame) if self._is_timed else None
                self.on_ack(max(frame.file, self.acknowledged))
                self.on_flushed(frame.sequence, spent_us)
            case Kind.ANSWER:
                self.on_answer(frame)
            case _:
                return False
        return True

    def on_ack(self, sequence: int, spent_us: int | None = None) -> None:
        """The peer has applied everything up to `sequence`, in so many microseconds what this adds to what it said before."""
        self.acknowledged = sequence
        while self._noted and self._noted[0][0] <= sequence:
            self._noted.popleft()[1](spent_us)
        while self._waiters and self._waiters[0][0] <= sequence:
            self._waiters.popleft()[1]()

    def on_flushed(self, sequence: int, spent_us: int | None = None) -> None:
        """The peer's sync `sequence` has succeeded, in so many microseconds."""
        flush = self._flushes.get(sequence)
        if flush is not None:
            if flush.noted is not None:
                flush.noted(spent_us)
            flush.end(succeeded=True)

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
            self._waiters.popleft()[1]()
        for flush in list(self._flushes.values()):
            flush.end(succeeded=False)
        for event, _ in self._answers.values():
            event.set()
