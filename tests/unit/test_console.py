"""The parts of the console that need no node: sentences, events, latencies, users, sessions, tries, lines on disk."""

import stat
from pathlib import Path
from typing import Any

import pytest

from mirrorfs.console.certificate import own_certificate
from mirrorfs.console.gate import IDLE_S, LONGEST_S, Sessions, Throttle, who_is_throttled
from mirrorfs.console.lines import Lines
from mirrorfs.console.picture import Seen, changes, picture, protection
from mirrorfs.console.roles import Role
from mirrorfs.console.users import Users
from mirrorfs.core.histogram import BOUNDS_S
from mirrorfs.errors import MirrorfsError, UsageError


def counts(**milliseconds: int) -> list[int]:
    """So many in the bucket that ends with 1 ms, and in that which ends with 100 ms."""
    found = [0] * (len(BOUNDS_S) + 1)
    found[BOUNDS_S.index(0.001)], found[BOUNDS_S.index(0.1)] = milliseconds.get("short", 0), milliseconds.get("long", 0)
    return found


def seen(
    state: str | None,
    peer: str = "standby",
    *,
    at: float = 0.0,
    heard: bool = True,
    measures: dict[str, Any] | None = None,
    controller: dict[str, Any] | None = None,
    **more: Any,
) -> Seen:
    status = None
    if state is not None:
        status = {
            "volume": "lab",
            "node": "one",
            "state": state,
            "since": "noon",
            "reason": "because",
            "frozen": False,
            "epoch": 3,
            "primary": "one",
            "in_sync": ["one", "two"],
            "peer": {"name": "two", "state": peer},
            "dirty_bytes": 0,
            **more,
        }
    said: dict[str, Any] = {
        "posture": "serving",
        "because": "all are up",
        "services": "up",
        "addresses": "up",
        "trouble": "",
        "maintenance": False,
        "networks": {},
        "peer": {"heard": heard, "posture": "idle", "mount": "standby"},
    } | (controller or {})
    return Seen(at, "one", "two", "stopped" if state is None else "answers", status, said, measures)


def measures(changes: int, counts: list[int], *, syncs: int = 0, written: int = 0) -> dict[str, Any]:
    histogram = {"counts": counts, "sum_s": 0.0}
    parts = dict.fromkeys(("total", "local", "wire", "peer"), histogram)
    return {
        "bytes_written": written,
        "changes": changes,
        "syncs": syncs,
        "bounds_s": list(BOUNDS_S),
        "latency": {"change": parts, "sync": parts},
    }


@pytest.mark.parametrize(
    ("moment", "level", "words"),
    [
        (seen("primary"), "good", "on both nodes"),
        (seen("standby", "primary"), "good", "on both nodes"),
        (seen("solo", "disconnected"), "bad", "on one only since noon: because"),
        (seen("solo", "disconnected", since="2026-11-28T13:04:50+0000", at=1795871100), "bad", "since 13:04:50: because"),
        (seen("solo", "disconnected", since="2026-11-27T13:04:50+0000", at=1795871100), "bad", "since 2026-11-27 13:04:50"),
        (seen("solo", "resyncing"), "warning", "two is being brought up to date"),
        (seen("resyncing", "primary"), "warning", "one is being brought up to date"),
        (seen("waiting", "disconnected", frozen=True), "bad", "Writes wait on one"),
        (seen("waiting", "disconnected", heard=False), "bad", "Nobody serves"),
        (seen("solo", "disconnected", split_brain="both"), "bad", "Split brain"),
        (seen("solo", "disconnected", paused={"by": "one", "since": "noon", "node": "one"}), "warning", "one disk only"),
        (seen(None, heard=False), "bad", "not mounted on one, and from here nobody"),
        (seen(None, controller={"peer": {"heard": True, "posture": "serving", "mount": "leading"}}), "bad", "on two only"),
    ],
)
def test_one_sentence_says_what_protects_the_data(moment: Seen, level: str, words: str) -> None:
    found, sentence = protection(moment)
    assert found == level
    assert words in sentence
    assert sentence.endswith(".")


def test_a_switch_over_is_offered_only_where_it_can_be() -> None:
    assert picture(seen("primary"))["can_switch_over"]
    assert picture(seen("standby", "primary"))["can_switch_over"]
    assert not picture(seen("primary", heard=False))["can_switch_over"]
    assert not picture(seen("primary", "resyncing"))["can_switch_over"]
    assert not picture(seen(None))["can_switch_over"]


