"""Run the simulator for long: `python -m tests.sim --seeds N [--first K] [--verbose]`, or see it fail: `--mutate`."""

import argparse
import os
import sys
import time
from typing import Final

from tests.sim import arbitrated_run, failover_run, mutations, random_run
from tests.sim.scenarios import SCENARIOS
from tests.sim.world import Options, run

_SEEDS: Final = 100
_MUTATION_SEEDS: Final = 500
_LAST_EVENTS: Final = 60
_PROGRESS_S: Final = 10.0


def main() -> int:
    """Run one seed after the other up to the first that fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="how many (100; with --mutate up to 500 for each)")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--these", type=int, nargs="+", metavar="SEED", help="these seeds and no others")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument(
        "--scenario",
        choices=["random", "arbitrated", "failover", *SCENARIOS],
        default="random",
        help="a named story instead of random runs",
    )
    parser.add_argument(
        "--mutate", nargs="*", metavar="NAME", help="take one step of safety away at a time: each must be found"
    )
    arguments = parser.parse_args()
    if arguments.mutate is not None:
        return _mutate(arguments.mutate, arguments.first, arguments.seeds or _MUTATION_SEEDS)
    seeds = arguments.these or range(arguments.first, arguments.first + (arguments.seeds or _SEEDS))
    runs = {"random": random_run, "arbitrated": arbitrated_run, "failover": failover_run}.get(arguments.scenario)
    options_of = runs.options_of if runs else lambda seed: Options(2.0)
    story = runs.story if runs else SCENARIOS[arguments.scenario]
    began = told = time.monotonic()
    failed = acknowledged = 0
    for seed in seeds:
        world = run(seed, story, options_of(seed), follow=arguments.verbose)
        acknowledged += world.acknowledged
        if world.problems:
            failed += 1
            if arguments.keep_going:
                print(f"seed {seed}: {world.problems[0].splitlines()[0][:400]}", flush=True)
                continue
            print("\n".join([] if arguments.verbose else world.events[-_LAST_EVENTS:]))
            print(f"seed {seed} fails:\n" + "\n".join(world.problems))
            return 1
        if time.monotonic() - told > _PROGRESS_S:
            told = time.monotonic()
            print(f"seed {seed}: {acknowledged} changes acknowledged, {told - began:.0f} s", flush=True)
    print(f"{len(seeds)} seeds, {failed} failed, {acknowledged} changes acknowledged, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _mutate(names: list[str], first: int, seeds: int) -> int:
    """Say which seed finds each mutation; fails if none does."""
    missed = 0
    for name in names or mutations.MUTATIONS:
        found = mutations.find(name, first, seeds)
        missed += found is None
        print(f"{name}: " + (f"seed {found[0]}: {found[1][:300]}" if found else f"not found by {seeds} seeds"), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    sys.exit(main())
