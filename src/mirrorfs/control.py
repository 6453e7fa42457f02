"""The control socket: requests of the commands to the node that runs on this machine.

A Unix stream socket of mode 0600. One JSON object on a line each way: `{"command": ..., "arguments": {...}}` is answered
with `{"ok": {...}}` or `{"error": {"kind": CLASS, "message": ...}}`; a connection may carry several, one after the other.
"""

import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from mirrorfs import errors
from mirrorfs.errors import ControlError, MirrorfsError

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]

MAX_LINE_BYTES = 1024 * 1024
_SEND_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class NotRunningError(ControlError):
    """No node listens on the control socket, or it ended before it had answered."""


async def serve(path: Path, handler: Handler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Answer requests on `path` until cancelled, each connection in a task of its own; then remove the socket.

    A handler's MirrorfsError travels to the client; any other exception is logged and travels as ControlError. Raises
    ControlError if `path` is in use, OSError if it cannot be made.
    """
    plain_socket, inode = _listen(path)
    with trio.socket.from_stdlib_socket(plain_socket) as listening:
        try:
            listener = trio.SocketListener(listening)
            await trio.serve_listeners(partial(_converse, handler), [listener], task_status=_Started(task_status))
        finally:
            _remove(path, inode)


def request(path: Path, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
    """Ask the node that listens on `path` and return its answer; for commands, not for use under trio.

    Raises the class of error that the node raised, NotRunningError if there is none, ControlError if it does not answer
    within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    question = json.dumps({"command": command, "arguments": arguments}).encode() + b"\n"
    if len(question) > MAX_LINE_BYTES:
        raise ControlError(f"the request is longer than {MAX_LINE_BYTES} bytes, ask for less")
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(timeout_s)
            client.connect(os.fspath(path))
            client.sendall(question)
            line = _receive_line(client, path, deadline)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunningError(
            f"no mirrorfs node is running here (nothing listens on {path}), start it with: mirrorfs mount PATH"
        ) from None
    except (ConnectionResetError, BrokenPipeError):
        raise _ended(path) from None
    except (TimeoutError, BlockingIOError):  # a connect to a full backlog that times out is EAGAIN
        raise ControlError(
            f"the node behind {path} has not answered {command} within {timeout_s:g} s, look at its log"
        ) from None
    except OSError as error:
        raise ControlError(f"{path}: cannot be used ({error.strerror or error}), are you root?") from None
    return _answer_or_raise(path, line)


class _Started:
    """Passes "started" on without the listeners, which are nobody's business."""

    def __init__(self, outer: trio.TaskStatus[None]) -> None:
        self._outer = outer

    def started(self, value: object = None) -> None:
        self._outer.started()


def _listen(path: Path) -> tuple[socket.socket, tuple[int, int]]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _directory_lock(path.parent):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            # Linux gives the socket file the mode of the unbound socket: at no time is it wider, with no umask set for
            # all threads.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(os.fspath(path))
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        entry = path.lstat()
    return listener, (entry.st_dev, entry.st_ino)


@contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Between the look at a socket and its removal no other node may put its own there."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"{path}: is in the place of the control socket and is none, move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody listens
    raise ControlError(f"{path}: another mirrorfs node listens here already, unmount it first: mirrorfs unmount")


def _remove(path: Path, inode: tuple[int, int]) -> None:
    try:
        with _directory_lock(path.parent):
            entry = path.lstat()
            if (entry.st_dev, entry.st_ino) == inode:
                path.unlink()
    except OSError as error:
        # A socket that is left behind is removed by the next node; nothing is worth failing the end of this one.
        log.info("%s: not removed (%s)", path, error.strerror)


async def _converse(handler: Handler, stream: trio.SocketStream) -> None:
    try:
        async with stream:
            await _answer_all(handler, stream)
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        log.debug("a client of the control socket went away")
    except Exception:
        log.exception("the conversation with a client of the control socket failed")


async def _answer_all(handler: Handler, stream: trio.SocketStream) -> None:
    buffered = bytearray()
    while True:
        end = buffered.find(b"\n")
        if end < 0 and len(buffered) < MAX_LINE_BYTES:
            chunk = await stream.receive_some()
            if not chunk:
                return
            buffered += chunk
            continue
        too_long = not 0 <= end < MAX_LINE_BYTES
        if too_long:
            answer = _error(ControlError(f"the request is longer than {MAX_LINE_BYTES} bytes, ask for less"))
        else:
            answer = await _answer(handler, bytes(buffered[:end]))
            del buffered[: end + 1]
        # Shielded, because the answer to "unmount" is sent by a node that is ending already.
        with trio.move_on_after(_SEND_TIMEOUT_S, shield=True) as sending:
            await stream.send_all(answer)
        if too_long or sending.cancelled_caught:
            return


async def _answer(handler: Handler, line: bytes) -> bytes:
    try:
        command, arguments = _parse(line)
    except ControlError as error:
        return _error(error)
    try:
        answer = _line({"ok": await handler(command, arguments)})
    except MirrorfsError as error:
        return _error(error)
    except Exception as error:
        log.exception("the command %s failed", command)
        return _error(ControlError(f"the command {command} failed in the node ({error!r}), its log says where"))
    if len(answer) > MAX_LINE_BYTES:
        return _error(ControlError(f"the answer to {command} is longer than {MAX_LINE_BYTES} bytes, ask for less"))
    return answer


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        match json.loads(line):
            case {"command": str(command), "arguments": dict(arguments), **rest} if not rest:
                return command, arguments
    except (ValueError, RecursionError):
        pass
    raise ControlError('not a request, send one line of JSON: {"command": "...", "arguments": {...}}')


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _error(error: MirrorfsError) -> bytes:
    return _line({"error": {"kind": type(error).__name__, "message": str(error)}})


def _receive_line(client: socket.socket, path: Path, deadline: float) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        if len(received) > MAX_LINE_BYTES:
            raise ControlError(f"the node behind {path} sent more than {MAX_LINE_BYTES} bytes, look at its log")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        client.settimeout(left_s)
        chunk = client.recv(65536)
        if not chunk:
            raise _ended(path)
        received += chunk
    return bytes(received)


def _ended(path: Path) -> NotRunningError:
    return NotRunningError(f"the node behind {path} ended before it answered, look at its log")


def _answer_or_raise(path: Path, line: bytes) -> dict[str, Any]:
    try:
        match json.loads(line):
            case {"ok": dict(answer)}:
                return answer
            case {"error": {"kind": str(kind), "message": str(message)}}:
                found = getattr(errors, kind, None)
                raise (found if isinstance(found, type) and issubclass(found, MirrorfsError) else MirrorfsError)(message)
    except (ValueError, RecursionError):
        pass
    raise ControlError(f"the node behind {path} sent what is no answer, is it of another version?")
