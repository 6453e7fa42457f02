"""The datagrams that two failover controllers send each other, and what counts as having heard the other one.

A datagram is a magic, a version, a random nonce, and a msgpack body that is encrypted and authenticated (ChaCha20-Poly1305)
with the key that both nodes share. That says who made it, not when: anybody on the network may keep it and send it again. So a
beat counts only if it is known to have been made after this controller began to listen, and only once.

- Every process has a random *session* and numbers its beats. What it receives it *echoes*: a beat that echoes our session was
  made after we began. A beat that does not is a greeting: it tells us what to echo, and nothing else.
- Within a session the numbers grow: a beat that was counted once is never counted again, and none that is older.
- Between sessions: only a beat that echoes our session *and how often we have taken up a new session* makes us take up another
  one. So whatever was made before the last change changes nothing any more, and no replay leads us away from the living peer.
  A peer that starts again is taken up by the first beat in which it answers one of ours.

The sessions that have only greeted are echoed beside the one that was taken up, so that replayed greetings put nobody in the
place of the real peer. There is room for a few of them; the oldest goes first.

What this does not tell: whether a beat that arrives for the first time was held back on its way.
"""

import struct
from dataclasses import dataclass
from enum import Enum, auto
from math import inf, isfinite
from typing import Any, Final, NamedTuple

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mirrorfs.errors import MirrorfsError

MAGIC: Final = b"mfs-beat"
VERSION: Final = 2
#: Fits into one packet of any network, IPv6 and tunnels included.
MAX_DATAGRAM_BYTES: Final = 1200
#: Content of this length in msgpack always fits, whatever the names are and however many sessions are echoed.
MAX_CONTENT_BYTES: Final = 850
KEY_BYTES: Final = 32
SESSION_BYTES: Final = 8
MAX_NETWORKS: Final = 16
#: Sessions that have greeted and are echoed. One is enough without an attacker; he needs as many old sessions to fill it.
MAX_CANDIDATES: Final = 6

_HEAD: Final = struct.Struct("<8sH")
#: Random, and never used twice with a key: two of 2^32 beats, those of seventeen years, meet by a chance of 2^-33.
NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_BODY_AT: Final = _HEAD.size + NONCE_BYTES
_LEAST_BYTES: Final = _BODY_AT + _TAG_BYTES
_LARGEST: Final = 1 << 63
_MAX_NAME: Final = 255
_MAX_DEPTH: Final = 8
#: A network may be this many beats slower than the fastest one and still count as one that carries.
_WINDOW: Final = 32
#: Sessions that are known to be over; only so that they are not echoed.
_MAX_OVER: Final = 8


class BeatError(MirrorfsError):
    """What arrived is no beat of the other controller, or what is to be sent would be none; it is dropped, nothing ends."""


class Echo(NamedTuple):
    """What proves that a beat was made after another one: the session of that one's sender, and its `taken_up` (see Beat)."""

    session: bytes
    taken_up: int


@dataclass(frozen=True, slots=True)
class Beat:
    """One datagram. The same `sequence` goes over each network once; `network` is its place in the configuration.

    `session` is random for each process of a controller, `taken_up` says how often it has taken up a new session of the other
    one, `echoes` are the sessions that it knows of the other one, and `content` what it has to say: plain values only.
    """

    volume: str
    sender: str
    session: bytes
    taken_up: int
    sequence: int
    echoes: tuple[Echo, ...]
    network: int
    content: dict[str, Any]


def encode(beat: Beat, key: bytes, nonce: bytes) -> bytes:
    """The datagram of `beat`; BeatError if its content is not plain or too long. `nonce` is random for each."""
    assert len(key) == KEY_BYTES
    if not _is_plain(beat.content):
        raise BeatError("what the controller wants to say is more than plain values")
    fields = (
        beat.volume,
        beat.sender,
        beat.session,
        beat.taken_up,
        beat.sequence,
        [list(echo) for echo in beat.echoes],
        beat.network,
        beat.content,
    )
    try:
        body = bytes(msgpack.packb(fields))
    except ValueError as error:  # a lone surrogate in a text
        raise BeatError(f"what the controller wants to say cannot be sent: {error}") from None
    if (length := _LEAST_BYTES + len(body)) > MAX_DATAGRAM_BYTES:
        raise BeatError(
            f"what the controller wants to say is too long: {length} bytes in a datagram of {MAX_DATAGRAM_BYTES} at most"
        )
    head = _HEAD.pack(MAGIC, VERSION)
    return head + nonce + ChaCha20Poly1305(key).encrypt(nonce, body, head)


def decode(datagram: bytes, key: bytes, *, volume: str, sender: str) -> Beat:
    """The beat in `datagram`; BeatError, with what is wrong, if it is none of `sender` for `volume` made with `key`."""
    assert len(key) == KEY_BYTES
    if not _LEAST_BYTES < len(datagram) <= MAX_DATAGRAM_BYTES or not datagram.startswith(MAGIC):
        raise BeatError("not a heartbeat of a mirrorfs controller")
    _, version = _HEAD.unpack_from(datagram)
    if version != VERSION:
        raise BeatError(f"a heartbeat of version {version}, this is version {VERSION}: install the same on both nodes")
    head, nonce, sealed = datagram[: _HEAD.size], datagram[_HEAD.size : _BODY_AT], datagram[_BODY_AT:]
    try:
        body = ChaCha20Poly1305(key).decrypt(nonce, sealed, head)
    except InvalidTag:
        raise BeatError("damaged, or made with another key: have the two nodes joined each other?") from None
    beat = _read(body)
    if beat.volume != volume:
        raise BeatError(f"a heartbeat of the volume {beat.volume!r}, this is {volume!r}: give each volume its own port and key")
    if beat.sender != sender:
        raise BeatError(f"a heartbeat of the node {beat.sender!r}, the other node is {sender!r}")
    return beat


