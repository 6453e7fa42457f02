"""How much there is to copy: a walk over the tree beside the copy, so that it can say how long it will take.

Nothing depends on the result, so nothing is held still for it: it is an estimate.
"""

import os
import stat
import threading


class Survey:
    """A walk in a thread of its own, which touches nothing but directories and attributes."""

    def __init__(self, root: int) -> None:
        """Begin at a directory descriptor."""
        self._root = root
        self._stopped = False
        self._counted: tuple[int, int] | None = None
        threading.Thread(target=self._walk, name="survey", daemon=True).start()

    @property
    def counted(self) -> tuple[int, int] | None:
        """Bytes of data, and files; None until all were counted."""
        return self._counted

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._stopped = True

    def _walk(self) -> None:
        count_bytes, count_files = 0, 1
        linked: set[int] = set()
        try:
            for _, directories, files, descriptor in os.fwalk(".", dir_fd=self._root):
                count_files += len(directories)
                for name in files:
                    if self._stopped:
                        return
                    try:
                        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if status.st_nlink > 1:
                        if status.st_ino in linked:
                            continue
                        linked.add(status.st_ino)
                    count_files += 1
                    count_bytes += data_bytes(status)
        except (OSError, RecursionError):
            return  # then nobody knows
        self._counted = count_bytes, count_files


def data_bytes(status: os.stat_result) -> int:
    """How many bytes of data a file is likely to have: what is a hole is none."""
    return min(status.st_size, status.st_blocks * 512) if stat.S_ISREG(status.st_mode) else 0
