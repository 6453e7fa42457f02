"""Makes docs/HANDSHAKE.md: what two nodes conclude when they meet, and what an operator's word does, by asking the code.

`python -m tests.unit.handshake_table` prints the page, `--write` writes it. Cases of `situations` that end alike for the same
reason become one row.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mirrorfs.core.epochs import Allowed, AskFirst, Forbidden, Refuse, Resume, SplitBrain, Verdict, Wait, meet
from tests.unit.situations import FAMILIES, PROMOTED, Family, Phrases, Player, promotions

PAGE = Path(__file__).parents[2] / "docs" / "HANDSHAKE.md"


# ---- the verdicts in words


def in_words(verdict: Verdict, a: Player, b: Player) -> tuple[str, str]:
    """Who does what, and the reason as the nodes say it."""
    match verdict:
        case Resume(primary, reason):
            return f"{primary} serves, {b.name if primary == a.name else a.name} follows", reason
        case Wait(reason):
            return "waits for a person", reason
        case SplitBrain(reason, stops):
            return f"**split brain**, {stops} stops", reason
        case Refuse(reason):
            return "refused", reason


class Row(NamedTuple):
    """Cases that end alike."""

    situation: str
    outcome: tuple[str, ...]


def rows(axes: Sequence[Sequence[str]], outcomes: Mapping[Phrases, tuple[str, ...]]) -> list[Row]:
    """Each case in exactly one row, and no row for what cannot be.

    `axes` are the phrases of which `outcomes` has every combination that can be. A row is widened from its first case, the last
    axis first, for as long as everything in it ends alike; the first axis is what a reader looks for, and is left as it is.
    """
    left = dict(outcomes)
    made = []
    while left:
        first = next(iter(left))
        outcome = left[first]
        cube = [[phrase] for phrase in first]

        def cases(place: int, phrases: Sequence[str], cube: Sequence[Sequence[str]] = cube) -> list[Phrases]:
            return [case for case in itertools.product(*cube[:place], phrases, *cube[place + 1 :]) if case in outcomes]

        for place in reversed(range(1, len(axes))):
            for phrase in axes[place]:
                more = cases(place, [phrase])
                if phrase not in cube[place] and more and all(left.get(case) == outcome for case in more):
                    cube[place].append(phrase)
        said = []
        for place, phrases in enumerate(cube):
            others = [phrase for phrase in axes[place] if phrase not in phrases]
            if place == 0 or cases(place, others):  # what could not be otherwise need not be said
                said.append(", or ".join(phrase for phrase in axes[place] if phrase in phrases))
        for case in itertools.product(*cube):
            left.pop(case, None)
        made.append(Row("; ".join(said), outcome))
    return made


def _table(header: Sequence[str], made: Sequence[Row]) -> list[str]:
    lines = [header, ["---"] * len(header), *([row.situation, *row.outcome] for row in made)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _met(family: Family) -> list[str]:
    outcomes = {phrases: in_words(meet(a.hello(), b.hello()), a, b) for phrases, (a, b) in family.cases().items()}
    made = rows([list(axis) for axis in family.axes], outcomes)
    return [f"### {family.title}", "", *_table(["situation", "verdict", "reason, as the nodes say it"], made), ""]


def _answer_in_words(answer: Allowed | AskFirst | Forbidden) -> tuple[str, ...]:
    match answer:
        case Allowed():
            return "promotes", "promotes", "promotes", ""
        case AskFirst(reason):
            return "asks", "promotes", "promotes", reason
        case Forbidden(reason):
            return "refuses", "refuses", "promotes, **forced**", reason


def _promoted() -> list[str]:
    outcomes = {phrases: _answer_in_words(question.answer()) for phrases, question in promotions().items()}
    made = rows([list(axis) for axis in PROMOTED], outcomes)
    return _table(["A does not serve, and", "`promote`", "with `--yes`", "with `--force`", "reason, as the node says it"], made)


# ---- the page

_BEGINNING = """\
# When two nodes meet

An **epoch** is one reign: a number, a random tag, the node that is the primary, and the in-sync set. Whenever the primary or
the set changes, a new epoch begins, and is durable before anything is acknowledged in it. A node leaves the set before the
other goes on without it, and enters it when it has the whole tree. The set names a node with the boot of its machine: after a
restart of the machine what was not fsynced may be gone, so it gives way to a node that still has it. A node whose tree is not
whole, *being resynced* or *outdated* (its disk failed, or it missed changes), is not made the primary without force.

Each node keeps the epochs that it knows, and in which of them it acknowledged changes without asking the other. When two
nodes meet they compare what they know: the same newest epoch, one knows more, or each knows an epoch that the other does not.
Both come to the same verdict, and it says who serves and who follows. In a split brain, and while a person is waited for, no
data is touched, and a node that serves goes on; only if both serve, the one that the verdict names stops.

How to read the tables: A was the primary at first and B its standby, both with everything; a row says what happened then.
**What a row does not mention makes no difference to it**, or could not be otherwise. Every start begins in `waiting`: a node
leaves it by meeting the other (the first tables), or because a person says so (the last one).

This page is made by `python -m tests.unit.handshake_table --write`, which asks the code (`core.epochs`).
"""
_OPERATOR = """\
## What `mirrorfs promote` does

This is about a node that neither serves nor follows. On a node that follows, `promote` is a handover, which loses nothing,
and is refused until the node is in sync; where the verdict is that the other node serves, `promote` says so whatever the
options are. After a split brain B counts as a node that cannot be reached, and it takes a word (`--yes`) at least to go on
with one side's history. Where no other node is configured, a node promotes itself at its start if that needs no option.
*Asks* is exit status 4, *refuses* is 3. A promotion that is *forced* is marked in its epoch: with a node that it may have
skipped it is a split brain, never a resync.
"""


def page() -> str:
    """docs/HANDSHAKE.md as it has to be now."""
    lines = [_BEGINNING, "## What they conclude", ""]
    for family in FAMILIES:
        lines += _met(family)
    return "\n".join([*lines, _OPERATOR, *_promoted()]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
