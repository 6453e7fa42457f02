"""When the standby is told modification times: on the wire between two nodes, seen from the primary's stream."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from mirrorfs.core import operations as ops
from mirrorfs.replication import Primary
from mirrorfs.stream import Stream
from tests.sim.application import Application
from tests.sim.pair import Pair
from tests.sim.world import Options, World, run


def _told_by(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Application, Primary, int], Awaitable[None]]
) -> list[ops.Operation]:
    """What a mirrored primary puts on the stream while `act` runs, given an application, the primary and a file."""
    told: list[ops.Operation] = []

    async def story(world: World) -> None:
        pair = Pair(world)
        application = await pair.furnished()
        place = await application.file(b"x", b"one")
        await trio.sleep(1)
        node = pair.a.node
        assert node is not None
        assert node.primary is not None
        with monkeypatch.context() as patches:
            put = Stream.put

            def noting(stream: Stream, operation: ops.Operation) -> int:
                told.append(operation)
                return put(stream, operation)

            patches.setattr(Stream, "put", noting)
            await act(application, node.primary, place.id)
        await pair.quiet()

    world = run(1, story, Options(checkpoint_interval_s=2.0))
    assert world.problems == [], "\n".join(world.events[-60:])
    return told


def _times(told: list[ops.Operation]) -> list[int]:
    """Of which files the times are told."""
    singly = [change.file for change in told if isinstance(change, ops.SetAttributes) and change.mtime_ns is not None]
    return singly + [file for change in told if isinstance(change, ops.Times) for file, _ in change.files]


def test_an_fsync_tells_the_time_before_it_and_an_fdatasync_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for data_only in (False, True):

        async def write_and_sync(application: Application, primary: Primary, file: int, data_only: bool = data_only) -> None:
            await application.write(application.find(b"x", b"one"), 0, 1)
            await primary.sync(primary.tree.table.get(file), data_only)

        told = _told_by(monkeypatch, write_and_sync)
        until_synced = told[: told.index(next(change for change in told if isinstance(change, ops.Sync)))]
        assert len(_times(until_synced)) == (0 if data_only else 1)


def test_a_moment_after_the_changes_the_times_of_all_files_are_told_in_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    async def make_many(application: Application, primary: Primary, file: int) -> None:
        for number in range(10):
            await application.file(b"y", b"file %d" % number)
        await trio.sleep(1)

    told = _told_by(monkeypatch, make_many)
    assert not [change for change in told if isinstance(change, ops.SetAttributes)]
    assert len(set(_times(told))) == 11, "ten files and their directory"
    assert len([change for change in told if isinstance(change, ops.Times)]) < 6
