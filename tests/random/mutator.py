"""Random changes anywhere in a tree, with no model: for tests that only ask whether two trees are equal afterwards."""

import os
import random
import stat
from contextlib import suppress
from pathlib import Path


class Mutator:
    """Changes the tree under `root` at random; the seed alone decides which changes. It knows the tree by looking at it."""

    def __init__(self, seed: object) -> None:
        self._random = random.Random(repr(seed))
        self._names = [f"n{number}" for number in range(12)]

    def run(self, root: Path, changes: int) -> None:
        """Try so many changes; what cannot be done (a name that is taken, a directory into itself) is no matter."""
        actions = [
            (self._write, 10),
            (self._make, 8),
            (self._directory, 5),
            (self._rename, 10),
            (self._exchange_by_renames, 2),
            (self._link, 5),
            (self._unlink, 5),
            (self._remove_directory, 2),
            (self._truncate, 4),
            (self._symlink, 2),
            (self._attributes, 4),
            (self._xattr, 4),
            (self._fifo, 1),
        ]
        for _ in range(changes):
            (action,) = self._random.choices([a for a, _ in actions], [w for _, w in actions])
            with suppress(OSError, IndexError):  # nothing is there to be changed yet
                action(root)

    def _walk(self, root: Path) -> tuple[list[Path], list[Path]]:
        directories: list[Path] = [root]
        files: list[Path] = []
        for directory in directories:
            for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
                (directories if entry.is_dir(follow_symlinks=False) else files).append(Path(entry.path))
        return directories, files

    def _some_file(self, root: Path) -> Path:
        files = [file for file in self._walk(root)[1] if stat.S_ISREG(file.lstat().st_mode)]
        return self._random.choice(files) if files else root / "none"

    def _place(self, root: Path) -> Path:
        return self._random.choice(self._walk(root)[0]) / self._random.choice(self._names)

    def _anything(self, root: Path) -> Path:
        directories, files = self._walk(root)
        return self._random.choice(directories[1:] + files)

    def _write(self, root: Path) -> None:
        with open(self._some_file(root), "r+b") as file:
            file.seek(self._random.choice([0, 100, 4096, 70_000, 5 << 20, self._random.randrange(1 << 20)]))
            file.write(self._random.randbytes(self._random.choice([1, 300, 4096, 10_000, 100_000])))

    def _make(self, root: Path) -> None:
        with open(self._place(root), "xb") as file:
            file.write(self._random.randbytes(self._random.choice([0, 10, 5000, 90_000])))

    def _directory(self, root: Path) -> None:
        self._place(root).mkdir()

    def _rename(self, root: Path) -> None:
        os.rename(self._anything(root), self._place(root))

    def _exchange_by_renames(self, root: Path) -> None:
        """Two entries change places, as an application does it: by a third name."""
        one, two, third = self._anything(root), self._anything(root), root / "third"
        os.rename(one, third)
        try:
            os.rename(two, one)
        finally:
            with suppress(OSError):
                os.rename(third, two)

    def _link(self, root: Path) -> None:
        os.link(self._some_file(root), self._place(root))

    def _unlink(self, root: Path) -> None:
        os.unlink(self._random.choice(self._walk(root)[1]))

    def _remove_directory(self, root: Path) -> None:
        os.rmdir(self._random.choice(self._walk(root)[0][1:]))

    def _truncate(self, root: Path) -> None:
        os.truncate(self._some_file(root), self._random.choice([0, 1, 4096, 5000, 60_000, 6 << 20]))

    def _symlink(self, root: Path) -> None:
        os.symlink(self._random.choice(self._names), self._place(root))

    def _attributes(self, root: Path) -> None:
        path = self._anything(root)
        if self._random.random() < 0.5:
            os.chown(path, self._random.randrange(3), self._random.randrange(3), follow_symlinks=False)
        else:
            os.chmod(path, 0o700 | self._random.randrange(0o100))

    def _xattr(self, root: Path) -> None:
        path, name = self._some_file(root), f"user.{self._random.choice('abc')}"
        if self._random.random() < 0.6:
            os.setxattr(path, name, self._random.randbytes(20))
        else:
            os.removexattr(path, name)

    def _fifo(self, root: Path) -> None:
        os.mkfifo(self._place(root))
