"""The situations of docs/HANDSHAKE.md: what can have happened to two nodes that meet, or to one that somebody wants to promote.

A family is a few axes (what happened, whose machine was restarted, who serves), and every combination of their phrases is a
case, so that none is left out because nobody thought of it. `handshake_table` makes the page of them.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from mirrorfs.core.epochs import Allowed, AskFirst, Epoch, Forbidden, Hello, Record, Standing, may_promote
from tests.unit.stories import VOLUME, Node

#: An acknowledged change that nobody has fsynced: a machine that restarts may lose it.
IN_MEMORY = "in memory"

Phrases = tuple[str, ...]


@dataclass
class Player(Node):
    """A node of a story of which the truth is known too: `holds` are the acknowledged changes that are in its tree."""

    volume: str = "data"
    holds: frozenset[str] = frozenset()

    def hello(self) -> Hello:
        return replace(super().hello(), volume=self.volume)

    def writes_alone(self) -> None:
        super().writes_alone()
        self.holds |= {f"{self.name} alone in {self.own_epoch.tag}"}

    def adopts(self, other: Node, standing: Standing = Standing.IN_SYNC) -> None:
        assert isinstance(other, Player)
        super().adopts(other, standing)
        if standing is Standing.RESYNCING:
            self.record = replace(self.record, reason=f"a copy from {other.name} began at 12:00")
        self.holds = other.holds if standing is Standing.IN_SYNC else frozenset()

    def restarts(self, *, machine: bool = False) -> None:
        super().restarts(machine=machine)
        if machine:
            self.holds -= {IN_MEMORY}

    def stands(self, standing: Standing) -> None:
        """Its tree is not whole: what nobody has fsynced does not count as there."""
        self.record = replace(self.record, standing=standing, reason="its disk failed")
        self.holds -= {IN_MEMORY}

    def gives_up(self, winner: "Player") -> None:
        """By an operator's word: what it acknowledged is kept aside, and in no tree that counts."""
        self.record = self.record.yielding(winner.name, "its history was given up")
        self.holds = frozenset()

    @property
    def own_epoch(self) -> Epoch:
        """The newest epoch that it knows."""
        assert self.record.epoch is not None
        return self.record.epoch


Act = Callable[[Player, Player], object]


def _mirrored() -> tuple[Player, Player]:
    """Where every story begins: A was the primary and B in sync, with everything; now neither serves."""
    a, b = Player("A"), Player("B")
    a.begins(a, wrote=True)
    a.begins(a, b)
    a.holds |= {"fsynced", IN_MEMORY}
    b.adopts(a)
    return a, b


@dataclass(frozen=True, slots=True)
class Family:
    """Situations of one kind. Each axis has phrases for the page, and what each does to A and B; they are applied in order."""

    title: str
    axes: tuple[Mapping[str, Act], ...]
    possible: Callable[[Player, Player], bool] = lambda a, b: True
    before: Act = lambda a, b: None

    def cases(self) -> dict[Phrases, tuple[Player, Player]]:
        """A and B in every combination that can be."""
        found = {}
        for phrases in itertools.product(*self.axes):
            a, b = _mirrored()
            self.before(a, b)
            for axis, phrase in zip(self.axes, phrases, strict=True):
                axis[phrase](a, b)
            if self.possible(a, b):
                found[phrases] = (a, b)
        return found


# ---- what happens to A and B


def _nothing(a: Player, b: Player) -> None:
    pass


def _a_is_new(a: Player, b: Player) -> None:
    _b_is_new(b, a)


def _both_are_new(a: Player, b: Player) -> None:
    _a_is_new(a, b)
    _b_is_new(a, b)


def _b_is_new(a: Player, b: Player) -> None:
    b.record, b.holds, b.empty = Record(), frozenset(), True


def _b_has_files(a: Player, b: Player) -> None:
    b.empty = False


def _b_has_files_to_discard(a: Player, b: Player) -> None:
    b.empty, b.discard = False, True


def _b_is_new_with_files(a: Player, b: Player) -> None:
    _b_is_new(a, b)
    _b_has_files(a, b)


