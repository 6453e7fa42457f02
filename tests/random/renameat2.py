"""The rename with flags, which Python does not have."""

import ctypes
import os

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    """renameat2(2) of two paths; raises OSError."""
    if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)
