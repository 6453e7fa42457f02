"""The alert rules by promtool, and the dashboard."""

import json
import subprocess
from pathlib import Path

MONITORING = Path(__file__).parents[2] / "packaging" / "monitoring"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, cwd=MONITORING)


def test_the_rules_are_rules() -> None:
    checked = promtool("check", "rules", "mirrorfs.rules.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_rules_raise_what_they_should_and_nothing_else() -> None:
    tested = promtool("test", "rules", "mirrorfs.rules.test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((MONITORING / "mirrorfs-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places), "no two in one place"
