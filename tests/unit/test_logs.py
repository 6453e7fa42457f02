"""Log lines: as text, as JSON, and as the journal takes them."""

import io
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorfs import logs

CONTEXT = {"volume": "db", "node": "one"}


def _record(message: str = "two is lost", level: int = logging.WARNING, **extra: Any) -> logging.LogRecord:
    record = logging.makeLogRecord({"name": "mirrorfs.node", "msg": message, "levelno": level, "created": 1.5, **extra})
    record.levelname = logging.getLevelName(level)
    return record


def test_a_line_of_json_has_all_that_the_record_has() -> None:
    line = logs.JsonFormatter(CONTEXT).format(_record(event="peer-lost", peer="two", epoch=3))
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "warning",
        "logger": "mirrorfs.node",
        "message": "two is lost",
        "volume": "db",
        "node": "one",
        "event": "peer-lost",
        "peer": "two",
        "epoch": 3,
    }


def test_whatever_is_in_a_record_it_is_one_line_of_json() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = _record("one\ntwo \udcff", exc_info=sys.exc_info(), path=Path("/data"))
    line = logs.JsonFormatter(CONTEXT).format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "one\ntwo \udcff"
    assert found["exception"].endswith("ValueError: a\nb")
    assert found["path"] == "/data"


def test_text_has_the_time_or_in_the_journal_a_priority_for_each_line() -> None:
    assert logs.TextFormatter(False).format(_record()).endswith(" WARNING two is lost")
    assert logs.TextFormatter(True).format(_record("a\nb")) == "<4>WARNING a\n<4>b"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "journal"))
        listening.settimeout(10)
        yield listening


def _handler(journal: socket.socket) -> logs.JournalHandler:
    return logs.JournalHandler(CONTEXT, str(journal.getsockname()))


def _entries(datagram: bytes) -> dict[str, str]:
    """As the journal reads it."""
    found = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        key, has_value, value = line.partition(b"=")
        if not has_value:
            (length,) = struct.unpack_from("<Q", datagram)
            value, datagram = datagram[8 : 8 + length], datagram[9 + length :]
        found[key.decode()] = value.decode()
    return found


def test_the_journal_gets_fields(journal: socket.socket) -> None:
    handler = _handler(journal)
    handler.handle(_record("one line\nand another", event="peer-lost", peer="two", in_sync="one=1\ntwo"))
    handler.close()
    assert _entries(journal.recv(1 << 16)) == {
        "MESSAGE": "one line\nand another",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "mirrorfs",
        "LOGGER": "mirrorfs.node",
        "MIRRORFS_VOLUME": "db",
        "MIRRORFS_NODE": "one",
        "MIRRORFS_EVENT": "peer-lost",
        "MIRRORFS_PEER": "two",
        "MIRRORFS_IN_SYNC": "one=1\ntwo",
    }


def test_a_journal_that_takes_nothing_holds_nobody_up_and_is_told_of_it(journal: socket.socket) -> None:
    handler = _handler(journal)
    for number in range(2000):  # many more than a queue of datagrams holds
        handler.handle(_record(f"line {number}"))
    taken = 0
    journal.setblocking(False)
    while True:
        try:
            journal.recv(1 << 16)
        except BlockingIOError:
            break
        taken += 1
    assert 0 < taken < 2000
    handler.handle(_record("the next one"))
    handler.handle(_record("and one more"))
    handler.close()
    missing = 2000 - taken
    assert _entries(journal.recv(1 << 16))["MESSAGE"] == (
        f"the next one ({missing} lines before this one are missing: the journal did not take them)"
    )
    assert _entries(journal.recv(1 << 16))["MESSAGE"] == "and one more"


def test_lines_without_a_journal_are_counted_and_raise_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr("sys.stderr", broken)
        handler = logs.JournalHandler(CONTEXT, str(tmp_path / "journal"))
        for _ in range(2):
            handler.handle(_record())
        monkeypatch.undo()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        handler.handle(_record())
        assert b"(2 lines before this one are missing" in journal.recv(65536)
    handler.close()


def test_stderr_is_the_journals_only_if_it_is_that_very_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "file", "w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert logs.is_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert not logs.is_journal(stream)
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not logs.is_journal(stream)


def test_a_handler_may_take_events_only() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(logs.has_event)
    handler.handle(_record("nothing special"))
    handler.handle(_record("an event", event="peer-lost"))
    assert stream.getvalue() == "an event\n"
