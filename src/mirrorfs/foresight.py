"""Which changes are sure enough to succeed here that the peer is told of them before they are made: it makes them meanwhile.

A wrong guess costs the peer a resync (`Changes._not_made`), so this refuses whatever an application could bring about at will:
a full disk, a name that is taken, a limit; and after a wrong guess everything, for a while.
"""

import stat
from typing import Final

import trio

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.tree import Tree

#: Room in bytes and files that nobody fills before it is looked at again.
_AMPLE_BYTES: Final = 256 << 20
_AMPLE_FILES: Final = 10_000
_LOOK_S: Final = 0.1
_FIRST_REFUSAL_S: Final = 60.0
_LONGEST_REFUSAL_S: Final = 24 * 3600.0
_NAME_MAX: Final = 255
#: Below the largest file of ext4 with blocks of 1 KiB.
_FILE_MAX: Final = 1 << 33


class Foresight:
    """Looks at the tree, and at the room that there is, without waiting."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._look_at = float("-inf")
        self._is_ample = False
        self._refuses_until = float("-inf")
        self._refuses_for_s = _FIRST_REFUSAL_S

    def was_wrong(self) -> None:
        """A change that it was sure of has failed: it is sure of none for a while, the longer the more often. So what it does
        not know of, a quota say, costs a resync and not one for each write."""
        self._refuses_until = trio.current_time() + self._refuses_for_s
        self._refuses_for_s = min(2 * self._refuses_for_s, _LONGEST_REFUSAL_S)

    def look_again(self) -> None:
        """Much of the room may be taken."""
        self._look_at = float("-inf")

    def has_room(self) -> bool:
        """Whether the disk is far from full."""
        now = trio.current_time()
        if now < self._refuses_until:
            return False
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            room = self._tree.statvfs()
            has_files = not room.f_files or room.f_ffree >= _AMPLE_FILES
            self._is_ample = has_files and room.f_bavail * room.f_frsize >= _AMPLE_BYTES
        return self._is_ample

    def may_write(self, offset: int, size: int) -> bool:
        """Whether a write is sure to succeed."""
        return size > 0 and offset + size <= _FILE_MAX and self.has_room()

    def will_succeed(self, change: ops.Change) -> bool:
        """Whether a change is; False if that is not known."""
        if not self.has_room():
            return False
        match change:
            case ops.Write():
                return self.may_write(change.offset, len(change.data))
            case ops.MakeNode():
                return self._kind(change.parent, change.name) == 0
            case ops.Symlink():
                return len(change.target) <= _NAME_MAX and self._kind(change.parent, change.name) == 0
            case ops.SetAttributes():
                # Of owners there may be quotas, and a size takes or gives room.
                return change.size is None and change.uid is None and change.gid is None and self._is_there(change.file)
            case ops.Unlink():
                return self._is_file(change.parent, change.name)
            case ops.Rename():
                return (
                    not change.flags
                    and change.parent == change.new_parent
                    and self._is_file(change.parent, change.name)
                    and self._kind(change.parent, change.new_name) == 0
                )
            case _:
                return False

    def _is_there(self, number: int) -> bool:
        known = self._tree.table.find(number)
        return known is not None and not known.gone and self._tree.stat(known).st_nlink > 0

    def _is_file(self, parent: int, name: bytes) -> bool:
        return self._kind(parent, name) not in (None, 0, stat.S_IFDIR)

    def _kind(self, parent: int, name: bytes) -> int | None:
        """The type of what stands under a name, 0 for nothing, None if that cannot be said or nothing may stand there."""
        directory = self._tree.table.find(parent)
        if directory is None or directory.gone or not directory.is_directory or not 0 < len(name) <= _NAME_MAX:
            return None
        if parent == ids.ROOT and name in (b".", b".."):
            return None
        try:
            status = self._tree.glance(parent, name)
        except OSError:
            return None
        return 0 if status is None else stat.S_IFMT(status.st_mode)
