"""An application that uses the mount of whichever node serves, and remembers what it was told."""

import errno
import os
import random
import stat
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Final

import pyfuse3
import trio

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.errors import MirrorfsError, NotPrimaryError
from mirrorfs.node import Node
from tests.sim.disk import BLOCK, ROOT, Inode
from tests.sim.kernel import running
from tests.sim.ledger import SECTOR, Found, Key, identity
from tests.sim.machine import Machine
from tests.sim.processes import Process
from tests.sim.world import World

CONTEXT: Final[Any] = SimpleNamespace(uid=0, gid=0, pid=1, umask=0)
#: What may happen to any change while nodes come and go; whether it was made is then not known. Not ESTALE: what was looked
#: up and is not forgotten, and what is open, stays reachable through every change of roles.
_UNCERTAIN: Final = (errno.EIO, errno.EROFS, errno.ENOSPC)
_MAX_DEPTH: Final = 3
_FILES: Final = tuple(b"f%d" % number for number in range(4))
_DIRECTORIES: Final = tuple(b"d%d" % number for number in range(3))


class Place:
    """Something that stands in the tree of a node now."""

    def __init__(self, parent: int, name: bytes, inode: Inode, depth: int, path: tuple[bytes, ...]) -> None:
        self.parent = parent
        self.name = name
        self.inode = inode
        self.id = identity(inode) or 0
        self.depth = depth
        self.path = path


