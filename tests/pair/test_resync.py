"""A node that returns gets what differs and no more; what cannot be known is compared or copied in full, never guessed."""

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from mirrorfs.lab.disks import PowerDisks
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import NewLines, start_mirrored, state, status, tree_differences, wait_peer_lost, wait_state

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A fresh mirrored pair whose checkpoints are so seldom that none comes by itself in a test."""
    return make_lab(ack_timeout="1s", checkpoint_interval="1h")


@pytest.fixture
def checkpointing(make_lab: Callable[..., Lab]) -> Lab:
    """A fresh mirrored pair with a checkpoint every 200 ms."""
    return make_lab(ack_timeout="1s", checkpoint_interval="200ms")


def _clean(lab: Lab) -> None:
    """Wait until a checkpoint has emptied the dirty set."""
    wait_for(lambda: lab.one.status()["dirty_bytes"] == 0 and lab.one.status()["dirty_names"] == 0, "a checkpoint")


def _alone(lab: Lab) -> None:
    lab.two.kill()
    wait_state(lab.one, "solo")


def _return(lab: Lab) -> int:
    """Node two comes back; returns the bytes that both nodes have sent on the link until they are mirrored."""
    lines = NewLines(lab.one)
    lab.two.start()
    lab.wait_mirrored()
    assert any("by what may differ" in line for line in lines()), lines()
    sent = _sent(lab)
    assert tree_differences(lab) == []
    return sent


def _sent(lab: Lab) -> int:
    """What both nodes have sent over the present link, in bytes."""
    return sum(int(status(host)["peer"]["bytes_sent"]) for host in lab.hosts.values())


# ---- how much travels


def test_scattered_writes_cost_their_blocks(checkpointing: Lab) -> None:
    lab = checkpointing
    chance = random.Random(1)
    with open(lab.one.mount / "data", "w+b", buffering=0) as file:
        for _ in range(64):
            file.write(chance.randbytes(MIB))
        _clean(lab)
        _alone(lab)
        for _ in range(256):
            os.pwrite(file.fileno(), chance.randbytes(4096), chance.randrange(64 * 256) * 4096)
    assert _return(lab) <= 1.1 * 256 * 4096 + MIB


def test_a_long_write_costs_itself(checkpointing: Lab) -> None:
    lab = checkpointing
    (lab.one.mount / "data").write_bytes(bytes(range(256)) * 4096 * 24)
    _clean(lab)
    _alone(lab)
    with open(lab.one.mount / "data", "r+b") as file:
        file.seek(5 * MIB)
        file.write(os.urandom(10 * MIB))
    assert 10 * MIB < _return(lab) <= 1.1 * 10 * MIB + MIB


def test_new_small_files_cost_their_blocks(lab: Lab) -> None:
    _alone(lab)
    (lab.one.mount / "new").mkdir()
    for number in range(1000):
        (lab.one.mount / "new" / str(number)).write_bytes(os.urandom(1000))
    assert _return(lab) <= 1.1 * 1000 * 4096 + MIB


def test_a_renamed_directory_costs_a_name_and_not_what_is_in_it(checkpointing: Lab) -> None:
    lab = checkpointing
    (lab.one.mount / "old").mkdir()
    for number in range(1000):
        (lab.one.mount / "old" / str(number)).write_bytes(bytes(10_000))
    _clean(lab)
    _alone(lab)
    os.rename(lab.one.mount / "old", lab.one.mount / "renamed")
    assert _return(lab) < MIB // 8


def test_a_file_in_a_large_directory_costs_itself(checkpointing: Lab) -> None:
    lab = checkpointing
    (lab.one.mount / "large").mkdir()
    for number in range(3000):
        (lab.one.mount / "large" / str(number)).touch()
    _clean(lab)
    _alone(lab)
    (lab.one.mount / "large" / "one more").write_text("new")
    assert _return(lab) < MIB // 8


def test_after_a_crash_only_what_was_hot_is_compared_and_only_blocks_that_differ_travel(checkpointing: Lab) -> None:
    lab = checkpointing
    with open(lab.one.mount / "data", "w+b", buffering=0) as file:
        file.write(os.urandom(64 * MIB))
    _clean(lab)
    lab.two.kill()
    wait_state(lab.one, "solo")
    with open(lab.one.mount / "data", "r+b", buffering=0) as file:
        for extent in (2, 9):
            os.pwrite(file.fileno(), b"changed", extent * 4 * MIB + 12_345)
    lab.one.kill()
    lab.one.start()
    lab.two.start()
    lab.wait_mirrored()
    assert _sent(lab) < MIB, "the two blocks of 64 KiB that differ, and hashes"
    assert "bytes compared" in lab.one.log.read_text()
    assert tree_differences(lab) == []


# ---- stories


def test_a_target_with_few_descriptors_takes_many_files(lab: Lab) -> None:
    _alone(lab)
    for number in range(500):
        (lab.one.mount / f"file-{number}").write_bytes(os.urandom(70_000))
    launch = (
        "import resource, sys, pathlib, mirrorfs.lab.pair\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "mirrorfs.lab.pair.Lab(pathlib.Path(sys.argv[1])).two.launch()\n"
    )
    subprocess.run([sys.executable, "-c", launch, lab.dir], check=True)
    lab.wait_mirrored()
    assert tree_differences(lab) == []


@pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="needs xfsprogs")
def test_new_files_have_the_room_of_those_that_are_gone(tmp_path: Path) -> None:
    with Lab.create(tmp_path / "lab", options={"ack_timeout": "1s"}) as lab:
        PowerDisks.create(lab, size_bytes=320 << 20)
        start_mirrored(lab)
        for kind in ("old", "new"):
            (lab.one.mount / kind).mkdir()
            for number in range(3000):
                (lab.one.mount / kind / str(number)).write_bytes(os.urandom(60_000))
            if kind == "old":
                _alone(lab)
                shutil.rmtree(lab.one.mount / "old")
        lab.two.start()
        lab.wait_mirrored()
        assert tree_differences(lab) == []


def test_a_capability_outlives_the_data_that_is_written_over_it(lab: Lab) -> None:
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service, effective
    (lab.one.mount / "old").write_bytes(os.urandom(MIB))
    _alone(lab)
    for name, size in {"old": MIB, "small": 4096, "large": MIB}.items():
        (lab.one.mount / name).write_bytes(os.urandom(size))
        os.setxattr(lab.one.mount / name, "security.capability", capability)
    _return(lab)
    assert [os.getxattr(lab.two.backing / name, "security.capability") for name in ("old", "small", "large")] == [
        capability
    ] * 3


def test_a_file_moved_between_directories_in_either_order_of_their_ids_is_moved_and_not_copied(checkpointing: Lab) -> None:
    lab = checkpointing
    top = lab.one.mount
    for name in ("first", "second"):
        (top / name).mkdir()
        (top / name / "large").write_bytes(os.urandom(4 * MIB))
    _clean(lab)
    _alone(lab)
    os.rename(top / "first" / "large", top / "second" / "from first")
    os.rename(top / "second" / "large", top / "first" / "from second")
    assert _return(lab) < MIB


def test_directories_that_changed_places_and_their_parents_too_are_moved(checkpointing: Lab) -> None:
    lab = checkpointing
    top = lab.one.mount
    (top / "a" / "b" / "c").mkdir(parents=True)
    (top / "a" / "b" / "c" / "large").write_bytes(os.urandom(4 * MIB))
    (top / "a" / "b" / "linked").write_bytes(os.urandom(2 * MIB))
    _clean(lab)
    _alone(lab)
    os.rename(top / "a" / "b" / "c", top / "c")
    os.rename(top / "a", top / "c" / "a")
    os.rename(top / "c" / "a" / "b", top / "b")
    os.link(top / "b" / "linked", top / "c" / "again")
    os.rename(top / "b" / "linked", top / "linked")
    assert _return(lab) < MIB


def test_holes_stay_holes_and_are_made_where_there_was_data(checkpointing: Lab) -> None:
    lab = checkpointing
    sparse = lab.one.mount / "sparse"
    sparse.write_bytes(os.urandom(8 * MIB))
    _clean(lab)
    _alone(lab)
    with open(sparse, "r+b") as file:
        file.truncate(MIB)
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"far away")
    assert _return(lab) < MIB
    assert (lab.two.backing / "sparse").stat().st_blocks * 512 < 2 * MIB


def test_what_the_old_primary_did_and_nobody_saw_is_taken_back(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ack_timeout="4s", checkpoint_interval="200ms")
    top = lab.one.mount
    # Each in a directory of its own: the kernel lets one change of names in a directory wait for the other.
    for directory in "abc":
        (top / directory).mkdir()
    (top / "a" / "removed").write_text("it was removed where nobody saw it")
    (top / "b" / "kept").write_text("before")
    _clean(lab)
    # Nothing that one sends arrives any more; what it does now is acknowledged to nobody.
    lab.cut("one")
    changes = ("os.unlink('a/removed')", "open('b/kept', 'w').write('unseen')", "os.mkdir('c/unseen')")
    applications = [
        subprocess.Popen(["python3", "-c", f"import os; os.chdir({str(top)!r}); {change}"], stderr=subprocess.DEVNULL)
        for change in changes
    ]
    try:
        wait_for(lambda: _unseen(lab.one.backing), "the changes")
    finally:
        lab.one.kill()
        told = [application.pid for application in applications if application.wait() == 0]
    assert told == [], "an application was told that it is done"
    # Not before the cable is whole: what the dead host's kernel still has to send would be seen after all.
    wait_for(lambda: status(lab.two).get("peer", {}).get("state") == "disconnected", "the loss is noticed")
    lab.two.promote(yes=True)
    lab.heal()
    lab.one.start()
    lab.wait_mirrored()
    assert (lab.two.mount / "b" / "kept").read_text() == "before"
    assert [os.listdir(lab.one.backing / directory) for directory in "abc"] == [["removed"], ["kept"], []]
    assert tree_differences(lab) == []


def _unseen(tree: Path) -> bool:
    return (
        (tree / "c" / "unseen").exists()
        and not (tree / "a" / "removed").exists()
        and (tree / "b" / "kept").read_text() != "before"
    )


def test_a_resync_that_was_cut_short_loses_nothing_that_it_had_set_aside(lab: Lab) -> None:
    top = lab.one.mount
    for number in range(40):
        (top / f"d{number}").mkdir()
        (top / f"d{number}" / "file").write_bytes(os.urandom(300_000))
    for turn in range(3):
        _alone(lab)
        names = [f"d{number}" for number in range(40)]
        for one, two in zip(names[::2], names[1::2], strict=True):
            os.rename(top / one / "file", top / "moving")
            os.rename(top / two / "file", top / one / "file")
            os.rename(top / "moving", top / two / "file")
        lab.two.launch()
        wait_state(lab.two, "resyncing", "standby")
        if turn < 2:
            lab.two.kill()
    lab.wait_mirrored()
    assert tree_differences(lab) == []


def _rewind(host: Host, saved: Path) -> None:
    """Put a tree and a journal back as they were when `saved` was made, as the restoration of a snapshot does."""
    subprocess.run(["rsync", "-aHAX", "--delete", f"{saved}/tree/", f"{host.backing}/"], check=True)
    subprocess.run(["rsync", "-a", "--delete", f"{saved}/state/", f"{host.state_dir}/"], check=True)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
def test_a_node_that_was_restored_from_a_snapshot_is_copied_to_in_full(checkpointing: Lab, tmp_path: Path) -> None:
    lab = checkpointing
    (lab.one.mount / "file").write_text("old")
    _clean(lab)
    lab.two.kill()
    for name, source in (("tree", lab.two.backing), ("state", lab.two.state_dir)):
        subprocess.run(["rsync", "-aHAX", f"{source}/", f"{tmp_path}/{name}/"], check=True)
    lab.two.start()
    lab.wait_mirrored()
    for text in ("newer", "newest"):
        (lab.one.mount / "file").write_text(text)
        _clean(lab)
    lab.two.kill()
    _rewind(lab.two, tmp_path)
    lines = NewLines(lab.one)
    lab.two.start()
    lab.wait_mirrored()
    assert any("by a full copy" in line for line in lines())
    assert (lab.two.mount / "file").read_text() == "newest"
    assert tree_differences(lab) == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
def test_a_primary_that_was_restored_from_a_snapshot_of_after_its_last_checkpoint_is_copied_to_in_full(
    lab: Lab, tmp_path: Path
) -> None:
    (lab.one.mount / "directory").mkdir()
    (lab.one.mount / "directory" / "file").write_text("old")
    _alone(lab)
    _return(lab)  # with a checkpoint, and none comes after it
    for name, source in (("tree", lab.one.backing), ("state", lab.one.state_dir)):
        subprocess.run(["rsync", "-aHAX", f"{source}/", f"{tmp_path}/{name}/"], check=True)
    (lab.one.mount / "directory" / "file").write_text("new")
    lab.one.kill()
    wait_peer_lost(lab.two)
    lab.two.promote(yes=True)
    _rewind(lab.one, tmp_path)
    lines = NewLines(lab.two)
    lab.one.start()
    lab.wait_mirrored()
    said = lines()
    assert any("one was set back" in line for line in said)
    assert any("by a full copy" in line for line in said)
    assert tree_differences(lab) == []
    assert (lab.two.mount / "directory" / "file").read_text() == "new"


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
def test_ids_of_files_that_were_copied_underneath_with_their_attributes_do_not_count(checkpointing: Lab) -> None:
    lab = checkpointing
    (lab.one.mount / "original").write_text("original")
    _clean(lab)
    _alone(lab)
    subprocess.run(["rsync", "-aX", lab.one.backing / "original", lab.one.backing / "copy"], check=True)
    assert (lab.one.mount / "copy").read_text() == "original"
    assert (lab.one.mount / "copy").stat().st_ino != (lab.one.mount / "original").stat().st_ino
    (lab.one.mount / "copy").write_text("changed")
    _return(lab)
    assert (lab.two.mount / "original").read_text() == "original"
    assert (lab.two.mount / "copy").read_text() == "changed"


# ---- a log that cannot be trusted, or cannot be written


def _damage(host: Host) -> None:
    log = host.state_dir / "dirty"
    data = bytearray(log.read_bytes())
    data[40] ^= 1
    log.write_bytes(data)


def test_a_damaged_log_is_told_in_one_line_and_answered_with_a_full_copy(checkpointing: Lab) -> None:
    lab = checkpointing
    (lab.one.mount / "file").write_text("text")
    _clean(lab)
    lab.two.kill()
    _damage(lab.two)
    lines, told = NewLines(lab.one), NewLines(lab.two)
    lab.two.start()
    lab.wait_mirrored()
    assert any("by a full copy" in line for line in lines())
    (alarm,) = [line for line in told() if " ERROR " in line]
    assert "dirty: damaged" in alarm
    assert tree_differences(lab) == []


def test_a_log_of_a_newer_version_ends_the_start_with_one_line(checkpointing: Lab) -> None:
    lab = checkpointing
    lab.two.kill()
    log = lab.two.state_dir / "dirty"
    data = bytearray(log.read_bytes())
    data[8] += 1
    data[16:20] = crc32(data[:16]).to_bytes(4, "little")
    log.write_bytes(data)
    lines = NewLines(lab.two)
    lab.two.launch()
    wait_for(lambda: not lab.two.pids(), "node two ends")
    (said,) = [line for line in lines() if "newer mirrorfs" in line]
    assert "install that version" in said
    assert state(lab.one) == "solo"


def test_a_full_copy_sends_only_blocks_that_differ_from_what_the_target_has_already(checkpointing: Lab) -> None:
    lab = checkpointing
    (lab.one.mount / "directory").mkdir()
    (lab.one.mount / "directory" / "large").write_bytes(os.urandom(16 * MIB))
    os.link(lab.one.mount / "directory" / "large", lab.one.mount / "link")
    (lab.one.mount / "sparse").write_bytes(b"begin")
    os.truncate(lab.one.mount / "sparse", 8 * MIB)
    _clean(lab)
    lab.two.kill()
    with open(lab.one.mount / "directory" / "large", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"changed", 5 * MIB)
    os.rename(lab.one.mount / "sparse", lab.one.mount / "elsewhere")
    _damage(lab.two)
    lines = NewLines(lab.one)
    lab.two.start()
    lab.wait_mirrored()
    assert any("by a full copy" in line for line in lines())
    assert _sent(lab) < MIB
    assert tree_differences(lab) == []


def test_a_file_that_is_open_by_a_name_that_is_gone_is_written_on_after_the_peer_was_away(lab: Lab) -> None:
    top = lab.one.mount
    (top / "elsewhere").mkdir()
    (top / "opened").write_text("begin")
    os.link(top / "opened", top / "elsewhere" / "other")
    with open(top / "opened", "a") as file:
        os.unlink(top / "opened")
        _alone(lab)
        lab.one.run("sh", "-c", "echo 2 >/proc/sys/vm/drop_caches")
        _return(lab)
        file.write(", end")
    assert (lab.two.mount / "elsewhere" / "other").read_text() == "begin, end"


def test_a_link_that_was_removed_before_a_crash_leaves_one_file_with_its_other_name(checkpointing: Lab) -> None:
    lab = checkpointing
    top = lab.one.mount
    (top / "marked").mkdir()
    (top / "quiet").mkdir()
    (top / "quiet" / "kept").write_bytes(os.urandom(MIB))
    os.link(top / "quiet" / "kept", top / "marked" / "again")
    for number in range(3):  # checkpoints, after which the quiet directory is cold
        (top / "marked" / f"{number}").touch()
        _clean(lab)
    lab.two.kill()
    wait_state(lab.one, "solo")
    os.rename(top / "marked" / "again", top / "marked" / "renamed")
    lab.one.kill()
    lab.one.start()
    lab.two.start()
    lab.wait_mirrored()
    assert tree_differences(lab) == []
