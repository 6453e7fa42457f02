"""Run the exerciser by hand: `python -m tests.random --root DIR --seeds N --operations N [--first SEED]`."""  # noqa: A005

import argparse
import time
from pathlib import Path

from tests.random.machine import Exerciser


def main() -> None:
    """Run one seed after the other, each in a new directory under the root that stays there afterwards."""
    parser = argparse.ArgumentParser(prog="python -m tests.random", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a directory; every seed makes one of its own in it")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds (default: %(default)s)")
    parser.add_argument("--operations", type=int, default=5000, help="for each seed (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (default: %(default)s)")
    arguments = parser.parse_args()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        directory = arguments.root / f"seed-{seed}"
        directory.mkdir()
        begin = time.monotonic()
        Exerciser(directory, seed).run(arguments.operations)
        print(f"seed {seed}: {arguments.operations} operations agree, {time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
