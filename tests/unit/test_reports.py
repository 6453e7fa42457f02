"""What a peer reports is refused unless it can mean something: a name that is more than a name would lead out of the tree."""

from typing import Any

import msgpack
import pytest
from pyroaring import BitMap64

from mirrorfs.core.wire import Frame, Kind
from mirrorfs.errors import ProtocolError
from mirrorfs.resync import reports

_NONE = BitMap64().serialize()
_NOT_NAMES = [b"", b".", b"..", b"../x", b"a/b", b"a\0", b"n" * 256, "name", 5, None]
_NOT_IDS = [0, -1, 1 << 63, True, b"5", None]


def _wanted(content: Any) -> Frame:
    return Frame(Kind.WANTED, payload=msgpack.packb(content))


def test_what_is_wanted_comes_through() -> None:
    wanted: list[tuple[int, list[bytes] | None]] = [(5, [b"a", b"b"]), (6, None)]
    messages = list(reports.pack_wanted(wanted))
    assert [reports.unpack_wanted(_wanted(message)) for message in messages] == [[(5, {b"a", b"b"}), (6, None)]]


def test_wanted_names_travel_in_messages_of_bounded_size() -> None:
    names = [b"%d" % number for number in range(4000)]
    assert len(list(reports.pack_wanted([(number, names) for number in range(5, 10)]))) == 5


@pytest.mark.parametrize(
    "content",
    [
        *([[5, [name]]] for name in _NOT_NAMES),
        *([[number, [b"a"]]] for number in _NOT_IDS),
        *(None, 5, [5], [[5]], [[5, 7]], [[5, [b"a"], 1]]),
    ],
)
def test_what_cannot_be_wanted_is_refused(content: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed WANTED"):
        reports.unpack_wanted(_wanted(content))


@pytest.mark.parametrize(
    "item",
    [
        *([[(5, 1, name)], 5, _NONE, _NONE, 7] for name in _NOT_NAMES),
        *([[], 5, [name]] for name in _NOT_NAMES),
        *([[], number, _NONE, _NONE, 7] for number in _NOT_IDS),
        *([[], 5, _NONE, _NONE, tail] for tail in (-1, "7", None, 7.0, True)),
        *([[], 5, b"no bitmap", _NONE, 7], [5], 5, None),
    ],
)
def test_what_cannot_be_reported_is_refused(item: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed HOT"):
        reports.unpack([[item]])
