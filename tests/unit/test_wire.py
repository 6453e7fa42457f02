"""Bytes and frames: every operation comes through whole, however the network cuts it; nothing malformed gets through."""

import struct
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core import operations as ops
from mirrorfs.core import wire
from mirrorfs.core.wire import Decoder, Frame, Kind
from mirrorfs.errors import ProtocolError

_U64 = st.integers(0, (1 << 64) - 1)
_I64 = st.integers(-(1 << 63), (1 << 63) - 1)
_IDS = st.integers(1, (1 << 63) - 1)
_NUMBERS = st.integers(0, (1 << 63) - 1)
_TIMES = st.integers(-(1 << 62), (1 << 64) - 2)
_DATA = st.binary(max_size=300)
_COPY_SIZES = st.integers(0, ops.MAX_COPY)
_NAMES = (
    st.one_of(st.binary(min_size=1, max_size=255), st.sampled_from([b"...", b".a", b"..a", b"\xff\n", b"n" * 255]))
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in (b".", b".."))
)
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(["file", "parent", "new_parent", "directory", "source"], _IDS),
    **dict.fromkeys(["name", "new_name"], _NAMES),
    **dict.fromkeys(["mode", "uid", "gid", "rdev", "size", "flags", "offset", "number", "new_from", "source_offset"], _NUMBERS),
    **dict.fromkeys(["atime_ns", "mtime_ns"], _TIMES),
    **dict.fromkeys(["data", "target", "value", "after"], _DATA),
    "entry": st.just(b"") | _NAMES,
    "path": st.lists(_NAMES, max_size=3).map(b"/".join),
    "ranges": st.lists(st.tuples(_NUMBERS, _NUMBERS), max_size=5).map(tuple),
    **dict.fromkeys(["data_only", "gone", "complete", "last"], st.booleans()),
    "xattrs": st.lists(st.tuples(_NAMES, _DATA), max_size=5).map(tuple),
    "names": st.lists(st.tuples(_NAMES, _NUMBERS), max_size=5).map(tuple),
}
_FIELDS["files"] = st.lists(
    st.builds(ops.WholeFile, **{field: _FIELDS[field] for field in ops.WholeFile._fields}), max_size=5
).map(tuple)
#: Fields that mean something else than those of the same name in other operations.
_OWN_FIELDS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    ops.Allocate: {"mode": st.sampled_from(sorted(ops.ALLOCATE_MODES))},
    ops.CopyRange: {"size": _COPY_SIZES},
    ops.Times: {"files": st.lists(st.tuples(_IDS, _TIMES), max_size=5).map(tuple)},
}


def _operations(kind: type) -> st.SearchStrategy[Any]:
    """Operations of one kind as a primary sends them."""
    if kind is ops.SetAttributes:
        optional = {field.name: st.none() | _FIELDS[field.name] for field in fields(kind) if field.name != "file"}
        return st.builds(kind, file=_IDS, **optional)
    strategies = _FIELDS | _OWN_FIELDS.get(kind, {})
    built = st.builds(kind, **{field.name: strategies[field.name] for field in fields(kind)})
    return built | built.map(lambda entry: replace(entry, parent=0, name=b"", file=1)) if kind is ops.Entry else built


OPERATIONS = st.one_of([_operations(kind) for kind in wire.KIND_OF])


def _bytes(operation: ops.Operation, sequence: int = 1) -> bytes:
    return b"".join(wire.encode_operation(operation, sequence))


def _one(data: bytes) -> Frame:
    (frame,) = Decoder().feed(data)
    return frame


def test_every_operation_has_a_kind_of_its_own() -> None:
    assert set(wire.KIND_OF) == set(get_args(ops.Operation))
    assert len(wire.OPERATION_OF) == len(wire.KIND_OF)


@pytest.mark.parametrize("kind", wire.KIND_OF)
def test_every_operation_comes_back_as_it_was_sent(kind: type) -> None:
    @given(_operations(kind), _U64)
    def comes_back(operation: ops.Operation, sequence: int) -> None:
        frame = _one(_bytes(operation, sequence))
        assert frame.sequence == sequence
        assert wire.decode_operation(frame) == operation

    comes_back()


