"""The dirty log on disk: what was appended is loaded, a crash leaves the old or the new, what is damaged says nothing."""

import errno
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import msgpack
import pytest

from mirrorfs import dirty_log
from mirrorfs.core.dirty import END, Attributes, Entry, Extents, Head, Located, Names
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.errors import DirtyLogDamagedError, JournalError

HEAD = Head("0f" * 16, number=7, base=5, new_from=(1 << 63) - 1, complete=True)
NEWER = Head("0f" * 16, number=8, base=8, new_from=3, complete=False)
ENTRIES: list[Entry] = [
    Names(1),
    Attributes((1 << 63) - 1),
    Extents(2, 0, 0),
    Extents(2, 3, (1 << 41) - 1),
    Extents(2, 9, END),
    Located(2, b"\0" * 136, 1, b"\xff" * 20, b"\xc1mfs \n" + b"n" * 249),
    Located(1, b"root"),
]
#: Where the records begin.
HEADER_BYTES = 20
SALT = 0x01020304

REWRITE = ["dirty:open", "dirty:write", "dirty:fsync", "dirty:rename", "dirty:fsync-directory"]
LOAD = ["dirty:fsync", "dirty:fsync-directory"]
APPEND = ["dirty-append:write", "dirty-append:fsync"]
APPEND_TO_TORN = ["dirty:open", "dirty:truncate", *APPEND]


class _KilledError(BaseException):
    """Stands for the end of the process: nothing in the log may catch it."""


def written(directory: Path, *appends: list[Entry]) -> Path:
    """A log with HEAD, and each of `appends` appended; its file."""
    log = DirtyLog(directory)
    log.rewrite(HEAD, [])
    for entries in appends:
        log.append(entries)
    log.close()
    return log.path


def loaded(directory: Path) -> tuple[Head, list[Entry]] | None:
    log = DirtyLog(directory)
    found = log.load()
    log.close()
    return found


def failing(label: str, error: BaseException) -> Callable[[str], None]:
    def at(now: str) -> None:
        if now == label:
            raise error

    return at


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sealed(body: bytes, salt: int = SALT) -> bytes:
    """A record as docs/JOURNAL.md has it."""
    length = struct.pack("<I", len(body))
    return b"\xc1mfs" + length + struct.pack("<I", crc32(length + body, salt)) + body


def header(version: int = dirty_log.VERSION) -> bytes:
    start = struct.pack("<8sHHI", b"mfsdirty", version, 0, SALT)
    return start + struct.pack("<I", crc32(start))


HEAD_RECORD = sealed(msgpack.packb([1, "0f" * 16, 7, 5, 3, True, 0]))


# ---- what was written is loaded


def test_a_node_that_never_wrote_a_log_has_none(tmp_path: Path) -> None:
    assert loaded(tmp_path) is None
    assert loaded(tmp_path / "missing") is None
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


def test_every_kind_of_entry_is_loaded_as_it_was_written_afresh_or_appended(tmp_path: Path) -> None:
    log = DirtyLog(tmp_path)
    log.rewrite(HEAD, iter(ENTRIES))
    assert loaded(tmp_path) == (HEAD, ENTRIES)
    log.append(iter(ENTRIES))
    log.append([Names(9)])
    assert loaded(tmp_path) == (HEAD, [*ENTRIES, *ENTRIES, Names(9)])
    log.rewrite(NEWER, [])
    log.append([Names(9)])
    log.close()
    assert loaded(tmp_path) == (NEWER, [Names(9)])
    assert [path.name for path in tmp_path.iterdir()] == ["dirty"]


def test_a_log_without_a_volume_yet_can_be_written(tmp_path: Path) -> None:
    log = DirtyLog(tmp_path)
    log.rewrite(Head(), [])
    log.close()
    assert loaded(tmp_path) == (Head(), [])


