"""Random operations on names and attributes."""

import os
import stat
from functools import partial

from tests.random import model
from tests.random.choices import NAMES, Choices, Target
from tests.random.model import Directory, File, Special, Symlink
from tests.random.renameat2 import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

MAX_DIRECTORIES = 24
# Never sticky and writable by others at once: what root may open there depends on fs.protected_*.
DIRECTORY_MODES = [0o755, 0o700, 0o2755, 0o2775, 0o1755, 0o000]
MODES = [0o644, 0o600, 0o755, 0o4755, 0o2755, 0o2644, 0o6755, 0o000]
OWNERS = [-1, 0, 1000, 4242, 65534]
XATTR_NAMES = ["user.a", "user.b", "user.long name", "trusted.a", "trusted.b"]
XATTR_FLAGS = [0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]
NULL_DEVICE = os.makedev(1, 3)


class Names(Choices):
    """Making, moving and removing names; modes, owners, times, extended attributes; looking at all of it."""

    def _mkdir(self) -> None:
        if len(self.model.directories) >= MAX_DIRECTORIES:
            self._rmdir()
            return
        path, mode = self._new_path(), self._random.choice(DIRECTORY_MODES)
        self.note(f"mkdir {path!r} {mode:#o}")
        self.agree(lambda: self.model.mkdir(path, mode), lambda: os.mkdir(self.real(path), mode))

    def _rmdir(self) -> None:
        empty = [directory.path for directory in self.model.directories[1:] if not directory.entries]
        path = self._random.choice(empty) if empty and self._random.random() < 0.5 else self._path(Directory)
        self.note(f"rmdir {path!r}")
        self.agree(lambda: self.model.rmdir(path), lambda: os.rmdir(self.real(path)))

    def _unlink(self) -> None:
        path = self._path(File, Symlink, Special) if self._random.random() < 0.9 else self._path()
        self._last_look(path)
        self.note(f"unlink {path!r}")
        self.agree(lambda: self.model.unlink(path), lambda: os.unlink(self.real(path)))

    def _rename(self) -> None:
        rng = self._random
        old = self._path(Directory) if rng.random() < 0.2 else self._path()
        flags = rng.choice((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
        new = self._path() if rng.random() < (0.9 if flags == RENAME_EXCHANGE else 0.4) else self._new_path()
        self._last_look(new)
        self.note(f"rename {old!r} to {new!r} flags {flags}")
        real_old, real_new = self.real(old), self.real(new)
        self.agree(
            lambda: self.model.rename(old, new, flags),
            lambda: renameat2(real_old, real_new, flags) if flags else os.rename(real_old, real_new),
        )

    def _link(self) -> None:
        old, new = self._path(), self._new_path()
        self.note(f"link {old!r} to {new!r}")
        self.agree(
            lambda: self.model.link(old, new),
            lambda: os.link(self.real(old), self.real(new), follow_symlinks=False),
        )

    def _symlink(self) -> None:
        rng = self._random
        # Relative to the link, and never upwards: the link may be moved, but must not lead out of the root.
        target = rng.choice(NAMES) if rng.random() < 0.7 else rng.choice(NAMES) + b"/" + rng.choice(NAMES)
        path = self._new_path()
        self.note(f"symlink {target!r} at {path!r}")
        self.agree(lambda: self.model.symlink(target, path), lambda: os.symlink(target, self.real(path)))

    def _readlink(self) -> None:
        path = self._path(Symlink)
        self.note(f"readlink {path!r}")
        target = self.agree(lambda: self.model.readlink(path), lambda: os.readlink(self.real(path)))
        if target is not None:
            self.expect("target", self.model.readlink(path), target)

    def _mknod(self) -> None:
        path = self._new_path()
        mode = self._random.choice((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)) | 0o666
        rdev = NULL_DEVICE if stat.S_ISCHR(mode) else 0
        self.note(f"mknod {path!r} {mode:#o}")
        self.agree(lambda: self.model.mknod(path, mode, rdev), lambda: os.mknod(self.real(path), mode, rdev))

    def _chmod(self) -> None:
        target = self._target(follow=True)
        try:
            modes = DIRECTORY_MODES if isinstance(target.find(), Directory) else MODES
        except OSError:
            modes = MODES
        mode = self._random.choice(modes)
        self.note(f"chmod {target} {mode:#o}")
        self.agree(lambda: model.change_mode(target.find(), mode), lambda: os.chmod(target.real, mode))

    def _chown(self) -> None:
        target = self._target()
        uid, gid = self._random.choice(OWNERS), self._random.choice(OWNERS)
        self.note(f"chown {target} {uid}:{gid}")
        self.agree(
            lambda: model.change_owner(target.find(), uid, gid),
            lambda: os.chown(target.real, uid, gid, follow_symlinks=target.follow),
        )

    def _utimens(self) -> None:
        target = self._target()
        mtime_ns = self._random.randrange(1 << 32) * 1_000_000_000 + self._random.randrange(1_000_000_000)
        self.note(f"utimens {target} mtime {mtime_ns} ns")
        self.agree(
            lambda: model.set_mtime(target.find(), mtime_ns),
            lambda: os.utime(target.real, ns=(mtime_ns, mtime_ns), follow_symlinks=target.follow),
        )

    def _xattr_name(self, target: Target | None = None) -> str:
        """Any name, or often one that the target has."""
        if target is not None and self._random.random() < 0.6:
            try:
                names = list(target.find().xattrs)
            except OSError:
                names = []
            if names:
                return self._random.choice(names)
        return "nothing.a" if self._random.random() < 0.02 else self._random.choice(XATTR_NAMES)

    def _setxattr(self) -> None:
        target, name, flags = self._target(), self._xattr_name(), self._random.choice(XATTR_FLAGS)
        value = self._random.randbytes(self._random.choice((0, 1, 30, 200)))
        self.note(f"setxattr {target} {name!r} {len(value)} bytes flags {flags}")
        self.agree(
            lambda: model.set_xattr(target.find(), name, value, flags),
            lambda: os.setxattr(target.real, name, value, flags, follow_symlinks=target.follow),
        )

    def _getxattr(self) -> None:
        target = self._target()
        name = self._xattr_name(target)
        self.note(f"getxattr {target} {name!r}")
        value = self.agree(
            lambda: model.get_xattr(target.find(), name),
            lambda: os.getxattr(target.real, name, follow_symlinks=target.follow),
        )
        if value is not None:
            self.expect(f"{name} of {target}", model.get_xattr(target.find(), name), value)

    def _removexattr(self) -> None:
        target = self._target()
        name = self._xattr_name(target)
        self.note(f"removexattr {target} {name!r}")
        self.agree(
            lambda: model.remove_xattr(target.find(), name),
            lambda: os.removexattr(target.real, name, follow_symlinks=target.follow),
        )

    def _stat(self) -> None:
        target = self._target()
        self.note(f"stat {target}")
        status = self.agree(target.find, partial(os.stat, target.real, follow_symlinks=target.follow))
        if status is not None:
            self.expect_status(str(target), target.find(), status)

    def _list(self) -> None:
        directory = self._random.choice(self.model.directories)
        self.note(f"list {directory.path!r}")
        self.expect_entries(directory)

    def _check_all(self) -> None:
        self.note("check of everything")
        for descriptor in self._descriptors:
            self.expect_status(str(descriptor), descriptor.node, os.fstat(descriptor.fd))
            self.expect_xattrs(str(descriptor), descriptor.node, descriptor.fd)
            self._look_through(descriptor)
        self.check_tree()
