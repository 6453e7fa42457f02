"""What a standby says of the time that it took: to a primary that understands it, and not to one of yesterday."""

from typing import Any

import pytest

from mirrorfs import standby
from mirrorfs.core import wire
from mirrorfs.core.wire import Decoder, Frame, Kind
from mirrorfs.standby import Standby

_READ_AT = 1000.0


class _Link:
    """Keeps what was sent; what is taken in now was read a while ago."""

    read_at = _READ_AT

    def __init__(self) -> None:
        self.frames = list[Frame]()

    def send(self, encoded: wire.Encoded) -> None:
        self.frames += Decoder().feed(b"".join(encoded))


def _standby(version: int) -> tuple[Standby, _Link]:
    """Only what acknowledging needs, with three changes applied."""
    made: Any = object.__new__(Standby)
    link = _Link()
    made._link, made._reign, made._is_timed = link, 1, version >= wire.TIMED
    made.target, made.applied, made._told, made._silent = None, 3, 0, 0
    return made, link


@pytest.fixture(autouse=True)
def _a_while_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "perf_counter", lambda: _READ_AT + 0.00125)


@pytest.mark.parametrize(("version", "said"), [(7, 0), (8, 1250)])
def test_an_acknowledgement_says_how_long_it_took_since_the_bytes_were_read(version: int, said: int) -> None:
    made, link = _standby(version)
    made.acknowledge()
    assert link.frames == [Frame(Kind.ACK, 3, said, 1)]
    made.acknowledge()
    assert len(link.frames) == 1


@pytest.mark.parametrize(("version", "said"), [(7, b""), (8, (251_250).to_bytes(4, "little"))])
def test_the_result_of_a_sync_says_how_long_it_took_since_that_was_read(version: int, said: bytes) -> None:
    made, link = _standby(version)
    made._tell_flushed(2, _READ_AT - 0.25)
    assert link.frames == [Frame(Kind.FLUSHED, 2, 3, 1, said)]
