"""Serves the console, by Hypercorn: https always.

Whatever goes wrong with it is told, and nothing else of the controller suffers.
"""

import logging
import socket
from typing import Any, Final

import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.config import Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app

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
            server.create_ssl_context()
        except OSError as error:
            raise MirrorfsError(f"{certificate} and {key} cannot be used: {error}") from None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(observer.run)
            sockets = Sockets([listening], [], [])
            wrapped: Any = wrap_app(app, server.wsgi_max_body_size, "asgi")  # type: ignore[arg-type]
            host = f"[{own.console}]" if ":" in own.console else own.console
            log.info("the console: https://%s:%d/", host, settings.port)
            await worker_serve(wrapped, server, sockets=sockets, shutdown_trigger=trio.sleep_forever)


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
