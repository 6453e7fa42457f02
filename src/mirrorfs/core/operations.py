"""The changes of a file system as frozen values: what the primary applies, sends, and its peer applies again.

Files are named by id (see `ids`); names are bytes; times are nanoseconds since 1970. An operation says what is to be so, with
nothing left to the node that applies it: owners, final modes and the new file's id are in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Final, NamedTuple, get_args


@dataclass(frozen=True, slots=True)
class Write:
    """Put `data` at byte `offset` of `file`. What is not bytes must not change before it is sent."""

    file: int
    offset: int
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class MakeNode:
    """Make a file, directory, fifo, socket or device; `mode` has the type bits, and may be narrowed by a default ACL."""

    parent: int
    name: bytes
    file: int
    mode: int
    uid: int
    gid: int
    rdev: int = 0


@dataclass(frozen=True, slots=True)
class Symlink:
    """Make a symbolic link that points to `target`."""

    parent: int
    name: bytes
    file: int
    target: bytes
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Link:
    """Give `file` one more name."""

    file: int
    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Unlink:
    """Take a name away from a file that is not a directory."""

    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class RemoveDirectory:
    """Remove an empty directory."""

    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Rename:
    """Rename, with the flags of renameat2(2)."""

    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """Change what is not None: owner first, then mode, size (bytes), times (ns)."""

    file: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class SetXattr:
    """Set an extended attribute, whether it is there or not."""

    file: int
    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class RemoveXattr:
    """Remove an extended attribute."""

    file: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Allocate:
    """fallocate(2), `mode` one of `ALLOCATE_MODES`: reserve room for these bytes, or make them zeros or a hole."""

    file: int
    mode: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class CopyRange:
    """copy_file_range(2): put `size` bytes from byte `source_offset` of `source`, as they stand there now, at byte `offset` of
    `file`. At most `MAX_COPY` at once."""

    source: int
    source_offset: int
    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Times:
    """The modification times (ns) of these files are the primary's from now on: (file, time) each."""

    files: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Introduce:
    """The first mention of `file` on a connection: the peer finds it under this name and knows it by its id from now on."""

    parent: int
    name: bytes
    file: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Resync: under this name stands this file; make it so, whatever the target has there. Data follows as `CopyData`.

    For the root, `parent` is 0 and `name` empty.
    """

    parent: int
    name: bytes
    file: int
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    target: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class CopyData:
    """Resync: a piece of the file as it stands at this point of the stream."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Vanish:
    """Resync: nothing stands under this name any more; unless it is `gone`, what the target has there is still needed."""

    parent: int
    name: bytes
    gone: bool


@dataclass(frozen=True, slots=True)
class DirectoryDone:
    """Resync: every name of the directory has been introduced; what else the target has there goes."""

    directory: int


@dataclass(frozen=True, slots=True)
class Gather:
    """Quick resync: these names of the directory stand for these files at the source, 0 for none. What the target has there
    that is another file waits aside until it is placed again; with `complete`, so does every name that none of the pieces of
    this directory's list up to the `last` speaks of. The target answers which of these files it does not have there."""

    directory: int
    names: tuple[tuple[bytes, int], ...]
    complete: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Gathered:
    """Quick resync: the `Gather`s of this round are all sent; each name that is not right follows (`Entry`, `Whole`)."""


@dataclass(frozen=True, slots=True)
class NamesEqual:
    """Quick resync: every name leads to the same file on both nodes now; from here on changes travel as they do to a
    standby."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """Quick resync: the attributes of a file as they stand at this point of the stream, times left out; `size` as of a regular
    file."""

    file: int
    mode: int
    uid: int
    gid: int
    size: int
    xattrs: tuple[tuple[bytes, bytes], ...]


class WholeFile(NamedTuple):
    """A small regular file with all that it is: what `Whole` carries. It has one name and no holes."""

    name: bytes
    file: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Whole:
    """Quick resync: these files stand in the directory, each whole as it stands at this point of the stream."""

    directory: int
    files: tuple[WholeFile, ...]


@dataclass(frozen=True, slots=True)
class CopyHole:
    """Quick resync: `size` bytes from `offset` on are a hole."""

    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Quick resync: tell the hashes of these bytes (`resync.hashes`); the answer is not in the order of the stream."""

    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync, or fdatasync if `data_only`, of a file or directory: covers everything before it on the stream."""

    file: int
    data_only: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Make everything before it on the stream durable (syncfs), and know this as checkpoint `number`; files with an id of
    `new_from` or more are made after it."""

    number: int
    new_from: int


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """Checkpoint `number` is durable on both nodes: what the standby remembers as dirty from before it is dirty no more."""

    number: int


