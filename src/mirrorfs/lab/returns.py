"""`mirrorfs bench --returns`: what it costs that a node was away and comes back.

Bytes on the wire after known changes, the stalls of an application around a short disconnection, the speed of a resync beside
rsync's between the same two hosts, the memory of a node that knows many files, the size of the journal after a long time alone.
"""

import os
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from mirrorfs.lab import scratch
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Host, Lab, wait_for

MIB = 1 << 20
_OPTIONS = {"ack_timeout": "1s", "checkpoint_interval": "1s"}
_DISCONNECTIONS = 5
_AWAY_S = 10.0
_TURNS = 6


def run(*, directory: Path | None, full: bool) -> int:
    """Measure everything and print a line for each figure; with `full`, also what takes many minutes. Returns the exit
    status."""
    with scratch.place(directory) as place:
        place.mkdir(parents=True, exist_ok=True)
        for measure in (_wire, _disconnections, _speed) + ((_journal,) if full else ()):
            with _pair(place / "lab") as lab:
                measure(lab)
        if full:
            _memory(place / "lab", 1_000_000)
    return 0


@contextmanager
def _pair(place: Path) -> Iterator[Lab]:
    lab = Lab.up(place, options=_OPTIONS)
    try:
        yield lab
    finally:
        lab.down()


def _clean(lab: Lab) -> None:
    """Wait until a checkpoint has emptied the dirty set."""

    def is_clean() -> bool:
        status = lab.one.status()
        return bool(status["settled"]) and status["dirty_bytes"] == status["dirty_names"] == 0

    wait_for(is_clean, "a checkpoint", 600)


def _leave(lab: Lab) -> None:
    _clean(lab)
    lab.two.kill()
    wait_for(lambda: lab.one.status()["state"] == "solo", "node one goes on alone")


def _return(lab: Lab, deadline_s: float = 600) -> tuple[float, int]:
    """Node two comes back: seconds from the greeting to the in-sync set, and what both nodes have sent, in bytes."""
    lab.two.start()
    lab.wait_mirrored(deadline_s)
    took = [line for line in lab.one.log.read_text().splitlines() if " files, " in line][-1].split()[-2]
    return float(took), sum(int(host.status()["peer"]["bytes_sent"]) for host in lab.hosts.values())


# ---- bytes on the wire


def _wire(lab: Lab) -> None:
    top, chance = lab.one.mount, random.Random(1)  # noqa: S311  # the same in every run
    with open(top / "data", "wb") as file:
        for _ in range(1024):
            file.write(chance.randbytes(MIB))
    (top / "many").mkdir()
    for number in range(10_000):
        (top / "many" / str(number)).touch()
    (top / "huge").mkdir()
    for number in range(100_000):
        (top / "huge" / str(number)).touch()

    def scattered() -> int:
        with open(top / "data", "r+b", buffering=0) as data:
            for _ in range(256):
                os.pwrite(data.fileno(), chance.randbytes(4096), chance.randrange(1 << 18) * 4096)
        return 256 * 4096

    def sequential() -> int:
        with open(top / "data", "r+b") as data:
            data.seek(300 * MIB)
            for _ in range(100):
                data.write(chance.randbytes(MIB))
        return 100 * MIB

    def small() -> int:
        (top / "small").mkdir()
        for number in range(10_000):
            (top / "small" / str(number)).write_bytes(chance.randbytes(2000))
        return 10_000 * 4096

    def renamed() -> int:
        os.rename(top / "many", top / "renamed")
        return 0

    def created() -> int:
        (top / "huge" / "one more").write_text("new")
        return 4096

    for title, work in {
        "256 random writes of 4 KiB": scattered,
        "100 MiB in sequence": sequential,
        "10,000 new files of 2,000 bytes": small,
        "a renamed directory with 10,000 files": renamed,
        "one file in a directory of 100,000": created,
    }.items():
        _leave(lab)
        dirty = work()
        took_s, sent = _return(lab)
        allowed = 1.1 * dirty + MIB
        print(
            f"{title}: {sent / MIB:.2f} MiB on the wire for {dirty / MIB:.2f} MiB of dirty blocks "
            f"(allowed {allowed / MIB:.2f}), {took_s:.1f} s",
            flush=True,
        )
    _leave(lab)
    scattered()
    lab.one.kill()
    lab.one.start()
    took_s, sent = _return(lab)
    print(f"256 random writes, then a crash of the primary: {sent / MIB:.2f} MiB on the wire, {took_s:.1f} s", flush=True)