def test_marks_are_counted_over_appends_reloads_and_logs_that_are_written_afresh(tmp_path: Path) -> None:
    log = DirtyLog(tmp_path)
    log.rewrite(HEAD, ENTRIES)
    log.append([Names(9), Names(10)])
    assert log.marked == len(ENTRIES) + 2
    log.close()
    log = DirtyLog(tmp_path)
    log.load()
    assert log.marked == len(ENTRIES) + 2
    log.rewrite(NEWER, [Names(9)])
    assert log.marked == len(ENTRIES) + 3
    log.rewrite(NEWER, [])
    log.append([Names(9)])
    log.close()
    contents = dirty_log.read(log.path)
    assert contents is not None
    assert contents.marked == log.marked == len(ENTRIES) + 4


def test_what_is_appended_after_a_reload_stands_behind_the_rest(tmp_path: Path) -> None:
    written(tmp_path, ENTRIES)
    log = DirtyLog(tmp_path)
    log.load()
    log.append([Names(9)])
    log.append([Names(10)])
    log.close()
    assert loaded(tmp_path) == (HEAD, [*ENTRIES, Names(9), Names(10)])


def test_a_log_of_several_chunks_is_loaded_whole(tmp_path: Path) -> None:
    many: list[Entry] = [Located(number, b"h" * 200, 1, b"p" * 200, b"n" * 200) for number in range(1, 8000)]
    log = DirtyLog(tmp_path)
    log.rewrite(HEAD, many)
    log.close()
    assert log.size_bytes == log.path.stat().st_size > 4 << 20
    assert loaded(tmp_path) == (HEAD, many)


def test_the_bytes_are_those_of_the_journal_page(tmp_path: Path) -> None:
    entries = [[2, 9], [3, 9], [4, 9, 0, 1 << 62], [5, 9, b"h", 1, b"p", b"n"]]
    (tmp_path / "dirty").write_bytes(header() + HEAD_RECORD + b"".join(sealed(msgpack.packb(entry)) for entry in entries))
    assert loaded(tmp_path) == (
        Head("0f" * 16, 7, 5, 3, True),
        [Names(9), Attributes(9), Extents(9, 0, END), Located(9, b"h", 1, b"p", b"n")],
    )


def test_the_sizes_say_how_much_was_appended_since_the_log_was_written_afresh_or_loaded(tmp_path: Path) -> None:
    log = DirtyLog(tmp_path)
    assert (log.size_bytes, log.rewritten_bytes) == (0, 0)
    log.rewrite(HEAD, ENTRIES)
    fresh = log.path.stat().st_size
    assert (log.size_bytes, log.rewritten_bytes) == (fresh, fresh)
    log.append(ENTRIES)
    longer = log.path.stat().st_size
    assert (log.size_bytes, log.rewritten_bytes) == (longer, fresh)
    log.close()
    again = DirtyLog(tmp_path)
    again.load()
    assert (again.size_bytes, again.rewritten_bytes) == (longer, longer)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    log = DirtyLog(tmp_path)
    log.rewrite(HEAD, [])
    nonsense: list[Entry] = [Names(0), Attributes(1 << 63), Extents(1, 2, 1), Located(1, b"h", 1, b"p", b"n" * (64 << 10))]
    for entry in nonsense:
        with pytest.raises(AssertionError):
            log.append([entry])
    log.append([Names(1)])
    log.close()
    assert loaded(tmp_path) == (HEAD, [Names(1)])


# ---- faults


def test_every_disk_call_has_its_label_in_this_order(tmp_path: Path) -> None:
    labels: list[str] = []

    def taken() -> list[str]:
        taken, labels[:] = list(labels), []
        return taken

    log = DirtyLog(tmp_path, at=labels.append)
    log.rewrite(HEAD, ENTRIES)
    assert taken() == REWRITE
    log.append(ENTRIES)
    assert taken() == APPEND
    log.append([])
    assert taken() == []
    log.close()
    with open(log.path, "ab") as stream:
        stream.write(b"torn")
    again = DirtyLog(tmp_path, at=labels.append)
    again.load()
    assert taken() == LOAD
    again.append(ENTRIES)
    again.append(ENTRIES)
    assert taken() == [*APPEND_TO_TORN, *APPEND]
    again.close()


