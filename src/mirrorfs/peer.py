"""The link to the other node: dialling, listening, the preamble and the greeting, frames both ways, heartbeats, silence.

The node whose name comes first listens for the other one, which dials; all is said in TLS, the preamble and a HELLO first.
Sending is synchronous: the bytes go into the socket at once if it takes them, and otherwise wait in `Link` for the writer task.
Heartbeats come from a thread that touches nothing but the channel, so that a node that waits for its disk is still heard, and
says since when it has been busy.
"""

import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, Final

import trio

from mirrorfs.channel import Channel
from mirrorfs.core import wire
from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import LinkLostError, MirrorfsError, ProtocolError
from mirrorfs.filtering import only_from
from mirrorfs.reactor import Reactor
from mirrorfs.trust import Trust

log = logging.getLogger(__name__)

_GREETING_TIMEOUT_S: Final = 5.0
_MAX_STRANGERS: Final = 16
#: So many more wait in the kernel.
_BACKLOG: Final = 64
#: While the other node is connected nobody is expected: one stranger at a time then, so long apart, and longer if they go on.
_PACE_S: Final = 0.1
_SLOWEST_PACE_S: Final = 0.5
#: How often it is told that there are more.
_TELL_S: Final = 60.0
_REDIAL_S: Final = 0.3
#: The kernel takes several large writes at once.
_SOCKET_BUFFER: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33


