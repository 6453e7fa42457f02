"""Run the simulator for long: `python -m tests.sim --seeds N [--first K] [--verbose]`."""

import argparse
import os
import sys
import time
from typing import Final

from tests.sim import random_run
from tests.sim.scenarios import SCENARIOS
from tests.sim.world import Options, run

_LAST_EVENTS: Final = 60
_PROGRESS_S: Final = 10.0


def main() -> int:
    """Run one seed after the other up to the first that fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument(
        "--scenario", choices=["random", *SCENARIOS], default="random", help="a named story instead of random runs"
    )
    arguments = parser.parse_args()
    options_of = random_run.options_of if arguments.scenario == "random" else lambda seed: Options(2.0)
    story = SCENARIOS.get(arguments.scenario, random_run.story)
    began = told = time.monotonic()
    failed = acknowledged = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
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
    print(f"{arguments.seeds} seeds, {failed} failed, {acknowledged} changes acknowledged, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    sys.exit(main())
