"""The store of versions that are kept aside: what was kept comes back as it was, all of a batch or nothing of it."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.lost import Entry, LostStore, needed_bytes


@pytest.fixture
def store(tmp_path: Path) -> LostStore:
    """An empty store."""
    return LostStore(tmp_path / "lost")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator["Opened"]:
    """Makes files and opens them as the node has them."""
    found = Opened(tmp_path)
    yield found
    found.close()


class Opened:
    """O_PATH descriptors of files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: list[int] = []

    def __call__(self, name: str, content: bytes | None = None) -> int:
        path = self.directory / name
        if content is not None:
            path.write_bytes(content)
        self._descriptors.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        return self._descriptors[-1]

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def _kept(store: LostStore, path: bytes, source: int, ranges: list[tuple[int, int]] | None = None) -> Entry:
    batch = store.begin("a test")
    batch.keep(path, source, ranges=ranges)
    batch.commit()
    return store.entries()[-1]


def test_a_file_comes_back_with_its_bytes_holes_and_attributes(store: LostStore, opened: Opened, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with open(source, "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"in the middle")
    source.chmod(0o4750)
    os.setxattr(source, "user.colour", b"green")
    os.utime(source, ns=(1_000_000_001, 2_000_000_002))
    entry = _kept(store, b"/at/source", opened("source"))
    assert (entry.path, entry.kind, entry.size, entry.ranges, entry.whole) == (b"/at/source", "file", 10 << 20, None, True)
    assert (entry.why, entry.time > 0) == ("a test", True)
    back = store.export(entry.id, tmp_path / "back")
    assert back.read_bytes() == source.read_bytes()
    status = back.stat()
    assert status.st_blocks * 512 < 1 << 20, "the holes are holes"
    assert stat.S_IMODE(status.st_mode) == 0o4750
    assert status.st_mtime_ns == 2_000_000_002
    assert os.getxattr(back, "user.colour") == b"green"


def test_of_a_large_file_only_the_ranges_can_be_kept_and_the_export_says_which(
    store: LostStore, opened: Opened, tmp_path: Path
) -> None:
    content = os.urandom(64 << 10)
    entry = _kept(store, b"/big", opened("big", content), [(8192, 12288), (4096, 8192), (60 << 10, 1 << 20)])
    assert (entry.ranges, entry.whole) == ([(4096, 12288), (60 << 10, 64 << 10)], False)
    back = store.export(entry.id, tmp_path / "back").read_bytes()
    assert len(back) == len(content)
    assert back[4096:12288] == content[4096:12288]
    assert back[60 << 10 :] == content[60 << 10 :]
    assert back[:4096] + back[12288 : 60 << 10] == bytes(52 << 10), "nothing else was kept"
    assert (tmp_path / "back.ranges").read_text().splitlines()[1:] == ["4096 12288", "61440 65536"]


def test_links_directories_and_special_files_are_kept_as_they_are(store: LostStore, opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("to nowhere")
    (tmp_path / "directory").mkdir(mode=0o711)
    (tmp_path / "directory" / "inside").touch()
    os.mkfifo(tmp_path / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "socket"))
    batch = store.begin("a test")
    for name in ("link", "directory", "fifo", "socket"):
        batch.keep(b"/" + name.encode(), opened(name))
    batch.commit()
    assert [entry.kind for entry in store.entries()] == ["link", "directory", "fifo", "socket"]
    assert store.export_all(tmp_path / "all") == 4
    there = tmp_path / "all" / "1"
    assert os.readlink(there / "link") == "to nowhere"
    assert stat.S_IMODE((there / "directory").stat().st_mode) == 0o711
    assert os.listdir(there / "directory") == [], "a directory's files are kept by themselves"
    assert stat.S_IFMT((there / "fifo").stat().st_mode) == stat.S_IFIFO
    assert stat.S_IFMT((there / "socket").stat().st_mode) == stat.S_IFSOCK


def test_a_path_of_any_bytes_survives(store: LostStore, opened: Opened, tmp_path: Path) -> None:
    entry = _kept(store, b"/d\xfcr/\xff\n", opened("file", b"x"))
    assert entry.path == b"/d\xfcr/\xff\n"
    store.export_all(tmp_path / "all")
    assert (Path(os.fsdecode(os.fsencode(tmp_path) + b"/all/1/d\xfcr/\xff\n"))).read_bytes() == b"x"


def test_an_aborted_batch_leaves_nothing(store: LostStore, opened: Opened) -> None:
    batch = store.begin("a test")
    batch.keep(b"/file", opened("file", b"x"))
    batch.abort()
    assert store.entries() == []
    assert sorted(os.listdir(store.directory)) == ["next"]


def test_a_batch_that_a_crash_cut_short_is_not_listed_and_goes_with_the_next(store: LostStore, opened: Opened) -> None:
    class Crash(BaseException):
        """The process ends here."""

    def crash(label: str) -> None:
        if label == "lost:rename":
            raise Crash

    batch = LostStore(store.directory, at=crash).begin("a test")
    batch.keep(b"/file", opened("file", b"x"))
    with pytest.raises(Crash):
        batch.commit()
    batch._close()  # as the end of the process does
    assert store.entries() == []
    assert "1.new" in os.listdir(store.directory)
    assert _kept(store, b"/file", opened("file")).id == "2.1"
    assert sorted(os.listdir(store.directory)) == ["2", "next"]


def test_a_batch_that_somebody_is_making_is_left_alone(store: LostStore, opened: Opened) -> None:
    one = store.begin("one")
    two = store.begin("two")
    for batch in (one, two):
        batch.keep(b"/file", opened("file", b"x"))
        batch.commit()
    assert [entry.why for entry in store.entries()] == ["one", "two"]


def test_what_is_dropped_is_gone_and_its_id_is_never_given_again(store: LostStore, opened: Opened) -> None:
    first = _kept(store, b"/first", opened("file", b"x"))
    second = _kept(store, b"/second", opened("file"))
    assert store.drop([second.id]) == 1
    assert [entry.id for entry in store.entries()] == [first.id]
    with pytest.raises(UsageError):
        store.drop([second.id])
    with pytest.raises(UsageError):
        store.export(second.id, store.directory.parent / "back")
    assert _kept(store, b"/third", opened("file")).id not in (first.id, second.id)
    assert store.drop(None) == 2
    assert store.entries() == []
    assert os.listdir(store.directory) == ["next"]


def test_an_export_replaces_nothing(store: LostStore, opened: Opened, tmp_path: Path) -> None:
    entry = _kept(store, b"/file", opened("file", b"x"))
    with pytest.raises(MirrorfsError, match="exists"):
        store.export(entry.id, tmp_path / "file")
    (tmp_path / "into").mkdir()
    assert store.export(entry.id, tmp_path / "into") == tmp_path / "into" / "file"


def test_a_batch_that_is_kept_once_more_takes_the_place_of_the_earlier_one(store: LostStore, opened: Opened) -> None:
    for key in ("a", "b"):
        batch = store.begin("a test", key=key)
        batch.keep(b"/" + key.encode(), opened("file", b"x"))
        batch.commit()
    store.forget_earlier("a")
    assert [entry.path for entry in store.entries()] == [b"/b"]


def test_room_is_counted_before_anything_is_kept(store: LostStore, opened: Opened) -> None:
    whole = needed_bytes(opened("file", os.urandom(1 << 20)))
    part = needed_bytes(opened("file"), ranges=[(0, 4096)])
    assert 1 << 20 <= whole < 2 << 20
    assert 4096 <= part < 64 << 10
    store.directory.mkdir()
    store.require_room(whole, 1)
    with pytest.raises(MirrorfsError, match="Nothing was touched"):
        store.require_room(1 << 60, 1)


def test_a_failed_sync_keeps_nothing(store: LostStore, opened: Opened) -> None:
    def fail(label: str) -> None:
        if label == "lost:fsync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    batch = LostStore(store.directory, at=fail).begin("a test")
    batch.keep(b"/file", opened("file", b"x"))
    with pytest.raises(OSError):
        batch.commit()
    assert os.listdir(store.directory) == ["next"]


def test_a_damaged_manifest_is_said_and_not_guessed(store: LostStore, opened: Opened) -> None:
    _kept(store, b"/file", opened("file", b"x"))
    (store.directory / "1" / "manifest").write_bytes(b"\xc1")
    with pytest.raises(MirrorfsError, match="damaged"):
        store.entries()
