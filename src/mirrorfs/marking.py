"""Changes of this node as a primary -> marks of the dirty set: durable before the change is made, exact after it."""

from collections.abc import Awaitable, Callable

from mirrorfs.activity import Activity
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import Entry, Located, Mark
from mirrorfs.strand import in_task
from mirrorfs.table import Known
from mirrorfs.tree import Tree


class Marking:
    """Marks what changes make dirty. `admitted` is awaited after each wait for the disk: a change may have to wait anew."""

    def __init__(self, tree: Tree, activity: Activity, admitted: Callable[[], Awaitable[None]]) -> None:
        self.activity = activity
        self._tree = tree
        self._admitted = admitted

    async def before(self, change: ops.Change, target: Known | None) -> int:
        """Wait until what the change makes dirty is durably marked; returns the size in bytes that the file has now, where
        `operations.bytes_changed` needs it.

        No await follows the look that counts: a checkpoint may have let a mark go while the disk was waited for.
        """
        await in_task()
        while True:
            old_size, cold = self.look(change, target)
            if not cold:
                return old_size
            await self.activity.make_durable([*self._located(cold, change), *cold])
            await self._admitted()

    def look(self, change: ops.Change, target: Known | None) -> tuple[int, list[Mark]]:
        """The size in bytes of a file that the change may truncate, and the marks that must be made durable before it."""
        dirty = self.activity.dirty
        if not dirty.tracking or (target is not None and target.gone):
            return 0, []
        old_size = 0
        if isinstance(change, ops.Allocate) or (isinstance(change, ops.SetAttributes) and change.size is not None):
            old_size = self._tree.stat(self._tree.table.get(change.file)).st_size
        cold = dirty.cold(change, old_size)
        if isinstance(change, ops.Link) and (other := self._name_of(change.file)) is not None:
            cold += dirty.cold_names(other[0])
        return old_size, cold

    def after(self, change: ops.Change, old_size: int) -> None:
        """The change was made."""
        dirty = self.activity.dirty
        if dirty.tracking:
            dirty.note(change, old_size)
            if (other := self.other_name(change)) is not None:
                dirty.now.name(*other)

    def found(self, parent: int, name: bytes) -> None:
        """A file that nobody made through the mount got an id: the other node does not know it."""
        dirty = self.activity.dirty
        if dirty.tracking and parent:
            cold = dirty.cold_names(parent)
            self.activity.ask([*self._located(cold), *cold])
            dirty.now.name(parent, name)

    def other_name(self, change: ops.Change) -> tuple[int, bytes] | None:
        """For a new link, a name by which the other node has the file: there it will be found when the new one is placed."""
        return self._name_of(change.file) if isinstance(change, ops.Link) else None

    def _name_of(self, number: int) -> tuple[int, bytes] | None:
        """A directory entry that leads to a file, as far as the kernel knows: the newest in a directory that is still known.

        A directory need not be, once the kernel has dropped the file's entry in it from its cache.
        """
        table = self._tree.table
        known = table.find(number)
        if known is None or not known.places:
            return None
        names = known.names
        return next((place for place in reversed(names) if table.find(place[0]) is not None), names[-1])

    def _located(self, marks: list[Mark], change: ops.Change | None = None) -> list[Entry]:
        """How the files of these marks can be found again after a restart; what the change is about to make has no handle."""
        table = self._tree.table
        found: list[Entry] = []
        for mark in marks:
            if isinstance(change, ops.MakeNode | ops.Symlink) and change.file == mark.number:
                found.append(Located(change.file, b"", change.parent, table.handle(table.get(change.parent)), change.name))
                continue
            known = table.get(mark.number)
            parent, name = self._name_of(mark.number) or (0, b"")
            above = table.find(parent) if parent else None
            if above is None:
                found.append(Located(known.id, table.handle(known)))
            else:
                found.append(Located(known.id, table.handle(known), parent, table.handle(above), name))
        return found
