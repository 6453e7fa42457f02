"""What the root of a tree remembers in attributes of its own, hidden by the mount.

They go where the tree goes: a snapshot of it that is put back brings its notes back, and what stands outside does not fit any
more. None is synced when it is made: a checkpoint's syncfs, or the kernel in time, makes it durable.
"""

import os
from typing import Final

_CHECKPOINT: Final = "trusted.mirrorfs.checkpoint"
_PEER_MARKED: Final = "trusted.mirrorfs.peer"
NAMES: Final = (_CHECKPOINT, _PEER_MARKED)


class Notes:
    """The notes of the tree whose root is the descriptor `root`, which stays the caller's; numbers, 0 where there is none."""

    def __init__(self, root: int) -> None:
        self._root = root

    @property
    def checkpoint(self) -> int:
        """The last checkpoint that this tree is, or is about to be, at; it is noted just before the sync that makes it one."""
        return self._number(_CHECKPOINT)

    @checkpoint.setter
    def checkpoint(self, number: int) -> None:
        self._note(_CHECKPOINT, number)

    @property
    def peer_marked(self) -> int:
        """How many records of marks the other node, as the primary, had written at its last change that is known here; 0 if it
        has joined this one since. If it has fewer one day, it was set back."""
        return self._number(_PEER_MARKED)

    @peer_marked.setter
    def peer_marked(self, count: int) -> None:
        self._note(_PEER_MARKED, count)

    def _number(self, name: str) -> int:
        try:
            return int(os.getxattr(self._root, name))
        except (OSError, ValueError):
            return 0

    def _note(self, name: str, number: int) -> None:
        os.setxattr(self._root, name, b"%d" % number)
