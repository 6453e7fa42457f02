"""Modification times: the peer takes the primary's once a file is fsynced, and else a moment after the change.

Between, its own clock stands in the files: one message for every write would cost more than it is worth, and so would one for
every file that is closed. So housekeeping tells those of many files in one operation, and an fdatasync, which does not ask for
times, tells none.
"""

import logging
from collections.abc import Callable
from typing import Final

from mirrorfs.core import operations as ops
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)
#: Of which one operation tells the times: the peer does nothing else meanwhile.
_AT_ONCE: Final = 1000


class Settling:
    """The files whose times the peer must be told once more; each stays known until then. `tell` sends one, or raises
    OSError."""

    def __init__(self, tree: Tree, tell: Callable[[ops.SetAttributes], None]) -> None:
        self._tree = tree
        self._tell = tell
        self._unsettled: dict[int, Known] = {}

    def __bool__(self) -> bool:
        return bool(self._unsettled)

    def note(self, change: ops.Change) -> None:
        """A change was made: the times of these files are others now."""
        match change:
            case ops.Write() | ops.Allocate() | ops.CopyRange():
                self.add(change.file)
            case ops.SetAttributes():
                if change.size is not None:
                    self.add(change.file)
            case ops.Rename():
                self.add(change.parent)
                self.add(change.new_parent)
            case ops.MakeNode() | ops.Symlink():
                self.add(change.parent)
                self.add(change.file)
            case ops.Link() | ops.Unlink() | ops.RemoveDirectory():
                self.add(change.parent)
            case _:
                pass

    def add(self, number: int) -> None:
        """The peer must be told this file's modification time."""
        known = self._tree.table.find(number)
        if known is not None:
            self.add_known(known)

    def add_known(self, known: Known) -> None:
        """As `add`."""
        if known.id not in self._unsettled:
            known.kept += 1
            self._unsettled[known.id] = known

    def settle(self, number: int) -> None:
        """Tell the modification time of a file as it stands here; nobody waits for it."""
        known = self._let_go(number)
        if known is None:
            return
        try:
            if not known.gone:
                self._tell(ops.SetAttributes(number, mtime_ns=self._tree.stat(known).st_mtime_ns))
        except OSError as error:
            log.warning("cannot settle the modification time of %x: %s", number, error.strerror)
        finally:
            self._tree.table.drop_unused(known)

    def settle_all(self) -> None:
        """Settle everything, file by file."""
        for number in list(self._unsettled):
            self.settle(number)

    def settle_together(self, introduce: Callable[[int], None], tell: Callable[[ops.Times], object]) -> None:
        """Settle everything, many files in one operation. `introduce` makes the peer know a file by its id, or raises OSError:
        the others are told all the same."""
        times = list[tuple[int, int]]()
        for number in list(self._unsettled):
            known = self._let_go(number)
            assert known is not None
            try:
                if not known.gone:
                    introduce(number)
                    times.append((number, self._tree.stat(known).st_mtime_ns))
            except OSError as error:
                log.warning("cannot settle the modification time of %x: %s", number, error.strerror)
            finally:
                self._tree.table.drop_unused(known)
        for at in range(0, len(times), _AT_ONCE):
            tell(ops.Times(tuple(times[at : at + _AT_ONCE])))

    def forget_all(self) -> None:
        """Nobody is there to be told."""
        for number in list(self._unsettled):
            known = self._let_go(number)
            if known is not None:
                self._tree.table.drop_unused(known)

    def _let_go(self, number: int) -> Known | None:
        known = self._unsettled.pop(number, None)
        if known is not None:
            known.kept -= 1
        return known
