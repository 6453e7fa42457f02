"""Looks at the node once a second, for all who watch: the moments of the last minute, and what has happened."""

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from mirrorfs import __version__
from mirrorfs.console import picture as pictures
from mirrorfs.console.lines import Lines
from mirrorfs.console.picture import Seen
from mirrorfs.errors import MirrorfsError

log = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_ANSWER_S: Final = 2.0
_EVENTS: Final = 200
_SHOWN: Final = 40


class NodePort(Protocol):
    """The node, as its controller knows it."""

    def see(self) -> Seen:
        """What is known at this moment, without waiting."""

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        """A command to the mount; raises the error of the node."""

    async def command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """A command to the controller; likewise."""


class Observer:
    """What all pages of the console show."""

    def __init__(self, node: NodePort, state_dir: Path) -> None:
        self.node = node
        self._lines = Lines(state_dir / "console-events.jsonl")
        self._history: deque[Seen] = deque(maxlen=int(pictures.WINDOW_S / _LOOK_S) + 2)
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._news = trio.Event()
        #: The page of the last look, and as JSON: the same for all who watch.
        self.picture: dict[str, Any] = {}
        self.encoded = ""
        self._failure = ""
        self._draw()
        # One thread: lines keep their order, and a disk that hangs takes no second one.
        self._limiter = trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Look until cancelled."""
        before = await trio.to_thread.run_sync(self._lines.last, _EVENTS, limiter=self._limiter, abandon_on_cancel=True)
        self._events.extend(before)
        async with trio.open_nursery() as nursery:
            while True:
                measures = await self._measures()
                try:
                    self._look(measures, nursery)
                    self._failure = ""
                except Exception as error:  # a status that it does not understand must not end what people are doing here
                    if repr(error) != self._failure:
                        log.exception("the console cannot show what it sees")
                    self._failure = repr(error)
                await trio.sleep(_LOOK_S)

    async def _measures(self) -> dict[str, Any] | None:
        try:
            return await self.node.ask("measures", timeout_s=_ANSWER_S)
        except MirrorfsError:
            return None  # it does not run, or hangs: the watch of the mount says so

    def _look(self, measures: dict[str, Any] | None, nursery: trio.Nursery) -> None:
        seen = self.node.see()
        seen = Seen(seen.at, seen.node, seen.peer, seen.mount, seen.status, seen.controller, measures)
        events = pictures.changes(self._history[-1] if self._history else None, seen)
        self._history.append(seen)
        if events:
            self._events.extend(events)
            nursery.start_soon(self._write, events)
        self._draw()
        self._news.set()
        self._news = trio.Event()

    async def _write(self, events: list[dict[str, Any]]) -> None:
        await trio.to_thread.run_sync(self._lines.add, *events, limiter=self._limiter, abandon_on_cancel=True)

    async def wait(self) -> None:
        """Until there is something new to show."""
        await self._news.wait()

    @property
    def latest(self) -> Seen:
        """The newest moment."""
        return self._history[-1] if self._history else self.node.see()

    def _draw(self) -> None:
        history = list(self._history)
        shown = pictures.picture(self.latest, history[:-1])
        self.picture = shown | {"events": self.events(_SHOWN), "version": __version__}
        self.encoded = json.dumps(self.picture)

    def events(self, count: int) -> list[dict[str, Any]]:
        """The newest, newest first."""
        return list(self._events)[::-1][:count]
