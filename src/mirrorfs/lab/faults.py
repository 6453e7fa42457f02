"""Faults at the labelled disk calls of a node's journal, for the nodes of a lab only.

    DIR/NODE/faults          the node can be given a fault: it was started while this directory was there
    DIR/NODE/faults/armed    the fault that it is to meet; it may be put there while the node runs
    DIR/NODE/faults/fired    the fault that it has met; `armed` is gone then
    DIR/NODE/faults/passed   the labels that it has come to, one a line

Who writes the journal says a label just before each disk call, and does nothing else there. That is enough to kill the process
before the call, or to let it fail; to kill it right after the call, or in the middle of a write, the call itself is another:
the two modules that write the journal find a module of ours under the name `os`.
"""

import errno
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

from mirrorfs import daemon, dirty_log, journal, keeper
from mirrorfs.core import ids
from mirrorfs.errors import MirrorfsError

#: Which system calls a label is for, by its last part.
_CALLS: Final = {
    "open": {"open"},
    "write": {"write", "pwrite"},
    "fsync": {"fsync", "fdatasync"},
    "rename": {"rename"},
    "fsync-directory": {"fsync"},
    "truncate": {"ftruncate"},
}
#: So few ids are reserved at once that a load of a second reserves some.
_IDS_AT_ONCE: Final = 64


class Kind(StrEnum):
    """What happens at the label; `TORN_WRITE` lets half of the bytes reach the file and kills then."""

    KILL_BEFORE = "kill -9 before"
    KILL_AFTER = "kill -9 after"
    EIO = "EIO"
    ENOSPC = "ENOSPC"
    TORN_WRITE = "torn write"

    @property
    def ends_by_itself(self) -> bool:
        """Whether the node lives to see the error."""
        return self in (Kind.EIO, Kind.ENOSPC)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a node meets when it comes to the label for the `nth` time, counted from its start or from when it was armed."""

    label: str
    kind: Kind
    nth: int = 1

    def __str__(self) -> str:
        times = f" (time {self.nth})" if self.nth > 1 else ""
        return f"{self.kind} at {self.label}{times}"


class Faults:
    """The faults of one host, from outside of its node."""

    def __init__(self, directory: Path) -> None:
        self._armed, self._fired, self._passed = (directory / name for name in ("armed", "fired", "passed"))
        self._directory = directory

    def enable(self) -> None:
        """From its next start on the node can be given faults."""
        self._directory.mkdir(exist_ok=True)
        self._passed.touch()

    def arm(self, fault: Fault) -> None:
        """Let the node meet the fault; MirrorfsError if another is waiting for it."""
        if self._armed.exists():
            raise MirrorfsError(f"{self._armed}: a fault is armed already: {self._armed.read_text()}")
        self._fired.unlink(missing_ok=True)
        fresh = self._armed.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(fault)))
        fresh.rename(self._armed)

    def disarm(self) -> None:
        """Take the fault back, if the node has not met it."""
        self._armed.unlink(missing_ok=True)

    @property
    def fired(self) -> Fault | None:
        """The fault that the node has met since one was armed last."""
        return _read(self._fired)

    def passed(self) -> list[str]:
        """The labels that the node has come to, over all its starts."""
        return self._passed.read_text().splitlines()


def _read(file: Path) -> Fault | None:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    return Fault(content["label"], Kind(content["kind"]), content["nth"])


def inject(directory: Path) -> None:
    """In the node's own process, before it begins: make it meet what is armed in `directory`."""
    injector = _Injector(directory)
    daemon.__dict__["Journal"] = partial(journal.Journal, at=injector.at)
    daemon.__dict__["DirtyLog"] = partial(dirty_log.DirtyLog, at=injector.at)
    for module in (journal, dirty_log):
        module.__dict__["os"] = injector.calls()
    ids.__dict__["BLOCK"] = _IDS_AT_ONCE
    keeper.__dict__["_RESERVE_AHEAD"] = _IDS_AT_ONCE // 4


class _Injector:
    """The faults of the process that it is in; any thread."""

    def __init__(self, directory: Path) -> None:
        self._armed, self._fired = directory / "armed", directory / "fired"
        self._passed = os.open(directory / "passed", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._count: Counter[tuple[Fault, str]] = Counter()
        self._due = threading.local()

    def at(self, label: str) -> None:
        """The `at` of the journal."""
        os.write(self._passed, label.encode() + b"\n")
        fault = _read(self._armed)
        if fault is None or fault.label != label:
            return
        self._count[fault, label] += 1
        if self._count[fault, label] != fault.nth:
            return
        self._armed.rename(self._fired)
        match fault.kind:
            case Kind.KILL_BEFORE:
                _die()
            case Kind.EIO | Kind.ENOSPC:
                number = getattr(errno, fault.kind)
                raise OSError(number, os.strerror(number))
            case Kind.KILL_AFTER | Kind.TORN_WRITE:
                self._due.fault = fault

    def calls(self) -> ModuleType:
        """A module like `os`, in which the call that is due does not return."""
        module = ModuleType("os")
        module.__dict__.update(os.__dict__)
        for name in set().union(*_CALLS.values()):
            module.__dict__[name] = self._call(name, getattr(os, name))
        return module

    def _call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            fault: Fault | None = getattr(self._due, "fault", None)
            if fault is None or name not in _CALLS[fault.label.partition(":")[2]]:
                return function(first, *rest, **named)
            if fault.kind is Kind.TORN_WRITE:
                data, *behind = rest
                rest = (data[: len(data) // 2], *behind)
            function(first, *rest, **named)
            _die()

        return call


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived its SIGKILL")
