"""What `mirrorfs journal show` says of a state directory: each file as it is, and nothing is changed by looking."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirrorfs.core.dirty import END, Attributes, Extents, Head, Located, Names
from mirrorfs.core.epochs import Epoch, Member, Record, Standing
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.journal import Journal
from mirrorfs.journal_show import describe, in_words, is_damaged

VOLUME = "0f" * 16
EPOCHS = (
    Epoch(6, "00aa", "two", frozenset({Member("one", "b1"), Member("two", "b2")}), False, 1.5e9),
    Epoch(7, "11bb", "one", frozenset({Member("one", "b1")}), True, 1.6e9),
)


@pytest.fixture(autouse=True)
def two_hours_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "EAST-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of a node that has made an epoch of its own."""
    journal = Journal(tmp_path)
    journal.save(Record(VOLUME, EPOCHS, frozenset({"11bb"}), Standing.OUTDATED, "two went on alone"))
    journal.save_ids(65536)
    log = DirtyLog(tmp_path)
    log.rewrite(Head(VOLUME, 12, 9, 0x8000000000, True), [Located(0x20, b"h", 1, b"p", b"a\n\xff\xc3\xa9"), Attributes(0x20)])
    log.append([Extents(0x20, 4, 5), Extents(0x20, 9, END), Extents(0x20, 0, 3), Extents(0x20, 7, 7), Extents(0x20, 1, 2)])
    log.append([Located(1, b"r"), Names(1), Names(1), Extents(0x30, 2, END), Located(0x40, b"h", 1, b"p", b"b")])
    log.close()
    return tmp_path


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_pause_is_shown_with_its_moment(state: Path) -> None:
    journal = Journal(state)
    assert describe(state)["record"]["paused_since"] is None
    journal.save(replace(journal.load(), paused_at=1.6e9))
    assert describe(state)["record"]["paused_since"] == "2020-09-13T14:26:40+0200"
    assert "  paused     by hand since 2020-09-13T14:26:40+0200" in in_words(describe(state)).splitlines()


def test_everything_is_shown_for_a_person(state: Path) -> None:
    before = content(state)
    found = describe(state)
    assert in_words(found) == "\n".join(
        [
            f"{state}/record",
            f"  volume id  {VOLUME}",
            "  standing   outdated",
            "  reason     two went on alone",
            "  epoch      6 since 2017-07-14T04:40:00+0200: primary two, in sync one, two",
            "  epoch      7 since 2020-09-13T14:26:40+0200: primary one, in sync one, forced, wrote alone",
            f"{state}/ids",
            "  reserved   65536",
            f"{state}/dirty",
            f"  volume id  {VOLUME}",
            "  checkpoint 12",
            "  changes    since checkpoint 9, and all files from 0x8000000000 on",
            "  complete   yes",
            f"  size       {len(before['dirty'])} B",
            "  dirty      (extents of 4 MiB)",
            "    0x1: names",
            '    0x20 "a\\n\\xffé": attributes, extents 0-5 7 9-',
            "    0x30: extents 2-",
            '    0x40 "b": nothing',
        ]
    )
    assert not is_damaged(found)
    assert content(state) == before


def test_everything_is_shown_for_a_program(state: Path) -> None:
    found: dict[str, Any] = json.loads(json.dumps(describe(state)))
    assert found["record"]["epochs"][1] == {
        "number": 7,
        "tag": "11bb",
        "primary": "one",
        "in_sync": ["one"],
        "forced": True,
        "began": "2020-09-13T14:26:40+0200",
        "wrote_alone": True,
    }
    assert found["ids"] == {"state": "present", "reserved": 65536}
    assert (found["dirty"]["state"], found["dirty"]["number"], found["dirty"]["torn_bytes"]) == ("present", 12, 0)
    assert found["dirty"]["files"][1] == {
        "file": "0x20",
        "name": "a\n\udcffé",
        "names": False,
        "attributes": True,
        "extents": [[0, 5], [7, 7], [9, None]],
    }


def test_a_node_that_was_never_started_has_no_files_and_gets_none_by_looking(tmp_path: Path) -> None:
    found = describe(tmp_path / "state")
    assert in_words(found).count("there is no such file") == 3
    assert not is_damaged(found)
    assert not (tmp_path / "state").exists()


def test_a_record_of_no_volume_and_a_log_that_says_nothing_are_shown_as_such(tmp_path: Path) -> None:
    Journal(tmp_path).save(Record())
    log = DirtyLog(tmp_path)
    log.rewrite(Head(), [])
    log.close()
    words = in_words(describe(tmp_path)).splitlines()
    assert words[1:4] == ["  volume id  -", "  standing   in sync", "  reason     -"]
    assert words[-2] == "  complete   no: it says nothing"
    assert words[-1].startswith("  size "), "and no heading for nothing"


@pytest.mark.parametrize("name", ["record", "ids", "dirty"])
def test_one_damaged_file_is_told_and_does_not_hide_the_others(state: Path, name: str) -> None:
    (state / name).write_bytes(b"?")
    before = content(state)
    found = describe(state)
    assert is_damaged(found)
    assert f"{state}/{name}\n  {state}/{name}: damaged" in in_words(found)
    assert {part for part in ("record", "ids", "dirty") if found[part]["state"] == "present"} == {"record", "ids", "dirty"} - {
        name
    }
    assert content(state) == before


def test_a_torn_tail_is_told_and_left_alone(state: Path) -> None:
    with open(state / "dirty", "ab") as stream:
        stream.write(b"torn")
    before = content(state)
    found = describe(state)
    assert "  torn       4 B at the end are of an append that was cut short\n" in in_words(found)
    assert found["dirty"]["size_bytes"] == len(before["dirty"]) - 4
    assert not is_damaged(found)
    assert content(state) == before
