"""A link with two nodes and a client on one switch, each in a network namespace, and `Addresses` driven on one of them.

Run as a program, this is the driver: it has one `Addresses`, takes the names of its methods as lines, and answers in JSON.
"""

import contextlib
import functools
import ipaddress
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio
from pyroute2 import IPRoute, netns

from mirrorfs import vip
from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import VipConfig
from mirrorfs.vip import Addresses

Result = TypeVar("Result")

DEADLINE_S = 30.0
HOSTS = {"one": 1, "two": 2, "client": 9}


def eventually(condition: Callable[[], object]) -> None:
    """Wait until it is true; fails the test if that takes too long."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Seen:
    """An address as the kernel has it. `valid_s` is None for ever; `lived_s` is from its creation to its last renewal."""

    address: str
    valid_s: int | None
    lived_s: float


class Bench:
    """The network; inside every host has `eth0` with 10.77.0.N/24 and fd77::N/64."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def entering(self, host: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace(host)}", "--"]

    def shell(self, host: str, command: str) -> str:
        done = subprocess.run([*self.entering(host), "sh", "-ec", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def create(self) -> None:
        for host in (*HOSTS, "switch"):
            subprocess.run(["ip", "netns", "add", self.namespace(host)], check=True)
        self.shell("switch", "ip link add br0 type bridge mcast_snooping 0; ip link set br0 up")
        for host, number in HOSTS.items():
            self.plug(host, "eth0")
            self.shell(host, f"ip address add 10.77.0.{number}/24 dev eth0")
            self.shell(host, f"ip address add fd77::{number}/64 dev eth0 nodad; ip link set lo up")

    def remove(self) -> None:
        for host in (*HOSTS, "switch"):
            if Path("/run/netns", self.namespace(host)).exists():
                subprocess.run(["ip", "netns", "del", self.namespace(host)], check=True)

    def plug(self, host: str, interface: str) -> None:
        """Give the host an interface on the switch; the other end there is called `HOST-INTERFACE`."""
        port, host_namespace = f"{host}-{interface}", self.namespace(host)
        self.shell("switch", f"ip link add {port} type veth peer name {interface} netns {host_namespace}")
        # Without duplicate address detection, which takes a second or two, IPv6 works at once.
        self.shell(host, f"echo 0 > /proc/sys/net/ipv6/conf/{interface}/accept_dad; ip link set {interface} up")
        self.shell("switch", f"ip link set {port} master br0 up")
        eventually(lambda: "LOWER_UP" in self.shell(host, f"ip link show {interface}"))

    def mac(self, host: str, interface: str = "eth0") -> str:
        (link,) = json.loads(self.shell(host, f"ip -j link show {interface}"))
        return str(link["address"])

    def inside(self, host: str, function: Callable[[], Result]) -> Result:
        """What the function returns in a thread that is on that host."""

        def enter() -> Result:
            netns.setns(f"/run/netns/{self.namespace(host)}", flags=0)
            return function()

        with ThreadPoolExecutor(max_workers=1) as executor:
            return executor.submit(enter).result()

    def addresses(self, host: str, interface: str = "eth0") -> list[Seen]:
        """All addresses of the interface, with prefix lengths, without the link-local one."""

        def look() -> list[Seen]:
            with IPRoute() as kernel:
                (index,) = kernel.link_lookup(ifname=interface)
                return [_seen(message) for message in kernel.get_addr(index=index)]

        return [seen for seen in self.inside(host, look) if not seen.address.startswith("fe80")]

    def virtual(self, host: str, interface: str = "eth0") -> list[str]:
        """The addresses of the interface that are not the host's own."""
        own = {f"10.77.0.{HOSTS[host]}/24", f"fd77::{HOSTS[host]}/64"}
        return sorted({seen.address for seen in self.addresses(host, interface)} - own)

    def resolve(self, host: str, address: str) -> None:
        """Send something there, so that the host has to find out who has the address."""
        family = socket.AF_INET if "." in address else socket.AF_INET6

        def send() -> None:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"hello", (address, 9))

        self.inside(host, send)
        eventually(lambda: self.neighbour(host, address))

    def neighbour(self, host: str, address: str) -> str:
        """The MAC that the host has for the address in its cache, or nothing."""
        entries = json.loads(self.shell(host, "ip -j neighbour show dev eth0"))
        return "".join(entry.get("lladdr", "") for entry in entries if entry["dst"] == address)

    def listening(self, host: str) -> contextlib.AbstractContextManager[socket.socket]:
        """A socket that hears all ARP that arrives at the host from now on."""

        def listen() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
            sock.bind(("eth0", 0x0806))
            sock.settimeout(DEADLINE_S)
            return sock

        return contextlib.closing(self.inside(host, listen))


def _seen(message: Any) -> Seen:
    life = message.get_attr("IFA_CACHEINFO")
    valid_s = life["ifa_valid"]
    return Seen(
        f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}",
        None if valid_s == 2**32 - 1 else valid_s,
        (life["tstamp"] - life["cstamp"]) / 100,
    )


