"""What the file system says to the session that serves it: errors as errnos, and files as that session wants them described."""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import pyfuse3

from mirrorfs.errors import MirrorfsError
from mirrorfs.space import Space

log = logging.getLogger(__name__)

_NAME_MAX: Final = 255

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def errno_of(error: BaseException, what: str) -> int:
    """The errno of whatever a request has raised; anything unexpected is a defect in `what`, logged, and EIO."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, MirrorfsError):
        return error.errno
    log.error("a defect in %s", what, exc_info=error)
    return errno.EIO


def answered(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The one boundary where errors become errnos for pyfuse3: any other exception would end its main loop. The kernel session
    calls what is wrapped, and has a boundary of its own."""

    @functools.wraps(handler)
    async def answer(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(errno_of(error, handler.__name__)) from None

    return answer  # type: ignore[return-value]  # functools.wraps forgets that `self` may be given by position only


class Answers(Protocol):
    """How files are described. Times are whole seconds for which the kernel may keep what it is told."""

    def attributes(self, number: int, status: os.stat_result, timeout_s: int) -> Any:
        """The attributes of a file, which the kernel may keep for so long."""

    def entry(self, number: int, status: os.stat_result, timeout_s: int) -> Any:
        """A name that leads to this file; the kernel may keep both for so long."""

    def nothing(self, timeout_s: int) -> Any:
        """A name that leads to nothing, which the kernel may keep for so long; None if it cannot."""

    def opened(self, handle: int, *, keep: bool, direct: bool) -> Any:
        """An open file. With `keep`, what is cached of it is good; with `direct`, nothing is cached."""

    def room(self, space: Space) -> Any:
        """Sizes of the file system."""

    def list_entry(self, listed: Any, name: bytes, entry: Any, following: int) -> bool:
        """One more entry in a listing; False if it has no room."""


class Pyfuse3Answers:
    """As pyfuse3 wants them."""

    def attributes(self, number: int, status: os.stat_result, timeout_s: int) -> pyfuse3.EntryAttributes:
        """The attributes of a file, which the kernel may keep for so long."""
        return self.entry(number, status, timeout_s)

    def entry(self, number: int, status: os.stat_result, timeout_s: int) -> pyfuse3.EntryAttributes:
        """A name that leads to this file; the kernel may keep both for so long."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = number
        entry.st_mode = status.st_mode
        entry.st_nlink = status.st_nlink
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_rdev = status.st_rdev
        entry.st_size = status.st_size
        entry.st_blksize = status.st_blksize
        entry.st_blocks = status.st_blocks
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        entry.attr_timeout = entry.entry_timeout = timeout_s
        return entry

    def nothing(self, timeout_s: int) -> None:
        """The kernel could not be made to forget it."""

    def opened(self, handle: int, *, keep: bool, direct: bool) -> pyfuse3.FileInfo:
        """An open file. This session has the kernel look whether what is cached is good, so nothing has to be direct."""
        return pyfuse3.FileInfo(fh=handle, keep_cache=keep)

    def room(self, space: Space) -> pyfuse3.StatvfsData:
        """Sizes of the file system."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = space.block_size
        answer.f_blocks = space.total // space.block_size
        answer.f_bfree = space.free // space.block_size
        answer.f_bavail = space.available // space.block_size
        answer.f_files = space.files
        answer.f_ffree = answer.f_favail = space.files_free
        answer.f_namemax = _NAME_MAX
        return answer

    def list_entry(self, listed: pyfuse3.ReaddirToken, name: bytes, entry: pyfuse3.EntryAttributes, following: int) -> bool:
        """One more entry in a listing; False if it has no room."""
        return pyfuse3.readdir_reply(listed, name, entry, following)
