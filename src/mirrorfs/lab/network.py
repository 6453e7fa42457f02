"""The network of a lab: a network namespace for each of two hosts, a cable between them, and cuts in that cable.

Inside, every lab looks the same: the hosts have the addresses of `ADDRESSES` on `INTERFACE`. Outside, the names of the
namespaces tell the labs of one machine apart.
"""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute, netns

from mirrorfs.errors import MirrorfsError, UsageError

ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2"}
PREFIX_LENGTH = 24
INTERFACE = "eth0"
#: The third host, if there is one (`public`).
DESK = "desk"

_NAMESPACES = Path("/run/netns")
_CUT_TABLE = "inet mirrorfs_lab_cut"


@dataclass(frozen=True, slots=True)
class Network:
    """The two hosts whose namespaces are called `PREFIX-one` and `PREFIX-two`; both exist after `create`."""

    prefix: str

    def namespace(self, host: str) -> str:
        """The name of the host's namespace, as `ip netns` knows it; raises UsageError for an unknown host."""
        if host not in (*ADDRESSES, DESK):
            raise UsageError(f"there is no node {host!r} in a lab; the nodes are {' and '.join(ADDRESSES)}")
        return f"{self.prefix}-{host}"

    def entering(self, host: str) -> list[str]:
        """The words to put before a command, so that it runs on the host.

        `nsenter` and not `ip netns exec`, which gives the command a mount namespace of its own: what is mounted by one
        process of a lab has to be seen by all the others.
        """
        return ["nsenter", f"--net={_NAMESPACES / self.namespace(host)}", "--"]

    def create(self) -> None:
        """Make both hosts and the cable; what stood there under the same names has to be removed before."""
        one, two = (self.namespace(host) for host in ADDRESSES)
        for namespace in (one, two):
            # Not pyroute2.netns.create: that forks this process, which may have threads.
            run("ip", "netns", "add", namespace)
        with IPRoute() as ip:
            cable_end = {"ifname": INTERFACE, "net_ns_fd": two}
            ip.link("add", ifname=INTERFACE, kind="veth", net_ns_fd=one, peer=cable_end)
        for host, address in ADDRESSES.items():
            _bring_up(self.namespace(host), address)

    def remove(self) -> None:
        """Take the namespaces away, and with them the cables; what is not there is no error.

        A namespace lives on, without a name, until the last process in it has ended: end those first.
        """
        for host in (*ADDRESSES, DESK):
            if (_NAMESPACES / self.namespace(host)).exists():
                run("ip", "netns", "del", self.namespace(host))

    def exists(self) -> bool:
        """True if both hosts are there."""
        return all((_NAMESPACES / self.namespace(host)).exists() for host in ADDRESSES)

    @property
    def has_desk(self) -> bool:
        """True if there is a third host."""
        return (_NAMESPACES / self.namespace(DESK)).exists()

    def pids(self, host: str) -> list[int]:
        """The processes on the host, whoever started them; empty if there is no such host now."""
        try:
            namespace = (_NAMESPACES / self.namespace(host)).stat()
        except FileNotFoundError:
            return []
        return [pid for pid in _all_pids() if _is_in(pid, namespace)]

    def cut(self, sender: str | None = None) -> None:
        """Let nothing that `sender` sends arrive at the other host; without a sender, nothing of either.

        As with a dead cable nobody is told: no reset, no ICMP message, no error at the sender, which is why the packets
        are dropped where they arrive (the output hook answers the sender with EPERM). Cuts add up until `heal`.
        """
        senders = list(ADDRESSES) if sender is None else [sender]
        for host in senders:
            self._nft(
                _other(host),
                _no_cut() + f"add table {_CUT_TABLE}\n"
                f"add chain {_CUT_TABLE} arriving {{ type filter hook input priority -500; }}\n"
                f'add rule {_CUT_TABLE} arriving iifname "{INTERFACE}" drop\n',
            )

    def heal(self) -> None:
        """Undo every cut; without one, nothing happens."""
        for host in ADDRESSES:
            self._nft(host, _no_cut())

    def cut_senders(self) -> list[str]:
        """The hosts of which nothing arrives at the other one now."""
        return [host for host in ADDRESSES if _CUT_TABLE in self._nft(_other(host), "list tables\n")]

    def _nft(self, host: str, commands: str) -> str:
        return run(*self.entering(host), "nft", "-f", "-", stdin=commands)


def _other(host: str) -> str:
    if host not in ADDRESSES:
        raise UsageError(f"there is no node {host!r} in a lab; the nodes are {' and '.join(ADDRESSES)}")
    return next(name for name in ADDRESSES if name != host)


def _no_cut() -> str:
    # One transaction: adding a table that is there is no error, and so deleting it never is one either.
    return f"add table {_CUT_TABLE}\ndelete table {_CUT_TABLE}\n"


def _bring_up(namespace: str, address: str) -> None:
    inside(namespace, lambda: configure(INTERFACE, address, PREFIX_LENGTH))


def configure(interface: str, address: str, prefix_length: int) -> None:
    """Bring an interface up, with its address, and the loopback with it, in the namespace of this thread."""
    with IPRoute() as ip:
        for name in ("lo", interface):
            ip.link("set", index=ip.link_lookup(ifname=name)[0], state="up")
        ip.addr("add", index=ip.link_lookup(ifname=interface)[0], address=address, prefixlen=prefix_length)


def inside(namespace: str, action: Callable[[], None]) -> None:
    """Do something in a namespace."""

    def enter() -> None:
        netns.setns(str(_NAMESPACES / namespace), flags=0)
        action()

    # A thread can be in another network namespace than its process, and this one ends when it is done. IPRoute's own way
    # in (`netns=`) forks this process, which may have threads.
    with ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(enter).result()


def _all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _is_in(pid: int, namespace: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), namespace)
    except OSError:  # ended meanwhile, or out of our sight in a container
        return False


def run(*command: str, stdin: str = "") -> str:
    """Run a program of the system and return what it printed; MirrorfsError if it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise MirrorfsError(f"{command[0]} is not installed (Debian: iproute2, util-linux, nftables)") from None
    except subprocess.CalledProcessError as error:
        raise MirrorfsError(f"`{' '.join(command)}` failed: {error.stderr.strip() or error.returncode}") from error
    return done.stdout
