"""Where a file of this tree stands: by what the kernel knows, what this resync has seen, and what both dirty sets remember."""

from collections.abc import Iterable
from contextlib import suppress

import trio

from mirrorfs.core import ids
from mirrorfs.core.dirty import Generation, Located
from mirrorfs.errors import MirrorfsError
from mirrorfs.search import find_names
from mirrorfs.table import Known
from mirrorfs.tree import Tree


class CannotCatchUpError(MirrorfsError):
    """The dirty sets do not lead to all that may differ: the other node has to be copied to in full."""


class Finder:
    """Finds files by their ids. `located` is what this node's dirty set remembers, `theirs` where the other node had them.

    `explained` are names that are marked: what is not where it was, and whose old name is among them, may be gone.
    """

    def __init__(self, tree: Tree, located: dict[int, Located], theirs: dict[int, list[tuple[int, bytes]]]) -> None:
        self.explained = Generation()
        self._tree = tree
        self._located = located
        self._theirs = theirs
        self._seen: dict[int, dict[tuple[int, bytes], None]] = {}

    def note(self, number: int, parent: int, name: bytes) -> None:
        """The file was seen under this name, last of all."""
        places = self._seen.setdefault(number, {})
        places.pop((parent, name), None)
        places[parent, name] = None

    def candidates(self, number: int) -> Iterable[tuple[int, bytes]]:
        """Directory entries that may lead to a file, the likeliest first."""
        yield from reversed(self._seen.get(number, ()))
        located = self._located.get(number)
        if located is not None and located.parent:
            yield located.parent, located.name
        yield from self._theirs.get(number, ())

    def _known(self, number: int) -> Known | None:
        located = self._located.get(number)
        return self._tree.find(number, located.handle if located else b"")

    def directory(self, number: int, depth: int = 0) -> Known | None:
        """A directory of this tree by its id; None if it is not here any more."""
        known = self._known(number)
        if known is not None:
            return known
        for parent, name in self.candidates(number):
            above = self.directory(parent, depth + 1) if depth < 4096 else None
            if above is not None and self._tree.holds(above, name, number):
                return self._tree.lookup(parent, name)
        return None

    def place_of_directory(self, directory: Known) -> tuple[int, bytes]:
        """Parent and name of a directory."""
        parent = self._tree.parent_of(directory)
        for above, name in (*directory.names, *self.candidates(directory.id)):
            if above == parent and self._tree.holds(self._tree.table.get(parent), name, directory.id):
                return parent, name
        return parent, self._tree.name_in(parent, directory)

    def file(self, number: int) -> tuple[Known, int, bytes] | None:
        """A file of this tree by its id and a name that leads to it; None if it is not here any more.

        CannotCatchUpError if it may be here and no name is known.
        """
        located = self._located.get(number)
        known = self._known(number)
        if known is None and located is not None and located.handle:
            return None  # its handle says that it is gone
        lost = known is not None
        for parent, name in (*(known.names if known is not None else ()), *self.candidates(number)):
            above = self.directory(parent)
            if above is None:
                continue
            if self._tree.holds(above, name, number):
                return self._tree.lookup(parent, name), parent, name
            lost = lost or not self.explained.has_name(parent, name)
        if known is not None and known.is_directory:
            parent, name = self.place_of_directory(known)
            return known, parent, name
        if known is not None and self._tree.stat(known).st_nlink == 0:
            return None
        if lost:
            raise CannotCatchUpError(f"no name is known of file {number:x}, which may differ: a full copy follows")
        return None

    async def search(self, numbers: Iterable[int]) -> None:
        """Find names of files that have lost all that were known, by reading all directories."""
        wanted: dict[int, int] = {}
        for number in numbers:
            known = self._known(number)
            if known is not None and not known.is_directory:
                wanted[self._tree.stat(known).st_ino] = number
                self._tree.table.drop_unused(known)
        for number, parent, name in await self.names_of(wanted):
            self.note(number, parent, name)

    async def names_of(self, wanted: dict[int, int]) -> list[tuple[int, int, bytes]]:
        """All names of files, by inode number: id, parent and name of each. No await follows the look-ups of the parents."""
        found: list[tuple[int, int, bytes]] = []
        for inode, hits in (await trio.to_thread.run_sync(find_names, self._tree.root, wanted.keys())).items():
            for way, name in hits:
                with suppress(OSError):  # moved since
                    parent = ids.ROOT
                    for step in way:
                        parent = self._tree.lookup(parent, step).id
                    found.append((wanted[inode], parent, name))
        return found

    def all_names_seen(self, number: int) -> bool:
        """Whether this resync has seen every name of a file."""
        seen, links = 0, 0
        for parent, name in self._seen.get(number, ()):
            directory = self.directory(parent)
            if directory is not None and self._tree.holds(directory, name, number):
                seen += 1
                links = self._tree.stat(self._tree.lookup(parent, name)).st_nlink
        return seen >= links > 0
