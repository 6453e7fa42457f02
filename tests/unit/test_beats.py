"""Beats of the controllers: what is authentic, and what counts as having heard the other one, whatever is sent again."""

import math
import os
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mirrorfs.core import beats
from mirrorfs.core.beats import Beat, BeatError, Echo, Hearing, Verdict

KEY = b"k" * 32
OTHER = b"o" * 32
FRESH, COPY, GREETING, STALE = Verdict.FRESH, Verdict.COPY, Verdict.GREETING, Verdict.STALE

_SESSIONS = st.binary(min_size=8, max_size=8)
_COUNTS = st.integers(0, (1 << 63) - 1)
_PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
    | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
BEATS = st.builds(
    Beat,
    volume=st.just("v"),
    sender=st.just("one"),
    session=_SESSIONS,
    taken_up=_COUNTS,
    sequence=st.integers(1, (1 << 63) - 1),
    echoes=st.lists(st.builds(Echo, _SESSIONS, _COUNTS), max_size=beats.MAX_CANDIDATES + 1).map(tuple),
    network=st.integers(0, beats.MAX_NETWORKS - 1),
    content=st.dictionaries(st.text(max_size=5), _PLAIN, max_size=3),
)
BEAT = Beat("v", "one", b"session1", 0, 1, (Echo(b"session2", 3),), 0, {"state": "primary", "since": 1.5})


def encoded(beat: Beat, key: bytes = KEY) -> bytes:
    return beats.encode(beat, key, os.urandom(beats.NONCE_BYTES))


def decoded(datagram: bytes, key: bytes = KEY, volume: str = "v", sender: str = "one") -> Beat:
    return beats.decode(datagram, key, volume=volume, sender=sender)


def refusal(datagram: bytes, **wanted: Any) -> str:
    with pytest.raises(BeatError) as caught:
        decoded(datagram, **wanted)
    return str(caught.value)


def signed(body: bytes, version: int = beats.VERSION) -> bytes:
    """A datagram with any body, by somebody who has the key."""
    head, nonce = beats.MAGIC + version.to_bytes(2, "little"), os.urandom(beats.NONCE_BYTES)
    return head + nonce + ChaCha20Poly1305(KEY).encrypt(nonce, body, head)


# ---- bytes


@given(beat=BEATS)
def test_a_beat_comes_through_whole(beat: Beat) -> None:
    assert decoded(encoded(beat, KEY)) == beat


@given(data=st.data())
def test_a_datagram_that_was_changed_anywhere_is_refused(data: st.DataObject) -> None:
    datagram = bytearray(encoded(BEAT, KEY))
    place = data.draw(st.integers(0, len(datagram) - 1))
    datagram[place] ^= data.draw(st.integers(1, 255))
    said = refusal(bytes(datagram))
    assert said.startswith(
        ("not a heartbeat of a mirrorfs controller", "damaged, or made with another key", "a heartbeat of version")
    )


def test_what_is_said_can_be_read_by_nobody_else() -> None:
    assert b"primary" not in encoded(BEAT)
    assert encoded(BEAT) != encoded(BEAT)


@given(noise=st.binary(max_size=1300) | st.binary(max_size=200).map(lambda rest: beats.MAGIC + rest))
def test_noise_is_refused(noise: bytes) -> None:
    refusal(noise)


@given(body=st.binary(max_size=200) | _PLAIN.map(msgpack.packb) | st.lists(_PLAIN, min_size=8, max_size=8).map(msgpack.packb))
def test_a_body_that_makes_no_sense_is_refused_even_with_the_right_key(body: bytes) -> None:
    refusal(signed(body))


def test_a_truncated_datagram_is_refused_at_every_length() -> None:
    datagram = encoded(BEAT, KEY)
    for length in range(len(datagram)):
        refusal(datagram[:length])
    refusal(datagram + b"\0")


