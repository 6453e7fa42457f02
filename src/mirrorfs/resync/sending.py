"""What both kinds of resync do at the source: entries and data as they stand at this point of the stream, paced."""

import errno
import os
import stat
from collections import deque
from contextlib import suppress
from typing import Final

import trio

from mirrorfs.config import ResyncConfig
from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.dirty import BLOCK
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import ProtocolError
from mirrorfs.resync.hashes import COMPARED, HASH_SIZE, hashes
from mirrorfs.resync.layout import segments
from mirrorfs.resync.pacing import Bucket
from mirrorfs.resync.progress import Meter, Progress
from mirrorfs.stream import Stream
from mirrorfs.table import Known
from mirrorfs.tree import Tree

_PIECE: Final = 512 << 10
#: What may be on its way at once: a live change waits behind no more than this.
_MAX_IN_FLIGHT: Final = {"application": 4 << 20, "resync": 16 << 20}
#: After so many pieces others get their turn.
_PIECES_A_TURN: Final = {"application": 1, "resync": 4}
DEFAULT: Final = ResyncConfig()
ENTRY_COST: Final = 4 << 10
_MAX_XATTRS: Final = 3 << 20
_COMPARE_PIECE: Final = 4 << 20
#: Hashes of so many pieces may be under way.
_COMPARES: Final = 4
#: After so long the application gets its turn.
TURN_S: Final = 0.001
_LONG_HOLE: Final = 1 << 20
_CAPABILITY: Final = b"security.capability"


