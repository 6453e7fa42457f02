"""Sockets that hear one address only: the kernel drops what comes from any other, before it costs this process anything."""

import ctypes
import ipaddress
import socket
import struct
from typing import Any, Final, Protocol

_SO_ATTACH_FILTER: Final = 26
#: linux/filter.h: one instruction; a program is their number and a pointer.
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("@HP")
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALL: Final = 0x7FFFFFFF
#: Offsets from here on are counted from the IP header.
_FROM_IP_HEADER: Final = 0xFFF00000
_SOURCE_AT: Final = {4: 12, 6: 8}


class Socket(Protocol):
    """The standard library's, or trio's."""

    def setsockopt(self, level: int, option: int, value: Any, /) -> None:
        """As setsockopt(2)."""


def only_from(listening: Socket, address: str) -> None:
    """Let a TCP or UDP socket hear nobody but `address`; a host name that may change its mind is let be. Raises OSError."""
    try:
        source = ipaddress.ip_address(address)
    except ValueError:
        return
    at = _FROM_IP_HEADER + _SOURCE_AT[source.version]
    words = struct.unpack(f"!{len(source.packed) // 4}I", source.packed)
    steps = b""
    for number, word in enumerate(words):
        steps += _INSTRUCTION.pack(_LOAD_WORD, 0, 0, at + 4 * number)
        # Past what is left of these pairs and the return of all, to that of nothing.
        steps += _INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 2 * (len(words) - number) - 1, word)
    steps += _INSTRUCTION.pack(_RETURN, 0, 0, _ALL) + _INSTRUCTION.pack(_RETURN, 0, 0, 0)
    program = ctypes.create_string_buffer(steps, len(steps))
    told = _PROGRAM.pack(len(steps) // _INSTRUCTION.size, ctypes.addressof(program))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, told)
