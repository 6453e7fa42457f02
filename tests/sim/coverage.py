"""Which rows of the tables were taken: those of the controller, the arbiter's record, the handshake, promotions and modes."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

from mirrorfs import failover
from mirrorfs.core import claims, epochs
from mirrorfs.core.controller import RULES
from mirrorfs.core.epochs import meet
from mirrorfs.core.modes import Mode
from mirrorfs.replication import Primary
from tests.unit.situations import FAMILIES, promotions

Row = tuple[str, str]

#: What differs between two runs in a reason that is the same.
_NAMES: Final = re.compile(r"\b(?!a (?:complete|copy|person|quick|second|backup))[abAB]\b")
_VALUES: Final = re.compile(r"\d+|\([0-9a-f]{8}\)|(?<=since ).*(?=: if)|(?<=began at )[^;]*")

#: Every row that a run with controllers and an arbiter can take, and has to.
EXPECTED: Final = frozenset(
    {("controller", f"{rule.posture}: {rule.name}") for rule in RULES}
    | {("go on", kind) for kind in ("Swap", "Lost", "NoArbiter")}
    | {("publish", kind) for kind in ("nothing", "Swap", "AskPeer")}
    | {("handshake", kind) for kind in ("Resume", "Wait")}
    | {("promotion", kind) for kind in ("Allowed", "AskFirst", "Forbidden")}
    | {("mode", f"{one.name} -> {two.name}") for one, two in (
        (Mode.ALONE, Mode.MIRRORED),
        (Mode.ALONE, Mode.ENDED),
        (Mode.MIRRORED, Mode.FROZEN),
        (Mode.MIRRORED, Mode.ENDED),
        (Mode.MIRRORED, Mode.LOST),
        (Mode.LOST, Mode.ALONE),
        (Mode.FROZEN, Mode.ALONE),
        (Mode.FROZEN, Mode.ENDED),
    )}
)  # fmt: skip


@contextlib.contextmanager
def counted(taken: Counter[Row]) -> Iterator[None]:
    """Count in `taken` which rows are taken within."""

    def watch(room: Any, name: str, note: Callable[..., None]) -> Any:
        original = getattr(room, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            answer = original(*arguments, **options)
            note(answer, *arguments)
            return answer

        return mock.patch.object(room, name, watched)

    def rule(answer: Any, *_: Any) -> None:
        if answer is not None:
            taken["controller", f"{answer.posture}: {answer.name}"] += 1

    def kind(table: str) -> Callable[..., None]:
        def note(answer: Any, *_: Any) -> None:
            taken[table, "nothing" if answer is None else type(answer).__name__] += 1
            if why := _why(table, answer):
                taken[why] += 1

        return note

    def mode(primary: Primary, value: Mode) -> None:
        before = vars(primary).get("_mode")
        if before is not None and before is not value:
            taken["mode", f"{before.name} -> {value.name}"] += 1
        vars(primary)["_mode"] = value

    with contextlib.ExitStack() as stack:
        for patch in (
            watch(failover, "next_rule", rule),
            watch(claims, "to_go_on", kind("go on")),
            watch(claims, "to_publish", kind("publish")),
            watch(epochs, "meet", kind("handshake")),
            watch(epochs, "may_promote", kind("promotion")),
            mock.patch.object(Primary, "mode", property(lambda primary: vars(primary)["_mode"], mode), create=True),
        ):
            stack.enter_context(patch)
        yield


def rows_of_the_pages() -> set[Row]:
    """The reasons in docs/HANDSHAKE.md, of verdicts and of answers to a promotion."""
    met = [meet(a.hello(), b.hello()) for family in FAMILIES for a, b in family.cases().values()]
    asked = [question.answer() for question in promotions().values()]
    return {row for row in (_why("handshake", each) for each in met) if row} | {
        row for row in (_why("promotion", each) for each in asked) if row
    }


def _why(table: str, answer: Any) -> Row | None:
    reason = getattr(answer, "reason", "")
    text = _VALUES.sub("..", _NAMES.sub("X", reason))
    return (f"{table}, why", f"{type(answer).__name__}: {text}") if text else None


def table(taken: Counter[Row]) -> str:
    """What was taken how often, and what was not."""
    rows = [(*row, str(taken[row])) for row in sorted(EXPECTED | rows_of_the_pages() | set(taken))]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:{width}} {count:>9} {row}" for name, row, count in rows)


def missing(taken: Counter[Row]) -> list[Row]:
    """What was to be taken and was not."""
    return sorted(EXPECTED - set(taken))
