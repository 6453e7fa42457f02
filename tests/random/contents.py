"""Random operations on the contents of files: through descriptors, paths and shared mappings."""

import mmap
import os
import stat
from errno import EACCES, EBADF, EINVAL
from pathlib import Path

from tests.random.choices import PAGE, Choices, Descriptor, Mapping
from tests.random.model import File, Node, Special, Symlink, refuse
from tests.random.world import SIZE_LIMIT, read_fully

MAX_DESCRIPTORS = 16
MAX_MAPPINGS = 6
FILE_MODES = [0o644, 0o600, 0o755, 0o4755, 0o2755, 0o2644, 0o6777, 0o1644, 0o000]


class Contents(Choices):
    """Opening, reading, writing, truncating, mapping, syncing."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed)
        self._opened = 0
        self._aligned = mmap.mmap(-1, SIZE_LIMIT)  # O_DIRECT wants aligned memory

    def _create(self) -> None:
        rng = self._random
        flags = os.O_RDWR | os.O_CREAT | rng.choice((0, 0, os.O_EXCL, os.O_TRUNC, os.O_NOFOLLOW))
        self._open_file(self._new_path(), flags)

    def _open(self) -> None:
        rng = self._random
        flags = rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
        for flag, likelihood in (
            (os.O_APPEND, 0.2),
            (os.O_TRUNC, 0.1),
            (os.O_CREAT, 0.1),
            (os.O_NOFOLLOW, 0.1),
            (rng.choice((os.O_SYNC, os.O_DSYNC)), 0.02),
            (os.O_DIRECTORY, 0.02),
            (os.O_DIRECT, 0.1),
        ):
            if rng.random() < likelihood:
                flags |= flag
        if flags & os.O_DIRECTORY:
            flags &= os.O_ACCMODE | os.O_DIRECTORY
        self._open_file(self._path() if rng.random() < 0.1 else self._path(File, Symlink), flags)

    def _open_file(self, path: bytes, flags: int) -> None:
        mode = self._random.choice(FILE_MODES)
        if len(self._descriptors) >= MAX_DESCRIPTORS:
            self._close()
        there = self._find(path, follow=True)
        if isinstance(there, Special) and there.has_type(stat.S_IFCHR):
            return  # whether a device may be opened depends on the mount
        if flags & os.O_APPEND or not (there is None or isinstance(there, File)):
            flags &= ~os.O_DIRECT
        if flags & os.O_TRUNC:
            self._last_look(path, follow=not flags & os.O_NOFOLLOW)
        self.note(f"open {path!r} flags {flags:#o} mode {mode:#o}")
        nodes: list[Node] = []
        fd = self.agree(
            lambda: nodes.append(self.model.open(path, flags, mode)),
            lambda: os.open(self.real(path), flags | os.O_NONBLOCK, mode),
        )
        if fd is None:
            return
        if isinstance(nodes[0], File):
            self._opened += 1
            self._descriptors.append(Descriptor(self._opened, fd, nodes[0], flags))
        else:
            os.close(fd)

    def _close(self) -> None:
        if not self._descriptors:
            return
        descriptor = self._descriptors.pop(self._random.randrange(len(self._descriptors)))
        if descriptor.node.nlink == 0:
            self._look_through(descriptor)
        self.note(f"close {descriptor}")
        self.agree(lambda: None, lambda: os.close(descriptor.fd))

    def _pwrite(self) -> None:
        if self._descriptors:
            descriptor = self._random.choice(self._descriptors)
            if self._random.random() < 0.3:
                self._look_through(descriptor)
            self._write(descriptor, *self._span(len(descriptor.node.data), direct=bool(descriptor.flags & os.O_DIRECT)))

    def _append(self) -> None:
        appending = [descriptor for descriptor in self._descriptors if descriptor.flags & os.O_APPEND]
        if appending:
            descriptor = self._random.choice(appending)
            self._write(descriptor, *self._span(0))

    def _write(self, descriptor: Descriptor, offset: int, length: int) -> None:
        appending = bool(descriptor.flags & os.O_APPEND)
        if appending and len(descriptor.node.data) + length > SIZE_LIMIT:
            return
        data = self._random.randbytes(length)
        self.note(f"pwrite {descriptor} {length} bytes at {'the end' if appending else offset}")

        def predict() -> None:
            if not descriptor.writable:
                refuse(EBADF)
            # Linux ignores the offset of pwrite on O_APPEND.
            descriptor.node.write(len(descriptor.node.data) if appending else offset, data)

        def perform() -> int:
            if not descriptor.flags & os.O_DIRECT:
                return os.pwrite(descriptor.fd, data, offset)
            self._aligned[:length] = data
            with memoryview(self._aligned) as memory, memory[:length] as part:
                return os.pwritev(descriptor.fd, [part], offset)

        written = self.agree(predict, perform)
        if written is not None:
            self.expect("bytes written", length, written)

    def _read(self) -> None:
        if not self._descriptors:
            return
        descriptor = self._random.choice(self._descriptors)
        offset, length = self._span(len(descriptor.node.data), direct=bool(descriptor.flags & os.O_DIRECT))
        self.note(f"pread {descriptor} {length} bytes at {offset}")

        def predict() -> None:
            if not descriptor.readable:
                refuse(EBADF)

        def perform() -> bytes:
            if not descriptor.flags & os.O_DIRECT:
                return read_fully(descriptor.fd, length, offset)
            with memoryview(self._aligned) as memory, memory[:length] as part:
                return bytes(part[: os.preadv(descriptor.fd, [part], offset)])

        data = self.agree(predict, perform)
        if data is not None:
            self.expect_bytes(f"{descriptor}", offset, descriptor.node.data[offset : offset + length], data)

    def _truncate(self) -> None:
        if self._descriptors and self._random.random() < 0.5:
            descriptor = self._random.choice(self._descriptors)
            size, _ = self._span(len(descriptor.node.data))
            self._look_through(descriptor)
            self.note(f"ftruncate {descriptor} to {size}")

            def predict() -> None:
                if not descriptor.writable:
                    refuse(EINVAL)
                descriptor.node.truncate(size)

            self.agree(predict, lambda: os.ftruncate(descriptor.fd, size))
        else:
            path = self._path(File)
            size = self._random.choice((0, self._random.randrange(SIZE_LIMIT), self._random.randrange(4 * PAGE)))
            self._last_look(path, follow=True)
            self.note(f"truncate {path!r} to {size}")
            self.agree(lambda: self.model.truncate(path, size), lambda: os.truncate(self.real(path), size))

    def _map(self) -> None:
        candidates = [d for d in self._descriptors if d.node.data and not d.flags & os.O_DIRECT]
        if not candidates:
            return
        if len(self._mappings) >= MAX_MAPPINGS:
            self._unmap()
        descriptor = self._random.choice(candidates)
        size = len(descriptor.node.data)
        offset = self._random.choice((0, self._random.randrange(size) // PAGE * PAGE))
        length = self._random.choice((size - offset, self._random.randint(1, size - offset)))
        writable = self._random.random() < 0.8
        self.note(f"mmap {descriptor} {length} bytes at {offset}{' for writing' if writable else ''}")

        def predict() -> None:
            if not descriptor.readable or (writable and not descriptor.writable):
                refuse(EACCES)

        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = self.agree(predict, lambda: mmap.mmap(descriptor.fd, length, mmap.MAP_SHARED, protection, offset=offset))
        if memory is not None:
            self._opened += 1
            self._mappings.append(Mapping(self._opened, memory, descriptor.node, offset, length, writable))

    def _some_part(self, mappings: list[Mapping]) -> tuple[Mapping, int, int] | None:
        usable = [mapping for mapping in mappings if mapping.usable]
        if not usable:
            return None
        mapping = self._random.choice(usable)
        start = self._random.randrange(mapping.usable)
        length = min(self._random.randint(1, 3 * PAGE), mapping.usable - start)
        return mapping, start, length

    def _store(self) -> None:
        if part := self._some_part([mapping for mapping in self._mappings if mapping.writable]):
            mapping, start, length = part
            data = self._random.randbytes(length)
            self.note(f"store {length} bytes at {mapping.offset + start} through {mapping}")
            mapping.node.store(mapping.offset + start, data)
            mapping.memory[start : start + length] = data

    def _load(self) -> None:
        if part := self._some_part(self._mappings):
            mapping, start, length = part
            offset = mapping.offset + start
            self.note(f"load {length} bytes at {offset} through {mapping}")
            data = mapping.memory[start : start + length]
            self.expect_bytes(f"{mapping}", offset, mapping.node.data[offset : offset + length], data)

    def _msync(self) -> None:
        if self._mappings:
            mapping = self._random.choice(self._mappings)
            self.note(f"msync {mapping}")
            self.agree(lambda: None, mapping.memory.flush)

    def _unmap(self) -> None:
        if self._mappings:
            mapping = self._mappings.pop(self._random.randrange(len(self._mappings)))
            self.note(f"munmap {mapping}")
            mapping.memory.close()

    def _fsync(self) -> None:
        if self._descriptors:
            descriptor = self._random.choice(self._descriptors)
            sync = self._random.choice((os.fsync, os.fdatasync))
            self.note(f"{sync.__name__} {descriptor}")
            self.agree(lambda: None, lambda: sync(descriptor.fd))
            descriptor.node.stored_through_map = False

    def _sync_directory(self) -> None:
        directory = self._random.choice(self.model.directories)
        self.note(f"fsync {directory.path!r}")
        fd = os.open(self.real(directory.path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.agree(lambda: None, lambda: os.fsync(fd))
        finally:
            os.close(fd)
