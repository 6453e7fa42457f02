"""The application as a whole: what was asked for last holds, however close together a start and a stop come."""

from collections.abc import Callable, Mapping
from pathlib import Path

import trio
from trio.testing import MockClock

from mirrorfs.application import Application
from mirrorfs.core.controller import Services
from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import FailoverConfig, ServiceConfig
from mirrorfs.failover_memory import Memory
from mirrorfs.vip import Conflict
from tests.services.support import eventually


class Addresses:
    """Addresses that are where they are put."""

    def __init__(self) -> None:
        self.trouble = ""
        self.is_up = False

    async def conflicts(self) -> list[Conflict]:
        return []

    async def raise_all(self) -> None:
        self.is_up = True

    async def drop_all(self) -> None:
        self.is_up = False

    def macs(self) -> list[str]:
        return []


class Running:
    """One service, which takes a while for everything. `well` is what its check says."""

    def __init__(self, *, there: bool = False, well: bool = True) -> None:
        self.there = there
        self.well = well
        self.calls: list[str] = []

    async def start_all(self) -> None:
        self.calls.append("start")
        await trio.sleep(0.01)
        self.there = self.well = True

    async def stop_all(self) -> list[str]:
        self.calls.append("stop")
        await trio.sleep(0.01)
        self.there = False
        return []

    async def restart(self, name: str) -> None:
        raise AssertionError(name)

    async def running(self) -> dict[str, bool]:
        await trio.sleep(0.01)
        return {"a": self.there and self.well}

    async def left(self, running: Mapping[str, bool]) -> list[str]:
        return ["a"] if self.there else []

    async def watch(self, on_unwell: Callable[[str, str], None]) -> None:
        await trio.sleep_forever()


def application(tmp_path: Path, services: Running, addresses: Addresses) -> Application:
    service = ServiceConfig("a", restarts=1)
    settings = FailoverConfig(tmp_path / "key", services=(service,))
    memory = Memory(tmp_path / "memory.json", max_failovers=3, window_s=60)
    return Application(settings, memory, addresses, services, lambda: None)


async def test_an_end_that_follows_a_beginning_at_once_leaves_nothing_running(tmp_path: Path) -> None:
    services, addresses = Running(), Addresses()
    one = application(tmp_path, services, addresses)
    async with trio.open_nursery() as nursery:
        one.begin(nursery)
        one.end(nursery, lambda: None)
    assert (one.state, services.there, addresses.is_up) == (Services.DOWN, False, False)


async def test_a_beginning_that_follows_an_end_at_once_runs(tmp_path: Path) -> None:
    services, addresses = Running(there=True), Addresses()
    one = application(tmp_path, services, addresses)
    async with trio.open_nursery() as nursery:
        one.end(nursery, lambda: None)
        one.begin(nursery)
        await eventually(lambda: addresses.is_up)
        assert (one.state, services.there) == (Services.UP, True)
        nursery.cancel_scope.cancel()


async def test_what_is_well_is_adopted_and_what_is_not_is_started_anew(tmp_path: Path) -> None:
    for well, calls in ((True, []), (False, ["stop", "start"])):
        services = Running(there=True, well=well)
        async with trio.open_nursery() as nursery:
            one = application(tmp_path, services, Addresses())
            one.begin(nursery)
            await eventually(lambda one=one: one.state is Services.UP)  # type: ignore[misc]
            nursery.cancel_scope.cancel()
        assert services.calls == calls


async def test_what_an_earlier_controller_has_left_is_known(tmp_path: Path) -> None:
    for there, state in ((True, Services.UP), (False, Services.DOWN)):
        services, addresses = Running(there=there, well=False), Addresses()
        addresses.is_up = True
        one = application(tmp_path, services, addresses)
        await one.look()
        assert (one.state, services.calls, addresses.is_up) == (state, [], False)


class Failing(Running):
    """Both of its checks fail at once, and so do the first restarts."""

    def __init__(self, *, fails: int) -> None:
        super().__init__()
        self.fails = fails
        self.restarts = 0

    async def restart(self, name: str) -> None:
        self.restarts += 1
        await trio.sleep(0.01)
        if self.restarts <= self.fails:
            raise MirrorfsError("it does not start")

    async def watch(self, on_unwell: Callable[[str, str], None]) -> None:
        for check in ("one check", "another one"):
            on_unwell("a", check)
        await trio.sleep_forever()


async def test_checks_that_fail_together_restart_their_service_once(tmp_path: Path) -> None:
    services, addresses = Failing(fails=0), Addresses()
    one = application(tmp_path, services, addresses)
    async with trio.open_nursery() as nursery:
        one.begin(nursery)
        await eventually(lambda: services.restarts > 0)
        await trio.sleep(0.1)
        assert (services.restarts, one.unwell) == (1, False)
        nursery.cancel_scope.cancel()


async def test_a_service_that_is_well_after_all_is_not_unwell_any_more(tmp_path: Path, autojump_clock: MockClock) -> None:
    services, addresses = Failing(fails=1), Addresses()
    one = application(tmp_path, services, addresses)
    async with trio.open_nursery() as nursery:
        one.begin(nursery)
        await eventually(lambda: one.unwell)
        await trio.sleep(60)
        assert (one.unwell, services.restarts) == (False, 2)
        nursery.cancel_scope.cancel()


async def test_what_a_controller_must_know_again_is_written_beside_everything_else(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    memory = Memory(file, max_failovers=3, window_s=60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.keep)
        memory.set_maintenance(True)
        await eventually(file.exists)
        memory.count_failover(100.0)
        nursery.cancel_scope.cancel()  # what is new is written all the same
    again = Memory(file, max_failovers=3, window_s=60)
    assert again.maintenance
    assert again.failovers.left(101.0) == 2
