"""The files underneath: the only module that reads and changes them. `Tree.apply` is the same on both nodes.

A file's id stands in its attribute `trusted.mirrorfs` with the volume's id and the backing inode number, and counts only if
both match: what somebody copied or restored underneath has no id. Everything here is synchronous and raises OSError as the
backing store gives it; what can wait long for a disk says so and belongs in a worker thread.
"""

import errno
import logging
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from mirrorfs import backing, contents, notes, search
from mirrorfs.contents import PartialChangeError
from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.table import Known, Table

log = logging.getLogger(__name__)

ID_XATTR: Final = "trusted.mirrorfs"
_OWN_XATTRS: Final = (ID_XATTR, *notes.NAMES)
_ID: Final = struct.Struct("<16sQQ")
_O_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL: Final = stat.S_ISUID | stat.S_ISGID


def _path(descriptor: int) -> str:
    """A path for calls that take no O_PATH descriptor."""
    return f"/proc/self/fd/{descriptor}"


def no_new_ids() -> int | None:
    """The source of ids of a node that may not give any."""
    return None


def no_finder(parent: int, name: bytes) -> None:
    """Nobody wants to know where a file without an id was found."""


class Tree:
    """The tree underneath `root`, a directory descriptor that stays the caller's.

    `new_id` gives the id of a file that has none, or None on a node that may not give ids; only a primary sets it. `on_found`
    is told where such a file was found.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._other_root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        self._device = os.fstat(root).st_dev
        self._volume = b""
        self._can_ask_for_cached = True
        self._buffer = bytearray(1 << 17)
        self.new_id: Callable[[], int | None] = no_new_ids
        self.on_found: Callable[[int, bytes], None] = no_finder
        self.table = Table(root)
        self.notes = notes.Notes(root)
        self._apply: dict[type, Callable[[Any], Any]] = {
            ops.Write: self._write,
            ops.Allocate: self._allocate,
            ops.CopyRange: self._copy_range,
            ops.Times: self._times,
            ops.MakeNode: self._make_node,
            ops.Symlink: self._symlink,
            ops.Link: self._link,
            ops.Unlink: self._unlink,
            ops.RemoveDirectory: self._remove_directory,
            ops.Rename: self._rename,
            ops.SetAttributes: self._set_attributes,
            ops.SetXattr: self._set_xattr,
            ops.RemoveXattr: self._remove_xattr,
            ops.Introduce: self._introduce,
        }
        known = self.table.add(ids.ROOT, stat.S_IFDIR, os.open(".", _O_LOOK, dir_fd=root))
        known.lookups = known.opens = 1

    def set_volume(self, volume: bytes) -> None:
        """Say which volume this is (16 bytes), and note it in the root, durably: ids of any other do not count from now on."""
        assert len(volume) == 16, volume
        self._volume = volume
        self.stamp(self._root, os.fstat(self._root).st_ino, ids.ROOT)
        os.fsync(self._root)  # a record that names another volume than the tree is refused at the start

    def is_of(self, volume: bytes) -> bool:
        """Whether the root says that it is of this volume."""
        try:
            noted: bytes = _ID.unpack(os.getxattr(self._root, ID_XATTR))[0]
        except (OSError, struct.error):
            return False
        return noted == volume

    @property
    def root(self) -> int:
        """The descriptor of its root directory."""
        return self._root

    @property
    def is_empty(self) -> bool:
        """Whether there is no file at all."""
        with os.scandir(self._root) as entries:
            return next(entries, None) is None

    # ---- finding files

    def lookup(self, parent: int, name: bytes) -> Known:
        """The file of that name; ENOENT if there is none."""
        directory = self.table.get(parent)
        if name == b".":
            return directory
        if name == b".." and parent == ids.ROOT:
            return directory
        return self.look_at(self.table.descriptor(directory), name, parent)

    def look_at(self, above: int, name: bytes, parent: int = 0) -> Known:
        """The file of that name in the directory of descriptor `above`, whose id is `parent`."""
        descriptor = os.open(name, _O_LOOK, dir_fd=above)
        try:
            status = os.fstat(descriptor)
            number = self.id_of(_path(descriptor), status)
            if number is None:
                number = self._give_id(descriptor, status, parent, name)
        except BaseException:
            os.close(descriptor)
            raise
        return self.table.add(number, stat.S_IFMT(status.st_mode), descriptor)

    def glance(self, parent: int, name: bytes) -> os.stat_result | None:
        """The status of what stands under a name, None if nothing does; ESTALE for an unknown directory."""
        directory = self.table.get(parent)
        with suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self.table.descriptor(directory), follow_symlinks=False)
        return None

    def peek(self, directory: Known, name: bytes) -> tuple[int | None, os.stat_result]:
        """The id in the file of that name, None if it has none that counts, and its status; nothing is known by it."""
        descriptor = os.open(name, _O_LOOK, dir_fd=self.table.descriptor(directory))
        try:
            status = os.fstat(descriptor)
            return self.id_of(_path(descriptor), status), status
        finally:
            os.close(descriptor)

    def id_of(self, file: int | str, status: os.stat_result) -> int | None:
        """The id in a file, by a path or a descriptor that is not O_PATH; None if it has none that counts."""
        if status.st_dev != self._device:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        try:
            value = os.getxattr(file, ID_XATTR)
            volume, inode, number = _ID.unpack(value)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return None
        except struct.error:
            return None
        return number if volume == self._volume and inode == status.st_ino else None

    def _give_id(self, descriptor: int, status: os.stat_result, parent: int, name: bytes) -> int:
        number = self.new_id()
        if number is None:
            return ids.PROVISIONAL | status.st_ino
        self.on_found(parent, name)
        self.stamp(_path(descriptor), status.st_ino, number)
        log.debug("gave id %x to %r in %x", number, name, parent)
        return number

    def stamp(self, file: int | str, inode: int, number: int) -> None:
        """Write a file's id into its attribute, by a path or a descriptor that is not O_PATH."""
        os.setxattr(file, ID_XATTR, _ID.pack(self._volume, inode, number))

    # ---- reading

    def stat(self, known: Known) -> os.stat_result:
        """What fstat(2) says of the file underneath (its st_ino is the backing one)."""
        return os.fstat(self.table.descriptor(known))

    def names(self, known: Known) -> list[bytes]:
        """The names in a directory, without `.` and `..`, as of now."""
        descriptor = os.open(self.table.proc(known), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return [os.fsencode(name) for name in os.listdir(descriptor)]
        finally:
            os.close(descriptor)

    def name_in(self, parent: int, known: Known) -> bytes:
        """A name of `known` in the directory `parent`; ESTALE if it has none there."""
        for above, name in known.names:
            if above == parent:
                return name
        return search.name_in(self.table.descriptor(self.table.get(parent)), self.stat(known).st_ino)

    def holds(self, parent: Known, name: bytes, number: int) -> bool:
        """Whether the name in that directory leads to the file with this id. Nothing that was known is dropped by looking."""
        before = len(self.table)
        try:
            found = self.lookup(parent.id, name)
        except OSError:
            return False
        if len(self.table) > before:
            self.table.drop_unused(found)
        return found.id == number

    def place_of(self, known: Known) -> tuple[int, bytes]:
        """A directory entry that leads to `known` now: parent and name; ESTALE if none is to be found."""
        for parent, name in reversed(known.names):
            if self.table.find(parent) is not None:
                try:
                    if self.lookup(parent, name) is known:
                        return parent, name
                except OSError:
                    continue
        if not known.is_directory or known.gone:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        parent = self.parent_of(known)
        return parent, self.name_in(parent, known)

    def adopt_provisional(self) -> None:
        """This node may give ids now: what the kernel knows by provisional numbers gets them, and both numbers lead to it."""
        for known in self.table.all():
            if not ids.is_provisional(known.id):
                continue
            descriptor = os.dup(self.table.descriptor(known))
            status = os.fstat(descriptor)
            number = self.id_of(_path(descriptor), status)
            if number is None:
                number = self._give_id(descriptor, status, 0, b"")
            self.table.alias(known, self.table.add(number, known.kind, descriptor))

    def find(self, number: int, handle: bytes) -> Known | None:
        """The file with this id, by its file handle if it is not known; None if it is gone or is another file now."""
        known = self.table.find(number)
        if known is not None:
            return None if known.gone else known
        if not handle:
            return None
        try:
            descriptor = backing.open_handle(self._root, handle, _O_LOOK)
        except OSError:
            return None
        status = os.fstat(descriptor)
        if status.st_nlink == 0 or self.id_of(_path(descriptor), status) != number:
            os.close(descriptor)
            return None
        return self.table.add(number, stat.S_IFMT(status.st_mode), descriptor)

    def parent_of(self, known: Known) -> int:
        """The id of a directory's parent; the root is its own."""
        return known.id if known.id == ids.ROOT else self.lookup(known.id, b"..").id

    def read_cached(self, known: Known, offset: int, size: int) -> memoryview | None:
        """Up to `size` bytes if they are in memory, good until the next await; None if a disk has to be waited for."""
        descriptor = self.table.data(known)
        if not self._can_ask_for_cached:
            return None
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        buffer = memoryview(self._buffer)[:size]
        try:
            count = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._can_ask_for_cached = False
            return None
        if count == size:
            return buffer
        return buffer[:count] if offset + count >= os.fstat(descriptor).st_size else None

    def readlink(self, known: Known) -> bytes:
        """Where a symbolic link points."""
        return os.readlink(b"", dir_fd=self.table.descriptor(known))

    def xattr(self, known: Known, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA if there is none."""
        if os.fsdecode(name) in _OWN_XATTRS:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return os.getxattr(self.table.attributes(known), name)

    def xattrs(self, known: Known) -> list[bytes]:
        """The names of its extended attributes, without our own."""
        return self.foreign(os.listxattr(self.table.attributes(known)))

    @staticmethod
    def foreign(names: list[str]) -> list[bytes]:
        """Names of extended attributes without our own."""
        if names == [ID_XATTR]:
            return []
        return [os.fsencode(name) for name in names if name not in _OWN_XATTRS]

    def statvfs(self) -> os.statvfs_result:
        """Sizes of the file system underneath."""
        return os.fstatvfs(self._root)

    # ---- making durable (these wait for the disk: call them from a worker thread with a held descriptor)

    def syncfs(self) -> None:
        """Make everything durable for a checkpoint; the descriptor is held since the start, so that no error is missed."""
        backing.syncfs(self._root)

    def write_back(self) -> None:
        """Make everything durable, not for a checkpoint: the kernel tells an error once to each descriptor, and this one leaves
        that of `syncfs` alone."""
        backing.syncfs(self._other_root)

    # ---- changing

    def apply(self, change: ops.Change | ops.Introduce | ops.Times) -> Any:
        """Make a change: the same on the primary and on its peer.

        Returns the bytes written for a `Write` and copied for a `CopyRange`, the new file for `MakeNode` and `Symlink`, the
        file that lost a name for `Unlink`, `RemoveDirectory` and a `Rename` over it, else None. Raises OSError if nothing was
        changed, PartialChangeError if some of it was; of `Times` that raise OSError, some may be told.
        """
        return self._apply[type(change)](change)

    def _write(self, change: ops.Write) -> int:
        return contents.write(self.table, change)

    def _allocate(self, change: ops.Allocate) -> None:
        contents.allocate(self.table, change)

    def _copy_range(self, change: ops.CopyRange) -> int:
        return contents.copy_range(self.table, change)

    def _times(self, change: ops.Times) -> None:
        for number, mtime_ns in change.files:
            self._set_times(self.table.get(number), None, mtime_ns)

    def _make_node(self, change: ops.MakeNode) -> Known:
        directory = self.table.descriptor(self.table.get(change.parent))
        kind, permissions = stat.S_IFMT(change.mode), stat.S_IMODE(change.mode) & 0o777
        if kind == stat.S_IFREG:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(change.name, flags, permissions, dir_fd=directory)
        else:
            if kind == stat.S_IFDIR:
                os.mkdir(change.name, permissions, dir_fd=directory)
            else:
                os.mknod(change.name, kind | permissions, change.rdev, dir_fd=directory)
            descriptor = self._open_made(change.name, directory, kind)
        try:
            made = descriptor if kind == stat.S_IFREG else _path(descriptor)
            status = self._own(made, os.fstat(descriptor), change)
            special = stat.S_IMODE(change.mode) & 0o7000
            if status.st_mode & 0o7000 != special or (change.uid, change.gid) != (status.st_uid, status.st_gid):
                # After the chown, which clears them; the permissions are what a default ACL made of them.
                os.chmod(made, stat.S_IMODE(status.st_mode) & 0o777 | special)
        except OSError:
            os.close(descriptor)
            self._undo_make(change.name, directory, kind)
            raise
        if kind == stat.S_IFREG:
            known = self.table.add_made(change.file, descriptor)
            known.special = bool(special & _SPECIAL)
            return known
        return self.table.add(change.file, kind, descriptor)

    def _open_made(self, name: bytes, directory: int, kind: int) -> int:
        try:
            return os.open(name, _O_LOOK, dir_fd=directory)
        except OSError:
            self._undo_make(name, directory, kind)
            raise

    def _own(self, made: int | str, status: os.stat_result, change: ops.MakeNode | ops.Symlink) -> os.stat_result:
        """Give a new file, by a path or a descriptor that is not O_PATH, its owner and id; returns its status from before."""
        if (status.st_uid, status.st_gid) != (change.uid, change.gid):
            os.chown(made, change.uid, change.gid)
        self.stamp(made, status.st_ino, change.file)
        return status

    def _undo_make(self, name: bytes, directory: int, kind: int) -> None:
        with suppress(OSError):
            (os.rmdir if kind == stat.S_IFDIR else os.unlink)(name, dir_fd=directory)

    def _symlink(self, change: ops.Symlink) -> Known:
        directory = self.table.descriptor(self.table.get(change.parent))
        os.symlink(change.target, change.name, dir_fd=directory)
        descriptor = self._open_made(change.name, directory, stat.S_IFLNK)
        try:
            self._own(_path(descriptor), os.fstat(descriptor), change)
        except OSError:
            os.close(descriptor)
            self._undo_make(change.name, directory, stat.S_IFLNK)
            raise
        return self.table.add(change.file, stat.S_IFLNK, descriptor)

    def _link(self, change: ops.Link) -> None:
        directory = self.table.descriptor(self.table.get(change.parent))
        source = self.table.proc(self.table.get(change.file))
        os.link(source, change.name, dst_dir_fd=directory, follow_symlinks=True)

    def _unlink(self, change: ops.Unlink) -> Known:
        victim = self.lookup(change.parent, change.name)
        directory = self.table.descriptor(self.table.get(change.parent))
        os.unlink(change.name, dir_fd=directory)
        return self._lost_name(victim, change.parent, change.name)

    def _remove_directory(self, change: ops.RemoveDirectory) -> Known:
        victim = self.lookup(change.parent, change.name)
        directory = self.table.descriptor(self.table.get(change.parent))
        os.rmdir(change.name, dir_fd=directory)
        return self._lost_name(victim, change.parent, change.name)

    def _lost_name(self, victim: Known, parent: int, name: bytes) -> Known:
        victim.drop_name(parent, name)
        victim.gone = victim.is_directory or self.stat(victim).st_nlink == 0
        self.table.drop_unused(victim)
        return victim

    def _rename(self, change: ops.Rename) -> Known | None:
        moved = self.lookup(change.parent, change.name)
        try:
            replaced: Known | None = self.lookup(change.new_parent, change.new_name)
        except FileNotFoundError:
            replaced = None
        old = self.table.descriptor(self.table.get(change.parent))
        new = self.table.descriptor(self.table.get(change.new_parent))
        if change.flags:
            backing.rename2(old, change.name, new, change.new_name, change.flags)
        else:
            os.rename(change.name, change.new_name, src_dir_fd=old, dst_dir_fd=new)
        if replaced is moved and not change.flags:
            return None  # two names of one file: rename(2) does nothing
        was, now = (change.parent, change.name), (change.new_parent, change.new_name)
        if moved.drop_name(*was):
            moved.add_name(*now)
        self.table.drop_unused(moved)
        if replaced is None:
            return None
        if not change.flags & ops.RENAME_EXCHANGE:
            return self._lost_name(replaced, *now)
        if replaced.drop_name(*now):
            replaced.add_name(*was)
        self.table.drop_unused(replaced)
        return None

    def _set_attributes(self, change: ops.SetAttributes) -> None:
        known = self.table.get(change.file)
        done: dict[str, int | None] = {}
        try:
            if change.uid is not None or change.gid is not None:
                os.chown(
                    self.table.attributes(known),
                    -1 if change.uid is None else change.uid,
                    -1 if change.gid is None else change.gid,
                )
                done["uid"], done["gid"] = change.uid, change.gid
            if change.mode is not None:
                os.chmod(self.table.attributes(known), stat.S_IMODE(change.mode))
                known.special = bool(change.mode & _SPECIAL)
                done["mode"] = change.mode
            if change.size is not None:
                known.version += 1
                os.ftruncate(self.table.data(known), change.size)
                done["size"] = change.size
            if change.atime_ns is not None or change.mtime_ns is not None:
                self._set_times(known, change.atime_ns, change.mtime_ns)
        except OSError as error:
            if done:
                raise PartialChangeError(ops.SetAttributes(change.file, **done), error) from error
            raise

    def _set_times(self, known: Known, atime_ns: int | None, mtime_ns: int | None) -> None:
        status = self.stat(known)
        if status.st_nlink == 0 and not known.gone:
            # Somebody deleted it underneath; a write to a file that is held open would never notice.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        times = (
            status.st_atime_ns if atime_ns is None else atime_ns,
            status.st_mtime_ns if mtime_ns is None else mtime_ns,
        )
        os.utime(self.table.attributes(known), ns=times)

    def _set_xattr(self, change: ops.SetXattr) -> None:
        self._refuse_own_xattr(change.name)
        os.setxattr(self.table.attributes(self.table.get(change.file)), change.name, change.value)

    def _remove_xattr(self, change: ops.RemoveXattr) -> None:
        self._refuse_own_xattr(change.name)
        os.removexattr(self.table.attributes(self.table.get(change.file)), change.name)

    def _introduce(self, change: ops.Introduce) -> None:
        known = self.lookup(change.parent, change.name)
        if known.id != change.file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self.table.pin(known)

    def _refuse_own_xattr(self, name: bytes) -> None:
        if os.fsdecode(name) in _OWN_XATTRS:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
