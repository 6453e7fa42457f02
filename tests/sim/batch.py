"""Many runs, in several processes: which seeds broke a promise, and which rows of the tables were taken."""

import os
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.sim import failover_run, random_run
from tests.sim.coverage import Row, counted
from tests.sim.mutations import MUTATIONS
from tests.sim.scenarios import SCENARIOS, Story
from tests.sim.world import Options, World, run

#: Runs that one process makes before it tells of them.
_AT_ONCE = 40
_MIXTURE = [name for story in SCENARIOS for name in ("random", "failover", "failover", story)]


@dataclass
class Result:
    """What came of some runs."""

    seeds: int = 0
    acknowledged: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    taken: Counter[Row] = field(default_factory=Counter)

    def add(self, other: "Result") -> None:
        """Take the others in."""
        self.seeds += other.seeds
        self.acknowledged += other.acknowledged
        self.failures += other.failures
        self.taken += other.taken


def story_of(scenario: str, seed: int) -> tuple[Story, Options]:
    """The story of that name and how its pair is configured; a random one depends on the seed."""
    match scenario:
        case "random":
            return random_run.story, random_run.options_of(seed)
        case "failover":
            return failover_run.story, failover_run.options_of(seed)
        case "mixed":
            return story_of(_MIXTURE[seed % len(_MIXTURE)], seed)
        case _:
            return SCENARIOS[scenario], Options(2.0)


def one(scenario: str, seed: int, mutation: str = "", *, follow: bool = False) -> World:
    """One run, perhaps without one step of safety."""
    story, options = story_of(scenario, seed)
    if not mutation:
        return run(seed, story, options, follow=follow)
    with MUTATIONS[mutation].made():
        return run(seed, story, options, follow=follow)


def some(scenario: str, seeds: Sequence[int], mutation: str = "") -> Result:
    """These runs, one after the other."""
    result = Result()
    with counted(result.taken):
        for seed in seeds:
            world = one(scenario, seed, mutation)
            result.seeds += 1
            result.acknowledged += world.acknowledged
            if world.problems:
                result.failures.append((seed, world.problems[0].splitlines()[0]))
    return result


def many(scenario: str, seeds: Sequence[int], mutation: str = "", *, jobs: int = 0) -> Generator[Result]:
    """These runs, some at a time, in `jobs` processes (0: one for each core); results come in the order of the seeds."""
    parted = [seeds[start : start + _AT_ONCE] for start in range(0, len(seeds), _AT_ONCE)]
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        parts = [pool.submit(some, scenario, part, mutation) for part in parted]
        try:
            for part in parts:
                yield part.result()
        finally:
            for part in parts:
                part.cancel()
