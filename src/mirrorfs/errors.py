"""Every error that mirrorfs raises on purpose, in one tree.

A class knows the exit status of the command that it ends and the errno that an application sees; its message is one line
that says what is wrong and what to do. OSErrors of the backing store are not wrapped: they go to the caller as they are.
"""

import errno
from typing import ClassVar


class MirrorfsError(Exception):
    """Something that a person can act upon; str(error) is the one line to show."""

    exit_status: ClassVar[int] = 1
    errno: ClassVar[int] = errno.EIO


class UsageError(MirrorfsError):
    """The command line is wrong."""

    exit_status = 2


class ConfigError(MirrorfsError):
    """The configuration file is wrong; the message begins with the file and the key."""

    exit_status = 2


class RefusedError(MirrorfsError):
    """What was asked might lose data or is not safe now; `--force` would do it."""

    exit_status = 3


class ConfirmationNeededError(MirrorfsError):
    """Only a person can know whether this is right; `--yes` says so."""

    exit_status = 4


class JournalError(MirrorfsError):
    """The node's durable state cannot be read or written; the node must not go on."""


class DirtyLogDamagedError(JournalError):
    """The log of what is dirty cannot be trusted: the node may go on, after a full compare with the other one."""


class ProtocolError(MirrorfsError):
    """What arrived on a link is not what a peer of this version sends; ends the link, never the daemon."""


class LinkLostError(MirrorfsError):
    """The connection to the peer has ended or has been silent for too long."""


class NotPrimaryError(MirrorfsError):
    """A change was asked of a node that is not the primary."""

    errno = errno.EROFS


class FrozenError(MirrorfsError):
    """A change waited for `freeze_timeout` and may still not be made."""

    errno = errno.EIO


class ClaimLostError(MirrorfsError):
    """The arbiter has granted the next epoch to the other node."""


class NoAnswerError(MirrorfsError):
    """Nobody can say whether this node may go on alone: it must not, and may ask again."""


class ControlError(MirrorfsError):
    """The daemon of this node cannot be reached through its control socket."""
