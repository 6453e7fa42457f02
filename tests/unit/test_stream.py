"""The sending side of the stream: who waits for the peer, and who does not."""

from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import ProtocolError
from mirrorfs.stream import Stream


class _Link:
    """A link that takes everything and brings it nowhere."""

    streams = 1

    def __init__(self, version: int = wire.NEWEST) -> None:
        self.version = version

    def send(self, frame: tuple[bytes, bytes]) -> None:
        pass


def _stream(version: int = wire.NEWEST) -> Stream:
    link: Any = _Link(version)
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


# ---- what the peer says that it spent


def _note(said: list[tuple[int, int | None]], number: int, spent_us: int | None) -> None:
    said.append((number, spent_us))


def test_the_peers_time_comes_with_the_acknowledgement_that_is_the_first_for_a_change() -> None:
    stream, said = _stream(), list[tuple[int, int | None]]()
    for number in (1, 2, 3):
        assert stream.put(ops.Write(2, 0, b"data")) == number
        stream.note(number, partial(_note, said, number))
    assert stream.on_frame(Frame(Kind.ACK, 2, 150))
    assert said == [(1, 150), (2, 150)]
    assert stream.on_frame(Frame(Kind.ACK, 3, 40))
    assert said[2:] == [(3, 40)]


def test_an_acknowledgement_that_comes_with_a_sync_says_nothing_of_a_change_and_something_of_the_sync() -> None:
    stream, said = _stream(), list[tuple[str, int | None]]()
    stream.note(stream.put(ops.Write(2, 0, b"data")), lambda spent_us: said.append(("change", spent_us)))
    sync = stream.put_flush(ops.Sync(2, False), lambda spent_us: said.append(("sync", spent_us)))
    assert stream.on_frame(Frame(Kind.FLUSHED, sync, sync, 1, (9000).to_bytes(4, "little")))
    assert said == [("change", None), ("sync", 9000)]
    assert stream.acknowledged == sync


def test_a_peer_of_version_seven_is_not_asked_what_it_does_not_say() -> None:
    stream, said = _stream(7), list[int | None]()
    stream.note(stream.put(ops.Write(2, 0, b"data")), said.append)
    sync = stream.put_flush(ops.Sync(2, False), said.append)
    assert stream.on_frame(Frame(Kind.ACK, 1, 0))
    assert stream.on_frame(Frame(Kind.FLUSHED, sync, sync, 1))
    assert said == [None, None]


def test_a_sync_whose_result_nobody_waits_for_any_more_and_one_that_failed_are_not_noted() -> None:
    stream, said = _stream(), list[int | None]()
    first, _second = stream.put_flush(ops.Sync(2, False), said.append), stream.put_flush(ops.Sync(3, False), said.append)
    stream.forget_flush(first)
    assert stream.on_frame(Frame(Kind.FLUSHED, first, first, 1, bytes(4)))
    stream.end()
    assert said == []


def test_a_result_of_a_sync_without_its_time_is_a_protocol_error_in_version_eight() -> None:
    stream = _stream(8)
    sync = stream.put_flush(ops.Sync(2, False))
    with pytest.raises(ProtocolError, match="malformed FLUSHED"):
        stream.on_frame(Frame(Kind.FLUSHED, sync, sync, 1))
