"""The source's side of a quick resync: only what the dirty sets of both nodes say may differ travels.

Names first, in rounds. A round takes all names that are marked. For each, the target is told which file stands there
(`Gather`), and moves what it has there and is another file aside, to where it is found again by its id. Only then is
everything placed (`Entry`): a file that was moved between directories is never needed before it was taken from where it was,
in whatever order the directories come. Names that change meanwhile are marked for the next round. When no name is marked,
every name leads to the same file on both nodes, and from that point of the stream on (`NamesEqual`) live changes travel as
they do to a standby, whatever the data behind the names is.

Then the data, file by file: attributes, dirty blocks, and hashes of what was merely hot, as they stand at that point of the
stream.

A file that the target turns out not to have, though it should, it makes anew and says so (`LACKED`): the node that was the
primary before may have removed it in a change that nobody else saw.
"""

import logging
import stat
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import trio

from mirrorfs.config import ResyncConfig
from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import BLOCK, DirtySet, Generation
from mirrorfs.errors import MirrorfsError
from mirrorfs.resync.hashes import COMPARED
from mirrorfs.resync.reports import Report
from mirrorfs.resync.sending import DEFAULT, Sender
from mirrorfs.resync.survey import data_bytes
from mirrorfs.search import find_names
from mirrorfs.stream import Stream
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_NAMES_PER_FRAME: Final = 2000
#: A new file of no more than this is sent without asking whether the target has it already.
_SMALL: Final = COMPARED


class CannotCatchUpError(MirrorfsError):
    """The dirty sets do not lead to all that may differ: the other node has to be copied to in full."""


