"""The disks whose power can be cut: what a cut takes, what it leaves, and that nothing of them stays behind."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.errors import MirrorfsError
from mirrorfs.journal import Journal
from mirrorfs.lab.disks import PowerDisks
from mirrorfs.lab.pair import Lab, wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="needs xfsprogs"),
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Two hosts with nothing running on them."""
    with Lab.create(tmp_path / "lab") as lab:
        yield lab


def loops_of(directory: Path) -> list[str]:
    """The files below the directory that are behind loop devices."""
    files = [file.read_text().strip() for file in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [file for file in files if file.startswith(f"{directory}/")]


def write(file: Path, content: bytes, *, sync: bool) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())


def test_a_power_cut_takes_what_was_only_in_memory_and_leaves_what_was_fsynced(lab: Lab) -> None:
    disks = PowerDisks.create(lab)
    for host in lab.hosts.values():
        for directory in (host.under, host.state_dir):
            write(directory / "fsynced", b"on the disk" * 1000, sync=True)
            write(directory / "not", b"in memory" * 1000, sync=False)
            assert (directory / "not").read_bytes() == b"in memory" * 1000
    disks.cut_power(lab.one)
    write(lab.one.under / "later", b"after the cut", sync=True)
    disks.power_on(lab.one)
    for directory in (lab.one.under, lab.one.state_dir):
        assert (directory / "fsynced").read_bytes() == b"on the disk" * 1000
        assert not (directory / "not").exists() or (directory / "not").read_bytes() == b""
    assert not (lab.one.under / "later").exists()
    assert (lab.two.under / "not").read_bytes() == b"in memory" * 1000, "the other host has not felt anything"


def test_a_disk_can_be_cut_off_again_and_again(lab: Lab) -> None:
    disks = PowerDisks.create(lab)
    for cut in range(3):
        write(lab.two.under / f"file-{cut}", b"%d" % cut, sync=True)
        disks.cut_power(lab.two)
        disks.power_on(lab.two)
    assert [(lab.two.under / f"file-{cut}").read_bytes() for cut in range(3)] == [b"0", b"1", b"2"]
    with pytest.raises(MirrorfsError, match="has not been cut"):
        disks.power_on(lab.two)


def test_a_node_whose_power_was_cut_comes_back_in_another_boot(lab: Lab) -> None:
    disks = PowerDisks.create(lab)
    boots: list[set[str]] = []
    for _ in range(2):
        lab.one.start()
        lab.one.promote(yes=True)
        epoch = Journal(lab.one.state_dir).load().epoch
        assert epoch is not None
        boots.append({member.boot for member in epoch.in_sync})
        disks.cut_power(lab.one)
        assert lab.one.pids() == []
        assert lab.network.cut_senders() == ["one"]
        disks.power_on(lab.one)
        assert lab.network.cut_senders() == []
    assert boots[0] == {Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    assert len(boots[1]) == 1
    assert boots[1] != boots[0]


def test_taking_the_lab_down_frees_the_disks(lab: Lab) -> None:
    PowerDisks.create(lab)
    assert len(loops_of(lab.dir)) == 3
    lab.down()
    wait_for(lambda: not loops_of(lab.dir), "no loop device is left")
    assert not lab.dir.exists()


def test_what_a_killed_lab_left_of_its_disks_is_cleared_by_the_next_one(lab: Lab) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from mirrorfs.lab.disks import PowerDisks; from mirrorfs.lab.pair import Lab\n"
        "lab = Lab.create(Path(sys.argv[1])); disks = PowerDisks.create(lab)\n"
        "lab.one.start(); disks.cut_power(lab.one); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, lab.dir], cwd="/", timeout=60)
    assert done.returncode == -9
    assert len(loops_of(lab.dir)) == 3
    again = Lab.create(lab.dir)
    wait_for(lambda: not loops_of(lab.dir), "no loop device is left")
    PowerDisks.create(again)
    assert os.listdir(again.one.under) == []
