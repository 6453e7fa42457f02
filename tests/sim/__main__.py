"""Run the simulator for long: `python -m tests.sim --seeds N [--first K] [--verbose]`, or see it fail: `--mutate`."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Final

from tests.sim import batch, coverage
from tests.sim.mutations import MUTATIONS
from tests.sim.scenarios import SCENARIOS

_SEEDS: Final = 100
_MUTATION_SEEDS: Final = 20_000
_LAST_EVENTS: Final = 60
_PROGRESS_S: Final = 10.0


def main() -> int:
    """Run one seed after the other up to the first that fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=0, help=f"how many ({_SEEDS}; with --mutate {_MUTATION_SEEDS} for each)")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--these", type=int, nargs="+", metavar="SEED", help="these seeds and no others")
    parser.add_argument("--jobs", type=int, default=1, help="in so many processes; 0: one for each core")
    parser.add_argument("--idle", action="store_true", help="only on processor time that nobody else wants")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--coverage", action="store_true", help="which rows of the tables were taken; some are missing: exit 1")
    parser.add_argument(
        "--scenario",
        choices=["random", "failover", "mixed", *SCENARIOS],
        default="random",
        help="random runs of a pair, or of a whole site with its controllers, or a named story, or all of these in turn",
    )
    parser.add_argument(
        "--mutate", nargs="*", metavar="NAME", help="take one step of safety away at a time: each must be found"
    )
    arguments = parser.parse_args()
    if arguments.idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if arguments.mutate is not None:
        seeds = range(arguments.first, arguments.first + (arguments.seeds or _MUTATION_SEEDS))
        return _mutate(arguments.mutate, seeds, arguments.jobs)
    seeds = arguments.these or range(arguments.first, arguments.first + (arguments.seeds or _SEEDS))
    if arguments.verbose:
        return _follow(arguments.scenario, seeds)
    result = _run(arguments.scenario, seeds, jobs=arguments.jobs, keep_going=arguments.keep_going)
    if arguments.coverage:
        print(coverage.table(result.taken))
        for table, row in coverage.missing(result.taken):
            print(f"not taken: {table}: {row}")
        return 1 if result.failures or coverage.missing(result.taken) else 0
    return 1 if result.failures else 0


def _run(scenario: str, seeds: Sequence[int], *, jobs: int, keep_going: bool) -> batch.Result:
    whole = batch.Result()
    began = told = time.monotonic()
    for part in batch.many(scenario, seeds, jobs=jobs):
        whole.add(part)
        for seed, problem in part.failures:
            print(f"seed {seed}: {problem[:400]}", flush=True)
        if whole.failures and not keep_going:
            print("\n".join(batch.one(scenario, whole.failures[0][0]).events[-_LAST_EVENTS:]))
            break
        if time.monotonic() - told > _PROGRESS_S:
            told = time.monotonic()
            print(f"{whole.seeds} seeds: {whole.acknowledged} changes acknowledged, {told - began:.0f} s", flush=True)
    print(
        f"{whole.seeds} seeds, {len(whole.failures)} failed, {whole.acknowledged} changes acknowledged, "
        f"{time.monotonic() - began:.0f} s"
    )
    return whole


def _follow(scenario: str, seeds: Sequence[int]) -> int:
    for seed in seeds:
        world = batch.one(scenario, seed, follow=True)
        if world.problems:
            print(f"seed {seed} fails:\n" + "\n".join(world.problems))
            return 1
    return 0


def _mutate(names: list[str], seeds: Sequence[int], jobs: int) -> int:
    """Say which seed finds each mutation; fails if none does."""
    missed = 0
    for name in names or MUTATIONS:
        parts = batch.many(MUTATIONS[name].story, seeds, name, jobs=jobs)
        with contextlib.closing(parts):
            found = next((part.failures[0] for part in parts if part.failures), None)
        missed += found is None
        print(f"{name}: " + (f"seed {found[0]}: {found[1][:300]}" if found else f"not found by {len(seeds)} seeds"), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    sys.exit(main())