class Link:
    """A greeted connection: frames out by `send`, in by `receive`; ended by `close` or by whatever goes wrong on it."""

    def __init__(self, connection: socket.socket, channel: Channel, *, ack_timeout_s: float, stall_timeout_s: float) -> None:
        self._socket = connection
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            # Trio's streams, which greeted on it, leave a limit of 16 KiB behind: a large write would go in pieces.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)
        self._channel = channel
        self.version = channel.version  #: of the protocol, on this link
        self.read_at = perf_counter()  #: when what is taken in now was read
        self._early = True  # frames may have come in one piece with the greeting
        self._listening = False
        self._serve: Callable[[Frame], bool] = lambda frame: False
        self._served: Callable[[], None] = lambda: None
        self._reactor: Reactor | None = None
        self._inbox: list[Frame] = []
        self._trouble: Exception | None = None  # that came up while the reactor served
        self._arrived = trio.Event()
        self.streams = 0
        self._ack_timeout_s = ack_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0
        self._lock = channel.lock  # the outbox and the socket's sending side, shared with the heartbeat thread
        self._writable = trio.Event()
        self._closed = False
        self._heard = False
        self._busy_s = 0.0
        self._ticked = time.monotonic()
        self._quiet = threading.Event()
        self.failure: MirrorfsError | None = None
        self.bytes_sent = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the network."""
        return self._outbox_bytes

    def send(self, frame: wire.Encoded) -> None:
        """Send one encoded frame; on a broken link nothing happens, `receive` tells."""
        if self._closed:
            return
        with self._lock:
            try:
                self._put(frame)
            except OSError as error:
                self._fail(LinkLostError(f"the connection broke: {error.strerror}"))
                return
        if self._outbox:
            self._writable.set()

    def _put(self, frame: wire.Encoded) -> None:
        """Send it, or keep what the network does not take for the writer task; the lock is held."""
        for piece in self._channel.seal(*frame):
            self.bytes_sent += len(piece)
            sent = 0
            if not self._outbox:
                with suppress(BlockingIOError):
                    sent = self._socket.send(piece)
            if sent < len(piece):
                self._outbox.append(memoryview(piece)[sent:])
                self._outbox_bytes += len(piece) - sent

    def send_message(self, kind: Kind, content: object = None) -> None:
        """Send a frame with a msgpack payload."""
        self.send(wire.encode_message(kind, content))

    def serve(self, serve: Callable[[Frame], bool], served: Callable[[], None], reactor: "Reactor | None") -> None:
        """From here on `serve` is given each frame as soon as it is read, while `receive` is waited in: it takes it in, or
        returns False and leaves it, with all that follow, to `receive`. `served` is called after those that came together.

        With a `reactor`, that reads; without, `receive` does. What they raise, `receive` raises.
        """
        self._serve, self._served, self._reactor = serve, served, reactor

    async def receive(self) -> list[Frame]:
        """The frames that have arrived and were not served, at least one; raises LinkLostError or ProtocolError when there
        will be no more."""
        if self._early:
            self._early = False
            if frames := self._sort(0):
                return frames
        if self._reactor is not None:
            return await self._receive_from(self._reactor)
        while True:
            if frames := self._sort(await self._read()):
                return frames
            await trio.lowlevel.checkpoint()  # others run, however much there is to serve

    def _sort(self, count: int) -> list[Frame]:
        """Serve what so many bytes, just read, complete; returns what is left to do, in its order."""
        left: list[Frame] = []
        serve = self._serve
        for frame in self._channel.received(count):
            if frame.kind is Kind.HEARTBEAT:
                self._busy_s = frame.offset / 1000
            elif left or not serve(frame):
                left.append(frame.owned())
        if not left:
            self._served()
        return left

    async def _receive_from(self, reactor: Reactor) -> list[Frame]:
        """Let the reactor read until there is something left to do."""
        if self.failure is not None:
            raise self.failure
        self._arrived = trio.Event()
        self._listening = True
        descriptor = self._socket.fileno()
        reactor.add(descriptor, self._readable)
        try:
            await self._arrived.wait()
        finally:
            reactor.remove(descriptor)
            self._listening = False
        if self._trouble is not None:
            raise self._trouble
        frames, self._inbox = self._inbox, []
        return frames

    def _readable(self) -> None:
        """The reactor found something to read."""
        if self._arrived.is_set():
            return  # the order: what is left is taken in first
        try:
            if self.failure is not None:
                raise self.failure  # what is still in the socket does not count any more
            count = self._socket.recv_into(self._channel.room)
            if not count:
                raise self._ended()
            self.read_at = perf_counter()
            self._heard = True
            self._inbox = self._sort(count)
        except BlockingIOError:
            return
        except OSError as error:
            self._trouble = self.failure or LinkLostError(f"the connection broke: {error.strerror}")
        except Exception as error:  # whatever it is, it ends the link and not the reactor
            self._trouble = error
        if self._inbox or self._trouble is not None:
            assert self._reactor is not None
            self._reactor.remove(self._socket.fileno())
            self._arrived.set()

    def _ended(self) -> MirrorfsError:
        if self.failure is not None:
            return self.failure
        if self._channel.incomplete:
            return ProtocolError("the connection ended inside a frame")
        return LinkLostError("the connection was closed")

    async def _read(self) -> int:
        while True:
            if self.failure is not None:
                raise self.failure
            try:
                count = self._socket.recv_into(self._channel.room)
            except BlockingIOError:
                self._listening = True
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    raise self.failure or LinkLostError("the connection was closed") from None
                finally:
                    self._listening = False
                continue
            except OSError as error:
                raise self.failure or LinkLostError(f"the connection broke: {error.strerror}") from error
            if not count:
                raise self._ended()
            self.read_at = perf_counter()
            self._heard = True
            return count

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the link until it is closed: the writer, the heartbeats, the watch for silence."""
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                task_status.started()
                await self._write()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def close(self, why: str = "this node closed the connection") -> None:
        """End the link; `receive` raises LinkLostError(why)."""
        with self._lock:
            self._fail(LinkLostError(why))
        self._quiet.set()

    def _fail(self, error: MirrorfsError) -> None:
        if self._closed:
            return
        self._closed = True
        self.failure = error
        self._writable.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the reactor finds it readable
        trio.lowlevel.notify_closing(self._socket)

    def dispose(self) -> None:
        """Give the socket back, when no task uses the link any more."""
        self.close()
        self._socket.close()

    async def _write(self) -> None:
        while not self._closed:
            await self._writable.wait()
            self._writable = trio.Event()
            while self._outbox and not self._closed:
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                except trio.ClosedResourceError:
                    return
                with self._lock:
                    self._flush()

    def _flush(self) -> None:
        try:
            sent = self._socket.sendmsg([self._outbox[i] for i in range(min(64, len(self._outbox)))])
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(LinkLostError(f"the connection broke: {error.strerror}"))
            return
        self._outbox_bytes -= sent
        while sent:
            first = self._outbox[0]
            if sent < len(first):
                self._outbox[0] = first[sent:]
                return
            sent -= len(first)
            self._outbox.popleft()

    def _beat(self) -> None:
        interval = min(0.5, self._ack_timeout_s / 4)
        while not self._quiet.wait(interval):
            busy_ms = int((time.monotonic() - self._ticked) * 1000)
            beat = wire.encode(Frame(Kind.HEARTBEAT, offset=busy_ms))
            with self._lock:
                if self._closed:
                    return
                if self._outbox:
                    continue  # what waits there is heard as well
                with suppress(OSError):  # whoever sends next tells it
                    self._put(beat)

    async def _watch(self) -> None:
        """End the link after a silence. Time in which this node stood still or did not listen is not the peer's silence."""
        step = min(0.1, self._ack_timeout_s / 10)
        silence = 0.0
        while True:
            before = time.monotonic()
            self._ticked = before
            await trio.sleep(step)
            waited = min(time.monotonic() - before, 2 * step)
            silence = silence + waited if self._listening and not self._heard else 0.0
            self._heard = False
            if self._outbox:
                self._writable.set()  # a heartbeat may have left a part of itself there
            if silence > self._ack_timeout_s:
                self.close(f"nothing was heard for {self._ack_timeout_s:g} s (ack_timeout)")
                return
            if self._busy_s > self._stall_timeout_s:
                self.close(f"the other node has been busy for {self._busy_s:.0f} s (stall_timeout)")
                return


