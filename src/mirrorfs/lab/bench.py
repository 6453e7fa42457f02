"""`mirrorfs bench`: the same work on a plain directory, a mount alone, a mirrored one and what else is asked for, in turns.

Each round does every workload on every system, one after the other, so that a drift of the machine hits all alike. What
counts are the ratios within one run; the figures by themselves are the machine's.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.lab import gluster, pgbench, plot, postgresql, scratch
from mirrorfs.lab.configuration import PORT
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Lab, wait_for
from mirrorfs.lab.postgresql import Server

# The figure is operations per second.
FIO = {
    "write 1M sequential": "--rw=write --bs=1M --size=256M",
    "write 128k sequential": "--rw=write --bs=128k --size=128M",
    "write 4k random": "--rw=randwrite --bs=4k --size=64M",
    "write 4k random, 8 jobs": "--rw=randwrite --bs=4k --size=16M --numjobs=8",
    "write 8k + fdatasync": "--rw=write --bs=8k --size=32M --fdatasync=1",
    "write 4k O_DIRECT aio, 16 deep": "--rw=randwrite --bs=4k --size=64M --direct=1 --ioengine=libaio --iodepth=16",
    "read 4k random, cached": "--rw=randread --bs=4k --size=32M --loops=100 --invalidate=0",
    "read 1M sequential, cached": "--rw=read --bs=1M --size=64M --loops=100 --invalidate=0",
}

_FILES_PER_SECOND_ASKED = 400
_FILES_PER_DIRECTORY = 100
_FILE_BYTES = 4096

_NATIVE = "native"  # the system that the others are compared with
_SYSTEMS = (_NATIVE, "mount alone", "mirrored", "glusterfs")
_SMALL_FILES = ("create + write 4k files", "stat files", "rename files", "unlink files")

_Figures = dict[str, dict[str, list[float]]]  # by workload and system, one figure a round


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done in one turn: `measure` works in the directory of a system and returns the figures of `rows`."""

    name: str  # as it is told while it runs
    rows: Sequence[str]
    measure: Callable[[str, Path], Mapping[str, float]]  # of the system's name and its directory


def run(
    *,
    directory: Path | None,
    rounds: int,
    seconds: float,
    json_file: Path | None,
    only: Sequence[str] = (),
    glusterfs: bool = False,
    others: Mapping[str, Path] | None = None,
    plot_file: Path | None = None,
) -> int:
    """Measure in `directory` or a fresh one, print the table, keep all figures in `json_file`; the exit status is 0.

    `seconds` is for each workload, system and round. With `only`, just the workloads whose name contains one of its words;
    with `glusterfs`, a pair of that too; `others` are further directories, by the name of their system. `plot_file` gets the
    ratios as SVG. Raises UsageError for what cannot be meant so, MirrorfsError if a program is missing or fails.
    """
    others = others or {}
    _check(others, [file for file in (json_file, plot_file) if file])
    if plot_file is not None:
        plot.require()
    if glusterfs:
        gluster.require()
    figures: _Figures = {}
    with scratch.place(directory) as place, contextlib.ExitStack() as cleanup:
        place.mkdir(parents=True, exist_ok=True)
        archive = _make_archive(Path(cleanup.enter_context(_temporary(place, "archive-"))))
        servers: dict[str, Server] = {}
        works = _selected(_works(archive, seconds, servers), only)
        systems = {
            _NATIVE: cleanup.enter_context(_temporary(place, "native-")),
            "mount alone": cleanup.enter_context(_alone(place / "alone")),
            "mirrored": cleanup.enter_context(_mirrored(place / "mirrored")),
        }
        if glusterfs:
            _say("setting GlusterFS up")
            systems["glusterfs"] = cleanup.enter_context(gluster.mounted(place / "glusterfs"))
        for name, other in others.items():
            systems[name] = cleanup.enter_context(_temporary(other, "mirrorfs-bench-"))
        if any(row in pgbench.SCRIPTS for work in works for row in work.rows):
            private = cleanup.enter_context(_temporary(place, "postgresql-"))
            for number, (system, target) in enumerate(systems.items()):
                _say(f"making a cluster of PostgreSQL: {system}")
                servers[system] = cleanup.enter_context(pgbench.serving(target, private / str(number)))
        for number in range(1, rounds + 1):
            for work in works:
                _say(f"round {number} of {rounds}: {work.name}")
                for system, target in systems.items():
                    measured = work.measure(system, target)
                    for row in work.rows:
                        figures.setdefault(row, {}).setdefault(system, []).append(measured[row])
    medians = _medians(figures)
    print(_table(medians, rounds))
    if json_file is not None:
        kept = {"machine": _machine(), "rounds": rounds, "seconds": seconds, "operations_per_second": figures}
        json_file.write_text(json.dumps(kept, indent=2) + "\n")
    if plot_file is not None:
        plot.draw(_ratios(medians), plot_file, base=_NATIVE, title=f"mirrorfs bench, median of {rounds}")
    return 0


