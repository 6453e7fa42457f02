"""Serves the console, by Hypercorn: https always.

Whatever goes wrong with it is told, and nothing else of the controller suffers.
"""

import contextlib
import logging
import math
import socket
import ssl
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as ServerConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext

from mirrorfs.config import Config
from mirrorfs.console.api import Api
from mirrorfs.console.app import Console
from mirrorfs.console.certificate import own_certificate
from mirrorfs.console.lines import Lines
from mirrorfs.console.observer import NodePort, Observer
from mirrorfs.console.users import Users
from mirrorfs.errors import MirrorfsError
from mirrorfs.files import Version, version

log = logging.getLogger(__name__)

_AGAIN_S: Final = 30.0
_BACKLOG: Final = 100
#: The descriptors of the controller are for its services.
_MOST_CONNECTIONS: Final = 200
_MOST_OF_ONE: Final = 100
_TELL_S: Final = 60.0
_LOOK_S: Final = 1.0
#: How often the node's own certificate is looked into: whether it ends soon.
_CERTIFICATE_S: Final = 3600.0
#: After so long a connection ends on which what is sent is not taken.
_DEAF_MS: Final = 30_000


async def serve(config: Config, node: NodePort) -> None:
    """Serve the console until cancelled; if it cannot be, or has failed, try again every half minute."""
    told = ""
    while True:
        try:
            await _serve(config, node)
        except MirrorfsError as error:
            if str(error) != told:
                log.warning("no console: %s", error)
            told = str(error)
        except Exception:
            log.exception("the console failed, it is started again in %g s", _AGAIN_S)
        except BaseExceptionGroup as group:
            cancelled, failed = group.split(trio.Cancelled)
            if failed is not None:
                log.error("the console failed at its end", exc_info=failed)
            if cancelled is None:
                raise
            raise cancelled from None
        await trio.sleep(_AGAIN_S)


@dataclass(slots=True)
class _Prepared:
    """What is made or read on the disk before there is a console, and looked at again while there is one."""

    config: Config
    certificate: Path
    key: Path
    context: ssl.SSLContext
    server: ServerConfig
    users: Users
    loaded: Version = ()
    failure: str = ""
    certificate_seen_s: float = field(default_factory=time.monotonic)

    @classmethod
    def make(cls, config: Config) -> "_Prepared":
        """Raises MirrorfsError. Waits for the disk, as `look` does."""
        server = ServerConfig()
        server.alpn_protocols = ["http/1.1"]
        server.include_server_header = False
        server.ssl_handshake_timeout = 10
        server.keep_alive_timeout = 10  # also for a request whose head does not come
        server.accesslog, server.errorlog = None, log
        server.loglevel = "WARNING"
        certificate, key = _certificate(config)
        server.certfile, server.keyfile = str(certificate), str(key)
        users = Users(config.node.keys)
        users.refresh()
        try:
            context = server.create_ssl_context()
        except OSError as error:
            raise MirrorfsError(f"{certificate} and {key} cannot be used: {error}") from None
        assert context is not None
        return cls(config, certificate, key, context, server, users, version(certificate, key))

    def look(self) -> None:
        """See whether users or certificate have changed; what cannot be read is told once."""
        failure = ""
        try:
            self.users.refresh()
            if (now_s := time.monotonic()) - self.certificate_seen_s >= _CERTIFICATE_S:
                self.certificate_seen_s = now_s
                _certificate(self.config)
            if (now := version(self.certificate, self.key)) != self.loaded:
                self.context.load_cert_chain(self.certificate, self.key)
                self.loaded = now
                log.info("the console has a new certificate")
        except (MirrorfsError, OSError) as error:
            failure = str(error)
        if failure and failure != self.failure:
            log.warning("the console: %s", failure)
        self.failure = failure

    async def keep_looking(self) -> None:
        """Look once a second, in a thread of its own: a disk that hangs keeps nobody else waiting."""
        limiter = trio.CapacityLimiter(1)
        while True:
            await trio.to_thread.run_sync(self.look, limiter=limiter, abandon_on_cancel=True)
            await trio.sleep(_LOOK_S)


def _certificate(config: Config) -> tuple[Path, Path]:
    """Certificate and key: the configured ones, or the node's own, made now if need be."""
    settings, own = config.console, config.node
    if settings.certificate is not None and settings.key is not None:
        return settings.certificate, settings.key
    file = own_certificate(own.keys / "console.pem", own.console)
    return file, file


async def _serve(config: Config, node: NodePort) -> None:
    settings, own = config.console, config.node
    prepared = await trio.to_thread.run_sync(_Prepared.make, config, abandon_on_cancel=True)
    observer = Observer(node, own.state_dir)
    audit, refused = (Lines(own.state_dir / f"console-{name}.jsonl") for name in ("audit", "refused"))
    app = Console(Api(observer, prepared.users, audit, refused), settings.port).app()
    if prepared.users.is_empty:
        log.info("the console has no users yet: mirrorfs console user NAME --role operate")
    with _listen(own.console, settings.port) as listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(observer.run)
            nursery.start_soon(prepared.keep_looking)
            host = f"[{own.console}]" if ":" in own.console else own.console
            log.info("the console: https://%s:%d/", host, settings.port)
            connections = _Connections(ASGIWrapper(app), prepared.server, prepared.context)  # type: ignore[arg-type]
            await connections.serve(listening)


class _Connections:
    """Accepts them, and has Hypercorn serve each. Its own loop bounds neither how many there are nor the end: what it sends to
    somebody who does not read is shielded, and the controller could not stop."""

    def __init__(self, app: ASGIWrapper, config: ServerConfig, context: ssl.SSLContext) -> None:
        self._app, self._config, self._context = app, config, context
        self._worker = WorkerContext(None)
        self._open: dict[trio.SocketStream, str] = {}  # and where each is from
        self._told_at = -math.inf

    async def serve(self, listening: socket.socket) -> None:
        """Serve who comes until cancelled; then everybody is hung up on."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        async with trio.open_nursery() as connections:
            try:
                await trio.serve_listeners(self._converse, [listener], handler_nursery=connections)
            finally:
                for stream in self._open:
                    with contextlib.suppress(OSError):
                        stream.socket.shutdown(socket.SHUT_RDWR)

    async def _converse(self, stream: trio.SocketStream) -> None:
        try:
            host, *_ = stream.socket.getpeername()
        except OSError:
            await trio.aclose_forcefully(stream)
            return
        if len(self._open) >= _MOST_CONNECTIONS or Counter(self._open.values())[host] >= _MOST_OF_ONE:
            if trio.current_time() - self._told_at >= _TELL_S:
                self._told_at = trio.current_time()
                log.warning("the console: too many connections, from %s too", host)
            await trio.aclose_forcefully(stream)
            return
        self._open[stream] = host
        try:
            secured = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
            await TCPServer(self._app, self._config, self._worker, {}, secured)
        except Exception:
            log.exception("a conversation of the console failed")
        finally:
            del self._open[stream]
            await trio.aclose_forcefully(stream)


def _listen(address: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAF_MS)  # those that are accepted inherit it
        listening.bind((address, port))
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise MirrorfsError(f"cannot listen on {address} port {port} ({error.strerror}): set [console] port") from None
    return listening
