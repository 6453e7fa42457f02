"""The connection of two nodes, as `listen`, `dial` and `greet` make it."""

import socket
from functools import partial
from pathlib import Path

import pytest
import trio

from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import ProtocolError
from mirrorfs.lab.configuration import acquaint
from mirrorfs.peer import Link, dial, greet, listen
from mirrorfs.trust import Trust

_HOST = "127.0.0.1"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Trust, Trust]:
    """The keys of two nodes that trust each other."""
    one, two = tmp_path / "one" / "keys", tmp_path / "two" / "keys"
    acquaint(one, two)
    return Trust(one), Trust(two)


async def _versions(pair: tuple[Trust, Trust]) -> list[int]:
    """What both ends of a connection have agreed on, or that they refused each other (0)."""
    ends, found = socket.socketpair(), list[int]()

    async def end(number: int) -> None:
        ends[number].setblocking(False)
        try:
            _, channel = await greet(ends[number], {}, pair[number], server_side=number == 0)
            found.append(channel.version)
        except ProtocolError:
            found.append(0)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(end, number)
    for connection in ends:
        connection.close()
    return found


async def test_two_of_this_version_speak_the_newest(pair: tuple[Trust, Trust]) -> None:
    assert await _versions(pair) == [wire.NEWEST] * 2


@pytest.mark.parametrize(("says", "version"), [((7, 0), 7), ((8, 9), 8), ((7, 9), 8), ((9, 9), 0)])
async def test_the_version_of_a_link_is_what_both_speak(
    pair: tuple[Trust, Trust], monkeypatch: pytest.MonkeyPatch, says: tuple[int, int], version: int
) -> None:
    preamble = wire.preamble(*says)
    monkeypatch.setattr(wire, "preamble", lambda: preamble)
    assert await _versions(pair) == [version] * 2


async def test_a_large_write_goes_out_in_one_piece(pair: tuple[Trust, Trust]) -> None:
    """The greeting's streams leave a limit on the socket, at which the rest would wait for a task."""
    with socket.create_server((_HOST, 0)) as free:
        port: int = free.getsockname()[1]
    greeted = trio.Event()
    done = trio.Event()

    async def welcome(connection: socket.socket, _: str) -> None:
        await greet(connection, {}, pair[0], server_side=True)
        await done.wait()

    async def visit(connection: socket.socket, _: str) -> None:
        _theirs, channel = await greet(connection, {}, pair[1], server_side=False)
        link = Link(connection, channel, ack_timeout_s=5, stall_timeout_s=60)
        link.send(wire.encode(Frame(Kind.WRITE, 1, 2, 0, bytes(1 << 20))))
        assert link.queued_bytes == 0
        greeted.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(listen, _HOST, port, welcome, peer=_HOST, is_connected=lambda: False))
            nursery.start_soon(dial, _HOST, _HOST, port, visit)
            await greeted.wait()
            done.set()
            nursery.cancel_scope.cancel()