@given(st.lists(OPERATIONS, max_size=5), st.data())
def test_frames_come_whole_however_the_network_cuts_the_bytes(sent: list[ops.Operation], data: st.DataObject) -> None:
    stream = b"".join(_bytes(operation, number) for number, operation in enumerate(sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder = Decoder()
    frames = [
        frame for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) for frame in decoder.feed(stream[start:end])
    ]
    assert [wire.decode_operation(frame) for frame in frames] == sent
    assert not decoder.incomplete


@given(OPERATIONS, OPERATIONS)
def test_a_decoder_that_is_fed_byte_by_byte_yields_each_frame_with_its_last_byte(
    first: ops.Operation, second: ops.Operation
) -> None:
    decoder = Decoder()
    for operation in (first, second):
        data = _bytes(operation)
        for position in range(len(data)):
            frames = list(decoder.feed(data[position : position + 1]))
            assert len(frames) == (position == len(data) - 1)
            assert decoder.incomplete == (position < len(data) - 1)
        assert wire.decode_operation(frames[0]) == operation


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_make_frames_that_were_checked_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        assert list(Decoder().feed(data)) == []


@given(st.sampled_from(sorted(Kind)), st.binary(max_size=100))
def test_a_payload_of_any_kind_makes_an_operation_or_a_protocol_error(kind: Kind, payload: bytes) -> None:
    try:
        operation = wire.decode_operation(Frame(kind, payload=payload))
    except ProtocolError:
        return
    assert type(operation) in wire.KIND_OF


_VALUES = st.recursive(
    st.none() | st.booleans() | _I64 | st.binary(max_size=9) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(sorted(wire.OPERATION_OF)), _VALUES)
def test_a_message_of_any_shape_makes_an_operation_or_a_protocol_error(kind: Kind, content: object) -> None:
    try:
        operation = wire.decode_operation(Frame(kind, payload=msgpack.packb(content)))
    except ProtocolError:
        return
    assert type(operation) in wire.KIND_OF


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Kind.UNLINK, []),
        (Kind.UNLINK, [1]),
        (Kind.UNLINK, [1, b"name", 3]),
        (Kind.UNLINK, None),
        (Kind.UNLINK, {}),
        (Kind.UNLINK, 7),
        (Kind.RENAME, [1, b"a"]),
        (Kind.MAKE_NODE, [1, b"a"]),
        (Kind.ENTRY, []),
        (Kind.ENTRY, [0] * 10),
        (Kind.ENTRY, [0] * 9 + [[1]]),
        (Kind.ENTRY, [0] * 9 + [[[b"name"]]]),
        (Kind.CHECKPOINT, [1]),
        (Kind.HELLO, []),
    ],
)
def test_a_message_that_is_not_of_its_kind_is_a_protocol_error(kind: Kind, content: object) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_operation(Frame(kind, payload=msgpack.packb(content)))