# ---- a short disconnection


def _disconnections(lab: Lab) -> None:
    """An application that appends and syncs, while the link is closed for some seconds, several times."""
    code = (
        "import os, sys, time\n"
        "descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "while True:\n"
        "    os.write(descriptor, b'x' * 8192); os.fsync(descriptor); print(time.monotonic(), flush=True)\n"
    )
    notes = lab.dir / lab.one.name / "notes"  # goes with the lab
    stalls, returns = [], []
    with open(notes, "w") as out, subprocess.Popen(["python3", "-c", code, lab.one.mount / "log"], stdout=out) as writer:
        try:
            for _ in range(_DISCONNECTIONS):
                time.sleep(2)
                began = time.monotonic()
                lab.two.kill()  # the connection closes; the node is away and comes back
                time.sleep(_AWAY_S)
                lab.two.start()
                linked = time.monotonic()
                lab.wait_mirrored()
                returns.append(time.monotonic() - linked)
                time.sleep(1)
                moments = [float(line) for line in notes.read_text().split()[:-1]]
                stalls.append(max(after - before for before, after in pairwise(moments) if after > began))
            assert writer.poll() is None, "the application has failed"
        finally:
            writer.kill()
    moments = [float(line) for line in notes.read_text().split()[:-1]]
    gaps = sorted(after - before for before, after in pairwise(moments))
    shares = {share: gaps[min(int(len(gaps) * share / 100), len(gaps) - 1)] * 1000 for share in (50, 99, 99.9)}
    print(
        f"{_DISCONNECTIONS} disconnections of {_AWAY_S:.0f} s under write + fsync: back in sync in {_list(returns)} s after "
        f"the node answered, longest stall of each {_list([stall * 1000 for stall in stalls])} ms; of {len(gaps):,} writes "
        + ", ".join(f"p{share:g} {gap_ms:.1f} ms" for share, gap_ms in shares.items()),
        flush=True,
    )


def _list(figures: list[float]) -> str:
    return " ".join(f"{figure:.2f}" for figure in figures)


# ---- speed, beside rsync's


def _speed(lab: Lab) -> None:
    if shutil.which("rsync") is None:
        print("rsync is not installed: no comparison", flush=True)
        return
    for title, make in {"one file of 512 MiB": _large, "20,000 files of 4 KiB": _small}.items():
        ratios = []
        for turn in range(_TURNS):
            _leave(lab)
            made = lab.one.mount / f"{title.split()[1]}-{turn}".replace(",", "")
            make(made)
            source = lab.one.backing / made.name
            # In turns who comes first, and neither pays for what the other has left.
            os.sync()
            rsync_s = _rsync(lab, source) if turn % 2 else 0.0
            os.sync()
            took_s, _ = _return(lab)
            os.sync()
            rsync_s = rsync_s or _rsync(lab, source)
            ratios.append(rsync_s / took_s)
            print(f"{title}: resync {took_s:.2f} s, rsync -a --inplace {rsync_s:.2f} s", flush=True)
        print(f"{title}: {statistics.median(ratios):.2f} of rsync's speed, median of {len(ratios)}", flush=True)


def _large(path: Path) -> None:
    path.mkdir()
    with open(path / "file", "wb") as file:
        for _ in range(512):
            file.write(os.urandom(MIB))


