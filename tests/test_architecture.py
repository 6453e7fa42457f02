"""The rooms of docs/ARCHITECTURE.md: arrows point one way, `core` is pure, no module grows out of its room."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mirrorfs"
MODULES = sorted(SOURCE.rglob("*.py"))

#: Who may import whom: a module imports only from rooms that stand further down.
ORDER = [
    "__main__",
    "cli",
    "failover_cli",
    "setup_cli",
    "console_cli",
    "modules_cli",
    "cli_base",
    "journal_show",
    "verify_show",
    "preview_show",
    "progress_show",
    "lab",
    "controller",
    "console",
    "words",
    "split_brain_show",
    "joining",
    "modules",
    "config_file",
    "units",
    "preparing",
    "support",
    "doctor",
    "failover",
    "application",
    "failover_memory",
    "watch",
    "daemon",
    "control",
    "status",
    "node",
    "conversation",
    "verify",
    "preview",
    "promotion",
    "pausing",
    "split_brain",
    "yielding",
    "divergence",
    "fuse_ops",
    "handles",
    "privileges",
    "session",
    "kernel",
    "pyfuse3_session",
    "answers",
    "standby",
    "witness",
    "arbitration",
    "housekeeping",
    "replication",
    "changes",
    "syncing",
    "settling",
    "introductions",
    "foresight",
    "measures",
    "marking",
    "checkpoint",
    "activity",
    "lost",
    "evidence",
    "resync",
    "syncing",
    "vip",
    "neighbours",
    "services",
    "checks",
    "commands",
    "heartbeat",
    "arbiter",
    "stream",
    "peer",
    "channel",
    "trust",
    "systemd",
    "filtering",
    "reactor",
    "strand",
    "keeper",
    "dirty_log",
    "journal",
    "tree",
    "contents",
    "notes",
    "search",
    "table",
    "logs",
    "files",
    "space",
    "backing",
    "config",
    "failover_config",
    "toml_table",
    "core",
    "errors",
    "",
]
#: What decides knows none of these.
WORLD = {"trio", "os", "socket", "time", "random", "pyfuse3", "subprocess", "pathlib", "threading", "logging"}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                inner.__dict__["names"] = []
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_a_module_imports_only_what_stands_below_it(file: Path) -> None:
    own = _room(_name(file))
    allowed = set(ORDER[ORDER.index(own) :])
    for imported in _imports(file):
        if imported.startswith("mirrorfs"):
            assert _room(imported) in allowed | {own, "__version__"}, imported


@pytest.mark.parametrize("file", [f for f in MODULES if f.parent.name == "core"], ids=_name)
def test_what_decides_touches_nothing(file: Path) -> None:
    assert {name.split(".")[0] for name in _imports(file)} & WORLD == set()


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_a_module_stays_within_its_room(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 500


def test_every_room_stands_in_the_architecture_page() -> None:
    page = (SOURCE.parents[1] / "docs" / "ARCHITECTURE.md").read_text()
    rooms = {_room(_name(file)) for file in MODULES} - {"", "__main__"}
    assert {room for room in rooms if f"{room}.py" not in page and f"{room}/" not in page} == set()