def _b_is_new_with_files_to_discard(a: Player, b: Player) -> None:
    _b_is_new(a, b)
    _b_has_files_to_discard(a, b)


def _b_is_of_another_volume(a: Player, b: Player) -> None:
    b.volume = "orders"


def _b_has_the_same_name(a: Player, b: Player) -> None:
    b.name = a.name


def _b_made_a_volume_too(a: Player, b: Player) -> None:
    b.record = replace(b.record, volume_id=VOLUME[::-1])


def _a_reboots(a: Player, b: Player) -> None:
    a.restarts(machine=True)


def _b_reboots(a: Player, b: Player) -> None:
    b.restarts(machine=True)


def _both_reboot(a: Player, b: Player) -> None:
    a.restarts(machine=True)
    b.restarts(machine=True)


def _b_writes_alone(a: Player, b: Player) -> None:
    b.writes_alone()


def _a_serves(a: Player, b: Player) -> None:
    a.serving = True


def _b_serves(a: Player, b: Player) -> None:
    b.serving = True


def _both_serve(a: Player, b: Player) -> None:
    a.serving = b.serving = True


def _a_is_outdated(a: Player, b: Player) -> None:
    a.stands(Standing.OUTDATED)


def _b_is_outdated(a: Player, b: Player) -> None:
    b.stands(Standing.OUTDATED)


def _a_goes_on(a: Player, b: Player) -> None:
    a.begins(a)


def _a_goes_on_and_writes(a: Player, b: Player) -> None:
    a.begins(a, wrote=True)


def _b_goes_on(a: Player, b: Player) -> None:
    b.begins(b)


def _b_goes_on_and_writes(a: Player, b: Player) -> None:
    b.begins(b, wrote=True)


def _a_is_forced(a: Player, b: Player) -> None:
    a.begins(a, forced=True, wrote=True)


def _b_is_forced(a: Player, b: Player) -> None:
    b.begins(b, forced=True, wrote=True)


def _both_know_that_a_is_alone(a: Player, b: Player) -> None:
    a.begins(a, wrote=True)
    b.adopts(a)


def _b_is_copied_to(a: Player, b: Player) -> None:
    a.begins(a, wrote=True)
    b.adopts(a, Standing.RESYNCING)


def _b_is_copied_to_and_forced(a: Player, b: Player) -> None:
    _b_is_copied_to(a, b)
    _b_is_forced(a, b)


def _a_is_copied_to(a: Player, b: Player) -> None:
    _b_is_copied_to(b, a)


def _a_takes_b_in(a: Player, b: Player) -> None:
    _b_is_copied_to(a, b)
    a.begins(a, b)


def _b_takes_a_in(a: Player, b: Player) -> None:
    _a_takes_b_in(b, a)


def _a_hands_over(a: Player, b: Player) -> None:
    a.begins(a, b, primary=b)


def _a_hands_over_a_bad_disk(a: Player, b: Player) -> None:
    a.begins(b, primary=b)
    a.stands(Standing.OUTDATED)


def _a_goes_on_until_its_disk_fails(a: Player, b: Player) -> None:
    a.begins(a, wrote=True)
    a.stands(Standing.OUTDATED)


def _a_is_set_back(a: Player, b: Player) -> None:
    """What A recorded last is lost: its state directory came from a backup."""
    a.begins(a, wrote=True)
    backup = a.record
    a.begins(a, wrote=True)
    b.adopts(a, Standing.RESYNCING)
    a.record = backup


def _b_takes_over(a: Player, b: Player) -> None:
    a.begins(a, b, primary=b)
    b.adopts(a)


def _b_leaves_a_out(a: Player, b: Player) -> None:
    """A knows it and takes its tree for whole: no node should, and it is not relied on."""
    b.begins(b, wrote=True)
    held = a.holds
    a.adopts(b)
    a.holds = held


def _b_goes_on_with_a_behind(a: Player, b: Player) -> None:
    b.begins(b, wrote=True)
    a.adopts(b, Standing.RESYNCING)


