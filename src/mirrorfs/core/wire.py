"""Bytes <-> frames of the link between the two nodes. docs/PROTOCOL.md has the layout for people.

A connection begins with a preamble in each direction, of fixed size for all versions to come. Then frames: a header of 32 bytes
and a payload whose length is bounded. Hot payloads are raw bytes, all others msgpack.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgpack

from mirrorfs.core import operations as ops
from mirrorfs.core import soundness
from mirrorfs.errors import ProtocolError

MAGIC: Final = b"mirrorfs"
#: The versions of the protocol that are spoken here: this release's, and the one before for as long as a pair is upgraded.
OLDEST: Final = 7
NEWEST: Final = 8
#: From this version on a standby says how long what it acknowledges has taken there.
TIMED: Final = 8
PREAMBLE: Final = struct.Struct("<8sHHI")
HEADER: Final = struct.Struct("<IBBHQQQ")
HEADER_SIZE: Final = HEADER.size
#: A write of FUSE has at most 1 MiB; an entry carries the extended attributes of one file.
MAX_PAYLOAD: Final = 4 << 20
#: Of a decoder: a large write with its header, and more that came with it.
_ROOM: Final = 2 << 20

#: How long a sync has taken, in FLUSHED: microseconds, more than an hour at most.
_SPENT: Final = struct.Struct("<I")
_MOST_SPENT_US: Final = (1 << 32) - 1

#: What a payload may be: what is not bytes must not change before it is sent.
Payload = bytes | bytearray | memoryview
#: Header and payload of a frame, to be sent one after the other.
Encoded = tuple[bytes, Payload]


class Kind(IntEnum):
    """What a frame is. Numbers are part of the protocol and are never given a second meaning."""

    HELLO = 1
    FOLLOW = 2
    FOLLOWING = 3
    JOIN = 4
    JOINED = 5
    HANDOVER_WANTED = 6
    HANDOVER = 7
    REFUSED = 8
    HEARTBEAT = 9
    SPACE = 10
    PAUSE_WANTED = 11
    PAUSE = 12
    PAUSED = 13
    PROGRESS = 14
    LIST_OPEN = 15
    ACK = 16
    FLUSHED = 17
    FAILED = 18
    HASHES = 19
    LACKED = 20
    HOT = 21
    KEPT = 22
    WANTED = 23
    SPLIT_ASK = 24
    SPLIT_TOLD = 25
    GIVE_UP = 26
    GIVEN_UP = 27
    ANSWER = 28
    OPEN_FILES = 29
    WRITE = 32
    MAKE_NODE = 33
    SYMLINK = 34
    LINK = 35
    UNLINK = 36
    REMOVE_DIRECTORY = 37
    RENAME = 38
    SET_ATTRIBUTES = 39
    SET_XATTR = 40
    REMOVE_XATTR = 41
    INTRODUCE = 42
    TIMES = 43
    ALLOCATE = 44
    COPY_RANGE = 45
    ENTRY = 48
    COPY_DATA = 49
    DIRECTORY_DONE = 50
    VANISH = 51
    GATHER = 52
    GATHERED = 53
    NAMES_EQUAL = 54
    REFRESH = 55
    COPY_HOLE = 56
    COMPARE = 57
    WHOLE = 58
    SYNC = 64
    CHECKPOINT = 65
    CHECKPOINTED = 66
    MARKED = 67
    LIST_NAMES = 72
    LOOK = 73
    DIGEST = 74
    FETCH = 75
    DESCRIBE = 76
    KEEP = 77
    MEND = 78
    MEND_ATTRIBUTES = 79
    FORGET = 80


KIND_OF: Final[dict[type, Kind]] = {
    ops.Write: Kind.WRITE,
    ops.MakeNode: Kind.MAKE_NODE,
    ops.Symlink: Kind.SYMLINK,
    ops.Link: Kind.LINK,
    ops.Unlink: Kind.UNLINK,
    ops.RemoveDirectory: Kind.REMOVE_DIRECTORY,
    ops.Rename: Kind.RENAME,
    ops.SetAttributes: Kind.SET_ATTRIBUTES,
    ops.SetXattr: Kind.SET_XATTR,
    ops.RemoveXattr: Kind.REMOVE_XATTR,
    ops.Introduce: Kind.INTRODUCE,
    ops.Times: Kind.TIMES,
    ops.Allocate: Kind.ALLOCATE,
    ops.CopyRange: Kind.COPY_RANGE,
    ops.Entry: Kind.ENTRY,
    ops.CopyData: Kind.COPY_DATA,
    ops.Vanish: Kind.VANISH,
    ops.DirectoryDone: Kind.DIRECTORY_DONE,
    ops.Gather: Kind.GATHER,
    ops.Gathered: Kind.GATHERED,
    ops.NamesEqual: Kind.NAMES_EQUAL,
    ops.Refresh: Kind.REFRESH,
    ops.CopyHole: Kind.COPY_HOLE,
    ops.Compare: Kind.COMPARE,
    ops.Whole: Kind.WHOLE,
    ops.Sync: Kind.SYNC,
    ops.Checkpoint: Kind.CHECKPOINT,
    ops.Checkpointed: Kind.CHECKPOINTED,
    ops.Marked: Kind.MARKED,
    ops.ListNames: Kind.LIST_NAMES,
    ops.Look: Kind.LOOK,
    ops.Digest: Kind.DIGEST,
    ops.Fetch: Kind.FETCH,
    ops.Describe: Kind.DESCRIBE,
    ops.Keep: Kind.KEEP,
    ops.Mend: Kind.MEND,
    ops.MendAttributes: Kind.MEND_ATTRIBUTES,
    ops.Forget: Kind.FORGET,
}
_KINDS: Final = {int(kind): kind for kind in Kind}
OPERATION_OF: Final[dict[Kind, Any]] = {kind: operation for operation, kind in KIND_OF.items()}


class Frame(NamedTuple):
    """One message; `sequence`, `file` and `offset` are 0 where the kind has no use for them."""

    kind: Kind
    sequence: int = 0
    file: int = 0
    offset: int = 0
    payload: Payload = b""

    def owned(self) -> "Frame":
        """The same frame with a payload of its own."""
        return self if isinstance(self.payload, bytes) else self._replace(payload=bytes(self.payload))


def preamble(oldest: int = OLDEST, newest: int = NEWEST) -> bytes:
    """The first bytes of a connection, in each direction: which versions are spoken here."""
    return PREAMBLE.pack(MAGIC, oldest, newest, 0)


def agree(data: bytes, oldest: int = OLDEST, newest: int = NEWEST) -> int:
    """The version that both speak on a link, given the other's preamble: the lower of both newest ones.

    Version 7 sent 0 for its newest, which is its oldest then. Raises ProtocolError, saying what is wrong, if `data` is no
    preamble or there is no such version. Both sides come to the same.
    """
    magic, their_oldest, their_newest, _ = PREAMBLE.unpack(data)
    if magic != MAGIC:
        raise ProtocolError(f"not a mirrorfs node: it began with {data[:8]!r}")
    their_newest = their_newest or their_oldest
    if their_newest < their_oldest:
        raise ProtocolError(f"a malformed preamble: protocol versions {their_oldest} to {their_newest}")
    version: int = min(newest, their_newest)
    if version < max(oldest, their_oldest):
        raise ProtocolError(
            f"it speaks protocol {_versions(their_oldest, their_newest)}, this node {_versions(oldest, newest)}: "
            "install the same mirrorfs on both"
        )
    return version


def _versions(oldest: int, newest: int) -> str:
    return f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"


def encode(frame: Frame) -> Encoded:
    """Header and payload of a frame. The payload is the frame's own, not a copy; a memoryview must be one of bytes."""
    return _encode(*frame)


