"""Epochs, histories, and what two nodes conclude from them when they meet.

An epoch is one value: who is the primary and which nodes are in sync. Every change of either begins a new one, so the list of
epochs that a node knows is the history of the volume as that node saw it. Two nodes compare their lists as DRBD compares
generation identifiers: a list that contains the other's end is the newer one, two that part are a fork. A fork in which one
side acknowledged nothing is dropped; a fork in which both did is a split brain, and nobody touches any data.

A member of the in-sync set is a node *and its boot*: a node that was restarted with its machine may have lost what was not
fsynced, and is not as good as one that was not.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from mirrorfs.core.dirty import Head


class Standing(StrEnum):
    """What a node durably knows of its own tree."""

    IN_SYNC = "in sync"
    RESYNCING = "resyncing"
    OUTDATED = "outdated"


@dataclass(frozen=True, slots=True)
class Member:
    """A node that is in sync, and the boot in which it was."""

    node: str
    boot: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """One reign: `tag` tells it from another node's epoch of the same number; `began` is UNIX time in seconds."""

    number: int
    tag: str
    primary: str
    in_sync: frozenset[Member]
    forced: bool
    began: float

    def has(self, node: str) -> bool:
        """Whether `node`, in whatever boot, is in sync in this epoch."""
        return any(member.node == node for member in self.in_sync)

    def same(self, other: "Epoch") -> bool:
        """Whether both are the same reign."""
        return (self.number, self.tag) == (other.number, other.tag)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a node remembers of its arbiter: which cluster, how far its store was, and where the record there was changed."""

    cluster: str
    revision: int
    key_revision: int


@dataclass(frozen=True, slots=True)
class Record:
    """What a node keeps durably of the pair.

    `wrote` holds the tags of epochs in which this node acknowledged a change that no other node was asked for. `paused_at` is
    when this node was told by hand to keep the other one off (UNIX time in seconds), 0 if it does not. `yields_to` is the node
    for whose history it has given its own up, by an operator's word; then nothing of its own counts any more. `claims` are the
    tags of epochs that this node asked an arbiter for and has had no answer, `arbiter` is what it knows of that.
    """

    volume_id: str = ""
    epochs: tuple[Epoch, ...] = ()
    wrote: frozenset[str] = frozenset()
    standing: Standing = Standing.IN_SYNC
    reason: str = ""
    paused_at: float = 0.0
    yields_to: str = ""
    claims: tuple[str, ...] = ()
    arbiter: Seen | None = None

    @property
    def epoch(self) -> Epoch | None:
        """The newest epoch known, None before the volume is made."""
        return self.epochs[-1] if self.epochs else None

    def begin(self, epoch: Epoch) -> "Record":
        """The record with one more epoch; a history longer than `HISTORY` forgets its oldest."""
        epochs = (*self.epochs, epoch)[-HISTORY:]
        known = {e.tag for e in epochs}
        return replace(self, epochs=epochs, wrote=self.wrote & known)

    def yielding(self, winner: str, reason: str) -> "Record":
        """The record of a node that gives its history up for that of `winner`."""
        return replace(self, wrote=frozenset(), standing=Standing.OUTDATED, reason=reason, paused_at=0.0, yields_to=winner)

    def knows(self, epoch: Epoch) -> bool:
        """Whether the epoch is part of this history, or older than what is remembered of it."""
        if self.epochs and epoch.number < self.epochs[0].number:
            return True
        return self.remembers(epoch)

    def remembers(self, epoch: Epoch) -> bool:
        """Whether the epoch is part of what is remembered of this history."""
        return any(epoch.same(known) for known in self.epochs)


#: Epochs that a node remembers. Two nodes that have been apart for longer than this need a person.
HISTORY = 256

_NOTHING = Head()


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself when it meets another; `resume` asks that one to end its pause.

    `marked` counts the marks that the node has written, `peer_marked` those that it knows the other one had written. Both grow
    while it is said, and make no other node of it.
    """

    volume: str
    node: str
    boot: str
    record: Record
    serving: bool
    empty: bool
    discard_local_data: bool
    dirty: Head = _NOTHING
    resume: bool = False
    marked: int = field(default=0, compare=False)
    peer_marked: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Resume:
    """`primary` serves, the other node is brought to the same tree and follows."""

    primary: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Neither may serve without a person; the link stays up."""

    reason: str


@dataclass(frozen=True, slots=True)
class SplitBrain:
    """Both acknowledged changes that the other does not have, or may have; nobody touches any data.

    `stops` is the node that must not go on serving if both do: the primary from before the fork.
    """

    reason: str
    stops: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """These two do not belong together; the connection ends."""

    reason: str


Verdict = Resume | Wait | SplitBrain | Refuse


def who_forgot(left: Hello, right: Hello) -> str:
    """The node that has written fewer marks than the other one knows of: its journal is older than what it did as a primary. ""
    if neither has."""
    for one, other in ((left, right), (right, left)):
        if one.marked < other.peer_marked:
            return one.node
    return ""


def meet(left: Hello, right: Hello) -> Verdict:
    """The verdict of two nodes on each other: the same on both, whichever stands left."""
    one, two = sorted((left, right), key=lambda hello: hello.node)
    if one.volume != two.volume:
        return Refuse(f"{one.node} has volume {one.volume!r}, {two.node} has volume {two.volume!r}")
    if one.node == two.node:
        return Refuse(f"both nodes say that they are {one.node!r}: check `node` and the host names")
    first, second = one.record, two.record
    if first.volume_id and second.volume_id and first.volume_id != second.volume_id:
        return Refuse(
            f"{one.node} and {two.node} hold different volumes that are both named {one.volume!r}: to make one of them "
            "follow the other, empty its directory and its state directory"
        )
    if first.epoch is None and second.epoch is None:
        return Wait("the volume is new: run `mirrorfs promote` on the node whose files are to be kept")
    for loser, winner in ((one, two), (two, one)):
        if loser.record.yields_to == winner.node:
            return _meet_yielded(winner, loser)
    if first.epoch is None:
        return _meet_newcomer(two, one)
    if second.epoch is None:
        return _meet_newcomer(one, two)
    if first.epoch.same(second.epoch):
        return _choose(one, two, first.epoch, "both were in the same epoch")
    if second.knows(first.epoch):
        return _meet_older(two, one)
    if first.knows(second.epoch):
        return _meet_older(one, two)
    return _meet_fork(one, two)


def _meet_yielded(winner: Hello, loser: Hello) -> Verdict:
    """`loser` has given its history up: neither epochs nor what it wrote stand against following the other."""
    if winner.record.yields_to == loser.node:
        return Wait(
            f"{winner.node} and {loser.node} have both given their history up: run `mirrorfs promote --force` on the node "
            "whose files are to be kept"
        )
    epoch, reason = winner.record.epoch, f"{loser.node} has given its history up for that of {winner.node}"
    if winner.serving:
        return Resume(winner.node, f"{reason}; {winner.node} is serving")
    if epoch is not None and epoch.has(winner.node) and winner.record.standing is Standing.IN_SYNC:
        return Resume(winner.node, f"{reason}; {winner.node} has everything")
    return Wait(f"{reason}, and {winner.node} has no complete tree: run `mirrorfs promote --force` on the better one")


def _meet_newcomer(old: Hello, new: Hello) -> Verdict:
    if not (new.empty or new.discard_local_data):
        return Refuse(
            f"{new.node} has files but no history of volume {old.volume!r}: to replace them with those of {old.node}, "
            f"start {new.node} with --discard-local-data"
        )
    epoch = old.record.epoch
    assert epoch is not None
    complete = old.record.standing is Standing.IN_SYNC and (_intact(old, epoch) or _names(epoch) == {old.node})
    if old.serving or (epoch.primary == old.node and complete):
        return Resume(old.node, f"{new.node} is new")
    return Wait(f"{new.node} is new and {old.node} may not have everything: run `mirrorfs promote` on {old.node}")


def _names(epoch: Epoch) -> set[str]:
    return {member.node for member in epoch.in_sync}


def _intact(hello: Hello, epoch: Epoch) -> bool:
    """Whether a node is in sync in `epoch` and has not lost its memory since."""
    return Member(hello.node, hello.boot) in epoch.in_sync


def _meet_older(newer: Hello, older: Hello) -> Verdict:
    """`newer` knows everything that `older` knows, and more."""
    last, epoch = older.record.epoch, newer.record.epoch
    assert last is not None
    assert epoch is not None
    if not newer.record.remembers(last) and older.record.standing is Standing.IN_SYNC:
        return SplitBrain(
            f"{older.node} has been away since epoch {last.number}, longer than {newer.node} remembers: nobody knows whether "
            "it acknowledged changes of its own",
            older.node,
        )
    after = [e for e in newer.record.epochs if e.number > last.number]
    for later in after:
        if later.forced:
            return SplitBrain(
                f"{newer.node} was promoted by force in epoch {later.number}, past changes that {older.node} may have "
                "acknowledged",
                older.node,
            )
    if last.tag in older.record.wrote and not any(later.has(newer.node) for later in after):
        return SplitBrain(
            f"{older.node} acknowledged changes alone in epoch {last.number} that {newer.node} does not have",
            older.node,
        )
    reason = f"{older.node} has been away since epoch {last.number}"
    if newer.serving:
        return Resume(newer.node, f"{reason}; {newer.node} is serving")
    if _acknowledged_beyond(newer, older):
        older = replace(older, serving=False)  # frozen at best: it lacks what was acknowledged since
    return _choose(newer, older, epoch, reason)


def _choose(one: Hello, two: Hello, epoch: Epoch, reason: str) -> Verdict:
    """Who serves in the newest `epoch`: who serves already, else the best of the in-sync set, else a person decides."""
    if one.serving and two.serving:
        stops = two.node if epoch.primary == one.node else one.node
        return SplitBrain(f"{one.node} and {two.node} both serve in epoch {epoch.number}", stops)
    for hello in (one, two):
        if epoch.tag in hello.record.wrote and epoch.primary != hello.node:
            return SplitBrain(f"{hello.node} acknowledged changes in epoch {epoch.number} of {epoch.primary}", hello.node)
    for hello in (one, two):
        if hello.serving:
            return Resume(hello.node, f"{reason}; {hello.node} is serving")
    able = [h for h in (one, two) if h.record.standing is Standing.IN_SYNC and epoch.has(h.node)]
    candidates = [h for h in able if _intact(h, epoch)]
    if not candidates and _names(epoch) <= {h.node for h in able}:
        candidates = able  # all were restarted: what was fsynced is on each of them
    for hello in sorted(candidates, key=lambda h: h.node != epoch.primary):
        return Resume(hello.node, f"{reason}; {hello.node} has everything")
    return Wait(f"{reason}, and neither has a complete tree: run `mirrorfs promote --force` on the better one")


def _meet_fork(one: Hello, two: Hello) -> Verdict:
    forced = [h for h in (one, two) if any(e.forced for e in _unknown(h, two if h is one else one))]
    dirty = [h for h in (one, two) if _acknowledged_beyond(h, two if h is one else one)]
    if forced or len(dirty) == 2:
        what = "was promoted by force" if forced else "both acknowledged changes alone"
        who = forced[0].node if forced else f"{one.node} (epoch {_number(one)}) and {two.node} (epoch {_number(two)})"
        return SplitBrain(f"{who} {what}", _primary_before(one, two))
    keeper = dirty[0] if dirty else _better_of_fork(one, two)
    other = one if keeper is two else two
    epoch = keeper.record.epoch
    assert epoch is not None
    if not keeper.serving and (keeper.record.standing is not Standing.IN_SYNC or not epoch.has(keeper.node)):
        return Wait(f"{keeper.node} has the newest changes but not a complete tree: a person has to choose")
    return Resume(keeper.node, f"{other.node} acknowledged nothing in its epoch {_number(other)}")


def _better_of_fork(one: Hello, two: Hello) -> Hello:
    """Who goes on if neither acknowledged anything since they parted: who has what was acknowledged before, in memory too."""
    common = [epoch for epoch in one.record.epochs if two.record.knows(epoch)]

    def merit(hello: Hello) -> tuple[bool, bool, int, str]:
        return (bool(common) and _intact(hello, common[-1]), hello.serving, _number(hello), hello.node)

    return max((one, two), key=merit)


def _unknown(hello: Hello, other: Hello) -> list[Epoch]:
    """The epochs of `hello` that `other` has never heard of."""
    return [e for e in hello.record.epochs if not other.record.knows(e)]


def since_fork(hello: Hello, other: Hello) -> list[Epoch]:
    """The epochs of `hello` since the last one that both nodes know; its newest where there is none since."""
    return _unknown(hello, other) or list(hello.record.epochs[-1:])


def _primary_before(one: Hello, two: Hello) -> str:
    """The primary of the last epoch that both know; with none, the node whose own history is shorter."""
    for epoch in reversed(one.record.epochs):
        if two.record.knows(epoch):
            return epoch.primary
    return min((one, two), key=lambda h: (_number(h), h.node)).node


def _number(hello: Hello) -> int:
    epoch = hello.record.epoch
    return epoch.number if epoch else 0


def _acknowledged_beyond(hello: Hello, other: Hello) -> bool:
    """Whether `hello` may have acknowledged changes in epochs that `other` does not know.

    An epoch with both in sync in which `hello` was not the primary is a handover that never arrived: nothing was
    acknowledged in it.
    """
    return any(e.tag in hello.record.wrote or (len(e.in_sync) > 1 and e.primary == hello.node) for e in _unknown(hello, other))


@dataclass(frozen=True, slots=True)
class Allowed:
    """The node may become the primary."""


@dataclass(frozen=True, slots=True)
class AskFirst:
    """A person has to say that it is right (`--yes`)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Forbidden:
    """An acknowledged change may be missing here (`--force`)."""

    reason: str


