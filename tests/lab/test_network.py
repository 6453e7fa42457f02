"""The lab's network, with real namespaces."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.errors import UsageError
from mirrorfs.lab.network import ADDRESSES, Network

pytestmark = pytest.mark.root

ECHO_SERVER = """
import socket, sys, threading
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((sys.argv[1], 9))
tcp = socket.create_server((sys.argv[1], 9))
def datagrams():
    while True:
        udp.sendto(*udp.recvfrom(100))
threading.Thread(target=datagrams, daemon=True).start()
print("ready", flush=True)
while True:
    connection, _ = tcp.accept()
    connection.sendall(connection.recv(100))
    connection.close()
"""

# Prints what a sender sees: the echo, "silence", or the name of the error.
CLIENT = """
import socket, sys
kind, address = sys.argv[1:]
try:
    if kind == "tcp":
        link = socket.create_connection((address, 9), timeout=0.4)
    else:
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        link.settimeout(0.4)
        link.connect((address, 9))
    link.sendall(b"hello")
    print(link.recv(100).decode())
except TimeoutError:
    print("silence")
except OSError as error:
    print(type(error).__name__)
"""

# Sends one datagram from where nobody answers; what arrives is seen by the listener.
DATAGRAM = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(sys.argv[2].encode(), (sys.argv[1], 10))
"""

LISTENER = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((sys.argv[1], 10))
print("ready", flush=True)
while True:
    print(udp.recv(100).decode(), flush=True)
"""


def python(network: Network, host: str, program: str, *arguments: str) -> list[str]:
    return [*network.entering(host), sys.executable, "-c", program, *arguments]


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "ready"; it is ended after a while, so that who waits for its next line fails."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(20, process.kill)
        watchdog.start()
        try:
            assert next_line(process) == "ready"
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network(f"mfs-test{os.getpid()}")
    network.create()
    try:
        yield network
    finally:
        network.remove()


@pytest.fixture
def echoes(network: Network) -> Iterator[None]:
    with contextlib.ExitStack() as servers:
        for host, address in ADDRESSES.items():
            servers.enter_context(running(python(network, host, ECHO_SERVER, address)))
        yield


def ask(network: Network, kind: str, sender: str, receiver: str) -> str:
    command = python(network, sender, CLIENT, kind, ADDRESSES[receiver])
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def send(network: Network, sender: str, receiver: str, text: str) -> None:
    subprocess.run(python(network, sender, DATAGRAM, ADDRESSES[receiver], text), check=True)


BOTH_WAYS = [("one", "two"), ("two", "one")]


@pytest.mark.usefixtures("echoes")
@pytest.mark.parametrize(("sender", "receiver"), BOTH_WAYS)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_each_host_reaches_the_other_and_itself(network: Network, kind: str, sender: str, receiver: str) -> None:
    assert ask(network, kind, sender, receiver) == "hello"
    assert ask(network, kind, sender, sender) == "hello"


@pytest.mark.usefixtures("echoes")
@pytest.mark.parametrize("cut_sender", [None, "one", "two"])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_cut_is_silence_on_both_sides_until_it_is_healed(network: Network, kind: str, cut_sender: str | None) -> None:
    network.cut(cut_sender)
    assert [ask(network, kind, *way) for way in BOTH_WAYS] == ["silence", "silence"]
    assert ask(network, kind, "two", "two") == "hello"
    network.heal()
    assert [ask(network, kind, *way) for way in BOTH_WAYS] == ["hello", "hello"]


@pytest.mark.parametrize(("sender", "receiver"), BOTH_WAYS)
def test_a_cut_in_one_direction_leaves_the_other_one_open(network: Network, sender: str, receiver: str) -> None:
    with (
        running(python(network, sender, LISTENER, ADDRESSES[sender])) as at_sender,
        running(python(network, receiver, LISTENER, ADDRESSES[receiver])) as at_receiver,
    ):
        network.cut(sender)
        send(network, sender, receiver, "lost")
        send(network, receiver, sender, "arrives")
        assert next_line(at_sender) == "arrives"
        network.heal()
        send(network, sender, receiver, "after healing")
        assert next_line(at_receiver) == "after healing"


def test_cuts_add_up_and_can_be_repeated_and_so_can_healing(network: Network) -> None:
    network.heal()
    assert network.cut_senders() == []
    network.cut("one")
    network.cut("one")
    assert network.cut_senders() == ["one"]
    network.cut("two")
    assert network.cut_senders() == ["one", "two"]
    network.heal()
    network.heal()
    assert network.cut_senders() == []


def test_an_open_connection_survives_a_short_cut(network: Network) -> None:
    server = """
import socket, sys
listener = socket.create_server((sys.argv[1], 11))
print("ready", flush=True)
connection, _ = listener.accept()
while text := connection.recv(100):
    connection.sendall(text)
"""
    client = """
import socket, sys
link = socket.create_connection((sys.argv[1], 11))
print("ready", flush=True)
for line in sys.stdin:
    link.sendall(line.encode())
    print(link.recv(100).decode().strip(), flush=True)
"""
    with (
        running(python(network, "two", server, ADDRESSES["two"])),
        running(python(network, "one", client, ADDRESSES["two"])) as caller,
    ):
        assert caller.stdin is not None
        network.cut()
        print("sent during the cut", file=caller.stdin, flush=True)
        network.heal()
        assert next_line(caller) == "sent during the cut"


def test_the_processes_on_a_host_are_found_and_no_others(network: Network) -> None:
    assert network.pids("one") == []
    with running(python(network, "one", ECHO_SERVER, ADDRESSES["one"])):
        (pid,) = network.pids("one")
        assert b"socket" in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert network.pids("two") == []


def test_removing_clears_what_is_left_of_a_network_and_needs_none() -> None:
    network = Network(f"mfs-left{os.getpid()}")
    network.remove()
    network.create()
    subprocess.run(["ip", "netns", "del", network.namespace("two")], check=True)
    assert not network.exists()
    network.remove()
    network.create()
    assert network.exists()
    network.remove()
    assert not network.exists()
    assert network.pids("one") == []


def test_two_networks_with_the_same_addresses_do_not_meet(network: Network) -> None:
    other = Network(f"mfs-more{os.getpid()}")
    other.create()
    try:
        with running(python(other, "two", ECHO_SERVER, ADDRESSES["two"])):
            assert ask(other, "tcp", "one", "two") == "hello"
            assert ask(network, "tcp", "one", "two") == "ConnectionRefusedError"
    finally:
        other.remove()


def test_an_unknown_host_is_a_usage_error(network: Network) -> None:
    with pytest.raises(UsageError, match="three"):
        network.namespace("three")
    with pytest.raises(UsageError, match="three"):
        network.cut("three")
