"""How fast a node comes back, and what both nodes say of it meanwhile."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import Load, mirrorfs, start_mirrored, status, tree_differences, wait_state

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def unstarted(tmp_path: Path) -> Iterator[Lab]:
    """A lab with nothing running on its hosts."""
    with Lab.create(tmp_path / "lab", options={"ack_timeout": "1s"}) as lab:
        yield lab


def _configure(lab: Lab, text: str) -> None:
    for host in lab.hosts.values():
        with open(host.config, "a") as file:
            file.write(f"\n[resync]\n{text}\n")


def _fill(host: Host, size_bytes: int) -> None:
    for number in range(8):
        (host.mount / f"file-{number}").write_bytes(os.urandom(size_bytes // 8))


def _watch(lab: Lab) -> tuple[float, dict[str, list[dict[str, Any]]]]:
    """How long the resync took, and what each node said of it."""
    began = time.monotonic()
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in lab.hosts}
    while not lab.is_mirrored():
        assert time.monotonic() < began + 60
        for name, host in lab.hosts.items():
            if resync := status(host).get("resync"):
                said[name].append(resync)
        time.sleep(0.1)
    return time.monotonic() - began, said


def _check(said: dict[str, list[dict[str, Any]]], kind: str, size_bytes: int, rate_bytes_per_s: float) -> None:
    for name, moments in said.items():
        assert moments, name
        known = [moment for moment in moments if moment["totals_are_known"]]
        assert known, name
        for moment in moments:
            assert moment["kind"] == kind
            assert moment["bytes_done"] <= moment["bytes_total"]
            assert moment["files_done"] <= moment["files_total"]
            assert (moment["bytes_per_second"] or 0) < 1.5 * rate_bytes_per_s
            assert moment["seconds_left"] is None or moment["totals_are_known"]
        assert 0.9 * size_bytes <= known[-1]["bytes_total"] <= 1.1 * size_bytes + MIB
        left = [moment["seconds_left"] for moment in moments if moment["seconds_left"] is not None]
        assert left
        assert max(left) <= 2 * size_bytes / rate_bytes_per_s + 1
    assert said["two"][-1]["bytes_received"] > size_bytes / 2


def test_both_kinds_of_resync_keep_to_the_rate_limit_and_both_nodes_show_how_far_it_is(unstarted: Lab) -> None:
    lab = unstarted
    _configure(lab, 'rate_limit = "8MiB/s"')
    lab.one.start()
    lab.one.promote(yes=True)
    _fill(lab.one, 24 * MIB)
    lab.two.start()
    took_s, said = _watch(lab)
    assert took_s > 2.5
    _check(said, "full", 24 * MIB, 8 * MIB)
    mirrorfs(lab.one, "pause", "--yes")
    _fill(lab.one, 24 * MIB)
    mirrorfs(lab.one, "resume")
    took_s, said = _watch(lab)
    assert took_s > 2.5
    _check(said, "quick", 24 * MIB, 8 * MIB)
    assert "resync" not in lab.one.status()
    assert "resync" not in lab.two.status()
    assert tree_differences(lab) == []


def test_a_resync_that_goes_first_makes_equal_trees_under_load(unstarted: Lab, start_load: Callable[..., Load]) -> None:
    lab = unstarted
    _configure(lab, 'priority = "resync"')
    start_mirrored(lab)
    load = start_load(lab.one.mount)
    load.wait_noted(50)
    mirrorfs(lab.one, "pause", "--yes")
    _fill(lab.one, 64 * MIB)
    load.wait_noted(50)
    mirrorfs(lab.one, "resume")
    lab.wait_mirrored()
    load.wait_noted(50)
    assert load.stop() == [""] * len(load.notes)
    assert tree_differences(lab) == []


def test_what_is_only_read_to_be_compared_counts_too(unstarted: Lab) -> None:
    lab = unstarted
    _configure(lab, 'rate_limit = "8MiB/s"')
    lab.one.start()
    lab.one.promote(yes=True)
    (lab.one.mount / "file").write_bytes(os.urandom(24 * MIB))
    lab.two.start()
    lab.wait_mirrored()
    with open(lab.one.mount / "file", "r+b") as file:
        for offset in range(0, 24 * MIB, 4 * MIB):
            os.pwrite(file.fileno(), b"x", offset)
    lab.one.kill()
    lab.one.start()
    took_s, said = _watch(lab)
    assert took_s > 2
    assert {moment["kind"] for moment in said["one"]} == {"quick"}
    assert said["two"][-1]["bytes_received"] < MIB, "next to nothing differs"
    assert tree_differences(lab) == []


def test_a_resync_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    with Lab.create(tmp_path / "lab", options={"ack_timeout": "1s", "checkpoint_interval": "300ms"}) as lab:
        _configure(lab, 'rate_limit = "8MiB/s"')
        start_mirrored(lab)
        _fill(lab.one, 32 * MIB)
        wait_for(lambda: lab.one.status()["dirty_names"] == 0, "a checkpoint")
        lab.two.kill()
        wait_state(lab.one, "solo")
        for number in range(8):
            with open(lab.one.mount / f"file-{number}", "r+b") as file:
                file.write(os.urandom(4 * MIB))
        lab.two.start()
        wait_for(lambda: status(lab.one).get("resync", {}).get("bytes_done", 0) >= 24 * MIB, "three quarters of it")
        lab.two.kill()
        wait_state(lab.one, "solo")
        with open(lab.one.mount / "file-0", "r+b") as file:
            file.write(b"once more")
        lab.two.start()
        wait_for(lambda: "resync" in status(lab.one), "it goes on")
        expected = int(status(lab.one)["resync"]["bytes_total"])
        lab.wait_mirrored()
        assert expected <= 28 * MIB, "of 32: how many files a checkpoint has settled depends on the disk, one at least"
        assert tree_differences(lab) == []


def test_what_a_broken_off_resync_has_made_is_refreshed_by_the_next(tmp_path: Path) -> None:
    with Lab.create(tmp_path / "lab", options={"ack_timeout": "1s"}) as lab:
        _configure(lab, 'rate_limit = "8MiB/s"')
        start_mirrored(lab)
        lab.two.kill()
        wait_state(lab.one, "solo")
        new = lab.one.mount / "new"
        new.mkdir()
        (new / "directory").mkdir()
        (new / "link").symlink_to("nowhere")
        (new / "small").write_text("small")
        (new / "large").write_bytes(os.urandom(24 * MIB))
        lab.two.start()
        wait_for(lambda: status(lab.one).get("resync", {}).get("bytes_done", 0) >= 8 * MIB, "a third of it")
        lab.two.kill()
        wait_state(lab.one, "solo")
        for name in ("directory", "small", "large"):
            os.chmod(new / name, 0o700)
            os.setxattr(new / name, "user.note", b"changed since")
        (new / "small").write_text("large")
        lab.two.start()
        lab.wait_mirrored()
        assert tree_differences(lab) == []
