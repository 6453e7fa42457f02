"""The directory underneath: adoption and release, the lock, and the system calls that Python does not have.

In place, the files of PATH live in `PATH/.mirrorfs/tree`, and PATH itself is made immutable: without a mount, an application
finds an empty directory that it cannot write. With a `backing` directory they live in `BACKING/tree`. Beside `tree` stand
`orphans` (what a resync takes away, until it is deleted) and `lock`.
"""

import array
import ctypes
import errno
import fcntl
import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirrorfs.errors import MirrorfsError

log = logging.getLogger(__name__)

HIDDEN: Final = ".mirrorfs"
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_IMMUTABLE_FL: Final = 0x10
_MNT_DETACH: Final = 2
_AT_EMPTY_PATH: Final = 0x1000
_HANDLE_BYTES: Final = 128

# PyDLL keeps the GIL: these calls are short, and giving it up costs more than they take.
_libc = ctypes.PyDLL(None, use_errno=True)
_slow_libc = ctypes.CDLL(None, use_errno=True)


class _FileHandle(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("kind", ctypes.c_int), ("data", ctypes.c_ubyte * _HANDLE_BYTES))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def handle_of(descriptor: int) -> bytes:
    """The file handle (name_to_handle_at(2)) of an open file: it opens the same file again, wherever it was renamed to."""
    handle = _FileHandle(size=_HANDLE_BYTES)
    mount = ctypes.c_int()
    _check(_libc.name_to_handle_at(descriptor, b"", ctypes.byref(handle), ctypes.byref(mount), _AT_EMPTY_PATH))
    return bytes(memoryview(handle).cast("B")[: 8 + handle.size])


def open_handle(mount: int, handle: bytes, flags: int) -> int:
    """A descriptor for the file of `handle` on the file system of descriptor `mount`; ESTALE if the file is gone."""
    return _check(_libc.open_by_handle_at(mount, ctypes.create_string_buffer(handle, len(handle)), flags | os.O_CLOEXEC))


def rename2(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_directory, old, new_directory, new, flags))


def syncfs(descriptor: int) -> None:
    """syncfs(2): everything of the file system of `descriptor` is on stable storage, or OSError. Blocks without the GIL."""
    _check(_slow_libc.syncfs(descriptor))


def unmount(path: Path) -> None:
    """umount2(2): OSError EBUSY while anybody uses the mount."""
    _check(_slow_libc.umount2(os.fsencode(path), 0))


def detach_mount(path: Path) -> None:
    """Take a mount away from `path` even if it is in use or its daemon is dead; nothing happens if there is none."""
    with suppress(OSError):
        _check(_slow_libc.umount2(os.fsencode(path), _MNT_DETACH))


