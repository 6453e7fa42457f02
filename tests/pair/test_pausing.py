"""Pausing the replication by hand and resuming it: what the application notices, what stays paused, what cannot come of it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrorfs.journal import Journal
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import Load, NewLines, mirrorfs, state, status, tree_differences, wait_state

pytestmark = pytest.mark.root

#: A resync under a load that never pauses takes minutes on a busy machine.
_LONG_S = 300


def _paused_on(host: Host) -> str | None:
    """The node that is alone by a pause, as this one's status says."""
    pause = status(host).get("paused")
    return None if pause is None else str(pause["node"])


def _pause(host: Host) -> str:
    done = mirrorfs(host, "pause", "--yes")
    assert done.returncode == 0, done.stderr
    assert "replication is paused by hand since" in done.stdout
    return done.stdout.strip()


def _resume(host: Host) -> None:
    done = mirrorfs(host, "resume")
    assert done.returncode == 0, done.stderr
    assert "replication goes on" in done.stdout


def _stays_apart(lab: Lab, for_s: float = 3.0) -> None:
    """Nobody lets the other in, however often they greet each other."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        assert state(lab.two) == "waiting"
        assert "two" not in status(lab.one)["in_sync"]
        time.sleep(0.1)


def _assert_refused(host: Host) -> str:
    """The node is not promoted, and says that there is a pause; returns what it says."""
    for options in ((), ("--yes",)):
        done = mirrorfs(host, "promote", *options)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "replication is paused by hand since" in done.stderr
        assert "one is alone" in done.stderr
        assert state(host) == "waiting"
    return done.stderr


def test_a_pause_under_load_is_not_noticed_and_resuming_makes_the_trees_equal(
    lab: Lab, start_load: Callable[..., Load]
) -> None:
    epoch = lab.one.status()["epoch"]
    load = start_load(lab.one.mount)
    load.wait_noted(200)
    _pause(lab.one)
    now = lab.one.status()
    assert (now["state"], now["in_sync"]) == ("solo", ["one"])
    assert now["epoch"] > epoch
    assert "replication is paused by hand" in now["reason"]
    assert "one is alone" in now["reason"]
    assert "mirrorfs resume" in now["reason"]
    assert now["paused"]["by"] == "hand"
    load.wait_noted(300)
    _stays_apart(lab)
    assert [_paused_on(host) for host in (lab.one, lab.two)] == ["one", "one"]
    lines = NewLines(lab.one)
    _resume(lab.one)
    lab.wait_mirrored()
    assert any("by what may differ" in line for line in lines()), "quick"
    load.wait_noted(50)
    assert load.stop() == [""] * len(load.notes)
    print(f"the longest stall of a writer was {load.longest_stall_s():.3f} s")
    assert [_paused_on(host) for host in (lab.one, lab.two)] == [None, None]
    assert load.missing(lab.two.backing) == []
    assert tree_differences(lab) == []


def test_what_was_acknowledged_before_the_pause_is_on_the_standby(lab: Lab, start_load: Callable[..., Load]) -> None:
    load = start_load(lab.one.mount)
    load.wait_noted(200)
    assert load.stop() == [""] * len(load.notes)
    _pause(lab.one)
    assert load.missing(lab.two.backing) == []


def test_being_alone_and_paused_is_durable_when_the_command_returns(lab: Lab) -> None:
    _pause(lab.one)
    lab.one.kill()
    lab.two.kill()
    one, two = Journal(lab.one.state_dir).load(), Journal(lab.two.state_dir).load()
    assert one.epoch is not None
    assert {member.node for member in one.epoch.in_sync} == {"one"}
    assert one.paused_at > 0
    assert two.epoch == one.epoch, "the standby knows that it is left behind"
    assert (two.standing.value, two.paused_at) == ("outdated", 0)


def test_the_pause_survives_a_restart_of_both_nodes(lab: Lab) -> None:
    _pause(lab.one)
    (lab.one.mount / "file").write_text("alone")
    for host in (lab.one, lab.two):
        host.kill()
    lab.one.start()
    assert "replication is paused by hand" in lab.one.status()["reason"]
    assert _paused_on(lab.one) == "one"
    lab.two.start()
    # Nobody has to be asked: two says itself that it is behind.
    wait_state(lab.one, "solo")
    wait_for(lambda: _paused_on(lab.two) == "one", "two hears of the pause")
    (lab.one.mount / "more").write_text("alone again")
    _stays_apart(lab)
    _assert_refused(lab.two)
    _resume(lab.one)
    lab.wait_mirrored()
    assert lab.primary() is lab.one
    assert (lab.two.mount / "more").read_text() == "alone again"
    assert tree_differences(lab) == []


def test_a_paused_node_that_was_restarted_while_the_other_is_away_serves_on_an_operators_word(lab: Lab) -> None:
    _pause(lab.one)
    lab.two.kill()
    lab.one.kill()
    lab.one.start()
    assert state(lab.one) == "waiting"
    assert mirrorfs(lab.one, "promote").returncode == 4
    assert mirrorfs(lab.one, "promote", "--yes").returncode == 0
    assert (state(lab.one), _paused_on(lab.one)) == ("solo", "one")
    lab.two.start()
    _stays_apart(lab)
    _resume(lab.one)
    lab.wait_mirrored()


def test_the_paused_standby_is_not_promoted_whether_the_primary_lives_or_not(lab: Lab) -> None:
    _pause(lab.one)
    _assert_refused(lab.two)
    lab.one.kill()
    _assert_refused(lab.two)
    lab.two.kill()
    lab.two.start()
    assert "outdated" in _assert_refused(lab.two)
    lab.one.start()
    wait_state(lab.one, "solo")
    (lab.one.mount / "file").write_text("served by one only")
    _resume(lab.one)
    lab.wait_mirrored()
    assert [status(host).get("split_brain") for host in (lab.one, lab.two)] == [None, None]
    assert tree_differences(lab) == []


def test_a_force_past_a_pause_is_found_to_be_a_split_brain_in_spite_of_it(lab: Lab) -> None:
    _pause(lab.one)
    (lab.one.mount / "file").write_text("on one only")
    lab.one.kill()
    assert mirrorfs(lab.two, "promote", "--force").returncode == 0
    lab.one.start()
    wait_for(lambda: "split_brain" in status(lab.one), "one finds the split brain")
    assert (lab.one.backing / "file").read_text() == "on one only"


def test_the_standby_can_ask_for_the_pause_and_for_its_end(lab: Lab, start_load: Callable[..., Load]) -> None:
    load = start_load(lab.one.mount)
    load.wait_noted(100)
    assert "one is alone" in _pause(lab.two)
    wait_state(lab.one, "solo")
    assert [_paused_on(host) for host in (lab.one, lab.two)] == ["one", "one"]
    load.wait_noted(100)
    _resume(lab.two)
    lab.wait_mirrored()
    assert load.stop() == [""] * len(load.notes)
    assert lab.primary() is lab.one
    assert tree_differences(lab) == []


def test_a_standby_that_cannot_reach_the_paused_node_says_where_to_resume(lab: Lab) -> None:
    _pause(lab.one)
    lab.one.kill()
    done = mirrorfs(lab.two, "resume")
    assert done.returncode == 1
    assert "one cannot be reached: run `mirrorfs resume` on it" in done.stderr


def test_a_pause_asks_first_and_is_nothing_where_nothing_goes_on(lab: Lab) -> None:
    done = mirrorfs(lab.one, "pause")
    assert done.returncode == 4
    assert "two cannot take over (--yes pauses)" in done.stderr
    assert lab.is_mirrored()
    assert "not paused" in mirrorfs(lab.one, "resume").stdout
    lab.one.kill()
    wait_state(lab.two, "waiting")
    assert mirrorfs(lab.two, "pause", "--yes").returncode == 1


def test_a_pause_does_not_freeze_where_the_loss_of_the_peer_would(
    make_lab: Callable[..., Lab], start_load: Callable[..., Load]
) -> None:
    lab = make_lab(on_peer_loss="freeze", freeze_timeout="1s")
    load = start_load(lab.one.mount)
    load.wait_noted(100)
    _pause(lab.one)
    lab.two.kill()
    load.wait_noted(200)
    assert state(lab.one) == "solo"
    lab.two.start()
    _resume(lab.one)
    lab.wait_mirrored()
    assert load.stop() == [""] * len(load.notes)
    assert tree_differences(lab) == []
    lab.two.kill()
    wait_state(lab.one, "waiting")
    done = mirrorfs(lab.one, "pause", "--yes")
    assert done.returncode == 1
    assert "frozen" in done.stderr, "a pause is no way around a freeze: the other node may have been promoted"


def test_a_standby_that_stands_still_does_not_hold_a_pause_up(lab: Lab, start_load: Callable[..., Load]) -> None:
    load = start_load(lab.one.mount, kinds=("append",))
    load.wait_noted(50)
    lab.two.run("kill", "-STOP", *map(str, lab.two.pids()), check=True)
    try:
        assert "has not confirmed" in _pause(lab.one)
        load.wait_noted(50)
    finally:
        lab.two.run("kill", "-CONT", *map(str, lab.two.pids()), check=True)
    wait_for(lambda: _paused_on(lab.two) == "one", "two hears of the pause")
    _stays_apart(lab)
    _resume(lab.one)
    lab.wait_mirrored()
    assert load.stop() == [""]
    assert tree_differences(lab) == []


def test_a_pause_ends_a_resync_that_is_under_way(lab: Lab, tmp_path: Path) -> None:
    lab.two.kill()
    with open(lab.one.mount / "large", "wb") as file:
        for _ in range(96):
            file.write(b"x" * (1 << 20))
    lab.two.start()
    wait_state(lab.two, "resyncing", "standby")
    _pause(lab.one)
    wait_for(lambda: _paused_on(lab.two) == "one", "two hears of the pause")
    _stays_apart(lab)
    _resume(lab.one)
    lab.wait_mirrored()
    assert tree_differences(lab) == []


def test_pausing_and_resuming_again_and_again_loses_nothing(lab: Lab, start_load: Callable[..., Load]) -> None:
    load, follows = start_load(lab.one.mount), ("resyncing", "standby")
    load.wait_noted(100, deadline_s=_LONG_S)
    for number in range(4):
        host = (lab.one, lab.two)[number % 2]
        _pause(host)
        load.wait_noted(30, deadline_s=_LONG_S)
        _resume(host)
        if number % 2:
            lab.wait_mirrored(_LONG_S)
        else:
            wait_for(lambda: _paused_on(lab.two) is None and state(lab.two) in follows, "two follows", _LONG_S)
    lab.wait_mirrored(_LONG_S)
    assert load.stop() == [""] * len(load.notes)
    assert load.missing(lab.two.backing) == []
    assert tree_differences(lab) == []
