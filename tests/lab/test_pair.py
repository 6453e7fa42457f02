"""The lab with real nodes: what its commands do to them, and what they clear."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirrorfs.errors import ConfigError, MirrorfsError, UsageError
from mirrorfs.lab import processes, trees
from mirrorfs.lab.pair import Lab, wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab.up(tmp_path / "lab") as lab:
        yield lab


def command(name: str, *arguments: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mirrorfs", "lab", name, "--dir", directory, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def states(lab: Lab) -> dict[str, Any]:
    """The states of both nodes as `lab status` tells them, None for one that does not answer."""
    shown = json.loads(command("status", "--json", directory=lab.dir).stdout)
    return {node["name"]: node["status"] and node["status"]["state"] for node in shown["nodes"]}


def mounts_below(directory: Path) -> list[str]:
    return [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {directory}/" in line]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: it has ended, and waits to be reaped
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_equal(lab: Lab) -> bool:
    try:
        return not trees.differences(lab.one.backing, lab.two.backing)
    except OSError:  # a time is being settled
        return False


def test_up_as_json_shows_the_primary_first_and_down_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    try:
        done = command("up", "--json", directory=directory)
        assert (done.returncode, done.stderr) == (0, "")
        shown = json.loads(done.stdout)
        primary, standby = shown["nodes"]
        assert (primary["name"], standby["name"]) == ("one", "two")
        for node in shown["nodes"]:
            assert {"name", "netns", "mount", "backing", "config", "pids"} <= node.keys()
            assert (Path("/run/netns") / node["netns"]).exists()
            assert os.path.ismount(node["mount"])
            assert Path(node["config"]).is_file()
            assert node["pids"]
            assert all(map(is_running, node["pids"]))
        Path(primary["mount"], "file").write_bytes(b"mirrored")
        for node in shown["nodes"]:
            assert Path(node["backing"], "file").read_bytes() == b"mirrored"
        assert Path(standby["mount"], "file").read_bytes() == b"mirrored"
        with pytest.raises(OSError, match="Read-only"):
            Path(standby["mount"], "other").touch()
    finally:
        done = command("down", directory=directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not directory.exists()
    assert mounts_below(directory) == []
    assert not any((Path("/run/netns") / node["netns"]).exists() for node in shown["nodes"])
    assert not any(is_running(pid) for node in shown["nodes"] for pid in node["pids"])
    assert command("down", directory=directory).returncode == 0


def test_up_makes_a_fresh_pair_where_one_was_killed_with_all_its_mounts_dead(lab: Lab) -> None:
    (lab.one.mount / "file").touch()
    before = [pid for host in lab.hosts.values() for pid in host.pids()]
    held = os.open(lab.two.mount / "file", os.O_RDONLY)  # the dead mount is busy as well
    try:
        processes.kill(processes.find_all(before))
        with pytest.raises(OSError, match="not connected"):
            os.listdir(lab.one.mount)
        again = Lab.up(lab.dir)
    finally:
        with contextlib.suppress(OSError):
            os.close(held)
    assert again.is_mirrored()
    assert os.listdir(again.one.mount) == os.listdir(again.two.mount) == []
    assert len([mount for mount in mounts_below(lab.dir) if mount.endswith("/data")]) == 2
    assert not set(before) & {pid for host in again.hosts.values() for pid in host.pids()}


def test_up_replaces_a_pair_that_runs(lab: Lab) -> None:
    (lab.one.mount / "file").touch()
    before = {pid for host in lab.hosts.values() for pid in host.pids()}
    again = Lab.up(lab.dir)
    assert again.is_mirrored()
    assert os.listdir(again.one.mount) == []
    assert not any(map(is_running, before))


def test_a_killed_standby_is_missed_and_comes_back_in_sync(lab: Lab) -> None:
    assert states(lab) == {"one": "primary", "two": "standby"}
    assert command("kill", "two", directory=lab.dir).returncode == 0
    assert lab.two.pids() == []
    wait_for(lambda: lab.one.status()["state"] == "solo", "one goes on alone")
    assert states(lab) == {"one": "solo", "two": None}
    assert lab.one.status()["in_sync"] == ["one"]
    (lab.one.mount / "file").write_bytes(b"alone")
    done = command("start", "two", directory=lab.dir)
    assert (done.returncode, done.stderr) == (0, "")
    lab.wait_mirrored()
    assert states(lab) == {"one": "primary", "two": "standby"}
    assert (lab.two.backing / "file").read_bytes() == b"alone"
    wait_for(lambda: is_equal(lab), "both trees are equal")
    again = command("start", "two", directory=lab.dir)
    assert again.returncode == 1
    assert again.stderr == "mirrorfs: node two is running already: `mirrorfs lab kill two` first\n"


def test_a_killed_primary_follows_the_one_that_was_promoted(lab: Lab) -> None:
    (lab.one.mount / "file").write_bytes(b"acknowledged")
    lab.one.kill()
    wait_for(lambda: lab.two.status()["peer"]["state"] == "disconnected", "two notices")
    lab.two.promote(yes=True)
    assert (lab.two.mount / "file").read_bytes() == b"acknowledged"
    assert lab.primary() is lab.two
    lab.one.start()
    lab.wait_mirrored()
    assert states(lab) == {"two": "primary", "one": "standby"}
    assert [node["name"] for node in lab.describe()["nodes"]] == ["two", "one"]


def test_a_cut_parts_the_nodes_until_it_is_healed(tmp_path: Path) -> None:
    with Lab.up(tmp_path / "lab", options={"ack_timeout": "500ms"}) as lab:
        for sender in ([], ["--from", "one"]):
            assert command("cut", *sender, directory=lab.dir).returncode == 0
            (lab.one.mount / "file").write_text(str(sender))  # waits until two is known to be lost
            assert lab.one.status()["state"] == "solo"
            wait_for(lambda: lab.two.status()["peer"]["state"] == "disconnected", "two notices")
            shown = json.loads(command("status", "--json", directory=lab.dir).stdout)
            assert shown["cut"] == (["one"] if sender else ["one", "two"])
            assert command("heal", directory=lab.dir).returncode == 0
            lab.wait_mirrored()
            assert lab.network.cut_senders() == []
            assert (lab.two.backing / "file").read_text() == str(sender)


def test_exec_runs_on_the_host_and_passes_everything_on(lab: Lab) -> None:
    addresses = command("exec", "two", "--", "ip", "-brief", "address", directory=lab.dir)
    assert "10.77.0.2" in addresses.stdout
    assert "10.77.0.1" not in addresses.stdout
    script = 'echo "$1"; echo err >&2; exit 42'
    done = command("exec", "one", "--", "sh", "-c", script, "sh", "--yes", directory=lab.dir)
    assert (done.returncode, done.stdout, done.stderr) == (42, "--yes\n", "err\n")


def test_a_process_that_exec_left_behind_ends_with_the_lab(tmp_path: Path) -> None:
    stays = ("sh", "-c", "echo there; exec sleep 1000")
    with Lab.create(tmp_path / "lab") as lab, lab.one.popen(*stays, stdout=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == "there\n"  # and not still on its way into the namespace
        assert lab.one.pids() == []  # not the node's
        lab.down()
        assert left.wait(10) == -9


def test_a_node_can_be_stopped_and_started(lab: Lab) -> None:
    (lab.one.mount / "file").touch()
    lab.two.stop()
    assert not os.path.ismount(lab.two.mount)
    assert os.listdir(lab.two.mount) == [".mirrorfs"]
    lab.two.start()
    lab.wait_mirrored()
    assert os.listdir(lab.two.mount) == ["file"]


@pytest.mark.parametrize("name", ["status", "kill", "start", "cut", "heal", "exec"])
def test_without_a_lab_a_command_says_so_and_ends_with_1(tmp_path: Path, name: str) -> None:
    arguments = {"kill": ["one"], "start": ["one"], "exec": ["one", "--", "true"]}.get(name, [])
    done = command(name, *arguments, directory=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"mirrorfs: no lab is up in {tmp_path}: `mirrorfs lab up` makes one\n"


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(MirrorfsError, match="no lab's"):
        Lab.up(tmp_path)
    Lab(tmp_path).down()
    assert os.listdir(tmp_path) == ["precious"]


def test_wrong_settings_and_nodes_end_with_2_and_leave_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    done = command("up", "--set", "ack_timeout=fast", directory=directory)
    assert done.returncode == 2
    assert "replication.ack_timeout" in done.stderr
    assert command("up", "--set", "ack_timeout", directory=directory).returncode == 2
    with pytest.raises(ConfigError):
        Lab.create(directory, options={"bogus": "1"})
    assert not directory.exists()
    with Lab.create(directory) as lab:
        assert command("kill", "three", directory=directory).returncode == 2
        with pytest.raises(UsageError, match="three"):
            lab.host("three")


def test_a_node_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with Lab.create(tmp_path / "lab") as lab:
        lab.one.config.write_text("volume = 1\n")
        with pytest.raises(MirrorfsError, match=r"(?s)node one has ended; the end of .*volume: "):
            lab.one.start()