def _parted_by_force(a: Player, b: Player) -> None:
    _a_goes_on_and_writes(a, b)
    _b_is_forced(a, b)


def _a_gives_up(a: Player, b: Player) -> None:
    a.gives_up(b)


def _b_gives_up(a: Player, b: Player) -> None:
    b.gives_up(a)


def _both_give_up(a: Player, b: Player) -> None:
    a.gives_up(b)
    b.gives_up(a)


# ---- what can be


def _knows_if_left_out(node: Player) -> bool:
    """A node that an epoch leaves out does not take its own tree for whole."""
    return node.own_epoch.has(node.name) or node.record.standing is not Standing.IN_SYNC


def _serves_whole(node: Player) -> bool:
    """A restart ends serving, and so does a disk that fails: before the node meets anybody."""
    intact = node.member() in node.own_epoch.in_sync and node.record.standing is Standing.IN_SYNC
    return intact or not node.serving


def _serves_as_primary(node: Player) -> bool:
    return _serves_whole(node) and (node.own_epoch.primary == node.name or not node.serving)


def _in_one_epoch(a: Player, b: Player) -> bool:
    """Two that both serve in one epoch must not be, and are looked for all the same."""
    return all(_knows_if_left_out(node) and _serves_whole(node) for node in (a, b))


def _in_two_epochs(a: Player, b: Player) -> bool:
    return _serves_as_primary(a) and _serves_as_primary(b)


def _after_giving_up(a: Player, b: Player) -> bool:
    """A node that gave its history up does not serve."""
    return _in_two_epochs(a, b) and not any(node.serving and node.record.yields_to for node in (a, b))


def _b_without_epochs(a: Player, b: Player) -> bool:
    return _knows_if_left_out(a) and _serves_as_primary(a)


# ---- the situations

_BOOTS: Mapping[str, Act] = {
    "no machine was restarted": _nothing,
    "A's machine was restarted": _a_reboots,
    "B's machine was restarted": _b_reboots,
    "both machines were restarted": _both_reboot,
}
_SERVING: Mapping[str, Act] = {
    "neither serves": _nothing,
    "A serves": _a_serves,
    "B serves": _b_serves,
    "both serve": _both_serve,
}

