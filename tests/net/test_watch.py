# ruff: noqa: ASYNC220, ASYNC240  (these tests may wait for their own small files and processes)
"""The watch of a mount: stopped, hung and answering are told apart, whichever of its two sides stands still."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mirrorfs import control
from mirrorfs.control import NotRunningError
from mirrorfs.errors import ControlError, RefusedError
from mirrorfs.lab.pair import Lab
from mirrorfs.watch import Condition, MountWatch

STOPPED, HUNG, ANSWERS = Condition.STOPPED, Condition.HUNG, Condition.ANSWERS
DEADLINE_S = 3.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "one.sock"


class Watched:
    """A watch that runs, and the conditions that it has gone through."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.watch = MountWatch(path, **{"deadline_s": DEADLINE_S} | options)
        self.watch.on_change = self._changed
        self.changes = 0
        self.history: list[Condition] = []

    def _changed(self) -> None:
        self.changes += 1
        if self.history[-1:] != [self.watch.condition]:
            self.history.append(self.watch.condition)

    async def until(self, condition: Condition) -> None:
        with trio.fail_after(3600):
            while self.watch.condition is not condition:  # noqa: ASYNC110 - by the clock of the test
                await trio.sleep(0.02)


@asynccontextmanager
async def watching(path: Path, **options: Any) -> AsyncIterator[Watched]:
    async with trio.open_nursery() as nursery:
        watched = Watched(path, **options)
        await nursery.start(watched.watch.run)
        yield watched
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def node(path: Path, status: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[trio.CancelScope]:
    """A node that answers `status`, and everything else as a real one does."""

    async def answer(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match command:
            case "status":
                return await status()
            case "echo":
                return arguments
            case "sleep":
                await trio.sleep_forever()
        raise RefusedError("not now")

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(control.serve, path, answer))
        yield nursery.cancel_scope
        nursery.cancel_scope.cancel()


class Says:
    """What a node says of itself; while `silent` it says nothing."""

    def __init__(self, **status: Any) -> None:
        self.status = status
        self.silent = False
        self.asked = 0

    async def __call__(self) -> dict[str, Any]:
        self.asked += 1
        while self.silent:  # noqa: ASYNC110 - by the clock of the test
            await trio.sleep(0.1)
        return self.status


@contextmanager
def listening(path: Path, backlog: int = 8) -> Any:
    """Somebody who listens and does nothing more by itself."""
    with socket.socket(socket.AF_UNIX) as plain:
        plain.setblocking(False)
        plain.bind(os.fspath(path))
        plain.listen(backlog)
        yield plain


# ---- the control socket


async def test_without_a_node_it_is_stopped(path: Path, autojump_clock: MockClock) -> None:
    async with watching(path) as watched:
        await trio.sleep(10)
        assert watched.watch.condition is STOPPED
        assert watched.watch.status is None
        assert watched.changes == 0


@pytest.mark.parametrize("kind", ["stale", "file", "no directory"])
async def test_a_socket_that_nobody_serves_is_stopped(
    path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    if kind == "stale":
        with listening(path):
            pass
    elif kind == "file":
        path.touch()
    else:
        path.parent.joinpath("file").touch()
        path = path.parent / "file" / "one.sock"
    async with watching(path) as watched:
        await trio.sleep(10)
        assert watched.watch.condition is STOPPED
    assert caplog.messages == []


async def test_what_a_node_says_is_known_and_each_change_is_told_once(path: Path, autojump_clock: MockClock) -> None:
    says = Says(state="primary")
    async with node(path, says), watching(path) as watched:
        assert watched.watch.condition is ANSWERS
        assert watched.watch.status == {"state": "primary"}
        await trio.sleep(10)
        assert watched.changes == 1
        assert says.asked > 10
        says.status = {"state": "primary", "frozen": True}
        await trio.sleep(1)
        assert (watched.watch.condition, watched.watch.status) == (ANSWERS, says.status)
        assert watched.changes == 2


async def test_a_node_that_does_not_answer_hangs_until_it_does(path: Path, autojump_clock: MockClock) -> None:
    says = Says(state="primary")
    async with node(path, says), watching(path) as watched:
        says.silent = True
        await watched.until(HUNG)
        assert watched.watch.status == {"state": "primary"}
        asked = says.asked
        await trio.sleep(1000)
        assert says.asked == asked
        says.silent = False
        await watched.until(ANSWERS)
        await trio.sleep(10)
    assert watched.history == [ANSWERS, HUNG, ANSWERS]


async def test_a_node_that_is_slow_but_in_time_answers(path: Path, autojump_clock: MockClock) -> None:
    async def slow() -> dict[str, Any]:
        await trio.sleep(DEADLINE_S - 0.5)
        return {}

    async with node(path, slow), watching(path) as watched:
        await trio.sleep(30)
        assert watched.history == [ANSWERS]


async def test_a_node_that_has_never_answered_hangs_too(path: Path, autojump_clock: MockClock) -> None:
    with listening(path):
        async with watching(path) as watched:
            assert watched.watch.condition is HUNG
            assert watched.watch.status is None


async def test_a_node_that_takes_no_connection_hangs_however_long(path: Path, autojump_clock: MockClock) -> None:
    """Its backlog is full: others have asked it in vain."""
    with listening(path, 0) as plain, socket.socket(socket.AF_UNIX) as other:
        other.connect(os.fspath(path))
        async with watching(path) as watched:
            await trio.sleep(1000)
            assert watched.history == [HUNG]
            plain.close()
            await watched.until(STOPPED)


async def test_a_node_that_ends_is_stopped_at_once(path: Path, autojump_clock: MockClock) -> None:
    async with watching(path, interval_s=100.0, deadline_s=1000.0) as watched:
        async with node(path, Says(state="primary")):
            await watched.until(ANSWERS)
            before = trio.current_time()
        await watched.until(STOPPED)
        assert trio.current_time() - before < 50
        assert watched.watch.status is None
        async with node(path, Says(state="standby")):
            await watched.until(ANSWERS)
            assert watched.watch.status == {"state": "standby"}
    assert watched.history == [ANSWERS, STOPPED, ANSWERS, STOPPED][: len(watched.history)]


async def test_a_node_that_ends_while_it_hangs_is_stopped(path: Path, autojump_clock: MockClock) -> None:
    says = Says()
    async with watching(path) as watched:
        async with node(path, says):
            await watched.until(ANSWERS)
            says.silent = True
            await watched.until(HUNG)
        await watched.until(STOPPED)
        await trio.sleep(30)
        assert watched.history == [ANSWERS, HUNG, STOPPED]


async def test_a_node_that_starts_is_stopped_until_it_answers_and_has_all_the_time_for_it(
    path: Path, autojump_clock: MockClock
) -> None:
    says = Says()
    async with watching(path) as watched:
        for number in range(2):
            async with node(path, says):
                says.silent = True
                await trio.sleep(DEADLINE_S - 0.5)
                assert watched.watch.condition is STOPPED
                says.silent = False
                await watched.until(ANSWERS)
                says.silent = True
                await watched.until(HUNG)
            await watched.until(STOPPED)
            assert watched.history == [ANSWERS, HUNG, STOPPED] * (number + 1)


async def test_a_node_that_ends_each_conversation_answers_nevertheless(path: Path, autojump_clock: MockClock) -> None:
    conversations = 0

    async def converse(stream: trio.SocketStream) -> None:
        nonlocal conversations
        conversations += 1
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
            await stream.send_all(b'{"ok": {}}\n')
        await stream.aclose()

    with listening(path) as plain:
        async with trio.open_nursery() as nursery:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain.dup()))
            nursery.start_soon(partial(trio.serve_listeners, converse, [listener]))
            async with watching(path) as watched:
                await trio.sleep(10)
                assert watched.history == [ANSWERS]
                assert 20 <= conversations <= 50
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "line",
    [b"\n", b"nonsense\n", b"[1]\n", b'{"ok": 1}\n', b'{"error": {"kind": "X", "message": "y"}}\n', b"[" * 100_000 + b"\n"],
    ids=lambda line: str(line[:10]),
)
async def test_an_answer_that_is_no_status_is_an_answer(
    path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    async def converse(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                await stream.send_all(line)

    with listening(path) as plain:
        async with trio.open_nursery() as nursery:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain.dup()))
            nursery.start_soon(partial(trio.serve_listeners, converse, [listener]))
            async with watching(path) as watched:
                await trio.sleep(10)
                assert (watched.watch.condition, watched.watch.status) == (ANSWERS, None)
            nursery.cancel_scope.cancel()
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [f"{path}: the node's answer is no status, is it of another version?"]


