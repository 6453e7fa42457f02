"""The files that a node knows by id, and the descriptors through which it reaches them.

A known file is reached through an O_PATH descriptor or, where its data is used, a read-write one. Both kinds are kept within
bounds: the longest unused one is closed and opened again by its file handle when it is needed. Three are never closed so: the
descriptor of an open file, of a file that has lost its last name, and of a file with writes that were not synced (its
writeback error would be lost with it).

Not thread-safe: everything here runs in the trio thread. A descriptor that it hands out is good until the next `await`.
"""

import errno
import os
import stat
from collections import OrderedDict
from typing import Final

from mirrorfs import backing

#: Descriptors kept for files that nobody has open; RLIMIT_NOFILE is 20,000 on a small machine.
MAX_PATHS: Final = 6_000
MAX_IDLE_DATA: Final = 2_000


class Known:
    """One known file.

    `lookups` counts what the kernel was told and has not forgotten, `opens` the open handles and running syncs, `kept` those
    who only need that it stays known; `pinned` says that the peer may name it, `gone` that it has no name any more. `version`
    grows with every change of the data, `synced` is the version that is on stable storage. `names` are the directory entries
    that the kernel may have cached; `special` says that a write by an ordinary user must clear setuid or setgid.
    """

    __slots__ = (
        "data",
        "gone",
        "handle",
        "id",
        "kept",
        "kind",
        "lookups",
        "names",
        "opens",
        "path",
        "pinned",
        "special",
        "synced",
        "version",
    )

    def __init__(self, number: int, kind: int) -> None:
        self.id = number
        self.kind = kind
        self.path = -1
        self.data = -1
        self.handle = b""
        self.lookups = 0
        self.opens = 0
        self.kept = 0
        self.version = 0
        self.synced = 0
        self.names: list[tuple[int, bytes]] = []
        self.gone = False
        self.special = False
        self.pinned = False

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == stat.S_IFDIR


