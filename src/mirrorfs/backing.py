"""The directory underneath: adoption and release, the lock, and the system calls that Python does not have.

In place, the files of PATH live in `PATH/.mirrorfs/tree`, and PATH itself is made immutable: without a mount, an application
finds an empty directory that it cannot write. With a `backing` directory they live in `BACKING/tree`. Beside `tree` stand
`orphans` (what a resync takes away, until it is deleted), `lost` (versions of files that are kept aside) and `lock`.
"""

import array
import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirrorfs.errors import MirrorfsError

log = logging.getLogger(__name__)

HIDDEN: Final = ".mirrorfs"
_ROOMS: Final = ("tree", "orphans", "lost")
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_IMMUTABLE_FL: Final = 0x10
_MNT_DETACH: Final = 2
_AT_EMPTY_PATH: Final = 0x1000
_HANDLE_BYTES: Final = 128
_STATX_BYTES: Final = 256
_STATX_ALL: Final = 0xFFF  # what stat(2) has, and the birth time
_TIMEX_BYTES: Final = 512  # struct timex has 208
_TIME_ERROR: Final = 5

# PyDLL keeps the GIL: for a call that never waits, since giving it up costs more than it takes. A node that waits for its disk
# and keeps it is taken for lost: its heartbeats come from another thread.
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
    return _check(_slow_libc.open_by_handle_at(mount, ctypes.create_string_buffer(handle, len(handle)), flags | os.O_CLOEXEC))


def statx(descriptor: int) -> bytes:
    """statx(2) of an open file (O_PATH too): what stat(2) says and the birth time, as a struct statx."""
    status = ctypes.create_string_buffer(_STATX_BYTES)
    _check(_libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_ALL, status))
    return status.raw


def rename2(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_slow_libc.renameat2(old_directory, old, new_directory, new, flags))


def allocate(descriptor: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2). Of one that fails, a part may have been done."""
    while True:
        with suppress(InterruptedError):
            _check(_slow_libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(size)))
            return


def syncfs(descriptor: int) -> None:
    """syncfs(2): everything of the file system of `descriptor` is on stable storage, or OSError. Blocks without the GIL."""
    _check(_slow_libc.syncfs(descriptor))


def clock_is_kept() -> bool:
    """Whether a time service keeps the clock, as far as adjtimex(2) knows."""
    asked = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: only asked
    return bool(_slow_libc.adjtimex(asked) not in (-1, _TIME_ERROR))


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    number: int
    kind: str


def top_mount(path: Path) -> Mount | None:
    """What is mounted on exactly this path, the uppermost if there are several; `path` must be resolved."""
    found = None
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            fields, _, rest = line.partition(b" - ")
            number, _, _, _, point, *_ = fields.split()
            if re.sub(rb"\\(\d{3})", lambda match: bytes([int(match[1], 8)]), point) == os.fsencode(path):
                found = Mount(int(number), rest.split()[0].decode())
    return found


def is_ours(path: Path) -> bool:
    """Whether a mirrorfs, dead or alive, is mounted on the path."""
    mount = top_mount(path)
    return mount is not None and mount.kind == "fuse.mirrorfs"


def mount_fuse(device: int, path: Path, name: str) -> None:
    """mount(2) of the FUSE connection `device` (an open /dev/fuse) over `path`, with the file types and bits of a real one."""
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    _check(_slow_libc.mount(name.encode(), os.fsencode(path), b"fuse.mirrorfs", 0, options.encode()))


def unmount(path: Path, mount: Mount | None) -> None:
    """Unmount `mount` if it is still the uppermost on `path`; OSError EBUSY while anybody uses it."""
    if mount is not None and top_mount(path) == mount:
        _check(_slow_libc.umount2(os.fsencode(path), 0))


def detach(path: Path, mount: Mount | None) -> None:
    """Take `mount` away from `path` even if it is in use. Nothing else that is mounted there is touched."""
    if mount is not None and top_mount(path) == mount:
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
        text = _mode_file(base).read_text()
        os.chmod(path, int(text, 8) if text.strip() else 0o755)
        _mode_file(base).unlink()


@dataclass(frozen=True, slots=True)
class Backing:
    """An adopted and locked directory: descriptors for what stands underneath. They live as long as the process."""

    base: Path
    tree: int
    orphans: int
    lost: int
    lock: int

    def close(self) -> None:
        """Give the lock and the descriptors back."""
        for descriptor in (self.tree, self.orphans, self.lost, self.lock):
            os.close(descriptor)


def _is_dead(path: Path) -> bool:
    try:
        os.statvfs(path)  # stat(2) may be answered from the kernel's cache
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _refuse_mounted(path: Path) -> None:
    while is_ours(path):
        if not _is_dead(path):
            raise MirrorfsError(f"{path}: mirrorfs is mounted there already: `mirrorfs unmount` first")
        log.warning("%s: a dead mount was left there; detaching it", path)
        detach(path, top_mount(path))


def lock_file(file: Path, held: str) -> int:
    """Lock a file for as long as the descriptor lives; MirrorfsError(held) if another process has it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise MirrorfsError(held) from None
    return descriptor


def _lock(base: Path, path: Path) -> int:
    return lock_file(base / "lock", f"{path}: another mirrorfs process has it mounted: `mirrorfs unmount` first")