async def test_trouble_of_its_own_says_nothing_of_the_node(
    path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*arguments: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    says = Says()
    async with watching(path) as watched:
        async with node(path, says):
            await watched.until(ANSWERS)
            says.silent = True
            await trio.sleep(1)
            monkeypatch.setattr(socket, "socket", none_left)
        await trio.sleep(30)
        assert watched.history == [ANSWERS]
        async with watching(path) as another:
            assert another.watch.condition is STOPPED
            monkeypatch.undo()
            await watched.until(STOPPED)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [f"{path}: cannot be used (Too many open files)"] * 2


async def test_a_controller_that_stood_still_itself_does_not_blame_the_mount(path: Path, mock_clock: MockClock) -> None:
    says = Says()
    async with node(path, says), trio.open_nursery() as nursery:
        watched = Watched(path)
        await nursery.start(watched.watch.run)
        says.silent = True
        mock_clock.jump(0.3)
        await wait_all_tasks_blocked()
        assert says.asked == 2
        mock_clock.jump(1000)
        await wait_all_tasks_blocked()
        says.silent = False
        mock_clock.jump(0.1)
        await wait_all_tasks_blocked()
        assert watched.history == [ANSWERS]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_process_that_was_stopped_hangs_and_one_that_was_killed_has_stopped(path: Path, number: signal.Signals) -> None:
    """A real process and real time; what it answers is as good as a node's."""
    program = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from mirrorfs import control\n"
        "async def answer(command, arguments):\n"
        "    return {'state': 'primary'}\n"
        "trio.run(control.serve, Path(sys.argv[1]), answer)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, path]) as process:
        try:
            async with watching(path, deadline_s=1.0) as watched:
                await watched.until(ANSWERS)
                process.send_signal(signal.SIGSTOP)
                await watched.until(HUNG)
                process.send_signal(signal.SIGCONT)
                await watched.until(ANSWERS)
                process.send_signal(number)
                await watched.until(STOPPED)
        finally:
            process.kill()


# ---- the file system


class Statfs:
    """os.statvfs as the tests want it: it notes its calls, and hangs or fails on command. Threads are real, and so is time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.error: OSError | None = None
        self._real = os.statvfs
        monkeypatch.setattr(os, "statvfs", self)

    def __call__(self, path: str) -> os.statvfs_result:
        self.paths.append(path)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.goes_on.wait(60)
            if self.error is not None:
                raise self.error
            return self._real(path)
        finally:
            self.in_flight -= 1


@pytest.fixture
def statfs(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Statfs(monkeypatch)
    yield found
    found.goes_on.set()


async def test_the_file_system_is_asked_regularly_where_the_node_says_that_it_is(
    path: Path, tmp_path: Path, statfs: Statfs
) -> None:
    async with node(path, Says(path=str(tmp_path))), watching(path, interval_s=0.02) as watched:
        with trio.fail_after(30):
            while len(statfs.paths) < 10:  # noqa: ASYNC110 - threads of the watch
                await trio.sleep(0.02)
        assert set(statfs.paths) == {str(tmp_path)}
        assert watched.watch.condition is ANSWERS


async def test_a_file_system_that_does_not_answer_hangs_though_the_node_does(
    path: Path, tmp_path: Path, statfs: Statfs
) -> None:
    async with node(path, Says(path=str(tmp_path))), watching(path, deadline_s=0.5, interval_s=0.05) as watched:
        await watched.until(ANSWERS)
        statfs.goes_on.clear()
        await watched.until(HUNG)
        await trio.sleep(0.5)
        assert watched.watch.condition is HUNG
        statfs.goes_on.set()
        await watched.until(ANSWERS)
        assert watched.history == [ANSWERS, HUNG, ANSWERS]
        assert statfs.most_in_flight == 1


async def test_when_the_node_has_ended_it_is_stopped_whatever_its_file_system_does(
    path: Path, tmp_path: Path, statfs: Statfs
) -> None:
    statfs.goes_on.clear()
    async with watching(path, deadline_s=0.5, interval_s=0.05) as watched:
        async with node(path, Says(path=str(tmp_path))):
            await watched.until(HUNG)
        await watched.until(STOPPED)
        await trio.sleep(1)
        assert watched.watch.condition is STOPPED
        async with node(path, Says(path=str(tmp_path))):  # its statfs still waits for the first one
            await watched.until(HUNG)
            statfs.goes_on.set()
            await watched.until(ANSWERS)
        assert statfs.most_in_flight == 1


@pytest.mark.parametrize(
    ("code", "condition"),
    [(errno.ENOTCONN, HUNG), (errno.ECONNABORTED, HUNG), (errno.EIO, ANSWERS), (errno.ENOENT, ANSWERS)],
)
async def test_a_mount_that_nobody_serves_hangs_and_another_error_is_an_answer(
    path: Path, tmp_path: Path, statfs: Statfs, code: int, condition: Condition
) -> None:
    statfs.error = OSError(code, os.strerror(code))
    async with node(path, Says(path=str(tmp_path))), watching(path, deadline_s=0.3, interval_s=0.05) as watched:
        with trio.fail_after(30):
            while len(statfs.paths) < 15:  # noqa: ASYNC110 - threads of the watch
                await trio.sleep(0.02)
        assert watched.watch.condition is condition
        statfs.error = None
        await watched.until(ANSWERS)


# ---- commands


async def test_a_command_is_answered_or_fails_as_the_node_says(path: Path) -> None:
    async with node(path, Says()):
        watch = MountWatch(path, deadline_s=DEADLINE_S)
        assert await watch.ask("echo", 30, force=True) == {"force": True}
        with pytest.raises(RefusedError, match="not now"):
            await watch.ask("promote", 30)
        with pytest.raises(ControlError, match=r"has not answered sleep within 0\.1 s"):
            await watch.ask("sleep", 0.1)
        with trio.move_on_after(0.1) as given_up:
            await watch.ask("sleep", 5)
        assert given_up.cancelled_caught
    with pytest.raises(NotRunningError):
        await watch.ask("echo", 30)


# ---- a real node


@pytest.mark.root
async def test_a_mount_whose_processes_stand_still_hangs_and_a_killed_one_has_stopped(tmp_path: Path) -> None:
    lab = await trio.to_thread.run_sync(Lab.up, tmp_path / "lab")
    try:
        async with watching(lab.one.control, deadline_s=1.0) as watched:
            await watched.until(ANSWERS)
            assert watched.watch.status is not None
            assert watched.watch.status["path"] == str(lab.one.mount)
            lab.one.run("kill", "-STOP", *map(str, lab.one.pids()), check=True)
            await watched.until(HUNG)
            lab.one.run("kill", "-CONT", *map(str, lab.one.pids()), check=True)
            await watched.until(ANSWERS)
            lab.one.kill()
            await watched.until(STOPPED)
            assert watched.history == [ANSWERS, HUNG, ANSWERS, STOPPED]
    finally:
        await trio.to_thread.run_sync(lab.down)
