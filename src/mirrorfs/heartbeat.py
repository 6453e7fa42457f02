"""The heartbeats between the two controllers: one UDP socket for each network, and the key that protects them.

What counts as heard is decided in `core.beats`. A network that is down, or that has not come up yet, is told in the log and in
`Heartbeats.networks`, and raises nothing. Nothing is ever sent to anybody but the other node's configured addresses.
"""

import errno
import logging
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from mirrorfs.config import NodeConfig
from mirrorfs.core import beats
from mirrorfs.core.beats import Beat, BeatError, Hearing, Verdict
from mirrorfs.errors import ConfigError, MirrorfsError
from mirrorfs.files import version

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
KEY_LOOK_S: Final = 1.0

#: The least pause after a beat, as a part of the interval.
_GAP: Final = 0.1
_REOPEN_S: Final = 1.0
_RESOLVE_TIMEOUT_S: Final = 5.0
_LOG_EVERY_S: Final = 60.0
#: More than fits into the buffer of a socket, so that it ends only while somebody floods us.
_MOST_AT_ONCE: Final = 1024
_IP_FREEBIND: Final = 15  # linux/in.h; Python has no names for these
_IPV6_FREEBIND: Final = 78  # linux/in6.h

_HOW: Final = "make it with `mirrorfs make-key` on one node and copy it to the other"


def load_key(path: Path) -> bytes:
    """The shared key of 32 bytes in `path`; ConfigError if there is none, or if it may not be secret."""
    try:
        status, content = _read_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no key, {_HOW}") from None
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read ({error.strerror}), are you root?") from None
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: is no file, remove it, and for a key {_HOW}")
    if mode & ~0o600:
        raise ConfigError(f"{path}: the key has the mode {mode:04o} and may not be secret, make it 0600: chmod 600 {path}")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path}: the key belongs to user {status.st_uid}, give it to root: chown root {path}")
    text = content.decode("ascii", "replace").strip()
    if not re.fullmatch(f"[0-9A-Fa-f]{{{2 * beats.KEY_BYTES}}}", text):
        raise ConfigError(f"{path}: a key is {2 * beats.KEY_BYTES} hex digits and this is none, remove it and {_HOW}")
    return bytes.fromhex(text)


def _read_file(path: Path) -> tuple[os.stat_result, bytes]:
    # Not blocking, or a FIFO in its place would make us wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        return status, os.read(descriptor, 4 * beats.KEY_BYTES) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(descriptor)


