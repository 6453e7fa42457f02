"""What the record that an arbiter holds means to a node: may it ask for the next epoch, has it lost, or is that no arbiter?

The arbiter holds one epoch, changed by compare-and-swap. A node goes on without the other one, or takes its place, only by a
swap that succeeded after the loss, even if the record is believed to say so already. That makes it safe for growth and a clean
switch-over to lag behind an arbiter that is away: whatever epochs both nodes have begun together since, each has to swap the
*same* record, so that one of them wins. (DESIGN, section 6.)
"""

import json
from dataclasses import dataclass
from typing import Any

from mirrorfs.core.epochs import Epoch, Record, Seen
from mirrorfs.core.packing import pack_epoch, unpack_epoch


@dataclass(frozen=True, slots=True)
class Found:
    """What was read: of which cluster and as of which revision, where the record was changed (0: there is none), and itself."""

    seen: Seen
    volume_id: str = ""
    epoch: Epoch | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """The node may ask for an epoch of this number or a higher one, in place of the record of this revision (0: of none)."""

    expected: int
    number: int


@dataclass(frozen=True, slots=True)
class AskPeer:
    """As `Swap`, if the peer confirms after this was read that it still follows, so that it was granted nothing."""

    expected: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Somebody else's epoch stands there: the other node went on, or may have."""

    reason: str


@dataclass(frozen=True, slots=True)
class NoArbiter:
    """What answers is not the arbiter that this volume had: nothing follows from what it says."""

    reason: str


def to_go_on(record: Record, found: Found, *, force: bool = False) -> Swap | Lost | NoArbiter:
    """Whether a node with this record may ask to go on alone, be it as the primary that lost its peer or in the place of one.

    That it has everything is somebody else's question. `force` is an operator's word against what stands there.
    """
    strange = _strange(record, found)
    if not force and strange:
        return NoArbiter(strange)
    if found.epoch is None or force or _is_known(record, found.epoch):
        return Swap(found.seen.key_revision, _next_number(record, found))
    return Lost(_claimed(found.epoch))


def to_publish(record: Record, found: Found, *, mirrored: bool) -> Swap | AskPeer | Lost | None:
    """What a primary does with the record while it serves: nothing if that is right, else it writes its epoch there.

    Believing itself mirrored is not enough to overwrite what it does not know, nor to be the first at an arbiter that is new or
    was set back: the peer may have been granted the next epoch, here or by what was there before, while this node has not
    noticed the loss of its link.
    """
    epoch = record.epoch
    assert epoch is not None
    strange = _strange(record, found)
    if found.epoch is not None and found.epoch.same(epoch) and not strange:
        return None
    is_known = found.epoch is None or (found.volume_id == record.volume_id and _is_known(record, found.epoch))
    if mirrored and (strange or not is_known):
        return AskPeer(found.seen.key_revision)
    if found.epoch is None or is_known:
        return Swap(found.seen.key_revision, epoch.number)
    if found.volume_id != record.volume_id:
        return Lost(_other_volume(found))
    return Lost(_claimed(found.epoch))


def _strange(record: Record, found: Found) -> str:
    """Why this is not the arbiter that is remembered; "" if it is."""
    known, now = record.arbiter, found.seen
    if found.epoch is None:
        return "it has no record of this volume: it is new, or was restored from an old backup"
    if found.volume_id != record.volume_id:
        return _other_volume(found)
    if known is None:
        return ""
    if known.cluster != now.cluster:
        return "it is another cluster than the one that this node knows"
    if now.revision < known.revision or now.key_revision < known.key_revision:
        return f"it is older than this node knows it (revision {now.revision} after {known.revision}): restored from a backup?"
    return ""


def _is_known(record: Record, epoch: Epoch) -> bool:
    return record.remembers(epoch) or epoch.tag in record.claims


def _next_number(record: Record, found: Found) -> int:
    numbers = [epoch.number for epoch in (record.epoch, found.epoch) if epoch is not None]
    return max(numbers, default=0) + 1


def _other_volume(found: Found) -> str:
    return f"its record is of another volume of that name ({found.volume_id[:8]}): give each its own `prefix`"


def _claimed(epoch: Epoch) -> str:
    return f"{epoch.primary} was granted epoch {epoch.number} by the arbiter"


def pack(volume_id: str, epoch: Epoch) -> bytes:
    """The record as the arbiter holds it: JSON, so that a person can read it there."""
    return json.dumps({"volume_id": volume_id, "epoch": pack_epoch(epoch)}).encode()


def unpack(value: bytes) -> tuple[str, Epoch]:
    """Volume id and epoch of a record; ValueError if it is none."""
    try:
        content: Any = json.loads(value)
        return str(content["volume_id"]), unpack_epoch(content["epoch"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a record of mirrorfs: {error!r}") from error