_SOUND: dict[type, ops.Operation] = {
    type(operation): operation
    for operation in (
        ops.Write(5, 0, b"data"),
        ops.MakeNode(1, b"name", 5, 0o100644, 0, 0, 0),
        ops.Symlink(1, b"name", 5, b"../target", 0, 0),
        ops.Link(5, 1, b"name"),
        ops.Unlink(1, b"name"),
        ops.RemoveDirectory(1, b"name"),
        ops.Rename(1, b"name", 1, b"new", 0),
        ops.SetAttributes(5, 0o600, 0, 0, 0, 0, 0),
        ops.SetXattr(5, b"user.name", b"value"),
        ops.RemoveXattr(5, b"user.name"),
        ops.Times(((5, 0), (6, -1))),
        ops.Allocate(5, ops.KEEP_SIZE, 0, 4096),
        ops.CopyRange(6, 0, 5, 0, ops.MAX_COPY),
        ops.Introduce(1, b"name", 5),
        ops.Entry(1, b"name", 5, 0o100644, 0, 0, 0, 0, b"", ((b"user.name", b"value"),)),
        ops.CopyData(5, 0, b"data"),
        ops.Vanish(1, b"name", True),
        ops.DirectoryDone(5),
        ops.Gather(5, ((b"name", 6), (b"gone", 0)), True, False),
        ops.Gathered(),
        ops.NamesEqual(),
        ops.Refresh(5, 0o100644, 0, 0, 0, ((b"user.name", b"value"),)),
        ops.CopyHole(5, 0, 4096),
        ops.Compare(5, 0, 4096),
        ops.Whole(5, (ops.WholeFile(b"name", 6, 0o100644, 0, 0, 0, ((b"user.name", b"value"),), b"data"),)),
        ops.Sync(5, False),
        ops.Checkpoint(7, 1 << 40),
        ops.Checkpointed(7),
        ops.Marked(1 << 40),
        ops.ListNames(5, b"name"),
        ops.Look(5, ((b"name", 6), (b"gone", 0))),
        ops.Digest(5, ((b"name", 6), (b"other", 7)), 0, 1 << 20),
        ops.Fetch(5, b"name", 6, 0, 1 << 16),
        ops.Describe(5, b"", 5),
        ops.Keep(5, b"name", 6, b"directory/name", ((0, 4096), (8192, 12288))),
        ops.Mend(5, b"name", 6, 0, b"data"),
        ops.MendAttributes(5, b"name", 6, 0o100644, 0, 0, 0, 0, ((b"user.name", b"value"),)),
        ops.Forget(5),
    )
}
_NOT_IDS = [0, -1, -(1 << 63), 1 << 63, (1 << 64) - 1, True, 5.0, b"5", "5", [5]]
_NOT_NAMES = [b"", b".", b"..", b"/", b"../secret", b"a/b", b"/etc/passwd", b"a\0b", b"n" * 256, "name", 5, None, [b"a"]]
_NOT_XATTR_NAMES = [b"", b"a\0b", b"n" * 256, "name", 5, None, [b"a"]]
_NOT_NUMBERS = [-1, 1 << 63, True, 5.0, b"5", "5", [5]]
_NOT_TIMES = [-(1 << 63), (1 << 64) - 1, True, 5.0, b"5", "5", [5]]
_NOT_BYTES = ["text", 5, None, True, [b"a"]]
_NOT_FLAGS = [0, 1, None, b"", "yes"]
_NOT_XATTRS = [
    None,
    5,
    b"name",
    {"name": b"value"},
    [b"name"],
    [[b"name"]],
    [[b"name", b"value", b"more"]],
    [["name", b"value"]],
    [[b"name", "value"]],
    [[b"name", None]],
]
_NOT_GATHERED = [None, 5, b"name", [b"name"], [[b"name"]], [[b"name", -1]], [[b"name", 1 << 63]], [[b"a/b", 5]], [["name", 5]]]
_FILE = [b"name", 6, 0o100644, 0, 0, 0, [], b"data"]
_OF_A_FILE: list[list[Any]] = [
    *(_NOT_NAMES, _NOT_IDS, _NOT_NUMBERS, _NOT_NUMBERS, _NOT_NUMBERS, _NOT_TIMES, _NOT_XATTRS, _NOT_BYTES)
]
_NOT_FILES: list[Any] = [None, 5, b"name", [b"name"], [[]], [_FILE[:-1]], [[*_FILE, 0]]]
_NOT_FILES += [[[*_FILE[:at], value, *_FILE[at + 1 :]]] for at, values in enumerate(_OF_A_FILE) for value in values]
_NOT_RANGES = [None, 5, b"name", [5], [[5]], [[5, -1]], [[5, 1 << 63]], [[b"5", 5]], [[0, 4096, 8192]]]
_NOT_TOLD = [
    None,
    5,
    b"name",
    [5],
    [[5]],
    [[5, 0, 0]],
    *([[number, 0]] for number in _NOT_IDS),
    *([[5, t]] for t in _NOT_TIMES),
]
_NUMBER_FIELDS = ["mode", "uid", "gid", "rdev", "size", "flags", "offset", "number", "new_from", "source_offset"]
_UNSOUND: dict[str, list[Any]] = {
    **dict.fromkeys(["file", "parent", "new_parent", "directory", "source"], _NOT_IDS),
    **dict.fromkeys(["name", "new_name"], _NOT_NAMES),
    **dict.fromkeys(_NUMBER_FIELDS, _NOT_NUMBERS),
    **dict.fromkeys(["atime_ns", "mtime_ns"], _NOT_TIMES),
    **dict.fromkeys(["target", "value", "data", "after"], _NOT_BYTES),
    "entry": [name for name in _NOT_NAMES if name != b""],
    "path": [b"/", b"/etc/passwd", b"../secret", b"a/../b", b"a//b", b"a/", b"a\0b", b"n" * 256, "name", 5, None],
    "ranges": _NOT_RANGES,
    **dict.fromkeys(["data_only", "gone", "complete", "last"], _NOT_FLAGS),
    "xattrs": _NOT_XATTRS,
    "names": _NOT_GATHERED,
    "files": _NOT_FILES,
}
_UNSOUND_HERE: dict[tuple[type, str], list[Any]] = {
    (ops.SetXattr, "name"): _NOT_XATTR_NAMES,
    (ops.RemoveXattr, "name"): _NOT_XATTR_NAMES,
    (ops.Allocate, "mode"): [*_NOT_NUMBERS, ops.PUNCH_HOLE, 0x08, 0x40, ops.ZERO_RANGE | ops.PUNCH_HOLE | ops.KEEP_SIZE],
    (ops.CopyRange, "size"): [*_NOT_NUMBERS, ops.MAX_COPY + 1],
    (ops.Times, "files"): _NOT_TOLD,
}
_OF_MESSAGES = [kind for kind in wire.KIND_OF if kind not in (ops.Write, ops.CopyData) and fields(kind)]


