"""Questions to the standby, and this node's own answer at the same point of the stream.

A question is about the point at which it is put on the stream. This node's own answer is of that point if no change can be made
between the two: no `await` lies between `_tell` and what is read here, or between a read that counts and `_tell`.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from mirrorfs import evidence
from mirrorfs.core import ids, wire
from mirrorfs.core import operations as ops
from mirrorfs.core.modes import Mode
from mirrorfs.errors import ProtocolError, RefusedError
from mirrorfs.replication import Primary
from mirrorfs.stream import Stream
from mirrorfs.table import Known

#: A file that is written all the time is read at once in the end: the loop waits for the disk, but the answer is exact.
_TRIES: Final = 3


#: What a file's data hashes to, or the number of the error that it cannot be read with.
Hashes = bytes | int


class TheirError(OSError):
    """The standby could not read or write its own disk."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file and an entry of a directory that leads to it; an empty entry is the directory itself. `path` is for people."""

    directory: Known
    entry: bytes
    known: Known
    path: bytes


class Asking:
    """Asks over one stream; RefusedError from everything here once that is not the stream of a mirrored pair any more."""

    def __init__(self, primary: Primary) -> None:
        self.primary = primary
        self.tree = primary.tree
        self._stream = self.mirrored_stream(primary)

    @staticmethod
    def mirrored_stream(primary: Primary) -> Stream:
        """The stream to a peer in sync; RefusedError if there is none."""
        if primary.stream is None or primary.mode is not Mode.MIRRORED or primary.stream.broken:
            raise RefusedError("not mirrored: the other node is not in sync, so there is nothing to compare with")
        return primary.stream

    def introduce(self, parent: int, name: bytes, number: int) -> bool:
        """Make a directory known to the standby; whether it was not before."""
        self._check()
        if number in self.primary.there.known or number == ids.ROOT:
            return False
        self.primary.there.by_entry(parent, name, number)
        return True

    def forget(self, number: int) -> None:
        """Let the standby forget a directory that was introduced only to ask."""
        if self.primary.stream is self._stream and not self._stream.broken and self.primary.mode is Mode.MIRRORED:
            self.primary.there.known.discard(number)
            self._stream.put(ops.Forget(number))

    def stands(self, place: Place) -> bool:
        """Whether the entry leads to the file now."""
        if place.directory.gone or place.known.gone:
            return False
        return not place.entry or self.tree.holds(place.directory, place.entry, place.known.id)

    async def names(self, directory: Known, after: bytes) -> tuple[list[bytes], bool]:
        """The standby's names after `after`, and whether those are all; of no point of the stream in particular."""
        names, complete = await self._ask(ops.ListNames(directory.id, after))
        if not all(isinstance(name, bytes) for name in names) or not isinstance(complete, bool) or not (names or complete):
            raise ProtocolError("a malformed answer to LIST_NAMES")
        return names, complete

    async def look(self, directory: Known, names: Sequence[bytes]) -> list[tuple[list[Any], list[Any]]]:
        """What stands under each name on this node and on the other at one point, as `evidence.attributes`; empty for nothing.

        Without names, the directory itself. Nothing at all if the directory is gone.
        """
        if directory.gone:
            return []
        found = [evidence.find(self.tree, directory, name) for name in names] if names else [directory]
        self._keep(found)
        try:
            for known in found:
                if known is not None:
                    self.primary.tell_time(known.id)  # or its modification time would be on its way still
            wanted = tuple((name, known.id if known else 0) for name, known in zip(names, found, strict=False))
            sequence = self._tell(directory, ops.Look(directory.id, wanted))
            own = [
                evidence.of_stranger(self.tree, directory, name) if known is None else evidence.attributes(self.tree, known)
                for known, name in zip(found, names or [b""], strict=True)
            ]
        finally:
            self._let_go(found)
        theirs = await self._answer(sequence)
        if (
            not isinstance(theirs, list)
            or len(theirs) != len(own)
            or not all(isinstance(one, list) and len(one) in (0, len(evidence.FIELDS)) for one in theirs)
        ):
            raise ProtocolError("a malformed answer to LOOK")
        return list(zip(own, theirs, strict=True))

    async def hashes(self, places: Sequence[Place], offset: int, size: int) -> list[tuple[Hashes, Hashes]]:
        """The hashes of a range of each file of one directory here and there, from the disks, or the number of an error.

        They are of two moments, if the file is written meanwhile.
        """
        directory = places[0].directory
        names = tuple((place.entry, place.known.id) for place in places)
        sequence = self._tell(directory, ops.Digest(directory.id, names, offset, size))
        descriptors = [evidence.open_to_read(self.tree, place.known) for place in places]
        try:
            own = await trio.to_thread.run_sync(evidence.all_fresh_hashes, descriptors, offset, size)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        theirs = await self._answer(sequence)
        if not isinstance(theirs, list) or len(theirs) != len(own) or not all(isinstance(one, bytes | int) for one in theirs):
            raise ProtocolError("a malformed answer to DIGEST")
        return list(zip(own, theirs, strict=True))

    async def data(self, place: Place, offset: int, size: int) -> tuple[bytes, bytes] | None:
        """A piece of a file here and there at one point of the stream; None if the file is not there any more."""
        own = await self.read_now(place.known, offset, size)
        if not self.stands(place):
            return None
        fetch = ops.Fetch(place.directory.id, place.entry, place.known.id, offset, size)
        return own, self._bytes(await self._answer(self._tell(place.directory, fetch)))

    async def read_now(self, known: Known, offset: int, size: int) -> bytes:
        """What stands in a file at the moment at which this returns: it counts until the caller's next await."""
        for _ in range(_TRIES):
            cached = self.tree.read_cached(known, offset, size)
            data = None if cached is None else bytes(cached)
            if data is not None:
                return data
            version, descriptor = known.version, evidence.open_to_read(self.tree, known)
            try:
                data = await trio.to_thread.run_sync(os.pread, descriptor, size, offset)
            finally:
                os.close(descriptor)
            if known.version == version:
                return data
        return os.pread(self.tree.table.data(known), size, offset)

    async def describe(self, place: Place) -> tuple[list[Any], list[Any]]:
        """All attributes of a file here and there at one point of the stream, as `evidence.description`."""
        sequence = self._tell(place.directory, ops.Describe(place.directory.id, place.entry, place.known.id))
        own = evidence.description(self.tree, place.known)
        theirs = await self._answer(sequence)
        if not isinstance(theirs, list) or len(theirs) != len(own):
            raise ProtocolError("a malformed answer to DESCRIBE")
        return own, [*theirs[:-1], [(bytes(key), bytes(value)) for key, value in theirs[-1]]]

    async def order(self, place: Place, order: ops.Keep | ops.Mend | ops.MendAttributes) -> None:
        """Have the standby put something aside or right, and wait until that is done; TheirError if it could not."""
        await self._answer(self._tell(place.directory, order))

    # ---- small things

    def _keep(self, found: Iterable[Known | None]) -> None:
        for known in found:
            if known is not None:
                known.kept += 1

    def _let_go(self, found: Iterable[Known | None]) -> None:
        for known in found:
            if known is not None:
                known.kept -= 1
                self.tree.table.drop_unused(known)

    def _check(self) -> None:
        if self.primary.stream is not self._stream or self._stream.broken or self.primary.mode is not Mode.MIRRORED:
            raise RefusedError("not mirrored any more: the comparison is not complete, run it again when the pair is")

    def _tell(self, directory: Known, question: ops.Question) -> int:
        """Put a question on the stream; what is read before the next await is of the same point."""
        self._check()
        self.primary.there.introduce(directory.id)
        return self._stream.ask(question)

    async def _ask(self, question: ops.ListNames) -> Any:
        return await self._answer(self._tell(self.tree.table.get(question.directory), question))

    async def _answer(self, sequence: int) -> Any:
        frame = await self._stream.answer(sequence)
        if frame is None:
            self._check()
            raise RefusedError("not mirrored any more")
        match wire.message(frame):
            case [0, content]:
                return content
            case [int(number), _]:
                raise TheirError(number, os.strerror(number))
        raise ProtocolError("a malformed ANSWER")

    def _bytes(self, content: Any) -> bytes:
        if not isinstance(content, bytes):
            raise ProtocolError("a malformed ANSWER")
        return content
