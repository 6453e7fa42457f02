"""Power loss at random moments: what was fsynced is there, on the node that was hit too, and both trees become equal again.

`MIRRORFS_POWER_CUTS=200 python -m pytest -s tests/pair/test_power_loss.py` is the full run: fifty cuts for each of the four
tests under load. Without the variable it is two for each.

How a cut is made, and what it takes, stands in `mirrorfs.lab.disks`. Nothing can be acknowledged after it, so everything that
the writers have noted counts: all of it on a node that was not hit, what was synced on one that was.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mirrorfs import dirty_log
from mirrorfs.errors import ConfirmationNeededError, RefusedError
from mirrorfs.journal import Journal
from mirrorfs.lab.disks import PowerDisks
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import (
    DURABLE_KINDS,
    WRITER_KINDS,
    Load,
    NewLines,
    other,
    seeded,
    start_mirrored,
    status,
    tree_differences,
    wait_peer_lost,
    wait_state,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="needs xfsprogs"),
]

CUTS = max(1, int(os.environ.get("MIRRORFS_POWER_CUTS") or "8") // 4)
KINDS = tuple(dict.fromkeys(WRITER_KINDS + DURABLE_KINDS))

StartLoad = Callable[..., Load]

#: A file of which only the first part is written, at random: a resync has no reason to read the rest.
_BASE_BYTES, _HOT_BYTES = 64 << 20, 12 << 20
_SCATTER = (
    "import os, random, sys\n"
    "descriptor = os.open(sys.argv[1], os.O_WRONLY)\n"
    "while True: os.pwrite(descriptor, os.urandom(4096), random.randrange(int(sys.argv[2]) >> 12) << 12)\n"
)


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A mirrored pair on disks of their own, that misses its peer after a second of silence."""
    with Lab.create(tmp_path_factory.mktemp("lab"), options={"ack_timeout": "1s", "checkpoint_interval": "2s"}) as lab:
        PowerDisks.create(lab)
        start_mirrored(lab)
        (lab.one.mount / "base").write_bytes(os.urandom(_BASE_BYTES))
        wait_for(lambda: lab.one.status()["dirty_names"] == 0, "a checkpoint")
        base = (lab.one.mount / "base").stat().st_ino  # its id; both logs may still say what they said before it was made
        wait_for(lambda: all(_new_from(host) > base for host in lab.hosts.values()), "both know that the base is not new")
        yield lab


def _new_from(host: Host) -> int:
    """From which id on files may be new, as the log on the host's disk says."""
    contents = dirty_log.read(host.state_dir / dirty_log.NAME)
    assert contents is not None
    return contents.head.new_from


@pytest.fixture
def disks(lab: Lab) -> PowerDisks:
    """Where the power of the pair's hosts can be cut."""
    return PowerDisks(lab)


def _cut(disks: PowerDisks, load: Load, *hosts: Host) -> None:
    """Cut the power of the node that the load writes to, and perhaps of the other one; the writers end with the mount."""
    disks.cut_power(*hosts)
    errors = load.ended()
    assert set(errors) <= {"ECONNABORTED", "ENOTCONN", "EIO"}, errors


