"""The source's side of a quick resync: only what the dirty sets of both nodes say may differ travels.

Names first, in rounds. A round takes all names that are marked. For each, the target is told which file stands there
(`Gather`), moves what it has there and is another file aside, to where it is found again by its id, and answers what it has
not right (`WANTED`). Only then is that placed (`Entry`): a file that was moved between directories is never needed before it
was taken from where it was, in whatever order the directories come. Small new files travel whole with their names (`Whole`).
Names that change meanwhile are marked for the next round. When no name is marked, every name leads to the same file on both
nodes, and from that point of the stream on (`NamesEqual`) live changes travel as they do to a standby, whatever the data behind
the names is.

Then the data, file by file: attributes, dirty blocks, and hashes of what was merely hot, as they stand at that point of the
stream.

A file that the target turns out not to have, though it should, it makes anew and says so (`LACKED`): the node that was the
primary before may have removed it in a change that nobody else saw.
"""

import logging
import os
import stat
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from mirrorfs import search
from mirrorfs.config import ResyncConfig
from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import BLOCK, DirtySet, Generation
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.resync import whole
from mirrorfs.resync.brought import Brought
from mirrorfs.resync.finding import CannotCatchUpError, Finder
from mirrorfs.resync.reports import Report, unpack_wanted
from mirrorfs.resync.sending import DEFAULT, ENTRY_COST, TURN_S, Sender, ids_in
from mirrorfs.resync.survey import data_bytes
from mirrorfs.resync.turns import Turns
from mirrorfs.stream import Stream
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_NAMES_PER_FRAME: Final = 2000
_COST_PER_TURN: Final = 256 << 10
#: No file counts as new.
_NO_NEW: Final = 1 << 63
_NAME_COST: Final = 64
#: A large file counts as brought over in steps of so many bytes, a multiple of `EXTENT`.
_STEP: Final = 256 << 20


