"""Repair: what one node has is replaced by what the other has, after what is replaced was put into the lost store.

The application may write all the time. To mend the standby, the primary sends what stands in its file at that point of the
stream, as a resync does: whatever is written before or after is right by itself. To mend the primary, the standby's block is
fetched and written through the normal path of changes, on both nodes, if at that moment the primary's block still is the bad
one.
"""

import os
import stat
from collections.abc import Sequence
from typing import Any, Final

import trio

from mirrorfs import evidence
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import BLOCK
from mirrorfs.lost import LostStore
from mirrorfs.session import Session
from mirrorfs.verify.asking import Asking, Place
from mirrorfs.verify.walk import Range
from mirrorfs.witness import keep

_PIECE: Final = 64 << 10
_TRIES: Final = 20
#: More ranges than that of one file are put aside as one.
_MAX_RANGES: Final = 10_000
#: What the kernel takes away with every write, also with one that mends.
_CAPABILITY: Final = b"security.capability"


class Mending:
    """Mends this node by the peer's data, or with `from_own` the peer by this node's; `good` is the node that has it right."""

    def __init__(self, asking: Asking, lost: LostStore, session: Session, *, good: str, from_own: bool) -> None:
        self._invalidate = session.invalidate
        self._asking = asking
        self._tree = asking.tree
        self._lost = lost
        self._good = good
        self._from_own = from_own

    async def mend(self, place: Place, ranges: Sequence[Range]) -> tuple[bool, str]:
        """Mend one file whose content differs in `ranges`; whether that was done, and what to tell of it."""
        if len(ranges) > _MAX_RANGES:
            ranges = [(ranges[0][0], ranges[-1][1])]
        try:
            if self._from_own:
                await self._mend_peer(place, ranges)
            else:
                await self._mend_own(place, ranges)
            if not self._asking.stands(place):
                return False, "not repaired: it was moved or removed meanwhile"
            for first, last in _pieces(ranges):
                data = await self._asking.data(place, first, last - first)
                if data is not None and data[0] != data[1]:
                    return False, "not repaired: it is written all the time, run it again"
            looked = await self._asking.look(place.directory, [place.entry] if place.entry else [])
        except OSError as error:
            return False, f"not repaired: {error.strerror or error}"
        if any(own != theirs for own, theirs in looked):
            return False, "not repaired: it changes all the time, run it again"
        return True, f"repaired from {self._good}"

    # ---- the standby

    async def _mend_peer(self, place: Place, ranges: Sequence[Range]) -> None:
        asking, directory, number = self._asking, place.directory.id, place.known.id
        if ranges:
            await asking.order(place, ops.Keep(directory, place.entry, number, place.path, tuple(ranges)))
        for first, last in _pieces(ranges):
            data = await asking.read_now(place.known, first, last - first)
            if not asking.stands(place):
                return
            if data:
                await asking.order(place, ops.Mend(directory, place.entry, number, first, data))
        if not asking.stands(place):
            return
        mode, uid, gid, size, mtime_ns, xattrs = evidence.description(self._tree, place.known)
        await asking.order(
            place, ops.MendAttributes(directory, place.entry, number, mode, uid, gid, size, mtime_ns, tuple(xattrs))
        )

    # ---- this node

    async def _mend_own(self, place: Place, ranges: Sequence[Range]) -> None:
        known, version = place.known, place.known.version
        own, good = await self._asking.describe(place)
        if ranges:
            descriptor = evidence.open_to_read(self._tree, known)
            try:
                await trio.to_thread.run_sync(keep, self._lost, descriptor, place.path, ranges)
            finally:
                os.close(descriptor)
        writes = 0
        try:
            for first, last in _pieces(ranges):
                writes += await self._write(place, first, last)
            writes += await self._attributes(place, own, good, wrote=bool(writes))
            if (writes or own[4] != good[4]) and known.version == version + writes:
                await self._change(
                    place, ops.SetAttributes(known.id, mtime_ns=good[4]), lambda: known.version == version + writes
                )
        finally:
            with trio.CancelScope(shield=True):
                await self._invalidate([known])  # also if it was broken off: nothing else drops the bad pages

    async def _write(self, place: Place, first: int, last: int) -> int:
        """Write the standby's bytes where this node still has the bad ones; returns how many writes that took."""
        writes = 0
        for _ in range(_TRIES):
            data = await self._asking.data(place, first, last - first)
            if data is None or data[0] == data[1]:
                break
            own, good = data
            before = writes
            for at in range(0, len(good), BLOCK):
                bad, better = own[at : at + BLOCK], good[at : at + BLOCK]
                if bad != better:
                    writes += await self._write_block(place, first + at, bad, better)
            if before == writes and len(own) > len(good):
                break  # only its size is wrong
        return writes

    async def _write_block(self, place: Place, offset: int, bad: bytes, good: bytes) -> bool:
        def is_bad_still() -> bool:
            return os.pread(self._tree.table.data(place.known), max(len(bad), len(good)), offset) == bad

        return await self._change(place, ops.Write(place.known.id, offset, good), is_bad_still)

    async def _attributes(self, place: Place, own: list[Any], good: list[Any], *, wrote: bool) -> int:
        """Give the file the standby's attributes where they are not others by now; returns how many changed its data."""
        known, tree = place.known, self._tree
        truncated = False
        if own[3] != good[3]:
            change = ops.SetAttributes(known.id, size=good[3])
            truncated = await self._change(place, change, lambda: tree.stat(known).st_size in (own[3], good[3]))
        if own[:3] != good[:3]:
            mode = None if stat.S_ISLNK(known.kind) else stat.S_IMODE(good[0])
            change = ops.SetAttributes(known.id, mode=mode, uid=good[1], gid=good[2])
            await self._change(place, change, lambda: evidence.description(tree, known)[:3] == own[:3])
        mine, theirs = dict(own[5]), dict(good[5])
        for key in mine.keys() | theirs.keys():
            if mine.get(key) != theirs.get(key) or (key == _CAPABILITY and wrote):
                await self._xattr(place, key, (mine.get(key), None) if wrote else (mine.get(key),), theirs.get(key))
        return truncated

    async def _xattr(self, place: Place, key: bytes, bad: tuple[bytes | None, ...], good: bytes | None) -> None:
        def is_bad_still() -> bool:
            return (self._tree.xattr(place.known, key) if key in self._tree.xattrs(place.known) else None) in bad

        if good is not None:
            await self._change(place, ops.SetXattr(place.known.id, key, good), is_bad_still)
        elif bad[0] is not None and await self._change(place, ops.SetXattr(place.known.id, key, bad[0]), is_bad_still):
            # The standby did not have it, and to remove what is not there would be a divergence: so it has it now.
            await self._change(place, ops.RemoveXattr(place.known.id, key), is_bad_still)

    async def _change(self, place: Place, change: ops.Change, only_if: Any) -> bool:
        """Make a change on both nodes if the condition holds at that moment and the file is still there; whether it was."""
        made = False

        def may_be_made() -> bool:
            nonlocal made
            made = self._asking.stands(place) and only_if()
            return made

        await self._asking.primary.change(change, place.known, only_if=may_be_made)
        return made


def _pieces(ranges: Sequence[Range]) -> list[Range]:
    return [(at, min(at + _PIECE, last)) for first, last in ranges for at in range(first, last, _PIECE)]
