"""Stories of whole sites that no violation of a promise would tell: where the controllers come to rest."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from mirrorfs.core.controller import Posture
from mirrorfs.errors import MirrorfsError
from tests.sim.machine import Machine
from tests.sim.site import Site
from tests.sim.world import Options, World, run


def _play(act: Callable[[Site], Awaitable[None]], *, seed: int = 1, preferred: str = "", max_failovers: int = 3) -> None:
    async def story(world: World) -> None:
        site = Site(world, preferred=preferred, max_failovers=max_failovers)
        await site.open()
        await site.until(lambda: site.is_served, "the site to be whole")
        await act(site)

    world = run(seed, story, Options(arbiter=True))
    assert world.problems == [], "\n".join(world.events[-60:])


def _reached(site: Site) -> Machine:
    """Where the clients are served."""
    machine = site.world.reached
    assert machine is not None
    return machine


def _ask(site: Site, machine: Machine, command: str, **arguments: bool) -> None:
    """A command that nobody waits for."""
    process, controller = machine.controller, site.controller_of(machine)
    assert process is not None
    assert controller is not None

    async def ask() -> None:
        with process.entered(), suppress(MirrorfsError):
            await controller.on_command(command, arguments)

    site.world.nursery.start_soon(ask)


def test_an_application_that_is_well_does_not_move_for_ever_when_the_controllers_cannot_hear_each_other() -> None:
    async def act(site: Site) -> None:
        site.world.beat_loss = 1.0
        moves, primary = 0, site.primary
        for _ in range(1200):
            await trio.sleep(0.5)
            if site.primary not in (None, primary):
                moves, primary = moves + 1, site.primary
        assert 0 < moves <= 2, "max_failovers on each node"
        assert primary is not None
        assert site.posture(primary) is Posture.SERVING
        assert site.world.reached is primary
        assert site.posture(primary.other) is Posture.HELD

    _play(act, max_failovers=1)


@pytest.mark.parametrize("seed", [1, 4])
def test_a_preferred_node_whose_service_does_not_start_leaves_it_in_the_end_where_it_runs(seed: int) -> None:
    async def act(site: Site) -> None:
        site.a.service_is_broken = True
        assert site.a.service is not None
        site.a.service.crash()
        await site.until(lambda: site.world.reached is site.b, "the other node to serve")
        await trio.sleep(600)
        assert site.posture(site.b) is Posture.SERVING
        assert site.world.reached is site.b

    _play(act, seed=seed, preferred="a")


def test_who_took_over_too_often_takes_over_again_when_a_person_has_looked() -> None:
    async def act(site: Site) -> None:
        for _ in range(2):
            one = _reached(site)
            one.crash()
            await site.until(lambda one=one: site.world.reached is one.other, "the other node to serve")  # type: ignore[misc]
            await site.restart()
            await site.until(lambda: site.is_served, "the site to be whole")
        one, held = _reached(site), _reached(site).other
        one.crash()
        await site.until(lambda: site.posture(held) is Posture.HELD, "the other node to be held")
        _ask(site, held, "maintenance", on=False)
        await site.until(lambda: site.world.reached is held, "it to serve")

    _play(act, max_failovers=1)


def test_an_end_of_maintenance_ends_a_hold_on_the_other_node() -> None:
    async def act(site: Site) -> None:
        one = _reached(site)
        _ask(site, one, "maintenance", on=True)
        await trio.sleep(2)
        one.other.service_is_broken = True
        _ask(site, one, "switchover")
        await site.until(lambda: site.posture(one.other) is Posture.HELD, "the other node to be held")
        one.other.service_is_broken = False
        _ask(site, one, "maintenance", on=False)
        await site.until(lambda: site.world.reached is one.other, "it to serve")

    _play(act)


def test_what_a_controller_has_found_in_maintenance_does_not_outlive_the_mount() -> None:
    async def act(site: Site) -> None:
        one = _reached(site)
        _ask(site, one, "maintenance", on=True)
        await trio.sleep(2)
        one.kill_controller()
        await site.start_controller(one)
        await trio.sleep(5)
        assert site.posture(one) is Posture.IDLE
        assert one.service is not None, "it is left alone"
        one.crash()
        await site.until(lambda: one.service is None, "it to be stopped")

    _play(act)
