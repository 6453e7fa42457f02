"""The events of the log: those that docs/EVENTS.md lists are those in the code, with the same fields."""

import ast
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_PROJECT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| `([a-z-]+)` \|([^|]*)\| [^|]+ \|$", re.MULTILINE)
_FIELD = re.compile(r"`([a-z_]+)`")


def _in_the_code() -> dict[str, set[str]]:
    """Every dictionary with the key `event`: its other keys are the fields."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in (_PROJECT / "src" / "mirrorfs").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):
                entries = dict(_entries(node))
                if "event" in entries:
                    name = entries.pop("event")
                    assert isinstance(name, ast.Constant), f"{file}:{node.lineno}: the name of an event is written out"
                    found[str(name.value)] |= set(entries)
    return found


def _entries(node: ast.Dict) -> Iterator[tuple[str, ast.expr]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant):
            yield str(key.value), value


def test_the_page_lists_the_events_of_the_code_with_their_fields() -> None:
    page = (_PROJECT / "docs" / "EVENTS.md").read_text()
    rows = _ROW.findall(page)
    listed = {name: set(_FIELD.findall(fields)) for name, fields in rows}
    assert len(listed) == len(rows)
    assert listed == _in_the_code()


def test_no_field_takes_the_place_of_what_every_line_has() -> None:
    own = {"time", "level", "logger", "message", "exception", "volume", "node"} | set(vars(logging.makeLogRecord({})))
    for name, fields in _in_the_code().items():
        assert fields & own == set(), name
