"""The unchanged applications of the demo: databases on a host's mount, whose acknowledged commits are noted outside of it.

Everything runs on the hosts of a lab, so that it dies with its host and `Lab.down` finds it.
"""

import contextlib
import itertools
import sqlite3
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from pathlib import Path

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import postgresql
from mirrorfs.lab.pair import Host
from mirrorfs.lab.postgresql import Server

_PSQL_OPTIONS = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", postgresql.USER, "-d", "postgres")

_SQLITE_CLIENT = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
for line in sys.stdin:
    database.execute("insert into noted values (?)", (int(line),))
    print(line, end="", flush=True)
"""


class Database(ABC):
    """One database with a table of numbers. `noted` are the numbers whose commit was acknowledged, over all hosts."""

    name: str

    def __init__(self) -> None:
        """Nothing is made or started before `create` and `start`."""
        self.noted: list[int] = []
        self.numbers = itertools.count(1)  # never the same twice: a commit that was in flight may or may not be there

    @abstractmethod
    def create(self, host: Host) -> None:
        """Make the database on the host's mount, and leave its server running if it has one."""

    @abstractmethod
    def start(self, host: Host) -> None:
        """Start the server on the host, if there is one; returns when it answers."""

    @abstractmethod
    def stop(self) -> None:
        """End the server in order, if it runs."""

    @abstractmethod
    def died(self) -> None:
        """The server has been killed with its host."""

    @abstractmethod
    def client(self, host: Host) -> list[str]:
        """A command that commits what `statement` says and answers each commit with its number on a line."""

    @abstractmethod
    def statement(self, number: int) -> str:
        """What makes the client commit this number."""

    @abstractmethod
    def found(self, host: Host) -> set[int]:
        """The numbers that are in the database now."""


class Sqlite(Database):
    """SQLite as Python has it, with its defaults: rollback journal, synchronous FULL."""

    name = "SQLite"

    def create(self, host: Host) -> None:
        """Make the file with its table."""
        with contextlib.closing(sqlite3.connect(self._file(host))) as connection:
            connection.execute("create table noted (n integer primary key)")

    def start(self, host: Host) -> None:
        """There is no server."""

    def stop(self) -> None:
        """There is no server."""

    def died(self) -> None:
        """There is no server."""

    def client(self, host: Host) -> list[str]:
        """A small program around Python's sqlite3."""
        return [sys.executable, "-c", _SQLITE_CLIENT, str(self._file(host))]

    def statement(self, number: int) -> str:
        """The number is enough."""
        return f"{number}\n"

    def found(self, host: Host) -> set[int]:
        """Open the file as the application would, which rolls a torn transaction back."""
        with contextlib.closing(sqlite3.connect(self._file(host))) as connection:
            return {number for (number,) in connection.execute("select n from noted")}

    def _file(self, host: Host) -> Path:
        return host.mount / "demo.sqlite"


class Postgresql(Database):
    """PostgreSQL as Debian has it, with its defaults, on a socket in `private` instead of the network."""

    installed = staticmethod(postgresql.installed)

    def __init__(self, programs: Path, private: Path) -> None:
        """`programs` is the directory of its programs; `private` is made, for the socket and the logs."""
        super().__init__()
        self.name = f"PostgreSQL {programs.parent.name}"
        self._programs = programs
        self._private = private
        self._server: Server | None = None
        postgresql.make_private(private)

    def create(self, host: Host) -> None:
        """Make the cluster, start its server, make the table. MirrorfsError if user postgres cannot reach the mount."""
        self._on(host).create()
        self.start(host)
        self._psql(host, "create table noted (n integer primary key)")

    def start(self, host: Host) -> None:
        """Start the server on the host, which recovers first if the last one was killed."""
        self._server = self._on(host)
        self._server.start()

    def stop(self) -> None:
        """Its fast shutdown."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def died(self) -> None:
        """Reap it."""
        server, self._server = self._server, None
        if server is not None:
            server.died()

    def client(self, host: Host) -> list[str]:
        """psql, with one connection."""
        return [str(self._programs / "psql"), *_PSQL_OPTIONS, "-h", str(self._private)]

    def statement(self, number: int) -> str:
        """psql prints what is returned once the commit is acknowledged, since the statement is a transaction by itself."""
        return f"insert into noted values ({number}) returning n;\n"  # noqa: S608 - a number

    def found(self, host: Host) -> set[int]:
        """Ask the server."""
        return {int(line) for line in self._psql(host, "select n from noted").split()}

    def _on(self, host: Host) -> Server:
        return Server(self._programs, host.mount / "postgresql", self._private, host.network.entering(host.name))

    def _psql(self, host: Host, command: str) -> str:
        return self._on(host).client("psql", *_PSQL_OPTIONS, "-c", command)


class Writer:
    """A client with one connection that commits one number after the other, until it is stopped or dies with its host."""

    def __init__(self, database: Database, host: Host) -> None:
        """Begin at once."""
        self._database = database
        self._process = host.popen(
            *database.client(host),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._commit_until_stopped, name=f"writer of {database.name}")
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """True once the client has ended, for whatever reason."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End after the commit that is under way; MirrorfsError if the client had ended by itself before."""
        ended_early = self.has_ended
        self._stopping.set()
        self._thread.join()
        if ended_early:
            raise MirrorfsError(f"the client of {self._database.name} ended while it was to write")

    def died(self) -> None:
        """The client has been killed with its host: returns when all that it had acknowledged is noted."""
        self._stopping.set()
        self._thread.join()

    def _commit_until_stopped(self) -> None:
        with self._process as client, contextlib.suppress(BrokenPipeError):
            assert client.stdin is not None
            assert client.stdout is not None
            while not self._stopping.is_set():
                number = next(self._database.numbers)
                client.stdin.write(self._database.statement(number))
                client.stdin.flush()
                if client.stdout.readline() != f"{number}\n":
                    break
                self._database.noted.append(number)