@dataclass(frozen=True, slots=True)
class Marked:
    """The primary has written `number` marks so far; what comes after it on the stream may rely on all of them."""

    number: int


@dataclass(frozen=True, slots=True)
class ListNames:
    """Verify: tell the names in a directory that come after `after`; the answer is not in the order of the stream."""

    directory: int
    after: bytes


@dataclass(frozen=True, slots=True)
class Look:
    """Verify: tell the id and the attributes of what stands under these names at this point of the stream; without names, of
    the directory itself. The ids are those at the primary, 0 for none."""

    directory: int
    names: tuple[tuple[bytes, int], ...]


@dataclass(frozen=True, slots=True)
class Digest:
    """Verify: tell the hashes of these bytes of each of these files, as they are on the disk; not in the order of the
    stream."""

    directory: int
    names: tuple[tuple[bytes, int], ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Verify: tell these bytes of a file as they are at this point of the stream.

    Here and below, a file is named by an entry of a directory that was introduced; an empty entry is the directory itself.
    """

    directory: int
    entry: bytes
    file: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Describe:
    """Verify: tell all attributes of a file as they are at this point of the stream."""

    directory: int
    entry: bytes
    file: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Repair: put these ranges (first, last + 1) of a file aside, durably, before they are replaced; `path` is for people."""

    directory: int
    entry: bytes
    file: int
    path: bytes
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Mend:
    """Repair: a piece of a file as it stands at this point of the stream."""

    directory: int
    entry: bytes
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MendAttributes:
    """Repair: the attributes of a file as they stand at this point of the stream, and make all of it durable; `size` as of a
    regular file."""

    directory: int
    entry: bytes
    file: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Verify: this directory counts as introduced no longer, so that a walk leaves nothing behind."""

    directory: int


#: Changes of one file (`file`), and not of names.
OfFile = Write | SetAttributes | SetXattr | RemoveXattr | Allocate | CopyRange
Change = OfFile | MakeNode | Symlink | Link | Unlink | RemoveDirectory | Rename
Copy = Entry | CopyData | Vanish | DirectoryDone
CatchUp = Gather | Gathered | Whole | NamesEqual | Refresh | CopyHole | Compare
Flush = Sync | Checkpoint
Question = ListNames | Look | Digest | Fetch | Describe | Keep | Mend | MendAttributes
Operation = Change | Times | Introduce | Copy | CatchUp | Flush | Checkpointed | Marked | Question | Forget


#: Of `Rename.flags`, as in renameat2(2).
RENAME_EXCHANGE: Final = 2

#: Of `Allocate.mode`, as in fallocate(2).
KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10
#: What the kernel's side of FUSE sends.
ALLOCATE_MODES: Final = frozenset({0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE})
#: Bytes of one `CopyRange`: the loop does nothing else meanwhile. A shorter copy is a right answer to copy_file_range(2).
MAX_COPY: Final = 8 << 20


def bytes_changed(change: OfFile, old_size: int) -> tuple[int, int]:
    """Which bytes of its file may be others after a change: offset and size, 0 if none are.

    `old_size` is the size in bytes that the file had before a `SetAttributes` of its size or an `Allocate`: what lies behind
    was zeros, and stays so.
    """
    match change:
        case Write():
            return change.offset, len(change.data)
        case CopyRange():
            return change.offset, change.size
        case Allocate() if change.mode & (PUNCH_HOLE | ZERO_RANGE):
            return change.offset, max(min(change.offset + change.size, old_size) - change.offset, 0)
        case SetAttributes() if change.size is not None and change.size < old_size:
            return change.size, old_size - change.size
        case _:
            return 0, 0


def owned(change: Change) -> Change:
    """The same change, whose data is its own: that of a `Write` may lie in a buffer that holds something else after a wait."""
    if isinstance(change, Write) and not isinstance(change.data, bytes):
        return Write(change.file, change.offset, bytes(change.data))
    return change


def values(operation: Operation) -> tuple[Any, ...]:
    """The fields of an operation, in their order."""
    return _VALUES[type(operation)](operation)


def _getter(operation: type) -> Callable[[Any], tuple[Any, ...]]:
    names = [field.name for field in fields(operation)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


KINDS: Final = get_args(Operation)
_VALUES: Final = {kind: _getter(kind) for kind in KINDS}
