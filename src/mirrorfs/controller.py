"""The composition root of `mirrorfs controller`: the watch, the heartbeats, the addresses, the services, and a `Controller`."""

import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from mirrorfs import backing, control, systemd
from mirrorfs.config import Config
from mirrorfs.console.observer import NodePort
from mirrorfs.console.picture import Seen
from mirrorfs.errors import ConfigError
from mirrorfs.failover import Controller
from mirrorfs.failover_memory import Memory
from mirrorfs.heartbeat import KEY_LOOK_S, Heartbeats, KeyFiles, load_key
from mirrorfs.services import Services
from mirrorfs.trust import Trust
from mirrorfs.vip import Addresses
from mirrorfs.watch import MountWatch

log = logging.getLogger(__name__)


class _Node(NodePort):
    """What the console sees of the node."""

    def __init__(self, config: Config, controller: Controller, mount: MountWatch) -> None:
        assert config.peer is not None
        self._names = config.node.name, config.peer.name
        self._controller = controller
        self._mount = mount
        # Each question takes a thread, and one to a mount that hangs keeps it: the controller needs some itself.
        self._asking = trio.CapacityLimiter(4)

    def see(self) -> Seen:
        condition = self._mount.condition.name.lower()
        status = self._mount.status if condition == "answers" else None
        return Seen(time.time(), *self._names, condition, status, self._controller.describe())

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        async with self._asking:
            return await self._mount.ask(command, timeout_s, **arguments)

    async def command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._controller.on_command(command, arguments)


_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(config: Config) -> None:
    """`mirrorfs controller`, in the foreground until it is told to stop. Raises MirrorfsError for what a person can mend."""
    if config.failover is None or config.peer is None:
        raise ConfigError(f"{config.file}: failover: missing, add [failover]: the controller needs it")
    keys = _keys(config, config.failover.key_file)
    state = config.node.state_dir.resolve()
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if config.console.enabled:
        _load_console()
    lock = backing.lock_file(state / "controller.lock", f"{state}: another mirrorfs controller uses it: stop it first")
    try:
        trio.run(_run, config, keys)
    finally:
        os.close(lock)


def _load_console() -> Callable[[Config, NodePort], Awaitable[None]] | None:
    """What serves the console; None if its libraries cannot be loaded, and then there is none. First before the loop runs: it
    takes half a second, in which no heartbeat would go out."""
    try:
        from mirrorfs.console.server import serve
    except Exception:
        log.exception("no console: its libraries cannot be loaded")
        return None
    return serve


def _keys(config: Config, file: Path | None) -> KeyFiles:
    if file is not None:
        return KeyFiles(partial(load_key, file), [file])
    trust = Trust(config.node.keys)
    return KeyFiles(partial(trust.shared_key, f"heartbeats {config.volume}"), trust.shared_key_files)


async def _renew_key(heart: Heartbeats, keys: KeyFiles) -> None:
    """What nodes that were introduced to each other anew hear each other with."""
    while True:
        await trio.sleep(KEY_LOOK_S)
        if keys.refresh():
            heart.use_key(keys.key)
            log.info("the heartbeats have another key from now on")


async def _run(config: Config, keys: KeyFiles) -> None:
    settings, peer, state = config.failover, config.peer, config.node.state_dir
    assert settings is not None
    assert peer is not None
    memory = Memory(state / "controller.json", max_failovers=settings.max_failovers, window_s=settings.failover_window_s)
    mount = MountWatch(config.node.control, deadline_s=settings.detection_timeout_s)
    addresses = Addresses(settings.vips, up_command=settings.vip_up, down_command=settings.vip_down)
    services = Services(settings.services, state / "services")
    controller = Controller(config, settings, memory, mount, addresses, services)
    heart = Heartbeats(
        config.volume, config.node, peer, settings.port, keys.key, content=controller.say, on_heard=controller.hear
    )
    controller.heart = heart
    mount.on_change = controller.wake
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.keep)
        # First what the mount is: a controller that does not know takes it for stopped, tells the other one so, and stops the
        # application that an earlier controller has left where it belongs.
        await nursery.start(mount.run)
        await nursery.start(addresses.run)
        await nursery.start(heart.run)
        nursery.start_soon(_renew_key, heart, keys)
        await nursery.start(control.serve, config.node.controller, controller.on_command)
        await nursery.start(controller.run)
        log.info("the controller of %s runs", config.node.name, extra={"event": "controller-ready"})
        systemd.notify("READY=1")
        nursery.start_soon(systemd.show_life)
        if config.console.enabled and (serve := _load_console()) is not None:
            nursery.start_soon(serve, config, _Node(config, controller, mount))
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            async for _ in signals:
                break
        log.info("asked to stop", extra={"event": "controller-stopping"})
        await controller.stop()
        nursery.cancel_scope.cancel()
