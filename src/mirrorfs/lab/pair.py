"""Two mirrorfs nodes on the two hosts of a lab: their processes, mounts and files.

Everything of a lab can be found again from its directory alone, so that whatever a killed one left behind can be cleared:
the namespaces by their names (a hash of the directory), processes by their namespace, mounts by their place.

    DIR/.mirrorfs-lab        says that what is here is ours to remove
    DIR/lab.json             the processes that were started
    DIR/NODE/data            the mount point; adopted in place, so the files underneath are in it too
    DIR/NODE/under           a bind mount of `data` as it is without mirrorfs
    DIR/NODE/state, keys, log, mirrorfs.toml, control.sock
    DIR/NODE/boot            the id of the host's boot, if that is not the machine's
    DIR/NODE/faults          faults of its disk that its node is to meet, if there are some (`faults`)
    DIR/disks                disks of the hosts' own, if they have some (`disks`)
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mirrorfs
from mirrorfs import backing, config, control
from mirrorfs.errors import ControlError, MirrorfsError, UsageError
from mirrorfs.lab import configuration, mounts, processes, public
from mirrorfs.lab.network import ADDRESSES, DESK, Network
from mirrorfs.lab.processes import Process

_POLL_S = 0.02
_SOCKET_PATH_MAX_BYTES = 99
_LOG_TAIL_LINES = 15
_MARKER = ".mirrorfs-lab"


def default_directory() -> Path:
    """Where the lab is if nobody says otherwise: $MIRRORFS_LAB_DIR, else a fixed place."""
    return Path(os.environ.get("MIRRORFS_LAB_DIR") or "/var/lib/mirrorfs-lab/default")


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 30) -> None:
    """Return as soon as `condition()` is true; raises MirrorfsError with `what` if it is not within `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise MirrorfsError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Host:
    """One host of the lab and the mirrorfs node on it."""

    name: str
    directory: Path
    network: Network

    @property
    def netns(self) -> str:
        """The name of its network namespace."""
        return self.network.namespace(self.name)

    @property
    def home(self) -> Path:
        """The directory of all that is its own."""
        return self.directory / self.name

    @property
    def mount(self) -> Path:
        """Where its replica is mounted."""
        return self.home / "data"

    @property
    def under(self) -> Path:
        """The directory of the mount point without the mount."""
        return self.home / "under"

    @property
    def backing(self) -> Path:
        """Where the files underneath can be read, mounted or not."""
        return self.under / backing.HIDDEN / "tree"

    @property
    def config(self) -> Path:
        """Its configuration, for `--config`."""
        return self.home / "mirrorfs.toml"

    @property
    def state_dir(self) -> Path:
        """Its state directory."""
        return self.home / "state"

    @property
    def keys(self) -> Path:
        """What makes its link authentic."""
        return self.home / "keys"

    @property
    def log(self) -> Path:
        """What its node has printed, over all its starts."""
        return self.home / "log"

    @property
    def boot(self) -> Path:
        """What makes its boot another than the machine's: a file with the id, if there is one."""
        return self.home / "boot"

    @property
    def control(self) -> Path:
        """Its control socket; elsewhere if the lab's path is too long for the address of a socket."""
        path = self.home / "control.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_MAX_BYTES:
            return path
        return _socket_directory(self.directory) / f"{self.name}.sock"

    def run(self, *command: str | Path, check: bool = False, **options: Any) -> subprocess.CompletedProcess[Any]:
        """subprocess.run on this host."""
        return subprocess.run([*self.network.entering(self.name), *command], check=check, **options)

    def popen(self, *command: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen on this host."""
        return subprocess.Popen([*self.network.entering(self.name), *command], **options)

    def status(self) -> dict[str, Any]:
        """What `mirrorfs status --json` says; ControlError if no node answers."""
        return control.request(self.control, "status", timeout_s=10)

    def promote(self, *, yes: bool = False, force: bool = False, automatic: bool = False) -> dict[str, Any]:
        """`mirrorfs promote`, or what a controller asks for; raises the error of the node."""
        return control.request(self.control, "promote", yes=yes, force=force, automatic=automatic)

    def demote(self, *, force: bool = False) -> dict[str, Any]:
        """`mirrorfs demote`; raises the error of the node."""
        return control.request(self.control, "demote", force=force)

    def answers(self) -> bool:
        """True if the node answers on its control socket."""
        try:
            self.status()
        except ControlError:
            return False
        return True

    def pids(self) -> list[int]:
        """The living processes of its node, those that the node started included; not other processes on the host."""
        return [process.pid for process in self._processes()]

    def kill(self) -> None:
        """SIGKILL to all processes of its node; returns when they have ended."""
        while alive := self._processes():
            processes.kill(alive)

    def start(self, deadline_s: float = 30, source: Path | None = None) -> None:
        """Start its node and wait until it answers; MirrorfsError with the end of its log if it does not."""
        self.launch(source)
        self.wait_answering(deadline_s)

    def launch(self, source: Path | None = None) -> None:
        """Start its node and wait for nothing; MirrorfsError if it runs already. `source` holds the mirrorfs to run, if that is
        another one than ours."""
        if self.pids():
            raise MirrorfsError(f"node {self.name} is running already: `mirrorfs lab kill {self.name}` first")
        # As a daemon is started: in a session of its own, and no child of ours, which would have to wait for it. The pid
        # that the shell prints is the node's own: nothing forks after that.
        daemonize = ["setsid", "--fork", "sh", "-c", 'echo $$; log=$1; shift; exec "$@" >>"$log" 2>&1 </dev/null', "sh"]
        is_special = self.boot.exists() or (self.home / "faults").exists()
        program = ["mirrorfs.lab.booted", str(self.home)] if is_special else ["mirrorfs"]
        mount = [sys.executable, "-m", *program, "mount", str(self.mount), "--config", str(self.config)]
        command = [*self.network.entering(self.name), *daemonize, str(self.log), *mount]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=node_environment(source), cwd="/")
        process = processes.find(int(done.stdout))
        if process is None:
            raise MirrorfsError(f"node {self.name} ended at once{self.log_tail()}")
        recorded = _read_record(self.directory)
        _write_record(self.directory, recorded | {self.name: [*recorded[self.name], process]})

    def wait_answering(self, deadline_s: float = 30) -> None:
        """Wait until its node answers; MirrorfsError with the end of its log if it does not or has ended."""
        try:
            wait_for(lambda: self.answers() or not self.pids(), f"node {self.name} answers", deadline_s)
        except MirrorfsError as error:
            raise MirrorfsError(f"{error}{self.log_tail()}") from None
        if not self.answers():
            raise MirrorfsError(f"node {self.name} has ended{self.log_tail()}")

    def stop(self, deadline_s: float = 30) -> None:
        """`mirrorfs unmount`: the clean end; returns when the node's processes are gone. Raises the error of the node."""
        control.request(self.control, "unmount", timeout_s=deadline_s)
        wait_for(lambda: not self.pids(), f"node {self.name} ends after unmount", deadline_s)

    def bind_under(self) -> None:
        """Make `under` show the directory of the mount point, on which nothing is mounted yet but perhaps a disk."""
        subprocess.run(["mount", "--bind", self.mount, self.under], check=True)
        # Private, or the mount over `data` would come back through `under` where mounts are shared.
        subprocess.run(["mount", "--make-private", self.under], check=True)

    def log_tail(self) -> str:
        """The end of its log, as the end of an error message."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        shown = "".join(f"\n  {line}" for line in lines[-_LOG_TAIL_LINES:])
        return f"; the end of {self.log}:{shown or ' (empty)'}"

    def describe(self) -> dict[str, Any]:
        """The host as `--json` shows it."""
        return {
            "name": self.name,
            "netns": self.netns,
            "mount": str(self.mount),
            "backing": str(self.backing),
            "config": str(self.config),
            "control": str(self.control),
            "log": str(self.log),
            "pids": self.pids(),
        }

    def _processes(self) -> list[Process]:
        # Every node was started in a session of its own. A session's number is not used again while one process of it
        # lives, so a leader with another start time means that all of the session is gone.
        recorded = _read_record(self.directory)[self.name]
        sessions = {leader.pid for leader in recorded if processes.find(leader.pid) in (leader, None)}
        on_host = processes.find_all(self.network.pids(self.name))
        return [process for process in on_host if processes.session_id(process.pid) in sessions]


class Lab:
    """A pair of hosts in one directory. As a context manager it is taken down at the end."""

    def __init__(self, directory: Path) -> None:
        """The lab that belongs to `directory`, whether it is up or not."""
        self.dir = Path(os.path.realpath(directory))
        self.network = Network(f"mfs-{_hash(self.dir)}")
        self.hosts = {name: Host(name, self.dir, self.network) for name in ADDRESSES}

    @property
    def one(self) -> Host:
        """The host that `up` makes the primary."""
        return self.hosts["one"]

    @property
    def two(self) -> Host:
        """The other one."""
        return self.hosts["two"]

    @property
    def disks(self) -> Path:
        """Where the disks are that were made for its hosts."""
        return self.dir / "disks"

    @classmethod
    def create(
        cls, directory: Path, *, options: Mapping[str, str] | None = None, sections: str = "", desk: bool = False
    ) -> Self:
        """Clear what is there and make two hosts with nothing running on them; `options` go to [replication].

        `sections` is TOML that goes to the end of both configurations; with a `desk`, there is a third host (`public`).
        Raises MirrorfsError if the directory holds files that are no lab's, ConfigError for a wrong option.
        """
        _require_root()
        lab = cls(directory)
        if lab.dir.is_dir() and any(lab.dir.iterdir()) and not (lab.dir / _MARKER).exists():
            raise MirrorfsError(f"{lab.dir} holds files that are no lab's: choose another directory with --dir")
        lab.down()
        lab.dir.mkdir(parents=True, exist_ok=True)
        (lab.dir / _MARKER).touch()
        try:
            lab._make_hosts(options or {}, sections, desk)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def up(
        cls,
        directory: Path,
        *,
        options: Mapping[str, str] | None = None,
        mirrored: bool = True,
        deadline_s: float = 60,
        report: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """A fresh pair: as `create`, then both nodes are started and, if `mirrored`, one is primary and two in sync.

        Raises MirrorfsError with the end of a node's log if that does not come about; the files are kept then.
        """
        end = time.monotonic() + deadline_s
        report(f"making two hosts in {directory}")
        lab = cls.create(directory, options=options)
        try:
            report("starting both nodes")
            if mirrored:
                lab.run_all(end - time.monotonic())
            else:
                for host in lab.hosts.values():
                    host.start(end - time.monotonic())
        except BaseException:
            lab._stop_everything()
            raise
        return lab

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The lab that is up in `directory`; MirrorfsError if there is none."""
        _require_root()
        lab = cls(directory)
        if not ((lab.dir / _MARKER).exists() and lab.network.exists()):
            raise MirrorfsError(f"no lab is up in {lab.dir}: `mirrorfs lab up` makes one")
        _read_record(lab.dir)
        return lab

    def down(self) -> None:
        """End and remove everything of this lab, or of what is left of it; without one, nothing happens."""
        _require_root()
        self._stop_everything()
        shutil.rmtree(_socket_directory(self.dir), ignore_errors=True)
        if not (self.dir / _MARKER).exists():
            return
        for directory in (*(host.home for host in self.hosts.values()), self.disks):
            _remove_tree(directory)
        for file in (_record_file(self.dir), _record_file(self.dir).with_suffix(".new")):
            file.unlink(missing_ok=True)
        (self.dir / _MARKER).unlink()
        with contextlib.suppress(OSError):  # it may hold what somebody else put there
            self.dir.rmdir()

    def cut(self, sender: str | None = None) -> None:
        """Let nothing that `sender` sends arrive at the other host; without a sender, nothing of either."""
        self.network.cut(sender)

    def heal(self) -> None:
        """Undo every cut."""
        self.network.heal()
        if self.network.has_desk:
            public.heal(self.network)

    def run_all(self, deadline_s: float = 60, source: Path | None = None) -> None:
        """Start both nodes (as `Host.launch`), make the first the primary, and wait until they are mirrored."""
        end = time.monotonic() + deadline_s
        for host in self.hosts.values():
            host.launch(source)
        for host in self.hosts.values():
            host.wait_answering(end - time.monotonic())
        self.one.promote(yes=True)
        self.wait_mirrored(end - time.monotonic())

    def host(self, name: str) -> Host:
        """The host of that name; UsageError if there is none."""
        if name not in self.hosts:
            raise UsageError(f"there is no node {name!r} in a lab; the nodes are {' and '.join(self.hosts)}")
        return self.hosts[name]

    def primary(self) -> Host | None:
        """The host whose node is the primary (or goes on alone) now, if exactly one says so."""
        found = [host for host in self.hosts.values() if _state(host) in ("primary", "solo")]
        return found[0] if len(found) == 1 else None

    def is_mirrored(self) -> bool:
        """True if one node is the primary, the other its standby, and both are in the in-sync set."""
        try:
            statuses = [host.status() for host in self.hosts.values()]
        except ControlError:
            return False
        primary = [status for status in statuses if status["state"] == "primary"]
        standby = [status for status in statuses if status["state"] == "standby"]
        return len(primary) == len(standby) == 1 and set(primary[0]["in_sync"]) == set(self.hosts)

    def wait_mirrored(self, deadline_s: float = 60) -> None:
        """Wait until `is_mirrored`; MirrorfsError with states and logs if it is not in time or a node has ended."""

        def mirrored_or_hopeless() -> bool:
            return self.is_mirrored() or any(not host.pids() for host in self.hosts.values())

        with contextlib.suppress(MirrorfsError):
            wait_for(mirrored_or_hopeless, "both nodes are mirrored", deadline_s)
        if not self.is_mirrored():
            states = "\n".join(f"{host.name} is {_state(host)}{host.log_tail()}" for host in self.hosts.values())
            raise MirrorfsError(f"the pair in {self.dir} is not mirrored (waited for {deadline_s:.0f} s at most)\n{states}")

    def describe(self) -> dict[str, Any]:
        """The lab as `--json` shows it, the primary first."""
        primary = self.primary()
        hosts = sorted(self.hosts.values(), key=lambda host: host is not primary)
        return {"dir": str(self.dir), "nodes": [host.describe() for host in hosts]}

    def kill_everything(self, name: str) -> None:
        """SIGKILL to all that runs on a host, its node and what else there is."""
        while alive := self.network.pids(self.host(name).name):
            processes.kill(processes.find_all(alive))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.down()

    def _make_hosts(self, options: Mapping[str, str], sections: str, desk: bool) -> None:
        _write_record(self.dir, {name: [] for name in self.hosts})
        for host in self.hosts.values():
            host.mount.mkdir(parents=True)
            host.under.mkdir()
            host.state_dir.mkdir()
            host.config.write_text(configuration.text(host, self.hosts.values(), options, sections, desk=desk))
            config.load(host.config, host.name)
            host.bind_under()
        configuration.acquaint(*(host.keys for host in self.hosts.values()))
        self.network.create()
        if desk:
            public.create(self.network)

    def _stop_everything(self) -> None:
        """Processes first: they keep mounts busy and namespaces alive."""
        with contextlib.suppress(MirrorfsError):  # a damaged record: the namespaces tell enough
            for leader in [leader for started in _read_record(self.dir).values() for leader in started]:
                processes.kill(processes.session_of(leader))
        while alive := [pid for name in (*self.hosts, DESK) for pid in self.network.pids(name)]:
            processes.kill(processes.find_all(alive))
        mounts.detach_below(self.dir)
        self.network.remove()


def _hash(directory: Path) -> str:
    return hashlib.sha256(os.fsencode(directory)).hexdigest()[:6]


def _socket_directory(directory: Path) -> Path:
    return Path(f"/run/mirrorfs-lab-{_hash(directory)}")


def _require_root() -> None:
    if os.geteuid() != 0:
        raise MirrorfsError("a lab needs root, for its namespaces and mounts")


def _state(host: Host) -> str:
    try:
        return str(host.status()["state"])
    except ControlError:
        return "not answering"


def node_environment(source: Path | None = None) -> dict[str, str]:
    """Ours, with this very package to be imported or that in `source`, and without what would choose another node than the
    file does."""
    environment = {name: value for name, value in os.environ.items() if name != "MIRRORFS_NODE"}
    first = str(source or Path(mirrorfs.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (first, environment.get("PYTHONPATH"))))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _remove_tree(top: Path) -> None:
    for directory, _, _ in os.walk(top):
        with contextlib.suppress(OSError):  # a path that is too long for a name; removing goes by descriptors
            backing.set_immutable(Path(directory), False)
    try:
        shutil.rmtree(top)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise MirrorfsError(f"{top} cannot be removed: {error.strerror}: {error.filename}") from error


def _record_file(directory: Path) -> Path:
    return directory / "lab.json"


def _read_record(directory: Path) -> dict[str, list[Process]]:
    """The processes that were started, for each host; MirrorfsError if the file is damaged or missing."""
    file = _record_file(directory)
    try:
        nodes = json.loads(file.read_text())["nodes"]
        return {
            name: [Process(pid=int(entry["pid"]), start_time=int(entry["start_time"])) for entry in nodes[name]]
            for name in ADDRESSES
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MirrorfsError(f"{file} is damaged or missing: `mirrorfs lab down` clears the lab") from error


def _write_record(directory: Path, record: Mapping[str, list[Process]]) -> None:
    nodes = {
        name: [{"pid": process.pid, "start_time": process.start_time} for process in started]
        for name, started in record.items()
    }
    new = _record_file(directory).with_suffix(".new")
    new.write_text(json.dumps({"nodes": nodes}, indent=2) + "\n")
    new.replace(_record_file(directory))
