# ruff: noqa: ASYNC240  (these tests may wait for their own small files)
import contextlib
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mirrorfs import control
from mirrorfs.errors import ConfirmationNeededError, ControlError, MirrorfsError, RefusedError

NOT_A_REQUEST = 'not a request, send one line of JSON: {"command": "...", "arguments": {...}}'


class _OwnError(MirrorfsError):
    """Of a class that mirrorfs.errors does not have."""


async def answer(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    match command:
        case "echo":
            return arguments
        case "refuse":
            raise RefusedError("not now, use --force")
        case "confirm":
            raise ConfirmationNeededError("is it dead?")
        case "own":
            raise _OwnError("something of ours")
        case "fail":
            raise ValueError("a mistake")
        case "unspeakable":
            return {"what": object()}
        case "long":
            return {"text": "x" * control.MAX_LINE_BYTES}
    raise AssertionError(command)


@asynccontextmanager
async def serving(path: Path, handler: control.Handler = answer) -> AsyncIterator[trio.CancelScope]:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(control.serve, path, handler))
        yield nursery.cancel_scope
        nursery.cancel_scope.cancel()


async def ask(path: Path, command: str, timeout_s: float = 10, **arguments: Any) -> dict[str, Any]:
    return await trio.to_thread.run_sync(partial(control.request, path, command, timeout_s, **arguments))


async def converse(path: Path, request: bytes) -> dict[str, Any]:
    """Send raw bytes, end the sending side, and read what comes back until the end."""
    received = b""
    async with await trio.open_unix_socket(path) as stream:
        with contextlib.suppress(trio.BrokenResourceError):  # the node may answer and close before it has read all
            await stream.send_all(request)
            await stream.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in stream:
                received += chunk
    answer: dict[str, Any] = json.loads(received)
    return answer


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "one.sock"


async def test_a_request_is_answered(path: Path) -> None:
    async with serving(path):
        assert await ask(path, "echo", number=1, text="zwölf") == {"number": 1, "text": "zwölf"}


async def test_the_socket_and_a_directory_made_for_it_are_for_the_owner_only(path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(path):
            assert mode(path) == 0o600
            assert mode(path.parent) == 0o700
    finally:
        os.umask(before)


async def test_the_socket_has_its_mode_before_anybody_can_connect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watched(socket.socket):
        def listen(self, backlog: int = 0, /) -> None:
            seen.append(mode(path))
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        async with serving(path):
            pass
    finally:
        os.umask(before)
    assert seen == [0o600]


async def test_the_socket_is_gone_after_the_end(path: Path) -> None:
    async with serving(path):
        assert path.is_socket()
    assert not path.exists()
    with pytest.raises(control.NotRunningError) as caught:
        await ask(path, "echo")
    assert str(caught.value) == (
        f"no mirrorfs node is running here (nothing listens on {path}), start it with: mirrorfs mount PATH"
    )


async def test_a_socket_that_a_dead_node_left_behind_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(control.NotRunningError):
        await ask(path, "echo")
    async with serving(path):
        assert await ask(path, "echo") == {}


async def test_a_second_node_is_refused_and_the_first_goes_on(path: Path) -> None:
    async with serving(path):
        with pytest.raises(ControlError) as caught:
            await control.serve(path, answer)
        assert str(caught.value) == (f"{path}: another mirrorfs node listens here already, unmount it first: mirrorfs unmount")
        assert await ask(path, "echo") == {}


async def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(ControlError) as caught:
        await control.serve(path, answer)
    assert str(caught.value) == f"{path}: is in the place of the control socket and is none, move it away"
    assert path.read_text() == "precious"


async def test_the_socket_of_a_successor_is_not_removed(path: Path) -> None:
    async with serving(path):
        path.unlink()
        successor = socket.socket(socket.AF_UNIX)
        successor.bind(str(path))
    successor.close()
    assert path.is_socket()


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("refuse", RefusedError, "not now, use --force"),
        ("confirm", ConfirmationNeededError, "is it dead?"),
        ("own", MirrorfsError, "something of ours"),
        ("long", ControlError, "the answer to long is longer than 1048576 bytes, ask for less"),
    ],
)
async def test_an_error_of_the_node_is_raised_with_its_class_and_message(
    path: Path, command: str, kind: type[MirrorfsError], message: str
) -> None:
    async with serving(path):
        with pytest.raises(MirrorfsError) as caught:
            await ask(path, command)
    assert type(caught.value) is kind
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("fail", "ValueError('a mistake')"),
        ("unspeakable", "TypeError('Object of type object is not JSON serializable')"),
    ],
)
async def test_a_mistake_in_the_node_is_logged_and_the_node_goes_on(
    path: Path, caplog: pytest.LogCaptureFixture, command: str, cause: str
) -> None:
    async with serving(path):
        with pytest.raises(ControlError) as caught:
            await ask(path, command)
        assert str(caught.value) == f"the command {command} failed in the node ({cause}), its log says where"
        assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
            ("mirrorfs.control", logging.ERROR, f"the command {command} failed")
        ]
        assert await ask(path, "echo") == {}


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"command": "echo"}',
        b'{"command": 1, "arguments": {}}',
        b'{"command": "echo", "arguments": []}',
        b'{"command": "echo", "arguments": {}, "more": 1}',
        b"[" * 100_000,
        b"",
    ],
)
async def test_what_is_no_request_is_answered_with_an_error(path: Path, line: bytes) -> None:
    async with serving(path):
        assert await converse(path, line + b"\n") == {"error": {"kind": "ControlError", "message": NOT_A_REQUEST}}
        assert await ask(path, "echo") == {}


