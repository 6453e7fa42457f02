"""What `mirrorfs split-brain show` and `mirrorfs lost list` print for people."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

from mirrorfs.lost import Entry

_MAX_RANGES: Final = 8


def in_words(found: dict[str, Any]) -> str:
    """The whole answer of `show`: the sides, then what differs by path."""
    nodes = [side["node"] for side in found["sides"]]
    lines = [found["split_brain"], *(f"  {side['node']} since: {since(side)}" for side in found["sides"]), ""]
    if not found["complete"]:
        return "\n".join([*lines, found["note"]])
    for difference in found["differences"]:
        lines.append(
            f"{printable(difference['path'])}: changed by {' and '.join(difference['changed_by']) or 'nobody knows whom'}"
        )
        lines += [f"  on {node}: {_there(difference['path'], difference[node])}" for node in nodes]
    return "\n".join([*lines, f"{len(found['differences'])} paths differ"])


def since(side: dict[str, Any]) -> str:
    """The epochs of one side since the last common one."""
    if not side["epochs"]:
        return "no epoch"
    return ", ".join(
        f"epoch {epoch['number']} of {epoch['primary']}{', by force' if epoch['forced'] else ''} ({epoch['began']})"
        for epoch in side["epochs"][-5:]
    )


def _there(path: str, side: dict[str, Any] | None) -> str:
    if side is None:
        return "not there"
    text: str = side["what"]
    if side["what"] == "file":
        text += f" of {side['size']} bytes"
        if side["ranges"]:
            text += f", its own bytes {_ranges(side['ranges'])}"
    if side.get("attributes"):
        text += ", other owner, mode or attributes"
    return text if side["path"] == path else f"{text}, as {printable(side['path'])}"


def _ranges(ranges: Iterable[Any]) -> str:
    shown = [f"{start}-{end}" for start, end in ranges]
    more = f" and {len(shown) - _MAX_RANGES} more ranges" if len(shown) > _MAX_RANGES else ""
    return ", ".join(shown[:_MAX_RANGES]) + more


def lost_in_words(entries: list[Entry]) -> str:
    """The list of kept versions, each batch under a line that says why and since when."""
    if not entries:
        return "nothing is kept"
    lines: list[str] = []
    batch = ""
    width = max(len(entry.id) for entry in entries) + 2
    for entry in entries:
        number = entry.id.partition(".")[0]
        if number != batch:
            batch, moment = number, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
            lines.append(f"{moment}  {entry.why}")
        lines.append(f"  {entry.id:{width}}{_kept(entry)}  {printable(_text(entry.path))}")
    return "\n".join(lines)


def _kept(entry: Entry) -> str:
    if entry.kind != "file":
        return entry.kind
    if entry.ranges is None:
        return f"file, {entry.size} bytes"
    if not entry.ranges:
        return "file, its name and attributes only"
    own = f"its own bytes {_ranges(entry.ranges)}"
    return f"file, {entry.size} bytes, {own}" if entry.whole else f"of a file of {entry.size} bytes, only {own}"


def lost_in_values(entries: list[Entry]) -> list[dict[str, Any]]:
    """The list of kept versions for JSON."""
    return [asdict(entry) | {"path": _text(entry.path)} for entry in entries]


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def printable(path: str) -> str:
    """A path of any bytes as one line of text."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
