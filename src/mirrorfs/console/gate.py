"""Who is logged in, and how often somebody may try: sessions and a throttle, both in memory and told the time.

A session is a random token in a cookie that no script can read, and a second one that the page sends with whatever changes
something (CSRF). Times are seconds of any clock that does not jump.
"""

import ipaddress
import secrets
from dataclasses import dataclass, field
from typing import Final

IDLE_S: Final = 1800.0
LONGEST_S: Final = 12 * 3600.0
_MOST_SESSIONS: Final = 200
_FREE_TRIES: Final = 5
_LONGEST_WAIT_S: Final = 900.0
_MOST_REMEMBERED: Final = 10_000


@dataclass(slots=True)
class Session:
    """One login. `token` is that of the cookie."""

    user: str
    proof: str  # of the password by which it began: `Users.proof_of`
    began: float
    seen: float
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def is_over(self, now: float) -> bool:
        """Whether it has been idle for too long, or has lasted for too long."""
        return now - self.seen > IDLE_S or now - self.began > LONGEST_S


class Sessions:
    """Those who are logged in; they end with the process."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def begin(self, user: str, proof: str, now: float) -> Session:
        """A new one; of too many the oldest ends."""
        self._sessions = {token: each for token, each in self._sessions.items() if not each.is_over(now)}
        while len(self._sessions) >= _MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        session = Session(user, proof, now, now)
        self._sessions[session.token] = session
        return session

    def find(self, token: str, now: float, *, touch: bool = True) -> Session | None:
        """The session of a cookie, None if there is none any more. `touch`: somebody uses it."""
        session = self._sessions.get(token)
        if session is None:
            return None
        if session.is_over(now):
            del self._sessions[token]
            return None
        if touch:
            session.seen = now
        return session

    def end(self, token: str) -> None:
        """Log out."""
        self._sessions.pop(token, None)


class Throttle:
    """After a few failures in a row, each further one doubles the wait before the next try, by whoever it is that tries.

    The key is who is throttled: an address. A user name is none, or anybody could lock the operator out.
    """

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}  # how many, and when it may be tried again

    def wait_s(self, key: str, now: float) -> float:
        """For how long it may not be tried."""
        _, again = self._failures.get(key, (0, 0.0))
        return max(0.0, again - now)

    def failed(self, key: str, now: float) -> None:
        """One more failure."""
        count, again = self._failures.pop(key, (0, 0.0))
        if now - again > _LONGEST_WAIT_S:
            count = 0
        count += 1
        wait_s = 0.0 if count < _FREE_TRIES else min(2.0 ** (count - _FREE_TRIES), _LONGEST_WAIT_S)
        self._failures[key] = count, now + wait_s
        while len(self._failures) > _MOST_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    def succeeded(self, key: str, now: float) -> None:
        """The last failure was none. Those before it count on, or somebody with a password could guess that of another."""
        count, _ = self._failures.pop(key, (0, 0.0))
        if count > 1:
            self._failures[key] = count - 1, now


def who_is_throttled(address: str) -> str:
    """The key of an address: of IPv6 the network, of which one machine has all addresses."""
    try:
        literal = ipaddress.ip_address(address)
    except ValueError:
        return address
    if literal.version == 6:
        return str(ipaddress.ip_network((literal, 64), strict=False))
    return str(literal)