def _check(others: Mapping[str, Path], files: Sequence[Path]) -> None:
    """Before anything is measured: what would fail only at its end."""
    for name, other in others.items():
        if name in _SYSTEMS:
            raise UsageError(f"--and {name}={other}: {name} is the name of a system that is measured anyway, choose another")
        if not other.is_dir():
            raise UsageError(f"--and {name}={other}: there is no such directory")
    for file in files:
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{file} cannot be written: there is no directory {file.absolute().parent}")


def _selected(works: Sequence[_Work], only: Sequence[str]) -> list[_Work]:
    """The works with a row that is wanted, without their other rows; UsageError if there is none."""

    def is_wanted(work: _Work, row: str) -> bool:
        return not only or any(word.casefold() in name.casefold() for word in only for name in (work.name, row))

    wanted = [replace(work, rows=[row for row in work.rows if is_wanted(work, row)]) for work in works]
    selected = [work for work in wanted if work.rows]
    if not selected:
        names = ", ".join(row for work in works for row in work.rows)
        raise UsageError(f"--only {' --only '.join(only)}: no workload is called so; there are {names}")
    if shutil.which("fio") is None and any(work.name in FIO for work in selected):
        raise MirrorfsError("fio is not installed (Debian: apt-get install fio)")
    return selected


