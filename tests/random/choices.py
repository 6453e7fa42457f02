"""What a random operation is done to: paths, open files, mappings, ranges."""

import mmap
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.random.model import NAME_MAX, File, Node
from tests.random.world import SIZE_LIMIT, World, read_fully

PAGE = 4096

NAMES = [b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"two words", b"new\nline", b"\xff\xfe", "ü".encode(), b"-"]
LONGEST_NAME = b"l" * NAME_MAX
TOO_LONG_NAME = b"t" * (NAME_MAX + 1)


@dataclass(eq=False, slots=True)
class Descriptor:
    """An open regular file, maybe without a name by now."""

    number: int  # of the descriptor among all that the run opened: the same in every run of a seed
    fd: int
    node: File
    flags: int

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    def __str__(self) -> str:
        return f"#{self.number}"


@dataclass(eq=False, slots=True)
class Mapping:
    """A shared mapping of a part of a file; it outlives descriptors and names."""

    number: int
    memory: mmap.mmap
    node: File
    offset: int
    length: int
    writable: bool

    @property
    def usable(self) -> int:
        """How many bytes may be touched: behind the end of the file waits SIGBUS."""
        return max(0, min(self.length, len(self.node.data) - self.offset))

    def __str__(self) -> str:
        return f"map {self.number}"


@dataclass(slots=True)
class Target:
    """What a call about attributes is made on: a path or a descriptor."""

    text: str
    real: bytes | int
    follow: bool
    find: Callable[[], Node]

    def __str__(self) -> str:
        return self.text


class Choices(World):
    """The world with the open files and mappings of a run, and with the dice; the seed alone decides how they fall."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed)
        self._random = random.Random(seed)
        self._descriptors: list[Descriptor] = []
        self._mappings: list[Mapping] = []

    def _close_all(self) -> None:
        for mapping in self._mappings:
            mapping.memory.close()
        for descriptor in self._descriptors:
            os.close(descriptor.fd)
        self._mappings.clear()
        self._descriptors.clear()

    def _new_path(self) -> bytes:
        """A path that may well be free, though it may also be taken, too long, or lead through what is no directory."""
        directory = self._random.choice(self.model.directories)
        name = self._random.choice(NAMES)
        kind = self._random.random()
        if kind < 0.02:
            name = TOO_LONG_NAME
        elif kind < 0.04:
            name = LONGEST_NAME
        elif kind < 0.06:
            name = b"missing/" + name
        elif kind < 0.14 and directory.entries:
            name = self._random.choice(list(directory.entries)) + b"/" + name
        return directory.path + b"/" + name if directory.path else name

    def _path(self, *kinds: type[Node]) -> bytes:
        """The path of something that is there, of one of these kinds if it can be found; rarely any other path."""
        if self._random.random() < 0.06:
            return self._new_path()
        for _ in range(8):
            directory = self._random.choice(self.model.directories)
            names = [name for name, node in directory.entries.items() if isinstance(node, kinds or Node)]
            if names:
                name = self._random.choice(names)
                return directory.path + b"/" + name if directory.path else name
        return self._new_path()

    def _find(self, path: bytes, *, follow: bool) -> Node | None:
        """What is at a path, None if nothing is."""
        try:
            return self.model.reach(path, follow=follow).node
        except OSError:
            return None

    def _last_look(self, path: bytes, *, follow: bool = False) -> None:
        """Often read what is about to be destroyed: a damage that nobody saw before would never be seen."""
        node = self._find(path, follow=follow)
        if isinstance(node, File) and self._random.random() < 0.6:
            self.note(f"read all of {path!r}")
            self.expect_contents(repr(path), node, self.real(path), follow=follow)

    def _look_through(self, descriptor: Descriptor) -> None:
        """Read a whole file through a descriptor, if that can be done."""
        if descriptor.readable and not descriptor.flags & os.O_DIRECT:
            found = read_fully(descriptor.fd, 2 * SIZE_LIMIT, 0)
            self.expect_bytes(str(descriptor), 0, descriptor.node.data, found)

    def _target(self, *, follow: bool | None = None) -> Target:
        if self._descriptors and self._random.random() < 0.3:
            descriptor = self._random.choice(self._descriptors)
            return Target(str(descriptor), descriptor.fd, True, lambda: descriptor.node)
        path = self._path()
        if follow is None:
            follow = self._random.random() < 0.5
        text = f"{path!r}{'' if follow else ' (not followed)'}"
        return Target(text, self.real(path), follow, partial(self.model.find, path, follow=follow))

    def _span(self, size: int, *, direct: bool = False) -> tuple[int, int]:
        """An offset, often within the file or at its end, and a length of at least one; in whole pages if direct."""
        rng = self._random
        kind = rng.random()
        if kind < 0.7:
            offset = rng.randrange(size + 1)
        elif kind < 0.8:
            offset = size
        else:
            offset = size + rng.randrange(64 * 1024)
        length = rng.choice((rng.randint(1, 64), rng.randint(1, PAGE), PAGE, rng.randint(1, 4 * PAGE)))
        if direct or rng.random() < 0.2:
            offset -= offset % PAGE
            length += -length % PAGE
        offset = min(offset, SIZE_LIMIT - 4 * PAGE)
        return offset, min(length, SIZE_LIMIT - offset)