@pytest.mark.parametrize(
    ("datagram", "wanted", "expected"),
    [
        (
            encoded(BEAT, OTHER),
            {},
            "damaged, or made with another key: have the two nodes joined each other?",
        ),
        (
            signed(b"anything", 3),
            {},
            "a heartbeat of version 3, this is version 2: install the same on both nodes",
        ),
        (
            encoded(BEAT, KEY),
            {"volume": "w"},
            "a heartbeat of the volume 'v', this is 'w': give each volume its own port and key",
        ),
        (
            encoded(BEAT, KEY),
            {"sender": "two"},
            "a heartbeat of the node 'one', the other node is 'two'",
        ),
        (
            encoded(replace(BEAT, sender="one\nnothing happened"), KEY),
            {},
            r"a heartbeat of the node 'one\nnothing happened', the other node is 'one'",
        ),
        (signed(b"\xc1"), {}, "a heartbeat that cannot be read, though its key is right"),
        (b"GET / HTTP/1.1\r\n", {}, "not a heartbeat of a mirrorfs controller"),
        (b"", {}, "not a heartbeat of a mirrorfs controller"),
    ],
    ids=["other key", "version", "volume", "sender", "name of two lines", "unreadable", "http", "nothing"],
)
def test_what_is_wrong_with_a_datagram_is_told_in_one_line(datagram: bytes, wanted: dict[str, Any], expected: str) -> None:
    assert refusal(datagram, **wanted) == expected


_FIELDS = ["v", "one", b"session1", 0, 1, [[b"session2", 3]], 0, {}]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (2, b"short"),
        (3, -1),
        (3, 1 << 63),
        (4, 0),
        (4, 1 << 63),
        (5, [[b"session2"]]),
        (5, [[b"short", 3]]),
        (5, [[b"session2", -3]]),
        (5, [[b"session2", 3]] * (beats.MAX_CANDIDATES + 2)),
        (6, -1),
        (6, beats.MAX_NETWORKS),
        (7, []),
        (7, {b"state": 1}),
        (7, {"state": msgpack.Timestamp(1)}),
        (7, {"state": msgpack.ExtType(5, b"")}),
        (7, {"state": math.inf}),
    ],
)
def test_a_field_that_is_out_of_bounds_is_refused(place: int, value: Any) -> None:
    decoded(signed(msgpack.packb(_FIELDS)))
    refusal(signed(msgpack.packb([*_FIELDS[:place], value, *_FIELDS[place + 1 :]])))


def test_nesting_without_end_is_refused() -> None:
    for opening in (b"\x91", b"\x81\xa1k"):
        refusal(signed(opening * 550))


def test_a_datagram_has_1200_bytes_at_most() -> None:
    room = 1200 - len(encoded(replace(BEAT, content={"t": "x" * 300}), KEY)) + 300
    longest = encoded(replace(BEAT, content={"t": "x" * room}), KEY)
    assert len(longest) == 1200
    decoded(longest)
    assert refusal(signed(msgpack.packb([*_FIELDS[:-1], {"t": "x" * 1200}]))) == "not a heartbeat of a mirrorfs controller"
    with pytest.raises(BeatError) as caught:
        encoded(replace(BEAT, content={"t": "x" * (room + 1)}), KEY)
    assert str(caught.value) == "what the controller wants to say is too long: 1201 bytes in a datagram of 1200 at most"


def test_content_within_its_bound_fits_into_any_beat() -> None:
    most = (1 << 63) - 1
    echoes = tuple(Echo(b"session2", most) for _ in range(beats.MAX_CANDIDATES + 1))
    content = {"t": "x" * (beats.MAX_CONTENT_BYTES - 6)}
    assert len(msgpack.packb(content)) == beats.MAX_CONTENT_BYTES
    beat = Beat("v" * 32, "n" * 63, b"session1", most, most, echoes, beats.MAX_NETWORKS - 1, content)
    assert decoded(encoded(beat, KEY), volume="v" * 32, sender="n" * 63) == beat


@pytest.mark.parametrize("value", [..., {1: 2}, math.nan, 1 << 64, (1, 2), {"a": {2}}, "\udcff", [[[[[[[[[1]]]]]]]]]], ids=repr)
def test_what_is_not_plain_is_not_sent(value: Any) -> None:
    with pytest.raises(BeatError):
        encoded(replace(BEAT, content={"t": value}), KEY)