def _works(archive: Path, seconds: float, servers: Mapping[str, Server]) -> list[_Work]:
    """All that can be done, in the order of the table; `servers` are PostgreSQL's by system, there by the first turn."""

    def fio(name: str, arguments: str) -> _Work:
        return _Work(name, [name], lambda system, target: {name: _fio(target, arguments, seconds)})

    def transactions(name: str, script: str) -> _Work:
        measure = pgbench.transactions_per_second
        return _Work(name, [name], lambda system, target: {name: measure(servers[system], script, seconds)})

    works = [
        *(fio(name, arguments) for name, arguments in FIO.items()),
        _Work("small files", _SMALL_FILES, lambda system, target: _small_files(target, seconds)),
        _Work("untar", ["untar"], lambda system, target: {"untar": _untar(target, archive)}),
        _Work(
            "sqlite commits", ["sqlite commits"], lambda system, target: {"sqlite commits": _sqlite_commits(target, seconds)}
        ),
    ]
    if postgresql.installed() is None:
        _say("PostgreSQL is not installed, the rows of pgbench are left out (Debian: apt-get install postgresql)")
        return works
    return works + [transactions(name, script) for name, script in pgbench.SCRIPTS.items()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fio(target: Path, arguments: str, seconds: float) -> float:
    """Operations per second of one job; its files are removed."""
    command = [
        "fio",
        f"--directory={target}",
        "--name=job",
        "--output-format=json",
        "--ioengine=psync",
        "--fallocate=none",
    ]
    command += ["--group_reporting=1", "--time_based", f"--runtime={seconds * 1000:.0f}ms", *shlex.split(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for left in target.glob("job.*"):
        left.unlink()
    if done.returncode:
        raise MirrorfsError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]  # warnings may stand before it
    return float(job["read"]["iops"] + job["write"]["iops"])


def _small_files(target: Path, seconds: float) -> dict[str, float]:
    """Files per second: made with 4 KiB each, looked up, renamed, removed."""
    top, data = target / "small", os.urandom(_FILE_BYTES)
    count = max(1, int(_FILES_PER_SECOND_ASKED * seconds))
    files = [top / str(number // _FILES_PER_DIRECTORY) / f"file{number}" for number in range(count)]
    for directory in {file.parent for file in files}:
        directory.mkdir(parents=True)
    steps: list[Callable[[Path], object]] = [
        lambda file: file.write_bytes(data),
        os.stat,
        lambda file: file.rename(file.with_suffix(".renamed")),
        lambda file: file.with_suffix(".renamed").unlink(),
    ]
    rates = {}
    for name, step in zip(_SMALL_FILES, steps, strict=True):
        start = time.perf_counter()
        for file in files:
            step(file)
        rates[name] = count / (time.perf_counter() - start)
    shutil.rmtree(top)
    return rates


def _untar(target: Path, archive: Path) -> float:
    """Files per second out of the archive."""
    top = target / "untar"
    top.mkdir()
    start = time.perf_counter()
    subprocess.run(["tar", "-xf", archive, "-C", top], check=True)
    took = time.perf_counter() - start
    count = sum(len(files) for _, _, files in os.walk(top))
    shutil.rmtree(top)
    return count / took


def _sqlite_commits(target: Path, seconds: float) -> float:
    """Transactions of one row each per second, with SQLite's defaults: rollback journal, synchronous FULL."""
    file = target / "bench.sqlite"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("create table rows (n integer primary key, s text)")
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            database.execute("insert into rows (s) values (?)", ("x" * 200,))
            count += 1
        rate = count / (time.perf_counter() - start)
    file.unlink()
    return rate


def _make_archive(directory: Path) -> Path:
    """About 2,000 small files: the library of the Python that runs this, without what is compiled, installed or a test."""
    archive = directory / "files.tar"
    left_out = [f"--exclude={name}" for name in ("__pycache__", "site-packages", "dist-packages", "test*")]
    subprocess.run(["tar", "-cf", archive, *left_out, "-C", os.path.dirname(os.__file__), "."], check=True)
    return archive


@contextlib.contextmanager
def _temporary(place: Path, prefix: str) -> Iterator[Path]:
    """A fresh directory that every user can search, as PostgreSQL's has to."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """The mount of a node without a peer."""
    with Lab.create(directory) as lab:
        host = lab.one
        keys = {"state_dir": str(host.state_dir), "control": str(host.control), "address": ADDRESSES[host.name]}
        lines = ['volume = "alone"', f'node = "{host.name}"', f"[nodes.{host.name}]", f"port = {PORT}"]
        # A JSON string is a TOML string.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
        host.config.write_text("\n".join(lines) + "\n")
        host.start()
        wait_for(lambda: host.status()["state"] == "solo", "the node alone takes writes")
        yield host.mount


@contextlib.contextmanager
def _mirrored(directory: Path) -> Iterator[Path]:
    """The primary's mount of a pair; MirrorfsError if it was not mirrored all the time."""
    with Lab(directory) as lab:  # taken down even if it does not come up
        Lab.up(directory)
        epoch = lab.one.status()["epoch"]
        yield lab.one.mount
        status = lab.one.status()
        if status["state"] != "primary" or status["epoch"] != epoch:
            raise MirrorfsError(f"the pair was not mirrored all the time, the figures are worth nothing: {status['reason']}")


def _medians(figures: _Figures) -> dict[str, dict[str, float]]:
    return {row: {system: statistics.median(found) for system, found in by.items()} for row, by in figures.items()}


def _ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What the medians are of native's, without native."""
    return {
        row: {system: median / by[_NATIVE] for system, median in by.items() if system != _NATIVE} for row, by in medians.items()
    }


def _table(medians: Mapping[str, Mapping[str, float]], rounds: int) -> str:
    """The medians, and how they relate to native's."""
    title = f"operations per second, median of {rounds}"
    ratios = _ratios(medians)
    widths = {system: max(20, len(system) + 2) for system in next(iter(ratios.values()))}
    lines = [f"{title:34}{_NATIVE:>11}" + "".join(f"{system:>{width}}" for system, width in widths.items())]
    for row, by in medians.items():
        others = "".join(f"{by[system]:>{width - 9},.0f} ({ratios[row][system]:5.3f}x)" for system, width in widths.items())
        lines.append(f"{row:34}{by[_NATIVE]:>11,.0f}{others}")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