def _with(operation: ops.Operation, **changed: object) -> Frame:
    """The frame of `operation` with fields of which no care is taken that they can mean something."""
    content = [changed.get(field.name, getattr(operation, field.name)) for field in fields(operation)]
    return Frame(wire.KIND_OF[type(operation)], payload=msgpack.packb(content))


@pytest.mark.parametrize("kind", wire.KIND_OF)
def test_the_operations_that_are_spoilt_below_are_sound(kind: type) -> None:
    assert wire.decode_operation(_one(_bytes(_SOUND[kind]))) == _SOUND[kind]
    assert kind not in _OF_MESSAGES or wire.decode_operation(_with(_SOUND[kind])) == _SOUND[kind]


@pytest.mark.parametrize(("kind", "field"), [(kind, field.name) for kind in _OF_MESSAGES for field in fields(kind)])
def test_an_operation_with_a_field_that_no_primary_sends_is_a_protocol_error(kind: type, field: str) -> None:
    for value in _UNSOUND_HERE.get((kind, field)) or _UNSOUND[field]:
        with pytest.raises(ProtocolError, match=f"malformed {wire.KIND_OF[kind].name}"):
            raise AssertionError(f"{field} {value!r} made {wire.decode_operation(_with(_SOUND[kind], **{field: value}))}")


@pytest.mark.parametrize("kind", [kind for kind in _OF_MESSAGES if kind is not ops.SetAttributes])
def test_nothing_but_an_attribute_may_be_left_out(kind: type) -> None:
    for field in fields(kind):
        with pytest.raises(ProtocolError):
            wire.decode_operation(_with(_SOUND[kind], **{field.name: None}))


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.COPY_DATA])
@pytest.mark.parametrize(("file", "offset"), [(0, 0), (1 << 63, 0), ((1 << 64) - 1, 0), (5, 1 << 63), (5, (1 << 64) - 1)])
def test_data_for_no_file_or_beyond_what_a_file_can_hold_is_a_protocol_error(kind: Kind, file: int, offset: int) -> None:
    with pytest.raises(ProtocolError, match=f"malformed {kind.name}"):
        wire.decode_operation(Frame(kind, file=file, offset=offset, payload=b"data"))


def test_only_the_root_has_neither_parent_nor_name() -> None:
    entry = _SOUND[ops.Entry]
    assert isinstance(entry, ops.Entry)
    root: dict[str, object] = {"parent": 0, "name": b"", "file": 1}
    assert wire.decode_operation(_with(entry, **root)) == replace(entry, parent=0, name=b"", file=1)
    for changed in (root | {"file": 5}, {"name": b""}, {"parent": 0}, root | {"parent": -1}, root | {"name": b".."}):
        with pytest.raises(ProtocolError):
            wire.decode_operation(_with(entry, **changed))


