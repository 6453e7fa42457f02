"""What is said on a link about who has an address: ARP for IPv4 (RFC 826, RFC 5227), neighbour discovery for IPv6 (RFC 4861).

Everything here blocks, for a bounded time, and belongs into a worker thread: the kernel takes milliseconds to close a packet
socket. A link without MACs (loopback, tunnels) has neither ARP nor neighbour discovery: nothing is sent there, nobody is found.
"""

import contextlib
import errno
import fcntl
import ipaddress
import selectors
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# How often a question is sent within the time that there is for the answer: one lost packet must not mean "nobody".
_PROBES: Final = 3

_ETH_P_ARP: Final = 0x0806
_ARPHRD_ETHER: Final = 1
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_ARP_REQUEST, _ARP_REPLY = 1, 2
_BROADCAST: Final = b"\xff" * 6
_NO_MAC: Final = bytes(6)
_NO_IP: Final = bytes(4)

_NEIGHBOUR: Final = struct.Struct("!BBHI16s")
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT = 135, 136
_OVERRIDE: Final = 0x20000000
_SOURCE_MAC, _TARGET_MAC = 1, 2
_HOP_LIMIT: Final = 255
_ICMPV6_FILTER: Final = 1
_ALL_NODES: Final = "ff02::1"

_SIOCGIFFLAGS, _SIOCGIFHWADDR = 0x8913, 0x8927
_IFF_UP, _IFF_RUNNING = 0x1, 0x40


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as it is now. `mac` is empty where the link has none; `running` is false without carrier."""

    name: str
    index: int
    mac: bytes
    up: bool
    running: bool


@dataclass(frozen=True, slots=True)
class Target:
    """An address and the link on which it is asked for or announced."""

    ip: IPAddress
    link: Link


def find_link(name: str) -> Link:
    """The interface of that name; raises OSError (ENODEV) if there is none. Does not block."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # First, since it only looks: asked by name for what is not there, the others run modprobe (dev_load in the kernel).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        request = struct.pack("16s240x", name.encode())
        (flags,) = struct.unpack_from("@H", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
        kind, mac = struct.unpack_from("@H6s", fcntl.ioctl(sock, _SIOCGIFHWADDR, request), 16)
        index = socket.if_nametoindex(name)
    return Link(name, index, mac if kind == _ARPHRD_ETHER else b"", bool(flags & _IFF_UP), bool(flags & _IFF_RUNNING))


def show_mac(mac: bytes) -> str:
    """A MAC as people write it."""
    return mac.hex(":")


def announce(target: Target) -> None:
    """Tell everyone on the link that this machine has the address; raises OSError if that cannot be sent.

    IPv4: a gratuitous ARP as a request and as a reply, since some listen to one of them only. IPv6: an unsolicited
    neighbour advertisement with the override flag; the address must be on the interface, since it is the sender.
    """
    if not target.link.mac:
        return
    if target.ip.version == 4:
        with _arp_socket(target.link) as sock:
            for packet in _gratuitous_arp(target.ip, target.link.mac):
                _send_arp(sock, target.link, packet)
        return
    with _icmpv6_socket(target.link) as sock:
        # The address itself and not the link-local one, which the kernel may still be testing just after the link came up.
        sock.bind((str(target.ip), 0, 0, target.link.index))
        sock.sendto(_advertisement(target.ip, target.link.mac), (_ALL_NODES, 0, 0, target.link.index))


def probe(targets: Sequence[Target], wait_s: float) -> list[tuple[IPAddress, bytes]]:
    """The machines, by MAC, that say within `wait_s` that they have one of the addresses; takes all of that time.

    Everything is asked at the same time: IPv4 with ARP probes (no sender address, so that nobody learns a wrong one from
    them), IPv6 with neighbour solicitations. What this machine has itself is not found. Raises OSError, with the name of
    the interface as its filename, if nothing could be asked there.
    """
    own = _own_macs()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        askers = [stack.enter_context(_Asker(link, version, ips)) for link, version, ips in _by_link(targets)]
        for asker in askers:
            selector.register(asker.socket, selectors.EVENT_READ, asker)
        found: set[tuple[IPAddress, bytes]] = set()
        begin = time.monotonic()
        for place in range(_PROBES):
            for asker in askers:
                asker.ask()
            until = begin + wait_s * (place + 1) / _PROBES
            while (rest := until - time.monotonic()) > 0:
                for key, _ in selector.select(rest):
                    found.update(key.data.hear())
        for asker in askers:
            asker.check()
    return sorted(((ip, mac) for ip, mac in found if mac not in own), key=lambda claim: (claim[0].version, claim))


def _by_link(targets: Sequence[Target]) -> Iterator[tuple[Link, int, list[IPAddress]]]:
    for link, version in dict.fromkeys((target.link, target.ip.version) for target in targets if target.link.mac):
        yield link, version, [target.ip for target in targets if (target.link, target.ip.version) == (link, version)]


class _Asker:
    """The questions of one family on one link, and the answers to them."""

    def __init__(self, link: Link, version: int, ips: Sequence[IPAddress]) -> None:
        self._link, self._version = link, version
        self._ips = {ip.packed: ip for ip in ips}
        self._unasked = dict.fromkeys(ips, OSError(errno.EIO, "nothing was sent"))
        self.socket = _arp_socket(link) if version == 4 else _icmpv6_socket(link)
        self.socket.setblocking(False)

    def __enter__(self) -> "_Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self) -> None:
        for ip in self._ips.values():
            try:
                if self._version == 4:
                    _send_arp(self.socket, self._link, _arp(_ARP_REQUEST, self._link.mac, _NO_IP, _NO_MAC, ip.packed))
                else:
                    group = (_solicited_node(ip), 0, 0, self._link.index)
                    self.socket.sendto(_solicitation(ip, self._link.mac), group)
            except OSError as error:
                # No room, or no carrier: as good as a packet that was lost on the way.
                if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                    if ip in self._unasked:
                        self._unasked[ip] = error
                    continue
            self._unasked.pop(ip, None)

    def hear(self) -> Iterator[tuple[IPAddress, bytes]]:
        """What has arrived: addresses that were asked for, and who has them."""
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(2048, 256)
            except BlockingIOError:
                return
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._link.name) from None
            claim = _claim_in_arp(data) if self._version == 4 else _claim_in_advertisement(data, ancillary)
            if claim is not None and claim[0] in self._ips:
                yield self._ips[claim[0]], claim[1]

    def check(self) -> None:
        for error in self._unasked.values():
            raise OSError(error.errno, error.strerror, self._link.name)


