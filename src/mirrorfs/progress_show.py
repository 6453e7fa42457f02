"""Progress of what takes longer than two seconds: a line that changes on a terminal, else a line now and then, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

#: Without a terminal, a line after the first of these and then after each of the second, in seconds.
_FIRST_LINE_S: Final = 2.0
_LINES_S: Final = 10.0

Show = Callable[[str], None]


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Call what this yields with how far it is, as often as it is known."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(what)
        yield lambda text: bar.update(task, description=text)


class _Lines:
    """Nothing for what takes a moment."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _FIRST_LINE_S

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINES_S
            print(text, file=sys.stderr, flush=True)
