"""The files that a node knows by id, and the descriptors through which it reaches them.

A known file is reached through an O_PATH descriptor or, where its data is used, a read-write one. Both kinds are kept within
bounds: the longest unused one is closed and opened again by its file handle when it is needed. Three are never closed so: the
descriptor of an open file, of a file that has lost its last name, and of a file with writes that were not synced (its
writeback error would be lost with it).

Not thread-safe: everything here runs in the trio thread. A descriptor that it hands out is good until the next `await`.
"""

import errno
import itertools
import logging
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

from mirrorfs import backing

log = logging.getLogger(__name__)

_CLOSE_AT_ONCE: Final = 64
#: The newest descriptors may have been handed out just now; no step uses more at once.
_IN_HAND: Final = 8
#: One object for each type of file.
_KINDS: Final = {kind: kind for kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)}


class Known:
    """One known file.

    `lookups` counts what the kernel was told and has not forgotten, `opens` the open handles and running syncs, `kept` those
    who only need that it stays known; `pinned` is the era in which the peer may name it, `gone` says that it has no name.
    `version` grows with every change of the data, `synced` is the version that is on stable storage. `used` says when a
    descriptor was last handed out, in uses of the table. `special` says that a write by an ordinary user must clear setuid or
    setgid.
    """

    __slots__ = (
        "data",
        "gone",
        "handle",
        "id",
        "kept",
        "kind",
        "lookups",
        "opens",
        "path",
        "pinned",
        "places",
        "retired",
        "special",
        "synced",
        "used",
        "version",
    )

    def __init__(self, number: int, kind: int) -> None:
        self.id = number
        self.kind = _KINDS.get(kind, kind)
        self.path = -1
        self.data = -1
        self.handle = b""
        self.lookups = 0
        self.opens = 0
        self.kept = 0
        self.version = 0
        self.synced = 0
        self.places: tuple[Any, ...] = ()  # parent, name, parent, name, and so on: a million files are known so
        self.gone = False
        self.special = False
        self.pinned = 0
        self.retired: Sequence[int] = ()
        self.used = 0

    @property
    def names(self) -> list[tuple[int, bytes]]:
        """Directory entries that the kernel may have cached, the newest last: parent and name."""
        return list(zip(self.places[::2], self.places[1::2], strict=True))

    def has_name(self, parent: int, name: bytes) -> bool:
        """Whether it is one of them."""
        places = self.places
        if len(places) == 2:
            return bool(places[1] == name and places[0] == parent)
        return (parent, name) in self.names

    def add_name(self, parent: int, name: bytes, *, oldest: bool = False) -> None:
        """One more of them, unless it is known."""
        if not self.has_name(parent, name):
            self.places = (parent, name, *self.places) if oldest else (*self.places, parent, name)

    def drop_name(self, parent: int, name: bytes) -> bool:
        """It is none of them any more; False if it was none."""
        if not self.has_name(parent, name):
            return False
        self.places = tuple(part for place in self.names if place != (parent, name) for part in place)
        return True

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == stat.S_IFDIR