def test_a_name_that_leads_out_of_the_tree_is_named_in_the_error() -> None:
    with pytest.raises(ProtocolError, match=r"a malformed UNLINK: name b'\.\./\.\./etc/passwd'"):
        wire.decode_operation(_with(_SOUND[ops.Unlink], name=b"../../etc/passwd"))


def _raw(length: int, kind: int, payload: bytes = b"") -> bytes:
    return wire.HEADER.pack(length, kind, 0, 0, 0, 0, 0) + payload


def test_a_length_above_the_bound_is_refused_before_its_payload_arrives() -> None:
    for length in (wire.MAX_PAYLOAD + 1, 0xFFFFFFFF):
        with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
            list(Decoder().feed(_raw(length, Kind.WRITE)))


def test_a_payload_of_exactly_the_bound_is_taken() -> None:
    operation = ops.Write(5, 0, bytes(wire.MAX_PAYLOAD))
    assert wire.decode_operation(_one(_bytes(operation))) == operation


def test_a_longer_payload_is_a_defect_of_the_sender() -> None:
    with pytest.raises(AssertionError):
        wire.encode(Frame(Kind.WRITE, payload=bytes(wire.MAX_PAYLOAD + 1)))


def test_a_frame_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ProtocolError, match="unknown kind 255"):
        list(Decoder().feed(_raw(0, 255)))


def test_a_header_has_thirty_two_bytes() -> None:
    header, payload = wire.encode(Frame(Kind.WRITE, 7, 5, 4096, b"data"))
    assert header == struct.pack("<IBBHQQQ", 4, 32, 0, 0, 7, 5, 4096)
    assert len(header) == wire.HEADER_SIZE == 32
    assert payload == b"data"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_payload_is_encoded_as_it_is_without_a_copy(kind: type) -> None:
    payload = kind(b"some data")
    header, sent = wire.encode(Frame(Kind.WRITE, 1, 5, 0, payload))
    assert sent is payload
    assert (header, bytes(sent)) == wire.encode(Frame(Kind.WRITE, 1, 5, 0, b"some data"))
    assert wire.decode_operation(_one(header + bytes(sent))) == ops.Write(5, 0, b"some data")


def test_a_write_may_carry_a_view_of_what_somebody_else_holds() -> None:
    view = memoryview(b"some data")[5:]
    header, payload = wire.encode_operation(ops.Write(5, 0, view), 1)
    assert payload is view
    assert wire.decode_operation(_one(header + bytes(payload))) == ops.Write(5, 0, b"data")


@given(st.lists(st.binary(max_size=60), max_size=4), st.integers(1, 50), st.sampled_from([bytes, bytearray]))
def test_what_a_decoder_was_fed_may_change_afterwards(payloads: list[bytes], size: int, kind: type) -> None:
    stream = b"".join(part for payload in payloads for part in wire.encode(Frame(Kind.WRITE, 1, 5, 0, payload)))
    decoder, frames = Decoder(), list[Frame]()
    for at in range(0, len(stream), size):
        piece = kind(stream[at : at + size])
        frames += decoder.feed(piece)
        if isinstance(piece, bytearray):
            piece[:] = bytes(len(piece))
    assert [frame.payload for frame in frames] == payloads
    assert all(type(frame.payload) is bytes for frame in frames)


def test_a_decoder_that_is_left_after_a_frame_goes_on_behind_it() -> None:
    data = b"".join(_bytes(ops.Checkpoint(number, 1), number) for number in (1, 2, 3))
    decoder = Decoder()
    for frame in decoder.feed(data[:-3]):
        assert frame.sequence == 1
        break
    assert [frame.sequence for frame in decoder.feed(b"")] == [2]
    assert [frame.sequence for frame in decoder.feed(data[-3:])] == [3]
    assert not decoder.incomplete


