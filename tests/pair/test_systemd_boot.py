"""The package, the units and the commands on two machines that a systemd has booted: from the installation to a power cut."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.pair.machines import Machine, two_machines, why_not

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not())]

MOUNT = "mirrorfs@db"
CONTROLLER = "mirrorfs-controller@db"
_FAILOVER = """
[failover]
[arbiter]
kind = "none"
allow_unarbitrated = true
[[vip]]
address = "10.77.0.100/24"
interface = "eth0"
[[service]]
name = "app"
unit = "app.service"
"""
#: An application under the mount, which notes each of its starts there.
_APP = """
[Service]
ExecStartPre=/bin/sh -c "hostname >>/data/starts"
ExecStart=/bin/sleep infinity
"""


class Pair:
    """The two machines, and what `init` and `join` said there."""

    def __init__(self, one: Machine, two: Machine) -> None:
        self.one = one
        self.two = two
        self.said: dict[str, str] = {}

    def install(self, package: Path) -> None:
        for machine in (self.one, self.two):
            machine.copy(package, "/root/mirrorfs.deb")
            machine.run("dpkg", "--install", "/root/mirrorfs.deb")

    def acquaint(self, *options: str, join: tuple[str, ...] = ()) -> None:
        """`mirrorfs init` on the one, `mirrorfs join` on the other, each with its options."""
        waiting = self.one.popen("mirrorfs", "init", "db", "--address", self.one.address, "--mount", "/data", *options)
        assert waiting.stdout is not None
        lines: list[str] = []
        for line in waiting.stdout:
            lines.append(line)
            if found := re.search(r"mirrorfs join (\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        self.said["two"] = self.two.run("mirrorfs", "join", found[1], *join)
        rest, _ = waiting.communicate(timeout=120)
        self.said["one"] = rest
        assert waiting.returncode == 0, rest

    def wait_mirrored(self, *, primary: Machine | None = None) -> None:
        """Until one is the primary and both are in sync."""
        leader = primary or self.one
        leader.wait_for(lambda: _status(leader).get("state") == "primary", f"{leader.name} is the primary of a pair")
        assert _status(leader)["in_sync"] == ["one", "two"]


def _status(machine: Machine) -> dict[str, Any]:
    done = machine.result("mirrorfs", "status", "--json")
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


@contextmanager
def _pair(directory: Path, package: Path) -> Iterator[Pair]:
    with two_machines(directory) as (one, two):
        pair = Pair(one, two)
        pair.install(package)
        yield pair


@pytest.fixture(scope="module")
def pair(built_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A mirrored pair, made as the quick start says; the tests leave it mirrored, with one as the primary."""
    with _pair(tmp_path_factory.mktemp("machines"), built_package) as pair:
        (pair.one.data / "before").write_text("was here before mirrorfs")
        pair.acquaint()
        pair.one.run("mirrorfs", "promote")
        pair.wait_mirrored()
        yield pair


