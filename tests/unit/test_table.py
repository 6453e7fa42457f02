"""The files that a node knows: descriptors within their bounds, and nothing closed that somebody is about to use."""

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.table import Known, Table

LIMIT = 100


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """A table that may keep ten descriptors of files that nobody has open."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (LIMIT, LIMIT))
    mount = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    table = Table(mount)
    yield table
    table.clear()
    os.close(mount)


def _made(table: Table, directory: Path, number: int) -> Known:
    descriptor = os.open(directory / str(number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
    return table.add_made(number, descriptor)


def test_a_file_that_was_just_made_stays_known_when_all_others_wait_for_a_sync(table: Table, tmp_path: Path) -> None:
    for number in range(2, LIMIT):
        known = _made(table, tmp_path, number)
        assert table.find(number) is known
        assert stat.S_ISREG(os.fstat(table.descriptor(known)).st_mode)
        known.version += 1  # written to, and not synced


def test_idle_files_that_are_synced_are_closed_and_opened_again_by_their_handle(table: Table, tmp_path: Path) -> None:
    files = []
    for number in range(2, LIMIT):
        files.append(_made(table, tmp_path, number))
        table.pin(files[-1])
    closed = [known for known in files if known.data < 0]
    assert len(closed) > len(files) // 2
    for known in closed:
        assert os.fstat(table.data(known)).st_ino == (tmp_path / str(known.id)).stat().st_ino


def test_a_descriptor_of_a_file_with_writes_that_were_not_synced_is_never_closed(table: Table, tmp_path: Path) -> None:
    written = _made(table, tmp_path, 2)
    written.version += 1
    for number in range(3, LIMIT):
        _made(table, tmp_path, number)
    assert written.data >= 0
    assert table.find(2) is written


def test_what_is_in_hand_stays_open_however_many_cannot_be_closed(table: Table, tmp_path: Path) -> None:
    """A rename looks two files up, and then needs two directories; the file that it replaces cannot be opened again."""

    def known(number: int) -> Known:
        (tmp_path / str(number)).touch()
        return table.add(number, stat.S_IFREG, os.open(tmp_path / str(number), os.O_PATH))

    for number in range(2, 40):
        known(number).gone = True
    others = [known(number) for number in range(40, 60)]
    replaced = known(60)
    table.descriptor(replaced)
    for other in others[:4]:
        table.descriptor(other)
    (tmp_path / "60").unlink()
    assert os.fstat(table.descriptor(replaced)).st_nlink == 0


def test_names_come_and_go_and_the_newest_is_the_last() -> None:
    known = Known(5, stat.S_IFREG)
    for name in (b"one", b"two", b"one"):
        known.add_name(1, name)
    known.add_name(2, b"one")
    known.add_name(1, b"zero", oldest=True)
    assert known.names == [(1, b"zero"), (1, b"one"), (1, b"two"), (2, b"one")]
    assert not known.drop_name(3, b"one")
    assert known.drop_name(1, b"one")
    assert known.names == [(1, b"zero"), (1, b"two"), (2, b"one")]
    assert known.has_name(2, b"one")
    assert not known.has_name(1, b"one")
