"""What a session is: the mount, what serves it, and what makes the kernel forget. `open_session` has two."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from mirrorfs.answers import Answers, Pyfuse3Answers
from mirrorfs.reactor import Reactor
from mirrorfs.syncing import Syncs, ThreadSyncs
from mirrorfs.table import Known

if TYPE_CHECKING:
    from mirrorfs.fuse_ops import FuseOperations


class Session(Protocol):
    """One mount, from `mount` to `close`. `reactor` serves the peer's connection too, where there is one."""

    answers: Answers
    syncs: Syncs
    reactor: Reactor | None

    def mount(self, operations: "FuseOperations", path: Path, volume: str) -> None:
        """Mount over `path`; MirrorfsError if the kernel will not."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what serves requests and the peer's connection, until cancelled or at an end."""

    async def serve(self) -> None:
        """Serve requests until the file system is unmounted."""

    def close(self) -> None:
        """Give back what the session held. Unmounts nothing: it has been done, or would hit what is mounted below."""

    async def invalidate(self, files: Iterable[Known]) -> None:
        """Make the kernel forget the names, attributes and pages that it has of these files."""


class NoSession:
    """No mount at all: for what runs a node without a kernel."""

    def __init__(self) -> None:
        self.answers: Answers = Pyfuse3Answers()
        self.syncs: Syncs = ThreadSyncs()
        self.reactor: Reactor | None = None

    def mount(self, operations: "FuseOperations", path: Path, volume: str) -> None:
        """Nothing is mounted."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """There is nothing to run."""
        task_status.started()

    async def serve(self) -> None:
        """There is nothing to serve."""

    def close(self) -> None:
        """There is nothing to give back."""

    async def invalidate(self, files: Iterable[Known]) -> None:
        """Nobody has cached anything; it takes a moment as with a kernel."""
        await trio.to_thread.run_sync(lambda: None)


def open_session(kind: str) -> Session:
    """The session of that kind: `kernel` or `pyfuse3`."""
    from mirrorfs.kernel.loop import KernelSession, is_supported
    from mirrorfs.pyfuse3_session import Pyfuse3Session

    if kind == "kernel" and is_supported():
        return KernelSession(Reactor())
    return Pyfuse3Session()