def set_immutable(path: Path, wanted: bool) -> bool:
    """Set or clear the immutable flag of a directory; False where the file system does not have it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = array.array("L", [0])
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
        flags[0] = flags[0] | _FS_IMMUTABLE_FL if wanted else flags[0] & ~_FS_IMMUTABLE_FL
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL):
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def _mode_file(base: Path) -> Path:
    return base / "path-mode"


def _close_path(path: Path, base: Path) -> None:
    """Make PATH unwritable while nothing is mounted on it."""
    if not set_immutable(path, True):
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode:
            _mode_file(base).write_text(f"{mode:o}\n")
            os.chmod(path, 0)


def _open_path(path: Path, base: Path) -> None:
    set_immutable(path, False)
    with suppress(FileNotFoundError):
        os.chmod(path, int(_mode_file(base).read_text(), 8))
        _mode_file(base).unlink()


@dataclass(frozen=True, slots=True)
class Backing:
    """An adopted and locked directory: descriptors for what stands underneath. They live as long as the process."""

    base: Path
    tree: int
    orphans: int
    lock: int

    def close(self) -> None:
        """Give the lock and the descriptors back."""
        for descriptor in (self.tree, self.orphans, self.lock):
            os.close(descriptor)


def _is_dead(path: Path) -> bool:
    try:
        os.statvfs(path)  # stat(2) may be answered from the kernel's cache
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _lock(base: Path, path: Path) -> int:
    descriptor = os.open(base / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise MirrorfsError(f"{path}: another mirrorfs process has it mounted: `mirrorfs unmount` first") from None
    return descriptor


def adopt(path: Path, backing: Path | None = None) -> Backing:
    """Make `path` ready to be mounted over, moving what it holds underneath, and lock it.

    Every step is a rename that can be repeated, so that an adoption that was interrupted goes on at the next start.
    MirrorfsError if the path is not a directory, is in use, or holds files while `backing` is somewhere else.
    """
    if _is_dead(path):
        log.warning("%s: a dead mount was left there; detaching it", path)
        detach_mount(path)
    if not path.is_dir():
        raise MirrorfsError(f"{path}: not a directory: make it first")
    if os.path.ismount(path) and _fs_type(path).startswith("fuse.mirrorfs"):
        raise MirrorfsError(f"{path}: mirrorfs is mounted there already: `mirrorfs unmount` first")
    base = path / HIDDEN if backing is None else backing
    if not base.is_dir():
        _open_path(path, base)
        try:
            base.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise MirrorfsError(f"{base}: cannot be made: {error.strerror}") from error
    lock = _lock(base, path)
    try:
        for room in ("tree", "orphans"):
            (base / room).mkdir(mode=0o700, exist_ok=True)
        if backing is None:
            _move_entries(path, base)
        elif any(path.iterdir()):
            raise MirrorfsError(f"{path}: has files, but the files are to be in {backing}: move them to {backing / 'tree'}")
        _take_attributes(path, base)
        _close_path(path, base)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return Backing(base, os.open(base / "tree", flags), os.open(base / "orphans", flags), lock)
    except OSError as error:
        os.close(lock)
        raise MirrorfsError(f"{path}: cannot be adopted: {error.strerror}") from error
    except MirrorfsError:
        os.close(lock)
        raise


def _move_entries(path: Path, base: Path) -> None:
    names = [name for name in os.listdir(os.fsencode(path)) if name != HIDDEN.encode()]
    if not names:
        return
    _open_path(path, base)
    for name in names:
        target = os.path.join(os.fsencode(base / "tree"), name)
        if os.path.lexists(target):
            raise MirrorfsError(f"{path}: {os.fsdecode(name)!r} stands both in it and underneath: move one of them away")
        os.rename(os.path.join(os.fsencode(path), name), target)
    log.info("%s: adopted %d entries", path, len(names))


def _take_attributes(path: Path, base: Path) -> None:
    """The first time, the root of the volume gets the owner, mode, attributes and times of PATH."""
    if (base / "adopted").exists():
        return
    _open_path(path, base)
    _copy_attributes(path, base / "tree")
    (base / "adopted").touch()


def _copy_attributes(source: Path, target: Path) -> None:
    before = os.stat(source)
    os.chown(target, before.st_uid, before.st_gid)
    os.chmod(target, stat.S_IMODE(before.st_mode))
    for name in os.listxattr(source):
        if name != "trusted.mirrorfs":
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def _fs_type(path: Path) -> str:
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            left, _, right = line.partition(b" - ")
            if left.split()[4] == os.fsencode(path.absolute()):
                return right.split()[0].decode()
    return ""


def release(path: Path, backing: Path | None = None) -> None:
    """Undo the adoption: the files stand in `path` itself again (with `backing`, they stay where they are, in its `tree`)."""
    base = path / HIDDEN if backing is None else backing
    if _is_dead(path):
        detach_mount(path)
    if os.path.ismount(path) and _fs_type(path).startswith("fuse.mirrorfs"):
        raise MirrorfsError(f"{path}: mirrorfs is mounted there: `mirrorfs unmount` first")
    if not (base / "tree").is_dir():
        raise MirrorfsError(f"{path}: not a directory that mirrorfs has adopted")
    lock = _lock(base, path)
    try:
        _open_path(path, base)
        if backing is None:
            _release_in_place(path, base)
    except OSError as error:
        raise MirrorfsError(f"{path}: cannot be released: {error.strerror}: {error.filename or ''}") from error
    finally:
        os.close(lock)


def _release_in_place(path: Path, base: Path) -> None:
    if os.listdir(base / "orphans"):
        raise MirrorfsError(f"{base / 'orphans'}: not empty: a resync was interrupted; delete what is in it first")
    top, tree = os.fsencode(path), os.fsencode(base / "tree")
    for name in os.listdir(tree):
        os.rename(os.path.join(tree, name), os.path.join(top, name))
    _copy_attributes(base / "tree", path)
    os.rmdir(tree)
    os.rmdir(base / "orphans")
    for own in ("adopted", "lock"):
        with suppress(FileNotFoundError):
            (base / own).unlink()
    os.rmdir(base)
