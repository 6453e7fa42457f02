"""Machines with a systemd of their own, on this one: each is a PID, mount, IPC, UTS, cgroup and network namespace.

What a machine is made of stands in machine.sh. It ends with the process that has started it, however that ends: systemd is the
first of its PID namespace, so all that runs there goes with it, and its mounts with the last process.

What a machine has not written itself it sees of this one's files: whoever installs or removes something does so on a machine,
since each of the others, in tests beside, would have it too, or lose it.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from mirrorfs import backing
from mirrorfs.lab import public
from mirrorfs.lab.network import ADDRESSES, Network

_BOOT: Final = Path(__file__).with_name("machine.sh")
_SYSTEMD: Final = Path("/lib/systemd/systemd")
_DEADLINE_S: Final = 90.0
_POLL_S: Final = 0.1


def why_not() -> str:
    """What this machine lacks for others on it; "" if nothing."""
    if not _SYSTEMD.exists():
        return "systemd is not installed here"
    if _cgroups() is None:
        return "there is no hierarchy of cgroups of version 2 here"
    return ""


def _cgroups() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    return None


class Machine:
    """One of them, on the host of the same name of a network. `directory` is its disk: it outlives a boot."""

    def __init__(self, name: str, directory: Path, network: Network) -> None:
        self.name = name
        self.address = ADDRESSES[name]
        self._directory = directory
        self.network = network
        cgroups = _cgroups()
        assert cgroups is not None
        self._cgroup = cgroups / f"{network.prefix}-{name}"
        self._process: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Switch it on; returns when everything that is enabled has been started, or has failed."""
        assert self._process is None
        self._directory.mkdir(exist_ok=True)
        self._cgroup.mkdir()
        # It is in its cgroup before it has a namespace of cgroups, so that this one is the root of what it sees. What is
        # exec'ed one after the other stays the same process, until `unshare` forks; if that ends, systemd is killed.
        joined = f'echo $$ >{shlex.quote(str(self._cgroup))}/cgroup.procs; exec "$@"'
        namespaces = ("--pid", "--mount", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child")
        command = ["setpriv", "--pdeathsig=KILL", "sh", "-c", joined, "sh", *self.network.entering(self.name)]
        log = (self._directory / "console").open("ab")
        with log:
            self._process = subprocess.Popen(
                [*command, "unshare", *namespaces, _BOOT, self._directory, self.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_for(self._is_up, "it is up")

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "console").read_text()
        return self._first() != 0 and self.run("systemctl", "is-system-running", check=False) in ("running", "degraded")

    def _first(self) -> int:
        """The pid of its systemd as seen from here; 0 while there is none."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        is_there = bool(children) and os.readlink(f"/proc/{children[0]}/exe").endswith("/systemd")
        return int(children[0]) if is_there else 0

    def entering(self) -> list[str]:
        """The words to put before a command, so that it runs on the machine."""
        clean = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TERM=dumb", "HOME=/root")
        return ["nsenter", f"--target={self._first()}", "--all", "--wdns=/", "--", *clean]

    def run(self, *command: str | Path, check: bool = True, timeout_s: float = _DEADLINE_S) -> str:
        """Run a command there, and return what it printed, errors too; AssertionError if it fails and `check` is asked for."""
        done = self.result(*command, timeout_s=timeout_s)
        said = done.stdout.strip()
        assert done.returncode == 0 or not check, f"{self.name}: {command}: {done.returncode}: {said}"
        return said

    def result(self, *command: str | Path, timeout_s: float = _DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """The same with its exit status."""
        return subprocess.run(
            [*self.entering(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def popen(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command there, its output to be read."""
        return subprocess.Popen(
            [*self.entering(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def write(self, path: str, text: str) -> None:
        """Put a file there."""
        subprocess.run(
            [*self.entering(), "sh", "-c", f"mkdir -p $(dirname {path}); cat >{path}"], input=text, text=True, check=True
        )

    def copy(self, file: Path, path: str) -> None:
        """Put a copy of a file of this machine there."""
        with file.open("rb") as content:
            subprocess.run([*self.entering(), "sh", "-c", f"cat >{path}"], stdin=content, check=True)

    @property
    def data(self) -> Path:
        """The disk that is mounted at /data, as seen from here; before anything is mounted over it, its files are there."""
        return self._directory / "disk"

    def property(self, unit: str, name: str) -> str:
        """What systemd says of a unit, as `MainPID` or `NRestarts`."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit)

    def is_active(self, unit: str) -> bool:
        """Whether the unit runs."""
        return self.run("systemctl", "is-active", unit, check=False) == "active"

    def log(self, unit: str, *more: str) -> str:
        """What the journal has of a unit."""
        return self.run("journalctl", "--no-pager", "--unit", unit, *more)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until the condition holds; AssertionError with the end of the journal if it does not."""
        end = time.monotonic() + _DEADLINE_S
        while not condition():
            if time.monotonic() > end:
                log = self.run("journalctl", "--no-pager", "--lines=60", check=False) if self._first() else ""
                raise AssertionError(f"{self.name}: not within {_DEADLINE_S:g} s: {what}\n{log}")
            time.sleep(_POLL_S)

    def cut_power(self) -> None:
        """End it at once; what is not on its disk is lost, though here the kernel keeps what was written. Again: no error."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        end = time.monotonic() + _DEADLINE_S
        while self._cgroup.exists():
            # Its processes are gone a moment after the first of them.
            for directory, _, _ in os.walk(self._cgroup, topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:
                    assert time.monotonic() < end, f"{directory}: processes are left"
                    time.sleep(_POLL_S)

    def remove(self) -> None:
        """Cut its power, and remove its disk."""
        self.cut_power()
        for directory, _, _ in os.walk(self._directory):
            backing.set_immutable(Path(directory), False)
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def _booted(directory: Path, *names: str, desk: bool = False) -> Iterator[list[Machine]]:
    network = Network(f"mfs-boot-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:6]}")
    with ExitStack() as stack:
        stack.callback(network.remove)
        network.create()
        if desk:
            public.create(network)
        found = [Machine(name, directory / name, network) for name in names]
        for machine in found:
            stack.callback(machine.remove)
            machine.boot()
        yield found


@contextmanager
def two_machines(directory: Path, *, desk: bool = False) -> Iterator[tuple[Machine, Machine]]:
    """Two of them with a cable between, both up; nothing is left of them. With a `desk` there is a third host (`public`)."""
    with _booted(directory, *ADDRESSES, desk=desk) as (one, two):
        yield one, two


@contextmanager
def one_machine(directory: Path) -> Iterator[Machine]:
    """The first of them alone."""
    with _booted(directory, next(iter(ADDRESSES))) as (one,):
        yield one
