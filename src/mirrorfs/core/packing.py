"""Records and greetings as plain values, for msgpack, and back."""

from typing import Any, Final

from mirrorfs.core.dirty import Head
from mirrorfs.core.epochs import Epoch, Hello, Member, Record, Seen, Standing

_LATEST: Final = 1e11  # in the year 5138


def pack_epoch(epoch: Epoch) -> list[Any]:
    """An epoch as plain values."""
    members = sorted([member.node, member.boot] for member in epoch.in_sync)
    return [epoch.number, epoch.tag, epoch.primary, members, epoch.forced, epoch.began]


def unpack_epoch(fields: list[Any]) -> Epoch:
    """The epoch that `pack_epoch` packed; TypeError, ValueError or OverflowError if it is not one."""
    number, tag, primary, members, forced, began = fields
    in_sync = frozenset(Member(str(node), str(boot)) for node, boot in members)
    return Epoch(int(number), str(tag), str(primary), in_sync, bool(forced), float(began))


def pack_record(record: Record) -> dict[str, Any]:
    """The record as plain values, for msgpack."""
    return {
        "volume_id": record.volume_id,
        "epochs": [pack_epoch(epoch) for epoch in record.epochs],
        "wrote": sorted(record.wrote),
        "standing": record.standing.value,
        "reason": record.reason,
        "paused_at": record.paused_at,
        "yields_to": record.yields_to,
        "claims": list(record.claims),
        "arbiter": None if (seen := record.arbiter) is None else [seen.cluster, seen.revision, seen.key_revision],
    }


def unpack_record(data: dict[str, Any]) -> Record:
    """The record that `pack_record` packed; KeyError, TypeError, ValueError or OverflowError if it is not one."""
    volume_id = data["volume_id"]
    if not isinstance(volume_id, str) or len(volume_id) not in (0, 32) or len(bytes.fromhex(volume_id)) * 2 != len(volume_id):
        raise ValueError(f"{volume_id!r} is no volume id")
    paused_at = float(data.get("paused_at", 0.0))
    if not 0 <= paused_at < _LATEST:
        raise ValueError(f"{paused_at} is no time")
    return Record(
        volume_id=volume_id,
        epochs=tuple(unpack_epoch(fields) for fields in data["epochs"]),
        wrote=frozenset(data["wrote"]),
        standing=Standing(data["standing"]),
        reason=str(data["reason"]),
        paused_at=paused_at,
        yields_to=str(data.get("yields_to", "")),
        claims=tuple(str(tag) for tag in data.get("claims", ())),
        arbiter=None if (seen := data.get("arbiter")) is None else Seen(str(seen[0]), int(seen[1]), int(seen[2])),
    )


def pack_hello(hello: Hello) -> dict[str, Any]:
    """A hello as plain values, for msgpack."""
    return {
        "volume": hello.volume,
        "node": hello.node,
        "boot": hello.boot,
        "record": pack_record(hello.record),
        "serving": hello.serving,
        "empty": hello.empty,
        "discard_local_data": hello.discard_local_data,
        "dirty": [hello.dirty.volume_id, hello.dirty.number, hello.dirty.base, hello.dirty.new_from, hello.dirty.complete],
        "resume": hello.resume,
        "marked": hello.marked,
        "peer_marked": hello.peer_marked,
    }


def unpack_hello(data: dict[str, Any]) -> Hello:
    """The hello that `pack_hello` packed; KeyError, TypeError or ValueError if it is not one."""
    return Hello(
        volume=str(data["volume"]),
        node=str(data["node"]),
        boot=str(data["boot"]),
        record=unpack_record(data["record"]),
        serving=bool(data["serving"]),
        empty=bool(data["empty"]),
        discard_local_data=bool(data["discard_local_data"]),
        dirty=_unpack_head(data["dirty"]),
        resume=bool(data.get("resume")),
        marked=int(data["marked"]),
        peer_marked=int(data["peer_marked"]),
    )


def _unpack_head(fields: list[Any]) -> Head:
    volume_id, number, base, new_from, complete = fields
    return Head(str(volume_id), int(number), int(base), int(new_from), bool(complete))


def version_in(content: dict[str, Any]) -> str:
    """The version of the software in a HELLO; empty if there is none that a line can show."""
    version = content.get("version")
    return version[:40] if isinstance(version, str) and version.isprintable() else ""
