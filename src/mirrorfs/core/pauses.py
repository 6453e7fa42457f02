"""A pause of replication, made by hand, and what it means for two nodes that meet.

A pause belongs to the node that serves, or would: its record says so, beside an epoch in which it is alone. It keeps the other
node from following, and nothing else: a split brain is found all the same, and a node that has to follow pauses nothing.
"""

from dataclasses import dataclass

from mirrorfs.core.epochs import Hello, Resume, Standing, Verdict


@dataclass(frozen=True, slots=True)
class Pause:
    """The other node is kept from following `node`, since this UNIX time in seconds."""

    node: str
    since: float


def pause_between(verdict: Verdict, left: Hello, right: Hello) -> Pause | None:
    """The pause that stands against what two nodes have concluded; the same on both, whichever stands left."""
    for hello in (left, right):
        if isinstance(verdict, Resume) and verdict.primary == hello.node and hello.record.paused_at:
            return Pause(hello.node, hello.record.paused_at)
    return None


def may_serve(kept_off: Hello) -> bool:
    """Whether the paused node may begin to serve without a person, given what the node that it keeps off says of itself.

    It may if that one cannot be promoted meanwhile, but by force: it knows itself behind.
    """
    return not kept_off.serving and kept_off.record.standing is not Standing.IN_SYNC
