"""Somebody on the network of the nodes who has no keys: one program for each thing that he can do.

`python -m mirrorfs.lab.attackers KIND TARGET PORT SECONDS [SOURCE]` does it until the time is over and prints how often it was
done. It is meant for a host of a lab, whose other host has the address TARGET. SOURCE is the address that is used.
"""

import random
import selectors
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from mirrorfs.lab.network import INTERFACE

CONNECTIONS: Final = 1000
_DIALLERS: Final = 2
_BYTE_EVERY_S: Final = 0.2
_PER_SECOND: Final = 2000
_MTU: Final = 1514
_ALL_PROTOCOLS: Final = 3


class Attack:
    """Whom it is against, from which address, and when it ends."""

    def __init__(self, target: str, port: int, seconds: float, source: str) -> None:
        self.target, self.port, self.source = target, port, source
        self.ends_at = time.monotonic() + seconds
        self.count = 0

    @property
    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self.ends_at

    def dial(self) -> socket.socket:
        """A connection that is being made."""
        made = socket.socket()
        made.setblocking(False)
        made.bind((self.source, 0))
        made.connect_ex((self.target, self.port))
        return made


def connections(attack: Attack) -> None:
    """A thousand of them, which say nothing; one that is hung up on is made anew."""
    with selectors.DefaultSelector() as selector:
        for _ in range(CONNECTIONS):
            selector.register(attack.dial(), selectors.EVENT_READ)
            attack.count += 1
            time.sleep(0.001)
        while attack.goes_on:
            for key, _ in selector.select(0.1):
                made: socket.socket = key.fileobj  # type: ignore[assignment]
                with suppress(OSError):
                    if made.recv(4096):
                        continue
                selector.unregister(made)
                made.close()
                selector.register(attack.dial(), selectors.EVENT_READ)
                attack.count += 1


def slow_handshakes(attack: Attack) -> None:
    """A thousand connections that say a first message of TLS, one byte at a time."""
    hello = _hello()
    held = {attack.dial(): 0 for _ in range(CONNECTIONS)}
    while attack.goes_on:
        for made, said in list(held.items()):
            try:
                made.send(hello[said : said + 1])
                held[made] = min(said + 1, len(hello) - 2)
                attack.count += 1
            except BlockingIOError:
                continue
            except OSError:
                del held[made]
                made.close()
                held[attack.dial()] = 0
        time.sleep(_BYTE_EVERY_S)


def wrong_certificates(attack: Attack) -> None:
    """Handshakes with a certificate that nobody knows, one after the other from two threads, which is more than are let in."""
    with tempfile.TemporaryDirectory() as directory:
        key, certificate = Path(directory) / "key.pem", Path(directory) / "certificate.pem"
        making = (
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=two",
        )
        subprocess.run((*making, "-keyout", str(key), "-out", str(certificate)), check=True, capture_output=True)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(certificate, key)

    def dial() -> None:
        while attack.goes_on:
            with suppress(OSError), socket.create_connection((attack.target, attack.port), 3, (attack.source, 0)) as plain:
                plain.settimeout(3)
                with context.wrap_socket(plain) as made:
                    attack.count += 1
                    made.recv(1)

    threads = [threading.Thread(target=dial) for _ in range(_DIALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def captured_frames(attack: Attack) -> None:
    """What this host has sent within a second, of link and heartbeats, again and again: as it was, and in another order."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)) as cable:
        cable.bind((INTERFACE, 0))
        cable.settimeout(0.1)
        captured, until = list[bytes](), time.monotonic() + 1
        while time.monotonic() < until and len(captured) < _PER_SECOND:
            with suppress(TimeoutError):
                frame, address = cable.recvfrom(1 << 16)
                if address[2] == socket.PACKET_OUTGOING and len(frame) <= _MTU:
                    captured.append(frame)
        chance = random.Random(1)  # noqa: S311  # the same in every run
        while attack.goes_on and captured:
            for order in (captured, chance.sample(captured, len(captured))):
                for number, frame in enumerate(order):
                    if not attack.goes_on:
                        break
                    with suppress(OSError):
                        cable.send(frame)
                        attack.count += 1
                    if number % (_PER_SECOND // 100) == 0:
                        time.sleep(0.01)


def _hello() -> bytes:
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    said = ssl.create_default_context().wrap_bio(into, out, server_hostname="two")
    with suppress(ssl.SSLWantReadError):
        said.do_handshake()
    return out.read()


KINDS: Final[dict[str, Callable[[Attack], None]]] = {
    "connections": connections,
    "slow-handshakes": slow_handshakes,
    "wrong-certificates": wrong_certificates,
    "captured-frames": captured_frames,
}


def main() -> None:
    """Attack, and say how often."""
    kind, target, port, seconds, *source = sys.argv[1:]
    attack = Attack(target, int(port), float(seconds), source[0] if source else "0.0.0.0")  # noqa: S104  # whichever is nearest
    KINDS[kind](attack)
    print(attack.count)


if __name__ == "__main__":
    main()