@pytest.fixture
def fresh(built_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two machines with the package, and nothing more."""
    with _pair(tmp_path_factory.mktemp("machines"), built_package) as pair:
        yield pair


def test_five_commands_lead_from_two_machines_to_a_mirrored_pair(pair: Pair) -> None:
    for machine in (pair.one, pair.two):
        assert "mirrorfs@db.service is started, now and with every boot" in pair.said[machine.name]
        assert machine.run("systemctl", "is-enabled", MOUNT) == "enabled"
        assert machine.is_active(MOUNT)
        assert machine.property(MOUNT, "StatusErrno") == "0"
        assert machine.run("cat", "/data/before") == "was here before mirrorfs"
        # Only what runs as root in the units is allowed that many files, as far as this machine allows it.
        assert int(machine.run("sh", "-c", f"prlimit -p {machine.property(MOUNT, 'MainPID')} -n -o SOFT --noheadings")) > 4096
    assert "then, once, on the node whose files are to be kept: mirrorfs promote" in pair.said["one"]
    pair.one.run("sh", "-c", "echo new >/data/file")
    assert pair.two.run("cat", "/data/file") == "new"


def test_a_unit_is_active_only_once_its_node_has_said_that_it_is_ready(pair: Pair) -> None:
    pair.two.run("systemctl", "stop", MOUNT)
    pair.two.run("mv", "/usr/bin/mirrorfs", "/usr/bin/mirrorfs.real")
    pair.two.write("/usr/bin/mirrorfs", '#!/bin/sh\nunset NOTIFY_SOCKET\nexec /usr/bin/mirrorfs.real "$@"\n')
    pair.two.run("chmod", "755", "/usr/bin/mirrorfs")
    try:
        pair.two.run("systemctl", "start", "--no-block", MOUNT)
        pair.two.wait_for(lambda: _status(pair.two).get("state") == "standby", "it follows")
        assert pair.two.property(MOUNT, "ActiveState") == "activating"
    finally:
        pair.two.run("mv", "/usr/bin/mirrorfs.real", "/usr/bin/mirrorfs")
        pair.two.run("systemctl", "restart", MOUNT)
    assert pair.two.is_active(MOUNT)
    pair.wait_mirrored()


def test_a_service_that_is_bound_to_the_mount_stops_and_starts_with_it(pair: Pair) -> None:
    unit = f"[Unit]\nBindsTo={MOUNT}.service\nAfter={MOUNT}.service\n[Install]\nWantedBy={MOUNT}.service\n"
    pair.one.write("/etc/systemd/system/bound.service", unit + _APP)
    pair.one.run("systemctl", "daemon-reload")
    pair.one.run("systemctl", "enable", "--now", "bound")
    try:
        first = pair.one.property("bound", "MainPID")
        pair.one.run("systemctl", "stop", MOUNT)
        assert not pair.one.is_active("bound")
        assert "/data" not in _mounts(pair.one)
        pair.one.run("systemctl", "start", MOUNT)
        pair.one.wait_for(lambda: pair.one.is_active("bound"), "the service runs again")
        pair.wait_mirrored()
        second = pair.one.property("bound", "MainPID")
        assert second != first
        pair.one.run("kill", "-KILL", pair.one.property(MOUNT, "MainPID"))
        pair.one.wait_for(lambda: pair.one.property("bound", "MainPID") not in ("0", second), "it runs after a crash, too")
    finally:
        pair.one.run("systemctl", "disable", "--now", "bound")
    pair.wait_mirrored()


def _mounts(machine: Machine) -> list[str]:
    """Where a mirrorfs is mounted."""
    return machine.run("findmnt", "--noheadings", "--output=TARGET", "--types=fuse.mirrorfs", check=False).split()


def test_a_node_that_was_killed_is_started_again_and_catches_up(pair: Pair) -> None:
    for machine in (pair.two, pair.one):
        restarts = int(machine.property(MOUNT, "NRestarts"))
        machine.run("kill", "-KILL", machine.property(MOUNT, "MainPID"))
        machine.wait_for(lambda m=machine, n=restarts: int(m.property(MOUNT, "NRestarts")) > n, "it is started again")
        machine.wait_for(lambda m=machine: m.is_active(MOUNT), "it is ready")
        pair.wait_mirrored()
        assert "status=9/KILL" in machine.log(MOUNT)
    pair.one.run("sh", "-c", "echo after >/data/after")
    assert pair.two.run("cat", "/data/after") == "after"


def test_the_watchdog_ends_a_node_that_stands_still_and_it_comes_back(pair: Pair) -> None:
    pair.two.write(f"/etc/systemd/system/{MOUNT}.service.d/test.conf", "[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\n")
    pair.two.run("systemctl", "daemon-reload")
    pair.two.run("systemctl", "restart", MOUNT)
    try:
        pair.wait_mirrored()
        pid = pair.two.property(MOUNT, "MainPID")
        pair.two.run("kill", "-STOP", pid)
        pair.two.wait_for(lambda: pair.two.property(MOUNT, "MainPID") not in ("0", pid), "another process is there")
        pair.two.wait_for(lambda: pair.two.is_active(MOUNT), "it is ready")
        assert "Watchdog timeout" in pair.two.log(MOUNT)
    finally:
        pair.two.run("rm", "-r", f"/etc/systemd/system/{MOUNT}.service.d")
        pair.two.run("systemctl", "daemon-reload")
        pair.two.run("systemctl", "restart", MOUNT)
    pair.wait_mirrored()


def test_a_node_whose_loop_stands_still_says_where_before_it_ends(pair: Pair) -> None:
    """What the watchdog sends first."""
    pid = pair.two.property(MOUNT, "MainPID")
    pair.two.run("kill", "-ABRT", pid)
    pair.two.wait_for(lambda: pair.two.property(MOUNT, "MainPID") not in ("0", pid), "another process is there")
    pair.wait_mirrored()
    assert "Fatal Python error: Aborted" in pair.two.log(MOUNT, f"_PID={pid}")


def test_a_stop_unmounts_and_a_start_mounts(pair: Pair) -> None:
    pair.two.run("systemctl", "stop", MOUNT)
    assert pair.two.property(MOUNT, "Result") == "success"
    assert _mounts(pair.two) == []
    assert pair.two.result("touch", "/data/underneath").returncode != 0
    pair.two.run("systemctl", "start", MOUNT)
    assert _mounts(pair.two) == ["/data"]
    pair.wait_mirrored()


def test_after_a_power_cut_a_machine_comes_back_by_itself(pair: Pair) -> None:
    pair.two.cut_power()
    pair.one.run("sh", "-c", "echo meanwhile >/data/meanwhile")
    pair.two.boot()
    pair.wait_mirrored()
    assert pair.two.run("cat", "/data/meanwhile") == "meanwhile"


def test_the_controller_looks_after_a_service_of_systemd(pair: Pair) -> None:
    for machine in (pair.one, pair.two):
        machine.write("/etc/systemd/system/app.service", _APP)
        machine.run("sh", "-c", f"cat >>/etc/mirrorfs/db.toml <<'end'\n{_FAILOVER}\nend")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", MOUNT)
    pair.wait_mirrored()
    try:
        for machine in (pair.one, pair.two):
            machine.run("systemctl", "enable", "--now", CONTROLLER)
            assert machine.is_active(CONTROLLER)
        pair.one.wait_for(lambda: _serves(pair.one), "the application is on one")
        assert not pair.two.is_active("app")

        first = pair.one.property(CONTROLLER, "MainPID")
        pair.one.run("kill", "-KILL", first)
        pair.one.wait_for(lambda: pair.one.property(CONTROLLER, "MainPID") not in ("0", first), "a new controller is there")
        assert pair.one.is_active("app")  # it goes on meanwhile
        pair.one.wait_for(lambda: _serves(pair.one), "the new controller has adopted it")

        pair.two.run("mirrorfs", "switchover")
        assert _serves(pair.two)
        assert not pair.one.is_active("app")
        pair.wait_mirrored(primary=pair.two)

        pair.two.cut_power()
        pair.one.wait_for(lambda: _serves(pair.one), "the application is on one again")
        pair.two.boot()
        pair.wait_mirrored()
        assert pair.two.is_active(CONTROLLER)
        assert pair.one.run("cat", "/data/starts").split()[-3:] == ["one", "two", "one"]
    finally:
        for machine in (pair.one, pair.two):
            machine.run("systemctl", "disable", "--now", CONTROLLER)


def _serves(machine: Machine) -> bool:
    """Whether the application runs there, and its address is there."""
    return machine.is_active("app") and "10.77.0.100" in machine.run("ip", "-4", "address")