def _encode(kind: Kind, sequence: int, file: int, offset: int, payload: Payload) -> Encoded:
    size = len(payload)
    assert size <= MAX_PAYLOAD, size
    return HEADER.pack(size, kind, 0, 0, sequence, file, offset), payload


def encode_message(kind: Kind, content: object, sequence: int = 0, offset: int = 0) -> Encoded:
    """A frame whose payload is `content` as msgpack."""
    return encode(Frame(kind, sequence, offset=offset, payload=msgpack.packb(content)))


def encode_operation(operation: ops.Operation, sequence: int) -> Encoded:
    """The frame of one operation on the stream."""
    if isinstance(operation, ops.Write):
        return encode_write(operation.file, operation.offset, operation.data, sequence)
    if isinstance(operation, ops.CopyData):
        return _encode(Kind.COPY_DATA, sequence, operation.file, operation.offset, operation.data)
    return encode_message(KIND_OF[type(operation)], ops.values(operation), sequence)


def encode_write(file: int, offset: int, data: Payload, sequence: int) -> Encoded:
    """As `encode_operation` of a `Write`."""
    return _encode(Kind.WRITE, sequence, file, offset, data)


def decode_operation(frame: Frame) -> ops.Operation:
    """The operation in a frame; ProtocolError if the frame carries none or one that is malformed."""
    if frame.kind in (Kind.WRITE, Kind.COPY_DATA):
        if not 0 < frame.file < 1 << 63 or frame.offset >= 1 << 63:
            raise ProtocolError(f"a malformed {frame.kind.name}: file {frame.file}, offset {frame.offset}")
        if frame.kind is Kind.WRITE:
            return ops.Write(frame.file, frame.offset, frame.payload)
        return ops.CopyData(frame.file, frame.offset, bytes(frame.payload))
    operation = OPERATION_OF.get(frame.kind)
    if operation is None:
        raise ProtocolError(f"a frame of kind {frame.kind.name} where an operation was expected")
    fields = _unpack(frame, use_list=False)
    try:
        if not isinstance(fields, tuple):
            raise TypeError("its fields are no list")
        if operation is ops.Whole:
            directory, files = fields
            fields = (directory, tuple(map(ops.WholeFile._make, files)))
        result: ops.Operation = operation(*fields)
        soundness.check(result)
    except (TypeError, ValueError, IndexError) as error:
        raise ProtocolError(f"a malformed {frame.kind.name}: {error}") from error
    return result