def test_the_frames_before_a_bad_one_are_delivered() -> None:
    decoder = Decoder()
    stream = decoder.feed(_bytes(ops.Checkpoint(7, 1 << 40)) + _raw(0, 255))
    assert next(stream).kind is Kind.CHECKPOINT
    with pytest.raises(ProtocolError):
        next(stream)


def test_the_preamble_has_its_fixed_bytes() -> None:
    assert wire.preamble() == struct.pack("<8sHHI", b"mirrorfs", 7, 8, 0)


#: Version 7 as it is out there: it sends nothing for its newest, and looks at the first number only.
_YESTERDAY = struct.pack("<8sHHI", b"mirrorfs", 7, 0, 0)


@pytest.mark.parametrize(
    ("one", "other", "version"),
    [
        ((7, 8), (7, 8), 8),
        ((7, 8), (7, 0), 7),
        ((7, 8), (7, 7), 7),
        ((7, 8), (8, 9), 8),
        ((7, 8), (7, 9), 8),
        ((7, 8), (8, 0), 8),
        ((7, 8), (1, 65535), 8),
    ],
)
def test_two_nodes_speak_the_lower_of_their_newest_versions(one: tuple[int, int], other: tuple[int, int], version: int) -> None:
    assert wire.agree(wire.preamble(*other), *one) == version
    newest = other[1] or other[0]
    assert wire.agree(wire.preamble(*one), other[0], newest) == version, "both come to the same"


def test_version_seven_is_answered_in_version_seven_and_sees_its_own_in_our_preamble() -> None:
    assert wire.agree(_YESTERDAY) == 7
    assert wire.PREAMBLE.unpack(wire.preamble())[:2] == (b"mirrorfs", 7)


@given(*[st.integers(1, 65535)] * 4)
def test_both_agree_on_a_version_that_both_speak_or_both_refuse(a: int, b: int, c: int, d: int) -> None:
    one, other = sorted((a, b)), sorted((c, d))
    found = list[int]()
    for mine, theirs in ((one, other), (other, one)):
        with suppress(ProtocolError):
            found.append(wire.agree(wire.preamble(*theirs), *mine))
    spoken = set(range(one[0], one[1] + 1)) & set(range(other[0], other[1] + 1))
    assert found == ([max(spoken)] * 2 if spoken else [])


@pytest.mark.parametrize(
    ("preamble", "said"),
    [
        (bytes(16), "not a mirrorfs node"),
        (b"GET / HTTP/1.1\r\n", "not a mirrorfs node"),
        (wire.preamble(1, 0), "it speaks protocol version 1, this node versions 7 to 8: install the same"),
        (wire.preamble(2, 6), "it speaks protocol versions 2 to 6, this node versions 7 to 8: install the same"),
        (wire.preamble(9, 10), "it speaks protocol versions 9 to 10, this node versions 7 to 8: install the same"),
        (wire.preamble(8, 7), "a malformed preamble: protocol versions 8 to 7"),
    ],
)
def test_another_preamble_is_refused_and_says_why(preamble: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        wire.agree(preamble)


# ---- what version 8 adds


@pytest.mark.parametrize(("spent_us", "said"), [(0, 0), (1500, 1500), ((1 << 32) - 1, (1 << 32) - 1), (1 << 40, (1 << 32) - 1)])
def test_a_sync_that_is_done_says_how_long_it_took(spent_us: int, said: int) -> None:
    header, payload = wire.encode_flushed(7, 9, 2, spent_us)
    (frame,) = Decoder().feed(header + bytes(payload))
    assert (frame.kind, frame.sequence, frame.file, frame.offset) == (Kind.FLUSHED, 7, 9, 2)
    assert wire.spent_on_flush_us(frame) == said
    assert frame.payload == struct.pack("<I", said)


def test_in_version_seven_it_says_nothing_of_that() -> None:
    assert wire.encode_flushed(7, 9, 2, None) == wire.encode(Frame(Kind.FLUSHED, 7, 9, 2))


@pytest.mark.parametrize("payload", [b"", b"\0\0\0", b"\0\0\0\0\0"])
def test_another_payload_of_it_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed FLUSHED"):
        wire.spent_on_flush_us(Frame(Kind.FLUSHED, 7, 9, 2, payload))
