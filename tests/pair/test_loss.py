"""Losing the other node, the cable or room on a disk: who goes on, what is durable before that, what the application sees."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrorfs.journal import Journal
from mirrorfs.lab.disks import PowerDisks
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import (
    Load,
    NewLines,
    small_disk,
    start_mirrored,
    state,
    status,
    tree_differences,
    wait_peer_lost,
    wait_state,
)

pytestmark = pytest.mark.root


def _alone(host: Host, before: int) -> None:
    """The node goes on alone in a newer epoch, and its status says so."""
    now = host.status()
    assert now["state"] == "solo"
    assert now["in_sync"] == [host.name]
    assert now["epoch"] > before
    assert now["reason"]


# ---- the peer is gone


def test_the_application_goes_on_when_the_standby_is_killed(lab: Lab, start_load: Callable[..., Load]) -> None:
    epoch = lab.one.status()["epoch"]
    load = start_load(lab.one.mount)
    load.wait_noted(100)
    lab.two.kill()
    load.wait_noted(200)
    _alone(lab.one, epoch)
    assert load.stop() == [""] * len(load.notes)
    print(f"the longest stall of a writer was {load.longest_stall_s():.3f} s")
    assert load.missing(lab.one.mount) == []


def test_being_alone_is_durable_before_a_write_is_acknowledged_alone(lab: Lab) -> None:
    descriptor = os.open(lab.one.mount / "file", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, b"together")
        lab.two.kill()
        os.write(descriptor, b", alone")
        lab.one.kill()
    finally:
        with contextlib.suppress(OSError):  # its mount is dead
            os.close(descriptor)
    record = Journal(lab.one.state_dir).load()
    assert record.epoch is not None
    assert {member.node for member in record.epoch.in_sync} == {"one"}
    assert record.epoch.tag in record.wrote
    lab.one.start()
    assert lab.one.status()["in_sync"] == ["one"]
    assert (lab.one.mount / "file").read_bytes() == b"together, alone"


@pytest.mark.parametrize("silent", [None, "one", "two"], ids=["both ways", "what one sends", "what two sends"])
def test_a_cut_cable_is_noticed_and_the_pair_comes_together_again(
    lab: Lab, start_load: Callable[..., Load], silent: str | None
) -> None:
    epoch = lab.one.status()["epoch"]
    load = start_load(lab.one.mount)
    load.wait_noted(100)
    lab.cut(silent)
    wait_state(lab.one, "solo")
    wait_peer_lost(lab.two)
    _alone(lab.one, epoch)
    load.wait_noted(200)
    assert state(lab.two) == "waiting"
    lab.heal()
    lab.wait_mirrored()
    assert lab.primary() is lab.one
    load.wait_noted(50)
    assert load.stop() == [""] * len(load.notes)
    print(f"the longest stall of a writer was {load.longest_stall_s():.3f} s")
    assert load.missing(lab.two.backing) == []
    assert tree_differences(lab) == []


def test_a_peer_that_stands_still_is_given_up_after_the_ack_timeout(lab: Lab) -> None:
    lab.two.run("kill", "-STOP", *map(str, lab.two.pids()), check=True)
    (lab.one.mount / "file").write_text("acknowledged alone")
    assert state(lab.one) == "solo"
    lab.two.run("kill", "-CONT", *map(str, lab.two.pids()), check=True)
    lab.wait_mirrored()
    assert (lab.two.mount / "file").read_text() == "acknowledged alone"


# ---- a disk that stands still


#: In a process of its own: a call that waits for the mount stops whatever shares its GIL.
_EXCHANGE = (
    "import os, sys\n"
    "from mirrorfs import backing\n"
    "top = os.open(sys.argv[1], os.O_RDONLY)\n"
    "backing.rename2(top, sys.argv[2].encode(), top, sys.argv[3].encode(), 2)\n"
)
_CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda top: (top / "file").write_bytes(b"more"),
    "make": lambda top: (top / "new").mkdir(),
    "rename": lambda top: (top / "file").rename(top / "renamed"),
    "exchange": lambda top: subprocess.run([sys.executable, "-c", _EXCHANGE, top, "file", "other"], check=True),
    "remove": lambda top: (top / "file").unlink(),
}


def _change_and_tell(change: str, top: Path, done: threading.Event) -> None:
    _CHANGES[change](top)
    done.set()


@pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="needs xfsprogs")
@pytest.mark.parametrize("change", _CHANGES)
def test_a_standby_that_waits_for_its_disk_is_not_taken_for_lost(tmp_path: Path, change: str) -> None:
    with Lab.create(tmp_path / "lab", options={"ack_timeout": "1s"}) as lab:
        PowerDisks.create(lab)
        start_mirrored(lab)
        for name in ("file", "other"):
            (lab.one.mount / name).write_bytes(b"some")
        wait_for(lambda: lab.one.status()["settled"], "nothing else is on its way")
        lines, done = NewLines(lab.one), threading.Event()
        disk = lab.two.home / "disk"
        subprocess.run(["fsfreeze", "-f", disk], check=True)
        try:
            application = threading.Thread(target=_change_and_tell, args=(change, lab.one.mount, done))
            application.start()
            assert not done.wait(2.5), "the standby has answered, with its disk standing still"
        finally:
            subprocess.run(["fsfreeze", "-u", disk], check=True)
        application.join(30)
        assert done.is_set()
        assert lines() == [], "it was taken for lost"
        assert tree_differences(lab) == []


# ---- on_peer_loss = "freeze"


def test_freezing_ends_in_eio_after_the_freeze_timeout_and_thaws_when_the_peer_returns(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(on_peer_loss="freeze", freeze_timeout="1s")
    lab.two.kill()
    wait_state(lab.one, "waiting")
    with pytest.raises(OSError) as caught:
        (lab.one.mount / "file").write_text("x")
    assert caught.value.errno == errno.EIO
    assert lab.one.status()["reason"]
    lab.two.start()
    lab.wait_mirrored()
    (lab.one.mount / "file").write_text("thawed")
    assert (lab.two.mount / "file").read_text() == "thawed"
    assert tree_differences(lab) == []


def test_a_frozen_write_succeeds_if_the_peer_returns_in_time(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(on_peer_loss="freeze", freeze_timeout="30s")
    outcome: list[int] = []
    with open(lab.one.mount / "file", "wb", buffering=0) as file:
        lab.two.kill()
        wait_state(lab.one, "waiting")
        writer = threading.Thread(target=lambda: outcome.append(file.write(b"waited for the peer")))
        writer.start()
        try:
            assert outcome == []
            assert "one" in lab.one.status()["in_sync"]
            lab.two.start()
        finally:
            writer.join(timeout=60)
    assert outcome == [len(b"waited for the peer")]
    lab.wait_mirrored()
    assert (lab.two.mount / "file").read_text() == "waited for the peer"


# ---- disks that are full


@pytest.fixture
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab with nothing running on its hosts; whoever uses it gives one of them a small disk, which takes it down."""
    return Lab.create(tmp_path_factory.mktemp("lab"), options={"ack_timeout": "1s"})