class Application:
    """One writer; it owns what is below the directory of its name, so that nobody else writes there."""

    def __init__(self, world: World, name: bytes, dice: random.Random) -> None:
        self.world = world
        self.name = name
        self._dice = dice
        self._process: Process | None = None
        self._reign = 0
        self._handles: dict[int, int] = {}
        self._looked_up: dict[int, int] = {}
        self._leaves: set[int] = set()
        self._machine: Machine = world.machines["a"]
        self.paused = False
        #: How many changes it makes until it is given a new one.
        self.budget = 0
        self._idle = trio.Event()
        self._idle.set()

    # ---- the life of an application

    async def run(self, pause_s: float) -> None:
        """Make one change after the other."""
        while True:
            await trio.sleep(self._dice.uniform(0, 2 * pause_s))
            if not self.paused and self.budget:
                self.budget -= 1
                self._idle = trio.Event()
                await self.step()
                self._idle.set()

    async def quiet(self) -> None:
        """No more changes; returns when the last one is answered."""
        self.paused = True
        await self._idle.wait()

    async def step(self) -> None:
        """One random change, on a node that serves."""
        machine = self.serving()
        if machine is not None and self._begin_on(machine):
            try:
                await self._some_change(machine)
            finally:
                running.set(None)  # between two calls it is no part of that process

    async def _some_change(self, machine: Machine) -> None:
        places = self.places(machine)
        directories = [place for place in places if place.inode.is_directory]
        files = [place for place in places if stat.S_ISREG(place.inode.mode)]
        if not directories:
            await self.make_directory(None, self.name)
            return
        what = self._dice.choice(self._choices(directories, files))
        try:
            await what(directories, files)
        except pyfuse3.FUSEError as error:
            # Of a look-up or an open.
            if self._process is not None and not self._process.dead and error.errno not in _UNCERTAIN:
                self.world.blame(f"{what.__name__}: unexpected {errno.errorcode.get(error.errno, error.errno)}")

    def _choices(
        self, directories: list[Place], files: list[Place]
    ) -> list[Callable[[list[Place], list[Place]], Awaitable[None]]]:
        choices: list[Callable[[list[Place], list[Place]], Awaitable[None]]] = [self._some_create] * 3
        choices += [self._some_directory] * 2 + [self._some_sync_directory, self._some_symlink]
        if len(directories) > 1:
            choices += [self._some_move_directory, self._some_remove_directory]
        if files:
            choices += [self._some_write] * 8 + [self._some_sync] * 3 + [self._some_rename] * 3
            choices += [self._some_unlink, self._some_link, self._some_truncate, self._some_attributes, self._some_close]
            choices += [self._some_allocate, self._some_copy]
        return choices

    def serving(self) -> Machine | None:
        """The machine that the next change is for."""
        serving = self.world.serving()
        mine = [machine for machine in serving if machine.process is self._process]
        if mine:
            return mine[0]
        return self._dice.choice(serving) if serving else None

    def _begin_on(self, machine: Machine) -> bool:
        process = machine.process
        if process is None or process.node is None:
            return False
        if process is not self._process or process.node.reign != self._reign:
            self._handles.clear()
            if process is not self._process:
                self._looked_up.clear()
            self._process, self._reign = process, process.node.reign
        running.set(process)
        return True

    @property
    def _node(self) -> Node:
        assert self._process is not None
        assert self._process.node is not None
        return self._process.node

    @property
    def _mount(self) -> Any:
        return self._node.operations

    # ---- looking

    def places(self, machine: Machine) -> list[Place]:
        """What stands below this application's directory now, itself first."""
        image = machine.data.now
        root = image.inodes[image.inodes[ROOT].entries[b"tree"]]
        if self.name not in root.entries:
            return []
        found: list[Place] = []

        def add(parent: int, name: bytes, inode: Inode, path: tuple[bytes, ...]) -> None:
            place = Place(parent, name, inode, len(path), (*path, name))
            if not place.id:
                return  # its id was lost with the memory: another file, as far as anybody knows
            found.append(place)
            if inode.is_directory:
                for below, serial in sorted(inode.entries.items()):
                    add(place.id, below, image.inodes[serial], place.path)

        add(ids.ROOT, self.name, image.inodes[root.entries[self.name]], ())
        return found

    def use(self, machine: Machine) -> None:
        """What follows is done on this machine, whose node serves."""
        assert self._begin_on(machine), machine.name
        self._machine = machine

    def find(self, *path: bytes) -> Place:
        """What stands there now, below this application's directory."""
        wanted = (self.name, *path)
        return next(place for place in self.places(self._machine) if place.path == wanted)

    async def look(self, *path: bytes) -> int:
        """Look a path up through the mount; returns the inode number."""
        return await self._walk((self.name, *path))

    async def file(self, parent: bytes, name: bytes, *, sectors: int = 8) -> Place:
        """Make a file with some data in a directory."""
        await self.create(self.find(parent), name)
        await self.write(self.find(parent, name), 0, sectors)
        return self.find(parent, name)

    async def _walk(self, path: tuple[bytes, ...]) -> int:
        number: int = ids.ROOT
        for name in path:
            entry = await self._mount.lookup(number, name, CONTEXT)
            number = entry.st_ino
            if not stat.S_ISDIR(entry.st_mode):
                self._leaves.add(number)
            self._looked_up[number] = self._looked_up.get(number, 0) + 1
        return number

    async def _forget(self) -> None:
        """The kernel forgets some of what it looked up."""
        if self._process is None or self._process.dead:
            return
        # A name that is looked up keeps those above it, and an open file its name.
        kept = self._looked_up if self._handles or self._dice.random() < 0.7 else set()
        for number in [
            number for number in self._looked_up if number not in kept or number in self._leaves - set(self._handles)
        ]:
            if self._dice.random() < 0.4 or not kept:
                await self._mount.forget([(number, self._looked_up.pop(number))])

    # ---- one change

    async def change(
        self, text: str, changes: dict[Key, Any], call: Callable[[], Awaitable[Any]], *, may_refuse: bool = False
    ) -> bool:
        """Ask for a change and note what comes of it; False if that is not known, or nothing.

        With `may_refuse`, EOPNOTSUPP says that nothing was changed.
        """
        world, process = self.world, self._process
        assert process is not None
        record = self._node.keeper.record
        operation = world.next_operation()
        text = f"{process.name}: {operation} {self.name.decode()} {text}"
        ledger = world.ledger_of(record)
        ledger.begin(operation, changes)
        world.note(text)
        done = False
        try:
            with process.call():
                await call()
                done = True
        except pyfuse3.FUSEError as error:
            world.note(f"{operation} failed: {errno.errorcode.get(error.errno, error.errno)}")
            if may_refuse and error.errno == errno.EOPNOTSUPP:
                ledger.reject(operation, changes)
                return False
            if not process.dead and error.errno not in _UNCERTAIN:
                world.blame(f"{text}: unexpected {errno.errorcode.get(error.errno, error.errno)}")
            return False
        epoch = world.on_acknowledged(process, changes=bool(changes)) if done else None
        if epoch is None:
            return False
        world.note(f"{operation} acknowledged in {epoch.number}, in sync {sorted(m.node for m in epoch.in_sync)}")
        world.ledger_of(self._node.keeper.record).confirm(operation, changes)
        await self._forget()
        return True

    async def make_directory(self, parent: Place | None, name: bytes) -> bool:
        """mkdir."""
        above = await self._walk(parent.path if parent else ())
        number = self._next_id()
        key = ("name", parent.id if parent else ids.ROOT, name)

        async def call() -> None:
            entry = await self._mount.mkdir(above, name, stat.S_IFDIR | 0o755, CONTEXT)
            self._looked_up[entry.st_ino] = self._looked_up.get(entry.st_ino, 0) + 1

        return await self.change(f"mkdir {name!r} {number:x}", {key: number, ("mode", number): 0o755}, call)

    def _next_id(self) -> int:
        number = self._node.keeper.next_id()
        self.world.use_id(number)
        return number

    async def create(self, parent: Place, name: bytes) -> bool:
        """Make a file and keep it open."""
        above = await self._walk(parent.path)
        number = self._next_id()

        async def call() -> None:
            info, entry = await self._mount.create(above, name, stat.S_IFREG | 0o644, os.O_RDWR | os.O_EXCL, CONTEXT)
            self._handles[number] = info.fh
            self._looked_up[number] = self._looked_up.get(number, 0) + 1
            assert entry.st_ino == number

        changes = {("name", parent.id, name): number, ("mode", number): 0o644}
        return await self.change(f"create {name!r} in {parent.id:x}: {number:x}", changes, call)

    async def handle(self, place: Place) -> int:
        """An open handle of a file."""
        if place.id not in self._handles:
            number = await self._walk(place.path)
            info = await self._mount.open(number, os.O_RDWR, CONTEXT)
            self._handles[place.id] = info.fh
        return self._handles[place.id]

    async def write(self, place: Place, sector: int, count: int) -> bool:
        """Write whole sectors."""
        handle = await self.handle(place)
        token = self.world.next_operation() << 8
        data = b"".join((token + index).to_bytes(8, "little") * (SECTOR // 8) for index in range(count))
        changes: dict[Key, Any] = {("sector", place.id, sector + index): token + index for index in range(count)}
        changes |= self._growth(place, (sector + count) * SECTOR)

        async def call() -> None:
            written = await self._mount.write(handle, sector * SECTOR, data)
            if written < len(data):
                raise pyfuse3.FUSEError(errno.ENOSPC)

        return await self.change(f"write {place.id:x} sectors {sector}+{count} {token:x}", changes, call)

    def _growth(self, place: Place, end: int, unit: int = BLOCK) -> dict[Key, Any]:
        """What becomes of the size of a file whose bytes up to `end` are changed, perhaps a part of them, in whole units."""
        if end <= place.inode.size:
            return {}
        # A full disk takes whole blocks of it, and a loss of power may leave it at that.
        for part in range(place.inode.size - place.inode.size % unit + unit, end, unit):
            ledger = self.world.ledger_of(self._node.keeper.record)
            ledger.begin(self.world.next_operation(), {("size", place.id): part})
        return {("size", place.id): end}

    async def _ask(self, number: int, change: Callable[[int], ops.Change]) -> Any:
        """What FUSE would ask of the primary for the file that the kernel knows by `number`."""
        primary, known = self._node.primary, self._node.tree.table.get(number)
        try:
            if primary is None:
                raise NotPrimaryError("this node is not the primary")
            return await primary.change(change(known.id), known)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except MirrorfsError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def allocate(self, place: Place, mode: int, sector: int, count: int) -> bool:
        """fallocate, of whole sectors."""
        number = await self._walk(place.path)
        changes: dict[Key, Any] = {}
        if mode & (ops.PUNCH_HOLE | ops.ZERO_RANGE):
            ledger = self.world.ledger_of(self._node.keeper.record)
            written = [key for key in ledger.of_file(place.id) if key[0] == "sector"]
            changes |= {key: 0 for key in written if sector <= key[2] < sector + count}
        if not mode & ops.KEEP_SIZE:
            changes |= self._growth(place, (sector + count) * SECTOR)
        return await self.change(
            f"fallocate {place.id:x} mode {mode:x} sectors {sector}+{count}",
            changes,
            lambda: self._ask(number, lambda file: ops.Allocate(file, mode, sector * SECTOR, count * SECTOR)),
        )

    async def copy(self, source: Place, at: int, place: Place, sector: int, count: int, *, looked_up: bool = False) -> bool:
        """copy_file_range, of whole sectors that the source has; if that is `looked_up`, it need have no name any more."""
        number, other = await self._walk(place.path), source.id if looked_up else await self._walk(source.path)
        tokens = [self._token(source.inode, at + index) for index in range(count)]
        changes: dict[Key, Any] = {("sector", place.id, sector + index): token for index, token in enumerate(tokens)}
        changes |= self._growth(place, (sector + count) * SECTOR, SECTOR)

        async def call() -> None:
            found = self._node.tree.table.get(other).id
            copied = await self._ask(
                number, lambda file: ops.CopyRange(found, at * SECTOR, file, sector * SECTOR, count * SECTOR)
            )
            if copied < count * SECTOR:
                raise pyfuse3.FUSEError(errno.ENOSPC)

        text = f"copy {source.id:x} sectors {at}+{count} to {place.id:x} sector {sector}"
        return await self.change(text, changes, call, may_refuse=True)

    @staticmethod
    def _token(inode: Inode, sector: int) -> int:
        """What was written into a sector; 0 where nothing was."""
        block, start = divmod(sector * SECTOR, BLOCK)
        return int.from_bytes(inode.blocks.get(block, b"")[start : start + 8], "little")

    async def sync(self, place: Place) -> bool:
        """fsync a file or a directory."""
        ledger = self.world.ledger_of(self._node.keeper.record)
        if place.inode.is_directory:
            number = await self._walk(place.path)
            handle = await self._mount.opendir(number, CONTEXT)
            covered = ledger.certain(ledger.of_directory(place.id))
            done = await self.change(f"fsyncdir {place.id:x}", {}, lambda: self._mount.fsyncdir(handle, False))
            if self._process is not None and not self._process.dead:
                await self._mount.releasedir(handle)
        else:
            handle = await self.handle(place)
            covered = ledger.certain(ledger.of_file(place.id))
            done = await self.change(f"fsync {place.id:x}", {}, lambda: self._mount.fsync(handle, False))
        if done:
            self.world.ledger_of(self._node.keeper.record).confirm_sync(covered)
        return done

    async def rename(self, place: Place, into: Place, name: bytes, replaced: Place | None) -> bool:
        """Rename, over what stands there."""
        old, new = await self._walk(place.path[:-1]), await self._walk(into.path)
        await self._walk(place.path)
        if replaced is not None:
            await self._walk(replaced.path)
        changes: dict[Key, Any] = {("name", place.parent, place.name): None, ("name", into.id, name): place.id}
        if replaced is not None and replaced.id == place.id:
            changes = {}
        text = f"rename {place.id:x} {place.name!r} in {place.parent:x} to {name!r} in {into.id:x}"
        return await self.change(text, changes, lambda: self._mount.rename(old, place.name, new, name, 0, CONTEXT))

    async def unlink(self, place: Place) -> bool:
        """Unlink."""
        above = await self._walk(place.path[:-1])
        await self._walk(place.path)
        changes = {("name", place.parent, place.name): None}
        return await self.change(
            f"unlink {place.name!r} in {place.parent:x}: {place.id:x}",
            changes,
            lambda: self._mount.unlink(above, place.name, CONTEXT),
        )

    async def link(self, place: Place, into: Place, name: bytes) -> bool:
        """Give a file one more name."""
        number, above = await self._walk(place.path), await self._walk(into.path)

        async def call() -> None:
            entry = await self._mount.link(number, above, name, CONTEXT)
            self._looked_up[entry.st_ino] = self._looked_up.get(entry.st_ino, 0) + 1

        return await self.change(f"link {place.id:x} as {name!r} in {into.id:x}", {("name", into.id, name): place.id}, call)

    # ---- random changes

    def _free_name(self, directory: Place, names: tuple[bytes, ...]) -> bytes | None:
        free = [name for name in names if name not in directory.inode.entries]
        return self._dice.choice(free) if free else None

    async def _some_create(self, directories: list[Place], files: list[Place]) -> None:
        parent = self._dice.choice(directories)
        name = self._free_name(parent, _FILES)
        if name is not None:
            await self.create(parent, name)

    async def _some_directory(self, directories: list[Place], files: list[Place]) -> None:
        parent = self._dice.choice(directories)
        name = self._free_name(parent, _DIRECTORIES)
        if name is not None and parent.depth < _MAX_DEPTH:
            await self.make_directory(parent, name)

    async def _some_symlink(self, directories: list[Place], files: list[Place]) -> None:
        parent = self._dice.choice(directories)
        name = self._free_name(parent, (b"l0", b"l1"))
        if name is None:
            return
        above = await self._walk(parent.path)
        number = self._next_id()
        changes = {("name", parent.id, name): number, ("mode", number): 0o777}

        async def call() -> None:
            entry = await self._mount.symlink(above, name, b"target %d" % number, CONTEXT)
            self._looked_up[entry.st_ino] = self._looked_up.get(entry.st_ino, 0) + 1

        await self.change(f"symlink {name!r} in {parent.id:x}: {number:x}", changes, call)

    async def _some_write(self, directories: list[Place], files: list[Place]) -> None:
        place = self._dice.choice(files)
        sectors = place.inode.size // SECTOR
        far = self._dice.choice((0, 0, 0, 0, 70, 5000))
        await self.write(place, min(self._dice.randint(0, sectors + 2), 300) + far, self._dice.choice((1, 1, 2, 5)))

    async def _some_sync(self, directories: list[Place], files: list[Place]) -> None:
        await self.sync(self._dice.choice(files))

    async def _some_sync_directory(self, directories: list[Place], files: list[Place]) -> None:
        await self.sync(self._dice.choice(directories))

    async def _some_rename(self, directories: list[Place], files: list[Place]) -> None:
        place, into, name = self._dice.choice(files), self._dice.choice(directories), self._dice.choice(_FILES)
        replaced = next((file for file in files if (file.parent, file.name) == (into.id, name)), None)
        await self.rename(place, into, name, replaced)

    async def _some_move_directory(self, directories: list[Place], files: list[Place]) -> None:
        place, into = self._dice.choice(directories[1:]), self._dice.choice(directories)
        name = self._free_name(into, _DIRECTORIES)
        if name is not None and into.path[: len(place.path)] != place.path and into.depth < _MAX_DEPTH:
            await self.rename(place, into, name, None)

    async def _some_unlink(self, directories: list[Place], files: list[Place]) -> None:
        await self.unlink(self._dice.choice(files))

    async def _some_remove_directory(self, directories: list[Place], files: list[Place]) -> None:
        empty = [place for place in directories[1:] if not place.inode.entries]
        if empty:
            place = self._dice.choice(empty)
            above = await self._walk(place.path[:-1])
            await self._walk(place.path)
            await self.change(
                f"rmdir {place.name!r} in {place.parent:x}: {place.id:x}",
                {("name", place.parent, place.name): None},
                lambda: self._mount.rmdir(above, place.name, CONTEXT),
            )

    async def _some_link(self, directories: list[Place], files: list[Place]) -> None:
        place, into = self._dice.choice(files), self._dice.choice(directories)
        name = self._free_name(into, _FILES)
        if name is None:
            return
        await self.link(place, into, name)

    async def _some_truncate(self, directories: list[Place], files: list[Place]) -> None:
        place = self._dice.choice(files)
        sectors = place.inode.size // SECTOR
        size = self._dice.randint(0, sectors + 1)
        attributes, fields = pyfuse3.EntryAttributes(), pyfuse3.SetattrFields()
        attributes.st_size = size * SECTOR
        number = await self._walk(place.path)
        wanted = SimpleNamespace(**{name: getattr(fields, name) for name in dir(fields) if name.startswith("update")})
        wanted.update_size = True
        written = [key for key in self.world.ledger_of(self._node.keeper.record).of_file(place.id) if key[0] == "sector"]
        changes: dict[Key, Any] = {key: 0 for key in written if key[2] >= size}
        changes[("size", place.id)] = size * SECTOR
        await self.change(
            f"truncate {place.id:x} to {size} sectors",
            changes,
            lambda: self._mount.setattr(number, attributes, wanted, None, CONTEXT),
        )

    async def _some_allocate(self, directories: list[Place], files: list[Place]) -> None:
        place = self._dice.choice(files)
        sectors = place.inode.size // SECTOR
        mode = self._dice.choice(sorted(ops.ALLOCATE_MODES))
        far = self._dice.choice((0, 0, 0, 70, 5000))
        await self.allocate(
            place, mode, min(self._dice.randint(0, sectors + 2), 300) + far, self._dice.choice((1, 2, 5, 40, 9000))
        )

    async def _some_copy(self, directories: list[Place], files: list[Place]) -> None:
        source, place = self._dice.choice(files), self._dice.choice(files)
        sectors = source.inode.size // SECTOR
        at, sector = self._dice.randint(0, sectors), min(self._dice.randint(0, sectors + 2), 300)
        count = min(self._dice.choice((1, 2, 5, 12)), sectors - at)
        if count and (source.id != place.id or abs(at - sector) >= count):
            await self.copy(source, at, place, sector, count)

    async def _some_attributes(self, directories: list[Place], files: list[Place]) -> None:
        place = self._dice.choice(files + directories)
        number = await self._walk(place.path)
        value = b"%d" % self.world.next_operation()
        await self.change(
            f"setxattr {place.id:x} {value!r}",
            {("xattr", place.id, b"user.note"): value},
            lambda: self._mount.setxattr(number, b"user.note", value, CONTEXT),
        )

    async def _some_close(self, directories: list[Place], files: list[Place]) -> None:
        if self._handles:
            number = self._dice.choice(sorted(self._handles))
            await self._mount.release(self._handles.pop(number))


def found_on(machine: Machine) -> Found:
    """What stands in the tree of a machine now."""
    return Found(machine.data.now)