def test_latencies_are_those_of_the_last_minute() -> None:
    slow = seen("primary", at=0.0, measures=measures(100, counts(long=100)))
    quick = [seen("primary", at=70.0 + i, measures=measures(100 + i, counts(short=i, long=100))) for i in range(10)]
    found = picture(quick[-1], [slow, *quick[:-1]])["latency"]["change"]
    assert 0.0007 <= found["total"]["p50_s"] <= found["total"]["p99_s"] <= 0.001
    assert found["count"] == 9


def test_the_rate_does_not_fall_below_zero_when_the_mount_is_started_anew() -> None:
    before = [seen("primary", at=float(i), measures=measures(50 + i, counts(), written=1000 * i)) for i in range(3)]
    after = seen("primary", at=3.0, measures=measures(1, counts(), written=10))
    assert picture(after, before)["write_bytes_per_s"] is None
    assert picture(before[-1], before[:-1])["write_bytes_per_s"] == 1000


def test_nothing_measured_is_not_zero() -> None:
    found = picture(seen(None))
    assert found["write_bytes_per_s"] is None
    assert found["latency"]["sync"]["peer"] == {"p50_s": None, "p99_s": None}


def texts(before: Seen | None, now: Seen) -> list[str]:
    return [event["text"] for event in changes(before, now)]


def test_what_stays_the_same_is_no_event() -> None:
    assert texts(seen("primary"), seen("primary", at=1.0)) == []


def test_events_tell_what_has_changed() -> None:
    assert "one: primary → solo: because" in texts(seen("primary"), seen("solo", "disconnected"))
    assert "two: standby → lost" in texts(seen("primary"), seen("primary", "disconnected", heard=False))
    assert "epoch 4 of two, in sync: two" in texts(seen("primary"), seen("primary", epoch=4, primary="two", in_sync=["two"]))
    assert "split brain: both" in texts(seen("primary"), seen("primary", split_brain="both"))
    assert "the split brain is resolved" in texts(seen("primary", split_brain="both"), seen("primary"))
    assert any("maintenance" in text for text in texts(seen("primary"), seen("primary", controller={"maintenance": True})))


# ---- users


def test_only_the_right_password_gives_the_role(tmp_path: Path) -> None:
    users = Users(tmp_path)
    users.add("otto", "correct horse", Role.OPERATE)
    assert users.check("otto", "correct horse") is Role.OPERATE
    assert users.check("otto", "correct horsf") is None
    assert users.check("nobody", "correct horse") is None


def test_the_file_of_users_is_for_root_only_and_has_no_password(tmp_path: Path) -> None:
    users = Users(tmp_path / "keys")
    users.add("otto", "correct horse", Role.VIEW)
    token = users.add_token("prometheus", Role.VIEW)
    assert stat.S_IMODE(users.file.stat().st_mode) == 0o600
    assert "correct horse" not in users.file.read_text()
    assert token not in users.file.read_text()
    assert users.of_token(token) == ("prometheus", Role.VIEW)
    assert users.of_token("another") is None


def test_a_removal_by_another_process_counts(tmp_path: Path) -> None:
    served, told = Users(tmp_path), Users(tmp_path)
    told.add("otto", "correct horse", Role.VIEW)
    served.refresh()
    proof = served.proof_of("otto")
    assert served.role_of("otto", proof) is Role.VIEW
    told.remove("otto")
    served.refresh()
    assert served.role_of("otto", proof) is None
    with pytest.raises(UsageError, match="no such user"):
        told.remove("otto")


def test_a_new_password_ends_what_began_with_the_old_one(tmp_path: Path) -> None:
    users = Users(tmp_path)
    users.add("otto", "correct horse", Role.VIEW)
    proof = users.proof_of("otto")
    users.add("otto", "another horse", Role.OPERATE)
    assert users.role_of("otto", proof) is None
    assert users.role_of("otto", users.proof_of("otto")) is Role.OPERATE


@pytest.mark.parametrize(
    ("name", "password"), [("otto", "short"), ("", "long enough"), ("a b", "long enough"), ("otto", "x" * 2000)]
)
def test_names_and_passwords_that_will_not_do_are_refused(tmp_path: Path, name: str, password: str) -> None:
    with pytest.raises(UsageError):
        Users(tmp_path).add(name, password, Role.VIEW)