def make_key(path: Path) -> None:
    """Write a fresh key to `path`, durably, for its owner only; MirrorfsError if something is there or it cannot be."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise MirrorfsError(f"{path.parent}: cannot be made ({error.strerror}), are you root?") from None
    try:
        # Refused by the kernel, and not by a look before: the key of a running pair must not be lost.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise MirrorfsError(
            f"{path}: is there already, copy it to the other node; remove it on both nodes first to make another one"
        ) from None
    except OSError as error:
        raise MirrorfsError(f"{path}: cannot be made ({error.strerror}), are you root?") from None
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask was
            file.write(secrets.token_hex(beats.KEY_BYTES) + "\n")
            file.flush()
            os.fsync(descriptor)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise MirrorfsError(f"{path}: cannot be written ({error.strerror}), make room there") from None


class KeyFiles:
    """The key that files come to, looked at again while a controller runs: nodes may be introduced to each other anew."""

    def __init__(self, read: Callable[[], bytes], files: Sequence[Path]) -> None:
        """`read` makes the key of what is in `files`; raises what it does."""
        self._read = read
        self._files = files
        self._seen = version(*files)  # first: what changes in between is another key
        self.key = read()

    def refresh(self) -> bool:
        """Whether it is another key now. One that cannot be had is told, and the one before stays."""
        if (seen := version(*self._files)) == self._seen:
            return False
        self._seen, before = seen, self.key
        try:
            self.key = self._read()
        except (MirrorfsError, OSError, ValueError) as error:
            log.warning("the key of the heartbeats stays what it was: %s", error)
        return self.key != before


@dataclass(slots=True)
class _Network:
    """One network: this node's address, the other one's, and the socket while there is one."""

    number: int
    own: str
    peer: str
    endpoint: socket.socket | None = None
    target: Any = None
    #: What is wrong with it, told once.
    trouble: str = ""

    def says(self, trouble: str) -> None:
        """Note what is wrong, or that nothing is; the log has each change once."""
        if trouble == self.trouble:
            return
        if trouble:
            log.warning("heartbeats from %s to %s: %s", self.own, self.peer, trouble)
        else:
            log.info("heartbeats from %s to %s: are sent again", self.own, self.peer)
        self.trouble = trouble

    def close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()
            self.endpoint = None


@dataclass(slots=True)
class _Rarely:
    """Says how often something has happened, in at most one line a minute."""

    text: str
    count: int = 0
    _said_at: float | None = field(default=None)

    def happened(self, what: str, now: float) -> None:
        self.count += 1
        if self._said_at is None or now - self._said_at >= _LOG_EVERY_S:
            self._said_at = now
            log.warning(self.text, what, self.count)


class Heartbeats:
    """Sends this controller's beats over all networks, and hears those of the other one."""

    def __init__(
        self,
        volume: str,
        own: NodeConfig,
        peer: NodeConfig,
        port: int,
        key: bytes,
        *,
        content: Callable[[], dict[str, Any]],
        on_heard: Callable[[dict[str, Any]], None],
        interval_s: float = INTERVAL_S,
        network_timeout_s: float = 3.0,
        session: bytes | None = None,
    ) -> None:
        """`content()` is what each beat says, and has to be plain values of MAX_CONTENT_BYTES; `on_heard` gets the other one's.

        `on_heard` is called once for each new beat, and must not wait. A network that was silent for `network_timeout_s` is
        down. `session` is random if it is not given.
        """
        self._volume = volume
        self._own, self._peer = own.name, peer.name
        self._port = port
        self._key = key
        self._content = content
        self._on_heard = on_heard
        self._interval_s = interval_s
        self._network_timeout_s = network_timeout_s
        self._session = secrets.token_bytes(beats.SESSION_BYTES) if session is None else session
        self._hearing = Hearing(self._session)
        self._sequence = 0
        pairs = zip(own.heartbeats, peer.heartbeats, strict=True)
        self._networks = [_Network(number, *pair) for number, pair in enumerate(pairs)]
        self._poked = trio.Event()
        self._started_at = self._listened_at = 0.0
        self._rejected = _Rarely("a datagram was ignored: %s (%d since the start)")
        self._unsendable = _Rarely("a heartbeat says nothing but that this controller lives: %s (%d since the start)")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send and listen until cancelled; has started once each network was tried."""
        self._started_at = self._listened_at = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as opening:
                    for network in self._networks:
                        opening.start_soon(nursery.start, self._listen, network)
                task_status.started()
                await self._send_regularly()
        finally:
            for network in self._networks:
                network.close()

    def poke(self) -> None:
        """Send a beat at once (and no sooner than a tenth of the interval after the last one): there is something to say."""
        self._poked.set()

    def use_key(self, key: bytes) -> None:
        """From now on, for what is sent and what is heard."""
        self._key = key

    @property
    def heard_ever(self) -> bool:
        """Whether the other controller was heard since this one has started."""
        return self._hearing.heard_ever

    @property
    def silent_s(self) -> float:
        """Seconds since the other controller was heard, or since the start if it never was.

        Counts up to the last time that the sockets were found empty: a controller that itself stood still (a machine that was
        suspended) does not take that for silence of the other one.
        """
        silent_s = self._hearing.silent_for(self._listened_at) if self.heard_ever else self._listened_at - self._started_at
        return max(0.0, silent_s)

    @property
    def networks(self) -> dict[str, bool]:
        """For each of the other node's addresses whether beats come from it."""
        up = self._hearing.networks(self._listened_at, self._network_timeout_s)
        return {network.peer: network.number in up for network in self._networks}

    @property
    def rejected(self) -> int:
        """How many datagrams were none of the other controller."""
        return self._rejected.count

    # ---- sending

    async def _send_regularly(self) -> None:
        while True:
            self._poked = trio.Event()
            # Before the clock is read, since what has waited for us is no silence.
            for network in self._networks:
                self._receive(network)
            self._listened_at = trio.current_time()
            self._send()
            # Two controllers that poke whenever they hear something would else send without end.
            await trio.sleep(self._interval_s * _GAP)
            with trio.move_on_after(self._interval_s * (1 - _GAP)):
                await self._poked.wait()

    def _send(self) -> None:
        self._sequence += 1
        content = self._content()
        for network in self._networks:
            if network.endpoint is None:
                continue
            datagram = self._datagram(network.number, content)
            try:
                network.endpoint.sendto(datagram, network.target)
                network.says("")
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                    continue  # a network that takes nothing must not hold up the others; the next beat says it all again
                network.says(f"cannot be sent ({error.strerror})")

    def _datagram(self, network: int, content: dict[str, Any]) -> bytes:
        hearing = self._hearing
        beat = Beat(
            volume=self._volume,
            sender=self._own,
            session=self._session,
            taken_up=hearing.taken_up,
            sequence=self._sequence,
            echoes=hearing.echoes,
            network=network,
            content=content,
        )
        try:
            return beats.encode(beat, self._key, secrets.token_bytes(beats.NONCE_BYTES))
        except BeatError as error:
            if not content:
                raise
            # That this controller lives is worth more than what it has to say.
            self._unsendable.happened(str(error), trio.current_time())
            return self._datagram(network, {})

    # ---- listening

    async def _listen(self, network: _Network, *, task_status: trio.TaskStatus[None]) -> None:
        tried = False
        while True:
            trouble = await self._open(network)
            if not tried:
                task_status.started()
                tried = True
            if not trouble:
                trouble = await self._receive_all(network)
            network.close()
            network.says(trouble)
            await trio.sleep(_REOPEN_S)

    async def _open(self, network: _Network) -> str:
        """Make the socket; what is wrong if that cannot be done now."""
        try:
            with trio.fail_after(_RESOLVE_TIMEOUT_S):
                family, own = await self._resolve(network.own, socket.AF_UNSPEC)
                _, network.target = await self._resolve(network.peer, family)
            network.endpoint = _bound(family, own)
        except trio.TooSlowError:
            return "the addresses cannot be looked up (no answer)"
        except OSError as error:
            hint = f", is the port {self._port} another volume's too?" if error.errno == errno.EADDRINUSE else ""
            return f"no socket ({error.strerror}){hint}"
        return ""

    async def _resolve(self, address: str, family: int) -> tuple[int, Any]:
        found = await trio.socket.getaddrinfo(address, self._port, family=family, type=socket.SOCK_DGRAM)
        return found[0][0], found[0][4]

    async def _receive_all(self, network: _Network) -> str:
        """Returns what is wrong, once nothing can be received any more."""
        while network.endpoint is not None:
            try:
                await trio.lowlevel.wait_readable(network.endpoint)
            except OSError as error:
                return f"cannot be received ({error.strerror})"
            if trouble := self._receive(network):
                return trouble
        return "no socket"

    def _receive(self, network: _Network) -> str:
        """Take what has arrived; what is wrong, if nothing can be received any more."""
        if network.endpoint is None:
            return ""
        for _ in range(_MOST_AT_ONCE):
            try:
                datagram, source = network.endpoint.recvfrom(beats.MAX_DATAGRAM_BYTES + 1)
            except BlockingIOError:
                return ""
            except OSError as error:
                return f"cannot be received ({error.strerror})"
            self._heard(datagram, str(source[0]))
        return ""

    def _heard(self, datagram: bytes, source: str) -> None:
        now = trio.current_time()
        try:
            beat = beats.decode(datagram, self._key, volume=self._volume, sender=self._peer)
        except BeatError as error:
            self._rejected.happened(f"from {source}, {error}", now)
            return
        match self._hearing.step(beat, now):
            case Verdict.FRESH:
                self._on_heard(beat.content)
            case Verdict.GREETING:
                self.poke()  # it is heard once it has our answer
            case _:
                pass


def _bound(family: int, address: Any) -> socket.socket:
    """A socket that needs not wait for its address: it works from when a network has it."""
    made = socket.socket(family, socket.SOCK_DGRAM)
    try:
        made.setblocking(False)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made
