"""A file system that loses what was not synced, as a journaling one does.

Two images are kept: what the machine sees, and what is on stable storage. Changes of names and attributes (size included)
become stable in their order, each syncing commits all before it; blocks of data in any order. A loss of power keeps some prefix
of the former and any subset of the latter.
"""

import copy
import errno
import os
import random
import stat
from dataclasses import dataclass, field
from typing import Any, Final

BLOCK: Final = 4096
ROOT: Final = 1
_ZEROS: Final = bytes(BLOCK)


def failure(number: int) -> OSError:
    """The OSError with this errno."""
    return OSError(number, os.strerror(number))


@dataclass
class Inode:
    """A file; `serial` is never used again, `number` (st_ino) is, as real file systems do it."""

    serial: int
    number: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    atime_ns: int = 0
    rdev: int = 0
    links: int = 1
    size: int = 0
    target: bytes = b""
    parent: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    entries: dict[bytes, int] = field(default_factory=dict)
    blocks: dict[int, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)


class Image:
    """All files at one moment. Its methods are the steps of the journal: they succeed, having been checked before."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {ROOT: Inode(ROOT, ROOT, stat.S_IFDIR | 0o755, 0, 0, 0, links=2, parent=ROOT)}

    def make(self, serial: int, number: int, parent: int, name: bytes, mode: int, rdev: int, target: bytes, now: int) -> None:
        inode = Inode(serial, number, mode, 0, 0, now, atime_ns=now, rdev=rdev, target=target, parent=parent)
        inode.size = len(target)
        inode.links = 2 if inode.is_directory else 1
        self.inodes[serial] = inode
        self.inodes[parent].entries[name] = serial
        self._touch(parent, now)

    def link(self, serial: int, parent: int, name: bytes, now: int) -> None:
        self.inodes[serial].links += 1
        self.inodes[parent].entries[name] = serial
        self._touch(parent, now)

    def unlink(self, parent: int, name: bytes, now: int) -> None:
        inode = self.inodes[self.inodes[parent].entries.pop(name)]
        inode.links = 0 if inode.is_directory else inode.links - 1
        self._touch(parent, now)

    def rename(self, old: int, name: bytes, new: int, new_name: bytes, exchange: bool, now: int) -> None:
        moved = self.inodes[old].entries.pop(name)
        other = self.inodes[new].entries.pop(new_name, None)
        self.inodes[new].entries[new_name] = moved
        self._moved(moved, new)
        if other is not None and exchange:
            self.inodes[old].entries[name] = other
            self._moved(other, old)
        elif other is not None:
            inode = self.inodes[other]
            inode.links = 0 if inode.is_directory else inode.links - 1
        self._touch(old, now)
        self._touch(new, now)

    def _moved(self, serial: int, parent: int) -> None:
        self.inodes[serial].parent = parent

    def attribute(self, serial: int, name: str, value: int) -> None:
        if serial in self.inodes:
            setattr(self.inodes[serial], name, value)

    def resize(self, serial: int, size: int) -> None:
        inode = self.inodes.get(serial)
        if inode is None:
            return
        if size < inode.size:
            for block in [block for block in inode.blocks if block * BLOCK >= size]:
                del inode.blocks[block]
            clip(inode, size)
        inode.size = size

    def xattr(self, serial: int, name: bytes, value: bytes | None) -> None:
        inode = self.inodes.get(serial)
        if inode is None:
            return
        if value is None:
            inode.xattrs.pop(name, None)
        else:
            inode.xattrs[name] = value

    def punch(self, serial: int, first: int, last: int) -> None:
        inode = self.inodes.get(serial)
        if inode is not None:
            for block in [block for block in inode.blocks if first <= block < last]:
                del inode.blocks[block]

    def _touch(self, serial: int, now: int) -> None:
        self.inodes[serial].mtime_ns = now

    def collect(self) -> None:
        """Files without a name go, as at a mount after a crash."""
        for serial in [serial for serial, inode in self.inodes.items() if inode.links == 0]:
            del self.inodes[serial]


def clip(inode: Inode, size: int) -> None:
    """Nothing but zeros behind the end of the file, in its last block."""
    block, rest = divmod(size, BLOCK)
    if rest and block in inode.blocks:
        inode.blocks[block] = inode.blocks[block][:rest].ljust(BLOCK, b"\0")


class Disk:
    """One file system; `now` is what the machine sees."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self.now = Image()
        self.stable = Image()
        self._steps: list[tuple[str, tuple[Any, ...]]] = []
        self._committed = 0
        self._touched: dict[int, int] = {}
        self.unsynced: dict[int, set[int]] = {}
        self._serial = ROOT
        self.capacity_blocks: int | None = None
        self.fails_to_sync = False
        self.fails_to_punch = False
        self.fails_to_write = False
        self.delay_s = 0.0

    # ---- changes

    def step(self, kind: str, *arguments: Any, touches: tuple[int, ...]) -> None:
        """Make one step that the journal orders, seen at once and stable later."""
        getattr(self.now, kind)(*arguments)
        self._steps.append((kind, arguments))
        for serial in touches:
            self._touched[serial] = self._committed + len(self._steps)

    def make(self, parent: int, name: bytes, mode: int, now: int, *, rdev: int = 0, target: bytes = b"") -> int:
        """Make a file and return its serial number."""
        self._room_for_one()
        self._serial += 1
        taken = {inode.number for image in (self.now, self.stable) for inode in image.inodes.values()}
        number = next(number for number in range(ROOT + 1, len(taken) + 3) if number not in taken)
        self.step("make", self._serial, number, parent, name, mode, rdev, target, now, touches=(self._serial, parent))
        return self._serial

    def write(self, serial: int, offset: int, data: bytes, now: int) -> int:
        """Write; returns how many bytes found room, ENOSPC if none did."""
        if self.fails_to_write:
            raise failure(errno.EIO)
        inode = self.now.inodes[serial]
        written = 0
        while written < len(data):
            block, start = divmod(offset + written, BLOCK)
            piece = data[written : written + BLOCK - start]
            if block not in inode.blocks and self.is_full:
                if not written:
                    raise failure(errno.ENOSPC)
                break
            old = inode.blocks.get(block, _ZEROS)
            inode.blocks[block] = old[:start] + piece + old[start + len(piece) :]
            self.unsynced.setdefault(serial, set()).add(block)
            written += len(piece)
        if offset + written > inode.size:
            self.step("resize", serial, offset + written, touches=(serial,))
        self.step("attribute", serial, "mtime_ns", now, touches=(serial,))
        return written

    def truncate(self, serial: int, size: int, now: int) -> None:
        """Set the size."""
        inode = self.now.inodes[serial]
        if size < inode.size:
            unsynced = self.unsynced.get(serial, set())
            unsynced -= {block for block in unsynced if block * BLOCK >= size}
            if size % BLOCK and size // BLOCK in inode.blocks:
                self.unsynced.setdefault(serial, set()).add(size // BLOCK)
        self.step("resize", serial, size, touches=(serial,))
        self.step("attribute", serial, "mtime_ns", now, touches=(serial,))

    def punch(self, serial: int, offset: int, size: int, now: int) -> None:
        """Make a hole; partial blocks at its ends are filled with zeros. A disk that fails to has made a part of it."""
        if self.fails_to_punch:
            self.fails_to_punch = False
            self.punch(serial, offset, size // 2, now)
            raise failure(errno.EIO)
        inode = self.now.inodes[serial]
        first, last = -(-offset // BLOCK), (offset + size) // BLOCK
        for start, end in ((offset, min(first * BLOCK, offset + size)), (max(last * BLOCK, offset), offset + size)):
            if start < end and start // BLOCK in inode.blocks:
                block, at = divmod(start, BLOCK)
                old = inode.blocks[block]
                inode.blocks[block] = old[:at] + bytes(end - start) + old[at + end - start :]
                self.unsynced.setdefault(serial, set()).add(block)
        if first < last:
            unsynced = self.unsynced.get(serial, set())
            unsynced -= set(range(first, last))
            self.step("punch", serial, first, last, touches=(serial,))
        self.step("attribute", serial, "mtime_ns", now, touches=(serial,))

    # ---- room

    @property
    def used_blocks(self) -> int:
        """Blocks of files that have a name."""
        return sum(len(inode.blocks) + 1 for inode in self.now.inodes.values() if inode.links)

    @property
    def is_full(self) -> bool:
        """Whether nothing more can be stored."""
        return self.capacity_blocks is not None and self.used_blocks >= self.capacity_blocks

    def _room_for_one(self) -> None:
        if self.is_full:
            raise failure(errno.ENOSPC)

    # ---- making stable

    def sync_file(self, serial: int) -> None:
        """fsync(2)."""
        self._may_sync()
        self._flush(serial, self.unsynced.pop(serial, set()))
        needed = self._touched.get(serial, 0) - self._committed
        if needed > 0:
            self._commit(self._dice.randint(needed, len(self._steps)))
            self._flush_again(serial)

    def sync_all(self) -> None:
        """syncfs(2)."""
        self._may_sync()
        self._commit(len(self._steps))
        for serial, blocks in self.unsynced.items():
            self._flush(serial, blocks)
        self.unsynced.clear()

    def write_back(self) -> None:
        """What the kernel does by itself now and then."""
        self._commit(self._dice.randint(0, len(self._steps)))
        for serial, blocks in list(self.unsynced.items()):
            some = {block for block in sorted(blocks) if self._dice.random() < 0.5}
            self._flush(serial, some)
            # They count as unsynced still: a file that is not stable yet cannot hold them.

    def lose_power(self) -> None:
        """Keep what is stable, and of the rest what chance kept."""
        kept = self._dice.choice((0, len(self._steps), self._dice.randint(0, len(self._steps))))
        self._commit(kept)
        probability = self._dice.choice((0.0, 0.5, 1.0))
        for serial in sorted(self.unsynced):
            self._flush(serial, {block for block in sorted(self.unsynced[serial]) if self._dice.random() < probability})
        self.stable.collect()
        self._begin_again()

    def _begin_again(self) -> None:
        self.now = copy.deepcopy(self.stable)
        self._committed += len(self._steps)
        self._steps.clear()
        self._touched.clear()
        self.unsynced.clear()

    def _may_sync(self) -> None:
        if self.fails_to_sync:
            raise failure(errno.EIO)

    def _commit(self, count: int) -> None:
        for kind, arguments in self._steps[:count]:
            getattr(self.stable, kind)(*arguments)
        del self._steps[:count]
        self._committed += count

    def _flush(self, serial: int, blocks: set[int]) -> None:
        """Blocks of data become stable, as far as the stable file reaches."""
        there, here = self.stable.inodes.get(serial), self.now.inodes.get(serial)
        if there is None or here is None:
            return
        for block in blocks:
            if block * BLOCK < there.size and block in here.blocks:
                there.blocks[block] = here.blocks[block]
        clip(there, there.size)

    def _flush_again(self, serial: int) -> None:
        """The file reaches as far as it does now: its synced blocks may be stable."""
        here = self.now.inodes.get(serial)
        if here is not None:
            self._flush(serial, set(here.blocks))

    # ---- snapshots

    def snapshot(self) -> Image:
        """The stable image, as a snapshot of the volume would have it."""
        return copy.deepcopy(self.stable)

    def restore(self, image: Image) -> None:
        """Go back to a snapshot."""
        self.stable = copy.deepcopy(image)
        self.stable.collect()
        self._begin_again()
