"""Versions of files that are kept aside: a divergent side's own, what a repair replaces. Nothing goes unless it is dropped.

They stand beside the tree, on the same file system, so that a copy costs no more than it must (reflinks, where there are any):

    BASE/lost/next           the number of the next batch, so that an id is never given twice
    BASE/lost/7/manifest     why and when, then for each version its path and what of it is here
    BASE/lost/7/1, 2, ...    the versions: files, links, devices as they were; of a directory its attributes only
    BASE/lost/8.new          a batch that is being made, or is being removed

A batch appears by the rename of its directory, after everything in it is on stable storage. One that a crash left half made is
removed when the next one begins: a lock on its directory tells whether somebody is at work in it.

Everything here blocks for the disk: call it from a worker thread. A version that is refused raises OSError as the disk gave it.
"""

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgpack

from mirrorfs import backing
from mirrorfs.core.differences import KINDS
from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.journal import no_fault, sync_directory
from mirrorfs.resync.layout import segments

_FICLONE: Final = 0x40049409
_PIECE: Final = 4 << 20
#: What an object costs besides its data: an inode, its name, its line in the manifest.
_OVERHEAD_BYTES: Final = 8 << 10
_MARGIN_BYTES: Final = 4 << 20
_OWN_XATTRS: Final = "trusted.mirrorfs"
_NEW: Final = ".new"

