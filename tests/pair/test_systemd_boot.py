"""The package, the units and the commands on two machines that a systemd has booted: from the installation to a power cut."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.pair.machines import Machine, two_machines, why_not

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not())]

MOUNT = "mirrorfs@db"
CONTROLLER = "mirrorfs-controller@db"
FAILOVER = """
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

    def acquaint(self, *options: str, join: tuple[str, ...] = (), check: bool = True) -> None:
        """`mirrorfs init` on the one, `mirrorfs join` on the other, each with its options; `check`: the latter succeeds."""
        waiting = self.one.popen("mirrorfs", "init", "db", "--address", self.one.address, "--mount", "/data", *options)
        assert waiting.stdout is not None
        lines: list[str] = []
        for line in waiting.stdout:
            lines.append(line)
            if found := re.search(r"mirrorfs join (\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        self.said["two"] = self.two.run("mirrorfs", "join", found[1], *join, check=check)
        rest, _ = waiting.communicate(timeout=120)
        self.said["one"] = rest
        assert waiting.returncode == 0, rest

    def wait_mirrored(self, *, primary: Machine | None = None) -> None:
        """Until one is the primary and both are in sync."""
        leader = primary or self.one
        leader.wait_for(lambda: status(leader).get("state") == "primary", f"{leader.name} is the primary of a pair")
        assert status(leader)["in_sync"] == ["one", "two"]


def status(machine: Machine) -> dict[str, Any]:
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
        pair.two.wait_for(lambda: status(pair.two).get("state") == "standby", "it follows")
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
        machine.wait_for(partial(_was_restarted, machine, restarts), "it is started again")
        machine.wait_for(partial(machine.is_active, MOUNT), "it is ready")
        pair.wait_mirrored()
        assert "status=9/KILL" in machine.log(MOUNT)
    pair.one.run("sh", "-c", "echo after >/data/after")
    assert pair.two.run("cat", "/data/after") == "after"


def _was_restarted(machine: Machine, before: int) -> bool:
    return int(machine.property(MOUNT, "NRestarts")) > before


def test_the_watchdog_ends_a_node_that_stands_still_and_it_comes_back(pair: Pair) -> None:
    pair.two.write(f"/etc/systemd/system/{MOUNT}.service.d/test.conf", "[Service]\nWatchdogSec=3\n")
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


def test_the_journal_has_the_events_with_their_fields(pair: Pair) -> None:
    found = pair.one.run("journalctl", "--output=json", "MIRRORFS_VOLUME=db", "MIRRORFS_EVENT=promoted")
    (promoted,) = (json.loads(line) for line in found.splitlines())
    expected = {
        "MESSAGE": "one was promoted",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "mirrorfs",
        "LOGGER": "mirrorfs.promotion",
        "MIRRORFS_NODE": "one",
        "MIRRORFS_EPOCH": "1",
        "MIRRORFS_NEW": "True",
        "_SYSTEMD_UNIT": f"{MOUNT}.service",
    }
    assert {key: promoted[key] for key in expected} == expected
    pair.two.run("systemctl", "restart", MOUNT)
    pair.wait_mirrored()
    warnings = pair.one.run("journalctl", "--unit", MOUNT, "--priority=warning", "--output=cat")
    assert "going on alone in epoch" in warnings
    assert "two has joined" not in warnings


def test_what_ends_a_node_is_an_error_in_the_journal(pair: Pair) -> None:
    pair.two.run("systemctl", "stop", MOUNT)
    pair.two.run("mv", "/etc/mirrorfs/db.toml", "/root/db.toml")
    pair.two.write("/etc/mirrorfs/db.toml", "volume = 1\n")
    try:
        assert pair.two.result("systemctl", "start", MOUNT).returncode != 0
        assert "/etc/mirrorfs/db.toml: " in pair.two.run(
            "journalctl", "--unit", MOUNT, "--priority=err", "--identifier=mirrorfs"
        )
    finally:
        pair.two.run("mv", "/root/db.toml", "/etc/mirrorfs/db.toml")
        pair.two.run("systemctl", "restart", MOUNT)
    pair.wait_mirrored()


def test_the_controller_looks_after_a_service_of_systemd(pair: Pair) -> None:
    for machine in (pair.one, pair.two):
        machine.write("/etc/systemd/system/app.service", _APP)
        machine.run("sh", "-c", f"cat >>/etc/mirrorfs/db.toml <<'end'\n{FAILOVER}\nend")
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
        for event in ("failover-begun", "failover-ended"):
            found = pair.one.run("journalctl", "--quiet", "--output=cat", "--unit", CONTROLLER, f"MIRRORFS_EVENT={event}")
            assert len(found.splitlines()) == 1, found
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


# ---- machines with nothing but the package


def test_init_can_be_told_to_make_the_first_promotion(fresh: Pair) -> None:
    (fresh.one.data / "kept").write_text("kept")
    fresh.acquaint("--promote")
    assert "one is the primary in epoch 1 of a new volume" in fresh.said["one"]
    fresh.wait_mirrored()
    assert fresh.two.run("cat", "/data/kept") == "kept"
    again = fresh.one.popen("mirrorfs", "init", "db", "--promote", "--minutes", "0.1")
    said, _ = again.communicate(timeout=60)
    assert "no node has joined within 0.1 minutes" in said


def test_the_first_promotion_is_left_to_a_person_where_both_have_files(fresh: Pair) -> None:
    for machine in (fresh.one, fresh.two):
        (machine.data / "file").write_text(machine.name)
    with pytest.raises(AssertionError, match="two has files in its directory too"):
        fresh.acquaint("--promote")
    for machine in (fresh.one, fresh.two):
        assert status(machine)["epoch"] == 0
        assert machine.run("cat", "/data/file") == machine.name


def test_a_node_that_is_not_to_be_started_is_not(fresh: Pair) -> None:
    fresh.acquaint("--no-start", join=("--no-start",))
    for machine in (fresh.one, fresh.two):
        assert "next, here: systemctl enable --now mirrorfs@db\n" in fresh.said[machine.name] + "\n"
        assert machine.run("systemctl", "is-enabled", MOUNT, check=False) == "disabled"
        assert not machine.is_active(MOUNT)
    # What it would have done by itself, on a node that cannot start, says so in one line.
    fresh.two.write("/var/lib/mirrorfs/db/two/record", "nonsense")
    fresh.one.run("systemctl", "enable", "--now", MOUNT)
    again = fresh.one.popen("mirrorfs", "init", "db")
    assert again.stdout is not None
    code = next(found[1] for line in again.stdout if (found := re.search(r"mirrorfs join (\S+)", line)))
    done = fresh.two.result("mirrorfs", "join", code)
    assert done.returncode == 1
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("mirrorfs: "))
    assert said.startswith("mirrorfs: mirrorfs@db.service: does not start: /var/lib/mirrorfs/db/two/record: damaged")
    rest, _ = again.communicate(timeout=60)
    assert "the node runs already" in rest