def _read(body: bytes) -> Beat:
    try:
        fields = msgpack.unpackb(body)
    except (ValueError, TypeError, RecursionError):
        fields = None
    match fields:
        case [
            str(volume),
            str(sender),
            bytes(session),
            int(taken_up),
            int(sequence),
            list(listed),
            int(network),
            dict(content),
        ] if (
            len(volume) <= _MAX_NAME
            and len(sender) <= _MAX_NAME
            and _is_echo([session, taken_up])
            and 0 < sequence < _LARGEST
            and 0 <= network < MAX_NETWORKS
            and len(listed) <= MAX_CANDIDATES + 1
            and all(_is_echo(echo) for echo in listed)
            and _is_plain(content)
        ):
            echoes = tuple(Echo(*echo) for echo in listed)
            return Beat(volume, sender, session, taken_up, sequence, echoes, network, content)
    raise BeatError("a heartbeat that cannot be read, though its key is right")


def _is_echo(value: Any) -> bool:
    match value:
        case [bytes(session), int(taken_up)]:
            return len(session) == SESSION_BYTES and 0 <= taken_up < _LARGEST
    return False


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether both nodes would see the same: what msgpack and JSON have in common, and bytes."""
    if depth > _MAX_DEPTH:
        return False
    match value:
        case None | bool() | str() | bytes():
            return True
        case int():
            return -_LARGEST <= value < _LARGEST
        case float():
            return isfinite(value)
        case list():
            return all(_is_plain(part, depth + 1) for part in value)
        case dict():
            return all(type(key) is str and _is_plain(part, depth + 1) for key, part in value.items())
    return False


class Verdict(Enum):
    """What one beat is to who received it."""

    #: The other controller lives, and says something new.
    FRESH = auto()
    #: The same over another network, or a little late: that network carries, and nothing else.
    COPY = auto()
    #: By somebody who has the key, but perhaps sent again: to be echoed.
    GREETING = auto()
    #: Counted already, or older than what was counted.
    STALE = auto()


class Hearing:
    """What one controller knows of the other one from its beats. Times are seconds of one clock that never goes back."""

    def __init__(self, session: bytes) -> None:
        """`session` is this process's own, of 8 random bytes."""
        assert len(session) == SESSION_BYTES
        self._own = session
        #: How often a new session of the other controller was taken up; part of what it has to echo.
        self.taken_up = 0
        self._accepted: Echo | None = None
        self._candidates: dict[bytes, int] = {}  # session -> taken_up; who greeted last stands last
        self._over: list[bytes] = []
        # Of the session that was taken up: the number of the beat that proved it, the highest one, and that on each network.
        self._first = 0
        self._last = 0
        self._last_on: dict[int, int] = {}
        self._heard_at: float | None = None
        self._heard_on: dict[int, float] = {}

    @property
    def echoes(self) -> tuple[Echo, ...]:
        """What our next beat is to echo: the session that was taken up, if one was, before those that have greeted."""
        accepted = () if self._accepted is None else (self._accepted,)
        return (*accepted, *(Echo(session, taken_up) for session, taken_up in self._candidates.items()))

    def step(self, beat: Beat, now: float) -> Verdict:
        """Take note of an authentic beat that has arrived at `now`; its content counts if it is FRESH."""
        if self._accepted is None or beat.session != self._accepted.session:
            if Echo(self._own, self.taken_up) not in beat.echoes:
                return self._greeted(beat)
            self._take_up(beat)
        if beat.sequence > self._last:
            # `taken_up` never becomes less within a session, so the newest beat has the highest one.
            self._accepted = Echo(beat.session, beat.taken_up)
            self._last = beat.sequence
            self._heard_at = now
            verdict = Verdict.FRESH
        elif (
            beat.sequence > self._last_on.get(beat.network, 0)
            # Before the first one it may be from before our own beginning.
            and beat.sequence >= max(self._first, self._last - _WINDOW)
        ):
            verdict = Verdict.COPY
        else:
            return Verdict.STALE
        self._last_on[beat.network] = beat.sequence
        self._heard_on[beat.network] = now
        return verdict

    def _greeted(self, beat: Beat) -> Verdict:
        if beat.session in self._over:
            return Verdict.STALE
        taken_up = max(beat.taken_up, self._candidates.pop(beat.session, 0))
        self._candidates[beat.session] = taken_up
        if len(self._candidates) > MAX_CANDIDATES:
            del self._candidates[next(iter(self._candidates))]
        return Verdict.GREETING

    def _take_up(self, beat: Beat) -> None:
        if self._accepted is not None:
            self._over = [*self._over, self._accepted.session][-_MAX_OVER:]
        self._candidates.pop(beat.session, None)
        self.taken_up += 1
        self._accepted = Echo(beat.session, beat.taken_up)
        self._first, self._last, self._last_on = beat.sequence, 0, {}

    @property
    def heard_ever(self) -> bool:
        """Whether anything was ever heard."""
        return self._heard_at is not None

    def silent_for(self, now: float) -> float:
        """Seconds since something new was heard, over whichever network; infinite if nothing was ever."""
        return inf if self._heard_at is None else now - self._heard_at

    def last_heard(self, network: int) -> float | None:
        """When `network` last carried a beat that counted."""
        return self._heard_on.get(network)

    def networks(self, now: float, limit_s: float) -> frozenset[int]:
        """The networks that carried a beat that counted in the last `limit_s` seconds."""
        return frozenset(network for network, heard_at in self._heard_on.items() if now - heard_at < limit_s)
