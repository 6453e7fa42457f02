"""A controller from its start: what it leaves alone, and what it stops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mirrorfs.config import Config, NodeConfig, ReplicationConfig
from mirrorfs.core.controller import Posture
from mirrorfs.errors import RefusedError
from mirrorfs.failover import Controller
from mirrorfs.failover_config import FailoverConfig
from mirrorfs.failover_memory import Memory
from mirrorfs.watch import Condition
from tests.services.support import eventually
from tests.unit.test_application import Addresses, Running


class Answering:
    """A mount that answers, and says what it is told to."""

    condition = Condition.ANSWERS

    def __init__(self, state: str, *, frozen: bool) -> None:
        self.status: dict[str, Any] | None = {"state": state, "frozen": frozen, "peer": {"state": "connected"}}

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        raise AssertionError(command)


class Heard:
    """The other controller is there."""

    silent_s = 0.0
    networks: dict[str, bool] = {}  # noqa: RUF012

    def poke(self) -> None:
        pass


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Answering, Running], Controller]:
    def make(mount: Answering, services: Running) -> Controller:
        node = NodeConfig("one", "one", 1, None, tmp_path, tmp_path, tmp_path, ("one",), tmp_path)
        memory = Memory(tmp_path / "memory.json", max_failovers=3, window_s=60)
        config = Config(tmp_path / "db.toml", "db", node, None, ReplicationConfig())
        controller = Controller(config, FailoverConfig(tmp_path / "key"), memory, mount, Addresses(), services)
        controller.heart = Heard()
        return controller

    return make


@pytest.mark.parametrize(("thaws_s", "calls"), [(0.5, []), (1.5, ["stop", "start"])])
async def test_a_freeze_that_may_end_is_waited_for_when_a_controller_starts(
    make: Callable[[Answering, Running], Controller], autojump_clock: MockClock, thaws_s: float, calls: list[str]
) -> None:
    mount, services = Answering("primary", frozen=True), Running(there=True)
    controller = make(mount, services)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run)
        await trio.sleep(thaws_s)
        mount.status = {"state": "primary", "frozen": False, "peer": {"state": "connected"}}
        controller.wake()
        await trio.sleep(0.2)
        assert services.calls == calls
        nursery.cancel_scope.cancel()


async def test_what_an_earlier_controller_left_on_a_standby_is_stopped(
    make: Callable[[Answering, Running], Controller], autojump_clock: MockClock
) -> None:
    services = Running(there=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(make(Answering("standby", frozen=False), services).run)
        await eventually(lambda: services.calls == ["stop"])
        nursery.cancel_scope.cancel()


async def test_a_mount_that_took_long_to_answer_makes_no_loss_of_a_node_that_could_not_be_heard_yet(
    make: Callable[[Answering, Running], Controller], autojump_clock: MockClock
) -> None:
    mount = Answering("waiting", frozen=False)
    mount.status = {"state": "waiting", "frozen": False, "peer": {"state": "disconnected"}}
    controller = make(mount, Running())
    await trio.sleep(3)  # the heartbeats begin after it
    async with trio.open_nursery() as nursery:
        await nursery.start(controller.run)
        await trio.sleep(1)
        assert controller.posture is Posture.IDLE
        nursery.cancel_scope.cancel()


async def test_who_is_held_says_so_at_once_when_a_person_wants_it_there(
    make: Callable[[Answering, Running], Controller],
) -> None:
    controller = make(Answering("standby", frozen=False), Running())
    controller.posture = Posture.HELD
    with pytest.raises(RefusedError, match=r"one is held .*: `mirrorfs maintenance off` ends that"):
        await controller.promote(yes=False, force=False)


class Asked(Answering):
    """Refuses everything, and notes what it was."""

    def __init__(self) -> None:
        super().__init__("standby", frozen=False)
        self.asked: list[dict[str, Any]] = []

    async def ask(self, command: str, timeout_s: float = 60, **arguments: Any) -> dict[str, Any]:
        self.asked.append(arguments)
        raise RefusedError("no")


@pytest.mark.parametrize(("last", "outdated"), [("stopped", True), ("leading", False)])
async def test_a_primary_that_was_alone_and_died_before_the_loss_was_noticed_here_was_alone(
    make: Callable[[Answering, Running], Controller], autojump_clock: MockClock, last: str, outdated: bool
) -> None:
    mount = Asked()
    controller = make(mount, Running())
    said = {"posture": "serving", "asks": False, "refuses": "", "maintenance": [0, False], "macs": []}
    async with trio.open_nursery() as nursery:
        await nursery.start(controller.run)
        controller.hear(said | {"mount": "leading", "alone": True})
        controller.hear(said | {"mount": last, "alone": False})
        await trio.sleep(0.2)
        controller.hear(said | {"mount": "stopped", "alone": False})
        mount.status = {"state": "waiting", "peer": {"state": "disconnected"}}
        await trio.sleep(0.2)
        assert mount.asked[0] == {"automatic": True, "outdated": outdated}
        nursery.cancel_scope.cancel()
