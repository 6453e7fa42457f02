"""The target's side of a quick resync; what it does is told in `quick`.

A file that stands where the source has another is moved aside into `orphans` and is known by its id from then on, until an
`Entry` places it again. So nothing is lost if the link breaks in between: the next quick resync begins with what is in
`orphans`.
"""

import errno
import logging
import os
import stat
from contextlib import suppress
from typing import Final

import trio

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.resync import whole
from mirrorfs.resync.making import Maker, empty_orphans
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)

_COPY: Final = (ops.Gather, ops.Gathered, ops.Entry, ops.Whole, ops.NamesEqual, ops.Refresh, ops.CopyData, ops.CopyHole)


class Returning(Maker):
    """Applies a quick resync.

    `lacked` are files that were made because they were not here, `wanted` the names in directories that do not lead to what
    they are to lead to (None for all that were gathered), both since they were last emptied.
    """

    def __init__(self, tree: Tree, orphans: int) -> None:
        super().__init__(tree, orphans)
        self.live = False
        self.lacked: list[int] = []
        self.wanted: list[tuple[int, list[bytes] | None]] = []
        self._here: set[int] = set()
        self._aside: dict[int, list[bytes]] = {}
        self._waiting: dict[int, list[ops.Gather | ops.Introduce]] = {}
        self._spoken: dict[int, set[bytes]] = {}
        self._found(tree.table.get(ids.ROOT))
        self._take_up_orphans()

    def handles(self, operation: ops.Operation) -> bool:
        """Whether the operation is one of the resync; the others are a standby's."""
        return isinstance(operation, _COPY) or (isinstance(operation, ops.Introduce) and not self.live)

    def apply(self, operation: ops.Operation) -> None:
        """Apply one operation of the resync; OSError if this node cannot hold it."""
        match operation:
            case ops.Introduce():
                self._hint(operation)
            case ops.Gather():
                self._gather(operation)
            case ops.Gathered():
                self.wanted += [
                    (number, None)  # a directory that is not here
                    for number, waiting in self._waiting.items()
                    if any(isinstance(operation, ops.Gather) for operation in waiting)
                ]
                self._waiting.clear()
                self._spoken.clear()
            case ops.Entry():
                if self._stands(operation):
                    self.lacked.append(operation.file)
            case ops.Whole():
                self._whole(operation)
            case ops.NamesEqual():
                self.live = True
            case ops.Refresh():
                self._refresh(operation)
            case ops.CopyData():
                self.copy_data(operation)
            case ops.CopyHole():
                self.copy_hole(operation)
            case _:
                raise OSError(errno.EPROTO, f"{type(operation).__name__} during a quick resync")

    # ---- names

    def _take_up_orphans(self) -> None:
        """What an interrupted quick resync has set aside waits there still."""
        names = sorted(os.listdir(self.orphans), key=lambda name: (len(name), name))
        for name in map(os.fsencode, names):
            self.count = max(self.count, int(name) if name.isdigit() else 0)
            known = self.tree.look_at(self.orphans, name)
            self._aside.setdefault(known.id, []).append(name)
            self._found(known)

    def _found(self, known: Known) -> None:
        """A file that may have to be placed, or a directory that is spoken of: it stays known by its id."""
        self.tree.table.pin(known)
        if known.id in self._here:
            return
        self._here.add(known.id)
        for waiting in self._waiting.pop(known.id, ()):
            self.apply(waiting)

    def _hint(self, hint: ops.Introduce) -> None:
        """The source has this directory there; if it stands there here too, it is found."""
        if hint.file in self._here:
            return
        if hint.parent not in self._here:
            self._waiting.setdefault(hint.parent, []).append(hint)
            return
        parent = self.tree.table.get(hint.parent)
        if self.tree.holds(parent, hint.name, hint.file):
            self._found(self.tree.lookup(hint.parent, hint.name))

    def _gather(self, gather: ops.Gather) -> None:
        if gather.directory not in self._here:
            self._waiting.setdefault(gather.directory, []).append(gather)
            return
        directory = self.tree.table.get(gather.directory)
        wanted: list[bytes] = []
        for name, file in gather.names:
            if not self._is_right(directory, name, file) and file:
                wanted.append(name)
        if wanted:
            self.wanted.append((gather.directory, wanted))
        if gather.complete:
            spoken = self._spoken.setdefault(gather.directory, set())
            spoken.update(name for name, _ in gather.names)
            if gather.last:
                del self._spoken[gather.directory]
                for name in self.tree.names(directory):
                    here = None if name in spoken else self._look(directory, name)
                    if here is not None:
                        self._set_aside(directory, name, here)

    def _is_right(self, directory: Known, name: bytes, file: int) -> bool:
        """Whether a name leads to this file; what else it leads to is set aside."""
        try:
            number, status = self.tree.peek(directory, name)
        except FileNotFoundError:
            return False
        if number == file and not stat.S_ISDIR(status.st_mode):
            return True
        here = self.tree.lookup(directory.id, name)
        if here.id != file:
            self._set_aside(directory, name, here)
        else:
            self._found(here)
        self.tree.table.drop_unused(here)
        return here.id == file

    def _look(self, directory: Known, name: bytes) -> Known | None:
        try:
            return self.tree.lookup(directory.id, name)
        except FileNotFoundError:
            return None

    def _set_aside(self, directory: Known, name: bytes, known: Known) -> None:
        fresh = self.set_aside(directory, name)
        self._aside.setdefault(known.id, []).append(fresh)
        self._found(known)

    def _stands(self, entry: ops.Entry) -> bool:
        """Make a name lead to its file. Returns whether the file had to be made."""
        directory = self.tree.table.get(entry.parent)
        here = self._look(directory, entry.name)
        if here is not None and here.id == entry.file:
            self._found(here)
            return False
        if here is not None:
            self._set_aside(directory, entry.name, here)
        if entry.file in self._here:
            self._place(self.tree.table.get(entry.file), directory, entry)
            return False
        self._found(self.make(entry))
        return True

    def lacks(self, entry: ops.Entry) -> bool:
        """Whether the file of an entry is not here and will be made."""
        if entry.file in self._here:
            return False
        try:
            number, _ = self.tree.peek(self.tree.table.get(entry.parent), entry.name)
        except FileNotFoundError:
            return True
        return number != entry.file

    def _whole(self, operation: ops.Whole) -> None:
        directory = self.tree.table.get(operation.directory)
        given = whole.gives_attributes(self.tree.table.proc(directory))
        for file in operation.files:
            try:
                if file.file not in self._here and self.tree.table.find(file.file) is None:
                    with suppress(FileExistsError):
                        whole.make(self.tree, self.tree.table.descriptor(directory), file, given_attributes=given)
                        continue
                self._again(operation.directory, file)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._aside:
                    raise
                # What waits aside takes the room: once that is gone, the file's data is sent again.
                self._stand(operation.directory, file)
                self.lacked.append(file.file)

    def _stand(self, parent: int, file: ops.WholeFile) -> None:
        size = len(file.data)
        self._stands(ops.Entry(parent, file.name, file.file, file.mode, file.uid, file.gid, 0, size, b"", file.xattrs))

    def _again(self, parent: int, file: ops.WholeFile) -> None:
        """A file is here already, or something else is in its way: it becomes what it is at the source."""
        self._stand(parent, file)
        known = self.tree.table.get(file.file)
        self.resize(known, len(file.data))
        if file.data:
            self.copy_data(ops.CopyData(known.id, 0, file.data))
        self.attributes(known, ops.Refresh(known.id, file.mode, file.uid, file.gid, len(file.data), file.xattrs))
        self.tree.apply(ops.SetAttributes(known.id, mtime_ns=file.mtime_ns))

    def _place(self, known: Known, directory: Known, entry: ops.Entry) -> None:
        """A file that is here gets the name: from aside if it waits there, else it has other names and gets one more."""
        aside = self._aside.get(known.id)
        if aside:
            target = self.tree.table.descriptor(directory)
            os.rename(aside.pop(), entry.name, src_dir_fd=self.orphans, dst_dir_fd=target)
        elif known.is_directory:
            raise OSError(errno.EPROTO, f"directory {known.id:x} stands elsewhere")
        else:
            self.tree.apply(ops.Link(known.id, entry.parent, entry.name))

    async def empty_aside(self) -> None:
        """The names are equal: what still waits aside has no name at the source, and its room is needed."""
        await trio.to_thread.run_sync(empty_orphans, self.orphans)
        for number in self._aside:
            known = self.tree.table.find(number)
            if known is not None and not self._has_names(known):
                known.gone = True
                self.tree.table.drop_unused(known)
        self._aside.clear()

    def _has_names(self, known: Known) -> bool:
        try:
            return self.tree.stat(known).st_nlink > 0
        except OSError:
            return False  # its descriptor was closed meanwhile, and its handle leads to nothing any more

    # ---- data

    def _refresh(self, refresh: ops.Refresh) -> None:
        known = self.tree.table.get(refresh.file)
        self.attributes(known, refresh)
        if stat.S_ISREG(refresh.mode):
            self.resize(known, refresh.size)