@pytest.mark.parametrize("label", REWRITE)
@pytest.mark.parametrize("error", [no_room(), _KilledError()], ids=["fault", "kill"])
def test_a_log_written_afresh_is_the_old_one_or_the_new_one_wherever_it_ends(
    tmp_path: Path, label: str, error: BaseException
) -> None:
    written(tmp_path, ENTRIES)
    log = DirtyLog(tmp_path, at=failing(label, error))
    with pytest.raises((JournalError, _KilledError)) as caught:
        log.rewrite(NEWER, [Names(9)])
    assert isinstance(caught.value, _KilledError) or str(caught.value) == (
        f"{tmp_path}/dirty: cannot be written: No space left on device. This node stops; make room or mend the disk, then "
        "start it again"
    )
    with pytest.raises(JournalError, match="an earlier write failed"):
        log.append([Names(10)])
    log.close()
    after = (NEWER, [Names(9)]) if label == "dirty:fsync-directory" else (HEAD, ENTRIES)
    assert loaded(tmp_path) == after
    again = DirtyLog(tmp_path)
    again.rewrite(NEWER, [])
    again.close()
    assert loaded(tmp_path) == (NEWER, []), "what was left behind is in nobody's way"


@pytest.mark.parametrize("label", APPEND_TO_TORN)
@pytest.mark.parametrize("error", [no_room(), _KilledError()], ids=["fault", "kill"])
def test_an_append_that_ends_anywhere_leaves_what_was_there_and_nothing_can_follow_it(
    tmp_path: Path, label: str, error: BaseException
) -> None:
    with open(written(tmp_path, ENTRIES), "ab") as stream:
        stream.write(b"torn")
    log = DirtyLog(tmp_path, at=failing(label, error))
    log.load()
    with pytest.raises((JournalError, _KilledError)):
        log.append([Names(9)])
    content = log.path.read_bytes()
    for _ in range(2):
        with pytest.raises(JournalError, match="cannot be written: an earlier write failed"):
            log.append([Names(10)])
    assert log.path.read_bytes() == content
    log.close()
    assert loaded(tmp_path) == (HEAD, [*ENTRIES, Names(9)] if label == "dirty-append:fsync" else ENTRIES)


@pytest.mark.parametrize("label", LOAD)
def test_a_log_that_cannot_be_made_durable_is_not_loaded(tmp_path: Path, label: str) -> None:
    written(tmp_path, ENTRIES)
    with pytest.raises(JournalError, match="cannot be written: No space left on device"):
        DirtyLog(tmp_path, at=failing(label, no_room())).load()
    assert loaded(tmp_path) == (HEAD, ENTRIES)


def test_a_write_that_took_only_a_part_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DirtyLog(tmp_path)
    log.rewrite(HEAD, ENTRIES)
    pwrite, write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:-1], offset))
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:-1]))
    with pytest.raises(JournalError, match="No space left on device"):
        log.append([Names(9)])
    with pytest.raises(JournalError, match="No space left on device"):
        log.rewrite(NEWER, [])
    log.close()
    assert loaded(tmp_path) == (HEAD, ENTRIES)


def test_a_log_written_afresh_takes_entries_again_after_a_failure(tmp_path: Path) -> None:
    faults = [no_room()]

    def at(label: str) -> None:
        if label == "dirty-append:fsync" and faults:
            raise faults.pop()

    log = DirtyLog(tmp_path, at=at)
    log.rewrite(HEAD, [])
    with pytest.raises(JournalError):
        log.append([Names(9)])
    log.rewrite(NEWER, [])
    log.append([Names(10)])
    log.close()
    assert loaded(tmp_path) == (NEWER, [Names(10)])


