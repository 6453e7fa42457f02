"""The inside of a link: TLS between what is said and what the wire carries, frames out of what arrives. It has no socket.

One thread may seal while another opens: OpenSSL wants them one after the other, so both hold `lock`, which is also that of the
order in which sealed bytes go out.
"""

import ssl
import threading
from collections.abc import Iterator
from typing import Final

from mirrorfs.core import wire
from mirrorfs.core.wire import Frame
from mirrorfs.errors import LinkLostError, ProtocolError

#: A large frame is sealed in pieces of this size: the other node opens one while the next is sealed.
_PIECE: Final = 256 << 10
_ROOM: Final = 512 << 10
#: What fits into one record of TLS.
_RECORD: Final = 16 << 10
_NOT_TLS: Final = frozenset(
    ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "UNKNOWN_PROTOCOL", "BAD_RECORD_TYPE")
)
#: One side insists on TLS 1.3, the other on the suite of `encryption = "off"`.
_OTHER_ENCRYPTION: Final = frozenset(("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_SHARED_CIPHER"))


class Channel:
    """One end of a TLS session over some connection, from its handshake on."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.lock = threading.Lock()
        self._from_wire = ssl.MemoryBIO()
        self._to_wire = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._from_wire, self._to_wire, server_side=server_side)
        self._decoder = wire.Decoder()
        self._room = memoryview(bytearray(_ROOM))
        self.version = wire.OLDEST  #: of the protocol, once both preambles are known

    # ---- the handshake

    def shake_hands(self) -> bool:
        """Go on with the handshake; False while the other side has to say more. Then, and at the end, `to_send` has something.

        Raises ProtocolError, and `to_send` may have why for the other side.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise ProtocolError(_reason(error)) from None
        return True

    def to_send(self) -> bytes:
        """What has to go out besides what `seal` gives."""
        return self._to_wire.read()

    def arrived(self, data: bytes | memoryview) -> None:
        """These bytes came from the wire; `lock` is held, or there is no other thread yet."""
        self._from_wire.write(data)

    # ---- what is said

    def seal(self, *parts: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """What has to go out to say this, piece by piece, to be sent as it comes; `lock` is held meanwhile."""
        write, to_wire = self._tls.write, self._to_wire
        if sum(map(len, parts)) <= _RECORD:
            parts = (b"".join(parts),)
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[write(left) :]
                if to_wire.pending >= _PIECE:
                    yield to_wire.read()
        if to_wire.pending:
            yield to_wire.read()

    @property
    def room(self) -> memoryview:
        """Where to put what comes from the wire, for `received`."""
        return self._room

    def received(self, count: int) -> Iterator[Frame]:
        """So many bytes have been put into `room`: the frames that they complete, whose payloads are good until the next one.

        Raises ProtocolError for what is no frame or was changed on its way, LinkLostError when the other side has said that
        it will say no more.
        """
        decoder, read, from_wire, held = self._decoder, self._tls.read, self._from_wire, self._tls.pending
        with self.lock:
            from_wire.write(self._room[:count])
        if not count:
            yield from decoder.received(0)  # what came with the greeting
        while from_wire.pending or held():  # to ask in vain is dear: it raises
            space = decoder.space()
            try:
                with self.lock:
                    size: int = read(len(space), space)  # type: ignore[assignment]  # typeshed: it is bytes without a buffer
            except ssl.SSLWantReadError:
                return
            except ssl.SSLError as error:
                raise ProtocolError(_reason(error)) from None
            if not size:
                raise LinkLostError("the connection was closed")
            yield from decoder.received(size)

    def plain(self, size: int) -> bytes:
        """At most so many bytes of what was said before there are frames; empty if nothing is there yet."""
        try:
            return self._tls.read(size)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLError as error:
            raise ProtocolError(_reason(error)) from None

    @property
    def incomplete(self) -> bool:
        """Whether a part of a frame or of a record has arrived: an end now means that it was cut off."""
        return self._decoder.incomplete or self._from_wire.pending > 0


def _reason(error: ssl.SSLError) -> str:
    """What went wrong, for a log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not that of the other node ({error.verify_message}): "
            "if that node was set up again, join the nodes again (`mirrorfs init`, `mirrorfs join`)"
        )
    reason = error.reason or str(error)
    if reason in _NOT_TLS:
        return "it does not speak TLS: it is no mirrorfs node, or one of a version before TLS"
    if reason in _OTHER_ENCRYPTION:
        return "[security] encryption is on for one node and off for the other: make it the same on both"
    if "ALERT" in reason or "CERTIFICATE" in reason:
        return f"it does not accept this node's certificate ({_words(reason)}): join the nodes again"
    return f"what it sent was changed on its way, or is no TLS ({_words(reason)})"


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")
