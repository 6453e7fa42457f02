"""What the console shows, as plain values: both nodes, what protects the data now, how fast it is. Pure.

`Seen` is what was seen at one moment: the status of the mount, of its controller, the measures of the mount. `picture` makes
one page of it, `changes` the events that lie between two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from mirrorfs import words
from mirrorfs.core.histogram import BOUNDS_S, quantile

#: Latencies and rates are those of so many seconds.
WINDOW_S: Final = 60.0
_KINDS: Final = ("change", "sync")
_PARTS: Final = ("total", "local", "wire", "peer")
_SERVES: Final = ("primary", "solo")


@dataclass(frozen=True, slots=True)
class Seen:
    """`at` is UNIX time in seconds. `mount` is "stopped", "hung" or "answers"; unless it answers, `status` is None."""

    at: float
    node: str
    peer: str
    mount: str
    status: dict[str, Any] | None
    controller: dict[str, Any]
    measures: dict[str, Any] | None = None

    @property
    def state(self) -> str:
        """The state of this node's mount, in one word."""
        return str(self.status["state"]) if self.status is not None else self.mount

    @property
    def peer_state(self) -> str:
        """What is known here of the other node: from the link, else from its controller."""
        linked = (self.status or {}).get("peer", {}).get("state", "disconnected")
        if linked != "disconnected":
            return str(linked)
        peer = self.controller["peer"]
        return str(peer["mount"]) if peer["heard"] else "lost"