# ---- hearing, told as stories


class Controller:
    """One process of a controller, as the tests know it."""

    _sessions = count(1)

    def __init__(self, name: str = "two") -> None:
        self.name = name
        self.session = next(self._sessions).to_bytes(8, "big")
        self.hearing = Hearing(self.session)
        self.sequence = 0

    def beat(self, network: int = 0, *, again: bool = False) -> Beat:
        """The next beat, or the last one once more over another network."""
        self.sequence += not again
        hearing = self.hearing
        return Beat("v", self.name, self.session, hearing.taken_up, self.sequence, hearing.echoes, network, {})

    def hears(self, beat: Beat, now: float = 0.0) -> Verdict:
        return self.hearing.step(beat, now)


def meet(one: Controller, two: Controller) -> None:
    two.hears(one.beat())
    assert one.hears(two.beat()) is FRESH
    assert two.hears(one.beat()) is FRESH


@pytest.fixture
def one() -> Controller:
    return Controller("one")


@pytest.fixture
def two() -> Controller:
    return Controller("two")


def test_two_that_have_never_met_hear_each_other_after_one_exchange(one: Controller, two: Controller) -> None:
    assert two.hears(one.beat()) is GREETING
    assert two.hearing.silent_for(9) == math.inf
    assert not two.hearing.heard_ever
    assert one.hears(two.beat()) is FRESH
    assert two.hears(one.beat()) is FRESH
    assert two.hearing.heard_ever
    assert two.hears(one.beat()) is FRESH


def test_without_an_answer_a_beat_never_counts(one: Controller, two: Controller) -> None:
    for _ in range(100):
        assert two.hears(one.beat()) is GREETING
    assert two.hearing.silent_for(9) == math.inf
    assert two.hearing.networks(9, 3) == frozenset()


def test_a_beat_that_is_sent_again_counts_once(one: Controller, two: Controller) -> None:
    meet(one, two)
    captured = [one.beat() for _ in range(5)]
    assert [two.hears(beat, 1.0) for beat in captured] == [FRESH] * 5
    assert [two.hears(beat, 2.0) for beat in captured] == [STALE] * 5
    assert two.hearing.silent_for(3.0) == 2.0


def test_a_beat_that_was_overtaken_on_its_network_is_stale(one: Controller, two: Controller) -> None:
    meet(one, two)
    early, late = one.beat(), one.beat()
    assert two.hears(late) is FRESH
    assert two.hears(early) is STALE


def test_no_captured_beat_counts_after_the_receiver_has_started_again(one: Controller, two: Controller) -> None:
    meet(one, two)
    captured = [one.beat() for _ in range(50)]
    again = Controller("two")
    assert {again.hears(beat) for beat in captured} == {GREETING}
    assert {again.hears(beat) for beat in captured} == {GREETING}
    assert again.hearing.silent_for(0) == math.inf
    assert one.hears(again.beat()) is FRESH
    assert again.hears(one.beat()) is FRESH
    assert {again.hears(beat) for beat in captured} == {STALE}


def test_no_captured_beat_counts_after_the_sender_has_started_again(one: Controller, two: Controller) -> None:
    meet(one, two)
    arrived = [one.beat() for _ in range(3)]
    for beat in arrived:
        two.hears(beat)
    never_arrived = [one.beat(network) for network in (0, 1) for _ in range(3)]
    again = Controller("one")
    meet(two, again)
    assert {two.hears(beat, 5.0) for beat in arrived + never_arrived} == {STALE}
    assert two.hears(again.beat(), 6.0) is FRESH


def test_a_peer_that_started_again_is_heard_by_its_first_beat_that_answers(one: Controller, two: Controller) -> None:
    meet(one, two)
    again = Controller("one")
    assert two.hears(again.beat()) is GREETING
    assert again.hears(two.beat()) is FRESH
    assert two.hears(again.beat()) is FRESH
    other = Controller("one")
    other.hears(two.beat())
    assert two.hears(other.beat()) is FRESH


