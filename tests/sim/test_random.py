"""A sample of random runs, and that a seed replays its run exactly; `python -m tests.sim --seeds N` runs more."""

import os
import subprocess
import sys

from tests.sim import random_run
from tests.sim.world import run

#: Seeds that found a defect once, in the product or in what it was checked against.
_FOUND_ONCE = (497, 2020, 2153, 3062, 3333, 5004, 5092, 10450, 10700, 10819, 11102, 11463, 12241, 30675, 60319, 70338)
_SEEDS = os.environ.get("MIRRORFS_SIM_SEEDS", "12")


def test_a_sample_of_random_runs_breaks_no_promise() -> None:
    _run("--seeds", _SEEDS)


def test_a_sample_of_runs_with_an_arbiter_breaks_no_promise() -> None:
    _run("--scenario", "arbitrated", "--seeds", str(50 * int(_SEEDS)))


def test_seeds_that_found_a_defect_once_break_no_promise() -> None:
    _run("--these", *map(str, _FOUND_ONCE))


def _run(*arguments: str) -> None:
    """In a process of its own, so that the order of sets is the same as on the command line."""
    command = [sys.executable, "-m", "tests.sim", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_a_seed_replays_its_run_exactly() -> None:
    first, second = (run(2, random_run.story, random_run.options_of(2)) for _ in range(2))
    assert first.events == second.events
    assert first.digest == second.digest
    assert first.acknowledged > 20


def test_another_seed_is_another_run() -> None:
    digests = {run(seed, random_run.story, random_run.options_of(seed)).digest for seed in (2, 3)}
    assert len(digests) == 2
