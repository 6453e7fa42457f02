"""The demo, as it is run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mirrorfs.lab import demo, trees
from mirrorfs.lab.databases import Postgresql, Sqlite
from mirrorfs.lab.pair import Host, Lab

pytestmark = pytest.mark.root


def test_the_demo_loses_nothing_and_ends_with_equal_trees() -> None:
    command = [sys.executable, "-m", "mirrorfs", "demo", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    result = json.loads(done.stdout)
    assert (result["lost"], result["trees_equal"], result["differences"]) == (0, True, [])
    assert done.returncode == 0
    assert result["promote_seconds"] > 0
    parts = [result["sqlite"]]
    if Postgresql.installed():
        parts.append(result["postgres"])
    assert all(part["acknowledged"] > 0 and part["lost"] == 0 for part in parts)
    assert result["acknowledged"] == sum(part["acknowledged"] for part in parts)


class Forgetful(Sqlite):
    """Does not have what it acknowledged first."""

    def found(self, host: Host) -> set[int]:
        """All but the first number."""
        return super().found(host) - {1}


def test_the_demo_notices_what_is_lost_and_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "Sqlite", Forgetful)
    monkeypatch.setattr(Postgresql, "installed", lambda: None)
    monkeypatch.setattr(trees, "differences", lambda left, right: ["name: only left"])
    monkeypatch.setattr(demo, "_EQUAL_DEADLINE_S", 0)
    for pause in ("_MIRRORED_S", "_ALONE_S", "_BACK_S"):
        monkeypatch.setattr(demo, pause, 0)
    directory = tmp_path / "lab"
    assert demo.run(directory=directory, as_json=False) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[-1].endswith(" 1 lost; the trees differ")
    assert any(line.endswith("  name: only left") for line in told)
    assert any("PostgreSQL is not installed" in line for line in told)
    assert not directory.exists()
    assert not Lab(directory).network.exists()
