"""The application on this node: its services and its addresses, started, watched, mended and stopped as one."""

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import trio

from mirrorfs.core.controller import Budget, Services
from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import FailoverConfig
from mirrorfs.failover_memory import Memory
from mirrorfs.vip import Conflict

log = logging.getLogger(__name__)

_ADDRESS_RETRY_S: Final = 2.0
_UNWELL_RETRY_S: Final = 30.0


class AddressPort(Protocol):
    """The virtual addresses, as `vip.Addresses`."""

    trouble: str

    @property
    def is_up(self) -> bool:
        """Whether all are there."""

    async def conflicts(self) -> list[Conflict]:
        """Who else answers for one."""

    async def raise_all(self) -> None:
        """Put them on their interfaces."""

    async def drop_all(self) -> None:
        """Take them away."""

    def macs(self) -> list[str]:
        """Of this node's interfaces."""


class ServicePort(Protocol):
    """The services, as `services.Services`."""

    async def start_all(self) -> None:
        """In order."""

    async def stop_all(self) -> list[str]:
        """In the reverse order."""

    async def restart(self, name: str) -> None:
        """One of them."""

    async def running(self) -> dict[str, bool]:
        """Which are there, and well."""

    async def left(self, running: Mapping[str, bool]) -> list[str]:
        """Of which anything is there, well (as `running` says) or not."""

    async def watch(self, on_unwell: Callable[[str, str], None]) -> None:
        """Check them for ever."""