async def greet(
    connection: socket.socket, hello: dict[str, Any], trust: Trust, *, server_side: bool, encrypted: bool = True
) -> tuple[dict[str, Any], Channel]:
    """Shake hands, say preamble and HELLO, and return the other's HELLO; raises ProtocolError or LinkLostError."""
    try:
        channel = Channel(trust.context(server_side=server_side, encrypted=encrypted), server_side=server_side)
    except MirrorfsError as error:  # nobody comes in without keys, and the node goes on
        raise ProtocolError(str(error)) from None
    try:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection.dup()))
    except OSError as error:
        raise LinkLostError(f"the connection broke in the greeting: {error}") from error
    async with stream:
        try:
            with trio.fail_after(_GREETING_TIMEOUT_S):
                await _shake_hands(channel, stream)
                for piece in channel.seal(wire.preamble(), *wire.encode_message(Kind.HELLO, hello)):
                    await stream.send_all(piece)
                return await _greeting(channel, stream), channel
        except trio.TooSlowError:
            raise ProtocolError(f"it did not greet within {_GREETING_TIMEOUT_S:g} s") from None
        except (trio.BrokenResourceError, OSError) as error:
            raise LinkLostError(f"the connection broke in the greeting: {error}") from error


async def _shake_hands(channel: Channel, stream: trio.SocketStream) -> None:
    done = heard = False
    while not done:
        try:
            done = channel.shake_hands()
        finally:
            if said := channel.to_send():  # also the alert that tells the other side why not
                await stream.send_all(said)
        if not done:
            channel.arrived(await _more(stream, "the connection ended inside the greeting" if heard else "it said nothing"))
            heard = True


async def _more(stream: trio.SocketStream, otherwise: str = "the connection ended inside the greeting") -> bytes:
    data = await stream.receive_some(1 << 16)
    if not data:
        raise ProtocolError(otherwise)
    return bytes(data)


