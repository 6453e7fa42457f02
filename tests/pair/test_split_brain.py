"""Two histories: what differs is shown, one of them is kept, and what the other one changed is kept aside."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrorfs import backing, dirty_log
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import (
    mirrorfs,
    small_disk,
    start_mirrored,
    state,
    status,
    tree_differences,
    wait_peer_lost,
    wait_state,
)

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A pair that makes a checkpoint every 200 ms, if something is dirty."""
    return make_lab(ack_timeout="1s", checkpoint_interval="200ms")


def _write_at(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


def _checkpoint_number(host: Host) -> int:
    found = dirty_log.read(host.state_dir / dirty_log.NAME)
    assert found is not None
    time.sleep(0.05)
    return found.head.number


def _wait_checkpointed(lab: Lab) -> None:
    """What was written before is in none of the dirty sets: with nothing dirty there are no more checkpoints."""
    numbers: list[int] = []

    def quiet() -> bool:
        numbers.append(_checkpoint_number(lab.one))
        return len(numbers) > 20 and len(set(numbers[-20:])) == 1 and _checkpoint_number(lab.two) == numbers[-1]

    wait_for(quiet, "everything is on both disks")


def _prepare(lab: Lab) -> None:
    """What both have before they part."""
    top = lab.one.mount
    (top / "directory").mkdir()
    (top / "directory" / "large").write_bytes(os.urandom(40 * MIB))
    for name in ("untouched", "of-both", "renamed", "removed", "attributes"):
        (top / name).write_bytes(os.urandom(20_000))
    wait_for(lambda: bool(status(lab.one).get("settled")), "modification times are settled")
    _wait_checkpointed(lab)


def _divide(lab: Lab, change: Callable[[Path, str], None] | None = None) -> None:
    """Node one goes on alone behind a cut cable while two is promoted; both change things; then the cable is mended."""
    lab.cut()
    wait_state(lab.one, "solo")
    wait_peer_lost(lab.two)
    lab.two.promote(yes=True)
    for host in (lab.one, lab.two):
        (change or _change)(host.mount, host.name)
    lab.heal()
    _wait_split(lab)


def _wait_split(lab: Lab) -> None:
    wait_for(lambda: all("split_brain" in status(host) for host in lab.hosts.values()), "both nodes tell the split brain")


def _change(top: Path, name: str) -> None:
    number = {"one": 1, "two": 2}[name]
    _write_at(top / "directory" / "large", number * 8 * MIB, b"own".ljust(5000, name.encode()[:1]))
    _write_at(top / "of-both", 0, name.encode())
    (top / f"of-{name}").write_text(f"made by {name}")
    if name == "one":
        (top / "renamed").rename(top / "new-name")
        (top / "removed").unlink()
        (top / "new").mkdir()
        (top / "new" / "inside").write_bytes(os.urandom(100_000))
        (top / "new" / "link").symlink_to("inside")
    else:
        (top / "attributes").chmod(0o600)


def _show(host: Host) -> dict[str, Any]:
    done = mirrorfs(host, "split-brain", "show", "--json")
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def _lost(host: Host) -> dict[str, dict[str, Any]]:
    done = mirrorfs(host, "lost", "list", "--json")
    assert done.returncode == 0, done.stderr
    return {entry["path"]: entry for entry in json.loads(done.stdout)}


def _resolve(host: Host, keep: str) -> None:
    done = mirrorfs(host, "split-brain", "resolve", "--keep", keep, "--yes")
    assert done.returncode == 0, done.stderr


def _contents(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in sorted(tree.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _assert_one_can_get_its_own_back(lab: Lab, before: dict[str, bytes], directory: Path) -> None:
    kept = _lost(lab.one)
    assert set(kept) == {"/directory/large", "/of-both", "/of-one", "/new-name", "/new", "/new/inside", "/new/link"}
    for name in ("of-both", "of-one", "new/inside"):
        back = directory / name.replace("/", "-")
        assert mirrorfs(lab.one, "lost", "export", kept[f"/{name}"]["id"], str(back)).returncode == 0
        assert back.read_bytes() == before[name]
    large = kept["/directory/large"]
    assert (large["ranges"], large["whole"]) == ([[8 * MIB, 8 * MIB + 8192]], False)
    assert mirrorfs(lab.one, "lost", "export", large["id"], str(directory / "large")).returncode == 0
    start, end = large["ranges"][0]
    assert (directory / "large").read_bytes()[start:end] == before["directory/large"][start:end]


# ---- what is shown


def test_show_lists_exactly_the_files_and_the_bytes_that_differ_by_side(lab: Lab) -> None:
    _prepare(lab)
    _divide(lab)
    for host in lab.hosts.values():
        shown = _show(host)
        assert shown["complete"]
        found = {difference["path"]: difference for difference in shown["differences"]}
        assert set(found) == {
            "/directory/large",
            "/of-both",
            "/of-one",
            "/of-two",
            "/new-name",
            "/renamed",
            "/removed",
            "/new",
            "/new/inside",
            "/new/link",
            "/attributes",
        }
        large = found["/directory/large"]
        assert large["changed_by"] == ["one", "two"]
        assert large["one"]["ranges"] == [[8 * MIB, 8 * MIB + 8192]]
        assert large["two"]["ranges"] == [[16 * MIB, 16 * MIB + 8192]]
        assert found["/of-both"]["one"]["ranges"] == found["/of-both"]["two"]["ranges"] == [[0, 4096]]
        assert (found["/of-one"]["changed_by"], found["/of-one"]["two"]) == (["one"], None)
        assert (found["/of-two"]["changed_by"], found["/of-two"]["one"]) == (["two"], None)
        assert (found["/removed"]["changed_by"], found["/removed"]["one"]) == (["one"], None)
        assert (found["/renamed"]["one"], found["/new-name"]["two"]) == (None, None)
        assert found["/attributes"]["changed_by"] == ["two"]
        assert found["/attributes"]["two"]["attributes"]
        assert found["/new/inside"]["one"]["ranges"] == [[0, 100_000]]
        words = mirrorfs(host, "split-brain", "show").stdout
        assert f"own bytes {8 * MIB}-{8 * MIB + 8192}" in words
        assert "11 paths differ" in words


def test_what_was_only_made_just_before_the_nodes_parted_is_compared_too(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(ack_timeout="1s", checkpoint_interval="1h")
    for name in ("same", "of-one-alone"):
        (lab.one.mount / name).write_bytes(bytes(range(256)) * 64)

    def change(top: Path, name: str) -> None:
        if name == "one":
            _write_at(top / "of-one-alone", 4096, b"changed")
        (top / "equal").write_text("the same on both")

    _divide(lab, change)
    found = {difference["path"]: difference for difference in _show(lab.two)["differences"]}
    assert set(found) == {"/of-one-alone", "/equal"}
    assert found["/of-one-alone"]["one"]["ranges"] == [[4096, 8192]]


def test_both_tell_the_epochs_of_both_sides(lab: Lab) -> None:
    _divide(lab, lambda top, name: (top / name).touch())
    for host in lab.hosts.values():
        one, two = host.status()["sides"]
        assert (one["node"], two["node"]) == ("one", "two")
        assert [epoch["primary"] for epoch in one["epochs"]] == ["one"] * len(one["epochs"])
        assert [epoch["primary"] for epoch in two["epochs"]] == ["two"] * len(two["epochs"])
        assert one["epochs"]
        assert two["epochs"]
        words = mirrorfs(host, "status").stdout
        assert f"epoch {one['epochs'][-1]['number']} of one ({one['epochs'][-1]['began']})" in words
        assert f"epoch {two['epochs'][-1]['number']} of two ({two['epochs'][-1]['began']})" in words


@pytest.mark.parametrize("keep", ["one", "two"])
def test_after_a_promotion_by_force_nobody_knows_what_differs_and_the_loser_keeps_what_it_has(
    lab: Lab, tmp_path: Path, keep: str
) -> None:
    _prepare(lab)
    lab.two.kill()
    wait_state(lab.one, "solo")
    _change(lab.one.mount, "one")
    lab.one.kill()
    lab.two.boot.write_text(str(uuid.uuid4()))
    lab.two.start()
    assert mirrorfs(lab.two, "promote", "--yes").returncode == 3
    lab.two.promote(force=True)
    _change(lab.two.mount, "two")
    lab.one.start()
    _wait_split(lab)
    shown = _show(lab.one)
    assert (shown["complete"], shown["differences"]) == (False, [])
    assert "Everything would have to be compared" in mirrorfs(lab.two, "split-brain", "show").stdout
    winner, loser = (lab.one, lab.two) if keep == "one" else (lab.two, lab.one)
    before = _contents(loser.backing)
    _resolve(winner, keep)
    lab.wait_mirrored()
    assert lab.primary() is winner
    assert tree_differences(lab) == []
    kept = _lost(loser)
    assert ("/untouched" in kept) == (loser is lab.two), "two does not know what it changed, so it keeps everything"
    assert mirrorfs(loser, "lost", "export", "--all", str(tmp_path / "all")).returncode == 0
    (batch,) = (tmp_path / "all").iterdir()
    for name in ("of-both", f"of-{loser.name}"):
        assert (batch / name).read_bytes() == before[name]
    if loser is lab.two:
        assert _contents(batch) == before


# ---- one history is kept


@pytest.mark.parametrize("at", ["one", "two"])
def test_the_loser_keeps_its_own_versions_and_becomes_a_copy_of_the_winner(lab: Lab, tmp_path: Path, at: str) -> None:
    _prepare(lab)
    _divide(lab)
    before = _contents(lab.one.backing)
    winner = _contents(lab.two.backing)
    asked = mirrorfs(lab.hosts[at], "split-brain", "resolve", "--keep", "two")
    assert asked.returncode == 4
    assert "--yes" in asked.stderr
    _resolve(lab.hosts[at], "two")
    lab.wait_mirrored()
    assert lab.primary() is lab.two
    assert tree_differences(lab) == []
    assert _contents(lab.one.backing) == winner
    assert "split_brain" not in lab.one.status()
    assert "split_brain" not in lab.two.status()
    _assert_one_can_get_its_own_back(lab, before, tmp_path)
    (lab.two.mount / "goes-on").write_text("x")
    assert (lab.one.backing / "goes-on").read_text() == "x"


def test_the_node_that_stopped_can_be_kept_and_the_one_that_serves_gives_way(lab: Lab) -> None:
    _prepare(lab)
    _divide(lab)
    wait_state(lab.one, "waiting")
    winner = _contents(lab.one.backing)
    loser = _contents(lab.two.backing)
    _resolve(lab.one, "one")
    lab.wait_mirrored()
    assert lab.primary() is lab.one
    assert tree_differences(lab) == []
    assert _contents(lab.two.backing) == winner
    kept = _lost(lab.two)
    assert set(kept) == {"/directory/large", "/of-both", "/of-two", "/attributes"}
    assert kept["/attributes"]["ranges"] == []
    lab.two.stop()
    store = lab.two.under / ".mirrorfs" / "lost"
    assert (store / kept["/of-both"]["id"].replace(".", "/")).read_bytes() == loser["of-both"]


def test_a_node_that_does_not_run_gives_way_when_it_meets_the_other(lab: Lab, tmp_path: Path) -> None:
    _prepare(lab)
    _divide(lab)
    before = _contents(lab.one.backing)
    lab.two.kill()
    refused = mirrorfs(lab.one, "split-brain", "resolve", "--keep", "one", "--yes")
    assert refused.returncode == 1
    assert "two is not connected" in refused.stderr
    lab.one.kill()
    subprocess.run(["umount", "-l", lab.one.mount], check=True)
    assert mirrorfs(lab.one, "split-brain", "resolve", "--keep", "two").returncode == 4
    _resolve(lab.one, "two")
    assert "/of-both" in _lost(lab.one), "listed without a node too"
    again = mirrorfs(lab.one, "split-brain", "resolve", "--keep", "two", "--yes")
    assert (again.returncode, "already" in again.stdout) == (0, True)
    for host in lab.hosts.values():
        host.start()
    lab.wait_mirrored()
    assert lab.primary() is lab.two
    assert tree_differences(lab) == []
    kept = _lost(lab.one)
    for name in ("of-both", "of-one", "new/inside"):
        assert mirrorfs(lab.one, "lost", "export", kept[f"/{name}"]["id"], str(tmp_path)).returncode == 0
        assert (tmp_path / Path(name).name).read_bytes() == before[name]


def test_after_both_were_killed_the_loser_keeps_all_that_it_may_have_changed(lab: Lab, tmp_path: Path) -> None:
    _prepare(lab)
    _divide(lab)
    before = _contents(lab.one.backing)
    for host in lab.hosts.values():
        host.kill()
    for host in lab.hosts.values():
        host.start()
    _wait_split(lab)
    found = {difference["path"] for difference in _show(lab.one)["differences"]}
    assert {"/directory/large", "/of-both", "/of-one", "/of-two", "/new/inside", "/removed"} <= found
    assert "/untouched" not in found
    _resolve(lab.two, "two")
    lab.wait_mirrored()
    assert lab.primary() is lab.two
    assert tree_differences(lab) == []
    kept = _lost(lab.one)
    assert {"/directory/large", "/of-both", "/of-one", "/new/inside"} <= set(kept)
    assert mirrorfs(lab.one, "lost", "export", "--all", str(tmp_path / "all")).returncode == 0
    (batch,) = (tmp_path / "all").iterdir()
    for name in ("of-both", "of-one", "new/inside"):
        assert (batch / name).read_bytes() == before[name]
    for start, end in kept["/directory/large"]["ranges"]:
        assert (batch / "directory" / "large").read_bytes()[start:end] == before["directory/large"][start:end]


def test_dropping_asks_first_and_release_waits_for_it(lab: Lab) -> None:
    _divide(lab, lambda top, name: (top / name).touch())
    _resolve(lab.one, "two")
    lab.wait_mirrored()
    lab.one.stop()
    refused = mirrorfs(lab.one, "release", str(lab.one.mount))
    assert refused.returncode == 1
    assert "lost" in refused.stderr
    assert mirrorfs(lab.one, "lost", "drop", "--all").returncode == 4
    assert set(_lost(lab.one)) == {"/one"}
    assert mirrorfs(lab.one, "lost", "drop", "--all", "--yes").returncode == 0
    assert _lost(lab.one) == {}
    assert mirrorfs(lab.one, "release", str(lab.one.mount)).returncode == 0


def test_without_a_split_brain_there_is_nothing_to_resolve(lab: Lab) -> None:
    assert "no split brain" in mirrorfs(lab.one, "split-brain", "show").stderr
    for host in lab.hosts.values():
        refused = mirrorfs(host, "split-brain", "resolve", "--keep", "two", "--yes")
        assert refused.returncode == 1
        assert "no split brain" in refused.stderr
    assert mirrorfs(lab.one, "split-brain", "resolve", "--keep", "three", "--yes").returncode == 2
    assert lab.is_mirrored()


# ---- what can go wrong


def test_too_little_room_leaves_everything_as_it_was(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    lab = Lab.create(tmp_path_factory.mktemp("lab"), options={"ack_timeout": "1s"})
    with small_disk(lab, lab.two, tmp_path / "image", 32 << 20):
        start_mirrored(lab)

        def change(top: Path, name: str) -> None:
            if name == "two":
                (top / "large").write_bytes(os.urandom(18 * MIB))
            (top / "file").write_text(name)

        _divide(lab, change)
        before = {host.name: _contents(host.backing) for host in lab.hosts.values()}
        for host in (lab.one, lab.two):
            refused = mirrorfs(host, "split-brain", "resolve", "--keep", "one", "--yes")
            assert refused.returncode == 1
            assert len(refused.stderr.splitlines()) == 1
            assert "do not fit" in refused.stderr
            assert "make room" in refused.stderr
        assert _lost(lab.two) == {}
        assert state(lab.two) == "solo", "it goes on"
        (lab.two.mount / "file").write_text("two")
        assert {host.name: _contents(host.backing) for host in lab.hosts.values()} == before
        assert all("split_brain" in host.status() for host in lab.hosts.values())
        (lab.two.mount / "large").unlink()
        _resolve(lab.one, "one")
        lab.wait_mirrored()
        assert tree_differences(lab) == []


def test_a_loser_that_served_goes_on_if_its_versions_cannot_be_kept(lab: Lab) -> None:
    _prepare(lab)
    _divide(lab)
    store = lab.two.under / ".mirrorfs" / "lost"
    backing.set_immutable(store, True)
    try:
        failed = mirrorfs(lab.one, "split-brain", "resolve", "--keep", "one", "--yes")
    finally:
        backing.set_immutable(store, False)
    assert failed.returncode == 1
    assert "two: its own versions cannot be kept aside" in failed.stderr
    assert state(lab.two) == "solo"
    (lab.two.mount / "file").write_text("it goes on")
    wait_for(lambda: "split_brain" in status(lab.two), "nothing has changed")
    _resolve(lab.two, "one")
    lab.wait_mirrored()
    assert "/file" in _lost(lab.two)


def test_killed_between_the_keeping_and_the_record_it_can_be_tried_again(lab: Lab, tmp_path: Path) -> None:
    _prepare(lab)
    _divide(lab)
    before = _contents(lab.one.backing)
    wait_state(lab.one, "waiting")
    os.mkfifo(lab.one.state_dir / "record.new")  # the node waits there for a reader, before a byte of the record is written
    command = ["mirrorfs", "split-brain", "resolve", "--keep", "two", "--yes", "--config", str(lab.one.config)]
    with subprocess.Popen([sys.executable, "-m", *command], cwd="/", stderr=subprocess.PIPE) as asking:
        store = lab.one.under / ".mirrorfs" / "lost"
        wait_for(lambda: any(name.isdigit() for name in os.listdir(store)), "the versions are kept")
        time.sleep(0.2)
        lab.one.kill()
        asking.wait(timeout=30)
    (lab.one.state_dir / "record.new").unlink()
    lab.one.start()
    _wait_split(lab)
    assert _contents(lab.one.backing) == before, "nothing of the tree was touched"
    _resolve(lab.two, "two")
    lab.wait_mirrored()
    assert tree_differences(lab) == []
    assert mirrorfs(lab.one, "lost", "export", "--all", str(tmp_path / "all")).returncode == 0
    (batch,) = (tmp_path / "all").iterdir()
    for name in ("of-both", "of-one", "new/inside"):
        assert (batch / name).read_bytes() == before[name], "once, not twice"
