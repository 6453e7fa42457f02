"""Running one command of somebody else: its deadline, its process group, what it says, and what it leaves behind.

A command gets a session of its own, / as its directory and no input. What it writes goes to a file, or through a pipe of
which only the end is kept; in neither case is anybody waiting for a daemon that it leaves behind to let go of its output.

A process in uninterruptible sleep (on a mount that hangs, say) does not end on SIGKILL: it is waited for a few seconds, and
then told of. A daemon that left its session, its group and its parent is found again by a variable in the environment
that it was started with, as Jenkins does with BUILD_ID; one that writes over its environment to show a title is not.
"""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import trio

KILL_WAIT_S: Final = 3.0
MAX_LOG_BYTES: Final = 1024 * 1024

#: How much of the end of an output is looked at for its last line, and how much of that line is shown.
_TAIL_BYTES = 4096
_LINE_CHARACTERS = 200
#: What a pipe holds (pipe(7)) is at most this; more after the end of a command is of others that still write.
_PIPE_BYTES = 1024 * 1024
_NO_STATUS = 127


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended.

    `exit_status` is negative for a signal, 127 if the command could not be run at all, None if it was `timed_out`: then it
    has been killed with its group. `stuck` is the process if SIGKILL did not end it within `kill_wait_s`.
    """

    exit_status: int | None
    timed_out: bool
    last_line: str
    stuck: trio.Process | None = None

    @property
    def problem(self) -> str:
        """What is wrong with the end, without the last line; empty for exit status 0."""
        if self.timed_out or self.exit_status is None:
            stuck = f", and process {self.stuck.pid} does not end on SIGKILL" if self.stuck else ""
            return f"did not end in time{stuck}"
        if self.exit_status < 0:
            return f"ended by {_signal_name(-self.exit_status)}"
        return f"exit status {self.exit_status}" if self.exit_status else ""


def shell(text: str) -> tuple[str, ...]:
    """The command that has `text` run by the shell."""
    return ("sh", "-c", text)


async def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    output: Path | None = None,
    environment: Mapping[str, str] | None = None,
    kill_wait_s: float = KILL_WAIT_S,
) -> Result:
    """Run `command` for at most `timeout_s`, then kill its process group; never raises for what the command does.

    What it writes is appended to the file `output` below a line with the time and the command, after a file of more than
    MAX_LOG_BYTES was moved to NAME.1; nothing is kept if that cannot be written. Without a file only the last line is
    kept. `environment` is added to that of this process. Cancelled, it kills the group too.
    """
    if output is None:
        return await _run_piped(command, timeout_s, environment, kill_wait_s)
    log = await trio.to_thread.run_sync(_open_log, output, _shown(command))
    if log is None:
        # A service that is not started because its log has no room would be a failover for the sake of a log.
        return await _run(command, timeout_s, environment, subprocess.DEVNULL, kill_wait_s)
    with log:
        began = os.fstat(log.fileno()).st_size
        result = await _run(command, timeout_s, environment, log.fileno(), kill_wait_s)
        last_line = result.last_line or await trio.to_thread.run_sync(_last_line_from, log, began)
    return Result(result.exit_status, result.timed_out, last_line, result.stuck)


async def _run_piped(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None, kill_wait_s: float
) -> Result:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reading, False)
    tail = bytearray()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_tail, reading, tail)
            try:
                result = await _run(command, timeout_s, environment, writing, kill_wait_s)
            finally:
                os.close(writing)
            nursery.cancel_scope.cancel()
        _drain(reading, tail)
    finally:
        os.close(reading)
    return Result(result.exit_status, result.timed_out, result.last_line or last_line(tail), result.stuck)


async def _run(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None, output: int, kill_wait_s: float
) -> Result:
    try:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, ValueError) as error:
        return Result(_NO_STATUS, timed_out=False, last_line=f"{command[0]}: {_reason(error)}")
    ended = False
    try:
        with trio.move_on_after(timeout_s):
            await process.wait()
            ended = True
    finally:
        if not ended:
            await _kill_group(process, kill_wait_s)
    if ended:
        return Result(process.returncode, timed_out=False, last_line="")
    return Result(None, timed_out=True, last_line="", stuck=process if process.poll() is None else None)


async def _kill_group(leader: trio.Process, wait_s: float) -> None:
    # The leader has not been waited for, so no other process or group can have its number, even if it has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)
    with trio.move_on_after(wait_s, shield=True):
        await leader.wait()


async def _keep_tail(descriptor: int, tail: bytearray) -> None:
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        chunk = os.read(descriptor, _TAIL_BYTES)
        if not chunk:
            return
        _append(tail, chunk)
        await trio.lowlevel.checkpoint()


def _drain(descriptor: int, tail: bytearray) -> None:
    """What has been written and not been read yet, without waiting for others that may still write."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_PIPE_BYTES // _TAIL_BYTES):
            chunk = os.read(descriptor, _TAIL_BYTES)
            if not chunk:
                return
            _append(tail, chunk)


