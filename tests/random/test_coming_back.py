"""Nodes that are killed and come back, at random, between and under random changes: both trees become equal each time.

`MIRRORFS_RETURNS=200` is the full run; without it a sample.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import other, status, tree_differences, wait_state
from tests.random.mutator import Mutator

pytestmark = pytest.mark.root

RETURNS = int(os.environ.get("MIRRORFS_RETURNS", "8"))
_CHANGES = 80


class _Story:
    """One pair over many losses and returns; what happens is decided by the seed."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.primary: Host = lab.one
        self.random = random.Random(seed)
        self._mutator = Mutator(seed)

    def change(self, changes: int = _CHANGES) -> None:
        self._mutator.run(self.primary.mount, changes)

    def during(self, action: Callable[[], None]) -> None:
        """Changes go on while the action runs."""
        changing = threading.Thread(target=self.change)
        changing.start()
        try:
            action()
        finally:
            changing.join()

    def standby_away(self) -> None:
        """The standby is killed under changes, and comes back under changes."""
        standby = other(self.lab, self.primary)
        self.during(standby.kill)
        wait_state(self.primary, "solo")
        self.change()
        self.during(standby.start)

    def both_crash(self) -> None:
        """The standby is killed, then the primary, which was alone; both start again."""
        standby = other(self.lab, self.primary)
        standby.kill()
        wait_state(self.primary, "solo")
        self.change()
        self.primary.kill()
        first, second = self.random.sample([standby, self.primary], 2)
        first.launch()
        second.launch()
        for host in (first, second):
            host.wait_answering()

    def primary_crashes(self) -> None:
        """The primary is killed under changes; the standby is promoted and goes on alone; the old primary comes back."""
        old, new = self.primary, other(self.lab, self.primary)
        self.during(old.kill)
        wait_for(lambda: status(new).get("peer", {}).get("state") == "disconnected", "the loss is noticed")
        new.promote(yes=True)
        self.primary = new
        self.change()
        self.during(old.start)

    def primary_crashes_twice(self) -> None:
        """As before, and the new primary is killed too before the old one is back."""
        old, new = self.primary, other(self.lab, self.primary)
        old.kill()
        wait_for(lambda: status(new).get("peer", {}).get("state") == "disconnected", "the loss is noticed")
        new.promote(yes=True)
        self.primary = new
        self.change()
        new.kill()
        old.launch()
        new.launch()
        for host in (old, new):
            host.wait_answering()

    def switch_over(self) -> None:
        """The roles are swapped cleanly, and then the new standby is lost."""
        new = other(self.lab, self.primary)
        new.promote()
        self.primary = new
        self.change()
        self.standby_away()

    def interrupted(self) -> None:
        """A resync is cut short by another loss, and again, before it can end."""
        standby = other(self.lab, self.primary)
        standby.kill()
        wait_state(self.primary, "solo")
        self.change(3 * _CHANGES)
        for _ in range(2):
            if not standby.pids():
                standby.launch()
            wait_for(lambda: status(self.primary).get("peer", {}).get("state") != "disconnected", "the link", 30)
            self.random.choice([standby.kill, self._cut_shortly])()
            if not standby.pids():
                self.change()
        if not standby.pids():
            standby.start()

    def _cut_shortly(self) -> None:
        self.lab.cut()
        wait_state(self.primary, "solo")
        self.lab.heal()

    def step(self) -> str:
        """One loss and its return; its name."""
        what = self.random.choice(
            [
                self.standby_away,
                self.both_crash,
                self.primary_crashes,
                self.primary_crashes_twice,
                self.switch_over,
                self.interrupted,
            ]
        )
        self.change()
        what()
        return what.__name__


@pytest.mark.parametrize("seed", range(1, 3))
def test_both_trees_become_equal_after_every_return(tmp_path: Path, seed: int) -> None:
    with Lab.up(tmp_path, options={"ack_timeout": "1s", "checkpoint_interval": "700ms"}) as lab:
        story = _Story(lab, seed)
        for number in range(RETURNS // 2):
            step = story.step()
            lab.wait_mirrored()
            story.change(10)
            assert lab.primary() is story.primary, (seed, number, step)
            assert tree_differences(lab) == [], (seed, number, step)
        logs = "".join(host.log.read_text() for host in lab.hosts.values())
        alarms = [line for line in logs.splitlines() if " ERROR " in line]
        assert alarms == []
        assert logs.count("by a full copy") == 1, "only the first copy was a full one"
        print(
            f"seed {seed}: {RETURNS // 2} losses and returns, {logs.count('by what may differ')} quick resyncs, equal each time"
        )
