"""The application as a whole: what was asked for last holds, however close together a start and a stop come."""

from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from mirrorfs.application import Application
from mirrorfs.core.controller import Services
from mirrorfs.failover_config import FailoverConfig
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
    settings = FailoverConfig(tmp_path / "key")
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