def _small(path: Path) -> None:
    path.mkdir()
    for number in range(20_000):
        if number % 200 == 0:
            (path / str(number // 200)).mkdir()
        (path / str(number // 200) / str(number)).write_bytes(os.urandom(4096))


def _rsync(lab: Lab, source: Path) -> float:
    """How long rsync takes for the same, over the same network, with its own daemon at the other end; in seconds."""
    place = lab.dir / lab.two.name  # goes with the lab
    # What it makes stays until the lab goes: ext4 without a journal is slow to use the inodes of files that were just deleted.
    target, module = place / f"rsync-{source.name}", place / "rsyncd.conf"
    target.mkdir()
    module.write_text(f"use chroot = no\nuid = root\ngid = root\n[target]\npath = {target}\nread only = no\n")
    address = str(ADDRESSES["two"])
    daemon = lab.two.popen(
        "rsync",
        "--daemon",
        "--no-detach",
        f"--config={module}",
        f"--address={address}",
        "--port=8730",
        stdout=subprocess.DEVNULL,
    )
    try:
        probe = ["rsync", f"rsync://{address}:8730/target/"]
        wait_for(lambda: lab.one.run(*probe, capture_output=True).returncode == 0, "rsync's daemon answers")
        began = time.monotonic()
        lab.one.run("rsync", "-a", "--inplace", f"{source}/", f"rsync://{address}:8730/target/", check=True)
        return time.monotonic() - began
    finally:
        daemon.terminate()
        daemon.wait()


# ---- many files, a long time


def _resident(host: Host, field: str = "VmRSS") -> float:
    """The memory of a node's processes, now or at its peak (`VmHWM`), in MiB."""
    found = (re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in host.pids())
    return sum(int(match[1]) for match in found if match) * 1024 / MIB


def _both(lab: Lab, field: str = "VmRSS") -> str:
    return " and ".join(f"{_resident(host, field):.0f} MiB on {name}" for name, host in lab.hosts.items())


def _memory(place: Path, count: int) -> None:
    """Many files in the tree, a tenth of them dirty. They are there before the pair is, which is faster."""
    with Lab.create(place, options=_OPTIONS) as lab:
        for number in range(count):
            path = _path(lab.one.mount, number)
            if number % 100 == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"small")
        lab.one.start()
        lab.one.promote(yes=True)
        lab.two.start()
        began = time.monotonic()
        lab.wait_mirrored(3600)
        took_s = time.monotonic() - began
        print(
            f"{count:,} files, the first copy: {took_s:.0f} s, at its peak {_both(lab, 'VmHWM')}, then {_both(lab)}", flush=True
        )
        _leave(lab)
        for number in range(0, count, 10):
            with open(_path(lab.one.mount, number), "r+b") as file:
                file.write(b"changed")
        print(f"{count // 10:,} of them dirty: {_resident(lab.one):.0f} MiB", flush=True)
        took_s, sent = _return(lab, 3600)
        print(
            f"{count // 10:,} dirty of {count:,} files: resync {took_s:.1f} s, {sent / MIB:.0f} MiB on the wire, "
            f"at its peak {_both(lab, 'VmHWM')}, then {_both(lab)}",
            flush=True,
        )


def _path(top: Path, number: int) -> Path:
    return top / str(number // 10_000) / str(number // 100 % 100) / str(number)


def _journal(lab: Lab) -> None:
    """A million random writes in a sparse file of 10 GiB, alone."""
    with open(lab.one.mount / "sparse", "wb") as file:
        file.truncate(10 << 30)
    _leave(lab)
    log, chance = lab.one.state_dir / "dirty", random.Random(1)  # noqa: S311  # the same in every run
    before, began = _resident(lab.one), time.monotonic()
    with open(lab.one.mount / "sparse", "r+b", buffering=0) as file:
        for _ in range(1_000_000):
            os.pwrite(file.fileno(), b"x" * 512, chance.randrange(10 << 30 >> 12) << 12)
    print(
        f"1,000,000 random writes in 10 GiB, alone: {log.stat().st_size:,} bytes of journal, memory from {before:.0f} to "
        f"{_resident(lab.one):.0f} MiB, {time.monotonic() - began:.0f} s",
        flush=True,
    )
