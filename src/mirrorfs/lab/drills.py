"""Failover drills, measured: PostgreSQL behind a virtual address, a client that commits, and what happens to servers.

For each drill, again and again: the time from the fault to the client's next commit, split into detection, promotion and
the start of the services (from the log of the controller that takes over), and whether any acknowledged commit is missing.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import cluster, processes, public, scratch
from mirrorfs.lab.cluster import ADDRESS, Cluster
from mirrorfs.lab.databases import Postgresql
from mirrorfs.lab.network import DESK
from mirrorfs.lab.pair import wait_for

_NEXT_DEADLINE_S: Final = 90.0
_SETTLE_S: Final = 3.0
#: Longer than a commit takes, and shorter than any failover.
_OUTAGE_S: Final = 0.3
_SERVICE_DEATHS: Final = 4

#: Commits one number after the other through the address, and notes each with its time once it is acknowledged.
_CLIENT = """
import select, subprocess, sys, time
psql, address, notes = sys.argv[1:]
number = int(time.time() * 1000)
with open(notes, "a", buffering=1) as log:
    while True:
        info = f"host={address} user=postgres dbname=postgres connect_timeout=2"
        client = subprocess.Popen([psql, "-X", "-q", "-A", "-t", info], text=True, bufsize=1,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while True:
            number += 1
            try:
                client.stdin.write(f"insert into noted values ({number}) returning n;\\n")
                client.stdin.flush()
            except OSError:
                break
            if not select.select([client.stdout], [], [], 0.5)[0] or client.stdout.readline() != f"{number}\\n":
                break
            log.write(f"{time.time()} {number}\\n")
            time.sleep(0.005)
        client.kill()
        client.wait()
        time.sleep(0.02)
"""


@dataclass(slots=True)
class Figures:
    """What the runs of one drill took, in seconds; `lost` are commits that were acknowledged and are missing."""

    name: str
    outage: list[float] = field(default_factory=list)
    detection: list[float] = field(default_factory=list)
    promotion: list[float] = field(default_factory=list)
    services: list[float] = field(default_factory=list)
    acknowledged: int = 0
    lost: int = 0

    def row(self) -> str:
        """As a line of a table: medians, and the longest outage."""

        def median(values: list[float]) -> str:
            return f"{statistics.median(values):.2f}" if values else "-"

        parts = [median(values) for values in (self.detection, self.promotion, self.services, self.outage)]
        counts = [f"{max(self.outage):.2f}", f"{self.acknowledged:,}", str(self.lost)]
        return f"| {' | '.join([self.name, str(len(self.outage)), *parts, *counts])} |"


HEADING: Final = (
    "| drill | runs | detection | promotion | services | until the next commit | longest | commits | lost |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class Drills:
    """One cluster, on which drills are run."""

    def __init__(self, site: Cluster, programs: Path, notes: Path, report: Callable[[str], None]) -> None:
        self.site = site
        self._programs = programs
        self._notes = notes
        self._report = report
        self._client: subprocess.Popen[bytes] | None = None

    # ---- the client

    def start_client(self) -> None:
        """A client on the desk that commits all the time."""
        self._client = subprocess.Popen(
            [
                *self.site.lab.network.entering(DESK),
                *(sys.executable, "-c", _CLIENT, str(self._programs / "psql"), ADDRESS, str(self._notes)),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop_client(self) -> None:
        """End it."""
        if self._client is not None:
            os.killpg(self._client.pid, signal.SIGKILL)
            self._client.wait()

    def commits(self) -> list[tuple[float, int]]:
        """All that were acknowledged so far: when, and which number."""
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        return [(float(when), int(number)) for when, number in (line.split() for line in lines if line.count(" ") == 1)]

    def _wait_commit_after(self, moment: float) -> None:
        wait_for(lambda: any(when > moment for when, _ in self.commits()[-100:]), "the client commits", _NEXT_DEADLINE_S)

    def _wait_outage(self, moment: float) -> float:
        """Wait until the client has had an outage after this moment; when its next commit was acknowledged."""
        ends: list[float] = []

        def is_over() -> bool:
            points = [moment, *(when for when, _ in self.commits()[-5000:] if when > moment)]
            ends[:] = [after for before, after in pairwise(points) if after - before > _OUTAGE_S][:1]
            return bool(ends)

        wait_for(is_over, "the client commits again", _NEXT_DEADLINE_S)
        return ends[0]

    # ---- one drill

    def run(self, name: str, fault: Callable[[str, str], float | None], runs: int) -> Figures:
        """Break something, `runs` times: `fault` is given who serves and who stands by, and may say when it really began."""
        figures = Figures(name)
        for number in range(runs):
            self._make_whole()
            primary = self.site.wait_serving().name
            standby = "two" if primary == "one" else "one"
            # A deposed node whose services still end cannot take over: that would be a second failure, not this one.
            wait_for(partial(self._is_idle, standby), f"{standby} is idle", 60)
            self._wait_commit_after(time.time())
            time.sleep(_SETTLE_S)
            moment = time.time()
            moment = fault(primary, standby) or moment
            try:
                gap = self._wait_outage(moment) - moment
            except MirrorfsError as error:
                logs = "\n".join(self.site.log(host).read_text()[-3000:] for host in self.site.lab.hosts)
                raise MirrorfsError(f"{name}: {error}; what the controllers said last:\n{logs}") from None
            figures.outage.append(gap)
            self._split(figures, moment, gap)
            self._report(f"{name}, run {number + 1}: {gap:.2f} s")
        self._make_whole()
        noted = {number for _, number in self.commits()}
        figures.acknowledged = len(noted)
        figures.lost = len(noted - self._found())
        return figures

    def _is_idle(self, name: str) -> bool:
        return self.site.posture(name) == "idle"

    def _split(self, figures: Figures, moment: float, gap: float) -> None:
        """Where the time went, by the log of whoever took over."""
        for name in self.site.lab.hosts:
            taken = dict(_moves(self.site.log(name), moment))
            asked = taken.get("taking") or taken.get("asking")
            if asked and "starting" in taken and "serving" in taken and asked - moment < gap + 1:
                figures.detection.append(asked - moment)
                figures.promotion.append(taken["starting"] - asked)
                figures.services.append(taken["serving"] - taken["starting"])
                return

    def _make_whole(self) -> None:
        site = self.site
        site.lab.heal()
        for name, host in site.lab.hosts.items():
            if not host.pids():
                host.start()
            if site.says(name) is None:
                site.start_controller(name)
        site.lab.wait_mirrored(120)
        site.wait_serving(deadline_s=120)

    def _found(self) -> set[int]:
        done = self.site.at_desk(
            str(self._programs / "psql"), "-X", "-A", "-t", f"host={ADDRESS} user=postgres dbname=postgres", "-c",
            "select n from noted",
        )  # fmt: skip
        if done.returncode:
            raise MirrorfsError(f"psql failed: {done.stderr.strip()}")
        return {int(line) for line in done.stdout.split()}

    # ---- what happens

    def lose_host(self, primary: str, standby: str) -> None:
        """kill -9 of everything on the primary's host."""
        self.site.kill_host(primary)

    def cut(self, primary: str, standby: str) -> None:
        """The primary's host has no network any more."""
        public.unplug(self.site.lab.network, primary)
        self.site.lab.cut()

    def lose_mount(self, primary: str, standby: str) -> None:
        """kill -9 of the mount alone."""
        self.site.lab.host(primary).kill()

    def stop_mount(self, primary: str, standby: str) -> None:
        """SIGSTOP of the mount."""
        processes.stop(processes.find_all(self.site.lab.host(primary).pids()))

    def crash_service(self, primary: str, standby: str) -> float:
        """PostgreSQL is killed whenever it has come up, until the other node has it; counted from the last death."""
        host = self.site.lab.host(primary)
        moment = time.time()
        for _ in range(_SERVICE_DEATHS):
            wait_for(lambda: self.site.posture(primary) != "serving" or bool(_postmaster(host)), "PostgreSQL is up")
            if self.site.posture(primary) != "serving":
                break
            moment = time.time()
            host.run("kill", "-9", _postmaster(host))
            wait_for(lambda: not _postmaster(host) or self.site.posture(primary) != "serving", "PostgreSQL is dead")
        self.site.wait_serving(standby)
        return moment

    def lose_arbiter_and_peer(self, primary: str, standby: str) -> float:
        """The arbiter goes, then the standby: the primary freezes; counted from the arbiter's return."""
        self.site.etcd.stop_member(0)
        self.site.kill_host(standby)
        wait_for(lambda: self.site.lab.host(primary).status()["frozen"], f"{primary} is frozen")
        wait_for(lambda: self.site.posture(primary) == "idle", f"{primary} has stopped")
        moment = time.time()
        self.site.etcd.start_member(0)
        return moment

    def switch_over(self, primary: str, standby: str) -> None:
        """By command."""
        self.site.command(primary, "switchover")


def _moves(log: Path, since: float) -> list[tuple[str, float]]:
    """The postures that a controller entered since a moment, the first time each."""
    found: dict[str, float] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(\S+ \S+),(\d{3}) INFO (\w+) -> (\w+):", line)
        if match:
            when = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(match[2]) / 1000
            if when >= since:
                found.setdefault(match[4], when)
    return list(found.items())


def _postmaster(host: Any) -> str:
    """The pid of the server on this host, "" if there is none."""
    try:
        pid = (host.mount / "postgresql" / "postmaster.pid").read_text().split()[0]
    except (OSError, IndexError):
        return ""
    return pid if Path(f"/proc/{pid}").exists() else ""


def run(*, directory: Path | None, runs: int, only: list[str], as_json: bool) -> int:
    """All drills, or those of `only`; the exit status is 1 if an acknowledged commit is missing."""
    programs = Postgresql.installed()
    if programs is None:
        raise MirrorfsError("PostgreSQL is not installed (Debian: postgresql)")

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results: list[Figures] = []
    with scratch.place(directory) as place:
        text = cluster.sections(cluster.postgresql(programs, restarts=2), failover="max_failovers = 1000")
        with Cluster(place, text) as site:
            cluster.create_postgresql(site.lab.one, programs)
            site.start_controllers()
            made = site.at_desk(
                str(programs / "psql"), f"host={ADDRESS} user=postgres dbname=postgres", "-c",
                "create table noted (n bigint primary key)",
            )  # fmt: skip
            if made.returncode:
                raise MirrorfsError(f"psql failed: {made.stderr.strip()}")
            drills = Drills(site, programs, place / "notes", report)
            cases: dict[str, tuple[str, Callable[[str, str], float | None]]] = {
                "host": ("kill -9 of all on the primary's host", drills.lose_host),
                "network": ("the primary's network is cut", drills.cut),
                "mount": ("kill -9 of the mount", drills.lose_mount),
                "stop": ("SIGSTOP of the mount", drills.stop_mount),
                "service": ("PostgreSQL crashes again and again", drills.crash_service),
                "arbiter": ("the arbiter, then the standby; from the arbiter's return", drills.lose_arbiter_and_peer),
                "switchover": ("switch-over by command", drills.switch_over),
            }
            drills.start_client()
            try:
                for key, (name, fault) in cases.items():
                    if not only or key in only:
                        results.append(drills.run(name, fault, runs))
                        report(results[-1].row())
            finally:
                drills.stop_client()
    if as_json:
        print(json.dumps([{name: getattr(r, name) for name in Figures.__slots__} for r in results]))
    else:
        print(HEADING, *(result.row() for result in results), sep="\n")
    return 1 if any(result.lost for result in results) else 0