_MODULE = """
summary = "an application that has to be prepared"
[systemd]
configuration = '''
[[service]]
name = "app"
unit = "app.service"
prepare = "echo prepared >>/root/prepared; test -e /root/may"
'''
"""


def _do_as_told(machine: Machine, said: str) -> None:
    """Run what a command has told a person to run."""
    (commands,) = re.findall(r"run here: (.*)$", said, re.MULTILINE)
    machine.run("sh", "-c", str(commands).replace("; and ", " && "))


def test_a_machine_that_cannot_be_prepared_is_not_started_and_can_be_mended(fresh: Pair) -> None:
    for machine in (fresh.one, fresh.two):
        machine.write("/etc/systemd/system/app.service", _APP)
        machine.write("/data/volume/file", machine.name)
    fresh.one.write("/etc/mirrorfs/modules/app.toml", _MODULE)
    fresh.one.write("/root/may", "")
    fresh.acquaint("--mount", "/data/volume", "--module", "app", join=("--set-aside",), check=False)
    (said,) = (line for line in fresh.said["two"].splitlines() if line.startswith("mirrorfs: "))
    assert "service app: this machine could not be prepared for it (exit status 1, see above); nothing was started" in said
    for unit in (MOUNT, CONTROLLER):
        assert not fresh.two.is_active(unit)
    assert fresh.two.run("cat", "/data/volume/file") == "two"

    fresh.two.write("/root/may", "")
    _do_as_told(fresh.two, said)
    fresh.one.run("mirrorfs", "promote")
    fresh.wait_mirrored()
    assert fresh.two.run("cat", "/data/volume/file") == "one"
    assert fresh.two.run("cat", "/data/volume.before-mirrorfs/file") == "two"
    fresh.one.wait_for(lambda: fresh.one.is_active("app"), "the service runs")

    # Under a service that runs nothing is prepared: neither when a machine is introduced again, nor if it is asked for.
    fresh.acquaint("--mount", "/data/volume")
    refused = fresh.one.result("mirrorfs", "prepare")
    assert (refused.returncode, refused.stdout.count("\n")) == (1, 1)
    assert "the controller of db runs here, and a service would be stopped under it: stop it first" in refused.stdout
    assert fresh.one.run("cat", "/root/prepared").split() == ["prepared"]
    assert fresh.two.run("cat", "/root/prepared").split() == ["prepared"] * 2


def test_files_on_the_second_machine_can_be_set_aside_afterwards_too(fresh: Pair) -> None:
    for machine in (fresh.one, fresh.two):
        machine.write("/data/volume/file", machine.name)
    fresh.acquaint("--mount", "/data/volume")
    assert "/data/volume has files here, which nothing of the other node will replace" in fresh.said["two"]
    _do_as_told(fresh.two, fresh.said["two"])
    fresh.one.run("mirrorfs", "promote")
    fresh.wait_mirrored()
    assert fresh.two.run("cat", "/data/volume/file") == "one"
    assert fresh.two.run("cat", "/data/volume.before-mirrorfs/file") == "two"


def test_a_mount_point_that_is_not_there_is_made(fresh: Pair) -> None:
    fresh.acquaint("--mount", "/data/volume", "--promote")
    fresh.wait_mirrored()
    for machine in (fresh.one, fresh.two):
        assert "/data/volume was not there, and is made" in fresh.said[machine.name]
        assert _mounts(machine) == ["/data/volume"]
