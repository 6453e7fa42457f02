"""Random operations on the mount of a mirrored pair: they agree with the model, and both backing trees are equal afterwards.

`MIRRORFS_SEEDS=20 MIRRORFS_OPERATIONS=5000` is the full run; without them a sample of it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Lab, wait_for
from mirrorfs.lab.trees import differences
from tests.random.machine import Exerciser

pytestmark = pytest.mark.root

SEEDS = range(1, 1 + int(os.environ.get("MIRRORFS_SEEDS", "5")))
OPERATIONS = int(os.environ.get("MIRRORFS_OPERATIONS", "5000"))


def assert_equal_trees(lab: Lab) -> None:
    """Wait for the times to settle, then compare; nobody may write meanwhile."""
    primary = lab.primary()
    assert primary is not None
    wait_for(lambda: bool(primary.status()["settled"]), "the times to settle")
    assert differences(lab.one.backing, lab.two.backing) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_random_operations_agree_with_the_model_and_leave_both_trees_equal(mirrored: Lab, seed: int) -> None:
    root = mirrored.one.mount / f"random-{seed}"
    root.mkdir()
    Exerciser(root, seed).run(OPERATIONS)
    assert_equal_trees(mirrored)
    assert mirrored.is_mirrored()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab.up(tmp_path) as lab:
        yield lab


def _populate(top: Path) -> None:
    """So many files that a copy takes longer than a few operations."""
    for directory in range(60):
        (top / f"d{directory}").mkdir()
        for file in range(30):
            (top / f"d{directory}" / f"f{file}").write_bytes(os.urandom(200 * file))


def test_random_operations_while_the_peer_is_copied_to_again_and_again_leave_both_trees_equal(lab: Lab) -> None:
    top = lab.one.mount
    _populate(top)
    for seed in (101, 102):
        (top / str(seed)).mkdir()
    exercisers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from tests.random.machine import Exerciser; from pathlib import Path; "
                f"Exerciser(Path({str(top / str(seed))!r}), {seed}).run(4000)",
            ],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (101, 102)
    ]
    rounds = 0
    try:
        while any(exerciser.poll() is None for exerciser in exercisers) or rounds == 0:
            lab.two.kill()
            lab.two.start()
            lab.wait_mirrored()
            rounds += 1
    finally:
        failures = [exerciser.communicate()[1] for exerciser in exercisers]
    assert [exerciser.returncode for exerciser in exercisers] == [0, 0], failures
    assert_equal_trees(lab)
