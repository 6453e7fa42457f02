"""The reactor: it serves what is readable, runs strands that were woken, and lets trio's tasks run."""

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from mirrorfs.reactor import Reactor
from mirrorfs.strand import pause, waker
from mirrorfs.syncing import KernelSyncs, ThreadSyncs


@pytest.fixture
async def reactor(nursery: trio.Nursery) -> AsyncIterator[Reactor]:
    reactor = Reactor()
    await nursery.start(reactor.run)
    yield reactor
    nursery.cancel_scope.cancel()


async def test_what_is_readable_is_served(reactor: Reactor) -> None:
    near, far = socket.socketpair()
    got, arrived = [], trio.Event()

    def serve() -> None:
        got.append(far.recv(100))
        arrived.set()

    reactor.add(far.fileno(), serve)
    near.send(b"one")
    await arrived.wait()
    assert got == [b"one"]
    reactor.remove(far.fileno())
    near.send(b"two")
    await trio.sleep(0.01)
    assert got == [b"one"]
    near.close()
    far.close()


async def test_a_strand_that_a_task_wakes_goes_on_although_nothing_is_readable(reactor: Reactor) -> None:
    wakers, ended = [], trio.Event()

    async def wait() -> None:
        wakers.append(waker())
        await pause(lambda: None)

    reactor.strands.start(wait(), lambda result, error: ended.set())
    await trio.sleep(0.01)  # it sleeps by now
    wakers[0]()
    await ended.wait()


async def test_tasks_run_while_there_is_always_something_to_serve(reactor: Reactor) -> None:
    near, far = socket.socketpair()
    near.send(b"x")  # stays there: readable for ever
    served = []
    reactor.add(far.fileno(), lambda: served.append(True))
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    await trio.to_thread.run_sync(lambda: None)
    reactor.remove(far.fileno())
    assert served
    near.close()
    far.close()


async def test_a_source_that_another_one_removes_is_not_served(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    served: list[int] = []

    def serve(number: int) -> None:
        served.append(number)
        for _, far in pairs:
            reactor.remove(far.fileno())

    for number, (near, far) in enumerate(pairs):
        near.send(b"x")
        reactor.add(far.fileno(), lambda number=number: serve(number))  # type: ignore[misc]
    await trio.sleep(0.01)
    assert len(served) == 1
    for near, far in pairs:
        near.close()
        far.close()


@pytest.mark.parametrize("data_only", [False, True])
async def test_a_file_is_synced_by_the_kernel_from_a_task_and_from_a_strand(
    reactor: Reactor, tmp_path: Path, data_only: bool
) -> None:
    syncs = KernelSyncs(reactor)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(file, b"data")
    await syncs.sync(file, data_only)
    ended = trio.Event()
    errors = []

    def done(result: object, error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    reactor.strands.start(syncs.sync(file, data_only), done)
    await ended.wait()
    assert errors == [None]
    os.close(file)
    syncs.close()


async def test_a_sync_that_fails_says_why(reactor: Reactor) -> None:
    syncs = KernelSyncs(reactor)
    reading, writing = os.pipe()
    for each in (syncs, ThreadSyncs()):
        with pytest.raises(OSError, match="Invalid argument"):
            await each.sync(writing, True)
    os.close(reading)
    os.close(writing)
    syncs.close()


async def test_many_syncs_at_once_all_end(reactor: Reactor, tmp_path: Path) -> None:
    syncs = KernelSyncs(reactor)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    async with trio.open_nursery() as nursery:
        for _ in range(600):
            nursery.start_soon(syncs.sync, file, True)
    os.close(file)
    syncs.close()


async def test_it_does_not_look_again_for_requests_while_a_task_is_ready_to_run(
    reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = socket.socketpair()
    looks = []

    def serve() -> None:
        far.recv(100)
        sum(range(4000))  # work, for which it may look again

    reactor.add(far.fileno(), serve)
    monkeypatch.setattr(os, "sched_yield", lambda: looks.append(True))
    for _ in range(500):
        near.send(b"x")
        await trio.lowlevel.checkpoint()
    monkeypatch.undo()
    reactor.remove(far.fileno())
    assert not looks
    near.close()
    far.close()