@pytest.mark.parametrize("size", [control.MAX_LINE_BYTES, control.MAX_LINE_BYTES * 3])
async def test_an_endless_line_is_answered_with_an_error(path: Path, size: int) -> None:
    async with serving(path):
        assert await converse(path, b"x" * size) == {
            "error": {
                "kind": "ControlError",
                "message": "the request is longer than 1048576 bytes, ask for less",
            }
        }
        assert await ask(path, "echo") == {}


async def test_a_request_that_is_too_long_is_not_sent(path: Path) -> None:
    with pytest.raises(ControlError) as caught:
        await ask(path, "echo", text="x" * control.MAX_LINE_BYTES)
    assert str(caught.value) == "the request is longer than 1048576 bytes, ask for less"


async def test_clients_that_go_away_in_the_middle_harm_nobody(path: Path) -> None:
    async with serving(path):
        for part in (b"", b'{"comm', b'{"command": "echo", "arguments": {}}\n', b'{"command": "long", "arguments": {}}\n'):
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(part)
        assert await ask(path, "echo") == {}


async def test_a_connection_carries_several_requests(path: Path) -> None:
    line = b'{"command": "echo", "arguments": {"n": 1}}\n'
    async with serving(path), await trio.open_unix_socket(path) as stream:
        await stream.send_all(line * 2)
        await stream.send_eof()
        received = b"".join([chunk async for chunk in stream])
    assert [json.loads(answer) for answer in received.splitlines()] == [{"ok": {"n": 1}}] * 2


async def test_a_request_is_answered_while_another_waits(path: Path) -> None:
    waiting = trio.Event()
    go_on = trio.Event()

    async def handler(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if command == "wait":
            waiting.set()
            await go_on.wait()
        return {"command": command}

    answers: list[dict[str, Any]] = []

    async def wait() -> None:
        answers.append(await ask(path, "wait"))

    with trio.fail_after(10):
        async with serving(path, handler), trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await waiting.wait()
            assert await ask(path, "other") == {"command": "other"}
            assert answers == []
            go_on.set()
    assert answers == [{"command": "wait"}]


async def test_the_answer_of_a_node_that_ends_itself_arrives(path: Path) -> None:
    scopes: list[trio.CancelScope] = []

    async def handler(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        scopes[0].cancel()
        return {"message": "unmounted"}

    async with serving(path, handler) as scope:
        scopes.append(scope)
        with trio.CancelScope(shield=True):
            assert await ask(path, "unmount") == {"message": "unmounted"}


async def test_a_node_that_does_not_answer_is_reported(path: Path) -> None:
    async def handler(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        await trio.sleep_forever()
        raise AssertionError

    async with serving(path, handler):
        with pytest.raises(ControlError) as caught:
            await ask(path, "promote", timeout_s=0.1)
    assert type(caught.value) is ControlError
    assert str(caught.value) == f"the node behind {path} has not answered promote within 0.1 s, look at its log"


def one_answer_of(path: Path, respond: Callable[[socket.socket], object]) -> MirrorfsError:
    """The error that a request ends with if the other side is not a node but `respond`."""

    def serve_one() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.recv(65536)
            respond(connection)

    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=serve_one)
        server.start()
        with pytest.raises(MirrorfsError) as caught:
            control.request(path, "status", timeout_s=10)
        server.join()
    return caught.value


def test_a_node_that_ends_before_it_answers_is_reported(path: Path) -> None:
    error = one_answer_of(path, lambda connection: None)
    assert type(error) is control.NotRunningError
    assert str(error) == f"the node behind {path} ended before it answered, look at its log"


@pytest.mark.parametrize("line", [b"?\n", b"[]\n", b'{"ok": 1}\n', b'{"error": {"kind": "OSError"}}\n'])
def test_an_answer_that_is_none_is_reported(path: Path, line: bytes) -> None:
    error = one_answer_of(path, lambda connection: connection.sendall(line))
    assert str(error) == f"the node behind {path} sent what is no answer, is it of another version?"


def test_an_endless_answer_is_reported(path: Path) -> None:
    error = one_answer_of(path, lambda connection: connection.sendall(b"x" * (control.MAX_LINE_BYTES + 65537)))
    assert str(error) == f"the node behind {path} sent more than 1048576 bytes, look at its log"


@pytest.mark.parametrize("kind", ["OSError", "errno", "ClassVar", "Nothing"])
def test_a_kind_of_error_that_is_not_known_becomes_the_general_one(path: Path, kind: str) -> None:
    line = json.dumps({"error": {"kind": kind, "message": "so"}}).encode() + b"\n"
    error = one_answer_of(path, lambda connection: connection.sendall(line))
    assert type(error) is MirrorfsError
    assert str(error) == "so"


def test_a_socket_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ControlError) as caught:
        control.request(file / "socket", "status")
    assert str(caught.value) == f"{file / 'socket'}: cannot be used (Not a directory), are you root?"