def test_a_replayed_greeting_does_not_lead_away_from_the_living_peer(one: Controller, two: Controller) -> None:
    """Nor do many of them: the living peer is echoed before all of those that have greeted."""
    meet(one, two)
    for _ in range(2 * beats.MAX_CANDIDATES):
        assert two.hears(Controller("one").beat()) is GREETING
        assert len(two.hearing.echoes) <= beats.MAX_CANDIDATES + 1
        assert two.hearing.echoes[0].session == one.session
        assert two.hears(one.beat()) is FRESH
        assert one.hears(two.beat()) is FRESH


def test_a_newcomer_is_not_crowded_out_by_a_few_replayed_greetings(two: Controller) -> None:
    """Two has never heard anybody. An attacker has a beat of five earlier processes of one, and sends them all the time."""
    old = [Controller("one").beat() for _ in range(beats.MAX_CANDIDATES - 1)]
    one = Controller("one")
    two.hears(one.beat())
    for _ in range(10):
        for beat in old:
            two.hears(beat)
    assert one.hears(two.beat()) is FRESH


def test_beats_of_a_process_that_was_never_taken_up_do_not_lead_away_from_the_living_peer(two: Controller) -> None:
    """One answered, but nothing of it arrived, and it started again: what was held back is worth nothing then."""
    short_lived = Controller("one")
    short_lived.hears(two.beat())
    held_back = [short_lived.beat() for _ in range(3)]
    one = Controller("one")
    meet(two, one)
    assert {two.hears(beat) for beat in held_back} == {GREETING}
    assert two.hears(one.beat()) is FRESH


def test_a_peer_whose_predecessor_was_taken_up_too_late_is_taken_up_after_one_exchange(two: Controller) -> None:
    short_lived = Controller("one")
    short_lived.hears(two.beat())
    held_back = short_lived.beat()
    one = Controller("one")
    one.hears(two.beat())
    assert two.hears(held_back) is FRESH  # it arrives for the first time, and nothing newer did
    assert two.hears(one.beat()) is GREETING
    one.hears(two.beat())
    assert two.hears(one.beat()) is FRESH
    assert two.hears(held_back) is STALE


def test_a_replayed_beat_of_ours_does_not_make_the_other_one_forget_what_to_echo(one: Controller, two: Controller) -> None:
    """Two has taken up one, so what it wants echoed has changed; its beat from before that is sent again."""
    first = two.beat()
    meet(one, two)
    again = Controller("one")
    again.hears(two.beat())
    again.hears(first)
    assert two.hears(again.beat()) is FRESH


def test_of_two_living_processes_none_is_deaf_for_ever(one: Controller, two: Controller) -> None:
    """A mistake of a person, but when one of them ends the other one is heard."""
    meet(one, two)
    twin = Controller("one")
    meet(two, twin)
    assert two.hears(one.beat()) is STALE
    one.hears(two.beat())
    assert two.hears(one.beat()) is FRESH


# ---- several networks


def test_each_network_counts_for_itself_and_content_once(one: Controller, two: Controller) -> None:
    meet(one, two)
    assert two.hears(one.beat(0), 10.0) is FRESH
    assert two.hears(one.beat(1, again=True), 10.1) is COPY
    assert two.hearing.networks(10.2, 3) == {0, 1}
    assert two.hears(one.beat(1), 11.0) is FRESH
    assert two.hears(one.beat(0, again=True), 11.1) is COPY
    assert two.hears(one.beat(0, again=True), 11.2) is STALE


def test_of_two_networks_one_dies(one: Controller, two: Controller) -> None:
    meet(one, two)
    for now in range(10):
        assert two.hears(one.beat(0), float(now)) is FRESH
        if now < 5:
            assert two.hears(one.beat(1, again=True), float(now)) is COPY
    assert two.hearing.silent_for(9.5) == 0.5
    assert two.hearing.networks(9.5, 3) == {0}
    assert two.hearing.last_heard(0) == 9.0
    assert two.hearing.last_heard(1) == 4.0
    assert two.hearing.last_heard(2) is None
    assert two.hears(one.beat(1), 10.0) is FRESH
    assert two.hearing.networks(10.0, 3) == {0, 1}