def may_promote(
    record: Record, node: str, boot: str, *, peer: str | None, met: Hello | None, lost_at: str
) -> Allowed | AskFirst | Forbidden:
    """Whether `node` may become the primary on an operator's word while no primary is connected.

    `peer` is the other node's name if there is one; `met` is what it says of itself if it is connected, and `lost_at` since
    when it is not, for the message.
    """
    epoch = record.epoch
    if met is not None and any(not record.knows(theirs) for theirs in met.record.epochs):
        newest = met.record.epochs[-1].number
        return Forbidden(
            f"{met.node} knows of epoch {newest}, this node does not: what was acknowledged in it may be missing here"
        )
    if epoch is None:
        if peer is None or met is not None:
            return Allowed()
        return AskFirst(f"{peer} cannot be reached: if it already holds this volume, promoting here makes a second one")
    if record.standing is not Standing.IN_SYNC:
        return Forbidden(
            f"this node is {record.standing.value}: {record.reason}; changes acknowledged since then may be missing here"
        )
    if not epoch.has(node):
        return Forbidden(f"this node is behind: epoch {epoch.number} of {epoch.primary} goes on without it")
    if Member(node, boot) not in epoch.in_sync and len(epoch.in_sync) > 1:
        return Forbidden(
            "this machine was restarted while it was in sync: everything fsynced is here, later writes may be missing"
        )
    if peer is None or (met is not None and met.record.epochs):
        return Allowed()
    if met is not None and len(epoch.in_sync) > 1:
        return AskFirst(f"{met.node} is new: if the one before it went on alone, what it acknowledged then is missing here")
    if met is not None:
        return Allowed()
    if len(epoch.in_sync) == 1:
        return AskFirst(
            f"this node was alone in epoch {epoch.number} and {peer} cannot be reached: if {peer} was promoted since, its "
            "changes are missing here"
        )
    return AskFirst(
        f"{peer} cannot be reached since {lost_at}: if it went on alone, what it acknowledged since then is missing here"
    )
