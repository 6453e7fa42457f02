"""The mount of this node, watched from outside: does it answer, and what does it say?

It is asked on its control socket and, independently, by a statfs of the mount, since the file system can stand still while the
socket answers. getattr would be answered from the kernel's cache; the request also wakes a session that has stalled.

There is one connection and one question at a time: a node that hangs finds no heap of them when it goes on, and one that ends
is known to have ended at once. How long an answer is awaited is counted in looks and not read from a clock, so that a
controller that itself stood still does not blame the mount.
"""

import errno
import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from mirrorfs import control
from mirrorfs.errors import ControlError

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25

_QUESTION: Final = b'{"command": "status", "arguments": {}}\n'


class Condition(Enum):
    """STOPPED: nobody is there. HUNG: somebody is and does not answer. ANSWERS: also a node whose writes are frozen does."""

    STOPPED = auto()
    HUNG = auto()
    ANSWERS = auto()


@dataclass(slots=True)
class _Awaited:
    """An answer, and for how long it has been awaited, in seconds of looks."""

    pending: bool = False
    waited_s: float = 0.0

    def begin(self) -> None:
        """Await it; what is awaited already goes on being."""
        self.pending = True

    def end(self) -> None:
        self.pending, self.waited_s = False, 0.0

    def look(self, interval_s: float) -> None:
        if self.pending:
            self.waited_s += interval_s


class MountWatch:
    """Watches one mount; `on_change` is called when its condition or what it says has changed, and must not wait.

    `status` is what the node said last; None if it is STOPPED, or if what it answers is no status.
    """

    def __init__(self, control_socket: Path, *, deadline_s: float, interval_s: float = INTERVAL_S) -> None:
        """A mount that owes an answer for `deadline_s` is HUNG; it is asked every `interval_s`."""
        self.condition = Condition.STOPPED
        self.status: dict[str, Any] | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._socket = control_socket
        self._deadline_s = deadline_s
        self._interval_s = interval_s
        self._answer = _Awaited()
        self._statfs = _Awaited()
        self._listens = False
        self._has_answered = False  # since somebody listens
        self._known = trio.Event()
        self._trouble = ""
        # A thread of its own: while it hangs on the mount there is no second one, and it takes none away from others.
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled; has started once the condition is known."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_regularly)
            nursery.start_soon(self._statfs_regularly)
            nursery.start_soon(self._look_regularly)
            await self._known.wait()
            task_status.started()

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        """A command to the node; raises the error that the node raised, or ControlError if it does not answer."""
        request = partial(control.request, self._socket, command, timeout_s, **arguments)
        try:
            with trio.fail_after(timeout_s + 1):
                return await trio.to_thread.run_sync(request, abandon_on_cancel=True)
        except trio.TooSlowError:
            raise ControlError(f"the node behind {self._socket} has not answered {command} within {timeout_s:g} s") from None

    # ---- what is known

    async def _look_regularly(self) -> None:
        while True:
            await trio.sleep(self._interval_s)
            self._answer.look(self._interval_s)
            self._statfs.look(self._interval_s)
            self._judge(self.status)

    def _judge(self, status: dict[str, Any] | None) -> None:
        if not self._listens:
            return
        if max(self._answer.waited_s, self._statfs.waited_s) >= self._deadline_s:
            self._tell(Condition.HUNG, status)
        elif self._has_answered:
            self._tell(Condition.ANSWERS, status)

    def _tell(self, condition: Condition, status: dict[str, Any] | None) -> None:
        self._known.set()
        if (condition, status) == (self.condition, self.status):
            return
        if condition is not self.condition:
            word = condition.name.lower()
            log.info("the mount behind %s: %s", self._socket, word, extra={"event": "mount-condition", "condition": word})
        self.condition, self.status = condition, status
        self.on_change()

    def _complain(self, trouble: str) -> None:
        """Log what is wrong once, until it is something else or nothing."""
        if trouble and trouble != self._trouble:
            log.warning("%s: %s", self._socket, trouble)
        self._trouble = trouble

    def _stopped(self) -> None:
        self._listens = self._has_answered = False
        self._answer.end()
        if not self._limiter.borrowed_tokens:  # what still hangs there hangs for the next node too
            self._statfs.end()
        self._tell(Condition.STOPPED, None)

    # ---- the control socket

    async def _ask_regularly(self) -> None:
        answered = False
        while True:
            stream = self._connect()
            if stream is not None:
                async with stream:
                    if answered:  # it lives, and has only ended the conversation
                        await trio.sleep(self._interval_s)
                    answered = await self._converse(stream)
                if answered:
                    continue
                self._stopped()
            answered = False
            await trio.sleep(self._interval_s)

    def _connect(self) -> trio.SocketStream | None:
        try:
            made = socket.socket(socket.AF_UNIX)
            try:
                made.setblocking(False)
                made.connect(os.fspath(self._socket))
            except BaseException:
                made.close()
                raise
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            self._stopped()
        except BlockingIOError:
            # Its backlog is full: somebody listens, and accepts nothing. trio would take it for a connection.
            self._listens = True
            self._answer.begin()
        except OSError as error:
            # Too many open files, say: that is our own trouble, and tells nothing of the node.
            self._complain(f"cannot be used ({error.strerror or error})")
            self._answer.end()
            self._known.set()
        else:
            self._listens = True
            return trio.SocketStream(trio.socket.from_stdlib_socket(made))
        return None

    async def _converse(self, stream: trio.SocketStream) -> bool:
        """Ask again and again until the connection ends; returns whether there was an answer."""
        answered = False
        try:
            while True:
                self._answer.begin()
                await stream.send_all(_QUESTION)
                received = bytearray()
                while not received.endswith(b"\n"):
                    chunk = await stream.receive_some()
                    if not chunk or len(received) > control.MAX_LINE_BYTES:
                        return answered
                    received += chunk
                self._answer.end()
                self._has_answered = answered = True
                status = _status(bytes(received))
                self._complain("the node's answer is no status, is it of another version?" if status is None else "")
                self._judge(status)
                with trio.move_on_after(self._interval_s):
                    # It has nothing to say until it is asked, so this tells when it ends.
                    await stream.receive_some()
                    return answered
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return answered

    # ---- the file system

    async def _statfs_regularly(self) -> None:
        while True:
            path = (self.status or {}).get("path")
            if isinstance(path, str):
                self._statfs.begin()
                if await self._statfs_answers(path):
                    self._statfs.end()
                self._judge(self.status)
            await trio.sleep(self._interval_s)

    async def _statfs_answers(self, path: str) -> bool:
        try:
            await trio.to_thread.run_sync(os.statvfs, path, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            # An error is an answer too, but not these: the mount is there and nobody serves it.
            return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
        return True


def _status(line: bytes) -> dict[str, Any] | None:
    """The status in an answer; None if it is something else, and even then it is an answer."""
    try:
        match json.loads(line):
            case {"ok": dict(status)}:
                return status
    except (ValueError, RecursionError):
        pass
    return None