class Application:
    """What runs on the primary and nowhere else. `changed` is called when something about it has changed.

    `state` is that of the services all together, `unwell` says that one was restarted as often as it may be, `trouble` is a
    line for a person.
    """

    def __init__(
        self,
        settings: FailoverConfig,
        memory: Memory,
        addresses: AddressPort,
        services: ServicePort,
        changed: Callable[[], None],
    ) -> None:
        self.state = Services.DOWN
        self.unwell = False
        self.trouble = ""
        self._settings = settings
        self._memory = memory
        self._addresses = addresses
        self._services = services
        self._changed = changed
        self._serving = trio.CancelScope()
        #: Set when what was asked for last has ended.
        self._over = trio.Event()
        self._over.set()
        self._restarting = trio.Lock()
        self._mending: set[str] = set()
        self._budgets = self._fresh_budgets()

    def _fresh_budgets(self) -> dict[str, Budget]:
        return {s.name: Budget(s.restarts, s.restart_window_s) for s in self._settings.services}

    @property
    def is_reachable(self) -> bool:
        """Whether its addresses are here."""
        return self._addresses.is_up

    @property
    def address_trouble(self) -> str:
        """What is wrong with the addresses."""
        return self._addresses.trouble

    def macs(self) -> list[str]:
        """Of the interfaces for its addresses."""
        return self._addresses.macs()

    def complain(self, text: str, extra: Mapping[str, object] | None = None) -> None:
        """A line for a person, in the log once; `extra` as for `logging`."""
        if text != self.trouble:
            log.warning("%s", text, extra=extra)
        self.trouble = text

    async def look(self) -> None:
        """An earlier controller may have left addresses behind, which go, and services, which are there until they are started
        or stopped."""
        await self._drop_addresses()
        if left := await self._services.left(await self._services.running()):
            log.info("an earlier controller has left here: %s", ", ".join(left))
            self.state = Services.UP

    def begin(self, nursery: trio.Nursery) -> None:
        """Start the services, raise the addresses, watch both in a task of `nursery`, until `end` or `stop`."""
        self.state = Services.STARTING
        self._serving = trio.CancelScope()
        nursery.start_soon(self._serve, self._serving, self._after_the_last())

    @contextlib.asynccontextmanager
    async def _in_turn(self, before: trio.Event, over: trio.Event) -> AsyncIterator[None]:
        try:
            await before.wait()
            yield
        finally:
            with trio.CancelScope(shield=True):
                await before.wait()
            over.set()

    def _after_the_last(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The turn of what is asked for now: it comes when what was asked for before has ended. It is taken here and not by the
        task that waits for it, since tasks begin in any order."""
        before, self._over = self._over, trio.Event()
        return self._in_turn(before, self._over)

    async def _serve(self, wanted: trio.CancelScope, turn: contextlib.AbstractAsyncContextManager[None]) -> None:
        with wanted:
            async with turn:
                self.state = Services.STARTING
                if not await self._start():
                    return
                self.trouble, self.unwell = "", False
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_addresses)
                    nursery.start_soon(self._services.watch, lambda name, why: self._begin_mending(nursery, name, why))

    async def _start(self) -> bool:
        running = await self._services.running()
        try:
            if not running or not all(running.values()):
                if left := await self._services.left(running):
                    log.info("not all services are well, and something is there of %s: started anew", ", ".join(left))
                    for complaint in await self._services.stop_all():
                        self.complain(complaint)
                began = trio.current_time()
                await self._services.start_all()
                self._memory.note_start(trio.current_time() - began)
        except MirrorfsError as error:
            self.complain(str(error), {"event": "services-failed", "reason": str(error)})
            self.state = Services.FAILED
        else:
            log.info("the services are up", extra={"event": "services-up"})
            self.state = Services.UP
        self._changed()
        return self.state is Services.UP

    async def _keep_addresses(self) -> None:
        """Put them there as soon as nobody but the deposed node answers for them."""
        while True:
            if not self._addresses.is_up:
                try:
                    foreign = [c for c in await self._addresses.conflicts() if c.mac not in self._memory.peer_macs]
                    if foreign:
                        taken = ", ".join(f"{conflict.address} by {conflict.mac}" for conflict in foreign)
                        raise MirrorfsError(f"in use by another machine: {taken}: remove it there; the address is not raised")
                    await self._addresses.raise_all()
                    log.info("the addresses are here", extra={"event": "addresses-up"})
                    self.trouble = ""
                    self._changed()
                except MirrorfsError as error:
                    self.complain(str(error))
            await trio.sleep(_ADDRESS_RETRY_S)

    def _begin_mending(self, nursery: trio.Nursery, name: str, why: str) -> None:
        if name not in self._mending:  # several of its checks may fail together
            self._mending.add(name)
            nursery.start_soon(self._mend, name, why)

    async def _mend(self, name: str, why: str) -> None:
        """A service is unwell: restart it where it is, as often as it may be; after that the other node is to have it."""
        try:
            async with self._restarting:
                await self._restart(name, why)
        finally:
            self._mending.discard(name)
        self.unwell = False
        self._changed()

    async def _restart(self, name: str, why: str) -> None:
        while True:
            budget = self._budgets[name]
            if budget.left(trio.current_time()) <= 0:
                text = f"{name}: restarted {budget.limit} times and unwell again: {why}"
                self.complain(text, {"event": "service-unwell", "service": name, "reason": why})
                self.unwell = True
                self._changed()
                await trio.sleep(_UNWELL_RETRY_S)  # if nobody else could take it meanwhile, it is tried on
            else:
                # Each time is told, also where the reason is the same.
                self.trouble = f"{name}: {why}: it is restarted"
                extra = {"event": "service-restarted", "service": name, "reason": why}
                log.warning("%s", self.trouble, extra=extra)
                self._budgets[name] = budget.spend(trio.current_time())
            try:
                await self._services.restart(name)
            except MirrorfsError as error:
                why = str(error)
            else:
                return

    def end(self, nursery: trio.Nursery, before: Callable[[], None]) -> None:
        """In a task of `nursery`, the addresses first, then the services; in between, what has to be done `before` they can
        end."""
        self.state = Services.STOPPING
        self._serving.cancel()
        nursery.start_soon(self._stop, before, self._after_the_last())

    async def stop(self) -> None:
        """The same at once."""
        self._serving.cancel()
        await self._stop(lambda: None, self._after_the_last())

    async def _stop(self, before: Callable[[], None], turn: contextlib.AbstractAsyncContextManager[None]) -> None:
        async with turn:
            self.state = Services.STOPPING
            await self._drop_addresses()
            before()
            began = trio.current_time()
            for complaint in await self._services.stop_all():
                self.complain(complaint)
            self._memory.note_stop(trio.current_time() - began)
            log.info("the services are down", extra={"event": "services-down"})
            self.state, self.unwell = Services.DOWN, False
            self._budgets = self._fresh_budgets()
        self._changed()

    async def _drop_addresses(self) -> None:
        try:
            await self._addresses.drop_all()
        except MirrorfsError as error:
            self.complain(str(error))  # nobody renews it: the kernel drops it by itself


def start_time(pid: int) -> str:
    """What tells this process from a later one of the same pid; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def kill(pid: int, started: str) -> None:
    """SIGKILL to the process with that pid and start time, and to no other."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if start_time(pid) == started:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
