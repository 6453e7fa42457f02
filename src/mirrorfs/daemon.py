"""The composition root of `mirrorfs mount`: the lock, the mount, the control socket, signals, and a `Node` between them."""

import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any, Final

import trio

from mirrorfs import backing, control, systemd
from mirrorfs.activity import Activity
from mirrorfs.arbitration import arbiter_of
from mirrorfs.config import Config
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.journal import Journal
from mirrorfs.keeper import Keeper
from mirrorfs.node import Node
from mirrorfs.session import Session, open_session
from mirrorfs.status import describe
from mirrorfs.trust import Trust

log = logging.getLogger(__name__)

#: How often certificates are looked at.
_CERTIFICATES_S: Final = 6 * 3600.0
#: So long systemd may wait until this node knows what it is, so that services that need the mount can write if they may.
_ROLE_S: Final = 5.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Daemon:
    """One process from mount to unmount."""

    def __init__(self, config: Config, path: Path, under: backing.Backing, keeper: Keeper, activity: Activity) -> None:
        self._config = config
        self._path = path
        self._under = under
        self._keeper = keeper
        self._activity = activity
        self._stop = trio.Event()
        self._failure: MirrorfsError | None = None
        self._node: Node | None = None
        self._mount: backing.Mount | None = None
        self._session: Session = open_session(config.session)

    async def run(self, *, discard_local_data: bool) -> None:
        """Serve until unmounted or told to stop; raises the MirrorfsError that made it end."""
        token = trio.lowlevel.current_trio_token()
        self._keeper.failed = lambda error: token.run_sync_soon(self._fail, error)
        try:
            async with trio.open_nursery() as nursery:
                await self._serve(nursery, discard_local_data)
                nursery.cancel_scope.cancel()
        finally:
            # No task uses the session any more. Requests that still wait are answered by the kernel when it is closed.
            backing.detach(self._path, self._mount)
            self._session.close()
        if self._failure is not None:
            raise self._failure

    async def _serve(self, nursery: trio.Nursery, discard_local_data: bool) -> None:
        node = Node(
            self._config,
            self._under,
            self._keeper,
            self._activity,
            nursery,
            discard_local_data=discard_local_data,
            arbiter=arbiter_of(self._config),
            session=self._session,
        )
        self._node = node
        await node.check_tree()
        self._session.mount(node.operations, self._path, self._config.volume)
        self._mount = backing.top_mount(self._path)
        await nursery.start(self._session.run)
        nursery.start_soon(self._serve_mount)
        await nursery.start(control.serve, self._config.node.control, self._on_command)
        nursery.start_soon(self._stop_on_signal)
        if self._config.peer is not None:
            nursery.start_soon(self._keep_certificates, node)
        await node.begin(nursery)
        nursery.start_soon(self._say_ready, node)
        await self._stop.wait()
        systemd.notify("STOPPING=1")
        await node.finish()
        await node.arbitration.aclose()

    async def _say_ready(self, node: Node) -> None:
        with trio.move_on_after(_ROLE_S):
            while not node.knows_its_role:
                await node.role_changed.wait()
        log.info("ready: %s is mounted", self._path, extra={"event": "node-ready", "state": node.state, "epoch": node.epoch})
        systemd.notify("READY=1")
        await systemd.show_life()

    def _fail(self, error: MirrorfsError) -> None:
        """The node's durable state cannot be written: nothing may be promised any more."""
        self._failure = self._failure or error
        self._stop.set()

    async def _serve_mount(self) -> None:
        await self._session.serve()
        self._stop.set()

    async def _keep_certificates(self, node: Node) -> None:
        """Make the link's certificate anew long before it ends; say so if something ends soon all the same."""
        while True:
            try:
                if await trio.to_thread.run_sync(node.trust.renew):
                    log.info("the certificate of the link is made anew", extra={"event": "certificate-renewed"})
            except MirrorfsError as error:
                log.error(
                    "the certificate of the link cannot be made anew: %s", error, extra={"event": "certificate-not-renewed"}
                )
            node.warning = node.trust.warning()
            if node.warning:
                log.warning("%s", node.warning, extra={"event": "certificate-ends-soon"})
            await trio.sleep(_CERTIFICATES_S)

    async def _stop_on_signal(self) -> None:
        for number in _SIGNALS:  # what holds again after the receiver: asking twice must not cut the end short
            signal.signal(number, signal.SIG_IGN)
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            async for _ in signals:
                log.info("asked to stop", extra={"event": "node-stopping"})
                await trio.to_thread.run_sync(backing.detach, self._path, self._mount)
                self._stop.set()

    async def _on_command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer a command from the control socket."""
        node = self._node
        assert node is not None
        match command:
            case "status":
                return describe(node) | {"path": str(self._path), "pid": os.getpid()}
            case "measures":
                return node.measures.describe()
            case "promote" if arguments.get("dry_run"):
                return await node.preview.describe(
                    yes=bool(arguments.get("yes")),
                    force=bool(arguments.get("force")),
                    automatic=bool(arguments.get("automatic")),
                )
            case "promote-new":
                return {"message": await node.promotion.promote_new()}
            case "promote":
                return {
                    "message": await node.promotion.promote(
                        yes=bool(arguments.get("yes")),
                        force=bool(arguments.get("force")),
                        automatic=bool(arguments.get("automatic")),
                        outdated=bool(arguments.get("outdated")),
                    )
                }
            case "demote":
                return {"message": await node.promotion.demote(force=bool(arguments.get("force")))}
            case "pause":
                return {"message": await node.pausing.begin(yes=bool(arguments.get("yes")))}
            case "resume":
                return {"message": await node.pausing.resume()}
            case "split-brain-show":
                return await node.split.show(int(arguments.get("offset", 0)))
            case "split-brain-resolve":
                return {"message": await node.split.resolve(str(arguments.get("keep")), yes=bool(arguments.get("yes")))}
            case "lost":
                # The commands use it by themselves, through a descriptor of this process: its path lies under the mount.
                return {"directory": f"/proc/{os.getpid()}/fd/{self._under.lost}"}
            case "verify":
                node.verifier.start(good=str(arguments.get("good", "")), rate_bytes_per_s=float(arguments.get("rate", 0)))
                return {}
            case "verify-look":
                return node.verifier.look(int(arguments.get("since", 0)))
            case "verify-stop":
                node.verifier.stop()
                return {}
            case "unmount":
                return {"message": await self._unmount(node)}
            case _:
                raise UsageError(f"this node does not know the command {command!r}: is it of another version?")

    async def _unmount(self, node: Node) -> str:
        """End cleanly: nobody may have a file open."""
        if node.primary is not None:
            node.primary.settle_all()
        try:
            await trio.to_thread.run_sync(backing.unmount, self._path, self._mount)
        except OSError as error:
            raise MirrorfsError(
                f"{self._path}: cannot be unmounted: {error.strerror}: `fuser -m {self._path}` shows who uses it"
            ) from error
        self._stop.set()
        return f"{self._path} is unmounted"


def run(config: Config, path: Path, *, discard_local_data: bool) -> None:
    """`mirrorfs mount`: everything from the lock to the unmount. Raises MirrorfsError for what a person can mend."""
    os.umask(0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    path = Path(os.path.realpath(path))  # not strict: a dead mount that was left there cannot be looked at
    state = config.node.state_dir.resolve()
    if path == state or path in state.parents:
        raise MirrorfsError(
            f"{config.file}: nodes.{config.node.name}.state_dir: {state} lies on the mount {path}: put it elsewhere"
        )
    if config.peer is not None:
        Trust(config.node.keys).check()
    journal = Journal(state)
    journal.load()  # a record that cannot be read says so before the directory is touched
    lock = backing.lock_file(state / "lock", f"{state}: another mirrorfs process uses it: `mirrorfs unmount` first")
    try:
        under = backing.adopt(path, config.node.backing)
        try:
            journal.save_place(str(under.base))
            trio.run(_run, config, path, under, journal, DirtyLog(state), discard_local_data)
        finally:
            under.close()
    finally:
        os.close(lock)


async def _run(
    config: Config, path: Path, under: backing.Backing, journal: Journal, store: DirtyLog, discard_local_data: bool
) -> None:
    names = sorted(node.name for node in (config.node, config.peer) if node is not None)
    keeper = Keeper(journal, config.node.name, names.index(config.node.name))
    activity = Activity(store, keeper)
    try:
        await Daemon(config, path, under, keeper, activity).run(discard_local_data=discard_local_data)
    finally:
        activity.close()