#: Ranges of a file: (start, end) in bytes.
Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One version that is kept.

    `time` is UNIX time in seconds, `path` from the root of the volume, `size` that of the file as it was, in bytes. `ranges`
    are what makes it a version of its own (None: all). If it is not `whole`, no other bytes than these are kept.
    """

    id: str
    time: float
    why: str
    path: bytes
    kind: str
    size: int
    ranges: Ranges | None
    whole: bool


def needed_bytes(source: int | str, *, ranges: Ranges | None = None, whole: bool = False) -> int:
    """Room that `Batch.keep` of the same may take.

    A reflink takes none at first, and all of it once the file that it was made from is overwritten, which is why it is kept.
    """
    with _looked_at(source) as look:
        status = os.fstat(look)
    if not stat.S_ISREG(status.st_mode):
        return _OVERHEAD_BYTES
    allocated = status.st_blocks * 512
    if ranges is not None and not whole:
        allocated = min(allocated, sum(end - start for start, end in ranges))
    return allocated + _OVERHEAD_BYTES + (24 * len(ranges) if ranges else 0)


class LostStore:
    """The kept versions in `directory`, the `lost` of an adopted directory. Several processes may use it at once.

    `at` is called with the label of each step just before it, as for the journal.
    """

    def __init__(self, directory: Path, *, at: Callable[[str], None] = no_fault) -> None:
        self.directory = directory
        self._at = at

    def require_room(self, count_bytes: int, count: int, what: str = "the versions") -> None:
        """MirrorfsError unless `count` objects of so many bytes in sum fit, with a margin. Ask before anything is touched."""
        status = os.statvfs(self.directory)
        free = status.f_bavail * status.f_frsize
        margin = max(_MARGIN_BYTES, status.f_blocks * status.f_frsize // 100)
        if count_bytes + margin > free:
            raise MirrorfsError(
                f"{what} do not fit: {_mib(count_bytes + margin)} are needed and {_mib(free)} are free beside the tree. "
                "Nothing was touched: make room, then try again"
            )
        if status.f_files and count + 100 > status.f_favail:
            raise MirrorfsError(
                f"{what} do not fit: they are {count} and {status.f_favail} inodes are free beside the tree. Nothing was "
                "touched: make room, then try again"
            )

    # ---- keeping

    def begin(self, why: str, *, key: str = "") -> "Batch":
        """A new batch; `why` is for a person. `key` is for `forget_earlier`."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            self._clear_leftovers()
            number = self._next_number()
            fresh = self.directory / f"{number}{_NEW}"
            fresh.mkdir(mode=0o700)
            return Batch(self, number, why, key, self._at)

    def forget_earlier(self, key: str) -> None:
        """Drop the batches of this key: what they hold is about to be kept once more, since what came after was cut short."""
        for number in self._numbers():
            header, _ = self._read(number)
            if header.get("key") == key:
                self._remove(number)

    def _next_number(self) -> int:
        """Of the next batch: durable before it is used, and never used again."""
        file = self.directory / "next"
        numbers = [*self._numbers(), 0]
        with suppress(FileNotFoundError, ValueError):
            numbers.append(int(file.read_text()) - 1)
        number = max(numbers) + 1
        fresh = file.with_name(f"next{_NEW}")
        with open(fresh, "wb") as stream:
            stream.write(b"%d\n" % (number + 1))
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(fresh, file)
        sync_directory(self.directory)
        return number

    def _clear_leftovers(self) -> None:
        for name in os.listdir(self.directory):
            if name.endswith(_NEW) and (self.directory / name).is_dir():
                descriptor = os.open(self.directory / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(self.directory / name)
                except BlockingIOError:
                    pass  # somebody is at work in it
                finally:
                    os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # ---- what is kept

    def entries(self) -> list[Entry]:
        """All versions that are kept, the oldest batch first; MirrorfsError if a manifest is damaged."""
        return [entry for number in self._numbers() for entry in self._entries_of(number)]

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdigit())

    def _entries_of(self, number: int) -> Iterator[Entry]:
        header, records = self._read(number)
        for count, path, kind, size, ranges, whole in records:
            if os.path.lexists(self.directory / str(number) / str(count)):
                pairs = None if ranges is None else [(start, end) for start, end in ranges]
                yield Entry(f"{number}.{count}", header["time"], header["why"], path, kind, size, pairs, whole)

    def _read(self, number: int) -> tuple[dict[str, Any], list[list[Any]]]:
        manifest = self.directory / str(number) / "manifest"
        try:
            with open(manifest, "rb") as stream:
                header, *records = msgpack.Unpacker(stream, max_buffer_size=0)
            if not isinstance(header, dict) or any(len(record) != 6 for record in records):
                raise ValueError("it is none")
        except FileNotFoundError:
            return {}, []  # dropped since
        except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
            raise MirrorfsError(
                f"{manifest}: damaged: {error}. The versions stand beside it under their numbers, and can be copied by hand"
            ) from error
        return header, records

    # ---- getting them back

    def export(self, identity: str, destination: Path) -> Path:
        """Copy one version to `destination`, or into it if it is a directory; returns where it is now.

        If only a part was kept, it is a sparse file with that part, and a file `NAME.ranges` beside it says which bytes count.
        MirrorfsError if there is no such version or something stands there already.
        """
        entry = self._entry(identity)
        if destination.is_dir():
            destination /= os.fsdecode(os.path.basename(entry.path) or b"root")
        self._export_to(entry, destination)
        self._attributes_again(entry, destination)
        _sync(destination.parent)
        return destination

    def export_all(self, destination: Path) -> int:
        """Copy all versions below `destination`, each batch with its paths in a directory of its number; returns how many."""
        entries = self.entries()
        places = [destination / entry.id.partition(".")[0] / os.fsdecode(entry.path.lstrip(b"/")) for entry in entries]
        found = sorted(zip(places, entries, strict=True), key=lambda pair: pair[0])
        destination.mkdir(parents=True, exist_ok=True)
        for place, entry in found:
            place.parent.mkdir(parents=True, exist_ok=True)
            if entry.kind == "directory":
                place.mkdir(exist_ok=True)
            else:
                self._export_to(entry, place)
        for place, entry in reversed(found):  # a directory's times change while it is filled
            self._attributes_again(entry, place)
        _sync(destination)
        return len(entries)

    def _entry(self, identity: str) -> Entry:
        number, _, _ = identity.partition(".")
        if number.isdecimal():
            for entry in self._entries_of(int(number)):
                if entry.id == identity:
                    return entry
        raise UsageError(f"{identity}: no such version is kept: `mirrorfs lost list` shows all")

    def _object(self, entry: Entry) -> Path:
        number, _, count = entry.id.partition(".")
        return self.directory / number / count

    def _export_to(self, entry: Entry, place: Path) -> None:
        try:
            above = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                look = os.open(self._object(entry), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    _duplicate(look, above, place.name, None)
                finally:
                    os.close(look)
            finally:
                os.close(above)
            if not entry.whole:
                lines = [f"{start} {end}\n" for start, end in entry.ranges or ()]
                text = f"# bytes of {place.name} that were kept: start and end\n" + "".join(lines)
                with open(f"{place}.ranges", "x", encoding="utf-8", errors="surrogateescape") as ranges:
                    ranges.write(text)
        except OSError as error:
            raise MirrorfsError(f"{place}: cannot be written: {error.strerror}") from error

    def _attributes_again(self, entry: Entry, place: Path) -> None:
        look = os.open(self._object(entry), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        copy = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _copy_attributes(look, copy)
        except OSError as error:
            raise MirrorfsError(f"{place}: its owner or attributes cannot be set: {error.strerror}") from error
        finally:
            os.close(look)
            os.close(copy)

    # ---- letting go

    def drop(self, identities: Iterable[str] | None) -> int:
        """Remove these versions for good, None: all; returns how many. UsageError if one of them does not exist."""
        dropped = self.entries() if identities is None else [self._entry(identity) for identity in identities]
        for entry in dropped:
            place = self._object(entry)
            try:
                if entry.kind == "directory":
                    place.rmdir()
                else:
                    place.unlink()
            except OSError as error:
                raise MirrorfsError(f"{entry.id}: cannot be dropped: {error.strerror}") from error
        for number in {int(entry.id.partition(".")[0]) for entry in dropped}:
            if not any(self._entries_of(number)):
                self._remove(number)
        return len(dropped)

    def _remove(self, number: int) -> None:
        with self._locked(), suppress(FileNotFoundError):
            leaving = self.directory / f"{number}{_NEW}"
            os.rename(self.directory / str(number), leaving)
            shutil.rmtree(leaving)


class Batch:
    """Versions that are kept together, or not at all: `commit` or `abort` comes last."""

    def __init__(self, store: LostStore, number: int, why: str, key: str, at: Callable[[str], None]) -> None:
        self.number = number
        self.count = 0
        self._store = store
        self._at = at
        self._place = store.directory / f"{number}{_NEW}"
        # Held from the beginning on: an error of writing back is told by the sync at the end.
        self._directory = os.open(self._place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._directory, fcntl.LOCK_EX)
        self._manifest: BinaryIO = open(self._place / "manifest", "xb")  # noqa: SIM115
        self._manifest.write(msgpack.packb({"why": why, "time": time.time(), "key": key}))

    def keep(self, path: bytes, source: int | str, *, ranges: Ranges | None = None, whole: bool = False) -> None:
        """Keep a version of the file that `source` leads to: a descriptor, O_PATH or better, or a path in /proc/self/fd.

        `path` is what a person knows it by. With `ranges`, only these bytes are kept, unless `whole` says that all are; mode,
        owner, extended attributes and mtime are kept always. OSError, and then `abort` is what is left.
        """
        self._at("lost:keep")
        with _looked_at(source) as look:
            status = os.fstat(look)
            regular = stat.S_ISREG(status.st_mode)
            whole = whole or ranges is None or not regular
            pairs = None if ranges is None or not regular else _merged(ranges, status.st_size)
            name = str(self.count + 1)
            _duplicate(look, self._directory, name, None if whole else pairs)
            copy = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                _copy_attributes(look, copy)
            finally:
                os.close(copy)
        self.count += 1
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "file")
        size = status.st_size if regular else 0
        self._manifest.write(msgpack.packb([self.count, path, kind, size, pairs, whole]))

    def commit(self) -> int:
        """Make all of it durable and visible; returns the number of the batch. OSError, and then nothing was kept."""
        try:
            self._at("lost:fsync")
            self._manifest.flush()
            os.fsync(self._manifest.fileno())
            backing.syncfs(self._directory)
            self._at("lost:rename")
            os.rename(self._place, self._store.directory / str(self.number))
            self._at("lost:fsync-directory")
            sync_directory(self._store.directory)
        except OSError:
            self.abort()
            raise
        self._close()
        return self.number

    def abort(self) -> None:
        """Keep nothing of it; after `commit`, nothing happens."""
        if self._directory >= 0:
            self._close()
            shutil.rmtree(self._place, ignore_errors=True)

    def _close(self) -> None:
        with suppress(OSError):  # a full disk, which was told already
            self._manifest.close()
        os.close(self._directory)
        self._directory = -1


# ---- copies


@contextmanager
def _looked_at(source: int | str) -> Iterator[int]:
    """An O_PATH descriptor of what a descriptor or a path in /proc/self/fd leads to, a symbolic link itself included."""
    look = os.open(f"/proc/self/fd/{source}" if isinstance(source, int) else source, os.O_PATH | os.O_CLOEXEC)
    try:
        yield look
    finally:
        os.close(look)


def _merged(ranges: Ranges, size: int) -> Ranges:
    """The ranges within the file, in order, none touching another."""
    merged: Ranges = []
    for start, end in sorted((start, min(end, size)) for start, end in ranges if start < size):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _duplicate(look: int, directory: int, name: str, ranges: Ranges | None) -> None:
    """Make a copy without its attributes; of a directory, an empty one. FileExistsError if the name is taken."""
    status = os.fstat(look)
    kind = stat.S_IFMT(status.st_mode)
    match kind:
        case stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=directory)
        case stat.S_IFLNK:
            os.symlink(os.readlink(b"", dir_fd=look), os.fsencode(name), dir_fd=directory)
        case stat.S_IFREG:
            source = os.open(f"/proc/self/fd/{look}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                copy = os.open(name, flags, 0o600, dir_fd=directory)
                try:
                    _copy_data(source, copy, status.st_size, ranges)
                finally:
                    os.close(copy)
            finally:
                os.close(source)
        case _:
            os.mknod(name, kind | 0o600, status.st_rdev, dir_fd=directory)


def _copy_data(source: int, copy: int, size: int, ranges: Ranges | None) -> None:
    if ranges is None and _cloned(source, copy):
        return
    os.ftruncate(copy, size)
    for start, end in [(0, size)] if ranges is None else ranges:
        for is_data, first, last in segments(source, start, min(end, size)):
            if is_data:
                _copy_piece(source, copy, first, last)


def _cloned(source: int, copy: int) -> bool:
    try:
        fcntl.ioctl(copy, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


def _copy_piece(source: int, copy: int, start: int, end: int) -> None:
    in_kernel = True
    while start < end:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(source, copy, min(_PIECE, end - start), start, start)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EBADF):
                    raise
        if count == 0:
            in_kernel = False
            data = os.pread(source, min(_PIECE, end - start), start)
            if not data:
                return  # it ends here now
            count = os.pwrite(copy, data, start)
        start += count


def _copy_attributes(look: int, copy: int) -> None:
    """Owner, mode, extended attributes and times, our own identity left out."""
    status, source, target = os.fstat(look), f"/proc/self/fd/{look}", f"/proc/self/fd/{copy}"
    os.chown(target, status.st_uid, status.st_gid)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(_OWN_XATTRS):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _sync(place: Path) -> None:
    """What was exported may be dropped at once: it is on stable storage first."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        backing.syncfs(descriptor)
    except OSError as error:
        raise MirrorfsError(f"{place}: cannot be written: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.1f} MiB"
