"""`mirrorfs bench`: the same work on a plain directory, on a mount alone and on a mirrored one, in turns.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import scratch
from mirrorfs.lab.configuration import PORT
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Lab, wait_for

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

_Figures = dict[str, dict[str, list[float]]]  # by workload and system, one figure a round


def run(*, directory: Path | None, rounds: int, seconds: float, json_file: Path | None) -> int:
    """Measure in `directory` or a fresh one, print the table, keep all figures in `json_file`; the exit status is 0.

    `seconds` is for each workload, system and round. Raises MirrorfsError if fio is missing or a job of it fails.
    """
    if shutil.which("fio") is None:
        raise MirrorfsError("fio is not installed (Debian: apt-get install fio)")
    figures: _Figures = {}
    with scratch.place(directory) as place, contextlib.ExitStack() as cleanup:
        place.mkdir(parents=True, exist_ok=True)
        archive = _make_archive(Path(cleanup.enter_context(_temporary(place, "archive-"))))
        systems = {
            "native": cleanup.enter_context(_temporary(place, "native-")),
            "mount alone": cleanup.enter_context(_alone(place / "alone")),
            "mirrored": cleanup.enter_context(_mirrored(place / "mirrored")),
        }
        for number in range(1, rounds + 1):
            for workload, measure in _workloads(archive, seconds).items():
                print(f"round {number} of {rounds}: {workload}", file=sys.stderr, flush=True)
                for system, target in systems.items():
                    for name, figure in measure(target).items():
                        figures.setdefault(name, {}).setdefault(system, []).append(figure)
    print(_table(figures, rounds))
    if json_file is not None:
        kept = {"machine": _machine(), "rounds": rounds, "seconds": seconds, "operations_per_second": figures}
        json_file.write_text(json.dumps(kept, indent=2) + "\n")
    return 0


def _workloads(archive: Path, seconds: float) -> dict[str, Callable[[Path], Mapping[str, float]]]:
    """By what is told about the progress: a function that works in a directory and returns the figures of its workloads."""

    def fio(name: str, arguments: str) -> Callable[[Path], Mapping[str, float]]:
        return lambda target: {name: _fio(target, arguments, seconds)}

    return {
        **{name: fio(name, arguments) for name, arguments in FIO.items()},
        "small files": lambda target: _small_files(target, seconds),
        "untar": lambda target: {"untar": _untar(target, archive)},
        "sqlite commits": lambda target: {"sqlite commits": _sqlite_commits(target, seconds)},
    }


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
    steps: dict[str, Callable[[Path], object]] = {
        "create + write 4k files": lambda file: file.write_bytes(data),
        "stat files": os.stat,
        "rename files": lambda file: file.rename(file.with_suffix(".renamed")),
        "unlink files": lambda file: file.with_suffix(".renamed").unlink(),
    }
    rates = {}
    for name, step in steps.items():
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
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as directory:
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


def _table(figures: _Figures, rounds: int) -> str:
    """Medians, and how they relate to the first system's."""
    title = f"operations per second, median of {rounds}"
    systems = list(next(iter(figures.values())))
    lines = [f"{title:34}" + f"{systems[0]:>11}" + "".join(f"{system:>20}" for system in systems[1:])]
    for workload, by_system in figures.items():
        medians = {system: statistics.median(by_system[system]) for system in systems}
        base = medians[systems[0]]
        others = "".join(f"{medians[system]:>11,.0f} ({medians[system] / base:5.3f}x)" for system in systems[1:])
        lines.append(f"{workload:34}{base:>11,.0f}{others}")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
