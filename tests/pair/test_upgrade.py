"""A running pair is upgraded, one node at a time: from the last that spoke protocol 7 only, as docs/OPERATIONS.md says."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorfs import control
from mirrorfs.core import wire
from mirrorfs.lab import cluster
from mirrorfs.lab.cluster import ADDRESS, Cluster
from mirrorfs.lab.pair import Host, Lab, node_environment, wait_for
from tests.pair.support import NUMBERS, TELL, Client, Load, mirrorfs, numbers, tree_differences, wait_peer_lost, wait_state

pytestmark = pytest.mark.root

#: Not "tree" at full speed: a resync that follows it on a busy machine takes minutes, whatever the version.
_KINDS = ("append", "append-fsync", "overwrite", "overwrite-fdatasync", "names", "names-fsync")


@pytest.fixture(scope="module")
def old(old_project: Path) -> Path:
    """The sources of mirrorfs as they were then."""
    source = old_project / "src"
    assert "VERSION: Final = 7\n" in (source / "mirrorfs" / "core" / "wire.py").read_text()
    return source


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


# ---- with controllers, a service and an address

_SERVICE = f'''
[[service]]
name = "numbers"
start = """cat > $LAB_MOUNT/numbers.py <<'END'
{NUMBERS}
END
setsid --fork python3 $LAB_MOUNT/numbers.py $LAB_MOUNT/numbers >/dev/null 2>&1"""
stop = "pkill -KILL -f $LAB_MOUNT/numbers.py || true"
start_timeout = "10s"
[[service.check]]
tcp = "127.0.0.1:7000"
interval = "300ms"
'''


@pytest.fixture
def site(old: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A pair of the old version with its controllers, served by node one."""
    text = cluster.sections(_SERVICE, failover='detection_timeout = "2s"')
    with Cluster(tmp_path / "lab", text, options={"ack_timeout": "2s"}, source=old) as site:
        site.start_controllers(old)
        yield site


def _run(host: Host, source: Path | None, *arguments: str) -> str:
    """A command of the version that is installed on the host succeeds; what it printed."""
    command = [sys.executable, "-m", "mirrorfs", *arguments, "--config", str(host.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/", env=node_environment(source))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _upgrade_with_controllers(site: Cluster, host: Host, primary: Host, source: Path | None) -> None:
    """What docs/OPERATIONS.md says for the node that follows; `source` is what the other one runs."""
    _run(primary, source, "pause", "--yes")
    assert site.stop_controller(host.name) == 0
    host.stop()
    host.start()
    site.start_controller(host.name)
    _run(primary, source, "resume")
    _wait_served(site, primary, host)


def _wait_served(site: Cluster, by: Host, beside: Host) -> None:
    """Until both are in sync, and both controllers know from each other who serves and who could."""
    site.lab.wait_mirrored()
    expected = {by.name: ["serving", True, "idle", "standby"], beside.name: ["idle", True, "serving", "leading"]}

    def known() -> dict[str, list[Any]]:
        said = {name: site.says(name) or {} for name in site.lab.hosts}
        peers = {name: of.get("peer", {}) for name, of in said.items()}
        return {
            name: [of.get("posture"), *(peers[name].get(key) for key in ("heard", "posture", "mount"))]
            for name, of in said.items()
        }

    wait_for(lambda: known() == expected, f"{by.name} serves, and both controllers know")


def test_a_pair_with_controllers_is_upgraded_under_a_client_that_commits(site: Cluster, old: Path) -> None:
    one, two = site.lab.one, site.lab.two

    def tell(number: int) -> bool:
        return site.at_desk("timeout", "5", sys.executable, "-c", TELL, ADDRESS, str(number)).returncode == 0

    with Client(tell) as client:
        client.wait_noted(10)
        _run(one, old, "maintenance", "on")
        _upgrade_with_controllers(site, two, one, old)

        # An old node that serves, and a new one that could.
        assert [_link(host).get("protocol") for host in (one, two)] == [None, 7]
        for host, source in ((one, old), (two, None)):
            said = _run(host, source, "status")
            assert "one, two" in said, said
            assert "maintenance" in said, said
        client.wait_noted(10)

        _run(two, None, "switchover")
        client.wait_noted(10)
        _wait_served(site, two, one)
        assert set(client.noted) - numbers(two.mount / "numbers") == set()

        _upgrade_with_controllers(site, one, two, None)
        assert [_link(host)["protocol"] for host in (one, two)] == [8, 8]
        _run(two, None, "maintenance", "off")
        client.wait_noted(10)

        _run(two, None, "switchover")
        client.wait_noted(10)
        _wait_served(site, one, two)
    assert [set(client.noted) - numbers(host.mount / "numbers") for host in (one, two)] == [set(), set()]
    assert site.lab.primary() is one
    assert tree_differences(site.lab) == []