FAMILIES = (
    Family(
        "They do not belong together",
        (
            {
                "the volume of B has another name": _b_is_of_another_volume,
                "both say that they are A": _b_has_the_same_name,
                "each made a volume, both of the same name": _b_made_a_volume_too,
            },
            _SERVING,
        ),
    ),
    Family(
        "Both are new",
        (
            {"both are new": _both_are_new},
            {"B is empty": _nothing, "B has files": _b_has_files, "B has files to discard": _b_has_files_to_discard},
        ),
    ),
    Family(
        "B is new",
        (
            {
                "A was the primary of a B that is gone, both in sync": _nothing,
                "A was the primary alone": _a_goes_on_and_writes,
                "A was in sync under a B that is gone": _b_takes_over,
                "A was behind a B that is gone": _b_goes_on_with_a_behind,
            },
            {"A's tree is whole": _nothing, "A is outdated": _a_is_outdated},
            {
                "B is empty": _b_is_new,
                "B has files and was told to discard them": _b_is_new_with_files_to_discard,
                "B has files": _b_is_new_with_files,
            },
            {"A's machine was not restarted": _nothing, "A's machine was restarted": _a_reboots},
            {"A does not serve": _nothing, "A serves": _a_serves},
        ),
        _b_without_epochs,
    ),
    Family(
        "Both know the same newest epoch, and A was its primary",
        (
            {
                "both were in sync in it": _nothing,
                "both were in sync in it, and B acknowledged changes in it alone": _b_writes_alone,
                "A was alone in it": _both_know_that_a_is_alone,
            },
            {"A's tree is whole": _nothing, "A is outdated": _a_is_outdated},
            {"B's tree is whole": _nothing, "B is outdated or being resynced": _b_is_outdated},
            _BOOTS,
            _SERVING,
        ),
        _in_one_epoch,
    ),
    Family(
        "One knows newer epochs than the other",
        (
            {
                "A went on alone and acknowledged nothing": _a_goes_on,
                "A went on alone and acknowledged changes": _a_goes_on_and_writes,
                "A took B in, which B has not heard": _a_takes_b_in,
                "A handed over to B, which B has not heard": _a_hands_over,
                "A handed over to B because its disk failed, which B has not heard": _a_hands_over_a_bad_disk,
                "A was promoted by force": _a_is_forced,
                "B was promoted": _b_goes_on_and_writes,
                "B was promoted and took A in, which A has not heard": _b_takes_a_in,
                "B was promoted by force": _b_is_forced,
                "B was promoted by force while A was being copied to it": _b_is_copied_to_and_forced,
                "A went on alone, B was being copied to, and A was set back to an older record": _a_is_set_back,
            },
            _BOOTS,
            _SERVING,
        ),
        _in_two_epochs,
    ),
    Family(
        "Each knows an epoch that the other does not",
        (
            {
                "B went on and acknowledged nothing": _b_goes_on,
                "B was promoted": _b_goes_on_and_writes,
                "B was promoted by force": _b_is_forced,
            },
            {
                "A went on alone and acknowledged nothing": _a_goes_on,
                "A went on alone and acknowledged changes": _a_goes_on_and_writes,
                "A went on alone and acknowledged changes until its disk failed": _a_goes_on_until_its_disk_fails,
                "A handed over to B, which B has not heard": _a_hands_over,
                "A handed over to B because its disk failed, which B has not heard": _a_hands_over_a_bad_disk,
                "A was promoted by force": _a_is_forced,
            },
            _BOOTS,
            _SERVING,
        ),
        _in_two_epochs,
    ),
    Family(
        "After a split brain, one has given its history up",
        (
            {
                "A gave its history up for that of B": _a_gives_up,
                "B gave its history up for that of A": _b_gives_up,
                "each gave its history up for that of the other": _both_give_up,
            },
            {
                "no machine was restarted": _nothing,
                "B's disk failed": _b_is_outdated,
                "A's machine was restarted": _a_reboots,
            },
            {"neither serves": _nothing, "A serves": _a_serves, "B serves": _b_serves},
        ),
        _after_giving_up,
        before=_parted_by_force,
    ),
)


# ---- an operator's word

_NO_PEER = "no other node is configured"
_AWAY = "B cannot be reached"
PROMOTED: tuple[Mapping[str, Act], ...] = (
    {
        "A has no history": _a_is_new,
        "A was the primary, or in sync under B": _nothing,
        "A was the primary alone": _a_goes_on_and_writes,
        "A took B in, which B has not heard": _a_takes_b_in,
        "A is being resynced": _a_is_copied_to,
        "A is outdated": _a_is_outdated,
        "A knows an epoch of B that leaves it out": _b_leaves_a_out,
    },
    {
        _NO_PEER: _nothing,
        _AWAY: _nothing,
        "B is connected and new": _b_is_new,
        "B is connected and knows nothing newer": _nothing,
        "B is connected and knows a newer epoch": _b_goes_on_and_writes,
    },
    {"A's machine was not restarted": _nothing, "A's machine was restarted": _a_reboots},
)


class Question(NamedTuple):
    """Somebody wants to promote `a`. `peer` is the name of the other node if there is one, `met` is that node if connected."""

    a: Player
    peer: str | None
    met: Player | None

    def answer(self) -> Allowed | AskFirst | Forbidden:
        met = self.met.hello() if self.met else None
        return may_promote(self.a.record, self.a.name, self.a.boot, peer=self.peer, met=met, lost_at="12:00")


def promotions() -> dict[Phrases, Question]:
    """Every question that there can be."""
    found = {}
    for phrases, (a, b) in Family("", PROMOTED).cases().items():
        company = phrases[1]
        newer = any(not a.record.knows(epoch) for epoch in b.record.epochs)
        if company in (_NO_PEER, _AWAY) or newer == (company == "B is connected and knows a newer epoch"):
            met = None if company in (_NO_PEER, _AWAY) else b
            found[phrases] = Question(a, None if company == _NO_PEER else b.name, met)
    return found
