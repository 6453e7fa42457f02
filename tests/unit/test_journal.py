"""What is on disk: what was saved is loaded, a crash leaves the old or the new, damage is told and never guessed at."""

import errno
import os
import stat
import struct
from pathlib import Path
from zlib import crc32

import msgpack
import pytest

from mirrorfs import journal
from mirrorfs.core.epochs import Epoch, Member, Record, Standing
from mirrorfs.errors import JournalError
from mirrorfs.journal import Journal

EPOCH = Epoch(7, "0123456789abcdef", "one", frozenset({Member("one", "b1"), Member("two", "b2")}), True, 1.5e9)
RECORD = Record("00" * 16, (EPOCH,), frozenset({EPOCH.tag}), Standing.RESYNCING, "a copy from one began")
NEWER = Record("00" * 16, (EPOCH,), frozenset(), Standing.IN_SYNC, "")

LABELS = ["record:open", "record:write", "record:fsync", "record:rename", "record:fsync-directory"]


class _KilledError(BaseException):
    """Stands for the end of the process: nothing in the journal may catch it."""


def test_a_new_node_has_an_empty_record_and_a_directory_that_only_it_may_read(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    assert Journal(directory).load() == Record()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    Journal(tmp_path).save(RECORD)
    assert Journal(tmp_path).load() == RECORD
    Journal(tmp_path).save(NEWER)
    assert Journal(tmp_path).load() == NEWER
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_every_disk_call_has_its_label_in_this_order(tmp_path: Path) -> None:
    labels: list[str] = []
    Journal(tmp_path, at=labels.append).save(RECORD)
    assert labels == LABELS


@pytest.mark.parametrize("label", LABELS)
def test_a_disk_error_at_any_call_is_told_and_leaves_the_old_record_or_the_new_one(tmp_path: Path, label: str) -> None:
    Journal(tmp_path).save(RECORD)

    def fail(at: str) -> None:
        if at == label:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(JournalError, match="No space left on device"):
        Journal(tmp_path, at=fail).save(NEWER)
    assert Journal(tmp_path).load() == (NEWER if label == "record:fsync-directory" else RECORD)


@pytest.mark.parametrize("label", LABELS)
def test_a_crash_at_any_call_leaves_the_old_record_or_the_new_one_and_the_next_save_works(tmp_path: Path, label: str) -> None:
    Journal(tmp_path).save(RECORD)

    def crash(at: str) -> None:
        if at == label:
            raise _KilledError

    with pytest.raises(_KilledError):
        Journal(tmp_path, at=crash).save(NEWER)
    assert Journal(tmp_path).load() == (NEWER if label == "record:fsync-directory" else RECORD)
    Journal(tmp_path).save(NEWER)
    assert Journal(tmp_path).load() == NEWER


def test_what_is_loaded_is_made_durable_before_anybody_acts_on_it(tmp_path: Path) -> None:
    labels: list[str] = []
    kept = Journal(tmp_path, at=labels.append)
    kept.load()
    kept.load_ids()
    assert labels == [], "there is nothing yet"
    kept.save(RECORD)
    kept.save_ids(65536)
    labels.clear()
    assert kept.load() == RECORD
    assert kept.load_ids() == 65536
    assert labels == ["record:fsync", "record:fsync-directory", "ids:fsync", "ids:fsync-directory"]
    labels.clear()
    assert kept.read() == RECORD
    assert kept.read_ids() == 65536
    assert labels == [], "who only looks, as `journal show` does, writes nothing"


@pytest.mark.parametrize("label", ["record:fsync", "record:fsync-directory"])
def test_a_record_that_cannot_be_made_durable_is_not_loaded(tmp_path: Path, label: str) -> None:
    Journal(tmp_path).save(RECORD)

    def fail(at: str) -> None:
        if at == label:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(JournalError, match=f"{tmp_path}/record: cannot be written: Input/output error"):
        Journal(tmp_path, at=fail).load()


def _saved(directory: Path) -> bytearray:
    Journal(directory).save(RECORD)
    return bytearray((directory / "record").read_bytes())


def test_any_byte_that_changed_on_disk_is_told_as_damage(tmp_path: Path) -> None:
    whole = _saved(tmp_path)
    # Bytes 10 and 11 are flags that nothing uses yet.
    for position in set(range(len(whole))) - {10, 11}:
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / "record").write_bytes(damaged)
        with pytest.raises(JournalError, match=r"damaged|newer"):
            Journal(tmp_path).load()


def test_a_record_that_was_cut_off_anywhere_or_has_something_behind_it_is_told_as_damage(tmp_path: Path) -> None:
    whole = bytes(_saved(tmp_path))
    for length in range(len(whole)):
        (tmp_path / "record").write_bytes(whole[:length])
        with pytest.raises(JournalError, match="damaged"):
            Journal(tmp_path).load()
    (tmp_path / "record").write_bytes(whole + b"\0")
    with pytest.raises(JournalError, match="damaged"):
        Journal(tmp_path).load()


def _framed(body: bytes, version: int = journal.VERSION) -> bytes:
    return struct.pack("<8sHHII", journal.MAGIC, version, 0, len(body), crc32(body)) + body


def test_a_record_of_a_newer_version_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(_framed(b"", journal.VERSION + 1))
    with pytest.raises(JournalError, match="newer mirrorfs"):
        Journal(tmp_path).load()


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", msgpack.packb(1), msgpack.packb([]), msgpack.packb({}), msgpack.packb({"volume_id": "x"})]
)
def test_a_body_that_is_no_record_is_told_as_damage_although_its_checksum_is_right(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "record").write_bytes(_framed(body))
    with pytest.raises(JournalError, match="damaged"):
        Journal(tmp_path).load()


def test_a_record_that_cannot_be_read_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    with pytest.raises(JournalError, match=f"{tmp_path}/record: cannot be read: Is a directory"):
        Journal(tmp_path).load()


# ---- the other file: which ids may have been used


def test_a_new_node_has_used_no_id_and_what_is_reserved_stays_so(tmp_path: Path) -> None:
    assert Journal(tmp_path).load_ids() == 0
    Journal(tmp_path).save_ids(65536)
    assert Journal(tmp_path).load_ids() == 65536
    assert Journal(tmp_path).load() == Record(), "the record is another file"


@pytest.mark.parametrize("label", [label.replace("record", "ids") for label in LABELS])
def test_a_crash_while_ids_are_reserved_never_brings_the_number_back(tmp_path: Path, label: str) -> None:
    Journal(tmp_path).save_ids(65536)

    def crash(at: str) -> None:
        if at == label:
            raise _KilledError

    with pytest.raises(_KilledError):
        Journal(tmp_path, at=crash).save_ids(131072)
    assert Journal(tmp_path).load_ids() == (131072 if label == "ids:fsync-directory" else 65536)


def test_a_number_of_ids_that_is_none_is_told_as_damage(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(_framed(msgpack.packb("many")))
    with pytest.raises(JournalError, match="ids: damaged"):
        Journal(tmp_path).load_ids()
