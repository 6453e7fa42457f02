"""What a node that is in sync has to hold: the memory of the applications, epoch by epoch.

Everything that can be written is a register: a name in a directory, a sector of a file, a size, an attribute. A register knows
the values that it was given, in order. Up to `certain` they were acknowledged, so the present value is that one or a later one
whose acknowledgement never came; up to `synced` they were fsynced, which is all that counts once memory was lost.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tests.sim.disk import BLOCK, ROOT, Image, Inode

SECTOR: Final = 1024
Key = tuple[Any, ...]
_ID: Final = struct.Struct("<16sQQ")
_ID_XATTR: Final = b"trusted.mirrorfs"
_NEVER: Final = 0


@dataclass(slots=True)
class Register:
    """The values (value, operation) of one register."""

    values: list[tuple[Any, int]]
    certain: int = 0
    synced: int = 0

    def copy(self) -> "Register":
        return Register(list(self.values), self.certain, self.synced)

    @property
    def may_be_foreign(self) -> bool:
        """Whether a file that nobody knows may stand here."""
        return self.certain < len(self.values) - 1 or self.values[self.certain][0] == -1

    def index(self, operation: int) -> int | None:
        """Where an operation's value stands."""
        for index in range(len(self.values) - 1, -1, -1):
            if self.values[index][1] == operation:
                return index
        return None


class Ledger:
    """All registers, as of one epoch; `seen` are the operations that may be in it, `lost` what of them is not, since a tree was
    looked at."""

    def __init__(self) -> None:
        self.registers: dict[Key, Register] = {}
        self.seen: set[int] = {_NEVER}
        self.lost: set[tuple[Key, int]] = set()

    def copy(self) -> "Ledger":
        ledger = Ledger()
        ledger.registers = {key: register.copy() for key, register in self.registers.items()}
        ledger.seen, ledger.lost = set(self.seen), set(self.lost)
        return ledger

    # ---- what the applications tell

    def begin(self, operation: int, changes: dict[Key, Any]) -> None:
        """An operation was asked for: it may be seen from now on."""
        self.seen.add(operation)
        for key, value in changes.items():
            self.registers.setdefault(key, Register([(initial(key), _NEVER)])).values.append((value, operation))

    def confirm(self, operation: int, keys: Iterable[Key]) -> None:
        """It was acknowledged."""
        for key in keys:
            register = self.registers.get(key)
            index = register.index(operation) if register is not None else None
            if register is not None and index is not None:
                register.certain = max(register.certain, index)

    def reject(self, operation: int, keys: Iterable[Key]) -> None:
        """It was refused: it must never be seen."""
        self.seen.discard(operation)
        for key in keys:
            register = self.registers.get(key)
            index = register.index(operation) if register is not None else None
            if register is not None and index is not None and index > register.certain:
                del register.values[index]

    def certain(self, keys: Iterable[Key]) -> dict[Key, int]:
        """The last acknowledged operation on each of these."""
        return {key: self.registers[key].values[self.registers[key].certain][1] for key in keys if key in self.registers}

    def confirm_sync(self, operations: dict[Key, int]) -> None:
        """What `certain` gave was fsynced since."""
        for key, operation in operations.items():
            register = self.registers.get(key)
            index = register.index(operation) if register is not None else None
            if register is not None and index is not None:
                register.synced = max(register.synced, index)

    def of_file(self, file: int) -> list[Key]:
        """The registers that an fsync of a file covers."""
        return [key for key in self.registers if key[0] != "name" and key[1] == file]

    def of_directory(self, directory: int) -> list[Key]:
        """The registers that an fsync of a directory covers: its names, and what it has of its own."""
        return [key for key in self.registers if key[1] == directory]

    # ---- what happens to nodes

    def lose_memory(self) -> None:
        """Only what was fsynced counts."""
        for register in self.registers.values():
            register.certain = min(register.certain, register.synced)

    def missing_in(self, other: "Ledger", *, or_has_had: bool = False) -> list[str]:
        """What was acknowledged here and can be in no tree of the other; with `or_has_had`, what its memory lost can."""
        missing = []
        for key, register in self.registers.items():
            operation = register.values[register.certain][1]
            if operation not in other.seen or ((key, operation) in other.lost and not or_has_had):
                missing.append(f"{key}: operation {operation}")
        return missing

    # ---- what is found

    def settle(self, found: "Found", is_foreign: Callable[[int], bool]) -> list[str]:
        """Compare with what a tree holds, and know it from now on; returns what cannot be.

        A file of which nothing but its name was synced may lose its id with the memory; it is `is_foreign` then
        (docs/decisions/0010-names-without-ids.md).
        """
        problems = []
        for key, register in self.registers.items():
            if key[0] != "name" and key[1] not in found.files:
                continue
            value = found.value(key)
            allowed = range(len(register.values) - 1, register.certain - 1, -1)
            index = next((index for index in allowed if register.values[index][0] == value), None)
            if (
                index is None
                and key[0] == "name"
                and value is not None
                and is_foreign(value)
                and self._may_be_foreign(register)
            ):
                register.values = [*register.values[: register.certain + 1], (value, _NEVER)]
                index = len(register.values) - 1
            if index is None:
                wanted = [register.values[index] for index in allowed]
                problems.append(f"{key} is {value!r}, which is none of {wanted} (was: {register.values[: register.certain]})")
                register.values.append((value, _NEVER))
                index = len(register.values) - 1
            self.lost.update((key, operation) for _, operation in register.values[index + 1 :])
            del register.values[index + 1 :]
            register.certain = index
            register.synced = min(register.synced, index)
        problems += [f"{key} is {file:x}: nobody made it" for key, file in found.names() if key not in self.registers]
        return problems

    def _may_be_foreign(self, register: Register) -> bool:
        """Whether a file that nobody knows may stand where this register says which one does."""
        return register.may_be_foreign or any(self._may_lack_id(file) for file, _ in register.values[register.certain :])

    def _may_lack_id(self, file: Any) -> bool:
        """Whether a file may have lost its id: nothing of it is certain, not even the mode with which it was made."""
        mode = self.registers.get(("mode", file))
        return mode is not None and mode.certain < len(mode.values) - 1

    def take_over(self, found: "Found") -> None:
        """Whatever is there is right: a person has decided so."""
        for key, register in self.registers.items():
            if key[0] == "name" or key[1] in found.files:
                value = found.value(key)
                if value != register.values[-1][0] or register.certain != len(register.values) - 1:
                    register.values = [(value, _NEVER)]
                    register.certain = register.synced = 0
        for key, file in found.names():
            self.registers.setdefault(key, Register([(file, _NEVER)]))


def initial(key: Key) -> Any:
    """The value of a register that nobody has set."""
    return {"name": None, "xattr": None, "mode": 0o644}.get(key[0], 0)


def identity(inode: Inode) -> int | None:
    """The id of a file, None if it has none that counts."""
    value = inode.xattrs.get(_ID_XATTR)
    if value is None:
        return None
    _, number, file = _ID.unpack(value)
    return file if number == inode.number else None


class Found:
    """What stands in a tree."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.files: dict[int, Inode] = {}
        self.paths: dict[bytes, Inode] = {}
        tree = image.inodes[ROOT].entries[b"tree"]
        self._add(b"", image.inodes[tree])

    def _add(self, path: bytes, inode: Inode) -> None:
        self.paths[path] = inode
        file = 1 if not path else identity(inode)
        if file is not None:
            self.files[file] = inode
        if inode.is_directory:
            for name, serial in sorted(inode.entries.items()):
                self._add(path + b"/" + name, self.image.inodes[serial])

    def names(self) -> Iterator[tuple[Key, int]]:
        """Every name, as a register and the id of the file."""
        for number, inode in self.files.items():
            if inode.is_directory:
                for name, serial in inode.entries.items():
                    yield ("name", number, name), identity(self.image.inodes[serial]) or -1

    def value(self, key: Key) -> Any:
        """The value of a register."""
        inode = self.files.get(key[1])
        if key[0] == "name":
            serial = inode.entries.get(key[2]) if inode is not None else None
            return None if serial is None else identity(self.image.inodes[serial]) or -1
        assert inode is not None, key
        match key[0]:
            case "size":
                return inode.size
            case "mode":
                return inode.mode & 0o7777
            case "xattr":
                return inode.xattrs.get(key[2])
            case "sector":
                block, at = divmod(key[2] * SECTOR, BLOCK)
                data = inode.blocks.get(block, b"")[at : at + SECTOR]
                return int.from_bytes(data[:8], "little") if data == data[:8] * (SECTOR // 8) else data[:16]
            case _:
                raise AssertionError(key)

    def differences(self, other: "Found") -> list[str]:
        """How this tree and another one differ."""
        found = []
        for path in sorted({*self.paths, *other.paths}):
            mine, theirs = self.paths.get(path), other.paths.get(path)
            if mine is None or theirs is None:
                found.append(f"{path!r} is on one node only")
                continue
            one, two = _visible(mine), _visible(theirs)
            found += [f"{path!r}: {what} {one[what]!r} / {two[what]!r}"[:300] for what in one if one[what] != two[what]]
        if self._links() != other._links():
            found.append("hard links differ")
        return found

    def _links(self) -> list[list[bytes]]:
        names: dict[int, list[bytes]] = {}
        for path, inode in sorted(self.paths.items()):
            names.setdefault(inode.serial, []).append(path)
        return sorted(paths for paths in names.values() if len(paths) > 1)


def _visible(inode: Inode) -> dict[str, Any]:
    return {
        "mode": inode.mode,
        "owner": (inode.uid, inode.gid),
        "size": inode.size if not inode.is_directory else 0,
        "mtime": inode.mtime_ns,
        "target": inode.target,
        "id": identity(inode) if inode.parent != ROOT else 1,
        "xattrs": {key: value for key, value in inode.xattrs.items() if not key.startswith(_ID_XATTR)},
        "holes": sorted(inode.blocks),
        "data": b"".join(inode.blocks[block] for block in sorted(inode.blocks)),
    }
