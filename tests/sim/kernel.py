"""The system calls that mirrorfs makes, on simulated disks: stands in for `os`, `time`, `shutil` and the calls of `backing`.

Every descriptor belongs to a process. Of a process that has ended no call comes through any more, whatever its tasks still try
on their way out: that is what makes a crash a crash.
"""

import errno
import io
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Protocol, Self

from trio.lowlevel import Task

from mirrorfs.core import operations as ops
from tests.sim.disk import BLOCK, ROOT, Disk, Inode, failure

_PROC: Final = "/proc/self/fd/"
_BEGAN: Final = 1_700_000_000
_PASSED_ON: Final = {"strerror", "fsencode", "fsdecode", "fspath", "path"}
_MOST_BYTES: Final = 1 << 40


class Living(Protocol):
    """A process, as far as system calls are concerned."""

    dead: bool
    #: Tasks that would run if the process did not stand still; None while it does not.
    stopped: list[Task] | None

    @property
    def clock_offset_s(self) -> float:
        """How far the wall clock of its machine is ahead."""


#: The process whose code runs in this task.
running: ContextVar[Living | None] = ContextVar("running", default=None)


@dataclass
class Opened:
    """An open file."""

    disk: Disk
    serial: int
    flags: int
    process: Living
    position: int = 0


class StatePath(PurePosixPath):
    """The path of a state directory on a simulated disk."""

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """It is there already."""


class _Stream(io.BytesIO):
    """What `open(path, "rb")` gives."""

    def __init__(self, kernel: "Kernel", descriptor: int, content: bytes) -> None:
        super().__init__(content)
        self._kernel = kernel
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if not self.closed:
            self._kernel.close(self._descriptor)
        super().close()


