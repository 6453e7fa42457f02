"""Real clusters of etcd, each shared by all the tests of a module, and servers that stand in the way to one."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mirrorfs.lab.etcd import EtcdCluster

PASSWORD = "correct horse"

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of the test's own."""
    return f"/mirrorfs/{request.node.name}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member that lets everybody in; tests leave it running."""
    with EtcdCluster(tmp_path_factory.mktemp("alone")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """Three members; tests leave all of them running."""
    with EtcdCluster(tmp_path_factory.mktemp("three"), 3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member with certificates and users; tests leave it running."""
    with EtcdCluster(tmp_path_factory.mktemp("guarded"), tls=True, password=PASSWORD) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member with users and no certificates, so that a test can look at what is said; tests leave it running."""
    with EtcdCluster(tmp_path_factory.mktemp("users"), password=PASSWORD) as cluster:
        yield cluster


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """The endpoint of a server on this machine that gives each connection to the handler."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def receive_request(stream: trio.SocketStream) -> bytes:
    """One HTTP request, whole."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += await stream.receive_some()
    head, _, body = received.partition(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < length:
        body += await stream.receive_some()
    return head + b"\r\n\r\n" + body


class Between:
    """A handler: brings requests to an endpoint, and keeps back the answers to those whose path is in `keeping`.

    `paths` are those of all requests so far. Where an answer is kept back the connection is closed, or with `hanging` left
    as it is.
    """

    def __init__(self, endpoint: str, *, keeping: tuple[str, ...] = (), hanging: bool = False) -> None:
        """To one endpoint without TLS."""
        self.paths: list[str] = []
        self.keeping = keeping
        self._host, _, self._port = endpoint.removeprefix("http://").partition(":")
        self._hanging = hanging

    async def __call__(self, stream: trio.SocketStream) -> None:
        """One request and its answer."""
        async with stream, await trio.open_tcp_stream(self._host, int(self._port)) as upstream:
            request = await receive_request(stream)
            path = request.split()[1].decode()
            self.paths.append(path)
            await upstream.send_all(request)
            # Each request asks for the connection to be closed after it.
            answer = b"".join([part async for part in upstream])
            assert answer
            if path not in self.keeping:
                await stream.send_all(answer)
            elif self._hanging:
                await trio.sleep_forever()


def written(path: Path, text: str) -> Path:
    """The file, with that in it."""
    path.write_text(text)
    return path