def test_a_slow_network_carries_but_does_not_make_the_peer_younger(one: Controller, two: Controller) -> None:
    """Or else beats of a network that had died, sent again when the peer has died too, would make it live on."""
    meet(one, two)
    sent = [(one.beat(0), one.beat(1, again=True)) for _ in range(5)]
    for fast, _ in sent:
        two.hears(fast, 1.0)
    assert [two.hears(slow, 4.0) for _, slow in sent] == [COPY] * 5
    assert two.hearing.silent_for(4.0) == 3.0
    assert two.hearing.networks(4.0, 1) == {1}


def test_beats_of_a_network_that_was_dead_for_long_are_stale(one: Controller, two: Controller) -> None:
    meet(one, two)
    lost = [one.beat(1) for _ in range(100)]
    two.hears(one.beat(0))
    verdicts = [two.hears(beat) for beat in lost]
    assert verdicts[:60] == [STALE] * 60
    assert verdicts[-1] is COPY


def test_a_beat_from_before_the_receiver_began_never_proves_a_network(one: Controller, two: Controller) -> None:
    meet(one, two)
    captured = one.beat(1)
    again = Controller("two")
    one.hears(again.beat())
    again.hears(one.beat(0))
    one.hears(again.beat())
    assert again.hears(one.beat(0)) is FRESH
    assert again.hears(captured) is STALE
    assert again.hearing.networks(0, 3) == {0}


# ---- any order of events


@dataclass
class Sent:
    """A beat on its way, and when it was made among all beats and starts."""

    beat: Beat
    to: str
    made: int
    counted: set[bytes] = field(default_factory=set)


class AnyOrder(RuleBasedStateMachine):
    """Two nodes that start again at any time, and a network that loses, reorders and repeats whatever was ever sent."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.nodes = {name: Controller(name) for name in ("one", "two")}
        self.began = dict.fromkeys(self.nodes, 0)
        self.newest = dict.fromkeys(self.nodes, -1)
        self.sent: list[Sent] = []

    @rule(name=st.sampled_from(["one", "two"]))
    def start_again(self, name: str) -> None:
        self.clock += 1
        self.nodes[name] = Controller(name)
        self.began[name], self.newest[name] = self.clock, -1

    @rule(name=st.sampled_from(["one", "two"]), arrives=st.sampled_from([(), (0,), (1,), (0, 1), (1, 0)]))
    def send(self, name: str, arrives: tuple[int, ...]) -> None:
        self.clock += 1
        to = "two" if name == "one" else "one"
        pair = [Sent(self.nodes[name].beat(network, again=network > 0), to, self.clock) for network in (0, 1)]
        self.sent += pair
        for network in arrives:
            self.deliver(pair[network])

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), back=st.integers(1, 30))
    def repeat(self, data: st.DataObject, back: int) -> None:
        self.deliver(data.draw(st.sampled_from(self.sent[-back:])))

    @rule()
    def everything_again(self) -> None:
        for sent in self.sent:
            self.deliver(sent)

    def deliver(self, sent: Sent) -> Verdict:
        node = self.nodes[sent.to]
        verdict = node.hears(sent.beat, float(self.clock))
        if verdict in (FRESH, COPY):
            assert not sent.counted, "counted twice"
            assert sent.made > self.began[sent.to], "made before the receiver began"
            sent.counted.add(node.session)
        if verdict is FRESH:
            assert sent.made > self.newest[sent.to], "older than what was heard before"
            self.newest[sent.to] = sent.made
        return verdict

    @invariant()
    def what_is_echoed_is_bounded(self) -> None:
        for node in self.nodes.values():
            echoed = [echo.session for echo in node.hearing.echoes]
            assert len(echoed) == len(set(echoed)) <= beats.MAX_CANDIDATES + 1

    def teardown(self) -> None:
        """Whatever has happened: an exchange on a network that works, and both are heard from then on."""
        one, two = self.nodes["one"], self.nodes["two"]
        for _ in range(2):
            two.hears(one.beat())
            one.hears(two.beat())
        for _ in range(2):
            assert two.hears(one.beat()) is FRESH
            assert one.hears(two.beat()) is FRESH


TestAnyOrder = AnyOrder.TestCase
