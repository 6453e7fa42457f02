"""What `mirrorfs status` says, in words: amounts, a resync, the whole status as text, and what a terminal shows of it."""

from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mirrorfs.split_brain_show import since

_BAR_WIDTH = 40


def in_units(count_bytes: float) -> str:
    """An amount of bytes with a fitting unit."""
    if count_bytes < 1024:
        return f"{count_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count_bytes /= 1024
        if count_bytes < 1024:
            return f"{count_bytes:.1f} {unit}"
    return f"{count_bytes / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """A time with its two largest units."""
    seconds = round(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit_s:
            return f"{seconds // unit_s} {unit} {seconds % unit_s // part_s} {part}"
    return f"{seconds} s"


def share_done(resync: dict[str, Any]) -> float | None:
    """The share of a resync that is done, from 0 to 1: of the bytes, or of the files where there are none; None if unknown."""
    if not resync.get("totals_are_known", True):
        return None
    for what in ("bytes", "files"):
        if resync[f"{what}_total"]:
            return float(min(max(resync[f"{what}_done"] / resync[f"{what}_total"], 0), 1))
    return None


def resync_in_words(resync: dict[str, Any]) -> str:
    """How far a resync has come, on one line."""
    at_least = "" if resync.get("totals_are_known", True) else "at least "
    parts = [
        f"{in_units(resync['bytes_done'])} of {at_least}{in_units(resync['bytes_total'])}",
        f"{resync['files_done']} of {at_least}{resync['files_total']} files",
    ]
    if resync.get("bytes_per_second") is not None:
        parts.append(f"{in_units(resync['bytes_per_second'])}/s")
    if resync.get("seconds_left") is not None:
        parts.append(f"{duration(resync['seconds_left'])} left")
    return ", ".join(parts)


def verify_in_words(verify: dict[str, Any]) -> str:
    """How far a comparison of both trees has come, or what the last one found, on one line."""
    if verify["running"]:
        return f"running, {in_units(verify['bytes'])}, {verify['files']} files, differences: {verify['found']}"
    return f"ended {verify['last']['ended']}, differences: {verify['last']['found']}"


def controller_in_words(controller: dict[str, Any]) -> str:
    """What the controller of a node is doing, on one line."""
    parts = [f"{controller['posture']} since {controller['since']} ({controller['because']})"]
    parts.append(f"services {controller['services']}, addresses {controller['addresses']}")
    parts.append("the other controller is heard" if controller["peer"]["heard"] else "THE OTHER CONTROLLER IS NOT HEARD")
    parts += [f"no heartbeats from {network}" for network, up in controller["networks"].items() if not up]
    if controller["maintenance"]:
        parts.append("maintenance: nothing is done automatically")
    if controller["trouble"]:
        parts.append(controller["trouble"])
    return "; ".join(parts)


def _peer_in_words(peer: dict[str, Any]) -> str:
    """What the other node is, and what is spoken with it; a node of an earlier version does not say that."""
    return ", ".join([peer["state"], *([f"protocol {peer['protocol']}"] if "protocol" in peer else [])])


def status_in_words(found: dict[str, Any]) -> str:
    """The status as lines of a name and a value."""
    peer = found.get("peer") or {"state": "none"}
    lines = {
        "volume": found["volume"],
        "node": found["node"],
        "state": found["state"],
        "since": found["since"],
        "epoch": found["epoch"],
        "in sync": ", ".join(found["in_sync"]),
        "peer": f"{peer['name']} ({_peer_in_words(peer)})" if peer.get("name") else peer["state"],
        "dirty": None if found["dirty_bytes"] is None else in_units(found["dirty_bytes"]),
    }
    if resync := found.get("resync"):
        lines["resync"] = resync_in_words(resync)
    if pause := found.get("paused"):
        lines["paused"] = f"by {pause['by']} since {pause['since']}: {pause['node']} is alone until `mirrorfs resume`"
    for side in found.get("sides", ()):
        lines[f"{side['node']} since"] = since(side)
    if (verify := found.get("verify")) and (verify["running"] or verify["last"]):
        lines["verify"] = verify_in_words(verify)
    if (arbiter := found.get("arbiter")) and arbiter["kind"] != "none":
        answers = "answers" if arbiter["answers"] else f"DOES NOT ANSWER: {arbiter['why']}"
        lines["arbiter"] = f"{arbiter['name']}: {answers} (since {arbiter['since']})"
    if controller := found.get("controller"):
        lines["controller"] = controller_in_words(controller)
    if warning := found.get("warning"):
        lines["warning"] = warning
    for difference in found.get("differences", ()):
        lines["configuration"] = f"differs: {difference}"
    lines["reason"] = found["reason"]
    width = max(len(name) for name in lines) + 2
    return "\n".join(f"{name:{width}}{'-' if value in (None, '') else value}" for name, value in lines.items())


def on_a_terminal(found: dict[str, Any]) -> Group:
    """The status as it is shown again and again, with a bar while a resync runs."""
    text = Text(status_in_words(found))
    resync = found.get("resync")
    if not resync:
        return Group(text)
    share = share_done(resync)
    line = Table.grid(padding=(0, 1))
    line.add_row(
        resync.get("kind") or "resync",
        ProgressBar(total=1, completed=share or 0, pulse=share is None, width=_BAR_WIDTH),
        # Down, not to the nearest: 100 % is when all is done.
        "" if share is None else f"{int(share * 100)} %",
    )
    return Group(text, Text(), line)
