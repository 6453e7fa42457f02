"""The dirty set on disk: a head and hot marks, written afresh now and then, in between only appended to.

Every record has a checksum and begins with a marker, so that two kinds of bad records can be told apart. A crash in the middle
of an append leaves a *torn tail*: something that is no record, and no record behind it. Nothing relied on it yet, and it is cut
off. With a good record behind it, it is *damage*: a mark that is lost is a change that a resync would miss, so the log says
nothing any more. docs/JOURNAL.md describes the bytes.
"""

import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final
from zlib import crc32

import msgpack

from mirrorfs.core.dirty import END, EXTENT, Attributes, Entry, Extents, Head, Located, Names
from mirrorfs.errors import DirtyLogDamagedError, JournalError
from mirrorfs.journal import check_written, make_durable, no_fault, replace_file, write_error

log = logging.getLogger(__name__)

NAME: Final = "dirty"
MAGIC: Final = b"mfsdirty"
VERSION: Final = 2
_HEADER: Final = struct.Struct("<8sHHII")
_SEALED: Final = struct.Struct("<8sHHI")
_FRAME: Final = struct.Struct("<4sII")
#: msgpack never uses the byte C1.
_MARKER: Final = b"\xc1mfs"
_MAX_BODY_BYTES: Final = 64 << 10
_CHUNK_BYTES: Final = 1 << 20
#: Ids of files and numbers of checkpoints are below this; a set top bit is never durable.
_NUMBERS: Final = 1 << 63
#: No file has more extents: its size in bytes is below 2**63.
_EXTENTS: Final = _NUMBERS // EXTENT

#: Kinds are part of the format and are never given a second meaning.
_KIND_OF: Final[dict[type, int]] = {Head: 1, Names: 2, Attributes: 3, Extents: 4, Located: 5}


@dataclass(slots=True)
class Contents:
    """What a log holds. `size_bytes` is up to where it is good; `torn_bytes` behind it are of an append that was cut short.
    `marked` counts the records of marks that were ever written, those of earlier logs too."""

    salt: int
    marked: int
    head: Head
    entries: list[Entry] = field(default_factory=list)
    size_bytes: int = 0
    torn_bytes: int = 0


