"""What `mirrorfs journal show` says: the files in the state directory as they are, in plain values and in words.

Only reads, so a running node is not disturbed. Each file is told apart: one that is damaged does not hide the others.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

from mirrorfs import dirty_log
from mirrorfs.core.dirty import END, EXTENT, Attributes, Extents, Located, Names
from mirrorfs.core.epochs import Record
from mirrorfs.errors import JournalError
from mirrorfs.journal import Journal

_T = TypeVar("_T")
_FILES: Final = ("record", "ids", "dirty")


def describe(directory: Path) -> dict[str, Any]:
    """The state directory in plain values.

    Each of the three files has a `state`: `present`, `absent`, or `damaged` for all that cannot be read, with the `problem`.
    Times are local with their offset, ids hexadecimal, extents in units of 4 MiB with None for "to the end".
    """
    journal = Journal(directory)
    return {
        "directory": str(directory),
        "record": _looked_at(journal.read, _record),
        "ids": _looked_at(journal.read_ids, lambda reserved: {"reserved": reserved}),
        "dirty": _looked_at(lambda: dirty_log.read(directory / dirty_log.NAME), _dirty),
    }


def is_damaged(found: dict[str, Any]) -> bool:
    """Whether `describe` has found anything that cannot be read."""
    return any(found[name]["state"] == "damaged" for name in _FILES)


def _looked_at(read: Callable[[], _T | None], shown: Callable[[_T], dict[str, Any]]) -> dict[str, Any]:
    try:
        content = read()
    except JournalError as error:
        return {"state": "damaged", "problem": str(error)}
    return {"state": "absent"} if content is None else {"state": "present", **shown(content)}


def _record(record: Record) -> dict[str, Any]:
    return {
        "volume_id": record.volume_id,
        "standing": record.standing.value,
        "reason": record.reason,
        "paused_since": _moment(record.paused_at) if record.paused_at else None,
        "epochs": [
            {
                "number": epoch.number,
                "tag": epoch.tag,
                "primary": epoch.primary,
                "in_sync": sorted(member.node for member in epoch.in_sync),
                "forced": epoch.forced,
                "began": _moment(epoch.began),
                "wrote_alone": epoch.tag in record.wrote,
            }
            for epoch in record.epochs
        ],
    }


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at))


def _dirty(contents: dirty_log.Contents) -> dict[str, Any]:
    head = contents.head
    return {
        "volume_id": head.volume_id,
        "number": head.number,
        "base": head.base,
        "marked": contents.marked,
        "new_from": f"{head.new_from:#x}",
        "complete": head.complete,
        "size_bytes": contents.size_bytes,
        "torn_bytes": contents.torn_bytes,
        "files": _files(contents),
    }


def _files(contents: dirty_log.Contents) -> list[dict[str, Any]]:
    """The marks by file, those that were written more than once joined."""
    files: dict[int, dict[str, Any]] = {}
    extents: dict[int, list[tuple[int, int]]] = {}

    def of(number: int) -> dict[str, Any]:
        return files.setdefault(number, {"file": f"{number:#x}", "name": None, "names": False, "attributes": False})

    for entry in contents.entries:
        match entry:
            case Names():
                of(entry.directory)["names"] = True
            case Attributes():
                of(entry.file)["attributes"] = True
            case Extents():
                of(entry.file)
                extents.setdefault(entry.file, []).append((entry.first, entry.last))
            case Located():
                of(entry.file)["name"] = os.fsdecode(entry.name) or None
    return [{**shown, "extents": _joined(extents.get(number, ()))} for number, shown in sorted(files.items())]


def _joined(ranges: Iterable[tuple[int, int]]) -> list[list[int | None]]:
    joined: list[list[int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return [[first, None if last == END else last] for first, last in joined]


# ---- for a person


def in_words(found: dict[str, Any]) -> str:
    """What `describe` has found, as text."""
    lines: list[str] = []
    for name, words in zip(_FILES, (_record_in_words, _ids_in_words, _dirty_in_words), strict=True):
        part = found[name]
        lines.append(f"{found['directory']}/{name}")
        match part["state"]:
            case "absent":
                lines.append("  there is no such file")
            case "damaged":
                lines.append(f"  {part['problem']}")
            case _:
                lines += [f"  {line}" for line in words(part)]
    return "\n".join(lines)


def _record_in_words(record: dict[str, Any]) -> list[str]:
    lines = [
        f"volume id  {record['volume_id'] or '-'}",
        f"standing   {record['standing']}",
        f"reason     {record['reason'] or '-'}",
    ]
    if record["paused_since"]:
        lines.append(f"paused     by hand since {record['paused_since']}")
    for epoch in record["epochs"]:
        notes = ", forced" * epoch["forced"] + ", wrote alone" * epoch["wrote_alone"]
        in_sync = ", ".join(epoch["in_sync"])
        lines.append(
            f"epoch      {epoch['number']} since {epoch['began']}: primary {epoch['primary']}, in sync {in_sync}{notes}"
        )
    return lines


def _ids_in_words(ids: dict[str, Any]) -> list[str]:
    return [f"reserved   {ids['reserved']}"]


def _dirty_in_words(dirty: dict[str, Any]) -> list[str]:
    lines = [
        f"volume id  {dirty['volume_id'] or '-'}",
        f"checkpoint {dirty['number']}",
        f"changes    since checkpoint {dirty['base']}, and all files from {dirty['new_from']} on",
        f"complete   {'yes' if dirty['complete'] else 'no: it says nothing'}",
        f"size       {dirty['size_bytes']} B",
    ]
    if dirty["torn_bytes"]:
        lines.append(f"torn       {dirty['torn_bytes']} B at the end are of an append that was cut short")
    if dirty["files"]:
        lines.append(f"dirty      (extents of {EXTENT >> 20} MiB)")
    for file in dirty["files"]:
        marks = ["names"] * file["names"] + ["attributes"] * file["attributes"]
        if file["extents"]:
            marks.append("extents " + " ".join(map(_extents_in_words, file["extents"])))
        name = "" if file["name"] is None else f" {_printable(file['name'])}"
        lines.append(f"  {file['file']}{name}: {', '.join(marks) or 'nothing'}")
    return lines


def _extents_in_words(extents: list[int | None]) -> str:
    first, last = extents
    return f"{first}-" if last is None else f"{first}" if first == last else f"{first}-{last}"


def _printable(name: str) -> str:
    """A name in quotes, that may be of any bytes: what a terminal would obey or cannot show is escaped."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    shown = "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
    return f'"{shown}"'
