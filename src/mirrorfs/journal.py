"""What a node must still know after a crash: its record of epochs, in one small file that is replaced as a whole.

The file is never changed in place: a new one is written beside it, synced, renamed over it, and the directory synced. So a
crash at any instant leaves the old record or the new one. docs/JOURNAL.md describes the bytes.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final
from zlib import crc32

import msgpack

from mirrorfs.core import epochs
from mirrorfs.errors import JournalError

MAGIC: Final = b"mirrorfs"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sHHII")
_MAX_SIZE: Final = 1 << 20


def _no_fault(label: str) -> None:
    """In production nothing happens at a label."""


class Journal:
    """The durable record of one node, in `directory`.

    `at` is called with the label of every disk call just before it, so that a test can fail it or kill the process there.
    The methods block on the disk: call them from a worker thread. Not thread-safe; the node saves one record at a time.
    """

    def __init__(self, directory: Path, *, at: Callable[[str], None] = _no_fault) -> None:
        self._directory = directory
        self._file = directory / "record"
        self._at = at

    @property
    def file(self) -> Path:
        """Where the record stands."""
        return self._file

    def load(self) -> epochs.Record:
        """The record as last saved, or an empty one for a new node; JournalError if it is damaged or of a newer version."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._file, "rb") as stream:
                data = stream.read(_MAX_SIZE)
        except FileNotFoundError:
            return epochs.Record()
        except OSError as error:
            raise JournalError(f"{self._file}: cannot be read: {error.strerror}") from error
        if len(data) < _HEAD.size or not data.startswith(MAGIC):
            raise JournalError(f"{self._file}: damaged: it does not begin as a record does. {_ADVICE}")
        _, version, _, length, checksum = _HEAD.unpack_from(data)
        if version > VERSION:
            raise JournalError(
                f"{self._file}: written by a newer mirrorfs (format {version}, this one reads up to {VERSION}): "
                "install that version again"
            )
        body = data[_HEAD.size :]
        if len(body) != length or crc32(body) != checksum:
            raise JournalError(f"{self._file}: damaged: its checksum is wrong. {_ADVICE}")
        try:
            return epochs.unpack_record(msgpack.unpackb(body))
        except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
            raise JournalError(f"{self._file}: damaged: {error!r}. {_ADVICE}") from error

    def save(self, record: epochs.Record) -> None:
        """Make `record` durable; JournalError if it is not, and then the old one stands or the new one: the node must end."""
        body = msgpack.packb(epochs.pack_record(record))
        data = _HEAD.pack(MAGIC, VERSION, 0, len(body), crc32(body)) + body
        fresh = self._directory / "record.new"
        try:
            self._at("record:open")
            with open(fresh, "wb", buffering=0) as stream:
                self._at("record:write")
                stream.write(data)
                self._at("record:fsync")
                os.fsync(stream.fileno())
            self._at("record:rename")
            os.rename(fresh, self._file)
            self._at("record:fsync-directory")
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise JournalError(
                f"{self._file}: cannot be written: {error.strerror}. This node stops; make room or mend the disk, then "
                "start it again"
            ) from error


_ADVICE = (
    "Move it away and start this node with --discard-local-data to follow the other one, or restore it from a backup "
    "made while the node was stopped"
)
