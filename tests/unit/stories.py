"""What the stories of two nodes are told with: the nodes, what happens to them, and what they conclude when they meet.

The nodes are `one`, which is the primary at first, and `two`.
"""

from dataclasses import dataclass, field, replace

from mirrorfs.core.epochs import (
    Allowed,
    AskFirst,
    Epoch,
    Forbidden,
    Hello,
    Member,
    Record,
    Resume,
    SplitBrain,
    Standing,
    Verdict,
    Wait,
    may_promote,
    meet,
)

_TAGS = iter(f"tag-{number}" for number in range(10**9))
VOLUME = "0123456789abcdef" * 2


@dataclass
class Node:
    """A node of a story: what it has recorded, and whether it is serving."""

    name: str
    boot: str = "boot"
    record: Record = field(default_factory=Record)
    serving: bool = False
    empty: bool = False
    discard: bool = False

    def hello(self) -> Hello:
        return Hello("data", self.name, self.boot, self.record, self.serving, self.empty, self.discard)

    def member(self) -> Member:
        return Member(self.name, self.boot)

    def begins(self, *in_sync: "Node", primary: "Node | None" = None, forced: bool = False, wrote: bool = False) -> Epoch:
        """Begin a new epoch in this node's record."""
        number = self.record.epoch.number + 1 if self.record.epoch else 1
        members = frozenset(node.member() for node in in_sync)
        epoch = Epoch(number, next(_TAGS), (primary or self).name, members, forced, 0.0)
        self.record = replace(self.record, volume_id=self.record.volume_id or VOLUME).begin(epoch)
        if wrote:
            self.writes_alone()
        return epoch

    def writes_alone(self) -> None:
        assert self.record.epoch is not None
        self.record = replace(self.record, wrote=self.record.wrote | {self.record.epoch.tag})

    def adopts(self, other: "Node", standing: Standing = Standing.IN_SYNC) -> None:
        """Take over the other's history."""
        self.record = replace(other.record, wrote=frozenset(), standing=standing, reason="")

    def restarts(self, *, machine: bool = False) -> None:
        self.serving = False
        if machine:
            self.boot += "'"

    def may_promote(self, *, peer: str | None = "two", met: "Node | None" = None) -> Allowed | AskFirst | Forbidden:
        """The answer to an operator; `met` is the other node if it is connected."""
        hello = met.hello() if met else None
        name = met.name if met else peer
        return may_promote(self.record, self.name, self.boot, peer=name, met=hello, lost_at="noon")


def mirrored() -> tuple[Node, Node]:
    """A pair as it is when all is well: one serves, both are in sync."""
    one, two = Node("one"), Node("two")
    one.begins(one, wrote=True)
    one.begins(one, two)
    two.adopts(one)
    one.serving = True
    return one, two


def verdict(one: Node, two: Node) -> Verdict:
    """The verdict of both, which has to be the same one."""
    found = meet(one.hello(), two.hello())
    assert found == meet(two.hello(), one.hello())
    return found


def assert_resumes(one: Node, two: Node, primary: str) -> None:
    found = verdict(one, two)
    assert isinstance(found, Resume), found
    assert found.primary == primary


def assert_waits(one: Node, two: Node) -> str:
    """The reason for which both wait."""
    found = verdict(one, two)
    assert isinstance(found, Wait), found
    return found.reason


def assert_split(one: Node, two: Node, *, stops: str) -> None:
    found = verdict(one, two)
    assert isinstance(found, SplitBrain), found
    assert found.stops == stops