class Table:
    """Known files by id; `mount` is a descriptor of their file system."""

    def __init__(self, mount: int) -> None:
        self._mount = mount
        self._files: dict[int, Known] = {}
        self._paths: OrderedDict[int, Known] = OrderedDict()
        self._idle: OrderedDict[int, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def all(self) -> list[Known]:
        """Every known file, as a list of its own."""
        return list(self._files.values())

    def find(self, number: int) -> Known | None:
        """The known file with this id."""
        return self._files.get(number)

    def get(self, number: int) -> Known:
        """The known file with this id; ESTALE if there is none."""
        known = self._files.get(number)
        if known is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return known

    def add(self, number: int, kind: int, path: int) -> Known:
        """The known file with this id, new or not; takes over the O_PATH descriptor `path`."""
        known = self._files.get(number)
        if known is None:
            known = self._files[number] = Known(number, kind)
        if known.path >= 0:
            os.close(path)
            self._paths.move_to_end(number)
        else:
            known.path = path
            self._paths[number] = known
            if len(self._paths) > MAX_PATHS:
                self._close_a_path()
        return known

    def add_made(self, number: int, data: int) -> Known:
        """A regular file that was just made; takes over the read-write descriptor `data`."""
        known = self._files.get(number)
        if known is None:
            known = self._files[number] = Known(number, stat.S_IFREG)
        assert known.data < 0, number
        known.data = data
        if known.opens == 0:
            self._rest(known)
        return known

    def unbind(self, number: int) -> None:
        """Another file underneath is about to take this id over: what the kernel knows and has open leads there from now on."""
        known = self._files.get(number)
        if known is None:
            return
        self._paths.pop(number, None)
        self._idle.pop(number, None)
        for descriptor in (known.path, known.data):
            if descriptor >= 0:
                os.close(descriptor)
        known.path = known.data = -1
        known.handle = b""
        known.gone = False
        known.synced = known.version

    def descriptor(self, known: Known) -> int:
        """A descriptor that names the file (O_PATH or better)."""
        if known.data >= 0:
            return known.data
        if known.path < 0:
            known.path = backing.open_handle(self._mount, known.handle, os.O_PATH | os.O_NOFOLLOW)
            self._paths[known.id] = known
            if len(self._paths) > MAX_PATHS:
                self._close_a_path()
        else:
            self._paths.move_to_end(known.id)
        return known.path

    def proc(self, known: Known) -> str:
        """A path that leads to the file itself, symbolic links included, for calls that take no descriptor."""
        return f"/proc/self/fd/{self.descriptor(known)}"

    def data(self, known: Known) -> int:
        """A read-write descriptor of a regular file."""
        if known.data < 0:
            known.data = os.open(self.proc(known), os.O_RDWR | os.O_CLOEXEC)
            if known.opens == 0:
                self._rest(known)
        elif known.opens == 0:
            self._idle.move_to_end(known.id)
        return known.data

    def hold(self, known: Known) -> int:
        """Like `data` (any descriptor for a directory), and it stays open until `let_go`."""
        if known.kind == stat.S_IFREG:
            descriptor = self.data(known)
            self._idle.pop(known.id, None)
        else:
            descriptor = self.descriptor(known)
        known.opens += 1
        return descriptor

    def let_go(self, known: Known) -> None:
        """The end of a `hold`."""
        known.opens -= 1
        if known.opens == 0 and known.data >= 0:
            self._rest(known)
        self.drop_unused(known)

    def forget(self, known: Known, lookups: int) -> None:
        """The kernel has forgotten the file so many times."""
        known.lookups -= lookups
        assert known.lookups >= 0, (known.id, known.lookups)
        if known.lookups == 0:
            known.names.clear()
            self.drop_unused(known)

    def drop_unused(self, known: Known) -> None:
        """Know no more of a file that the kernel does not know, nobody has open and no peer may name."""
        if known.lookups or known.opens or known.kept or (known.pinned and not known.gone):
            return
        if known.data >= 0 and known.version != known.synced and not known.gone:
            return
        self._files.pop(known.id, None)
        self._paths.pop(known.id, None)
        self._idle.pop(known.id, None)
        for descriptor in (known.path, known.data):
            if descriptor >= 0:
                os.close(descriptor)
        known.path = known.data = -1

    def unsynced_idle(self) -> list[tuple[Known, int]]:
        """Files that nobody has open with writes that were not synced, and the version of each."""
        return [(known, known.version) for known in self._idle.values() if known.version != known.synced]

    @property
    def idle_count(self) -> int:
        """How many data descriptors are kept for files that nobody has open."""
        return len(self._idle)

    def clear(self) -> None:
        """Close everything."""
        for known in self.all():
            for descriptor in (known.path, known.data):
                if descriptor >= 0:
                    os.close(descriptor)
        self._files.clear()
        self._paths.clear()
        self._idle.clear()

    def _rest(self, known: Known) -> None:
        self._idle[known.id] = known
        if len(self._idle) > MAX_IDLE_DATA:
            self._close_idle_data()

    def _close_idle_data(self) -> None:
        """Close an eighth of the idle descriptors; if too few are synced, sync the file system first, here and now."""
        wanted = MAX_IDLE_DATA // 8
        synced = [known for known in self._idle.values() if known.version == known.synced and not known.gone][:wanted]
        if len(synced) < wanted // 2:
            backing.syncfs(self._mount)
            for known in self._idle.values():
                known.synced = known.version
            synced = [known for known in self._idle.values() if not known.gone][:wanted]
        for known in synced:
            self._close_data(known)

    def close_idle(self) -> None:
        """Let go of all files that nobody has open, synced or not: what is deleted from here on gives its room back."""
        for known in [known for known in self._idle.values() if not known.gone]:
            known.synced = known.version
            self._close_data(known)
        for known in self.all():
            self.drop_unused(known)

    def _close_data(self, known: Known) -> None:
        self._remember(known)
        os.close(known.data)
        known.data = -1
        del self._idle[known.id]
        self.drop_unused(known)

    def _close_a_path(self) -> None:
        for _ in range(len(self._paths)):
            number, known = self._paths.popitem(last=False)
            if known.gone or known.opens:
                self._paths[number] = known
                continue
            self._remember(known)
            os.close(known.path)
            known.path = -1
            return

    def _remember(self, known: Known) -> None:
        if not known.handle:
            known.handle = backing.handle_of(known.path if known.path >= 0 else known.data)