def adopt(path: Path, backing: Path | None = None) -> Backing:
    """Make `path` ready to be mounted over, moving what it holds underneath, and lock it.

    `path` is resolved. Every step is a rename that can be repeated, so that an adoption that was interrupted goes on at the
    next start. MirrorfsError if the path is not a directory, is in use, or holds files while `backing` is somewhere else.
    """
    _refuse_mounted(path)
    if not path.is_dir():
        raise MirrorfsError(f"{path}: not a directory: make it first")
    before = os.stat(path)
    base = path / HIDDEN if backing is None else backing
    if not base.is_dir():
        _open_path(path, base)
        try:
            base.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise MirrorfsError(f"{base}: cannot be made: {error.strerror}") from error
    lock = _lock(base, path)
    try:
        for room in _ROOMS:
            (base / room).mkdir(mode=0o700, exist_ok=True)
        if backing is None:
            _move_entries(path, base)
        elif entries(path):
            raise MirrorfsError(f"{path}: has files, but the files are to be in {backing}: move them to {backing / 'tree'}")
        _take_attributes(path, base, before)
        _probe(base / "tree")
        _close_path(path, base)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        tree, orphans, lost = (os.open(base / room, flags) for room in _ROOMS)
        return Backing(base, tree, orphans, lost, lock)
    except OSError as error:
        os.close(lock)
        raise MirrorfsError(f"{path}: cannot be adopted: {error.strerror}") from error
    except MirrorfsError:
        os.close(lock)
        raise


def _probe(tree: Path) -> None:
    """What the tree cannot do without: file handles and trusted attributes."""
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(open_handle(descriptor, handle_of(descriptor), os.O_PATH))
        os.setxattr(descriptor, "trusted.mirrorfs.probe", b"")
        os.removexattr(descriptor, "trusted.mirrorfs.probe")
    except OSError as error:
        raise MirrorfsError(
            f"{tree}: this file system has no file handles or no trusted attributes ({error.strerror}), or this is not "
            "root: use ext4, XFS or btrfs"
        ) from error
    finally:
        os.close(descriptor)


def entries(path: Path) -> list[bytes]:
    """What would be adopted: not our own room, and not what fsck keeps in the root of a file system."""
    own = {HIDDEN.encode()} | ({b"lost+found"} if os.path.ismount(path) else set())
    return [name for name in os.listdir(os.fsencode(path)) if name not in own]


def _move_entries(path: Path, base: Path) -> None:
    names = entries(path)
    if not names:
        return
    for name in names:
        if os.path.ismount(os.path.join(os.fsencode(path), name)):
            raise MirrorfsError(f"{path}: {os.fsdecode(name)!r} is a mount point: mount it elsewhere, it cannot be mirrored")
    _open_path(path, base)
    for name in names:
        target = os.path.join(os.fsencode(base / "tree"), name)
        if os.path.lexists(target):
            raise MirrorfsError(f"{path}: {os.fsdecode(name)!r} stands both in it and underneath: move one of them away")
        os.rename(os.path.join(os.fsencode(path), name), target)
    log.info("%s: adopted %d entries", path, len(names))


def _take_attributes(path: Path, base: Path, before: os.stat_result) -> None:
    """The first time, the root of the volume gets the owner, mode, attributes and times of PATH."""
    if (base / "adopted").exists():
        return
    _open_path(path, base)
    _copy_attributes(path, base / "tree", before)
    (base / "adopted").touch()


def _copy_attributes(source: Path, target: Path, before: os.stat_result) -> None:
    """Owner, mode, extended attributes and the times of `before`, when the entries were not yet moved."""
    os.chown(target, before.st_uid, before.st_gid)
    os.chmod(target, stat.S_IMODE(before.st_mode))
    for name in os.listxattr(source):
        if not name.startswith("trusted.mirrorfs"):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def release(path: Path, backing: Path | None = None) -> None:
    """Undo the adoption: the files stand in `path` itself again (with `backing`, they stay where they are, in its `tree`)."""
    path = Path(os.path.realpath(path))
    base = path / HIDDEN if backing is None else backing
    _refuse_mounted(path)
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
    if (base / "orphans").is_dir() and os.listdir(base / "orphans"):
        raise MirrorfsError(f"{base / 'orphans'}: not empty: a resync was interrupted; delete what is in it first")
    if (base / "lost").is_dir() and any(name.isdigit() for name in os.listdir(base / "lost")):
        raise MirrorfsError(
            f"{base / 'lost'}: versions of files are kept there: `mirrorfs lost export --all DEST` if they are needed, then "
            "`mirrorfs lost drop --all`"
        )
    top, tree = os.fsencode(path), os.fsencode(base / "tree")
    names = os.listdir(tree)
    for name in names:
        if os.path.lexists(os.path.join(top, name)):
            raise MirrorfsError(f"{path}: {os.fsdecode(name)!r} stands both in it and underneath: move one of them away")
    before = os.stat(tree)
    for name in names:
        os.rename(os.path.join(tree, name), os.path.join(top, name))
    _copy_attributes(base / "tree", path, before)
    for own in ("adopted", "lock"):
        with suppress(FileNotFoundError):
            (base / own).unlink()
    with suppress(FileNotFoundError):
        os.rmdir(base / "orphans")
    shutil.rmtree(base / "lost", ignore_errors=True)  # the number of the next batch, and what a crash left of one
    os.rmdir(tree)
    os.rmdir(base)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
