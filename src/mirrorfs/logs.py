"""Where log lines go and how they look: text, one JSON object for each line, or systemd's journal with fields.

A line that tells of an event carries its name (`extra={"event": "peer-lost", "peer": "two"}`): docs/EVENTS.md lists them with
their fields, and whoever wants them only adds a handler with the filter `has_event`. The journal takes fields by its native
protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/), a datagram of lines KEY=value, which is documented and stable: a
library for it would need a compiler, or be Debian's and outside of our environment.
"""

import faulthandler
import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, TextIO

#: syslog's numbers, which the journal and the "<N>" at the start of a line have too.
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))
_JOURNAL: Final = "/run/systemd/journal/socket"
_SEND_BUFFER_BYTES: Final = 8 << 20
#: What is longer would have to be sent in a file.
_MOST_CHARACTERS: Final = 32 << 10
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NO_KEY: Final = re.compile(r"[^A-Z0-9_]")


class Format(StrEnum):
    """How lines look on stderr."""

    TEXT = "text"
    JSON = "json"


def configure(wanted: Format | None, volume: str, node: str) -> None:
    """Let the log of this process go where it is read: as `wanted` to stderr; without a wish to the journal if stderr goes
    there, and else as text. A crash, or SIGABRT of systemd's watchdog, says on stderr where each thread is."""
    context = {"volume": volume, "node": node}
    handler: logging.Handler
    if wanted is None and is_journal(sys.stderr):
        handler = JournalHandler(context)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter(context) if wanted is Format.JSON else TextFormatter(is_journal(sys.stderr)))
    logger = logging.getLogger("mirrorfs")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    faulthandler.enable()


def is_journal(stream: TextIO) -> bool:
    """Whether what is written to it goes to systemd's journal (JOURNAL_STREAM of systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def has_event(record: logging.LogRecord) -> bool:
    """A filter: whether the record tells of an event."""
    return hasattr(record, "event")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the record carries beside its text: `event` and the fields of that."""
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def priority(level: int) -> int:
    """That of syslog."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


def error_line(text: str) -> str:
    """A line about what ends this process, for stderr: the journal takes it for an error."""
    return f"<{priority(logging.ERROR)}>{text}" if is_journal(sys.stderr) else text


class TextFormatter(logging.Formatter):
    """Time, level and text; in the `journal`, which has the time already, the priority in front of each line instead."""

    def __init__(self, journal: bool) -> None:
        super().__init__("%(levelname)s %(message)s" if journal else "%(asctime)s %(levelname)s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """As the standard library does."""
        text = super().format(record)
        return "\n".join(f"<{priority(record.levelno)}>{line}" for line in text.split("\n")) if self._journal else text


class JsonFormatter(logging.Formatter):
    """One JSON object: time (RFC 3339, UTC), level, logger, message, `context`, then the fields of the record."""

    def __init__(self, context: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in the record."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._context,
            **fields(record),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


class JournalHandler(logging.Handler):
    """Sends records to the journal, the fields with the prefix MIRRORFS_.

    It never waits and never raises: a node that waits for its log, or ends with it, would be lost for the other one. What the
    journal does not take is counted, and the next line that it takes says how many are missing. Stderr is no way out, since
    it leads to the same journal.
    """

    def __init__(self, context: Mapping[str, str], address: str = _JOURNAL) -> None:
        super().__init__()
        self._context = context
        self._address = address
        self._left_out = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._plain = TextFormatter(True)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            self._socket.sendto(self.datagram(record), self._address)
            self._left_out = 0
        except Exception:
            self._left_out += 1

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()
        super().close()

    def datagram(self, record: logging.LogRecord) -> bytes:
        """The record as the journal takes it."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self._plain.formatException(record.exc_info)
        if self._left_out:
            message += f" ({self._left_out} lines before this one are missing: the journal did not take them)"
        entries = {
            "MESSAGE": message[:_MOST_CHARACTERS],
            "PRIORITY": str(priority(record.levelno)),
            "SYSLOG_IDENTIFIER": "mirrorfs",
            "LOGGER": record.name,
        }
        for key, value in {**self._context, **fields(record)}.items():
            entries[f"MIRRORFS_{_NO_KEY.sub('_', key.upper())}"] = str(value)[:_MOST_CHARACTERS]
        return b"".join(_entry(key, value) for key, value in entries.items())


def _entry(key: str, value: str) -> bytes:
    """KEY=value, or for a value of several lines its length (64 bits, little endian) in front of it."""
    data = value.encode(errors="backslashreplace")
    if b"\n" not in data:
        return key.encode() + b"=" + data + b"\n"
    return key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