class Table:
    """Known files by id; `mount` is a descriptor of their file system.

    Of the descriptors that the process may have, three tenths are for files that nobody has open, a tenth for data that
    nobody has open; the rest is for what applications open.
    """

    def __init__(self, mount: int) -> None:
        self._mount = mount
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_paths = limit * 3 // 10
        self._max_idle = limit // 10
        self._aliases: dict[int, Known] = {}
        self._era = 1
        self._uses = 0
        self._files: dict[int, Known] = {}
        self._paths: OrderedDict[int, Known] = OrderedDict()
        self._idle: OrderedDict[int, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def all(self) -> list[Known]:
        """Every known file, as a list of its own."""
        return list(self._files.values())

    def find(self, number: int) -> Known | None:
        """The known file with this number."""
        known = self._files.get(number)
        return known if known is None or not self._aliases else self._aliases.get(number, known)

    def get(self, number: int) -> Known:
        """The known file with this number; ESTALE if there is none."""
        known = self.find(number)
        if known is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return known

    def pin(self, known: Known) -> None:
        """The peer may name the file by its id from now on, until the next `begin_era`."""
        known.pinned = self._era

    def unpin(self, number: int) -> None:
        """The peer does not name the file any more until it introduces it again."""
        known = self.find(number)
        if known is not None:
            known.pinned = 0
            self.drop_unused(known)

    def is_pinned(self, known: Known) -> bool:
        """Whether the peer may name the file."""
        return known.pinned == self._era

    def begin_era(self) -> None:
        """On a new stream no file counts as introduced."""
        self._era += 1

    def alias(self, provisional: Known, real: Known) -> None:
        """What the kernel knows by a provisional number has got an id: from now on the number leads to the file with the id."""
        real.kept += 1
        self._aliases[provisional.id] = real

    def add(self, number: int, kind: int, path: int) -> Known:
        """The known file with this id, new or not; takes over the O_PATH descriptor `path`.

        What is known already stays as it is: during a resync an old file may still carry the id of the one that took its place.
        """
        known = self._files.get(number)
        if known is None:
            known = self._files[number] = Known(number, kind)
        elif known.path >= 0 or known.data >= 0 or (known.handle and known.handle != backing.handle_of(path)):
            os.close(path)
            self._take_in_hand(known)
            return known
        known.path = path
        self._paths[number] = known
        self._take_in_hand(known)
        self._close_paths()
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
        # A worker thread may be reading from them: while the file is open they are not closed, so their numbers stay taken.
        known.retired = [*known.retired, *(descriptor for descriptor in (known.path, known.data) if descriptor >= 0)]
        if known.opens == 0:
            self._close_retired(known)
        known.path = known.data = -1
        known.handle = b""
        known.gone = False
        known.synced = known.version

    def _close_retired(self, known: Known) -> None:
        retired, known.retired = known.retired, ()
        for descriptor in retired:
            os.close(descriptor)

    def descriptor(self, known: Known) -> int:
        """A descriptor that names the file (O_PATH or better)."""
        if known.data >= 0:
            return known.data
        if known.path < 0:
            known.path = backing.open_handle(self._mount, known.handle, os.O_PATH | os.O_NOFOLLOW)
            self._paths[known.id] = known
            self._take_in_hand(known)
            self._close_paths()
        else:
            self._paths.move_to_end(known.id)
            self._take_in_hand(known)
        return known.path

    def _take_in_hand(self, known: Known) -> None:
        """It is about to be used: a file that loses its last name now could not be opened again."""
        self._uses += 1
        known.used = self._uses

    def handle(self, known: Known) -> bytes:
        """Its file handle: it opens the file again, also after a restart of this node."""
        if not known.handle:
            known.handle = backing.handle_of(self.descriptor(known))
        return known.handle

    def proc(self, known: Known) -> str:
        """A path that leads to the file itself, symbolic links included, for calls that take no descriptor."""
        return f"/proc/self/fd/{self.descriptor(known)}"

    def attributes(self, known: Known) -> int | str:
        """What leads calls about attributes to the file: its read-write descriptor, the quicker way, or a path."""
        return known.data if known.data >= 0 else self.proc(known)

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

    def hold_to_sync(self, known: Known) -> int:
        """As `hold`, a descriptor that can be synced; that of a directory is the caller's to close."""
        descriptor = self.hold(known)
        if known.is_directory:
            return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return descriptor

    def let_go(self, known: Known) -> None:
        """The end of a `hold`."""
        known.opens -= 1
        if known.opens == 0:
            self._close_retired(known)
            if known.data >= 0:
                self._rest(known)
        self.drop_unused(known)

    def forget(self, known: Known, lookups: int) -> None:
        """The kernel has forgotten the file so many times."""
        if lookups > known.lookups:
            log.error("a defect: the kernel forgets %x %d times, it was told %d times", known.id, lookups, known.lookups)
        known.lookups = max(known.lookups - lookups, 0)
        if known.lookups:
            return
        known.places = ()
        self.drop_unused(known)
        real = self._aliases.pop(known.id, None)
        if real is not None:
            real.kept -= 1
            self.drop_unused(real)

    def forgotten(self, number: int, lookups: int) -> None:
        """The kernel has forgotten a number so many times, whatever it leads to now."""
        known = self._files.get(number)
        if known is not None:
            self.forget(known, lookups)

    def drop_unused(self, known: Known) -> None:
        """Know no more of a file that the kernel does not know, nobody has open and no peer may name."""
        if known.lookups or known.opens or known.kept or (known.pinned == self._era and not known.gone):
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
    def is_crowded(self) -> bool:
        """Whether so many descriptors are kept for idle data that the file system should be synced to close them."""
        return len(self._idle) > self._max_idle // 2

    def note_synced(self, versions: list[tuple[Known, int]]) -> None:
        """These versions are on stable storage now: what nobody needs is closed."""
        for known, version in versions:
            known.synced = max(known.synced, version)
            self.drop_unused(known)
        self._close_idle_data()

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
        if len(self._idle) > self._max_idle:
            self._close_idle_data(known)

    def _close_idle_data(self, newest: Known | None = None) -> None:
        """Close some idle descriptors that are synced. If too few are, the limit is exceeded until `note_synced`.

        Never that of `newest`: whoever put it there is about to use it, and a file that was just made is in nobody's care yet.
        """
        excess = len(self._idle) - self._max_idle * 3 // 4
        if excess > 0:
            synced = (
                known
                for known in self._idle.values()
                if known.version == known.synced and not known.gone and known is not newest
            )
            for known in list(itertools.islice(synced, excess)):
                self._close_data(known)

    def close_idle(self) -> None:
        """Let go of all files that nobody has open, synced or not: what is deleted from here on gives its room back."""
        for known in [known for known in self._idle.values() if not known.gone]:
            known.synced = known.version
            self._close_data(known)
        for known in self.all():
            self.drop_unused(known)

    def _close_data(self, known: Known) -> None:
        if self._remember(known):
            os.close(known.data)
            known.data = -1
            del self._idle[known.id]
            self.drop_unused(known)

    def _close_paths(self) -> None:
        """Keep the number of path descriptors within its limit; what must stay open is passed over."""
        for _ in range(min(_CLOSE_AT_ONCE, len(self._paths))):
            if len(self._paths) <= self._max_paths:
                return
            number, known = self._paths.popitem(last=False)
            in_hand = self._uses - known.used < _IN_HAND
            if in_hand or known.gone or (known.opens and known.data < 0) or not self._remember(known):
                self._paths[number] = known
                continue
            os.close(known.path)
            known.path = -1
            known.used = 0

    def _remember(self, known: Known) -> bool:
        """Know how to open the file again; False if that cannot be found out, and then its descriptor must stay."""
        if not known.handle:
            try:
                known.handle = backing.handle_of(known.data if known.data >= 0 else known.path)
            except OSError as error:
                log.warning("no file handle for %x: %s", known.id, error.strerror)
                return False
        return True