class DirtyLog:
    """The dirty log of one node; blocks on the disk: call it from a worker thread, one thread at a time.

    `at` is called with the label of every disk call that changes something or makes it durable, just before it, so that a test
    can fail it or kill the process there. `load` or `rewrite` comes before the first `append`.
    """

    def __init__(self, directory: Path, *, at: Callable[[str], None] = no_fault) -> None:
        self.path = directory / NAME
        self._at = at
        self._descriptor: int | None = None
        self._salt = 0
        self._size_bytes = self._rewritten_bytes = self._marked = 0
        self._torn = False
        #: Whether a write has failed: nobody knows what stands at the end of the file.
        self._failed = False

    @property
    def size_bytes(self) -> int:
        """The size of the present file, without what a crash may have left at its end."""
        return self._size_bytes

    @property
    def rewritten_bytes(self) -> int:
        """The size just after the last `rewrite` or `load`: who compares it with `size_bytes` sees what appending has added."""
        return self._rewritten_bytes

    @property
    def marked(self) -> int:
        """How many records of marks this node has ever written: it only grows, so a log that says less than it once did is an
        older one, put back."""
        return self._marked

    def load(self) -> tuple[Head, list[Entry]] | None:
        """What is on disk, and durably so; None if there is no file.

        DirtyLogDamagedError if it cannot be trusted, JournalError if it cannot be read or is of a newer version.
        """
        contents = read(self.path)
        if contents is None:
            return None
        make_durable(self.path, self._at)
        self.close()
        self._salt = contents.salt
        self._marked = contents.marked
        self._size_bytes = self._rewritten_bytes = contents.size_bytes
        self._torn = contents.torn_bytes > 0
        if self._torn:
            log.info("%s: ends in %d bytes of a write that a crash cut short, they are cut off", self.path, contents.torn_bytes)
        return contents.head, contents.entries

    def rewrite(self, head: Head, entries: Iterable[Entry]) -> None:
        """Put a new log in the place of the old one, durably; what is appended from now on goes to the new one.

        JournalError if the disk would not take it, and then the old log stands or the new one: the node must end.
        """
        salt = int.from_bytes(os.urandom(4), "little")
        written = list(entries)
        self._failed = True  # until it is known which of the two stands
        descriptor = replace_file(self.path, _chunks(salt, self._marked, head, written), self._at)
        self._marked += len(written)
        self.close()
        self._descriptor = descriptor
        self._salt = salt
        self._size_bytes = self._rewritten_bytes = os.fstat(descriptor).st_size
        self._torn = self._failed = False

    def append(self, entries: Iterable[Entry]) -> None:
        """Make `entries` durable; JournalError if they are not, and nothing can be appended any more: the node must end."""
        if self._failed:
            raise JournalError(f"{self.path}: cannot be written: an earlier write failed. This node stops; start it again")
        assert self._size_bytes, "load or rewrite comes first"
        records = [_record(self._salt, entry) for entry in entries]
        if not records:
            return
        data = b"".join(records)
        self._failed = True  # until it is known what stands at the end
        try:
            descriptor = self._opened()
            self._at("dirty-append:write")
            check_written(os.pwrite(descriptor, data, self._size_bytes), len(data))
            self._at("dirty-append:fsync")
            os.fdatasync(descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._size_bytes += len(data)
        self._marked += len(records)
        self._failed = False

    def _opened(self) -> int:
        """The descriptor to append with; a torn tail is cut off first, so that it never stands before a good record."""
        if self._descriptor is None:
            self._at(f"{NAME}:open")
            self._descriptor = os.open(self.path, os.O_WRONLY)
        if self._torn:
            self._at(f"{NAME}:truncate")
            os.ftruncate(self._descriptor, self._size_bytes)
            self._torn = False
        return self._descriptor

    def close(self) -> None:
        """Let go of the file; there is nothing left to write."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


# ---- writing


def _header(salt: int) -> bytes:
    sealed = _SEALED.pack(MAGIC, VERSION, 0, salt)
    return sealed + struct.pack("<I", crc32(sealed))


def _record(salt: int, value: Head | Entry, *more: int) -> bytes:
    match value:
        case Head():
            fields = [value.volume_id, value.number, value.base, value.new_from, value.complete]
        case Names():
            fields = [value.directory]
        case Attributes():
            fields = [value.file]
        case Extents():
            fields = [value.file, value.first, value.last]
        case Located():
            fields = [value.file, value.handle, value.parent, value.parent_handle, value.name]
    assert _is_sound(value), f"{value!r} could not be read back"
    body: bytes = msgpack.packb([_KIND_OF[type(value)], *fields, *more])
    assert len(body) <= _MAX_BODY_BYTES, len(body)
    return _FRAME.pack(_MARKER, len(body), _checksum(salt, body)) + body


def _checksum(salt: int, body: bytes) -> int:
    """With a salt of the file's own: blocks of an older log that a crash brings up, or a name made so, are no records."""
    return crc32(body, crc32(struct.pack("<I", len(body)), salt))


def _chunks(salt: int, marked: int, head: Head, entries: Iterable[Entry]) -> Iterator[bytes]:
    chunk = bytearray(_header(salt) + _record(salt, head, marked))
    for entry in entries:
        chunk += _record(salt, entry)
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


# ---- reading


def read(path: Path) -> Contents | None:
    """What the log at `path` holds, None if there is none; changes nothing, and the node may append to it meanwhile.

    DirtyLogDamagedError if it cannot be trusted, JournalError if it cannot be read or is of a newer version.
    """
    try:
        with open(path, "rb") as stream:
            return _Reader(path, stream).contents()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """Reads a log piece by piece, as long as it was at the beginning: what is appended meanwhile is not half seen."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream
        self._size_bytes = os.fstat(stream.fileno()).st_size
        self._salt = 0
        self._marked_before = 0

    def contents(self) -> Contents:
        self._salt = self._read_salt()
        position = _HEADER.size
        body = self._body_at(position)
        head = None if body is None else self._value(position, body)
        if body is None or not isinstance(head, Head):
            raise self._damaged(position, "there is no head")
        contents = Contents(self._salt, self._marked_before, head)
        while body is not None:
            position += _FRAME.size + len(body)
            body = self._body_at(position)
            if body is not None:
                value = self._value(position, body)
                if isinstance(value, Head):
                    raise self._damaged(position, "there is a second head")
                contents.entries.append(value)
        contents.marked += len(contents.entries)
        contents.size_bytes, contents.torn_bytes = position, self._size_bytes - position
        if self._is_record_behind(position):
            raise self._damaged(position, "a record that others follow is not what was written")
        return contents

    def _read_salt(self) -> int:
        header = self._bytes_at(0, _HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise self._damaged(0, "it does not begin as it should")
        _, version, _, salt, checksum = _HEADER.unpack(header)
        if crc32(header[: _SEALED.size]) != checksum or version == 0:
            raise self._damaged(0, "the checksum of its beginning is wrong")
        if version > VERSION:
            raise JournalError(
                f"{self._path}: written by a newer mirrorfs (format {version}, this one reads up to {VERSION}): "
                "install that version again"
            )
        if version < VERSION:
            raise self._damaged(0, f"it was written by an older mirrorfs (format {version})")
        return int(salt)

    def _bytes_at(self, position: int, count_bytes: int) -> bytes:
        self._stream.seek(position)
        return self._stream.read(max(min(count_bytes, self._size_bytes - position), 0))

    def _body_at(self, position: int) -> bytes | None:
        """The body of the record that begins there, None if none does."""
        frame = self._bytes_at(position, _FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        marker, length, checksum = _FRAME.unpack(frame)
        if marker != _MARKER or length > _MAX_BODY_BYTES:
            return None
        body = self._bytes_at(position + _FRAME.size, length)
        return body if len(body) == length and _checksum(self._salt, body) == checksum else None

    def _is_record_behind(self, position: int) -> bool:
        """Whether a record begins anywhere behind `position`."""
        position += 1
        while True:
            window = self._bytes_at(position, _CHUNK_BYTES)
            found = window.find(_MARKER)
            while found >= 0:
                if self._body_at(position + found) is not None:
                    return True
                found = window.find(_MARKER, found + 1)
            if len(window) < _CHUNK_BYTES:
                return False
            position += _CHUNK_BYTES - len(_MARKER) + 1  # a marker may lie across the border

    def _value(self, position: int, body: bytes) -> Head | Entry:
        """What a sealed record says; that it is nonsense is damage too, since a crash does not make checksums right."""
        try:
            kind, *fields = msgpack.unpackb(body)
            if kind == _KIND_OF[Head]:
                self._marked_before = fields.pop()
            value: Head | Entry = _TYPE_OF[kind](*fields)
        except (ValueError, TypeError, LookupError, OverflowError, msgpack.UnpackException):
            raise self._damaged(position, "a record is none that this version knows") from None
        if len(fields) != len(value.__slots__) or not _is_sound(value) or not _is_number(self._marked_before):
            raise self._damaged(position, f"{type(value).__name__} has a value that cannot be")
        return value

    def _damaged(self, position: int, what: str) -> DirtyLogDamagedError:
        return DirtyLogDamagedError(
            f"{self._path}: damaged at byte {position}: {what}. What is dirty is not known: a full compare with the other node "
            "is needed"
        )


_TYPE_OF: Final[dict[int, Any]] = {kind: value_type for value_type, kind in _KIND_OF.items()}


def _is_sound(value: Head | Entry) -> bool:
    """Whether every field is of its type and within its range."""
    match value:
        case Head():
            numbers = (value.number, value.base, value.new_from)
            return type(value.volume_id) is str and all(map(_is_number, numbers)) and type(value.complete) is bool
        case Names():
            return _is_file(value.directory)
        case Attributes():
            return _is_file(value.file)
        case Extents():
            if not (_is_file(value.file) and _is_number(value.first) and _is_number(value.last)):
                return False
            return value.first < _EXTENTS and value.first <= value.last and (value.last < _EXTENTS or value.last == END)
        case Located():
            strings = (value.handle, value.parent_handle, value.name)
            return _is_file(value.file) and _is_number(value.parent) and all(type(string) is bytes for string in strings)


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _NUMBERS


def _is_file(value: object) -> bool:
    return _is_number(value) and value != 0
