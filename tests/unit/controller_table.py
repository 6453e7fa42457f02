"""docs/FAILOVER.md's table and diagram, made from `core.controller`: `python -m tests.unit.controller_table --write`."""

import sys
from pathlib import Path

from mirrorfs.core.controller import RULES, Posture

PAGE = Path(__file__).parents[2] / "docs" / "FAILOVER.md"
BEGIN = "<!-- made by `python -m tests.unit.controller_table --write` -->\n"
END = "<!-- end of what is made -->\n"


def made() -> str:
    """The table of all rules and the diagram of them."""
    rows = ["| posture | when | then | what is done |", "|---|---|---|---|"]
    for rule in RULES:
        done = ", ".join(do.name.lower().replace("_", " ") for do in rule.do) or "-"
        rows.append(f"| {rule.posture} | {rule.name} | {rule.then} | {done} |")
    arrows = ["```mermaid", "stateDiagram-v2", f"    [*] --> {Posture.IDLE}"]
    arrows += [f"    {rule.posture} --> {rule.then}: {rule.name}" for rule in RULES]
    return "\n".join([*rows, "", *arrows, "```", ""])


def page() -> str:
    """The page with that part made anew."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + made() + END + after


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page())