def _append(tail: bytearray, chunk: bytes) -> None:
    tail += chunk
    del tail[:-_TAIL_BYTES]


def append_note(path: Path, note: str) -> None:
    """Add a line with the time to a log; does nothing if it cannot be written."""
    log = _open_log(path, note)
    if log is not None:
        log.close()


def _shown(command: Sequence[str]) -> str:
    return command[2] if tuple(command[:2]) == ("sh", "-c") else shlex.join(command)


def _open_log(path: Path, heading: str) -> BinaryIO | None:
    """The log, opened for appending, with the time and the heading written to it; None if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > MAX_LOG_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        log = os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)
    except OSError:
        return None
    try:
        size = os.fstat(log.fileno()).st_size
        on_a_new_line = size == 0 or os.pread(log.fileno(), 1, size - 1) == b"\n"
        line = f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {_one_line(heading)}\n"
        log.write((b"" if on_a_new_line else b"\n") + line.encode(errors="replace"))
    except OSError:
        log.close()
        return None
    return log


def last_logged(path: Path) -> str:
    """The last line of output in a log; empty if there is none behind the last heading, or no log."""
    try:
        with path.open("rb") as log:
            line = _last_line_from(log, 0)
    except OSError:
        return ""
    return "" if line.startswith("--- ") else line


def _last_line_from(log: BinaryIO, began: int) -> str:
    try:
        end = os.fstat(log.fileno()).st_size
        start = max(began, end - _TAIL_BYTES)
        return last_line(os.pread(log.fileno(), _TAIL_BYTES, start))
    except OSError:
        return ""


def last_line(text: bytes | bytearray) -> str:
    """The last line that is not blank, as something that can be shown: printable, and not longer than a line."""
    for line in reversed(text.decode(errors="replace").splitlines()):
        if shown := _one_line(line):
            return shown[:_LINE_CHARACTERS]
    return ""


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True, slots=True)
class Marked:
    """One process for certain that was started with the mark: its pid is used again, but not with the same start time."""

    pid: int
    start_time: int


async def find_marked(variable: str, value: str) -> list[Marked] | None:
    """All processes, but not this one, whose environment has `variable` with exactly this `value`.

    None if they cannot be told within a few seconds: the environment of a process that hangs may hang who reads it.
    """
    mark = f"{variable}={value}".encode()
    with trio.move_on_after(KILL_WAIT_S), contextlib.suppress(OSError):
        # The thread only looks. One that was left behind may end much later, and then must not do anything to anybody.
        return await trio.to_thread.run_sync(_look, mark, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    return None


def _look(mark: bytes) -> list[Marked]:
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        if pid == os.getpid():
            continue
        began = _start_time(pid)
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if began is not None and mark in environment.split(b"\0") and _start_time(pid) == began:
            found.append(Marked(pid, began))
    return found


def _start_time(pid: int) -> int | None:
    """Clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The second field is the name in parentheses, which may hold anything: count from behind it.
    return int(stat.rpartition(b")")[2].split()[19])


async def wait_for(processes: Iterable[Marked], timeout_s: float, *, kill: bool = False) -> bool:
    """Wait for the end of all of them, with `kill` after SIGKILL to each; whether they have all ended in time."""
    with contextlib.ExitStack() as opened:
        descriptors = []
        for process in processes:
            with contextlib.suppress(OSError):
                # The descriptor holds on to whatever has the pid now; then its start time tells whether it is the one.
                descriptor = os.pidfd_open(process.pid)
                opened.callback(os.close, descriptor)
                if _start_time(process.pid) == process.start_time:
                    descriptors.append(descriptor)
                    if kill:
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        with trio.move_on_after(timeout_s):
            for descriptor in descriptors:
                await trio.lowlevel.wait_readable(descriptor)
            return True
    return False


async def end_marked(variable: str, value: str, grace_s: float) -> tuple[list[int], list[int] | None]:
    """Wait `grace_s` for the processes with the mark to end by themselves, then kill those that have not.

    Returns the pids that were killed, and those that did not end on SIGKILL: None if there was no telling.
    """
    grace_end = trio.current_time() + grace_s
    while (found := await find_marked(variable, value)) and trio.current_time() < grace_end:
        await wait_for(found, grace_end - trio.current_time())
    killed: set[int] = set()
    kill_end = trio.current_time() + KILL_WAIT_S if found else -math.inf
    # One that was just being started by another may have been missed: look again until there are none.
    while found and trio.current_time() < kill_end:
        killed.update(process.pid for process in found)
        await wait_for(found, kill_end - trio.current_time(), kill=True)
        found = await find_marked(variable, value)
    return sorted(killed), None if found is None else [process.pid for process in found]
