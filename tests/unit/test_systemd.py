"""What systemd is told, and the units."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from mirrorfs import systemd

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def _all(told: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(told.recv(100))
        except BlockingIOError:
            return found


def test_a_state_is_told(told: socket.socket) -> None:
    systemd.notify("READY=1")
    assert _all(told) == [b"READY=1"]


def test_nobody_is_told_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")


async def test_signs_of_life_come_well_within_the_time_that_was_asked_for(
    told: socket.socket, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(60_000_000))
    with trio.move_on_after(59):
        await systemd.show_life()
    assert _all(told) == [b"WATCHDOG=1"] * 4


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
async def test_no_signs_of_life_for_who_does_not_ask(
    told: socket.socket, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with trio.fail_after(1):
        await systemd.show_life()
    assert _all(told) == []


@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.iterdir()))
def test_systemd_understands_the_units(tmp_path: Path, unit: str) -> None:
    for path in UNITS.iterdir():
        text = path.read_text()
        assert "ExecStart=/usr/bin/mirrorfs " in text
        (tmp_path / path.name).write_text(text.replace("/usr/bin/mirrorfs", shutil.which("true") or "/bin/true"))
    made = tmp_path / unit.replace("@.", "@data.")
    made.symlink_to(unit)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", made], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "mirrorfs" in line] == []
    assert done.returncode == 0, done.stderr
