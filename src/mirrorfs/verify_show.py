"""`mirrorfs verify` in the foreground: follow a walk of the node through its control socket, and print what it finds."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from mirrorfs import control

_POLL_S: Final = 0.1
#: Without a terminal, a line of progress after the first of these and then after each of the second, in seconds.
_FIRST_LINE_S: Final = 2.0
_LINES_S: Final = 10.0

Show = Callable[[dict[str, Any]], None]


def follow(socket: Path, *, as_json: bool) -> int:
    """Print each difference on a line of its own until the walk ends; the exit status: 1 if there was one.

    Progress goes to stderr. Ctrl-C stops the walk too. Raises the MirrorfsError that ended it before its time.
    """
    lines: list[str] = []
    try:
        with _progress() as show:
            while True:
                found = control.request(socket, "verify-look", since=len(lines))
                lines += found["differences"]
                if not as_json:
                    for line in found["differences"]:
                        print(line, flush=True)
                if not found["running"] and not found["differences"]:
                    break
                show(found)
                time.sleep(0 if found["differences"] else _POLL_S)
    except KeyboardInterrupt:
        control.request(socket, "verify-stop")
        raise
    last = found["last"]
    if as_json:
        print(json.dumps({**last, "differences": lines}))
    else:
        if last["found"] > len(lines):
            print(f"and at {last['found'] - len(lines)} more paths")
        print(_summary(last), file=sys.stderr)
    return 1 if last["found"] else 0


def _summary(last: dict[str, Any]) -> str:
    looked = f"{last['files']} files, {_in_mib(last['bytes'])} compared"
    if not last["found"]:
        return f"both trees are equal ({looked})"
    return f"differences: {last['found']}, of them repaired: {last['repaired']} ({looked})"


@contextmanager
def _progress() -> Iterator[Show]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("verify")
        yield lambda found: bar.update(task, description=_state(found))


class _Lines:
    """Progress where there is no terminal: a line now and then, none for a walk of a moment."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _FIRST_LINE_S

    def __call__(self, found: dict[str, Any]) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINES_S
            print(_state(found), file=sys.stderr, flush=True)


def _state(found: dict[str, Any]) -> str:
    return f"verify: {found['files']} files, {_in_mib(found['bytes'])} compared, differences: {found['found']}"


def _in_mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.1f} MiB"
