"""Moving the role: what a switch-over keeps, what open files see after it, and what is refused or asked before it."""

import errno
import json
import mmap
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mirrorfs.errors import ConfirmationNeededError, RefusedError
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import (
    Load,
    NewLines,
    mirrorfs,
    state,
    status,
    tree_differences,
    wait_peer_lost,
    wait_state,
)

pytestmark = pytest.mark.root


def _switch_over(lab: Lab, to: Host) -> None:
    to.promote()
    lab.wait_mirrored()
    assert lab.primary() is to


def _fails(expected: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == expected, caught.value


# ---- clean switch-over


def test_a_switch_over_under_load_is_answered_and_loses_nothing(lab: Lab, start_load: Callable[..., Load]) -> None:
    epoch = lab.one.status()["epoch"]
    load = start_load(lab.one.mount)
    load.wait_noted(200)
    done = mirrorfs(lab.two, "promote")
    assert done.returncode == 0, done.stderr
    assert load.ended() == ["EROFS"] * len(load.notes), "writers on the old primary are told, none hangs"
    assert load.missing(lab.two.mount) == []
    lab.wait_mirrored()
    assert [state(lab.one), state(lab.two)] == ["standby", "primary"]
    assert lab.one.status()["epoch"] == lab.two.status()["epoch"] > epoch
    assert tree_differences(lab) == []


def test_the_role_can_be_given_away_by_the_primary(lab: Lab) -> None:
    assert mirrorfs(lab.one, "demote").returncode == 0
    lab.wait_mirrored()
    assert lab.primary() is lab.two
    (lab.two.mount / "file").write_text("from two")
    assert (lab.one.mount / "file").read_text() == "from two"


def test_the_standby_is_read_only_and_live(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("first")
    assert (lab.two.mount / "file").read_text() == "first"
    (lab.one.mount / "file").write_text("second, and longer")
    assert (lab.two.mount / "file").read_text() == "second, and longer"
    (lab.one.mount / "file").rename(lab.one.mount / "renamed")
    assert os.listdir(lab.two.mount) == ["renamed"]
    there = lab.two.mount / "renamed"
    for change in (
        lambda: there.write_text("x"),
        there.unlink,
        lambda: there.chmod(0o600),
        lambda: os.truncate(there, 0),
        lambda: os.utime(there),
        lambda: os.setxattr(there, "user.x", b"x"),
        lambda: there.rename(lab.two.mount / "other"),
        lambda: os.link(there, lab.two.mount / "other"),
        (lab.two.mount / "directory").mkdir,
        lambda: (lab.two.mount / "link").symlink_to("x"),
        (lab.two.mount / "new").touch,
    ):
        _fails(errno.EROFS, change)
    assert tree_differences(lab) == []


# ---- what is open stays open and sees the truth


def test_a_file_open_for_reading_on_the_standby_sees_what_is_written_after_promotion(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("before")
    with open(lab.two.mount / "file") as reader:
        assert reader.read() == "before"
        _switch_over(lab, lab.two)
        with open(lab.two.mount / "file", "r+") as writer:
            writer.write("after, and longer than before")
        assert os.fstat(reader.fileno()).st_size == len("after, and longer than before")
        assert os.pread(reader.fileno(), 100, 0) == b"after, and longer than before"


def test_a_file_open_for_reading_on_the_old_primary_sees_what_the_new_one_writes(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("before")
    with open(lab.one.mount / "file") as reader:
        assert reader.read() == "before"
        _switch_over(lab, lab.two)
        (lab.two.mount / "file").write_text("written through two")
        assert os.pread(reader.fileno(), 100, 0) == b"written through two"
        assert (lab.one.mount / "file").stat().st_size == len("written through two")


def test_a_directory_held_open_since_before_the_promotion_lists_the_truth(lab: Lab) -> None:
    (lab.one.mount / "directory").mkdir()
    (lab.one.mount / "directory" / "old").touch()
    held = {host.name: os.open(host.mount / "directory", os.O_RDONLY) for host in lab.hosts.values()}
    try:
        assert all(os.listdir(descriptor) == ["old"] for descriptor in held.values())
        _switch_over(lab, lab.two)
        (lab.two.mount / "directory" / "new").touch()
        (lab.two.mount / "directory" / "old").unlink()
        for name, descriptor in held.items():
            assert os.listdir(descriptor) == ["new"], name
            assert os.stat("new", dir_fd=descriptor).st_ino == (lab.two.mount / "directory" / "new").stat().st_ino
            _fails(errno.ENOENT, partial(os.stat, "old", dir_fd=descriptor))
    finally:
        for descriptor in held.values():
            os.close(descriptor)


def test_a_working_directory_on_the_standby_survives_the_promotion(lab: Lab) -> None:
    (lab.one.mount / "directory").mkdir()
    with subprocess.Popen(
        ["sh", "-c", "read go; echo hello > file && cat file"],
        cwd=lab.two.mount / "directory",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        _switch_over(lab, lab.two)
        assert shell.communicate("go\n", timeout=30)[0] == "hello\n"
    assert (lab.one.mount / "directory" / "file").read_text() == "hello\n"


def test_a_shared_mapping_made_on_the_standby_sees_the_truth_after_promotion(lab: Lab) -> None:
    path = lab.two.mount / "file"
    (lab.one.mount / "file").write_bytes(b"a" * 8192)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(descriptor, 8192, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            assert mapping[0] == mapping[5000] == ord("a")
            with open(lab.one.mount / "file", "r+b") as writer:
                writer.write(b"b" * 8192)
            _switch_over(lab, lab.two)
            assert mapping[:] == b"b" * 8192, "what the old primary wrote after the page was first read"
            with open(path, "r+b") as writer:
                writer.write(b"c" * 4096)
            assert mapping[:] == b"c" * 4096 + b"b" * 4096, "what the new primary writes"
    finally:
        os.close(descriptor)


def test_a_shared_mapping_can_be_written_on_the_new_primary_and_reaches_both(lab: Lab) -> None:
    (lab.one.mount / "file").write_bytes(b"a" * 4096)
    assert (lab.two.mount / "file").read_bytes() == b"a" * 4096
    _switch_over(lab, lab.two)
    with open(lab.two.mount / "file", "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
        mapping[10:13] = b"new"
        mapping.flush()
    for host in lab.hosts.values():
        assert (host.backing / "file").read_bytes() == b"a" * 10 + b"new" + b"a" * 4083, host.name


def test_appending_after_promotion_appends_at_the_true_end(lab: Lab) -> None:
    def append(host: Host, text: str) -> None:
        with open(host.mount / "log", "a") as file:
            file.write(text)

    append(lab.one, "1")
    assert (lab.two.mount / "log").read_text() == "1", "the standby's kernel knows the file, one byte long"
    append(lab.one, "2")
    _switch_over(lab, lab.two)
    append(lab.two, "3")
    append(lab.two, "4")
    _switch_over(lab, lab.one)
    append(lab.one, "5")
    _switch_over(lab, lab.two)
    append(lab.two, "6")
    for host in lab.hosts.values():
        assert (host.mount / "log").read_text() == "123456", host.name
    assert tree_differences(lab) == []


# ---- handles of an earlier reign


def test_a_write_handle_of_an_earlier_reign_is_refused_and_changes_nothing(lab: Lab) -> None:
    path = lab.one.mount / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, b"one")
        _switch_over(lab, lab.two)

        def everything_is_refused() -> None:
            _fails(errno.EROFS, lambda: os.write(descriptor, b"late"))
            _fails(errno.EROFS, lambda: os.fsync(descriptor))
            _fails(errno.EROFS, lambda: os.ftruncate(descriptor, 0))

        everything_is_refused()
        with open(lab.two.mount / "file", "a") as file:
            file.write(" and two")
        _switch_over(lab, lab.one)
        everything_is_refused()
        assert os.pread(descriptor, 100, 0) == b"one and two", "it can still be read"
        with open(path, "a") as file:
            file.write(" and one again")
    finally:
        os.close(descriptor)
    for host in lab.hosts.values():
        assert (host.backing / "file").read_text() == "one and two and one again", host.name


def test_a_writable_mapping_of_an_earlier_reign_changes_neither_disk(lab: Lab) -> None:
    path = lab.one.mount / "file"
    path.write_bytes(b"a" * 4096)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
        mapping[:4] = b"mine"
        mapping.flush()
        _switch_over(lab, lab.two)
        mapping[:4] = b"late"
        with pytest.raises(OSError):
            mapping.flush()
    for host in lab.hosts.values():
        assert (host.backing / "file").read_bytes() == b"mine" + b"a" * 4092, host.name


# ---- what is refused, what is asked


def test_promote_on_the_primary_says_so(lab: Lab) -> None:
    epoch = lab.one.status()["epoch"]
    done = mirrorfs(lab.one, "promote")
    assert done.returncode == 0
    assert "already" in done.stdout + done.stderr
    assert lab.one.status()["epoch"] == epoch


def test_with_a_dead_peer_promote_asks_first(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("acknowledged")
    lab.one.kill()
    wait_peer_lost(lab.two)
    asked = mirrorfs(lab.two, "promote")
    assert asked.returncode == 4
    assert "one cannot be reached" in asked.stderr
    assert "--yes" in asked.stderr
    assert state(lab.two) == "waiting"
    _fails(errno.EROFS, lambda: (lab.two.mount / "file").write_text("x"))
    assert mirrorfs(lab.two, "promote", "--yes").returncode == 0
    assert state(lab.two) == "solo"
    assert (lab.two.mount / "file").read_text() == "acknowledged"
    (lab.two.mount / "file").write_text("goes on")


def _slow_cable(lab: Lab) -> None:
    shape = ["tbf", "rate", "16mbit", "burst", "64k", "latency", "500ms"]
    for host in lab.hosts.values():
        host.run("tc", "qdisc", "add", "dev", "eth0", "root", *shape, check=True)


@pytest.fixture
def resyncing(lab: Lab) -> Lab:
    """A pair whose node two is in the middle of a copy that takes a minute."""
    lab.two.kill()
    wait_state(lab.one, "solo")
    (lab.one.mount / "large").write_bytes(os.urandom(96 << 20))
    _slow_cable(lab)
    lab.two.start()
    wait_for(lambda: status(lab.one).get("resync", {}).get("bytes_done", 0) > 0, "a copy is under way")
    return lab


def test_a_node_that_is_being_resynced_refuses_to_be_promoted(resyncing: Lab) -> None:
    lab = resyncing
    assert state(lab.two) == "resyncing"
    assert "two" not in lab.one.status()["in_sync"]
    assert "two" not in lab.two.status()["in_sync"]
    refused = mirrorfs(lab.two, "promote", "--yes")
    assert refused.returncode == 3
    assert "resync" in refused.stderr
    assert [state(lab.one), state(lab.two)] == ["solo", "resyncing"]
    assert lab.one.status()["dirty_bytes"] > 0


def test_a_node_knows_that_its_copy_is_incomplete_when_the_source_dies_and_across_a_restart(resyncing: Lab) -> None:
    lab = resyncing
    lab.one.kill()
    wait_state(lab.two, "waiting")
    for _ in range(2):
        refused = mirrorfs(lab.two, "promote", "--yes")
        assert refused.returncode == 3
        assert "resyncing" in refused.stderr
        assert "--force" in refused.stderr
        lab.two.kill()
        lab.two.start()
    assert mirrorfs(lab.two, "promote", "--force").returncode == 0
    assert state(lab.two) == "solo"


def test_the_primary_works_while_a_node_is_being_resynced(resyncing: Lab, start_load: Callable[..., Load]) -> None:
    lab = resyncing
    load = start_load(lab.one.mount)
    load.wait_noted(100)
    assert state(lab.two) == "resyncing"
    assert load.stop() == [""] * len(load.notes)
    assert load.missing(lab.one.backing) == []


def test_a_node_that_knows_itself_behind_refuses_to_be_promoted_and_says_why(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("first")
    (lab.two.backing / "file").unlink()
    lines = NewLines(lab.two)
    (lab.one.mount / "file").rename(lab.one.mount / "renamed")
    lines.wait(lambda line: "out of sync" in line, "two found out")
    lab.one.kill()
    wait_peer_lost(lab.two)
    refused = mirrorfs(lab.two, "promote", "--yes")
    assert refused.returncode == 3, (refused.stdout, state(lab.two))
    assert "since" in refused.stderr
    assert state(lab.two) == "waiting"


def test_demote_with_no_standby_in_sync_is_refused_without_force(lab: Lab) -> None:
    lab.two.kill()
    wait_state(lab.one, "solo")
    refused = mirrorfs(lab.one, "demote")
    assert refused.returncode == 3
    assert "--force" in refused.stderr
    assert state(lab.one) == "solo"
    assert mirrorfs(lab.one, "demote", "--force").returncode == 0
    assert state(lab.one) == "waiting"
    _fails(errno.EROFS, (lab.one.mount / "file").touch)
    with pytest.raises(ConfirmationNeededError):
        lab.one.promote()
    lab.one.promote(yes=True)
    (lab.one.mount / "file").touch()


# ---- two histories


def _divided(lab: Lab, *, one_writes: bool) -> None:
    """Node one goes on alone behind a cut cable while two is promoted and writes; then the cable is mended."""
    (lab.one.mount / "file").write_text("before")
    wait_for(lambda: bool(status(lab.one).get("settled")), "modification times are settled")
    lab.cut()
    wait_state(lab.one, "solo")
    if one_writes:
        (lab.one.mount / "file").write_text("one, alone")
        (lab.one.mount / "of-one").touch()
    wait_peer_lost(lab.two)
    lab.two.promote(yes=True)
    (lab.two.mount / "file").write_text("two, promoted")
    (lab.two.mount / "of-two").touch()
    lab.heal()


def _contents(tree: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(tree.iterdir())}


def test_two_nodes_that_both_wrote_alone_are_a_split_brain_that_both_tell_and_nobody_merges(lab: Lab) -> None:
    _divided(lab, one_writes=True)
    wait_for(lambda: all("split_brain" in status(host) for host in lab.hosts.values()), "both nodes tell the split brain")
    wait_state(lab.one, "waiting")
    for host in lab.hosts.values():
        assert "split brain" in host.status()["reason"], host.name
        assert "split brain" in mirrorfs(host, "status").stdout, host.name
    assert state(lab.two) == "solo", "the promoted one goes on"
    _fails(errno.EROFS, lambda: (lab.one.mount / "file").write_text("x"))
    (lab.two.mount / "more-of-two").touch()
    assert _contents(lab.one.backing) == {"file": "one, alone", "of-one": ""}
    assert _contents(lab.two.backing) == {"file": "two, promoted", "of-two": "", "more-of-two": ""}
    assert _contents(lab.one.mount) == _contents(lab.one.backing), "the losing side can still be read"


def test_a_split_brain_is_known_after_both_nodes_were_restarted(lab: Lab) -> None:
    _divided(lab, one_writes=True)
    wait_for(lambda: all("split_brain" in status(host) for host in lab.hosts.values()), "both nodes tell the split brain")
    for host in lab.hosts.values():
        host.kill()
    for host in lab.hosts.values():
        host.start()
    wait_for(lambda: all("split_brain" in status(host) for host in lab.hosts.values()), "both nodes tell it again")
    for host in lab.hosts.values():
        assert state(host) == "waiting"
        with pytest.raises((ConfirmationNeededError, RefusedError)):
            host.promote()
    assert _contents(lab.one.backing) == {"file": "one, alone", "of-one": ""}
    assert _contents(lab.two.backing) == {"file": "two, promoted", "of-two": ""}


def test_an_old_primary_that_was_killed_after_it_wrote_alone_is_a_split_brain_too(lab: Lab) -> None:
    lab.two.kill()
    wait_state(lab.one, "solo")
    (lab.one.mount / "file").write_text("one, alone")
    lab.one.kill()
    lab.two.start()
    assert mirrorfs(lab.two, "promote").returncode == 4
    lab.two.promote(yes=True)
    (lab.two.mount / "file").write_text("two, promoted")
    lab.one.start()
    wait_for(lambda: all("split_brain" in status(host) for host in lab.hosts.values()), "both nodes tell the split brain")
    assert [state(lab.one), state(lab.two)] == ["waiting", "solo"]
    assert (lab.one.backing / "file").read_text() == "one, alone"
    assert (lab.two.backing / "file").read_text() == "two, promoted"


def test_an_old_primary_that_wrote_nothing_alone_follows_the_promoted_one(lab: Lab) -> None:
    _divided(lab, one_writes=False)
    lab.wait_mirrored()
    assert lab.primary() is lab.two
    assert _contents(lab.one.mount) == {"file": "two, promoted", "of-two": ""}
    assert tree_differences(lab) == []


# ---- what it would do


def _preview(host: Host, *arguments: str) -> dict[str, Any]:
    done = mirrorfs(host, "promote", "--dry-run", "--json", *arguments)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == found["exit_status"], done.stderr
    return found


def test_a_preview_of_a_switch_over_tells_what_is_open_on_the_primary(lab: Lab) -> None:
    with open(lab.one.mount / "written", "w") as file, open(lab.one.mount / "written"):
        file.write("x")
        file.flush()
        epoch = lab.one.status()["epoch"]
        found = _preview(lab.two)
        assert (found["does"], found["against"], found["missing"], found["exit_status"]) == ("switch-over", "", "", 0)
        assert found["open"] == {"node": "one", "files": 2, "writing": 1, "paths": ["/written"]}
        assert 0 < found["role_s"] < 60
        words = mirrorfs(lab.two, "promote", "--dry-run").stdout
        assert "nothing that was acknowledged" in words
        assert "/written" in words
    assert _preview(lab.one)["does"] == "nothing"
    assert [state(lab.one), state(lab.two), lab.one.status()["epoch"]] == ["primary", "standby", epoch], "nothing was done"


def test_a_preview_tells_what_could_be_missing_after_a_loss(lab: Lab) -> None:
    lab.one.kill()
    wait_peer_lost(lab.two)
    found = _preview(lab.two)
    assert (found["does"], found["exit_status"], found["open"]) == ("promotion", ConfirmationNeededError.exit_status, None)
    assert "cannot be reached since" in found["missing"]
    assert "--yes" in found["against"]
    assert (_preview(lab.two, "--yes")["against"], state(lab.two)) == ("", "waiting")
    found = _preview(lab.two, "--automatic")
    assert found["exit_status"] == RefusedError.exit_status
    assert "there is no arbiter and allow_unarbitrated is not set: an operator has to promote" in found["against"]
