"""`mirrorfs demo`: a primary is lost under load, and every write that it had acknowledged is looked for on the other node."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import processes, scratch, trees
from mirrorfs.lab.databases import Database, Postgresql, Sqlite, Writer
from mirrorfs.lab.pair import Host, Lab, wait_for

_MIRRORED_S = 4.0  # how long is written before the primary is lost
_ALONE_S = 2.0  # and on the second node before the first one comes back
_BACK_S = 1.0  # and after the switch back
_EQUAL_DEADLINE_S = 15.0


def run(*, directory: Path | None, as_json: bool) -> int:
    """Tell the story on a lab in `directory` or a fresh one; the exit status is 1 if anything is lost or the trees differ.

    With `as_json` nothing is printed but one JSON object at the end.
    """
    with scratch.place(directory) as place, tempfile.TemporaryDirectory(prefix="mirrorfs-demo-") as private:
        Path(private).chmod(0o755)
        databases: list[Database] = [Sqlite()]
        if programs := Postgresql.installed():
            databases.append(Postgresql(programs, Path(private) / "postgresql"))
        story = _Story(databases, silent=as_json)
        story.play(place)
    if as_json:
        print(json.dumps(story.result()))
    return 0 if story.ends_well else 1


@dataclass
class _Story:
    databases: Sequence[Database]
    silent: bool
    started: float = field(default_factory=time.monotonic)
    lost: dict[str, set[int]] = field(default_factory=dict)  # by database: noted, but not found at some time
    promote_seconds: float = 0.0
    outage_seconds: float = 0.0
    differences: list[str] = field(default_factory=list)

    @property
    def ends_well(self) -> bool:
        return not self.differences and not any(self.lost.values())

    def play(self, place: Path) -> None:
        self._tell("two hosts are made out of network namespaces, with a mirrorfs node on each")
        with Lab(place) as lab:  # taken down even if it does not come up
            Lab.up(place)
            self._tell("node one is the primary and two its standby: a write returns when both nodes have it")
            self._create(lab.one)
            died_at = self._lose(lab)
            self._take_over(lab, died_at)
            self._switch_back(lab)
            self._compare(lab)
        self._tell(
            f"{self._acknowledged():,} commits acknowledged, {sum(map(len, self.lost.values())):,} lost; "
            f"the trees {'differ' if self.differences else 'are equal'}"
        )

    def result(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"sqlite": None, "postgres": None}
        for database in self.databases:
            parts["sqlite" if isinstance(database, Sqlite) else "postgres"] = {
                "name": database.name,
                "acknowledged": len(database.noted),
                "lost": len(self.lost[database.name]),
            }
        return {
            "acknowledged": self._acknowledged(),
            "lost": sum(map(len, self.lost.values())),
            "promote_seconds": round(self.promote_seconds, 3),
            "outage_seconds": round(self.outage_seconds, 3),
            "trees_equal": not self.differences,
            "differences": self.differences,
            "seconds": round(time.monotonic() - self.started, 1),
            **parts,
        }

    def _create(self, host: Host) -> None:
        for database in self.databases:
            database.create(host)
            self._tell(f"{database.name} has a database on {host.mount}")
        if len(self.databases) == 1:
            self._tell("PostgreSQL is not installed: SQLite only")

    def _lose(self, lab: Lab) -> float:
        self._tell("commits begin on one; each one that is acknowledged is noted outside of the mirrored files")
        writers = self._start_writing(lab.one)
        time.sleep(_MIRRORED_S)
        died_at = time.monotonic()
        # All at once, as a host dies; and it can be at any moment of a commit.
        processes.kill(processes.find_all(lab.network.pids(lab.one.name)))
        for writer in writers:
            writer.died()
        for database in self.databases:
            database.died()
        self._tell(f"host one is dead, kill -9 of mirrorfs and all else on it; {self._acknowledged_in_words()}")
        return died_at

    def _take_over(self, lab: Lab, died_at: float) -> None:
        wait_for(lambda: lab.two.status()["peer"]["state"] == "disconnected", "node two notices")
        self._tell(f"node two has noticed: {lab.two.status()['reason']}")
        before = time.monotonic()
        lab.two.promote(yes=True)
        self.promote_seconds = time.monotonic() - before
        self._tell(f"`mirrorfs promote --yes` made two the primary in {self.promote_seconds:.2f} s")
        self._start_databases(lab.two)
        writers = self._start_writing(lab.two)
        self.outage_seconds = time.monotonic() - died_at
        self._tell(f"the databases run on two and commit again, {self.outage_seconds:.1f} s after the loss")
        self._look_for_all(lab.two)
        time.sleep(_ALONE_S)

        back_at = time.monotonic()
        lab.one.start()
        self._tell(f"host one is back, its node follows: {lab.one.status()['state']}; commits go on")
        lab.wait_mirrored()
        self._tell(f"node one is in sync again after {time.monotonic() - back_at:.1f} s; two is the primary")
        for writer in writers:
            writer.stop()

    def _switch_back(self, lab: Lab) -> None:
        for database in self.databases:
            database.stop()
        before = time.monotonic()
        lab.one.promote()
        self._tell(f"the databases are stopped; `mirrorfs promote` on one: roles swapped in {time.monotonic() - before:.2f} s")
        self._start_databases(lab.one)
        writers = self._start_writing(lab.one)
        self._tell("the databases commit on one again")
        time.sleep(_BACK_S)
        for writer in writers:
            writer.stop()
        self._look_for_all(lab.one)
        for database in self.databases:
            database.stop()

    def _compare(self, lab: Lab) -> None:
        # Times and the last closed files settle a moment after the last change.
        deadline = time.monotonic() + _EQUAL_DEADLINE_S
        while True:
            try:
                self.differences = trees.differences(lab.one.backing, lab.two.backing)
            except OSError as error:
                self.differences = [f"still changing: {error}"]
            if not self.differences or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        self._tell("the files underneath both nodes are compared, contents and attributes")
        for line in self.differences:
            self._tell(f"  {line}")

    def _start_databases(self, host: Host) -> None:
        for database in self.databases:
            database.start(host)

    def _start_writing(self, host: Host) -> list[Writer]:
        """One writer for each database; returns when each has had a commit acknowledged."""
        noted = {database.name: len(database.noted) for database in self.databases}
        writers = [Writer(database, host) for database in self.databases]

        def all_go_on() -> bool:
            return all(len(database.noted) > noted[database.name] for database in self.databases)

        wait_for(lambda: all_go_on() or any(writer.has_ended for writer in writers), f"databases commit on {host.name}")
        if not all_go_on():
            raise MirrorfsError(f"the databases on {host.name} take no commits")
        return writers

    def _look_for_all(self, host: Host) -> None:
        for database in self.databases:
            noted = set(database.noted)
            missing = noted - database.found(host)
            self.lost.setdefault(database.name, set()).update(missing)
            self._tell(f"{database.name} on {host.name}: {len(noted):,} noted commits looked for, {len(missing):,} missing")

    def _acknowledged(self) -> int:
        return sum(len(database.noted) for database in self.databases)

    def _acknowledged_in_words(self) -> str:
        return ", ".join(f"{len(database.noted):,} commits of {database.name}" for database in self.databases)

    def _tell(self, text: str) -> None:
        if not self.silent:
            print(f"{time.monotonic() - self.started:5.1f} s  {text}", flush=True)
