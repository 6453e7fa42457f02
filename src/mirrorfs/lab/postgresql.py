"""PostgreSQL as Debian has it, with its defaults, as a program to try a file system with."""

import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab.pair import wait_for

USER = "postgres"
_INSTALLED = Path("/usr/lib/postgresql")
_STOP_DEADLINE_S = 20


def installed() -> Path | None:
    """The directory of the programs of the newest PostgreSQL on this machine; None without one."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return None
    found = [path.parent for path in _INSTALLED.glob("*/bin/initdb") if path.parent.parent.name.isdecimal()]
    return max(found, key=lambda programs: int(programs.parent.name), default=None)


def as_postgres(*command: str) -> list[str]:
    """A command as the user of PostgreSQL."""
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--", *command]


def make_private(directory: Path) -> None:
    """Make a directory for the sockets and the logs of servers, which nobody else can look into."""
    directory.mkdir(mode=0o700)
    shutil.chown(directory, USER, USER)


class Server:
    """One cluster in a directory and its server, which listens on a socket in `private` and nowhere else."""

    def __init__(self, programs: Path, cluster: Path, private: Path, entering: Sequence[str] = ()) -> None:
        """`private` is one of `make_private`; `entering` are the words before a command that make it run on a lab's host."""
        self.name = f"PostgreSQL {programs.parent.name}"
        self.programs = programs
        self.cluster = cluster
        self.private = private
        self._entering = entering
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the cluster. MirrorfsError if user postgres cannot reach the directory that it is to be in."""
        place = self.cluster.parent
        if self._run("test", "-x", str(place)).returncode:
            raise MirrorfsError(f"{place} cannot be reached by user {USER}: choose another directory")
        self.cluster.mkdir(mode=0o700)
        shutil.chown(self.cluster, USER, USER)
        # Without sync, which takes long and is of use only if the power fails before the first checkpoint.
        made = self._run(
            *(str(self.programs / "initdb"), "-D", str(self.cluster), "-A", "trust", "--locale=C.UTF-8", "--no-sync")
        )
        if made.returncode:
            raise MirrorfsError(f"initdb failed on {self.cluster}: {made.stderr.strip()}")

    def start(self) -> None:
        """Start the server, which recovers first if the last one was killed; returns when it answers."""
        log = self.private / "server.log"
        with log.open("ab") as output:
            # A child of ours, so that it is reaped: its successor refuses to start while there is a process of that pid.
            self._process = process = subprocess.Popen(
                [
                    *self._entering,
                    *as_postgres(str(self.programs / "postgres"), "-D", str(self.cluster)),
                    *("-k", str(self.private), "-c", "listen_addresses="),
                ],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        ready = [str(self.programs / "pg_isready"), "-q", "-h", str(self.private)]
        wait_for(
            lambda: process.poll() is not None or subprocess.run(ready, check=False).returncode == 0,
            f"{self.name} answers; see {log}",
        )
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()
            raise MirrorfsError("\n  ".join([f"{self.name} has ended at once; the end of its log:", *lines[-10:]]))

    def stop(self) -> None:
        """Its fast shutdown, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise MirrorfsError(f"{self.name} does not end within {_STOP_DEADLINE_S} s") from None

    def died(self) -> None:
        """It has been killed: reap it."""
        process, self._process = self._process, None
        if process is not None:
            process.wait()

    def client(self, program: str, *arguments: str) -> str:
        """What a client program of PostgreSQL printed; MirrorfsError if it fails."""
        done = self._run(str(self.programs / program), "-h", str(self.private), *arguments)
        if done.returncode:
            raise MirrorfsError(f"{program} failed on {self.cluster}: {done.stderr.strip()}")
        return done.stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        whole = [*self._entering, *as_postgres(*command)]
        return subprocess.run(whole, cwd="/", capture_output=True, text=True, check=False)