def _moment(text: str, now: float) -> str:
    """A time of the status for people: without its day if that is today's."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    today = datetime.fromtimestamp(now, moment.tzinfo).date()
    return moment.strftime("%H:%M:%S" if moment.date() == today else "%Y-%m-%d %H:%M:%S")


def protection(seen: Seen) -> tuple[str, str]:
    """What protects the data right now: "good", "warning" or "bad", and one sentence."""
    status, node, peer = seen.status, seen.node, seen.peer
    if status is None:
        if seen.peer_state == "leading":
            return "bad", f"Writes are on {peer} only: the volume is not mounted on {node}."
        return "bad", f"The volume is not mounted on {node}, and from here nobody is seen who serves it."
    if status.get("split_brain"):
        return "bad", f"Split brain: {node} and {peer} have both gone on alone; nothing is lost, and a person has to choose."
    if status["frozen"]:
        return "bad", f"Writes wait on {node}: {status['reason']}."
    if pause := status.get("paused"):
        return (
            "warning",
            f"Writes are on one disk only: {pause['by']} paused the replication at {_moment(pause['since'], seen.at)}.",
        )
    if status["state"] in ("primary", "standby"):
        return "good", "Every write is on both nodes before it returns."
    if status["state"] == "solo":
        if seen.peer_state == "resyncing":
            return "warning", f"Writes are on {node} only, while {peer} is being brought up to date."
        return "bad", f"Writes are on {node} only since {_moment(status['since'], seen.at)}: {status['reason']}."
    if status["state"] == "resyncing":
        return "warning", f"Writes are on {peer} only, while {node} is being brought up to date."
    if seen.peer_state == "leading":
        return "bad", f"Writes are on {peer} only: {node} does not follow ({status['reason']})."
    return "bad", f"Nobody serves the volume, as far as {node} can see: {status['reason']}."


def picture(now: Seen, history: Sequence[Seen] = ()) -> dict[str, Any]:
    """The page of a moment. `history` are the moments before it, oldest first, for rates and latencies."""
    level, sentence = protection(now)
    status = now.status or {}
    return {
        "at": now.at,
        "volume": status.get("volume", ""),
        "protection": {"level": level, "sentence": sentence},
        "nodes": [_own(now), _peer(now)],
        "serves": now.node if now.state in _SERVES else now.peer if _peer_serves(now) else None,
        "can_switch_over": _can_switch_over(now),
        "epoch": status.get("epoch", 0),
        "reason": status.get("reason", ""),
        "warning": status.get("warning", ""),
        "differences": status.get("differences", []),
        "dirty_bytes": status.get("dirty_bytes"),
        "open_files": status.get("open_files", 0),
        "split_brain": status.get("split_brain", ""),
        "sides": status.get("sides", []),
        "paused": status.get("paused"),
        "maintenance": now.controller["maintenance"],
        "trouble": now.controller["trouble"],
        "networks": now.controller["networks"],
        "resync": _resync(status),
        "verify": status.get("verify"),
        "arbiter": status.get("arbiter"),
        "write_bytes_per_s": _rate(now, history, "bytes_written"),
        "changes_per_s": _rate(now, history, "changes"),
        "syncs_per_s": _rate(now, history, "syncs"),
        "latency": _latency(now, history),
    }


def _own(now: Seen) -> dict[str, Any]:
    return {
        "name": now.node,
        "is_this": True,
        "state": now.state,
        "mount": now.mount,
        "posture": now.controller["posture"],
        "because": now.controller["because"],
        "services": now.controller["services"],
        "addresses": now.controller["addresses"],
        "since": (now.status or {}).get("since", ""),
        "heard": True,
    }


def _peer(now: Seen) -> dict[str, Any]:
    peer = now.controller["peer"]
    return {
        "name": now.peer,
        "is_this": False,
        "state": now.peer_state,
        "mount": peer["mount"],
        "posture": peer["posture"] if peer["heard"] else "unknown",
        "because": "",
        "services": "up" if peer["heard"] and peer["posture"] == "serving" else "unknown" if not peer["heard"] else "down",
        "addresses": "up" if peer["heard"] and peer["posture"] == "serving" else "unknown" if not peer["heard"] else "down",
        "since": "",
        "heard": peer["heard"],
    }


def _peer_serves(now: Seen) -> bool:
    return now.peer_state in ("primary", "leading")


def _can_switch_over(now: Seen) -> bool:
    status, peer = now.status or {}, now.controller["peer"]
    if not peer["heard"]:
        return False
    if now.state == "standby":
        return True
    return now.state == "primary" and status.get("peer", {}).get("state") == "standby" and peer["posture"] != "held"


def _resync(status: dict[str, Any]) -> dict[str, Any] | None:
    resync = status.get("resync")
    if not resync:
        return None
    return {**resync, "share": words.share_done(resync), "sentence": words.resync_in_words(resync)}


# ---- how fast


def _begin(now: Seen, history: Sequence[Seen], window_s: float) -> Seen | None:
    """The first moment within the window since which the counters have gone on: a mount that was started anew begins at 0."""
    first = None
    for seen in reversed(history):
        if seen.at < now.at - window_s or seen.measures is None or now.measures is None:
            break
        later = first or now
        assert later.measures is not None
        if seen.measures["changes"] > later.measures["changes"] or seen.measures["syncs"] > later.measures["syncs"]:
            break
        first = seen
    return first


def _rate(now: Seen, history: Sequence[Seen], what: str) -> float | None:
    first = _begin(now, history, 5.0)
    if first is None or now.measures is None or first.measures is None or now.at <= first.at:
        return None
    return float((now.measures[what] - first.measures[what]) / (now.at - first.at))


def _latency(now: Seen, history: Sequence[Seen]) -> dict[str, Any]:
    """p50 and p99 in seconds of each kind and part in the window; None where nothing was measured."""
    first = _begin(now, history, WINDOW_S)
    answer: dict[str, Any] = {}
    for kind in _KINDS:
        answer[kind] = {}
        for part in _PARTS:
            counts = [0] * (len(BOUNDS_S) + 1)
            if now.measures is not None and first is not None and first.measures is not None:
                new, old = (each["latency"][kind][part]["counts"] for each in (now.measures, first.measures))
                counts = [a - b for a, b in zip(new, old, strict=True)]
            answer[kind][part] = {"p50_s": quantile(counts, 0.5), "p99_s": quantile(counts, 0.99)}
        answer[kind]["count"] = _count(now, first, kind)
    return answer


def _count(now: Seen, first: Seen | None, kind: str) -> int:
    if now.measures is None or first is None or first.measures is None:
        return 0
    new, old = (sum(each["latency"][kind]["total"]["counts"]) for each in (now.measures, first.measures))
    return int(new - old)


# ---- events


def changes(before: Seen | None, now: Seen) -> list[dict[str, Any]]:
    """What has happened between two moments: `{"at", "level", "text"}` each."""
    if before is None:
        return [_event(now, "info", f"the controller of {now.node} runs")]
    events = []
    was, status = before.status or {}, now.status or {}
    if before.state != now.state:
        why = f": {status['reason']}" if status.get("reason") else ""
        bad = now.state in ("stopped", "hung", "waiting", "solo")
        events.append(_event(now, "bad" if bad else "info", f"{now.node}: {before.state} → {now.state}{why}"))
    if before.peer_state != now.peer_state:
        bad = now.peer_state in ("lost", "stopped", "hung", "frozen")
        events.append(_event(now, "bad" if bad else "info", f"{now.peer}: {before.peer_state} → {now.peer_state}"))
    if was.get("epoch") != status.get("epoch") and status.get("epoch"):
        events.append(
            _event(now, "info", f"epoch {status['epoch']} of {status.get('primary')}, in sync: {', '.join(status['in_sync'])}")
        )
    for key, level, begins, ends in (
        ("frozen", "bad", "writes wait", "writes go on"),
        ("split_brain", "bad", "split brain", "the split brain is resolved"),
        ("paused", "warning", "the replication is paused", "the pause has ended"),
        ("warning", "warning", "warning", "the warning has ended"),
    ):
        if bool(was.get(key)) != bool(status.get(key)) and status and was:
            detail = f": {status[key]}" if isinstance(status.get(key), str) and status.get(key) else ""
            events.append(_event(now, level if status.get(key) else "info", f"{begins}{detail}" if status.get(key) else ends))
    a, b = before.controller, now.controller
    if a["posture"] != b["posture"]:
        events.append(
            _event(
                now,
                "bad" if b["posture"] == "held" else "info",
                f"controller: {a['posture']} → {b['posture']} ({b['because']})",
            )
        )
    if a["maintenance"] != b["maintenance"]:
        text = "maintenance: nothing is done automatically" if b["maintenance"] else "maintenance has ended"
        events.append(_event(now, "warning" if b["maintenance"] else "info", text))
    if b["trouble"] and a["trouble"] != b["trouble"]:
        events.append(_event(now, "bad", b["trouble"]))
    if _last_verify(was) != _last_verify(status) and (last := _last_verify(status)):
        events.append(_event(now, "bad" if last["found"] else "info", f"verify ended, differences: {last['found']}"))
    return events


def _last_verify(status: dict[str, Any]) -> dict[str, Any] | None:
    last: dict[str, Any] | None = (status.get("verify") or {}).get("last")
    return last


def _event(now: Seen, level: str, text: str) -> dict[str, Any]:
    return {"at": now.at, "level": level, "text": text}