async def _greeting(channel: Channel, stream: trio.SocketStream) -> dict[str, Any]:
    """The other side's HELLO, after its preamble."""
    data = b""
    while len(data) < wire.PREAMBLE.size:
        if said := channel.plain(wire.PREAMBLE.size - len(data)):
            data += said
        else:
            channel.arrived(await _more(stream))
    channel.version = wire.agree(data)
    arrived = 0
    while True:
        for frame in channel.received(arrived):
            if frame.kind is not Kind.HELLO:
                raise ProtocolError(f"it began with {frame.kind.name} instead of HELLO")
            content = wire.message(frame)
            if not isinstance(content, dict):
                raise ProtocolError("a malformed HELLO")
            return content
        data = await _more(stream)
        arrived = min(len(data), len(channel.room))
        channel.room[:arrived] = data[:arrived]


Visitor = Callable[[socket.socket, str], Awaitable[None]]


def _prepare(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with suppress(OSError):  # not allowed to: the kernel's own sizes will do
            connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)


async def listen(
    address: str,
    port: int,
    visitor: Visitor,
    *,
    peer: str,
    is_connected: Callable[[], bool],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on `address` and nothing else, for who comes from the address `peer`, and run `visitor` for each connection;
    MirrorfsError if that cannot be. While the other node `is_connected`, who comes is let in slowly, and costs little."""
    try:
        listeners = await trio.open_tcp_listeners(port, host=address, backlog=_BACKLOG)
        for listener in listeners:
            only_from(listener.socket, peer)
    except OSError as error:
        raise MirrorfsError(f"cannot listen on {address} port {port}: {error.strerror or error}") from error
    strangers, refused, told_at = 0, 0, -math.inf

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal strangers, refused, told_at
        try:
            host, *_ = stream.socket.getpeername()
            connection = socket.socket(fileno=stream.socket.detach())
        except OSError:
            return  # gone before it was looked at, as after a port scan
        strangers += 1
        try:
            if strangers > _MAX_STRANGERS:
                refused += 1
                if trio.current_time() - told_at >= _TELL_S:
                    told_at = trio.current_time()
                    log.warning("%s: too many connections at once, %d refused since the start", host, refused)
                return
            _prepare(connection)
            await visitor(connection, str(host))
        except OSError as error:
            log.warning("%s: the connection broke: %s", host, error.strerror)
        finally:
            strangers -= 1
            connection.close()

    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            for listener in listeners:
                nursery.start_soon(_accept, listener, serve, nursery, is_connected)
    finally:
        for listener in listeners:
            listener.socket.close()


async def _accept(
    listener: trio.SocketListener,
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    nursery: trio.Nursery,
    is_connected: Callable[[], bool],
) -> None:
    pace_s = _PACE_S
    while True:
        began = trio.current_time()
        try:
            stream = await listener.accept()
        except OSError as error:
            log.warning("cannot accept a connection: %s", error.strerror)
            await trio.sleep(0.2)
            continue
        nursery.start_soon(serve, stream)
        if trio.current_time() - began > _SLOWEST_PACE_S:
            pace_s = _PACE_S  # nobody came for a while
        if is_connected():
            await trio.sleep(pace_s)
            pace_s = min(2 * pace_s, _SLOWEST_PACE_S)
        else:
            pace_s = _PACE_S


async def dial(own_address: str, address: str, port: int, visitor: Visitor) -> None:
    """Connect to the other node, again and again, and run `visitor` for each connection."""
    told = ""
    while True:
        try:
            with trio.fail_after(2):
                stream = await trio.open_tcp_stream(address, port, local_address=own_address)
        except (OSError, trio.TooSlowError) as error:
            text = str(error) or "no answer"
            if text != told:
                log.info("%s port %d: not reached yet: %s", address, port, text)
                told = text
        else:
            told = ""
            connection = socket.socket(fileno=stream.socket.detach())
            try:
                _prepare(connection)
                await visitor(connection, address)
            finally:
                connection.close()
        await trio.sleep(_REDIAL_S)