def _own_macs() -> set[bytes]:
    # Of all interfaces: Linux answers ARP for each of its addresses on whichever interface the question arrives.
    macs: set[bytes] = set()
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):  # gone meanwhile
            macs.add(find_link(name).mac)
    return macs


def _arp_socket(link: Link) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    try:
        sock.bind((link.name, _ETH_P_ARP))
        sock.settimeout(1.0)
    except BaseException:
        sock.close()
        raise
    return sock


def _send_arp(sock: socket.socket, link: Link, packet: bytes) -> None:
    sock.sendto(packet, (link.name, _ETH_P_ARP, 0, _ARPHRD_ETHER, _BROADCAST))


def _arp(kind: int, sender_mac: bytes, sender_ip: bytes, target_mac: bytes, target_ip: bytes) -> bytes:
    return _ARP.pack(_ARPHRD_ETHER, 0x0800, 6, 4, kind, sender_mac, sender_ip, target_mac, target_ip)


def _gratuitous_arp(ip: IPAddress, mac: bytes) -> tuple[bytes, bytes]:
    # Linux takes a reply for gratuitous only if its target MAC is the sender's too (arp_is_garp in net/ipv4/arp.c).
    return (
        _arp(_ARP_REQUEST, mac, ip.packed, _NO_MAC, ip.packed),
        _arp(_ARP_REPLY, mac, ip.packed, mac, ip.packed),
    )


def _claim_in_arp(data: bytes) -> tuple[bytes, bytes] | None:
    """Whoever sends from an address says that it has it, with a request as well as with a reply (RFC 5227, 2.1.1)."""
    if len(data) < _ARP.size:
        return None
    hardware, protocol, mac_size, ip_size, _, mac, ip, _, _ = _ARP.unpack_from(data)
    return (ip, mac) if (hardware, protocol, mac_size, ip_size) == (_ARPHRD_ETHER, 0x0800, 6, 4) else None


def _icmpv6_socket(link: Link) -> socket.socket:
    """Sends to groups on that link, and hears neighbour advertisements from it; the kernel does the checksums."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    try:
        # One bit for each type that is not wanted (RFC 3542, 3.2); before the rest, or others might already be waiting.
        wanted = 1 << _NEIGHBOUR_ADVERTISEMENT
        sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMPV6_FILTER, _filter(wanted))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link.name.encode())
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, link.index)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, _HOP_LIMIT)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        sock.settimeout(1.0)
    except BaseException:
        sock.close()
        raise
    return sock


def _filter(wanted: int) -> bytes:
    blocked = ~wanted & ((1 << 256) - 1)
    return struct.pack("=8I", *((blocked >> (32 * word)) & 0xFFFFFFFF for word in range(8)))


def _solicited_node(ip: IPAddress) -> str:
    return str(ipaddress.IPv6Address(ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + ip.packed[13:]))


def _solicitation(ip: IPAddress, mac: bytes) -> bytes:
    return _NEIGHBOUR.pack(_NEIGHBOUR_SOLICITATION, 0, 0, 0, ip.packed) + bytes((_SOURCE_MAC, 1)) + mac


def _advertisement(ip: IPAddress, mac: bytes) -> bytes:
    return _NEIGHBOUR.pack(_NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE, ip.packed) + bytes((_TARGET_MAC, 1)) + mac


def _claim_in_advertisement(data: bytes, ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[bytes, bytes] | None:
    """The target of an advertisement and its MAC, which every answer to a question to a group has (RFC 4861, 4.4)."""
    hop_limits = [value for level, kind, value in ancillary if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT)]
    # Whatever has been routed has a smaller hop limit: what comes from afar says nothing about this link.
    if hop_limits != [struct.pack("@i", _HOP_LIMIT)] or len(data) < _NEIGHBOUR.size:
        return None
    kind, _, _, _, ip = _NEIGHBOUR.unpack_from(data)
    options = data[_NEIGHBOUR.size :]
    while len(options) >= 8 and options[1]:
        if options[0] == _TARGET_MAC and options[1] == 1:
            return (ip, options[2:8]) if kind == _NEIGHBOUR_ADVERTISEMENT else None
        options = options[8 * options[1] :]
    return None