class Sender:
    """Sends what stands in the tree, never more at once than the application can wait for.

    A piece of data is what stands in the file at that point of the stream: no `await` between the read that counts and `put`.
    """

    kind: str

    def __init__(self, tree: Tree, stream: Stream, settings: ResyncConfig = DEFAULT) -> None:
        self.tree = tree
        self.stream = stream
        self.files_done = self.bytes_done = 0
        self.bytes_sent = self.bytes_compared = 0
        self.files_found = self.bytes_found = 0
        self._meter = Meter(trio.current_time())
        self._bucket = Bucket(settings.rate_limit_bytes_per_s)
        self._max_in_flight = _MAX_IN_FLIGHT[settings.priority]
        self._pieces_a_turn = _PIECES_A_TURN[settings.priority]
        self._pieces = 0
        self._compared: dict[int, tuple[trio.Event, list[bytes]]] = {}
        self._on_the_way: deque[tuple[int, int]] = deque()
        self._on_the_way_bytes = 0

    @property
    def expected(self) -> tuple[int, int] | None:
        """How many bytes and files there are to be sent or compared in all; None while nobody knows."""
        raise NotImplementedError

    @property
    def progress(self) -> Progress:
        """How far this has come."""
        expected = self.expected
        bytes_found, files_found = expected or (self.bytes_found, self.files_found)
        return Progress.of(
            self.kind,
            bytes_done=self.bytes_done,
            bytes_found=bytes_found,
            files_done=self.files_done,
            files_found=files_found,
            totals_are_known=expected is not None,
            rate=self._meter.rate(trio.current_time(), self.bytes_done),
        )

    def settle_estimate(self, estimated_bytes: int, done_before_bytes: int) -> None:
        """A file is done that was counted with an estimate, when so many bytes were done: count what it came to."""
        self.bytes_found += self.bytes_done - done_before_bytes - estimated_bytes

    def xattrs_of(self, known: Known) -> tuple[tuple[bytes, bytes], ...]:
        """The extended attributes of a file; E2BIG if they do not fit into one message."""
        xattrs = tuple((key, self.tree.xattr(known, key)) for key in self.tree.xattrs(known))
        if sum(len(key) + len(value) for key, value in xattrs) > _MAX_XATTRS:
            raise OSError(errno.E2BIG, f"the extended attributes of file {known.id:x} are too large to be copied")
        return xattrs

    def put_entry(self, parent: int, name: bytes, known: Known, xattrs: tuple[tuple[bytes, bytes], ...]) -> os.stat_result:
        """Send what stands under a name; returns the file's status."""
        status = self.tree.stat(known)
        self.stream.put(
            ops.Entry(
                parent,
                name,
                known.id,
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                status.st_size if stat.S_ISREG(status.st_mode) else 0,
                self.tree.readlink(known) if stat.S_ISLNK(status.st_mode) else b"",
                xattrs,
            )
        )
        return status

    def put_capability(self, known: Known) -> None:
        """The data of a file was sent: give it back the capability that writing takes away."""
        if known.gone:
            return
        with suppress(OSError):
            self.stream.put(ops.SetXattr(known.id, _CAPABILITY, self.tree.xattr(known, _CAPABILITY)))

    async def copy_range(self, known: Known, start: int, end: int, *, holes: bool) -> None:
        """Send the data between two offsets, and with `holes` where none is; what is written meanwhile is on the stream."""
        if holes:
            end += -end % BLOCK  # should the file grow meanwhile, its last block must not stay there as one of zeros
        offset, at_once_next = start, False
        while offset < end and not known.gone:
            length = self.tree.stat(known).st_size
            found = next(segments(self.tree.table.data(known), offset, min(end, length)), None)
            if found is None:
                return
            is_data, first, last = found
            if not is_data:
                if holes:
                    self.stream.put(ops.CopyHole(known.id, first, last - first))
                    await self.pace()
                offset = last
                continue
            size, at_once = min(_PIECE, last - first), at_once_next
            data, at_once_next = await self._read(known, first, size, at_once), False
            if data is None:
                at_once_next = True  # the segments may be others now; they are in memory, since they were just written
                continue
            if data:
                self.stream.put(ops.CopyData(known.id, first, data))
                self.bytes_done += len(data)
                self.bytes_sent += len(data)
            offset = first + max(len(data), 1)
            await self.pace(len(data))

    async def _read(self, known: Known, offset: int, size: int, at_once: bool) -> bytes | None:
        """Read a piece as it stands at this point of the stream; None if the file was written while a disk was waited for."""
        cached = self.tree.read_cached(known, offset, size)
        if cached is not None or at_once:
            return os.pread(self.tree.table.data(known), size, offset) if cached is None else bytes(cached)
        version = known.version
        descriptor = self.tree.table.hold(known)
        try:
            data = await trio.to_thread.run_sync(os.pread, descriptor, size, offset)
            return data if known.version == version else None
        finally:
            self.tree.table.let_go(known)

    async def limit(self, cost_bytes: int) -> None:
        """Wait until so much more may be read or sent (`rate_limit`)."""
        await self._bucket.take(cost_bytes)

    async def compare_range(self, known: Known, start: int, end: int) -> None:
        """Compare a range by hashes and send the blocks that differ; a long hole is told and not compared."""
        pieces: deque[tuple[int, int, int]] = deque()
        offset, end = start, min(end, self.tree.stat(known).st_size)
        while (offset < end or pieces) and not known.gone and not self.stream.broken:
            while offset < end and len(pieces) < _COMPARES and not known.gone:
                is_data, _, last = next(segments(self.tree.table.data(known), offset, end))
                if not is_data and last - offset >= _LONG_HOLE:
                    self.stream.put(ops.CopyHole(known.id, offset, last - offset))
                    offset = last
                    continue
                size = min(_COMPARE_PIECE, end - offset)
                await self.limit(size)
                if known.gone or self.stream.broken:
                    break
                sequence = self.stream.put(ops.Compare(known.id, offset, size))
                self._compared[sequence] = (trio.Event(), [])
                pieces.append((sequence, offset, size))
                offset += size
            if pieces:
                await self._compare_piece(known, *pieces.popleft())
            await self.pace()
        for sequence, _, _ in pieces:
            self._compared.pop(sequence, None)

    async def _compare_piece(self, known: Known, sequence: int, offset: int, size: int) -> None:
        answered, answer = self._compared[sequence]
        while not (answered.is_set() or self.stream.broken):
            with trio.move_on_after(0.2):
                await answered.wait()
        del self._compared[sequence]
        if not answer or known.gone:
            return
        descriptor = self.tree.table.hold(known)
        try:
            own = await trio.to_thread.run_sync(hashes, descriptor, offset, size)
        finally:
            self.tree.table.let_go(known)
        self.bytes_compared += size
        self.bytes_done += size
        for at in range(0, len(own), HASH_SIZE):
            if own[at : at + HASH_SIZE] != answer[0][at : at + HASH_SIZE]:
                first = offset + at // HASH_SIZE * COMPARED
                self.bytes_done -= min(COMPARED, offset + size - first)
                await self.copy_range(known, first, min(first + COMPARED, offset + size), holes=True)

    def on_frame(self, frame: Frame) -> bool:
        """Take in what the target answers; False if it is no answer to a resync."""
        if frame.kind is not Kind.HASHES:
            return False
        if frame.sequence in self._compared:
            answered, answer = self._compared[frame.sequence]
            answer.append(bytes(frame.payload))
            answered.set()
        return True

    async def pace(self, cost: int = ENTRY_COST) -> None:
        """Leave room for the application: bound what is on its way and the rate, and give others their turn."""
        self._meter.note(trio.current_time(), self.bytes_done)
        await self.limit(cost)
        self._on_the_way.append((self.stream.sent, cost))
        self._on_the_way_bytes += cost
        while self._on_the_way_bytes > self._max_in_flight and not self.stream.broken:
            sequence, size = self._on_the_way.popleft()
            await self.stream.applied(sequence)
            self._on_the_way_bytes -= size
        self._pieces += 1
        if self._pieces % self._pieces_a_turn == 0:
            await trio.lowlevel.checkpoint()


def ids_in(frame: Frame) -> list[int]:
    """The ids of files in a frame; ProtocolError if it holds something else."""
    numbers = wire.message(frame)
    if not isinstance(numbers, list) or not all(type(number) is int and 0 < number < 1 << 63 for number in numbers):
        raise ProtocolError(f"a malformed {frame.kind.name}")
    return numbers
