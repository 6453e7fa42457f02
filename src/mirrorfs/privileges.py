"""Who may keep which bits: setuid and setgid after a write, the group and the mode of what is made. As the kernel has it for
file systems of its own; here it leaves that to us."""

import stat
from typing import Final, Protocol

import pyfuse3

from mirrorfs.table import Known
from mirrorfs.tree import Tree

_ACL_DEFAULT: Final = b"system.posix_acl_default"


class Caller(Protocol):
    """Who asks."""

    @property
    def uid(self) -> int:
        """Its user."""

    @property
    def gid(self) -> int:
        """Its group."""

    @property
    def pid(self) -> int:
        """Its process."""

    @property
    def umask(self) -> int:
        """The bits that it does not want in the mode of a new file."""


def in_group(gid: int, caller: Caller) -> bool:
    """Whether the caller belongs to a group."""
    if gid == caller.gid:
        return True
    try:
        return gid in pyfuse3.get_sup_groups(caller.pid)
    except OSError:  # of another pid namespace, or gone already
        return False


def cleared_by(tree: Tree, known: Known, caller: Caller) -> int:
    """The mode bits that a write by this caller takes away: as the kernel's setattr_should_drop_sgid() has it."""
    if caller.uid == 0:
        return 0
    if in_group(tree.stat(known).st_gid, caller):
        return stat.S_ISUID
    return stat.S_ISUID | stat.S_ISGID


def without_special(tree: Tree, known: Known, clears: int) -> int | None:
    """The mode that a write leaves, None if that is the present one."""
    if not clears:
        return None
    mode = stat.S_IMODE(tree.stat(known).st_mode)
    fresh = mode & ~clears
    if mode & stat.S_IXGRP:
        fresh &= ~stat.S_ISGID
    return None if fresh == mode else fresh


def mode_of_new(tree: Tree, parent: int, mode: int, caller: Caller) -> int:
    """The mode asked for, less the umask unless the directory's default ACL takes its place."""
    if not caller.umask:
        return mode
    try:
        tree.xattr(tree.table.get(parent), _ACL_DEFAULT)
    except OSError:
        return mode & ~caller.umask
    return mode


def group_of_new(tree: Tree, parent: int, gid: int) -> tuple[int, bool]:
    """The group of a new file, and whether the directory hands its own down."""
    above = tree.stat(tree.table.get(parent))
    inherits = bool(above.st_mode & stat.S_ISGID)
    return (above.st_gid if inherits else gid), inherits