@contextmanager
def _scattered(host: Host) -> Iterator[None]:
    """Blocks of the base are written meanwhile, until the mount has gone."""
    command: list[str | Path] = [sys.executable, "-c", _SCATTER, host.mount / "base", str(_HOT_BYTES)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as writer:
        try:
            yield
        finally:
            writer.kill()


def _boots(host: Host) -> set[str]:
    """The boots of the members of the in-sync set, as the host has them on its disk."""
    epoch = Journal(host.state_dir).load().epoch
    assert epoch is not None
    return {member.boot for member in epoch.in_sync}


class _Count:
    """What all the cuts of one test come to."""

    def __init__(self) -> None:
        self.cuts = self.synced = self.acknowledged = self.felt = 0
        self.compared: list[int] = []
        self.copied: list[int] = []

    def add(self, source: Host, *loads: Load, lost: list[str] | None = None) -> None:
        """One more cut under these loads, and what it took of the changes that were acknowledged and not fsynced.

        The source has brought the other node back by what may differ, and read no more than that.
        """
        self.cuts += 1
        log = source.log.read_text()
        kinds = re.findall(r"bringing \w+ in sync, (.*)", log)
        copied, compared = re.findall(r"(\d+) bytes copied, (\d+) bytes compared", log)[-1]
        assert kinds[-1] == "by what may differ"
        assert int(compared) < _BASE_BYTES // 2
        self.compared.append(int(compared))
        self.copied.append(int(copied))
        self.felt += bool(lost)
        for load in loads:
            self.synced += load.noted(DURABLE_KINDS)
            self.acknowledged += load.noted()

    def __str__(self) -> str:
        lost = f"; {self.felt} cuts took something that was not fsynced" if self.felt else ""
        read = ", ".join(
            f"{max(figures) / 2**20:.1f} MiB {what} at most (median {statistics.median(figures) / 2**20:.1f})"
            for what, figures in {"compared": self.compared, "copied": self.copied}.items()
        )
        return (
            f"{self.cuts} power cuts, {self.acknowledged} acknowledged changes, {self.synced} fsynced, none missing{lost}; "
            f"in each return {read}; the base has {_BASE_BYTES >> 20} MiB, of which {_HOT_BYTES >> 20} were written at random"
        )


def _settle(lab: Lab, cut: int, *loads: Load) -> None:
    """Both nodes are mirrored again: equal, everything synced is on both. Room for the next cut is made."""
    assert tree_differences(lab) == [], f"after cut {cut}"
    primary = lab.primary()
    assert primary is not None
    for load in loads:
        for host in lab.hosts.values():
            assert load.missing(host.backing, DURABLE_KINDS) == [], f"on {host.name} after cut {cut}"
        shutil.rmtree(primary.mount / load.name)
    for host in lab.hosts.values():
        assert "a defect in" not in host.log.read_text(), host.log_tail()


# ---- under load


def test_power_loss_of_the_primary_loses_nothing_acknowledged(lab: Lab, disks: PowerDisks, start_load: StartLoad) -> None:
    chance = seeded("power loss of the primary")
    count = _Count()
    primary = lab.one
    for cut in range(CUTS):
        standby, lines = other(lab, primary), NewLines(primary)
        load = start_load(primary.mount, f"cut-{cut}", seed=cut, kinds=KINDS)
        with _scattered(primary):
            load.wait_noted(chance.randrange(10, 300), DURABLE_KINDS)
            _cut(disks, load, primary)
        assert not [line for line in lines() if "going on alone" in line], "on a machine this busy it was not mirrored any more"
        wait_peer_lost(standby)
        standby.promote(yes=True)
        assert load.missing(standby.mount) == [], f"missing after cut {cut}"

        meanwhile = start_load(standby.mount, f"meanwhile-{cut}", seed=cut, kinds=KINDS)
        meanwhile.wait_noted(30)
        disks.power_on(primary)
        assert load.missing(primary.backing, DURABLE_KINDS) == [], f"missing on its disk after cut {cut}"
        primary.start()
        lab.wait_mirrored()
        assert lab.primary() is standby, "the old primary follows"
        meanwhile.wait_noted(30)
        assert meanwhile.stop() == [""] * len(meanwhile.notes), "the return of a node is not felt by applications"
        count.add(standby, load, meanwhile)
        _settle(lab, cut, load, meanwhile)
        primary = standby
    print(f"primary: {count}")


def test_power_loss_of_the_standby_is_not_felt_and_it_becomes_equal_again(
    lab: Lab, disks: PowerDisks, start_load: StartLoad
) -> None:
    chance = seeded("power loss of the standby")
    count = _Count()
    for cut in range(CUTS):
        load = start_load(lab.one.mount, f"cut-{cut}", seed=cut, kinds=KINDS)
        with _scattered(lab.one):
            load.wait_noted(chance.randrange(10, 300), DURABLE_KINDS)
            disks.cut_power(lab.two)
            wait_state(lab.one, "solo")
            load.wait_noted(chance.randrange(10, 100), DURABLE_KINDS)
        disks.power_on(lab.two)
        lab.two.start()
        lab.wait_mirrored()
        assert lab.primary() is lab.one
        load.wait_noted(30)
        assert load.stop() == [""] * len(load.notes)
        assert load.missing(lab.one.mount) == []
        assert load.missing(lab.two.backing) == []
        count.add(lab.one, load)
        _settle(lab, cut, load)
    print(f"standby: {count}")


def test_power_loss_of_both_at_once_loses_nothing_fsynced_and_the_last_primary_resumes(
    lab: Lab, disks: PowerDisks, start_load: StartLoad
) -> None:
    chance = seeded("power loss of both")
    count = _Count()
    primary = lab.one
    for cut in range(CUTS):
        load = start_load(primary.mount, f"cut-{cut}", seed=cut, kinds=KINDS)
        with _scattered(primary):
            load.wait_noted(chance.randrange(10, 300), DURABLE_KINDS)
            _cut(disks, load, *chance.sample([lab.one, lab.two], 2))  # a millisecond lies between the two disks
        disks.power_on(lab.one, lab.two)
        for host in lab.hosts.values():  # before one of them can mend the other
            assert load.missing(host.backing, DURABLE_KINDS) == [], f"missing on the disk of {host.name} after cut {cut}"
        for host in chance.sample(list(lab.hosts.values()), 2):
            host.start()
        lab.wait_mirrored()
        assert lab.primary() is primary, "they find out by themselves who serves"
        assert load.missing(primary.mount, DURABLE_KINDS) == [], f"missing after cut {cut}"
        count.add(primary, load, lost=load.missing(primary.mount))
        _settle(lab, cut, load)
        if chance.random() < 0.5:
            primary = other(lab, primary)
            primary.promote()
            lab.wait_mirrored()
    print(f"both: {count}")


def test_power_loss_of_a_primary_that_is_alone_loses_nothing_fsynced(
    lab: Lab, disks: PowerDisks, start_load: StartLoad
) -> None:
    chance = seeded("power loss of a primary that is alone")
    count = _Count()
    for cut in range(CUTS):
        lab.two.stop()
        wait_state(lab.one, "solo")
        load = start_load(lab.one.mount, f"cut-{cut}", seed=cut, kinds=KINDS)
        with _scattered(lab.one):
            load.wait_noted(chance.randrange(10, 300), DURABLE_KINDS)
            _cut(disks, load, lab.one)
        disks.power_on(lab.one)
        lab.one.start()
        if cut % 2:
            lab.two.start()  # now it is known that nobody else went on
        else:
            with pytest.raises(ConfirmationNeededError, match="cannot be reached"):
                lab.one.promote()
            lab.one.promote(yes=True)
            assert load.missing(lab.one.mount, DURABLE_KINDS) == [], f"missing after cut {cut}"
            lab.two.start()
        lab.wait_mirrored()
        assert lab.primary() is lab.one
        assert load.missing(lab.one.mount, DURABLE_KINDS) == [], f"missing after cut {cut}"
        count.add(lab.one, load, lost=load.missing(lab.one.mount))
        _settle(lab, cut, load)
    print(f"alone: {count}")


def test_what_a_standby_was_given_when_it_returned_is_on_its_disk_once_it_is_in_sync(
    lab: Lab, disks: PowerDisks, start_load: StartLoad
) -> None:
    disks.cut_power(lab.two)
    wait_state(lab.one, "solo")
    load = start_load(lab.one.mount, kinds=KINDS)
    load.wait_noted(100, DURABLE_KINDS)
    assert load.stop() == [""] * len(load.notes)
    disks.power_on(lab.two)
    lab.two.start()
    lab.wait_mirrored()
    disks.cut_power(lab.two)
    disks.power_on(lab.two)
    assert load.missing(lab.two.backing, DURABLE_KINDS) == []


# ---- what is lost


def test_what_was_not_fsynced_is_lost_when_both_nodes_lose_power(lab: Lab, disks: PowerDisks) -> None:
    (lab.one.mount / "not").write_bytes(b"in memory" * 1000)
    with open(lab.one.mount / "fsynced", "wb") as file:
        file.write(b"on both disks" * 1000)
        file.flush()
        os.fsync(file.fileno())
    (lab.one.mount / "not").write_bytes(b"in memory" * 2000)
    disks.cut_power(lab.one, lab.two)
    disks.power_on(lab.one, lab.two)
    for host in lab.hosts.values():
        assert (host.backing / "fsynced").read_bytes() == b"on both disks" * 1000
        assert (host.backing / "not").read_bytes() != b"in memory" * 2000, "or the tests above show nothing"


def test_a_standby_that_lost_its_memory_is_not_promoted_without_force(lab: Lab, disks: PowerDisks) -> None:
    with open(lab.one.mount / "file", "wb", buffering=0) as file:
        file.write(b"fsynced")
        os.fsync(file.fileno())
    before = _boots(lab.two)
    disks.cut_power(lab.one, lab.two)
    disks.power_on(lab.two)
    lab.two.start()
    with pytest.raises(RefusedError, match="restarted while it was in sync"):
        lab.two.promote(yes=True)
    lab.two.promote(force=True)
    assert (lab.two.mount / "file").read_bytes() == b"fsynced"
    assert status(lab.two)["state"] == "solo"
    assert not before & _boots(lab.two)
