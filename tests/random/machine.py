"""Random operations on a directory, in the manner of fsx and fsstress together, each checked against the model."""

import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from tests.random.contents import Contents
from tests.random.model import UMASK
from tests.random.names import Names


class Exerciser(Contents, Names):
    """Does random operations under a directory of its own; the seed alone decides which.

    The directory must be empty. It is used as root, and no one else may touch it meanwhile.
    """

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed)
        table: list[tuple[Callable[[], None], float]] = [
            (self._create, 6),
            (self._open, 8),
            (self._pwrite, 16),
            (self._append, 5),
            (self._read, 12),
            (self._truncate, 7),
            (self._map, 3),
            (self._store, 8),
            (self._load, 6),
            (self._msync, 0.3),
            (self._unmap, 1),
            (self._fsync, 0.3),
            (self._sync_directory, 0.1),
            (self._close, 5),
            (self._unlink, 5),
            (self._rename, 8),
            (self._link, 3),
            (self._symlink, 2),
            (self._mkdir, 3),
            (self._rmdir, 2),
            (self._mknod, 1),
            (self._chmod, 3),
            (self._chown, 2),
            (self._utimens, 3),
            (self._setxattr, 3),
            (self._getxattr, 2),
            (self._removexattr, 1.5),
            (self._stat, 6),
            (self._readlink, 1),
            (self._list, 2),
            (self._check_all, 1),
        ]
        self._operations = [operation for operation, _ in table]
        self._weights = list(accumulate(weight for _, weight in table))

    def run(self, operations: int) -> None:
        """Do so many operations, then check the whole tree and close everything."""
        umask = os.umask(UMASK)
        try:
            for _ in range(operations):
                self._step += 1
                (operation,) = self._random.choices(self._operations, cum_weights=self._weights)
                self._do(operation)
            self._do(self._check_all)
        finally:
            os.umask(umask)
            self._close_all()

    def _do(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except (OSError, ValueError) as error:  # mmap objects know the size of their file, and say so by a ValueError
            self.fail(f"unexpected {error!r}")
