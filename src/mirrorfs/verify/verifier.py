"""When the trees are compared, and what came of it: by hand or by the schedule, one walk at a time."""

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from mirrorfs.errors import MirrorfsError, RefusedError, UsageError
from mirrorfs.verify.asking import Asking
from mirrorfs.verify.mending import Mending
from mirrorfs.verify.walk import Difference, Walk

if TYPE_CHECKING:
    from mirrorfs.node import Node

log = logging.getLogger(__name__)

_LOOK_AT_SCHEDULE_S: Final = 1.0
#: A schedule that could not be kept, because the pair was not mirrored in the end, is taken up again after that.
_AGAIN_S: Final = 600.0
_MAX_KEPT: Final = 10_000
_MAX_ALARMS: Final = 100
_LINES_AT_ONCE: Final = 500


class Verifier:
    """The walks of one node: the present one, and what the last said.

    `state_dir` gets a small file with the time of the last walk that was finished; it is no part of what must be durable.
    """

    def __init__(self, node: "Node", state_dir: Path) -> None:
        self._node = node
        self._file = state_dir / "verify.json"
        self._walk: Walk | None = None
        self._scope = trio.CancelScope()
        self._lines: list[str] = []
        self._found = self._repaired = 0
        self._failure: MirrorfsError | None = None
        self._last: dict[str, Any] | None = None
        self._due_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether a walk is under way."""
        return self._walk is not None

    def start(self, *, good: str = "", rate_bytes_per_s: float = 0) -> None:
        """Begin a walk; with `good`, the name of a node, what differs is replaced by what that node has.

        A rate of 0 is the configured one. Raises RefusedError if that makes no sense now, UsageError for a name of no node.
        """
        node = self._node
        names = [part.name for part in (node.config.node, node.config.peer) if part is not None]
        if good and good not in names:
            raise UsageError(f"--from {good}: no node of {node.config.file}, use one of: {', '.join(names)}")
        if self.running:
            raise RefusedError("a verify is running already: wait for its end, `mirrorfs status` shows it")
        if node.primary is None or node.config.peer is None or not node.peer_joined:
            advice = f": run it on {node.peer_name}, the primary" if node.standby and node.standby.in_sync else ""
            raise RefusedError(f"not mirrored, or not the primary ({node.state}: {node.reason}){advice}")
        asking = Asking(node.primary)
        own = node.config.node.name
        mending = Mending(asking, node.lost, node.session, good=good, from_own=good == own) if good else None
        self._walk = Walk(
            asking,
            own,
            node.config.peer.name,
            rate_bytes_per_s=rate_bytes_per_s or node.config.verify.rate_bytes_per_s,
            found=self._on_found,
            mend=mending.mend if mending else None,
        )
        self._lines, self._found, self._repaired, self._failure = [], 0, 0, None
        self._scope = trio.CancelScope()
        node.nursery.start_soon(self._run, self._walk, self._scope)

    def stop(self) -> None:
        """End the present walk, if there is one."""
        self._scope.cancel()

    def look(self, since: int) -> dict[str, Any]:
        """How far the present walk is, or how the last one ended; with the differences from number `since` on.

        Raises the error that ended it before its time.
        """
        if not self.running and self._failure is not None and since >= len(self._lines):
            raise self._failure
        return self.describe() | {"repaired": self._repaired, "differences": self._lines[since : since + _LINES_AT_ONCE]}

    def describe(self) -> dict[str, Any]:
        """What `mirrorfs status` says of it; sizes are bytes, `last.ended` is local time with its offset."""
        walk = self._walk
        return {
            "running": walk is not None,
            "bytes": walk.bytes_done if walk else 0,
            "files": walk.files_done if walk else 0,
            "found": self._found,
            "last": self._last,
        }

    async def _run(self, walk: Walk, scope: trio.CancelScope) -> None:
        began = time.monotonic()
        complete = False
        try:
            with scope:
                await walk.run()
                complete = True
            if not complete:
                self._failure = RefusedError("stopped before it was complete")
        except MirrorfsError as error:
            self._failure = error
            log.warning("verify: broken off: %s", error, extra={"event": "verify-broken-off"})
        except Exception as error:
            log.exception("verify: failed")
            self._failure = MirrorfsError(f"verify failed in the node ({error!r}), its log says where")
        finally:
            self._walk = None
        if complete:
            self._note_end(walk, time.monotonic() - began)

    def _note_end(self, walk: Walk, took_s: float) -> None:
        now = time.time()
        self._last = {
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now)),
            "found": self._found,
            "repaired": self._repaired,
            "files": walk.files_done,
            "bytes": walk.bytes_done,
        }
        self._note_time(now)
        say = log.error if self._found > self._repaired else log.info
        what = f"differences: {self._found}, of them repaired: {self._repaired}" if self._found else "both trees are equal"
        extra = {"event": "verify-ended", "found": self._found, "repaired": self._repaired}
        say("verify: %s: %d files, %d bytes compared in %.1f s", what, walk.files_done, walk.bytes_done, took_s, extra=extra)

    def _on_found(self, difference: Difference) -> None:
        self._found += 1
        self._repaired += difference.repaired
        if self._found <= _MAX_KEPT:
            self._lines.append(str(difference))
        if self._found <= _MAX_ALARMS:
            log.error("verify: the nodes differ: %s", difference, extra={"event": "verify-difference"})

    # ---- the schedule

    async def keep_schedule(self) -> None:
        """Begin a walk whenever one is due: so long after the last that was finished here, or after the first start."""
        every_s = self._node.config.verify.every_s
        if every_s is None or self._node.config.peer is None:
            return
        while True:
            await trio.sleep(min(_LOOK_AT_SCHEDULE_S, every_s / 2))
            if self._node.primary is None or not self._node.peer_joined or self.running:
                continue
            now = time.time()
            if self._due_at is None:
                self._due_at = self._read_time(now) + every_s
            if now >= self._due_at:
                self._due_at = now + min(_AGAIN_S, every_s)
                with suppress(RefusedError):
                    self.start()

    def _read_time(self, now: float) -> float:
        """When the last walk was finished here; now, and so it is noted, if nobody knows."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            noted = float(json.loads(self._file.read_text())["at"])
            if noted <= now:
                return noted
        self._note_time(now)
        return now

    def _note_time(self, now: float) -> None:
        if self._node.config.verify.every_s is not None:
            self._due_at = now + self._node.config.verify.every_s
        try:
            fresh = self._file.with_suffix(".new")
            fresh.write_text(json.dumps({"at": now}))
            os.replace(fresh, self._file)
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._file, error.strerror)
