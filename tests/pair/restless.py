"""A process that changes a few files in every way that a verify compares, until it is told to stop: `restless.py DIR SEED`."""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_MAX_SIZE = 3 << 20


class Restless:
    """Few files and few names, so that every change meets another."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        self._paths = [directory / part / f"file-{number}" for part in ("left", "right") for number in range(6)]
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._changes: list[Callable[[Path], None]] = [
            self._write,
            self._write,
            self._write,
            lambda path: os.truncate(path, self._chance.randrange(_MAX_SIZE)),
            lambda path: path.chmod(self._chance.choice([0o600, 0o644, 0o4755])),
            lambda path: os.chown(path, self._chance.choice([0, 12]), 34),
            lambda path: os.setxattr(path, "user.restless", self._chance.randbytes(20)),
            lambda path: os.removexattr(path, "user.restless"),
            lambda path: os.utime(path, ns=(0, self._chance.randrange(1 << 60))),
            lambda path: os.rename(path, self._chance.choice(self._paths)),
            lambda path: path.hardlink_to(self._chance.choice(self._paths)),
            lambda path: path.unlink(),
        ]

    def change(self) -> None:
        """Make one change of any kind; what cannot be made is left."""
        try:
            self._chance.choice(self._changes)(self._chance.choice(self._paths))
        except (FileNotFoundError, FileExistsError):
            pass
        except OSError as error:
            if error.strerror != "No data available":
                raise

    def _write(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            for _ in range(20):
                data = self._chance.randbytes(self._chance.choice([100, 4096, 100_000, 300_000]))
                os.pwrite(descriptor, data, self._chance.randrange(_MAX_SIZE))
        finally:
            os.close(descriptor)


def _main() -> None:
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    restless = Restless(Path(sys.argv[1]), int(sys.argv[2]))
    while not stopped:
        restless.change()


if __name__ == "__main__":
    _main()
