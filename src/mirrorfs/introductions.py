"""What the peer knows by its id on one stream: the first mention of a file carries a directory entry that leads to it."""

import errno
import os
import stat

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.search import find_names
from mirrorfs.stream import Stream
from mirrorfs.table import Known
from mirrorfs.tree import Tree


class Introductions:
    """The files that the peer knows on `stream`; `known` are their ids. A new stream, and a new era on it, need a new one."""

    def __init__(self, tree: Tree, stream: Stream) -> None:
        self.known: set[int] = set()
        self._tree = tree
        self._stream = stream

    def before(self, change: ops.Change) -> None:
        """Make sure that the peer knows all that a change is about to speak of; OSError if no name of it is known."""
        match change:
            case ops.MakeNode() | ops.Symlink():
                self.introduce(change.parent)
            case ops.Unlink() | ops.RemoveDirectory():
                self.introduce(change.parent)
                self._if_linked(change.parent, change.name)
            case ops.Link():
                self.introduce(change.parent)
                self.introduce(change.file)
            case ops.Rename():
                self.introduce(change.parent)
                self.introduce(change.new_parent)
                self._if_linked(change.new_parent, change.new_name)
            case ops.CopyRange():
                self.introduce(change.source)
                self.introduce(change.file)
            case _:
                self.introduce(change.file)

    def introduce(self, number: int) -> None:
        """Make sure that the peer knows the file by its id: its first mention on the stream carries parent and name."""
        missing: list[ops.Introduce] = []
        while number not in self.known and number != ids.ROOT:
            parent, name = self._place_of(self._tree.table.get(number))
            missing.append(ops.Introduce(parent, name, number))
            number = parent
        for introduction in reversed(missing):
            self._stream.put(introduction)
            self.known.add(introduction.file)

    def _place_of(self, known: Known) -> tuple[int, bytes]:
        try:
            return self._tree.place_of(known)
        except OSError:
            if known.is_directory or known.gone:
                raise
        # It was opened by one of several names, which is gone: read all directories, here and now. That is rare.
        inode = self._tree.stat(known).st_ino
        for way, name in find_names(self._tree.root, {inode}).get(inode, ()):
            parent = ids.ROOT
            for step in way:
                parent = self._tree.lookup(parent, step).id
            if self._tree.holds(self._tree.table.get(parent), name, known.id):
                return parent, name
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def by_entry(self, parent: int, name: bytes, number: int) -> None:
        """As `introduce`, by an entry that is known to lead to the file."""
        if number not in self.known:
            self.introduce(parent)
            self._stream.put(ops.Introduce(parent, name, number))
            self.known.add(number)

    def _if_linked(self, parent: int, name: bytes) -> None:
        """A file that loses one of several names may have no other that this node could introduce it by later."""
        try:
            status = self._tree.glance(parent, name)
            if status is None or stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
                return
            known = self._tree.lookup(parent, name)
        except OSError:
            return
        if known.names:
            self.introduce(known.id)
