"""What systemd is told, where it waits for it (sd_notify(3)): that a process is ready, that it ends, and that it is alive."""

import contextlib
import os
import socket
from typing import Final

import trio

#: A sign of life comes this often within the time after which systemd would kill: one that is late must not end a node.
_SIGNS: Final = 4


def notify(state: str) -> None:
    """Tell it, as in "READY=1"."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


async def show_life() -> None:
    """Tell it again and again that this process is alive, if it has asked for that (WatchdogSec=)."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(int(microseconds) / 1e6 / _SIGNS)