def encode_flushed(sequence: int, applied: int, stream: int, spent_us: int | None) -> Encoded:
    """The frame that says that the sync `sequence` is done; with the microseconds that it took, from version 8 on."""
    payload = b"" if spent_us is None else _SPENT.pack(min(spent_us, _MOST_SPENT_US))
    return _encode(Kind.FLUSHED, sequence, applied, stream, payload)


def spent_on_flush_us(frame: Frame) -> int:
    """The microseconds that a FLUSHED of version 8 says; ProtocolError if it says none."""
    if len(frame.payload) != _SPENT.size:
        raise ProtocolError(f"a malformed {frame.kind.name}: {len(frame.payload)} bytes")
    (spent_us,) = _SPENT.unpack(frame.payload)
    return int(spent_us)


def message(frame: Frame) -> Any:
    """The msgpack payload of a frame; ProtocolError if it is not msgpack."""
    return _unpack(frame, use_list=True)


def _unpack(frame: Frame, *, use_list: bool) -> Any:
    try:
        return msgpack.unpackb(frame.payload, use_list=use_list, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a malformed {frame.kind.name}: {error}") from error


def raw(value: object) -> bytes:
    """`value` if it is bytes, ValueError if not; bytes() would take a number for a size, and make that many zeros."""
    if not isinstance(value, bytes):
        raise ValueError(f"{value!r} where bytes were expected"[:100])
    return value


class Decoder:
    """Bytes in, frames out. After a ProtocolError the connection is of no use any more.

    Bytes are read into `space`, and taken in by `received`: a frame's payload is a view of that room, good until the next
    `space`. What `feed` yields is its own.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(_ROOM)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    @property
    def incomplete(self) -> bool:
        """Whether a part of a frame has arrived: an end of the connection now means that it was cut off."""
        return self._end > self._start

    def space(self) -> memoryview:
        """Room for what comes next, at least for the rest of the frame that has begun."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            needed = HEADER_SIZE
            if self._end - self._start >= HEADER_SIZE:
                needed += min(HEADER.unpack_from(self._buffer, self._start)[0], MAX_PAYLOAD)
            if self._start + needed > len(self._buffer):
                self._make_room(needed)
        if self._end == len(self._buffer):
            self._make_room(HEADER_SIZE + MAX_PAYLOAD)
        return self._view[self._end :]

    def _make_room(self, size: int) -> None:
        """Put what has arrived to the front, of a room of at least so many bytes in all."""
        waiting = bytes(self._view[self._start : self._end])
        if size > len(self._buffer):
            self._buffer = bytearray(size)
            self._view = memoryview(self._buffer)
        self._buffer[: len(waiting)] = waiting
        self._start, self._end = 0, len(waiting)

    def received(self, count: int) -> Iterator[Frame]:
        """So many bytes have been put into `space`: yield the frames that they complete; raises ProtocolError."""
        self._end += count
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        while end - start >= HEADER_SIZE:
            length, kind, _, _, sequence, file, offset = HEADER.unpack_from(buffer, start)
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"a frame of {length} bytes, more than the {MAX_PAYLOAD} allowed")
            body = start + HEADER_SIZE
            if body + length > end:
                return
            payload = view[body : body + length]
            known = _KINDS.get(kind)
            if known is None:
                raise ProtocolError(f"a frame of unknown kind {kind}")
            self._start = start = body + length
            yield Frame(known, sequence, file, offset, payload)

    def feed(self, data: Payload) -> Iterator[Frame]:
        """Take in `data` and yield the frames that it completes; raises ProtocolError."""
        if len(data) > len(self._buffer) - self._end:
            self._make_room(self._end - self._start + len(data))
        self._buffer[self._end : self._end + len(data)] = data
        for frame in self.received(len(data)):
            yield frame.owned()