def test_a_log_that_cannot_be_read_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "dirty").mkdir()
    with pytest.raises(JournalError, match=f"{tmp_path}/dirty: cannot be read: Is a directory"):
        DirtyLog(tmp_path).load()


# ---- torn tails


def ends(path: Path, count: int) -> list[int]:
    """Where the header and each of the first `count` records end."""
    data, position, found = path.read_bytes(), HEADER_BYTES, [HEADER_BYTES]
    for _ in range(count):
        position += 12 + struct.unpack_from("<I", data, position + 4)[0]
        found.append(position)
    assert position == len(data)
    return found


def test_a_log_that_was_cut_off_anywhere_has_what_is_whole_and_goes_on_from_there(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES)
    whole, borders = path.read_bytes(), ends(path, 1 + len(ENTRIES))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length < borders[1]:
            with pytest.raises(DirtyLogDamagedError):
                loaded(tmp_path)
            continue
        left = ENTRIES[: sum(border <= length for border in borders[2:])]
        log = DirtyLog(tmp_path)
        assert log.load() == (HEAD, left), length
        assert path.read_bytes() == whole[:length], "looking changes nothing"
        log.append([Names(9)])
        log.close()
        assert path.stat().st_size == log.size_bytes
        assert loaded(tmp_path) == (HEAD, [*left, Names(9)]), length


@pytest.mark.parametrize(
    "tail",
    [b"\0", b"\0" * 5000, b"\xff" * 5000, b"\xc1mfs" * 100, b"\xc1mfs\xff\xff\xff\xff" + b"\0" * 20, b"\0" * (3 << 20)],
    ids=["a zero", "zeros", "garbage", "markers", "a length", "many zeros"],
)
def test_a_tail_that_is_no_record_is_cut_off_and_told_once(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, ENTRIES)
    with open(path, "ab") as stream:
        stream.write(tail)
    log = DirtyLog(tmp_path)
    with caplog.at_level(logging.INFO, "mirrorfs"):
        assert log.load() == (HEAD, ENTRIES)
        log.append([Names(9)])
        log.append([Names(10)])
    log.close()
    assert caplog.messages == [f"{path}: ends in {len(tail)} bytes of a write that a crash cut short, they are cut off"]
    assert loaded(tmp_path) == (HEAD, [*ENTRIES, Names(9), Names(10)])


def test_a_record_of_another_log_in_the_tail_is_garbage(tmp_path: Path) -> None:
    path = written(tmp_path, [Names(9)])
    foreign = path.read_bytes()[HEADER_BYTES:]
    path = written(tmp_path, ENTRIES)
    with open(path, "ab") as stream:
        stream.write(foreign)
    assert loaded(tmp_path) == (HEAD, ENTRIES)


def test_what_is_appended_while_somebody_reads_is_not_half_seen(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with open(path, "rb") as stream:
        reader = dirty_log._Reader(path, stream)
        path.write_bytes(whole + whole[HEADER_BYTES:])
        contents = reader.contents()
    assert (contents.head, contents.entries) == (HEAD, ENTRIES[:-1])


# ---- damage


def test_any_byte_that_changed_is_damage_or_in_the_last_record_a_torn_tail(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES)
    whole, last = path.read_bytes(), ends(path, 1 + len(ENTRIES))[-2]
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        if position < last:
            with pytest.raises(DirtyLogDamagedError, match=f"^{path}: damaged at byte .*a full compare"):
                loaded(tmp_path)
        else:
            assert loaded(tmp_path) == (HEAD, ENTRIES[:-1]), position


def test_a_hole_of_zeros_with_a_record_behind_it_is_damage_however_far_away(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES, [Names(9)])
    whole, borders = path.read_bytes(), ends(path, 2 + len(ENTRIES))
    chunk = dirty_log._CHUNK_BYTES
    for gap in [0, 1, *range(chunk - 5, chunk + 5), 3 * chunk]:  # a marker on every side of the border between two pieces
        path.write_bytes(whole[: borders[3]] + b"\0" + b"\0" * gap + whole[borders[-2] :])
        with pytest.raises(DirtyLogDamagedError, match="that others follow"):
            loaded(tmp_path)


def test_damage_is_one_line_with_the_file_and_the_answer(tmp_path: Path) -> None:
    (tmp_path / "dirty").write_bytes(b"")
    with pytest.raises(DirtyLogDamagedError) as caught:
        loaded(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/dirty: damaged at byte 0: it does not begin as it should. What is dirty is not known: a full compare with "
        "the other node is needed"
    )


def test_a_damaged_log_can_be_written_afresh(tmp_path: Path) -> None:
    (tmp_path / "dirty").write_bytes(b"damaged")
    log = DirtyLog(tmp_path)
    with pytest.raises(DirtyLogDamagedError):
        log.load()
    log.rewrite(HEAD, ENTRIES)
    log.close()
    assert loaded(tmp_path) == (HEAD, ENTRIES)


def test_a_log_of_an_older_version_is_not_trusted_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "dirty").write_bytes(header(1) + HEAD_RECORD)
    with pytest.raises(DirtyLogDamagedError, match="older mirrorfs"):
        DirtyLog(tmp_path).load()


