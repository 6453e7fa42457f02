"""What the tests of POSIX behaviour share: other identities, expected errnos, watched timestamps, raw system calls."""

import ctypes
import errno
import faulthandler
import os
import pickle
import signal
import socket
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import pytest

T = TypeVar("T")
Name = str | bytes | Path

ALICE, BOB, CREW = 65534, 65533, 65532
"""Two users, whose own groups have the same numbers, and a group that either may be a member of."""

CHILD_SECONDS = 120
"""A child that runs longer is killed by its own alarm."""

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_CLOCK_REALTIME_COARSE = 5


class ChildDiedError(Exception):
    """A child ended without an answer; `signal` is what killed it, or 0."""

    def __init__(self, status: int) -> None:
        self.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        super().__init__(f"the child ended with wait status {status:#x}")


@dataclass(frozen=True, slots=True)
class Child(Generic[T]):
    """A forked process that runs one function."""

    pid: int
    answers: int

    def result(self) -> T:
        """What the function returned; raises what it raised, ChildDiedError if it did neither."""
        with open(self.answers, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if not answer:
            raise ChildDiedError(status)
        succeeded, value = pickle.loads(answer)
        if not succeeded:
            raise value
        result: T = value
        return result


def start_child(function: Callable[[], T]) -> Child[T]:
    """Fork a process that runs the function; call result() of what is returned exactly once."""
    answers, answering = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork; the child runs nothing but the function and never returns from here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()
            signal.alarm(CHILD_SECONDS)
            os.close(answers)
            with open(answering, "wb") as pipe:
                pipe.write(_answer(function))
        finally:
            os._exit(0)
    os.close(answering)
    return Child(pid, answers)


def _answer(function: Callable[[], object]) -> bytes:
    try:
        return pickle.dumps((True, function()))
    except BaseException as error:  # whatever it is, the parent is to raise it
        try:
            answer = pickle.dumps((False, error))
            pickle.loads(answer)
        except Exception:
            return pickle.dumps((False, AssertionError(repr(error))))
        return answer


def in_child(function: Callable[[], T]) -> T:
    """Run the function in a forked process and return or raise what it does there."""
    return start_child(function).result()


def as_user(uid: int, gid: int, function: Callable[[], T], groups: Sequence[int] = ()) -> T:
    """Run the function in a child that has this identity and no privileges; an OSError comes back with its errno."""
    return in_child(lambda: become(uid, gid, groups, function))


def become(uid: int, gid: int, groups: Sequence[int], function: Callable[[], T]) -> T:
    """Give this process, for good, another identity, then run the function."""
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    return function()


def as_alice(function: Callable[[], T], groups: Sequence[int] = ()) -> T:
    """as_user for ALICE in her own group."""
    return as_user(ALICE, ALICE, function, groups)


def as_bob(function: Callable[[], T], groups: Sequence[int] = ()) -> T:
    """as_user for BOB in his own group."""
    return as_user(BOB, BOB, function, groups)


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    """The block must fail with an OSError of one of these errnos."""
    expected = " or ".join(errno.errorcode[code] for code in codes)
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            got = errno.errorcode.get(error.errno or 0, str(error))
            pytest.fail(f"failed with {got}, expected {expected}")
    else:
        pytest.fail(f"succeeded, expected {expected}")


def errno_of(function: Callable[[], object]) -> int:
    """The errno with which the function fails, 0 when it does not."""
    try:
        function()
    except OSError as error:
        return error.errno or -1
    return 0


@dataclass(slots=True)
class Watch:
    """After the watched block: which of "mtime" and "ctime" it changed."""

    changed: frozenset[str] = field(default_factory=frozenset)


BOTH = frozenset({"mtime", "ctime"})
CTIME = frozenset({"ctime"})
NEITHER: frozenset[str] = frozenset()


@contextmanager
def watching(target: Name | int) -> Iterator[Watch]:
    """Watch the timestamps of a path (not followed) or of a descriptor."""
    before = pass_tick(target)
    watch = Watch()
    yield watch
    after = stat_of(target)
    moved = {"mtime": after.st_mtime_ns != before.st_mtime_ns, "ctime": after.st_ctime_ns != before.st_ctime_ns}
    watch.changed = frozenset(name for name, is_moved in moved.items() if is_moved)


def pass_tick(target: Name | int) -> os.stat_result:
    """The attributes, when the clock that files are stamped with has moved past their ctime.

    That clock moves every few milliseconds only: a change in the same tick would be invisible.
    """
    attributes = stat_of(target)
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= attributes.st_ctime_ns:
        time.sleep(0.0005)
    return attributes


def stat_of(target: Name | int) -> os.stat_result:
    """The attributes of a path (not followed) or of a descriptor."""
    return os.fstat(target) if isinstance(target, int) else os.lstat(target)


def mode_of(target: Name | int) -> int:
    """The permission bits, with setuid, setgid and sticky."""
    return stat.S_IMODE(stat_of(target).st_mode)


def owner_of(target: Name | int) -> tuple[int, int]:
    """The user and the group."""
    attributes = stat_of(target)
    return attributes.st_uid, attributes.st_gid


def touch(path: Name, mode: int = 0o644, *, owner: tuple[int, int] = (0, 0), data: bytes = b"") -> Path:
    """Make a file with exactly this mode, owner and content."""
    with opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600) as descriptor:
        if data:
            os.write(descriptor, data)
        _dress(descriptor, mode, owner)
    return Path(os.fsdecode(path))


