"""What a controller must still know when it is started again: maintenance, the failovers of late, the other node's MACs."""

import json
import logging
from pathlib import Path
from typing import Any

import trio

from mirrorfs.core.controller import Budget
from mirrorfs.files import write_durably

log = logging.getLogger(__name__)


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


class Memory:
    """A small JSON file. Nothing that it says can cost data: one that cannot be read is begun anew, one that cannot be written
    is told of, and the controller goes on. `keep` writes it: heartbeats and addresses do not wait for a slow disk."""

    def __init__(self, path: Path, *, max_failovers: int, window_s: float) -> None:
        self._path = path
        self._news = trio.Event()
        self._written = trio.Event()
        self._changes = self._saved_changes = 0
        content = self._read()
        self.maintenance_count = int(content.get("maintenance_count", 0))
        self.maintenance = bool(content.get("maintenance", False))
        self.failovers = Budget(max_failovers, window_s, tuple(float(moment) for moment in content.get("failovers", ())))
        self.peer_macs: tuple[str, ...] = tuple(map(str, content.get("peer_macs", ())))
        #: How long all services took to start and to stop here the last time, in seconds.
        self.start_s = _seconds(content.get("start_s"))
        self.stop_s = _seconds(content.get("stop_s"))

    async def keep(self) -> None:
        """Write whatever is new until cancelled, and what is new then."""
        try:
            while True:
                await self._news.wait()
                await self._save()
        finally:
            if self._news.is_set():
                await self._save()

    async def _save(self) -> None:
        self._news, changes = trio.Event(), self._changes
        with trio.CancelScope(shield=True):  # what is not news any more is written
            await trio.to_thread.run_sync(self._put, json.dumps(self._content()).encode())
        self._saved_changes = changes
        self._written.set()
        self._written = trio.Event()

    async def saved(self) -> None:
        """Wait until what is new now is on the disk, or that was tried."""
        changes = self._changes
        while self._saved_changes < changes:
            await self._written.wait()

    def _put(self, content: bytes) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(self._path, content, 0o644)
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._path, error.strerror)

    def count_failover(self, now: float) -> None:
        """One more at this UNIX time."""
        self.failovers = self.failovers.spend(now)
        self._write()

    def note_start(self, took_s: float) -> None:
        """All services were started. Kept with the next change: nobody waits for a disk while clients wait for the address."""
        self.start_s = round(took_s, 3)

    def note_stop(self, took_s: float) -> None:
        """All services were stopped; kept likewise."""
        self.stop_s = round(took_s, 3)

    def set_maintenance(self, on: bool) -> None:
        """A person's word on this node: newer than whatever was said before."""
        self._take(self.maintenance_count + 1, on)
        self._write()

    def hear(self, count: int, on: bool, macs: tuple[str, ...]) -> bool:
        """What the other controller says: of maintenance the newer word counts, and on before off. Whether this is newer."""
        newer = (count, on) > (self.maintenance_count, self.maintenance)
        if newer:
            self._take(count, on)
        if newer or (macs and macs != self.peer_macs):
            self.peer_macs = macs or self.peer_macs
            self._write()
        return newer

    def _take(self, count: int, on: bool) -> None:
        self.maintenance_count, self.maintenance = count, on
        if not on:  # a person has looked: what was counted before would only hold again
            self.failovers = Budget(self.failovers.limit, self.failovers.window_s)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read (%s), begun anew", self._path, error)
            return {}
        return content if isinstance(content, dict) else {}

    def _content(self) -> dict[str, Any]:
        return {
            "maintenance_count": self.maintenance_count,
            "maintenance": self.maintenance,
            "failovers": self.failovers.spent,
            "peer_macs": self.peer_macs,
            "start_s": self.start_s,
            "stop_s": self.stop_s,
        }

    def _write(self) -> None:
        self._changes += 1
        self._news.set()
