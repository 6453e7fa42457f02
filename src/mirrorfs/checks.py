"""One look at a service: is there a process, does a port, a URL, a command, a mount answer.

What is looked at may hang, and a file of it may be on a mount that hangs: files are touched in threads that can be left
behind, at most one for each file, and a command that does not end on SIGKILL is not run again before it has ended.
"""

import os
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

import httpx
import trio

from mirrorfs import commands
from mirrorfs.commands import shell
from mirrorfs.failover_config import CheckConfig

_T = TypeVar("_T")

_SHOWN_CHARACTERS = 80
_PID_FILE_BYTES = 64
#: A command is killed at its timeout; this much later it is left to itself.
_KILL_WAIT_S = 0.5


@dataclass(slots=True)
class _Looker:
    """Who looks at one thing in threads: one after the other, and none any more once one was left behind."""

    turn: trio.Lock = field(default_factory=trio.Lock)
    left_behind: bool = False


_lookers: dict[tuple[str, str], _Looker] = {}
#: Commands that did not end on SIGKILL.
_stuck: dict[str, trio.Process] = {}


class _UnwellError(Exception):
    """What is wrong, in one line."""


async def check(config: CheckConfig) -> str:
    """Look once: "" if it is well, else one line of what is wrong, that begins with what was looked at.

    Never raises for what it finds, and takes at most `timeout_s` (a command that does not end on SIGKILL is given half a
    second more).
    """
    problem = f"no answer within {config.timeout_s:g} s"
    try:
        if config.kind == "command":
            await _check_command(config.target, config.timeout_s)
            return ""
        with trio.move_on_after(config.timeout_s):
            await _look(config)
            return ""
    except _UnwellError as error:
        problem = str(error)
    except (OSError, ValueError, OverflowError) as error:  # ValueError: of a host name that cannot be one, too
        problem = _reason(error)
    target = " ".join(config.target.split())
    shown = target if len(target) <= _SHOWN_CHARACTERS else f"{target[: _SHOWN_CHARACTERS - 3]}..."
    return f"{config.kind} {shown}: {problem}"


async def _look(config: CheckConfig) -> None:
    match config.kind:
        case "process":
            await _check_process(config.target)
        case "tcp":
            await _check_tcp(config.target)
        case "http":
            await _check_http(config.target)
        case "mount":
            await _in_thread("mount", config.target, _check_mount)
        case "command":
            raise AssertionError("a command has a deadline of its own")
        case _ as unknown:
            assert_never(unknown)


async def _in_thread(kind: str, target: str, look: Callable[[str], _T]) -> _T:
    """`look(target)` in a thread that is left behind when it hangs; then nobody looks again until it has come back."""
    looker = _lookers.setdefault((kind, target), _Looker())
    async with looker.turn:  # two services may be checked by the same file at the same time
        if looker.left_behind:
            raise _UnwellError("hangs: the last look at it has not come back")

        def look_and_tell() -> _T:
            try:
                return look(target)
            finally:
                looker.left_behind = False

        # From here to the start of the thread nothing is cancelled, so that it is the thread that takes this back.
        await trio.lowlevel.checkpoint_if_cancelled()
        looker.left_behind = True
        # A limiter of its own: those that hang must not take the place of others.
        limiter = trio.CapacityLimiter(1)
        try:
            return await trio.to_thread.run_sync(look_and_tell, abandon_on_cancel=True, limiter=limiter)
        except RuntimeError as error:  # no thread could be started
            looker.left_behind = False
            raise _UnwellError(str(error)) from None


async def _check_process(path: str) -> None:
    first_line = await _in_thread("process", path, _read_first_line)
    if not re.fullmatch(rb"[0-9]{1,10}", first_line) or int(first_line) == 0:
        raise _UnwellError("its first line is not a process id")
    try:
        with open(f"/proc/{int(first_line)}/stat", "rb") as file:  # noqa: ASYNC230  (the kernel answers from memory)
            state = file.read().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        raise _UnwellError(f"there is no process {int(first_line)}") from None
    if state in (b"Z", b"X"):
        raise _UnwellError(f"process {int(first_line)} has ended and is a zombie")


def _read_first_line(path: str) -> bytes:
    # Not blocking: a pipe in its place would be waited for without end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(descriptor, _PID_FILE_BYTES).partition(b"\n")[0].strip()
    finally:
        os.close(descriptor)


async def _check_tcp(target: str) -> None:
    host, _, port = target.rpartition(":")
    stream = await trio.open_tcp_stream(host.removeprefix("[").removesuffix("]"), int(port))
    await stream.aclose()


async def _check_http(url: str) -> None:
    if url.startswith("https:"):
        # Read again each time, so that a certificate authority that was replaced is known; 20 ms, hence a thread.
        context = await _in_thread("http", "", lambda _: httpx.create_ssl_context())
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; is not used
    # A transport that is given means no proxy: what matters is whether this machine answers.
    transport = httpx.AsyncHTTPTransport(verify=context)
    try:
        async with (
            httpx.AsyncClient(transport=transport, timeout=None) as client,  # noqa: S113  (`check` has a deadline)
            client.stream("GET", url) as answer,
        ):
            if not 200 <= answer.status_code < 400:
                raise _UnwellError(f"status {answer.status_code} {answer.reason_phrase}".rstrip())
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _UnwellError(_reason(error)) from None


async def _check_command(text: str, timeout_s: float) -> None:
    if text in _stuck and _stuck[text].poll() is None:
        raise _UnwellError(f"hangs: process {_stuck[text].pid} of the last look does not end on SIGKILL")
    _stuck.pop(text, None)
    result = await commands.run(shell(text), timeout_s=timeout_s, kill_wait_s=_KILL_WAIT_S)
    if result.stuck is not None:
        _stuck[text] = result.stuck
    if result.timed_out:
        raise _UnwellError(f"did not end within {timeout_s:g} s{_after(result.last_line)}")
    if result.problem:
        raise _UnwellError(f"{result.problem}{_after(result.last_line)}")


def _after(last_line: str) -> str:
    return f": {last_line}" if last_line else ""


def _check_mount(path: str) -> None:
    os.statvfs(path)
    # An empty directory answers too, when nothing is mounted on it.
    real = os.path.realpath(path)
    with open("/proc/self/mountinfo", "rb") as mounts:
        points = {re.sub(rb"\\([0-7]{3})", _unescaped, line.split()[4]) for line in mounts}
    if os.fsencode(real) not in points:
        raise _UnwellError("nothing is mounted there")


def _unescaped(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])


def _reason(error: BaseException) -> str:
    """Why something failed, in a few words: those of its first cause, since trio and httpx tell of attempts only."""
    cause: BaseException | None = error
    while cause is not None:
        error = cause
        # The context, too: httpcore says `from None` where the cause would have been of use.
        cause = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError | socket.gaierror) and error.errno:
        return os.strerror(error.errno)
    strerror = error.strerror if isinstance(error, OSError) else None
    return " ".join((strerror or str(error)).split()) or type(error).__name__
