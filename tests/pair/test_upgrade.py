"""A running pair is upgraded, one node at a time: from the last that spoke protocol 7 only, as docs/OPERATIONS.md says."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorfs import control
from mirrorfs.core import wire
from mirrorfs.lab.pair import Host, Lab
from tests.pair.support import Load, mirrorfs, tree_differences, wait_peer_lost, wait_state

pytestmark = pytest.mark.root

#: The last commit with nothing but protocol 7.
_OLD = "e3197b0"
_PROJECT = Path(__file__).parents[2]
#: Not "tree" at full speed: a resync that follows it on a busy machine takes minutes, whatever the version.
_KINDS = ("append", "append-fsync", "overwrite", "overwrite-fdatasync", "names", "names-fsync")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of mirrorfs as they were then."""
    command = ["git", "-C", str(_PROJECT), "archive", _OLD, "src"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"the history of this repository is not here, and with it the version to upgrade from: {done.stderr!r}")
    directory = tmp_path_factory.mktemp("old")
    subprocess.run(["tar", "-x", "-C", directory], input=done.stdout, check=True)
    assert "VERSION: Final = 7\n" in (directory / "src" / "mirrorfs" / "core" / "wire.py").read_text()
    return directory / "src"


@pytest.fixture
def pair(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A mirrored pair of the old version, node one the primary."""
    with Lab.create(tmp_path_factory.mktemp("lab"), options={"ack_timeout": "2s"}) as lab:
        for host in lab.hosts.values():
            host.start(source=old)
        lab.one.promote(yes=True)
        lab.wait_mirrored()
        yield lab


def _upgrade(lab: Lab, host: Host, primary: Host) -> None:
    """What docs/OPERATIONS.md says for the node that follows."""
    _done(host, "pause", "--yes")
    wait_state(primary, "solo")
    wait_peer_lost(primary)
    host.stop()
    host.start()
    _done(primary, "resume")
    lab.wait_mirrored()


def _done(host: Host, *arguments: str) -> None:
    """A command of the new version succeeds; it may speak to a node of the old one."""
    done = mirrorfs(host, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def _link(host: Host) -> dict[str, Any]:
    peer: dict[str, Any] = host.status()["peer"]
    return peer


def _peer_counts(host: Host) -> dict[str, tuple[int, int]]:
    """For changes and syncs: how many were timed, and for how many of them the other node said what it spent."""
    latency = control.request(host.control, "measures")["latency"]
    return {kind: (sum(of["total"]["counts"]), sum(of["peer"]["counts"])) for kind, of in latency.items()}


def test_a_running_pair_is_upgraded_one_node_at_a_time_and_nothing_is_lost(pair: Lab, start_load: Callable[..., Load]) -> None:
    one, two = pair.one, pair.two
    assert "protocol" not in _link(one), "the old version runs"
    loads = [start_load(one.mount, "first", kinds=_KINDS)]
    loads[0].wait_noted(300)

    # An old primary and a new standby, while applications write.
    _upgrade(pair, two, one)
    assert _link(two)["protocol"] == 7
    assert "version" not in _link(two)
    loads[0].wait_noted(300)
    assert pair.is_mirrored()

    # The role moves from the old to the new; who has files open is told so, as in any handover.
    loads[0].stop()
    _done(two, "promote")
    pair.wait_mirrored()
    assert pair.primary() is two
    assert all(load.missing(host.mount) == [] for load in loads for host in (one, two))

    # A new primary and an old standby.
    loads.append(start_load(two.mount, "second", kinds=_KINDS))
    loads[1].wait_noted(1000)
    assert _link(two)["protocol"] == 7
    counts = _peer_counts(two)
    assert all(timed > 0 and said == 0 for timed, said in counts.values()), counts

    # The other node, while applications write.
    _upgrade(pair, one, two)
    assert [_link(host)["protocol"] for host in (one, two)] == [wire.NEWEST] * 2 == [8, 8]
    loads[1].wait_noted(1000)
    counts = _peer_counts(two)
    assert all(said > 0 for _, said in counts.values()), counts

    # And back to where the role was.
    loads[1].stop()
    _done(one, "promote")
    pair.wait_mirrored()
    loads.append(start_load(one.mount, "third", kinds=_KINDS))
    loads[2].wait_noted(300)
    assert [line for line in loads[2].stop() if line] == []
    assert tree_differences(pair) == []
    assert [load.missing(host.mount) for load in loads for host in (one, two)] == [[]] * 6


def test_a_node_of_the_old_version_comes_back_to_the_new_as_a_standby_and_as_the_source(pair: Lab, old: Path) -> None:
    """An upgrade that was thought better of, and nodes that are lost in the middle of one."""
    one, two = pair.one, pair.two
    two.stop()
    two.start()
    pair.wait_mirrored()
    (one.mount / "one").write_text("written while one is old and two is new")
    two.kill()
    wait_state(one, "solo")
    (one.mount / "two").write_text("written alone")
    two.start(source=old)
    pair.wait_mirrored()
    assert (two.mount / "two").read_text() == "written alone"
    one.kill()
    wait_peer_lost(two)
    two.promote(yes=True)
    (two.mount / "three").write_text("written alone by the other")
    one.start()
    pair.wait_mirrored()
    assert _link(one)["protocol"] == 7
    assert (one.mount / "three").read_text() == "written alone by the other"
    assert tree_differences(pair) == []