class Driven:
    """The `Addresses` of one host, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._early: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def begin(self, method: str) -> None:
        assert self._process.stdin is not None
        print(method, file=self._process.stdin, flush=True)

    def result(self, method: str) -> Any:
        """What the method that was begun returns; what it raises is raised here."""
        assert self._process.stdout is not None
        while method not in self._early:
            line = self._process.stdout.readline()
            assert line, "the driver has ended"
            self._early.update(json.loads(line))
        answer = self._early.pop(method)
        if "error" in answer:
            raise MirrorfsError(answer["error"])
        return answer["result"]

    def call(self, method: str) -> Any:
        self.begin(method)
        return self.result(method)

    def troubles(self) -> list[str]:
        return list(self.call("troubles"))


@contextlib.contextmanager
def driven(
    bench: Bench,
    host: str,
    vips: Sequence[str],
    *,
    interface: str = "eth0",
    before: Sequence[str] = (),
    **options: Any,
) -> Iterator[Driven]:
    """A driver on the host. A VIP may be ADDRESS@INTERFACE; `options` are those of `_drive`, `before` goes before python."""
    pairs = [(vip if "@" in vip else f"{vip}@{interface}").split("@") for vip in vips]
    command = [*bench.entering(host), *before, sys.executable, "-W", "error", __file__, json.dumps({"vips": pairs, **options})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(2 * DEADLINE_S, process.kill)
        watchdog.start()
        try:
            yield Driven(process)
        finally:
            watchdog.cancel()
            process.kill()


async def _drive(
    vips: list[tuple[str, str]],
    up: str = "",
    down: str = "",
    hook_s: float = 30.0,
    announce_after_s: Sequence[float] = vip.ANNOUNCE_AFTER_S,
    valid_s: int = vip.VALID_S,
    stall: str = "",
) -> None:
    """`stall`: until this file is there the kernel seems not to answer when an IPv4 address is put on."""
    vars(vip).update(HOOK_S=hook_s, ANNOUNCE_AFTER_S=tuple(announce_after_s), VALID_S=valid_s)
    if stall:
        vars(vip).update(_keep_secondaries=lambda _: eventually(Path(stall).exists))
    configs = [VipConfig(ipaddress.ip_interface(address), interface) for address, interface in vips]
    addresses = Addresses(configs, up_command=up, down_command=down)
    troubles: list[str] = []
    addresses.on_trouble = troubles.append

    async def conflicts() -> list[tuple[str, str]]:
        return [(found.address, found.mac) for found in await addresses.conflicts()]

    async def value_of(function: Callable[[], Any]) -> Any:
        return function()

    methods: dict[str, Callable[[], Awaitable[Any]]] = {
        "raise_all": addresses.raise_all,
        "drop_all": addresses.drop_all,
        "conflicts": conflicts,
        "is_up": functools.partial(value_of, lambda: addresses.is_up),
        "macs": functools.partial(value_of, addresses.macs),
        "trouble": functools.partial(value_of, lambda: addresses.trouble),
        "threads": functools.partial(value_of, lambda: vars(addresses)["_limiter"].borrowed_tokens),
        "troubles": functools.partial(value_of, lambda: troubles),
    }

    async def answer(method: str) -> None:
        try:
            told = {"result": await methods[method]()}
        except MirrorfsError as error:
            told = {"error": str(error)}
        print(json.dumps({method: told}), flush=True)

    async with trio.open_nursery() as nursery:
        await nursery.start(addresses.run)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            nursery.start_soon(answer, line.strip())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(functools.partial(_drive, **json.loads(sys.argv[1])))
