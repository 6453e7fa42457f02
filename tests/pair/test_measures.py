"""What a mirrored mount is measured by, asked as the console asks for it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrorfs import control
from mirrorfs.lab.pair import Host, Lab
from tests.pair.support import wait_state

pytestmark = pytest.mark.root

_BLOCK = 4096


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A mirrored pair in which no checkpoint comes by itself."""
    return make_lab(checkpoint_interval="1h")


def _measures(host: Host) -> dict[str, Any]:
    return control.request(host.control, "measures")


def _parts(found: dict[str, Any], kind: str) -> dict[str, int]:
    """How often each part of the time of changes, or of syncs, was measured."""
    return {part: sum(values["counts"]) for part, values in found["latency"][kind].items()}


def _write(directory: Path, count: int, *, sync: bool = False) -> None:
    descriptor = os.open(directory / "file", os.O_WRONLY | os.O_CREAT, 0o644)
    for at in range(count):
        os.pwrite(descriptor, bytes(_BLOCK), at * _BLOCK)
        if sync:
            os.fsync(descriptor)
    os.close(descriptor)


def test_writes_and_syncs_of_a_mirrored_mount_say_where_their_time_goes(lab: Lab) -> None:
    before = _measures(lab.one)
    _write(lab.one.mount, 140)
    _write(lab.one.mount, 10, sync=True)
    found = _measures(lab.one)
    assert found["bytes_written"] - before["bytes_written"] == 150 * _BLOCK
    assert found["changes"] - before["changes"] >= 151, "and the file was made"
    assert found["syncs"] - before["syncs"] == 10
    changes, syncs = _parts(found, "change"), _parts(found, "sync")
    assert changes["total"] == changes["local"] == found["changes"] // 7
    assert syncs["total"] == syncs["local"] == found["syncs"]
    for kind, counted in (("change", changes), ("sync", syncs)):
        latency = found["latency"][kind]
        assert counted["peer"] == counted["wire"] > 0, kind
        assert 0 < latency["peer"]["sum_s"] <= latency["total"]["sum_s"], kind
        assert latency["wire"]["sum_s"] + latency["peer"]["sum_s"] <= latency["total"]["sum_s"], kind
        assert all(len(part["counts"]) == len(found["bounds_s"]) + 1 for part in latency.values())
    assert changes["peer"] == changes["total"], "one after the other, so each has an acknowledgement of its own"
    assert syncs["peer"] == syncs["total"]


def test_alone_a_node_has_no_peer_to_measure_and_what_it_measured_before_stays(lab: Lab) -> None:
    _write(lab.one.mount, 70, sync=True)
    before = _measures(lab.one)
    lab.two.kill()
    wait_state(lab.one, "solo")
    _write(lab.one.mount, 70, sync=True)
    found = _measures(lab.one)
    for kind in ("change", "sync"):
        earlier, later = _parts(before, kind), _parts(found, kind)
        assert later["total"] > earlier["total"] > 0
        assert later["peer"] == earlier["peer"] > 0
        assert later["wire"] == earlier["wire"]


def test_a_standby_is_asked_for_nothing_by_applications(lab: Lab) -> None:
    _write(lab.one.mount, 70, sync=True)
    found = _measures(lab.two)
    assert (found["bytes_written"], found["changes"], found["syncs"]) == (0, 0, 0)


def test_the_status_says_what_the_link_speaks(lab: Lab) -> None:
    for host in lab.hosts.values():
        peer = host.status()["peer"]
        assert (peer["protocol"], peer["version"]) == (8, "0.1.0")
