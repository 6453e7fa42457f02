"""Serves the console, by Hypercorn: https always.

Whatever goes wrong with it is told, and nothing else of the controller suffers.
"""

import contextlib
import logging
import socket
import ssl
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

log = logging.getLogger(__name__)

_AGAIN_S: Final = 30.0
_BACKLOG: Final = 100
#: The descriptors of the controller are for its services.
_MOST_CONNECTIONS: Final = 200


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
        await trio.sleep(_AGAIN_S)


async def _serve(config: Config, node: NodePort) -> None:
    settings, own = config.console, config.node
    certificate, key = settings.certificate, settings.key
    if certificate is None or key is None:
        certificate = key = own_certificate(own.keys / "console.pem", own.console)
    server = ServerConfig()
    server.certfile, server.keyfile = str(certificate), str(key)
    server.include_server_header = False
    server.ssl_handshake_timeout = 10
    server.keep_alive_timeout = 10  # also for a request whose head does not come
    server.graceful_timeout = 0.5
    server.accesslog, server.errorlog = None, log
    server.loglevel = "WARNING"
    users = Users(own.keys)
    observer = Observer(node, own.state_dir)
    api = Api(observer, users, Lines(own.state_dir / "console-audit.jsonl"))
    app = Console(api).app()
    if users.is_empty:
        log.info("the console has no users yet: mirrorfs console user NAME --role operate")
    with _listen(own.console, settings.port) as listening:
        try:
            context = server.create_ssl_context()
        except OSError as error:
            raise MirrorfsError(f"{certificate} and {key} cannot be used: {error}") from None
        assert context is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(observer.run)
            host = f"[{own.console}]" if ":" in own.console else own.console
            log.info("the console: https://%s:%d/", host, settings.port)
            await _Connections(ASGIWrapper(app), server, context).serve(listening)  # type: ignore[arg-type]


class _Connections:
    """Accepts them, and has Hypercorn serve each. Its own loop bounds neither how many there are nor the end: what it sends to
    somebody who does not read is shielded, and the controller could not stop."""

    def __init__(self, app: ASGIWrapper, config: ServerConfig, context: ssl.SSLContext) -> None:
        self._app, self._config, self._context = app, config, context
        self._worker = WorkerContext(None)
        self._open: set[trio.SocketStream] = set()

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
        if len(self._open) >= _MOST_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._open.add(stream)
        try:
            secured = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
            await TCPServer(self._app, self._config, self._worker, {}, secured)
        except Exception:
            log.exception("a conversation of the console failed")
        finally:
            self._open.discard(stream)
            await trio.aclose_forcefully(stream)


def _listen(address: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise MirrorfsError(f"cannot listen on {address} port {port} ({error.strerror}): set [console] port") from None
    return listening