def mkdir(path: Name, mode: int = 0o755, *, owner: tuple[int, int] = (0, 0)) -> Path:
    """Make a directory with exactly this mode and owner."""
    os.mkdir(path, 0o700)
    _dress(path, mode, owner)
    return Path(os.fsdecode(path))


def _dress(target: Name | int, mode: int, owner: tuple[int, int]) -> None:
    if owner != (0, 0):
        os.chown(target, *owner)
    os.chmod(target, mode)


KINDS = ("file", "directory", "symlink", "fifo", "socket", "character device", "block device")

FORMATS = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "character device": stat.S_IFCHR,
    "block device": stat.S_IFBLK,
}


def make(kind: str, path: Name, *, owner: tuple[int, int] = (0, 0)) -> Path:
    """Make something of one of KINDS, mode 0644 (directories 0755); a symlink dangles."""
    match kind:
        case "file":
            return touch(path, owner=owner)
        case "directory":
            return mkdir(path, owner=owner)
        case "symlink":
            os.symlink("nowhere", path)
        case "character device" | "block device":
            os.mknod(path, FORMATS[kind] | 0o644, os.makedev(1, 3))
        case _:
            os.mknod(path, FORMATS[kind] | 0o644)
    if owner != (0, 0):
        os.lchown(path, *owner)
    return Path(os.fsdecode(path))


def remove(kind: str, path: Name) -> None:
    """rmdir for a directory, unlink for everything else."""
    if kind == "directory":
        os.rmdir(path)
    else:
        os.unlink(path)


@contextmanager
def opened(path: Name, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """A descriptor that is closed at the end of the block."""
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: Name) -> bytes:
    """The whole content."""
    with open(path, "rb") as file:
        return file.read()


def bind(path: Path) -> socket.socket:
    """A listening socket at the path; the caller closes it."""
    listener = socket.socket(socket.AF_UNIX)
    with opened(path.parent, os.O_PATH) as parent:
        try:
            # Addresses of sockets hold 107 bytes, paths of tests are longer.
            listener.bind(f"/proc/self/fd/{parent}/{path.name}")
        except OSError:
            listener.close()
            raise
    listener.listen()
    return listener


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def renameat2(source: Name, target: Name, flags: int) -> None:
    """renameat2(2) of the C library."""
    _checked(_libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags))


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python offers only in the form that falls back to writing."""
    _checked(_libc.fallocate64(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def utimensat(path: Name, atime: tuple[int, int], mtime: tuple[int, int], *, follow: bool = True) -> None:
    """utimensat(2) with (seconds, nanoseconds), where the latter may be UTIME_NOW or UTIME_OMIT."""
    times = struct.pack("@qqqq", *atime, *mtime)
    no_follow = 0x100
    _checked(_libc.utimensat(_AT_FDCWD, os.fsencode(path), times, 0 if follow else no_follow))


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of getdents64."""

    inode: int
    position: int
    type: int
    name: bytes


def getdents(descriptor: int, buffer_bytes: int = 32768) -> list[Entry]:
    """One getdents64(2) call; an empty list is the end of the directory."""
    buffer = ctypes.create_string_buffer(buffer_bytes)
    filled = _checked(_libc.getdents64(descriptor, buffer, ctypes.c_size_t(buffer_bytes)))
    entries, offset = [], 0
    while offset < filled:
        inode, position, length, kind = struct.unpack_from("=QqHB", buffer, offset)
        name = buffer.raw[offset + 19 : offset + length].split(b"\0", 1)[0]
        entries.append(Entry(inode, position, kind, name))
        offset += length
    return entries


def all_entries(path: Name, buffer_bytes: int = 32768) -> list[Entry]:
    """Every record of a directory, `.` and `..` too, read through buffers of this size."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
        entries: list[Entry] = []
        while batch := getdents(directory, buffer_bytes):
            entries += batch
        return entries


ACL_ACCESS, ACL_DEFAULT = "system.posix_acl_access", "system.posix_acl_default"

_ACL_NO_ID = 0xFFFFFFFF
_ACL_TAGS = {"u": (0x01, 0x02), "g": (0x04, 0x08), "m": (0x10, 0x10), "o": (0x20, 0x20)}


def acl(text: str) -> bytes:
    """The attribute value of an ACL written as "u::rw- u:65534:r-- g::r-- m::rw- o::---", in this order."""
    value = struct.pack("<I", 2)
    for part in text.split():
        letter, who, permissions = part.split(":")
        plain, named = _ACL_TAGS[letter]
        bits = sum(bit for flag, bit in (("r", 4), ("w", 2), ("x", 1)) if flag in permissions)
        value += struct.pack("<HHI", named if who else plain, bits, int(who) if who else _ACL_NO_ID)
    return value


def acl_text(value: bytes) -> str:
    """The inverse of acl()."""
    letters = {tag: letter for letter, tags in _ACL_TAGS.items() for tag in tags}
    parts = []
    for tag, bits, who in struct.iter_unpack("<HHI", value[4:]):
        permissions = "".join(flag if bits & bit else "-" for flag, bit in (("r", 4), ("w", 2), ("x", 1)))
        parts.append(f"{letters[tag]}:{'' if who == _ACL_NO_ID else who}:{permissions}")
    return " ".join(parts)


def set_acl(path: Name, text: str, name: str = ACL_ACCESS) -> None:
    """Give a file or a directory the ACL."""
    os.setxattr(path, name, acl(text))


def get_acl(path: Name, name: str = ACL_ACCESS) -> str:
    """The ACL as text, "" when there is none."""
    try:
        return acl_text(os.getxattr(path, name))
    except OSError as error:
        if error.errno == errno.ENODATA:
            return ""
        raise