class CatchUp(Sender):
    """Brings the target to the same tree. Live changes to what is still to be looked at are noted and brought over with it; all
    others are told as they are, once the catch-up is `live`.

    `introduce` makes the target know a file by its id, given a directory entry that leads to it, and `note_introduced` takes
    one that it knows already; files from `first_new` on may be new to the target, and what was made from `unsent_from` on
    certainly is.
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
        introduce: Callable[[int, bytes, int], None],
        note_introduced: Callable[[int], None],
        note_unsettled: Callable[[int], None],
    ) -> None:
        super().__init__(tree, stream, settings)
        self.live = False
        self._estimates: dict[int, int] = {}
        self._work = dirty.all()
        self._work.add(theirs.marks)
        self._located = dirty.located
        self._their_places = theirs.places
        self._first_new = first_new
        self._unsent_from = unsent_from
        self._introduce = introduce
        self._note_introduced = note_introduced
        self._note_unsettled = note_unsettled
        self._places: dict[int, list[tuple[int, bytes]]] = {}
        self._explained = Generation()
        self._placed: set[int] = set()
        self._said: set[int] = set()
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
        match change:
            case ops.Write() | ops.SetAttributes() | ops.SetXattr() | ops.RemoveXattr():
                return change.file not in self._work.files
            case _:
                self._explained.note(change, 0)
                return True

    def note(self, change: ops.Change, new_from: int, old_size: int) -> None:
        """A live change was made that the target is not told of."""
        self._work.note(change, new_from, old_size)
        match change:
            case ops.Write() | ops.SetAttributes() | ops.SetXattr() | ops.RemoveXattr():
                self._said.discard(change.file)
            case _:
                pass

    def note_told(self, change: ops.Change) -> None:
        """A live change was made that the target is told of: what it gave a name is found there from now on."""
        match change:
            case ops.Link():
                self._note_place(change.parent, change.name)
            case ops.Rename():
                self._note_place(change.new_parent, change.new_name)
                if change.flags & ops.RENAME_EXCHANGE:
                    self._note_place(change.parent, change.name)
            case _:
                pass

    def _note_place(self, parent: int, name: bytes) -> None:
        known = self.tree.lookup(parent, name)
        self._places.setdefault(known.id, []).append((parent, name))
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
                number, before = next(iter(self._work.files)), self.bytes_done
                await self._bring_file(number)
                self.settle_estimate(self._estimates.pop(number, 0), before)
        finally:
            self._let_go()

    # ---- names

    async def _equal_names(self) -> None:
        while True:
            batch, self._work.names = self._work.names, {}
            if batch:
                self._explained.add(_only_names(batch))
                depths = await self._gather(batch)
                await self._hint_links()
                await self._place(batch, depths)
                self._let_go()
            # What the target lacked it says before it acknowledges.
            elif await self.stream.applied(self.stream.sent) and not self._work.names:
                break
            if self.stream.broken:
                return
        self.live = True
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
                directory = self._directory(number)
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
        self._hold(directory)
        depths[number] = self._hint(directory)
        found, more = list[tuple[bytes, int]](), list[int]()
        for count, name in enumerate(self.tree.names(directory) if names is None else sorted(names)):
            if count % 256 == 255:
                await trio.lowlevel.checkpoint()
            known = self._look(directory, name)
            if known is None:
                found.append((name, 0))
                continue
            found.append((name, known.id))
            self._places.setdefault(known.id, []).append((number, name))
            if known.is_directory and known.id >= self._first_new and batch.get(known.id, ()) is not None:
                # Made since, and a new directory has no marks of its own on disk: all of it is new. What is marked exactly is
                # no more than this node's own changes; those of a primary in between are gone with its memory.
                batch[known.id] = None
                more.append(known.id)
            elif not known.is_directory and (status := self.tree.stat(known)).st_nlink > 1:
                self._linked[status.st_ino] = known.id
            self.tree.table.drop_unused(known)
        await self._put_gather(number, found, complete=names is None)
        return more

    async def _put_gather(self, number: int, found: list[tuple[bytes, int]], *, complete: bool) -> None:
        for at in range(0, max(len(found), 1), _NAMES_PER_FRAME):
            piece = tuple(found[at : at + _NAMES_PER_FRAME])
            self.stream.put(ops.Gather(number, piece, complete, at + _NAMES_PER_FRAME >= len(found)))
            await self.pace(64 * len(piece) + 64)

    def _hint(self, directory: Known) -> int:
        """Tell the target by which names this directory is reached here; it may have it elsewhere. Returns its depth."""
        steps: list[ops.Introduce] = []
        while directory.id != ids.ROOT:
            parent, name = self._place_of_directory(directory)
            steps.append(ops.Introduce(parent, name, directory.id))
            directory = self.tree.table.get(parent)
        for step in reversed(steps):
            self.stream.put(step)
        return len(steps)

    def _place_of_directory(self, directory: Known) -> tuple[int, bytes]:
        parent = self.tree.parent_of(directory)
        for above, name in (*directory.names, *self._candidates(directory.id)):
            if above == parent and self.tree.holds(self.tree.table.get(parent), name, directory.id):
                return parent, name
        return parent, self.tree.name_in(parent, directory)

    async def _place(self, batch: dict[int, set[bytes] | None], depths: dict[int, int]) -> None:
        """Tell what stands under these names, unless it has changed since they were gathered."""
        for number in sorted(depths, key=depths.__getitem__):
            directory = self._directory(number)
            if directory is None:
                continue
            self._note_unsettled(number)
            names = batch[number]
            for name in self.tree.names(directory) if names is None else sorted(names):
                if directory.gone:
                    break
                self._put_name(directory, name)
                await self.pace()

    def _put_name(self, directory: Known, name: bytes) -> None:
        if self._work.has_name(directory.id, name):
            return
        known = self._look(directory, name)
        if known is None:
            return
        if not self._is_there(directory):
            self._work.name(directory.id, name)
            return
        if not known.is_directory and self.tree.stat(known).st_nlink > 1:
            # The target may have it under another name, where it is right and was not set aside.
            for parent, other in {*known.names, *self._candidates(known.id)} - {(directory.id, name)}:
                self.stream.put(ops.Introduce(parent, other, known.id))
        status = self.put_entry(directory.id, name, known, self.xattrs_of(known))
        self._placed.add(known.id)
        self._said.add(known.id)
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
        parent, name = self._place_of_directory(directory)
        if self._work.has_name(parent, name):
            return False
        self._put_name(self.tree.table.get(parent), name)
        return directory.id in self._placed

    def on_lacked(self, files: list[int]) -> None:
        """The target did not have these files, and has made them anew: they are wholly dirty."""
        for number in files:
            self._lacked.add(number)
            self._work.file(number)

    # ---- finding

    def _look(self, directory: Known, name: bytes) -> Known | None:
        try:
            return self.tree.lookup(directory.id, name)
        except FileNotFoundError:
            return None

    def _candidates(self, number: int) -> Iterable[tuple[int, bytes]]:
        """Directory entries that may lead to a file, the likeliest first."""
        yield from reversed(self._places.get(number, ()))
        located = self._located.get(number)
        if located is not None and located.parent:
            yield located.parent, located.name
        if number in self._their_places:
            yield self._their_places[number]

    def _directory(self, number: int, depth: int = 0) -> Known | None:
        """A directory of this tree by its id; None if it is not here any more."""
        located = self._located.get(number)
        known = self.tree.find(number, located.handle if located else b"")
        if known is not None:
            return known
        for parent, name in self._candidates(number):
            above = self._directory(parent, depth + 1) if depth < 4096 else None
            if above is not None and self.tree.holds(above, name, number):
                return self.tree.lookup(parent, name)
        return None

    def _find(self, number: int) -> tuple[Known, int, bytes] | None:
        """A file of this tree by its id and a name that leads to it; None if it is not here any more."""
        located = self._located.get(number)
        known = self.tree.find(number, located.handle if located else b"")
        if known is None and located is not None:
            return None  # its handle says that it is gone
        lost = known is not None
        for parent, name in (*(known.names if known is not None else ()), *self._candidates(number)):
            above = self._directory(parent)
            if above is None:
                continue
            if self.tree.holds(above, name, number):
                return self.tree.lookup(parent, name), parent, name
            lost = lost or not self._explained.has_name(parent, name)
        if known is not None and known.is_directory:
            parent, name = self._place_of_directory(known)
            return known, parent, name
        if known is not None and self.tree.stat(known).st_nlink == 0:
            return None
        if lost:
            raise CannotCatchUpError(f"no name is known of file {number:x}, which may differ: a full copy follows")
        return None

    async def _search_names(self) -> None:
        """Find names of files that have lost all that were known, by reading all directories."""
        wanted: dict[int, int] = {}
        for number in self._work.files:
            located = self._located.get(number)
            known = self.tree.find(number, located.handle if located else b"")
            if known is not None and not known.is_directory:
                wanted[self.tree.stat(known).st_ino] = number
                self.tree.table.drop_unused(known)
        for number, parent, name in await self._names_of(wanted):
            self._places.setdefault(number, []).append((parent, name))

    async def _names_of(self, wanted: dict[int, int]) -> list[tuple[int, int, bytes]]:
        """All names of files, by inode number: id, parent and name of each. No await follows the look-ups of the parents."""
        found: list[tuple[int, int, bytes]] = []
        for inode, hits in (await trio.to_thread.run_sync(find_names, self.tree.root, wanted.keys())).items():
            for way, name in hits:
                with suppress(OSError):  # moved since
                    parent = ids.ROOT
                    for step in way:
                        parent = self.tree.lookup(parent, step).id
                    found.append((wanted[inode], parent, name))
        return found

    async def _hint_links(self) -> None:
        """Tell the target all names of gathered files that have more than were gathered.

        It has such a file under a name that is right and of which nobody spoke, and would make a second one without it.
        """
        linked, self._linked = self._linked, {}
        wanted = {inode: number for inode, number in linked.items() if not self._all_names_seen(number)}
        if not wanted:
            return
        for number, parent, name in await self._names_of(wanted):
            self._hint(self.tree.table.get(parent))
            self.stream.put(ops.Introduce(parent, name, number))

    def _all_names_seen(self, number: int) -> bool:
        seen, links = 0, 0
        for parent, name in set(self._places.get(number, ())):
            directory = self._directory(parent)
            if directory is not None and self.tree.holds(directory, name, number):
                seen += 1
                links = self.tree.stat(self.tree.lookup(parent, name)).st_nlink
        return seen >= links > 0

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
                found = self._find(number)
            except CannotCatchUpError:
                await self._search_names()
                found = self._find(number)
            if found is None:
                del self._work.files[number]
                return
            known, parent, name = found
            self._introduce(parent, name, number)
        status = self.tree.stat(known)
        marks = self._work.files.pop(number)
        regular = stat.S_ISREG(status.st_mode)
        size = status.st_size if regular else 0
        if number < self._unsent_from or number not in self._said:  # else its entry has said it all
            self.stream.put(ops.Refresh(number, status.st_mode, status.st_uid, status.st_gid, size, self.xattrs_of(known)))
        self._note_unsettled(number)
        self._hold(known)
        if regular:
            whole = number in self._lacked or number >= self._unsent_from or (number >= self._first_new and size <= _SMALL)
            if whole:
                marks.blocks.add_range(0, (size + BLOCK - 1) // BLOCK)
            elif number >= self._first_new:
                marks.tail = 0
            for start, end in marks.block_ranges(size):
                await self.copy_range(known, start, end, holes=True)
            for start, end in marks.compared_ranges(size):
                await self.compare_range(known, start, end)
        self._note_unsettled(number)
        await self.pace()
        self.files_done += 1
        self.files_found = self.files_done + len(self._work.files)
        self._let_go()


def _only_names(names: dict[int, set[bytes] | None]) -> Generation:
    generation = Generation()
    generation.names = {directory: None if some is None else set(some) for directory, some in names.items()}
    return generation
