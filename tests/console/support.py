"""A way into a host of a lab: a port here that leads to one there."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from mirrorfs.lab.pair import Host

#: A socket belongs to the network namespace in which it was made: this program accepts here and connects there.
_RELAY = """
import socket, sys, threading
listening = socket.socket(fileno=int(sys.argv[1]))
def copy(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    for each in (source, target):
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
while True:
    here, _ = listening.accept()
    try:
        there = socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=5)
    except OSError:
        here.close()
        continue
    there.settimeout(None)
    for ends in ((here, there), (there, here)):
        threading.Thread(target=copy, args=ends, daemon=True).start()
"""


@contextlib.contextmanager
def way_to(host: Host, port: int) -> Iterator[int]:
    """A port on this machine's loopback that leads to `port` on that of a host."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.set_inheritable(True)
        relay = host.popen(
            *(sys.executable, "-c", _RELAY, str(listening.fileno()), str(port)),
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
        )
        try:
            yield listening.getsockname()[1]
        finally:
            relay.kill()
            relay.wait()