def test_the_application_goes_on_when_the_standbys_disk_is_full(unstarted: Lab, tmp_path: Path) -> None:
    lab = unstarted
    with small_disk(lab, lab.two, tmp_path / "image", 24 << 20):
        start_mirrored(lab)
        epoch = lab.one.status()["epoch"]
        lines = NewLines(lab.two)
        with open(lab.one.mount / "large", "wb", buffering=0) as file:
            for _ in range(64):
                assert file.write(os.urandom(1 << 20)) == 1 << 20
            os.fsync(file.fileno())
        _alone(lab.one, epoch)
        lines.wait(lambda line: "No space left" in line, "two's disk is full")
        assert "two" not in lab.two.status()["in_sync"]
        wait_for(lambda: "No space left" in status(lab.two).get("reason", ""), "two's status gives the reason")
        (lab.one.mount / "large").unlink()
        (lab.one.mount / "small").write_text("there is room again")
        lab.wait_mirrored()
        assert tree_differences(lab) == []


def _fill(path: Path, piece_bytes: int) -> None:
    """Write until the disk is full."""
    with open(path, "ab", buffering=0) as file:
        for _ in range(64):
            file.write(os.urandom(piece_bytes))


def _error_of(action: Callable[..., None], *arguments: object) -> int | None:
    try:
        action(*arguments)
    except OSError as error:
        return error.errno
    return None


def test_a_full_disk_of_the_primary_is_enospc_in_the_application_and_both_stay_equal(unstarted: Lab, tmp_path: Path) -> None:
    lab = unstarted
    with small_disk(lab, lab.one, tmp_path / "image", 24 << 20):
        start_mirrored(lab)
        epoch = lab.one.status()["epoch"]
        errors = {_error_of(_fill, lab.one.mount / "large", (1 << 20) - 17)}
        assert (lab.one.mount / "large").stat().st_size > 4 << 20
        errors |= {_error_of(_fill, lab.one.mount / f"file-{number}", 5000) for number in range(100)}
        assert errors == {errno.ENOSPC}
        assert lab.is_mirrored()
        assert lab.one.status()["epoch"] == epoch
        assert tree_differences(lab) == []
        (lab.one.mount / "large").unlink()
        (lab.one.mount / "small").write_text("there is room again")
        assert tree_differences(lab) == []


def test_statfs_shows_the_smaller_of_both_disks(unstarted: Lab, tmp_path: Path) -> None:
    lab = unstarted
    with small_disk(lab, lab.two, tmp_path / "image", 24 << 20):
        start_mirrored(lab)

        def total() -> int:
            shown = os.statvfs(lab.one.mount)
            return shown.f_blocks * shown.f_frsize

        wait_for(lambda: 0 < total() <= 24 << 20, "statfs shows the size of the standby's disk")
        shown = os.statvfs(lab.one.mount)
        assert 0 < shown.f_bavail * shown.f_frsize <= 24 << 20
        assert shown.f_files < os.statvfs(lab.one.backing).f_files
        lab.two.kill()
        wait_state(lab.one, "solo")
        assert total() > 24 << 20, "alone it is the own disk that counts"