class _Scan:
    """What `os.scandir` gives."""

    def __init__(self, entries: list[tuple[str, Inode]]) -> None:
        self._entries = iter([self._entry(name, inode) for name, inode in entries])

    @staticmethod
    def _entry(name: str, inode: Inode) -> Any:
        return SimpleNamespace(name=name, inode=lambda: inode.number, is_dir=lambda follow_symlinks=True: inode.is_directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return self._entries

    def __next__(self) -> Any:
        return next(self._entries)


class Kernel:
    """System calls on the disks of all machines; `clock` gives seconds."""

    def __init__(self, dice: random.Random, clock: Callable[[], float]) -> None:
        self._dice = dice
        self._clock = clock
        self._open: dict[int, Opened] = {}
        self._next = 3
        self._mounts: dict[str, tuple[Disk, Living]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.isupper() or name in _PASSED_ON:
            return getattr(os, name)
        raise AttributeError(f"os.{name} is not simulated")

    # ---- processes

    def mount(self, name: str, disk: Disk, process: Living) -> StatePath:
        """Let a process reach a disk by a path."""
        self._mounts[name] = disk, process
        return StatePath("/" + name)

    def open_root(self, disk: Disk, name: bytes, process: Living) -> int:
        """A descriptor of a directory in the root of a disk, made if it is not there."""
        root = disk.now.inodes[ROOT]
        if name not in root.entries:
            disk.make(ROOT, name, stat.S_IFDIR | 0o755, 0)
            disk.sync_all()
        return self._add(Opened(disk, root.entries[name], os.O_RDONLY, process))

    def _add(self, opened: Opened) -> int:
        number, self._next = self._next, self._next + 1
        self._open[number] = opened
        return number

    def close_all(self, process: Living) -> None:
        """What an ended process had open."""
        for number in [number for number, opened in self._open.items() if opened.process is process]:
            del self._open[number]
        for name in [name for name, (_, owner) in self._mounts.items() if owner is process]:
            del self._mounts[name]

    # ---- resolving

    def _at(self, descriptor: int) -> Opened:
        opened = self._open.get(descriptor)
        if opened is None:
            raise failure(errno.EBADF)
        if opened.process.dead:
            raise failure(errno.EIO)
        return opened

    def _inode(self, opened: Opened) -> Inode:
        return opened.disk.now.inodes[opened.serial]

    def _place(self, path: Any, dir_fd: int | None) -> tuple[Opened, bytes]:
        """The directory of a path, and the name in it; no name stands for the directory itself."""
        name = os.fsencode(path)
        if name.startswith(b"/"):
            _, top, *rest = name.split(b"/")
            found = self._mounts.get(top.decode())
            if found is None or found[1].dead:
                raise failure(errno.EIO)
            assert len(rest) <= 1, path
            return Opened(found[0], ROOT, 0, found[1]), rest[0] if rest else b""
        assert dir_fd is not None, path
        directory = self._at(dir_fd)
        inode = self._inode(directory)
        if not inode.is_directory:
            raise failure(errno.ENOTDIR)
        *above, name = name.split(b"/")
        for each in above:
            directory = Opened(directory.disk, self._serial(directory, each), 0, directory.process)
            inode = self._inode(directory)
            if not inode.is_directory:
                raise failure(errno.ENOTDIR)
        if name == b"..":
            return Opened(directory.disk, inode.parent, 0, directory.process), b""
        return directory, b"" if name == b"." else name

    def _look(self, path: Any, dir_fd: int | None = None) -> Opened:
        """What a path or a descriptor leads to."""
        if isinstance(path, int):
            return self._at(path)
        if isinstance(path, str) and path.startswith(_PROC):
            return self._at(int(path[len(_PROC) :]))
        directory, name = self._place(path, dir_fd)
        return Opened(directory.disk, self._serial(directory, name), 0, directory.process) if name else directory

    def _serial(self, directory: Opened, name: bytes) -> int:
        serial = self._inode(directory).entries.get(name)
        if serial is None:
            raise failure(errno.ENOENT)
        return serial

    @property
    def _now(self) -> int:
        return int(self._wall() * 1e9)

    # ---- descriptors

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if isinstance(path, str) and path.startswith(_PROC):
            found = self._look(path)
        else:
            directory, name = self._place(path, dir_fd)
            if name and flags & os.O_CREAT and name not in self._inode(directory).entries:
                self._may_make(directory, name)
                serial = directory.disk.make(directory.serial, name, stat.S_IFREG | mode, self._now)
            elif flags & os.O_EXCL:
                raise failure(errno.EEXIST)
            else:
                serial = self._serial(directory, name) if name else directory.serial
            found = Opened(directory.disk, serial, flags, directory.process)
        inode = self._inode(found)
        if flags & os.O_DIRECTORY and not inode.is_directory:
            raise failure(errno.ENOTDIR)
        if flags & os.O_TRUNC:
            found.disk.truncate(found.serial, 0, self._now)
        return self._add(Opened(found.disk, found.serial, flags, found.process))

    def close(self, descriptor: int) -> None:
        if self._open.pop(descriptor, None) is None:
            raise failure(errno.EBADF)

    def dup(self, descriptor: int) -> int:
        opened = self._at(descriptor)
        return self._add(Opened(opened.disk, opened.serial, opened.flags, opened.process))

    def open_stream(self, path: Any, mode: str = "r", **_: Any) -> _Stream:
        """The built-in `open`, for reading."""
        assert mode == "rb", mode
        descriptor = self.open(path, os.O_RDONLY)
        return _Stream(self, descriptor, self.pread(descriptor, _MOST_BYTES, 0))

    # ---- status

    def fstat(self, descriptor: int) -> Any:
        return self._status(self._at(descriptor))

    def stat(self, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> Any:
        return self._status(self._look(path, dir_fd))

    def _status(self, opened: Opened) -> Any:
        inode = self._inode(opened)
        return SimpleNamespace(
            st_dev=1,
            st_ino=inode.number,
            st_mode=inode.mode,
            st_nlink=inode.links,
            st_uid=inode.uid,
            st_gid=inode.gid,
            st_rdev=inode.rdev,
            st_size=inode.size,
            st_blksize=BLOCK,
            st_blocks=len(inode.blocks) * (BLOCK // 512),
            st_atime_ns=inode.atime_ns,
            st_mtime_ns=inode.mtime_ns,
            st_ctime_ns=inode.mtime_ns,
        )

    def fstatvfs(self, descriptor: int) -> Any:
        disk = self._at(descriptor).disk
        total = disk.capacity_blocks or 1 << 20
        free = max(total - disk.used_blocks, 0)
        return SimpleNamespace(
            f_frsize=BLOCK, f_bsize=BLOCK, f_blocks=total, f_bfree=free, f_bavail=free, f_files=1 << 20, f_ffree=1 << 19
        )

    def listdir(self, descriptor: int) -> list[str]:
        names = [os.fsdecode(name) for name in self._inode(self._at(descriptor)).entries]
        self._dice.shuffle(names)
        return names

    def scandir(self, descriptor: int) -> _Scan:
        opened = self._at(descriptor)
        inodes = opened.disk.now.inodes
        return _Scan([(os.fsdecode(name), inodes[serial]) for name, serial in self._inode(opened).entries.items()])

    def readlink(self, path: Any, *, dir_fd: int | None = None) -> bytes:
        assert dir_fd is not None
        return self._inode(self._look(path, dir_fd) if path else self._at(dir_fd)).target

    # ---- data

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        inode = self._inode(self._at(descriptor))
        end = min(offset + size, inode.size)
        pieces = []
        while offset < end:
            block, start = divmod(offset, BLOCK)
            count = min(BLOCK - start, end - offset)
            found = inode.blocks.get(block)
            pieces.append(bytes(count) if found is None else found[start : start + count])
            offset += count
        return b"".join(pieces)

    def preadv(self, descriptor: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and self._dice.random() < 0.3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        (buffer,) = buffers
        data = self.pread(descriptor, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def posix_fadvise(self, descriptor: int, offset: int, size: int, advice: int) -> None:
        self._at(descriptor)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        opened = self._at(descriptor)
        assert opened.flags & os.O_ACCMODE != os.O_RDONLY
        return opened.disk.write(opened.serial, offset, bytes(data), self._now) if data else 0

    def write(self, descriptor: int, data: bytes) -> int:
        opened = self._at(descriptor)
        written = self.pwrite(descriptor, data, opened.position)
        opened.position += written
        return written

    def ftruncate(self, descriptor: int, size: int) -> None:
        opened = self._at(descriptor)
        opened.disk.truncate(opened.serial, size, self._now)

    def lseek(self, descriptor: int, offset: int, whence: int) -> int:
        inode = self._inode(self._at(descriptor))
        if offset >= inode.size:
            raise failure(errno.ENXIO)
        block = offset // BLOCK
        if whence == os.SEEK_DATA:
            if block in inode.blocks:
                return offset
            following = [number for number in inode.blocks if number > block]
            if not following:
                raise failure(errno.ENXIO)
            return min(following) * BLOCK
        assert whence == os.SEEK_HOLE, whence
        while block in inode.blocks:
            block += 1
        return min(max(block * BLOCK, offset), inode.size)

    def allocate(self, descriptor: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2): what is reserved reads as a hole, and takes no room; a full disk lets the file grow by a part."""
        opened = self._at(descriptor)
        before = self._inode(opened).size
        end = before if mode & ops.KEEP_SIZE else max(before, offset + size)
        if mode & (ops.PUNCH_HOLE | ops.ZERO_RANGE):
            opened.disk.punch(opened.serial, offset, size, self._now)
        elif opened.disk.is_full:
            part = min(end, before - before % BLOCK + BLOCK * self._dice.randint(0, 2))
            if part > before:
                opened.disk.truncate(opened.serial, part, self._now)
            raise failure(errno.ENOSPC)
        if end > before:
            opened.disk.truncate(opened.serial, end, self._now)

    def copy_file_range(self, source: int, target: int, count: int, offset_src: int, offset_dst: int) -> int:
        """Of what was asked for some kibibytes, now and then."""
        if self._at(source).serial == self._at(target).serial and abs(offset_src - offset_dst) < count:
            raise failure(errno.EINVAL)
        if count > 1024 and self._dice.random() < 0.3:
            count = 1024 * self._dice.randint(1, count // 1024)
        return self.pwrite(target, self.pread(source, count, offset_src), offset_dst)

    # ---- names

    def _may_make(self, directory: Opened, name: bytes) -> None:
        inode = self._inode(directory)
        if not inode.links:
            raise failure(errno.ENOENT)
        if name in inode.entries:
            raise failure(errno.EEXIST)

    def mkdir(self, name: Any, mode: int = 0o777, *, dir_fd: int) -> None:
        self.mknod(name, stat.S_IFDIR | mode, dir_fd=dir_fd)

    def mknod(self, name: Any, mode: int, device: int = 0, *, dir_fd: int) -> None:
        directory, last = self._place(name, dir_fd)
        self._may_make(directory, last)
        directory.disk.make(directory.serial, last, mode, self._now, rdev=device)

    def symlink(self, target: bytes, name: Any, *, dir_fd: int) -> None:
        directory, last = self._place(name, dir_fd)
        self._may_make(directory, last)
        directory.disk.make(directory.serial, last, stat.S_IFLNK | 0o777, self._now, target=target)

    def link(self, source: Any, name: Any, *, dst_dir_fd: int, follow_symlinks: bool = True) -> None:
        directory, last = self._place(name, dst_dir_fd)
        self._may_make(directory, last)
        serial = self._look(source).serial
        if not directory.disk.now.inodes[serial].links:
            raise failure(errno.ENOENT)
        directory.disk.step("link", serial, directory.serial, last, self._now, touches=(serial, directory.serial))

    def unlink(self, name: Any, *, dir_fd: int | None = None) -> None:
        self._remove(name, dir_fd, directories=False)

    def rmdir(self, name: Any, *, dir_fd: int | None = None) -> None:
        self._remove(name, dir_fd, directories=True)

    def _remove(self, name: Any, dir_fd: int | None, *, directories: bool) -> None:
        directory, last = self._place(name, dir_fd)
        serial = self._serial(directory, last)
        inode = directory.disk.now.inodes[serial]
        if directories and not inode.is_directory:
            raise failure(errno.ENOTDIR)
        if inode.is_directory and not directories:
            raise failure(errno.EISDIR)
        if inode.entries:
            raise failure(errno.ENOTEMPTY)
        directory.disk.step("unlink", directory.serial, last, self._now, touches=(serial, directory.serial))

    def rename(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._rename(self._place(old, src_dir_fd), self._place(new, dst_dir_fd), 0)

    replace = rename

    def rename2(self, old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
        self._rename(self._place(old, old_directory), self._place(new, new_directory), flags)

    def _rename(self, old: tuple[Opened, bytes], new: tuple[Opened, bytes], flags: int) -> None:
        (source, name), (target, new_name) = old, new
        serial = self._serial(source, name)
        inodes = source.disk.now.inodes
        other = inodes[target.serial].entries.get(new_name)
        if not inodes[target.serial].links:
            raise failure(errno.ENOENT)
        for moved, into in ((serial, target.serial), *([(other, source.serial)] if flags == 2 and other else [])):
            self._not_below(inodes, moved, into)
        if flags == 1 and other is not None:
            raise failure(errno.EEXIST)
        if flags == 2 and other is None:
            raise failure(errno.ENOENT)
        if other == serial:
            return
        if other is not None and flags != 2:
            there, here = inodes[other], inodes[serial]
            if there.is_directory != here.is_directory:
                raise failure(errno.EISDIR if there.is_directory else errno.ENOTDIR)
            if there.entries:
                raise failure(errno.ENOTEMPTY)
        touches = (serial, source.serial, target.serial, *(() if other is None else (other,)))
        arguments = (source.serial, name, target.serial, new_name, flags == 2, self._now)
        source.disk.step("rename", *arguments, touches=touches)

    @staticmethod
    def _not_below(inodes: dict[int, Inode], moved: int, into: int) -> None:
        if not inodes[moved].is_directory:
            return
        while into != ROOT:
            if into == moved:
                raise failure(errno.EINVAL)
            into = inodes[into].parent

    def rmtree(self, name: Any, *, dir_fd: int) -> None:
        """shutil.rmtree."""
        directory, last = self._place(name, dir_fd)
        serial = self._serial(directory, last)
        inode = directory.disk.now.inodes[serial]
        number = self._add(Opened(directory.disk, serial, 0, directory.process))
        try:
            for below in list(inode.entries):
                if directory.disk.now.inodes[inode.entries[below]].is_directory:
                    self.rmtree(below, dir_fd=number)
                else:
                    self.unlink(below, dir_fd=number)
        finally:
            self.close(number)
        self.rmdir(last, dir_fd=dir_fd)

    # ---- attributes

    def _set(self, path: Any, **values: int) -> None:
        opened = self._look(path)
        for name, value in values.items():
            opened.disk.step("attribute", opened.serial, name, value, touches=(opened.serial,))

    def chown(self, path: Any, uid: int, gid: int) -> None:
        self._set(path, **{name: value for name, value in (("uid", uid), ("gid", gid)) if value != -1})

    def chmod(self, path: Any, mode: int) -> None:
        self._set(path, mode=stat.S_IFMT(self._inode(self._look(path)).mode) | stat.S_IMODE(mode))

    def utime(self, path: Any, *, ns: tuple[int, int]) -> None:
        self._set(path, atime_ns=ns[0], mtime_ns=ns[1])

    def getxattr(self, path: Any, name: str | bytes) -> bytes:
        value = self._inode(self._look(path)).xattrs.get(os.fsencode(name))
        if value is None:
            raise failure(errno.ENODATA)
        return value

    def setxattr(self, path: Any, name: str | bytes, value: bytes) -> None:
        opened = self._look(path)
        opened.disk.step("xattr", opened.serial, os.fsencode(name), value, touches=(opened.serial,))

    def removexattr(self, path: Any, name: str | bytes) -> None:
        self.getxattr(path, name)
        opened = self._look(path)
        opened.disk.step("xattr", opened.serial, os.fsencode(name), None, touches=(opened.serial,))

    def listxattr(self, path: Any) -> list[str]:
        return [os.fsdecode(name) for name in self._inode(self._look(path)).xattrs]

    # ---- handles

    def handle_of(self, descriptor: int) -> bytes:
        return b"handle %d" % self._at(descriptor).serial

    def open_handle(self, mount: int, handle: bytes, flags: int) -> int:
        disk, process = self._at(mount).disk, self._at(mount).process
        serial = int(handle.split()[1])
        inode = disk.now.inodes.get(serial)
        if inode is None or (not inode.links and not self._is_open(disk, serial)):
            raise failure(errno.ESTALE)
        return self._add(Opened(disk, serial, flags, process))

    def _is_open(self, disk: Disk, serial: int) -> bool:
        return any(opened.disk is disk and opened.serial == serial for opened in self._open.values())

    # ---- syncing

    def fsync(self, descriptor: int) -> None:
        opened = self._at(descriptor)
        opened.disk.sync_file(opened.serial)

    fdatasync = fsync

    def syncfs(self, descriptor: int) -> None:
        self._at(descriptor).disk.sync_all()

    # ---- chance and time

    def urandom(self, size: int) -> bytes:
        return self._dice.randbytes(size)

    def time_module(self) -> Any:
        """Stands in for `time`."""

        def strftime(form: str, moment: Any = None) -> str:
            return time.strftime(form, moment or time.gmtime(self._wall()))

        return SimpleNamespace(time=self._wall, monotonic=self._clock, strftime=strftime, localtime=time.gmtime)

    def _wall(self) -> float:
        process = running.get()
        return _BEGAN + self._clock() + (process.clock_offset_s if process is not None else 0.0)
