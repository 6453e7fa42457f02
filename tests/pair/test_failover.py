"""The promise of the whole: kill -9 of the primary at a random moment loses nothing that was acknowledged.

`MIRRORFS_KILLS=50 python -m pytest -s tests/pair/test_failover.py` is the full run: fifty moments on one pair, the roles
alternating. Without the variable it is five.
"""

import os
import shutil
from collections.abc import Callable

import pytest

from mirrorfs.lab.pair import Lab
from tests.pair.support import Load, other, seeded, tree_differences, wait_peer_lost

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("MIRRORFS_KILLS") or "5")


def test_killing_the_primary_at_random_moments_loses_no_acknowledged_change(lab: Lab, start_load: Callable[..., Load]) -> None:
    chance = seeded("kills")
    primary = lab.one
    acknowledged = 0
    for kill in range(KILLS):
        standby = other(lab, primary)
        load = start_load(primary.mount, f"kill-{kill}", seed=kill)
        load.wait_noted(chance.randrange(30, 600))
        primary.kill()
        errors = load.ended()
        # The kernel's own EIO: a request that the node was about to read when it was killed.
        assert set(errors) <= {"ECONNABORTED", "ENOTCONN", "EIO"}, f"{errors}{primary.log_tail()}"
        assert "a defect in" not in primary.log.read_text(), primary.log_tail()
        wait_peer_lost(standby)
        standby.promote(yes=True)
        assert load.missing(standby.mount) == [], f"missing after kill {kill}"
        acknowledged += load.noted()

        meanwhile = start_load(standby.mount, f"return-{kill}", seed=kill)
        meanwhile.wait_noted(30)
        primary.start()
        lab.wait_mirrored()
        assert lab.primary() is standby, "the old primary follows"
        meanwhile.wait_noted(30)
        assert meanwhile.stop() == [""] * len(meanwhile.notes), "the return of a node is not felt by applications"
        assert tree_differences(lab) == [], f"after kill {kill}"
        assert meanwhile.missing(primary.backing) == [], f"on the node that came back after kill {kill}"
        acknowledged += meanwhile.noted()

        for finished in (load, meanwhile):
            shutil.rmtree(standby.mount / finished.name)
        primary = standby
    print(f"{KILLS} kills, {acknowledged} acknowledged changes, none lost")
