"""Processes that somebody else's process started: finding them again for certain, and ending them."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mirrorfs.errors import MirrorfsError

_KILL_DEADLINE_S = 10
_STOP_DEADLINE_S = 10
#: States (proc(5)) of a thread that was told to stop in which no instruction of its program is executed any more. One that
#: waits for a disk (D) stops when it would return to the program.
_STANDING = b"TtDZX"


@dataclass(frozen=True, slots=True)
class Process:
    """One process for certain: a pid is used again, but not with the same start time (clock ticks since boot)."""

    pid: int
    start_time: int


def find(pid: int) -> Process | None:
    """The process that has the pid now, if there is one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses, which may hold anything: count from behind it.
    return Process(pid, start_time=int(stat.rpartition(b")")[2].split()[19]))


def find_all(pids: Iterable[int]) -> list[Process]:
    """Those of the pids that are processes now."""
    return [process for process in map(find, pids) if process is not None]


def session_id(pid: int) -> int | None:
    """The session of the process, None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def session_of(leader: Process) -> list[Process]:
    """All processes of the session that `leader` leads; empty once it has ended, since the pid may be another's by then."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    members = [process for process in find_all(pids) if session_id(process.pid) == leader.pid]
    return members if leader in members else []


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL to all of them, and wait until they have ended; MirrorfsError if one does not."""
    with contextlib.ExitStack() as opened:
        ending: list[tuple[Process, int]] = []
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                # The descriptor holds on to whatever has the pid now; then its start time tells whether it is the one.
                descriptor = opened.enter_context(_pidfd(process.pid))
                if find(process.pid) == process:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    ending.append((process, descriptor))
        for process, descriptor in ending:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(_KILL_DEADLINE_S * 1000):
                raise MirrorfsError(f"process {process.pid} does not end on SIGKILL")


def stop(processes: Iterable[Process]) -> None:
    """SIGSTOP to all of them, and wait until none of their threads can go on; MirrorfsError if one does not stand still."""
    stopping: list[Process] = []
    for process in processes:
        with contextlib.suppress(ProcessLookupError), _pidfd(process.pid) as descriptor:
            if find(process.pid) == process:
                signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
                stopping.append(process)
    end = time.monotonic() + _STOP_DEADLINE_S
    for process in stopping:
        while not all(state in _STANDING for state in _thread_states(process.pid)):
            if time.monotonic() > end:
                raise MirrorfsError(f"process {process.pid} does not stand still on SIGSTOP")
            time.sleep(0.001)


def _thread_states(pid: int) -> Iterator[bytes]:
    """The state of each thread of the process, one letter."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield Path(f"/proc/{pid}/task/{task}/stat").read_bytes().rpartition(b")")[2].split()[0]


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
