"""Small files: put there as a whole, and known again when they are others."""

import os
from pathlib import Path

#: What tells files from what they are replaced by or overwritten with; None in place of one that is not there.
Version = tuple[tuple[int, int, int] | None, ...]


def write_durably(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Put a file there as a whole, in place of what was there; OSError if that cannot be. `owner` are user and group."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def version(*files: Path) -> Version:
    """Which files these are now."""
    return tuple(map(_version, files))


def _version(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns
