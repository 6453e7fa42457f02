"""One process of a writing load: changes files below a directory and notes, outside of it, every change that was acknowledged.

`python writer.py KIND DIRECTORY NOTES SEED` runs until SIGTERM or until a change fails, and says then on stderr which error.
"""

import errno
import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Notes = Iterator[dict[str, Any]]
Sync = Callable[[int], None]


def unsynced(descriptor: int) -> None:
    """In the place of an fsync where a write that returned is enough."""


def append(directory: Path, name: str, *, flags: int = 0, sync: Sync = unsynced) -> Notes:
    """Numbered records of twelve bytes, one write each."""
    descriptor = os.open(directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | flags, 0o644)
    for record in range(10**9):
        os.write(descriptor, b"%011d\n" % record)
        sync(descriptor)
        yield {"record": record}


def overwrite(directory: Path, name: str, chance: random.Random, *, sync: Sync = unsynced) -> Notes:
    """Growing values in sixteen blocks of one file, each block filled with its value."""
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    for value in range(1, 10**9):
        slot = chance.randrange(16)
        os.pwrite(descriptor, value.to_bytes(8, "little") * 512, slot * 4096)
        sync(descriptor)
        yield {"slot": slot, "value": value}


def overwrite_mapped(directory: Path, name: str, chance: random.Random) -> Notes:
    """The same by way of memory, each value with an msync."""
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(descriptor, 16 * 4096)
    memory = mmap.mmap(descriptor, 16 * 4096)
    for value in range(1, 10**9):
        slot = chance.randrange(16)
        memory[slot * 4096 : (slot + 1) * 4096] = value.to_bytes(8, "little") * 512
        memory.flush(slot * 4096, 4096)
        yield {"slot": slot, "value": value}


def spread(directory: Path, name: str) -> Notes:
    """Growing values in one file, each so far behind the one before that the dirty set needs a mark of its own for it.

    Not in haste: a node that returns compares all that lies between.
    """
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    for value in range(1, 10**6):
        os.pwrite(descriptor, value.to_bytes(8, "little"), value << 22)
        yield {"value": value}
        time.sleep(0.03)


def names(directory: Path, prefix: str, chance: random.Random, *, sync: Sync = unsynced) -> Notes:
    """Files that are written under one name and renamed to another; some are removed again."""
    names_of = os.open(directory, os.O_RDONLY)
    there: list[str] = []
    for number in range(10**9):
        name = f"{prefix}-{number}"
        temporary = directory / f"{name}.new"
        with open(temporary, "w") as file:
            file.write(name * 50)
            file.flush()
            sync(file.fileno())
        temporary.rename(directory / name)
        sync(names_of)
        yield {"what": "renamed", "name": name}
        there.append(name)
        if len(there) > 20:
            victim = there.pop(chance.randrange(len(there)))
            yield {"what": "removing", "name": victim}
            (directory / victim).unlink()
            sync(names_of)
            yield {"what": "removed", "name": victim}


def tree(directory: Path) -> Notes:
    """Directories in directories, a symbolic link in each."""
    path = Path("tree")
    for number in range(10**9):
        path = path / f"{number}" if number % 8 else Path(f"tree-{number}")
        (directory / path).mkdir()
        link = path / "link"
        (directory / link).symlink_to(link)
        yield {"path": str(link)}


def main() -> None:
    """Write and note until told to stop, or until something fails."""
    kind, directory, notes, seed = sys.argv[1:]
    chance = random.Random(f"{seed} {kind}")
    chosen: dict[str, Callable[[], Notes]] = {
        "append": lambda: append(Path(directory), kind),
        "append-fsync": lambda: append(Path(directory), kind, sync=os.fsync),
        "append-dsync": lambda: append(Path(directory), kind, flags=os.O_DSYNC),
        "overwrite": lambda: overwrite(Path(directory), kind, chance),
        "overwrite-fdatasync": lambda: overwrite(Path(directory), kind, chance, sync=os.fdatasync),
        "overwrite-msync": lambda: overwrite_mapped(Path(directory), kind, chance),
        "spread": lambda: spread(Path(directory), kind),
        "names": lambda: names(Path(directory), "name", chance),
        "names-fsync": lambda: names(Path(directory), "synced", chance, sync=os.fsync),
        "tree": lambda: tree(Path(directory)),
    }
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    out = os.open(notes, os.O_WRONLY | os.O_APPEND)
    try:
        for note in chosen[kind]():
            os.write(out, json.dumps(note | {"at": time.monotonic()}).encode() + b"\n")
            if stopping:
                return
    except OSError as error:
        sys.exit(errno.errorcode.get(error.errno or 0, str(error)))


if __name__ == "__main__":
    main()