class CatchUp(Sender):
    """Brings the target to the same tree. Live changes to what is still to be looked at are noted and brought over with it; all
    others are told as they are, once the catch-up is `live`.

    The target has room for `room_bytes`. `introduce` makes the target know a file by its id, given a directory entry that leads
    to it, and `note_introduced` takes one that it knows already; files from `first_new` on may be new to the target, and what
    was made from `unsent_from` on certainly is.
    """

    kind = "quick"

    def __init__(
        self,
        tree: Tree,
        stream: Stream,
        dirty: DirtySet,
        theirs: Report,
        *,
        settings: ResyncConfig = DEFAULT,
        first_new: int,
        unsent_from: int,
        room_bytes: int,
        introduce: Callable[[int, bytes, int], None],
        note_introduced: Callable[[int], None],
        note_unsettled: Callable[[int], None],
    ) -> None:
        super().__init__(tree, stream, settings)
        self.live = False
        self.turns = Turns()
        self._estimates: dict[int, int] = {}
        self.brought = Brought(dirty)
        self._work = dirty.all()
        self._work.add(theirs.marks)
        self._finder = Finder(tree, dirty.located, theirs.places)
        self._first_new = first_new
        self._unsent_from = unsent_from
        # What is set aside at the target gives its room back when the names are equal, not before.
        self._room_bytes = room_bytes // 2
        self._introduce = introduce
        self._note_introduced = note_introduced
        self._note_unsettled = note_unsettled
        self._to_place: dict[int, set[bytes] | None] = {}
        self._unlisted: set[int] = set()
        self._placed: set[int] = set()
        self._linked: dict[int, int] = {}
        self._lacked: set[int] = set()
        self._held: list[Known] = []

    @property
    def expected(self) -> tuple[int, int] | None:
        """How many bytes and files there are in all, as the marks say; the names come first and are not counted."""
        return (self.bytes_found, self.files_found) if self.live else None

    def tells(self, change: ops.Change) -> bool:
        """Whether the target is told of a live change as it is. If not, `note` marks what it changes: it is brought over
        later."""
        if not self.live:
            return False
        if isinstance(change, ops.OfFile):
            return change.file not in self._work.files
        self._finder.explained.note(change, 0)
        return True

    def note(self, change: ops.Change, old_size: int) -> None:
        """A live change was made that the target is not told of."""
        self._work.note(change, _NO_NEW, old_size)  # new files too: they may have been sent whole
        if isinstance(change, ops.OfFile):
            known = self.tree.table.find(change.file)
            for parent, name in known.names if known is not None else ():
                self._finder.note(change.file, parent, name)

    def note_told(self, change: ops.Change) -> None:
        """A live change was made that the target is told of: what it gave a name is found there from now on."""
        if isinstance(change, ops.Link):
            self._note_place(change.parent, change.name)
        elif isinstance(change, ops.Rename):
            self._note_place(change.new_parent, change.new_name)
            if change.flags & ops.RENAME_EXCHANGE:
                self._note_place(change.parent, change.name)

    def _note_place(self, parent: int, name: bytes) -> None:
        known = self.tree.lookup(parent, name)
        if known.is_directory or known.id in self._work.files:
            self._finder.note(known.id, parent, name)
        self.tree.table.drop_unused(known)

    def note_name(self, directory: int, name: bytes) -> None:
        """One more name may have to be looked at."""
        if not self.live:
            self._work.name(directory, name)

    async def run(self) -> None:
        """Bring everything over; afterwards the trees are equal at this point of the stream."""
        try:
            await self._equal_names()
            while self._work.files:
                for number in list(self._work.files):
                    if self.stream.broken:
                        return
                    before = self.bytes_done
                    await self._bring_file(number)
                    self.settle_estimate(self._estimates.pop(number, 0), before)
        finally:
            self._let_go()

    # ---- names

    async def _equal_names(self) -> None:
        while True:
            self.turns.begin_round()
            batch, self._work.names = self._work.names, {}
            if batch:
                self._finder.explained.add(Generation(batch))
                depths = await self._gather(batch)
                await self._hint_links()
                # What the target lacks it says before it acknowledges.
                if await self.stream.applied(self.stream.sent):
                    await self._place(batch, depths)
                self._let_go()
                self._to_place.clear()
                self._unlisted.clear()
            elif await self.stream.applied(self.stream.sent) and not self._work.names:
                break
            if self.stream.broken:
                return
        self.live = True
        self.turns.end()
        self.stream.put(ops.NamesEqual())
        for number, marks in self._work.files.items():
            self._estimate(number, marks.estimated_bytes)
        self.files_found = self.files_done + len(self._work.files)

    def _estimate(self, number: int, count_bytes: int) -> None:
        self._estimates[number] = self._estimates.get(number, 0) + count_bytes
        self.bytes_found += count_bytes

    async def _gather(self, batch: dict[int, set[bytes] | None]) -> dict[int, int]:
        """Have the target set aside what stands under these names and is another file; returns how deep each directory lies."""
        depths: dict[int, int] = {}
        waiting = list(batch)
        while True:
            missing, found_before = list[int](), len(depths)
            queue = deque(waiting)
            while queue:
                number = queue.popleft()
                directory = self._finder.directory(number)
                if directory is None:
                    missing.append(number)
                else:
                    queue += await self._gather_names(directory, batch, depths)
            # A new directory is found by its name in another, which may have come later.
            waiting = [number for number in missing if number not in depths]
            if not waiting or len(depths) == found_before:
                break
        for number in waiting:
            # Removed here; what is in it there may be needed elsewhere.
            names = batch[number]
            await self._put_gather(number, [(name, 0) for name in names or ()], complete=names is None)
        self.stream.put(ops.Gathered())
        return depths

    async def _gather_names(self, directory: Known, batch: dict[int, set[bytes] | None], depths: dict[int, int]) -> list[int]:
        """Gather the marked names of one directory; returns new directories that are to be gathered too."""
        number, names = directory.id, batch[directory.id]
        if number in self._unlisted:
            return []
        self._hold(directory)
        way = self._way(directory)
        depths[number] = len(way)
        await self.pace(_NAME_COST * (1 + len(way)))
        if number >= self._unsent_from and number not in self._placed:
            return self._look_into(directory, batch)
        self._hint(way)
        to_place = self._to_place[number] = set[bytes]()
        found, more = list[tuple[bytes, int]](), list[int]()
        for count, name in enumerate(self.tree.names(directory) if names is None else sorted(names)):
            if count % 256 == 255:
                await trio.lowlevel.checkpoint()
            seen = self._peek(directory, name)
            if seen is None:
                found.append((name, 0))
                continue
            file, status = seen
            found.append((name, file))
            is_directory, is_linked = stat.S_ISDIR(status.st_mode), status.st_nlink > 1
            if is_directory or is_linked or file in self._work.files:
                self._finder.note(file, number, name)
            if is_directory and file >= self._first_new and batch.get(file, ()) is not None:
                # Made since, and a new directory has no marks of its own on disk: all of it is new. What is marked exactly is
                # no more than this node's own changes; those of a primary in between are gone with its memory.
                batch[file] = None
                more.append(file)
            elif is_linked and not is_directory:
                self._linked[status.st_ino] = file
            if file >= self._first_new:
                to_place.add(name)  # nothing of it is marked: whatever the target has is refreshed
        self.turns.brought(len(found))
        await self._put_gather(number, found, complete=names is None)
        return more

    def _look_into(self, directory: Known, batch: dict[int, set[bytes] | None]) -> list[int]:
        """A directory that is new to the target: nothing stands in it there, and only the directories in it matter yet."""
        batch[directory.id] = self._to_place[directory.id] = None
        self._unlisted.add(directory.id)
        more = list[int]()
        for name in search.directories_in(self.tree.table.descriptor(directory)):
            if (seen := self._peek(directory, name)) is not None:
                number, _ = seen
                self._finder.note(number, directory.id, name)
                if number >= self._first_new:
                    batch[number] = None
                    more.append(number)
        return more

    def _peek(self, directory: Known, name: bytes) -> tuple[int, os.stat_result] | None:
        """Id and status of what stands under a name, None if nothing does."""
        try:
            number, status = self.tree.peek(directory, name)
            if number is None:
                known = self.tree.lookup(directory.id, name)
                number = known.id
                self.tree.table.drop_unused(known)
            return number, status
        except FileNotFoundError:
            return None

    async def _put_gather(self, number: int, found: list[tuple[bytes, int]], *, complete: bool) -> None:
        for at in range(0, max(len(found), 1), _NAMES_PER_FRAME):
            piece = tuple(found[at : at + _NAMES_PER_FRAME])
            self.stream.put(ops.Gather(number, piece, complete, at + _NAMES_PER_FRAME >= len(found)))
            await self.pace(_NAME_COST * (1 + len(piece)))

    def _way(self, directory: Known) -> list[ops.Introduce]:
        """The names by which a directory is reached here, from the root on."""
        steps: list[ops.Introduce] = []
        while directory.id != ids.ROOT:
            parent, name = self._finder.place_of_directory(directory)
            steps.append(ops.Introduce(parent, name, directory.id))
            directory = self.tree.table.get(parent)
        return steps[::-1]

    def _hint(self, way: list[ops.Introduce]) -> None:
        """Tell the target by which names a directory is reached here; it may have it elsewhere."""
        for step in way:
            self.stream.put(step)

    async def _place(self, batch: dict[int, set[bytes] | None], depths: dict[int, int]) -> None:
        """Tell what stands under the names that the target has not right, unless it has changed since they were gathered."""
        for number in sorted(depths, key=depths.__getitem__):
            directory, names = self._finder.directory(number), self._to_place[number]
            if directory is None:
                continue
            self._note_unsettled(number)
            if names is None:
                names = batch[number]
            await self._place_names(directory, self.tree.names(directory) if names is None else sorted(names))

    async def _place_names(self, directory: Known, names: list[bytes]) -> None:
        """Small new files that are not in memory after the others, when the disk has brought them."""
        self.turns.brought(len(names) if directory.id in self._unlisted else 0)
        cold = await self._place_what_is_there(directory, names)
        for at in range(0, len(cold), whole.READ_AT_ONCE):
            piece = cold[at : at + whole.READ_AT_ONCE]
            descriptor = self.tree.table.hold(directory)
            try:
                await trio.to_thread.run_sync(whole.bring_into_memory, descriptor, piece)
            finally:
                self.tree.table.let_go(directory)
            await self._place_what_is_there(directory, piece, again=True)

    async def _place_what_is_there(self, directory: Known, names: list[bytes], *, again: bool = False) -> list[bytes]:
        """Small new files together, each other one by itself; returns small ones not in memory, unless `again`.

        No await between the look at a file and its `put`.
        """
        files, cost, began, cold = list[ops.WholeFile](), 0, trio.current_time(), list[bytes]()
        for name in names:
            if directory.gone:
                return []
            try:
                file, is_cold = self._whole(directory, name), False
            except BlockingIOError:
                file, is_cold = None, not again
            if file is not None:
                files.append(file)
                cost += len(file.data) + whole.COST
            elif is_cold:
                cold.append(name)
            else:
                self._put_name(directory, name)
                cost += ENTRY_COST
            is_full = len(files) >= whole.PER_FRAME or cost >= _COST_PER_TURN
            if is_full or trio.current_time() - began > TURN_S:
                self._put_whole(directory, files)
                await self.pace(cost)
                files, cost, began = [], 0, trio.current_time()
        self._put_whole(directory, files)
        await self.pace(cost)
        return cold

    def _whole(self, directory: Known, name: bytes) -> ops.WholeFile | None:
        """A small new file, if it can be placed now."""
        if self._room_bytes <= 0 or self._work.has_name(directory.id, name) or not self._is_there(directory):
            return None
        return whole.read(self.tree, self.tree.table.descriptor(directory), name, self._first_new)

    def _put_whole(self, directory: Known, files: list[ops.WholeFile]) -> None:
        if not files:
            return
        size = sum(len(file.data) for file in files)
        self.stream.put(ops.Whole(directory.id, tuple(files)))
        before = self.bytes_done
        self.bytes_done += size
        self.bytes_sent += size
        self._room_bytes -= size + ENTRY_COST * len(files)
        self.files_done += len(files)
        self.settle_estimate(sum(self._estimates.pop(file.file, 0) for file in files) if self._estimates else 0, before)
        for file in files:
            self._work.files.pop(file.file, None)

    def _put_name(self, directory: Known, name: bytes) -> None:
        if self._work.has_name(directory.id, name):
            return
        try:
            known = self.tree.lookup(directory.id, name)
        except FileNotFoundError:
            return
        if not self._is_there(directory):
            self._work.name(directory.id, name)
            return
        if not known.is_directory and self.tree.stat(known).st_nlink > 1:
            if directory.id in self._unlisted:
                self._work.name(directory.id, name)  # its other names have to be told first
                self.tree.table.drop_unused(known)
                return
            # The target may have it under another name, where it is right and was not set aside.
            for parent, other in {*known.names, *self._finder.candidates(known.id)} - {(directory.id, name)}:
                self.stream.put(ops.Introduce(parent, other, known.id))
        status = self.put_entry(directory.id, name, known, self.xattrs_of(known))
        self._finder.note(known.id, directory.id, name)
        self._placed.add(known.id)
        self._note_introduced(known.id)
        self._note_unsettled(known.id)
        if known.id >= self._first_new:
            self._work.file(known.id)
            if known.id not in self._estimates:
                self._estimate(known.id, data_bytes(status))
        self.tree.table.drop_unused(known)

    def _is_there(self, directory: Known) -> bool:
        """Whether the target has the directory; a new one is placed before what is in it."""
        if directory.id < self._first_new or directory.id in self._placed:
            return True
        parent, name = self._finder.place_of_directory(directory)
        if self._work.has_name(parent, name):
            return False
        self._put_name(self.tree.table.get(parent), name)
        return directory.id in self._placed

    async def _hint_links(self) -> None:
        """Tell the target all names of gathered files that have more than were gathered.

        It has such a file under a name that is right and of which nobody spoke, and would make a second one without it.
        """
        linked, self._linked = self._linked, {}
        wanted = {inode: number for inode, number in linked.items() if not self._finder.all_names_seen(number)}
        if not wanted:
            return
        for number, parent, name in await self._finder.names_of(wanted):
            self._hint(self._way(self.tree.table.get(parent)))
            self.stream.put(ops.Introduce(parent, name, number))

    def on_frame(self, frame: Frame) -> bool:
        """Take in what the target answers; False if it is no answer to a quick resync."""
        match frame.kind:
            case Kind.WANTED:
                for directory, names in unpack_wanted(frame):
                    before = self._to_place.get(directory, set())
                    self._to_place[directory] = None if names is None or before is None else before | names
            case Kind.LACKED:
                # These it has made anew: they are wholly dirty.
                for number in ids_in(frame):
                    self._lacked.add(number)
                    self._work.file(number)
            case _:
                return super().on_frame(frame)
        return True

    def _hold(self, known: Known) -> None:
        known.kept += 1
        self._held.append(known)

    def _let_go(self) -> None:
        while self._held:
            known = self._held.pop()
            known.kept -= 1
            self.tree.table.drop_unused(known)

    # ---- data

    async def _bring_file(self, number: int) -> None:
        """Bring one file over. It is found, introduced and refreshed in one step."""
        if number == ids.ROOT:
            known = self.tree.table.get(ids.ROOT)
        else:
            try:
                found = self._finder.file(number)
            except CannotCatchUpError:
                await self._finder.search(list(self._work.files))
                found = self._finder.file(number)
            if found is None:
                del self._work.files[number]
                return
            known, parent, name = found
            self._introduce(parent, name, number)
        status = self.tree.stat(known)
        marks = self._work.files.pop(number)
        self.brought.begin(number)
        regular = stat.S_ISREG(status.st_mode)
        size = status.st_size if regular else 0
        self.stream.put(ops.Refresh(number, status.st_mode, status.st_uid, status.st_gid, size, self.xattrs_of(known)))
        self._note_unsettled(number)
        self._hold(known)
        if regular:
            certainly_new = number in self._lacked or number >= self._unsent_from
            if certainly_new or (number >= self._first_new and size <= whole.SMALL):
                marks.blocks.add_range(0, (size + BLOCK - 1) // BLOCK)
            elif number >= self._first_new:
                marks.tail = 0
            for start, end in marks.block_ranges(size):
                for at in range(start, end, _STEP):
                    stop = min(at + _STEP, end)
                    await self.copy_range(known, at, stop, holes=True)
                    self.brought.sent(number, stop, compared=False)
            for start, end in marks.compared_ranges(size):
                for at in range(start, end, _STEP):
                    stop = min(at + _STEP, end)
                    await self.compare_range(known, at, stop)
                    self.brought.sent(number, stop, compared=True)
            self.put_capability(known)
        self.brought.end(number)
        self._note_unsettled(number)
        await self.pace()
        self.files_done += 1
        self.files_found = self.files_done + len(self._work.files)
        self._let_go()