@pytest.mark.parametrize("content", ["", "[]", '{"users": {"otto": {}}, "tokens": {}}', '{"users": {}}'])
def test_a_damaged_file_lets_nobody_in(tmp_path: Path, content: str) -> None:
    users = Users(tmp_path)
    users.file.write_text(content)
    with pytest.raises(MirrorfsError, match="cannot be read"):
        users.refresh()
    assert users.check("otto", "correct horse") is None


# ---- sessions and tries


def test_a_session_ends_when_nobody_uses_it_and_after_half_a_day_in_any_case() -> None:
    sessions = Sessions()
    idle = sessions.begin("otto", "", 0.0)
    assert sessions.find(idle.token, IDLE_S - 1) is idle
    assert sessions.find(idle.token, 2 * IDLE_S) is None
    busy = sessions.begin("otto", "", 0.0)
    now = 0.0
    while now < LONGEST_S:
        assert sessions.find(busy.token, now) is busy
        now += IDLE_S / 2
    assert sessions.find(busy.token, LONGEST_S + 1) is None


def test_watching_does_not_keep_a_session_alive() -> None:
    sessions = Sessions()
    session = sessions.begin("otto", "", 0.0)
    for now in range(0, int(IDLE_S), 60):
        assert sessions.find(session.token, float(now), touch=False) is session
    assert sessions.find(session.token, IDLE_S + 1, touch=False) is None


def test_each_failure_doubles_the_wait_of_that_address_only() -> None:
    throttle = Throttle()
    for _ in range(4):
        throttle.failed("a", 0.0)
        assert throttle.wait_s("a", 0.0) == 0
    waits = []
    for _ in range(14):
        throttle.failed("a", 0.0)
        waits.append(throttle.wait_s("a", 0.0))
    assert waits[:4] == [1, 2, 4, 8]
    assert max(waits) == 900
    assert throttle.wait_s("b", 0.0) == 0
    throttle.succeeded("a", 0.0)
    assert throttle.wait_s("a", 0.0) == 0


def test_ones_own_login_does_not_buy_more_guesses_of_anothers() -> None:
    throttle, now, guesses = Throttle(), 0.0, 0
    while now < 600:
        if throttle.wait_s("a", now) == 0:
            throttle.failed("a", now)
            guesses += 1
            if guesses % 4 == 0:
                throttle.failed("a", now)
                throttle.succeeded("a", now)
        now += 0.1
    assert guesses < 20


def test_a_network_of_ipv6_is_one_who_tries() -> None:
    assert who_is_throttled("2001:db8::1") == who_is_throttled("2001:db8::ffff:1") != who_is_throttled("2001:db8:0:1::1")
    assert who_is_throttled("10.0.0.1") != who_is_throttled("10.0.0.2")


def test_a_session_is_not_guessed_from_another() -> None:
    sessions = Sessions()
    made = [sessions.begin("otto", "", 0.0) for _ in range(50)]
    assert len({each.token for each in made} | {each.csrf for each in made}) == 100


# ---- lines on disk


def test_lines_come_back_also_after_they_were_too_many(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "events.jsonl")
    for number in range(30):
        lines.add({"number": number, "text": "x" * 40_000})
    assert [entry["number"] for entry in lines.last(15)] == list(range(15, 30))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_200_000
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_what_a_stranger_says_is_one_line_and_comes_back(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "refused.jsonl")
    for text in ("a\u2028b", "a\u0085{}\u0085b", "\ud800", "a\nb"):
        lines.add({"user": text})
    assert [entry["user"] for entry in lines.last(10)] == ["a\u2028b", "a\u0085{}\u0085b", "\ud800", "a\nb"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "events.jsonl")
    lines.add({"number": 1})
    with lines.file.open("a") as file:
        file.write('{"number": 2')
    assert lines.last(10) == [{"number": 1}]


def test_a_disk_that_takes_nothing_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(tmp_path / "events.jsonl")
    lines.file.mkdir()
    for _ in range(3):
        lines.add({"number": 1})
    assert len(caplog.records) == 1


# ---- the certificate


def test_the_certificate_is_made_once_and_anew_for_another_address(tmp_path: Path) -> None:
    file = own_certificate(tmp_path / "console.pem", "127.0.0.1")
    first = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert own_certificate(file, "127.0.0.1").read_bytes() == first
    assert own_certificate(file, "10.0.0.1").read_bytes() != first
