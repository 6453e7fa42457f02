"""The named stories, each with a few seeds; `python -m tests.sim --scenario NAME --seeds N` runs more."""

import os

import pytest

from tests.sim.scenarios import SCENARIOS
from tests.sim.world import Options, run

_SEEDS = int(os.environ.get("MIRRORFS_SIM_SCENARIO_SEEDS", "2"))


@pytest.mark.parametrize("seed", range(1, _SEEDS + 1))
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_story_breaks_no_promise(name: str, seed: int) -> None:
    world = run(seed, SCENARIOS[name], Options(checkpoint_interval_s=2.0))
    assert world.problems == [], "\n".join(world.events[-60:])
