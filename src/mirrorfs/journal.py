"""What a node must still know after a crash: its record of epochs, and which file ids it may have used.

Two small files, never changed in place: a new one is written beside it, synced, renamed over it, and the directory synced. So a
crash at any instant leaves the old content or the new one. docs/JOURNAL.md describes the bytes.
"""

import errno
import os
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import msgpack

from mirrorfs.core import epochs, packing
from mirrorfs.errors import JournalError

MAGIC: Final = b"mirrorfs"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sHHII")
_MAX_SIZE: Final = 1 << 20


def no_fault(label: str) -> None:
    """In production nothing happens at a label."""


def write_error(path: Path, error: OSError) -> JournalError:
    """What is raised when the disk would not take it."""
    return JournalError(
        f"{path}: cannot be written: {error.strerror}. This node stops; make room or mend the disk, then start it again"
    )


def check_written(count_bytes: int, wanted_bytes: int) -> None:
    """A write that took less than it was given has met a full disk, whatever it answered."""
    if count_bytes != wanted_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_directory(directory: Path) -> None:
    """Make durable which files are in it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(path: Path, at: Callable[[str], None]) -> None:
    """What was read of `path` counts only after this: a process that was killed may have left it in the page cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            at(f"{path.name}:fsync")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        at(f"{path.name}:fsync-directory")
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def replace_file(path: Path, chunks: Iterable[bytes], at: Callable[[str], None]) -> int:
    """Put a new file in the place of `path`, durably; a descriptor for writing to it, which the caller closes.

    JournalError if the disk would not take it, and then the old file stands or the new one.
    """
    name = path.name
    fresh = path.with_name(f"{name}.new")
    try:
        at(f"{name}:open")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for chunk in chunks:
                at(f"{name}:write")
                check_written(os.write(descriptor, chunk), len(chunk))
            at(f"{name}:fsync")
            os.fsync(descriptor)
            at(f"{name}:rename")
            os.rename(fresh, path)
            at(f"{name}:fsync-directory")
            sync_directory(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise write_error(path, error) from error
    return descriptor


class SafeFile:
    """A small file whose content is replaced as a whole; `at` is called with a label just before each disk call."""

    def __init__(self, path: Path, at: Callable[[str], None]) -> None:
        self.path = path
        self._at = at

    def load(self) -> Any:
        """As `read`, and durably so: whoever acts on it must find it again, also after a power loss."""
        content = self.read()
        if content is not None:
            make_durable(self.path, self._at)
        return content

    def read(self) -> Any:
        """The content as last saved, None if there is none; JournalError if it is damaged or of a newer version."""
        try:
            with open(self.path, "rb") as stream:
                data = stream.read(_MAX_SIZE)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(data) < _HEAD.size or not data.startswith(MAGIC):
            raise JournalError(f"{self.path}: damaged: it does not begin as it should. {_ADVICE}")
        _, version, _, length, checksum = _HEAD.unpack_from(data)
        if version > VERSION:
            raise JournalError(
                f"{self.path}: written by a newer mirrorfs (format {version}, this one reads up to {VERSION}): "
                "install that version again"
            )
        body = data[_HEAD.size :]
        if len(body) != length or crc32(body) != checksum:
            raise JournalError(f"{self.path}: damaged: its checksum is wrong. {_ADVICE}")
        try:
            return msgpack.unpackb(body)
        except (ValueError, msgpack.UnpackException) as error:
            raise JournalError(f"{self.path}: damaged: {error!r}. {_ADVICE}") from error

    def save(self, content: object) -> None:
        """Make `content` durable; JournalError if it is not, and then the old content stands or the new."""
        body = msgpack.packb(content)
        data = _HEAD.pack(MAGIC, VERSION, 0, len(body), crc32(body)) + body
        os.close(replace_file(self.path, [data], self._at))


class Journal:
    """The durable state of one node, in `directory`: the record of epochs, and how many file ids may have been used.

    `at` is called with the label of every disk call just before it, so that a test can fail it or kill the process there.
    The methods block on the disk: call them from a worker thread. The two files may be saved at the same time, each by one
    thread at a time.
    """

    def __init__(self, directory: Path, *, at: Callable[[str], None] = no_fault) -> None:
        self._directory = directory
        self._record = SafeFile(directory / "record", at)
        self._ids = SafeFile(directory / "ids", at)
        self._place = SafeFile(directory / "place", at)
        self._trial = SafeFile(directory / "trial", no_fault)

    @property
    def file(self) -> Path:
        """Where the record stands."""
        return self._record.path

    def load(self) -> epochs.Record:
        """The record as last saved, or an empty one for a new node; JournalError if it is damaged or of a newer version."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"{self._directory}: cannot be made: {error.strerror}") from error
        return self._unpacked(self._record.load()) or epochs.Record()

    def read(self) -> epochs.Record | None:
        """As `load`, but makes nothing, and nothing durable: None if there is no record."""
        return self._unpacked(self._record.read())

    def _unpacked(self, content: Any) -> epochs.Record | None:
        if content is None:
            return None
        try:
            return packing.unpack_record(content)
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(f"{self.file}: damaged: {error!r}. {_ADVICE}") from error

    def save(self, record: epochs.Record) -> None:
        """Make `record` durable; JournalError if it is not, and then the old one stands or the new one: the node must end."""
        self._record.save(packing.pack_record(record))

    def time_a_record(self) -> float:
        """How long it takes now to make something durable here, in seconds; JournalError if the disk would not take it."""
        began = time.monotonic()
        self._trial.save(None)
        return time.monotonic() - began

    def read_place(self) -> str | None:
        """Where the files underneath were when the node last ran; None if it never did."""
        content = self._place.read()
        return content if isinstance(content, str) else None

    def save_place(self, base: str) -> None:
        """Note where the files underneath are, for commands that are run while the node is not."""
        if self.read_place() != base:
            self._place.save(base)

    def load_ids(self) -> int:
        """Counters of file ids below this one may have been used."""
        return self._number(self._ids.load()) or 0

    def read_ids(self) -> int | None:
        """As `load_ids`, but makes nothing durable; None if that was never recorded."""
        return self._number(self._ids.read())

    def _number(self, content: Any) -> int | None:
        if content is not None and not isinstance(content, int):
            raise JournalError(f"{self._ids.path}: damaged: it holds no number. {_ADVICE}")
        return content

    def save_ids(self, reserved: int) -> None:
        """Make it durable that counters below `reserved` may be used."""
        self._ids.save(reserved)


_ADVICE = (
    "Move it away and start this node with --discard-local-data to follow the other one, or restore it from a backup "
    "made while the node was stopped"
)
