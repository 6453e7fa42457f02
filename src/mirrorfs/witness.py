"""The standby's side of a verify: it answers the primary's questions about its tree, and mends what it is told to.

Most questions are about one point of the stream: what this node says must be what came of everything before the question and of
nothing behind it. So an answer that needs the disk holds up the stream (`Fetch`), or does not claim to be of one point
(`ListNames`, `Digest`). What cannot be answered is an answer too: to be asked never makes a node diverge.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, get_args

import trio

from mirrorfs import evidence
from mirrorfs.contents import PartialChangeError
from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import LinkLostError, MirrorfsError
from mirrorfs.lost import LostStore
from mirrorfs.peer import Link
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_QUESTIONS: Final = (*get_args(ops.Question), ops.Forget)
#: Of one answer: whoever asks for more is no primary of this version.
_MAX_HASHED: Final = 256 << 20
_MAX_FETCHED: Final = 1 << 20


class Witness:
    """Answers over `link` what is asked on the stream of reign `reign`; what it replaces goes to `lost` first."""

    def __init__(self, tree: Tree, link: Link, nursery: trio.Nursery, reign: int, lost: LostStore) -> None:
        self._tree = tree
        self._link = link
        self._nursery = nursery
        self._reign = reign
        self._lost = lost

    def handles(self, operation: ops.Operation) -> bool:
        """Whether the operation is a question."""
        return isinstance(operation, _QUESTIONS)

    async def take(self, question: ops.Operation, sequence: int) -> None:
        """Answer one question of the stream; LinkLostError if the link was lost while the disk was waited for."""
        try:
            match question:
                case ops.Digest() | ops.Fetch() if _is_too_much(question):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                case ops.ListNames():
                    known = self._tree.table.get(question.directory)
                    self._start(sequence, known, partial(evidence.names_after, after=question.after))
                case ops.Look():
                    self._say(sequence, self._look(question))
                case ops.Digest():
                    self._start_digest(question, sequence)
                case ops.Fetch():
                    self._say(sequence, await self._fetch(question))
                case ops.Describe():
                    self._say(sequence, evidence.description(self._tree, self._reach(question)))
                case ops.Keep():
                    put_aside = partial(keep, self._lost, path=question.path, ranges=question.ranges)
                    self._start(sequence, self._reach(question), put_aside)
                case ops.Mend():
                    self._mend(question)
                    self._say(sequence, None)
                case ops.MendAttributes():
                    self._start(sequence, self._mend_attributes(question), os.fsync)
                case ops.Forget():
                    self._tree.table.unpin(question.directory)
        except PartialChangeError as partly:
            self._say(sequence, None, partly.error.errno or errno.EIO)
        except OSError as error:
            self._say(sequence, None, error.errno or errno.EIO)

    def _say(self, sequence: int, content: Any, error: int = 0) -> None:
        _, payload = wire.encode_message(Kind.ANSWER, [error, content])
        self._link.send(wire.encode(Frame(Kind.ANSWER, sequence, offset=self._reign, payload=payload)))

    def _start(self, sequence: int, known: Known, work: Callable[[int], Any]) -> None:
        """Have a thread find the answer: the stream goes on meanwhile."""
        if not (known.is_directory or stat.S_ISREG(known.kind)):
            self._say(sequence, None)
            return
        self._nursery.start_soon(self._in_thread, sequence, evidence.open_to_read(self._tree, known), work)

    async def _in_thread(self, sequence: int, descriptor: int, work: Callable[[int], Any]) -> None:
        try:
            self._say(sequence, await trio.to_thread.run_sync(work, descriptor))
        except OSError as error:
            self._say(sequence, None, error.errno or errno.EIO)
        except MirrorfsError as error:
            log.error("%s", error)
            self._say(sequence, None, errno.EIO)
        finally:
            os.close(descriptor)

    def _start_digest(self, question: ops.Digest, sequence: int) -> None:
        descriptors = []
        for name, file in question.names:
            try:
                known = self._file(question.directory, name, file)
                descriptors.append(evidence.open_to_read(self._tree, known) if stat.S_ISREG(known.kind) else -errno.EINVAL)
                self._tree.table.drop_unused(known)
            except OSError as error:
                descriptors.append(-(error.errno or errno.EIO))
        self._nursery.start_soon(self._digest, question, sequence, descriptors)

    async def _digest(self, question: ops.Digest, sequence: int, descriptors: list[int]) -> None:
        work = partial(evidence.all_fresh_hashes, descriptors, question.offset, question.size)
        try:
            self._say(sequence, await trio.to_thread.run_sync(work))
        finally:
            for descriptor in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)

    def _reach(self, question: ops.Fetch | ops.Describe | ops.Keep | ops.Mend | ops.MendAttributes) -> Known:
        """The file that is asked for; ESTALE if another or none stands there. Good until the next await."""
        return self._file(question.directory, question.entry, question.file)

    def _file(self, directory: int, entry: bytes, file: int) -> Known:
        above = self._tree.table.get(directory)
        known = evidence.find(self._tree, above, entry) if entry else above
        if known is None or known.id != file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return known

    def _look(self, question: ops.Look) -> list[list[Any]]:
        directory = self._tree.table.get(question.directory)
        if not question.names:
            return [evidence.attributes(self._tree, directory)]
        found = []
        for name, _ in question.names:
            known = evidence.find(self._tree, directory, name)
            found.append([] if known is None else evidence.attributes(self._tree, known))
            if known is not None:
                self._tree.table.drop_unused(known)
        return found

    async def _fetch(self, question: ops.Fetch) -> bytes:
        """The bytes at this point: what comes behind on the stream waits until they are read."""
        known = self._reach(question)
        cached = self._tree.read_cached(known, question.offset, question.size)
        data = None if cached is None else bytes(cached)
        if data is None:
            descriptor = evidence.open_to_read(self._tree, known)
            try:
                data = await trio.to_thread.run_sync(os.pread, descriptor, question.size, question.offset)
            finally:
                os.close(descriptor)
            if self._link.failure is not None:
                raise LinkLostError(str(self._link.failure))
        return data

    # ---- repair

    def _mend(self, mend: ops.Mend) -> None:
        known = self._reach(mend)
        if not stat.S_ISREG(known.kind):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self._tree.apply(ops.Write(known.id, mend.offset, mend.data)) < len(mend.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _mend_attributes(self, wanted: ops.MendAttributes) -> Known:
        known, tree = self._reach(wanted), self._tree
        if stat.S_IFMT(wanted.mode) != known.kind:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        kept = dict(wanted.xattrs)
        for key in tree.xattrs(known):
            if key not in kept:
                tree.apply(ops.RemoveXattr(known.id, key))
        if stat.S_ISREG(known.kind):
            tree.apply(ops.SetAttributes(known.id, size=wanted.size))
        tree.apply(ops.SetAttributes(known.id, uid=wanted.uid, gid=wanted.gid))
        if not stat.S_ISLNK(known.kind):
            tree.apply(ops.SetAttributes(known.id, mode=wanted.mode))
        for key, value in wanted.xattrs:
            tree.apply(ops.SetXattr(known.id, key, value))
        tree.apply(ops.SetAttributes(known.id, mtime_ns=wanted.mtime_ns))
        return known


def _is_too_much(question: ops.Digest | ops.Fetch) -> bool:
    if isinstance(question, ops.Digest):
        return question.size * len(question.names) > _MAX_HASHED
    return question.size > _MAX_FETCHED


def keep(lost: LostStore, descriptor: int, path: bytes, ranges: Sequence[tuple[int, int]]) -> None:
    """Put ranges of a file aside, durably, before they are replaced. Blocks: call it from a worker thread."""
    batch = lost.begin("replaced by verify --repair")
    try:
        batch.keep(b"/" + path, descriptor, ranges=list(ranges))
        batch.commit()
    except BaseException:
        batch.abort()
        raise
