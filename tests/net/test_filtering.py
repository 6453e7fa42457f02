"""A socket that hears one address only."""

import contextlib
import socket

import pytest

from mirrorfs.filtering import only_from


def calling(source: str, to: socket.socket) -> socket.socket:
    """A connection that is under way, from one of the loopback's addresses."""
    made = socket.socket(to.family)
    made.setblocking(False)
    made.bind((source, 0))
    with contextlib.suppress(BlockingIOError):
        made.connect(to.getsockname())
    return made


def test_connections_from_elsewhere_never_arrive() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        only_from(server, "127.0.0.2")
        with calling("127.0.0.3", server), calling("127.0.0.2", server), calling("127.0.0.4", server):
            connection, (source, _) = server.accept()
            connection.close()
            assert source == "127.0.0.2"
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


def test_datagrams_from_elsewhere_never_arrive() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        only_from(server, "127.0.0.2")
        for source in ("127.0.0.3", "127.0.0.2", "127.0.0.4"):
            with socket.socket(type=socket.SOCK_DGRAM) as sender:
                sender.bind((source, 0))
                sender.sendto(source.encode(), server.getsockname())
        server.setblocking(False)
        assert server.recv(100) == b"127.0.0.2"
        with pytest.raises(BlockingIOError):
            server.recv(100)


@pytest.mark.parametrize(("allowed", "arrives"), [("::1", True), ("::2", False), ("fd00::1", False)])
def test_all_of_an_ipv6_address_counts(allowed: str, arrives: bool) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        only_from(server, allowed)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", server.getsockname())
        server.setblocking(False)
        with contextlib.nullcontext() if arrives else pytest.raises(BlockingIOError):
            assert server.recv(100) == b"x"


def test_a_host_name_filters_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        only_from(server, "two.example.org")
        with calling("127.0.0.3", server):
            connection, _ = server.accept()
            connection.close()
