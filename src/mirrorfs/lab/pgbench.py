"""pgbench on PostgreSQL: transactions of an application per second, of a cluster in each directory that is measured."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import postgresql
from mirrorfs.lab.postgresql import Server

#: By row of the table: what tells pgbench to do that.
SCRIPTS = {"pgbench tpcb-like": "tpcb-like", "pgbench select-only": "select-only"}

_SCALE = "10"  # a million accounts, 150 MB
_LOAD = ("--client=4", "--jobs=2")
_DATABASE = "postgres"


@contextlib.contextmanager
def serving(directory: Path, private: Path) -> Iterator[Server]:
    """A server with pgbench's tables in a fresh cluster below `directory`, stopped at the end; `private` is made.

    It stays up between the turns, idle, as that of an application would. Raises MirrorfsError if PostgreSQL is not installed,
    its user cannot reach the directory, or the cluster cannot be made.
    """
    programs = postgresql.installed()
    if programs is None:
        raise MirrorfsError("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    postgresql.make_private(private)
    server = Server(programs, directory / "pgbench", private)
    server.create()
    try:
        server.start()
        server.client("pgbench", "--quiet", "--initialize", f"--scale={_SCALE}", _DATABASE)
        yield server
    finally:
        server.stop()


def transactions_per_second(server: Server, script: str, seconds: float) -> float:
    """What the script of pgbench, one of `SCRIPTS`, makes in that time; pgbench knows whole seconds, so it is rounded up."""
    output = server.client("pgbench", f"--builtin={script}", *_LOAD, f"--time={math.ceil(seconds)}", _DATABASE)
    return parse(output)


def parse(output: str) -> float:
    """The transactions per second that pgbench printed; MirrorfsError if there are none."""
    found = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    if found is None:
        raise MirrorfsError(f"pgbench did not say how many transactions it made: {output.strip()}")
    return float(found[1])
