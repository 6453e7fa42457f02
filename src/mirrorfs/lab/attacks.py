"""What an attacker on the network of the nodes costs the application: the latency of its writes, in turns with and without him.

The attackers (`attackers`) sit on the host of node two and use its own address, or one that is nobody's: more than a stranger
can do, who would have to take the address over first. Controllers run on both nodes, so that there are heartbeats to capture.
"""

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import cluster, network, scratch
from mirrorfs.lab.cluster import Cluster
from mirrorfs.lab.configuration import PORT
from mirrorfs.lab.network import ADDRESSES, INTERFACE
from mirrorfs.lab.pair import Host

_ELSEWHERE: Final = "10.77.0.66"
#: The attack begins so long before a measurement, and ends so long after it.
_BEFORE_S: Final = 1.5

#: What is done, by which kind of attacker, from which address. Connections that were not taken yet wait at the node for a while
#: after their attack has ended, so those come last.
ATTACKS: Final = {
    "1,000 connections from elsewhere": ("connections", _ELSEWHERE),
    "captured frames and heartbeats, in order and not": ("captured-frames", ADDRESSES["two"]),
    "wrong certificates from the other node's address": ("wrong-certificates", ADDRESSES["two"]),
    "1,000 connections from there": ("connections", ADDRESSES["two"]),
    "1,000 slow handshakes from there": ("slow-handshakes", ADDRESSES["two"]),
}


@dataclass(slots=True)
class _Latencies:
    """In microseconds, of each round."""

    median: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)


def run(*, directory: Path | None, rounds: int, seconds: float) -> int:
    """Measure, print a table, and return the exit status: 1 if an attack has moved the pair. Needs root and fio."""
    if shutil.which("fio") is None:
        raise MirrorfsError("fio is not installed (Debian: apt-get install fio)")
    with scratch.place(directory) as place, Cluster(place / "lab", cluster.sections("", arbiter=""), etcd=False) as pair:
        pair.start_controllers()
        address = f"{_ELSEWHERE}/{network.PREFIX_LENGTH}"
        pair.lab.two.run("ip", "address", "add", address, "dev", INTERFACE, check=True)
        before = _standing(pair)
        print(f"{'4 KiB writes, microseconds':<50} {'median':>15} {'99th percentile':>17} {'done':>9}", flush=True)
        for title, (kind, source) in ATTACKS.items():
            _measure(pair, title, kind, source, rounds, seconds)
        after = _standing(pair)
    if after != before:
        print(f"The pair was moved: {before} before, {after} after.", flush=True)
    return int(after != before)


def _standing(pair: Cluster) -> dict[str, Any]:
    """What no attack may change."""
    return {
        "epoch": pair.lab.one.status()["epoch_tag"],
        "in sync": pair.lab.is_mirrored(),
        "serves": pair.is_serving("one"),
        "heartbeats": ((pair.says("one") or {}).get("peer") or {}).get("mount"),
    }


def _measure(pair: Cluster, title: str, kind: str, source: str, rounds: int, seconds: float) -> None:
    quiet, attacked, done = _Latencies(), _Latencies(), 0
    _write(pair.lab.one, seconds, _Latencies())  # makes the file, and warms up
    for _ in range(rounds):
        _write(pair.lab.one, seconds, quiet)
        attacker = pair.lab.two.popen(
            *(sys.executable, "-m", "mirrorfs.lab.attackers", kind, ADDRESSES["one"], str(PORT), str(seconds + 2 * _BEFORE_S)),
            source,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            try:
                attacker.wait(_BEFORE_S)
                raise MirrorfsError(f"the attacker with {kind} has ended before his time")
            except subprocess.TimeoutExpired:
                _write(pair.lab.one, seconds, attacked)
        finally:
            done += int((attacker.communicate()[0] or "0").strip() or 0)
    cells = (
        f"{statistics.median(before):,.0f} -> {statistics.median(after):,.0f}"
        for before, after in ((quiet.median, attacked.median), (quiet.p99, attacked.p99))
    )
    print(f"{title:<50} {next(cells):>15} {next(cells):>17} {done // rounds:>9,}", flush=True)


def _write(host: Host, seconds: float, latencies: _Latencies) -> None:
    """Write one block after the other, here and there in a file."""
    job = ("--ioengine=psync", "--fallocate=none", "--rw=randwrite", "--bs=4k", "--size=16M")
    ran = host.run(
        *(
            "fio",
            f"--directory={host.mount}",
            "--name=job",
            *job,
            "--time_based",
            f"--runtime={seconds}",
            "--output-format=json",
        ),
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise MirrorfsError(f"fio failed: {(ran.stderr or ran.stdout).strip()[-500:]}")
    written = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0]["write"]["clat_ns"]["percentile"]
    latencies.median.append(written["50.000000"] / 1000)
    latencies.p99.append(written["99.000000"] / 1000)