def test_a_log_of_a_newer_version_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "dirty").write_bytes(header(dirty_log.VERSION + 1) + b"whatever")
    with pytest.raises(JournalError, match=r"newer mirrorfs .*install that version again") as caught:
        loaded(tmp_path)
    assert not isinstance(caught.value, DirtyLogDamagedError)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        *map(
            msgpack.packb,
            [
                1,
                [],
                {},
                [None],
                [[1]],
                [99, 1],
                [2],
                [2, 0],
                [2, -1],
                [2, 1 << 63],
                [2, "1"],
                [2, True],
                [2, 1.0],
                [2, 1, 1],
                [3, 0],
                [4, 0, 0, 0],
                [4, 1, 2, 1],
                [4, 1, -1, 1],
                [4, 1, 0, 1 << 41],
                [4, 1, 1 << 41, 1 << 62],
                [4, 1, 0, (1 << 62) + 1],
                [4, 1, None, 1],
                [5, 1],
                [5, 1, b"h"],
                [5, 0, b"h", 0, b"", b""],
                [5, 1, "h", 0, b"", b""],
                [5, 1, b"h", 0, b"", "n"],
                [5, 1, b"h", -1, b"", b""],
                [1, "0f" * 16, 7, 5, 3, True],
            ],
        ),
    ],
)
def test_a_record_that_says_nonsense_is_damage_although_its_checksum_is_right(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "dirty").write_bytes(header() + HEAD_RECORD + sealed(body))
    with pytest.raises(DirtyLogDamagedError):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        [2, 1],
        [1],
        [1, "", 0, 0, 0, True],
        [1, b"", 0, 0, 0, True, 0],
        [1, "", -1, 0, 0, True, 0],
        [1, "", 0, 1.5, 0, True, 0],
        [1, "", 0, 0, 1 << 63, True, 0],
        [1, "", 0, 0, 0, 1, 0],
        [1, "", 0, 0, 0, True, -1],
        [1, "", 0, 0, 0, True, b""],
        [1, "", 0, 0, 0, True, 0, 0],
    ],
)
def test_a_head_that_is_none_is_damage(tmp_path: Path, fields: list[object]) -> None:
    (tmp_path / "dirty").write_bytes(header() + sealed(msgpack.packb(fields)) + sealed(msgpack.packb([2, 1])))
    with pytest.raises(DirtyLogDamagedError):
        loaded(tmp_path)


def test_a_record_longer_than_allowed_is_no_record(tmp_path: Path) -> None:
    long = sealed(msgpack.packb([5, 1, b"h", 1, b"p", b"n" * (64 << 10)]))
    (tmp_path / "dirty").write_bytes(header() + HEAD_RECORD + long)
    assert loaded(tmp_path) == (Head("0f" * 16, 7, 5, 3, True), [])
