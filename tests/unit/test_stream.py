"""The sending side of the stream: who waits for the peer, and who does not."""

from typing import Any

import trio
import trio.testing

from mirrorfs.core import operations as ops
from mirrorfs.stream import Stream


class _Link:
    """A link that takes everything and brings it nowhere."""

    streams = 1

    def send(self, frame: tuple[bytes, bytes]) -> None:
        pass


def _stream() -> Stream:
    link: Any = _Link()
    return Stream(link)


def test_nobody_waits_for_housekeeping() -> None:
    stream = _stream()
    stream.put(ops.Introduce(1, b"name", 2))
    stream.put(ops.SetAttributes(2, mtime_ns=5))
    stream.put_flush(ops.Checkpoint(1, 3))
    assert stream.sent > stream.acknowledged
    assert not stream.awaited


def test_who_only_wants_the_peer_to_have_it_all_is_no_change() -> None:
    async def main() -> None:
        stream = _stream()
        stream.put(ops.SetAttributes(2, mtime_ns=5))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.drained)
            nursery.start_soon(stream.applied, stream.sent)
            await trio.testing.wait_all_tasks_blocked()
            assert not stream.awaited
            stream.on_ack(stream.sent)

    trio.run(main)


def test_a_change_is_awaited_until_the_peer_has_applied_it() -> None:
    async def main() -> None:
        stream, told = _stream(), list[bool]()
        first, second = stream.put(ops.Write(2, 0, b"one")), stream.put(ops.Write(2, 3, b"two"))

        async def change(sequence: int) -> None:
            told.append(await stream.applied(sequence, answers=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, first)
            nursery.start_soon(change, second)
            await trio.testing.wait_all_tasks_blocked()
            stream.on_ack(first)
            assert stream.awaited
            stream.on_ack(second)
            assert not stream.awaited
        assert told == [True, True]

    trio.run(main)


def test_a_change_that_waits_when_the_link_is_lost_is_told_so() -> None:
    async def main() -> None:
        stream, told = _stream(), list[bool]()

        async def change() -> None:
            told.append(await stream.applied(stream.put(ops.Write(2, 0, b"one")), answers=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            assert stream.awaited
            stream.end()
            assert not stream.awaited
        assert told == [False]

    trio.run(main)
