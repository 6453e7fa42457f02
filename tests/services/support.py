"""What the tests of services need of the world: a stand-in for systemctl, a mount that hangs, processes found again."""

import contextlib
import ctypes
import os
import select
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from mirrorfs.failover_config import CheckConfig

DEADLINE_S = 30
LONG_S = float(DEADLINE_S)

_FUSE_IN_HEADER = 40
_FUSE_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_FUSE_OUT_HEADER = struct.Struct("=IiQ")
_FUSE_REQUEST_BYTES = 1024 * 1024
_MNT_DETACH = 2

_SYSTEMCTL = """#!/bin/sh
# Units are files: NAME.active, and what is wrong with them.
cd {state} || exit 1
echo "$*" >> calls
for unit; do :; done
case $1 in
  start)
    [ ! -e $unit.broken ] || {{ echo "Job for $unit failed."; exit 1; }}
    : > $unit.active ;;
  stop)
    [ ! -e $unit.stubborn ] || exec sleep 1000
    rm -f $unit.active ;;
  kill)
    [ -e $unit.immortal ] || rm -f $unit.active ;;
  is-active)
    if [ -e $unit.active ]; then echo active; else echo inactive; exit 3; fi ;;
esac
"""


def install_systemctl(directory: Path) -> Path:
    """The program; what it knows of units is in its directory, and `calls` has what it was asked."""
    program = directory / "systemctl"
    program.write_text(_SYSTEMCTL.format(state=directory))
    program.chmod(0o755)
    return program


def is_alive(pid: int) -> bool:
    """Whether there is such a process and it is no zombie: in this test's machine nobody may wait for an orphan."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def pid_in(path: Path) -> int:
    return int(path.read_text())


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds; fails after a time that no machine needs."""
    with trio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  (nobody tells of what happens in other processes)
            await trio.sleep(0.01)


@contextlib.contextmanager
def ending_what_is_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill whatever was started within, by a variable that it has in its environment."""
    mark = f"MIRRORFS_TEST={os.getpid()}-{os.urandom(8).hex()}"
    monkeypatch.setenv(*mark.split("="))
    try:
        yield
    finally:
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(pid)
                try:
                    if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                finally:
                    os.close(descriptor)


def command_check(text: str, failures: int = 2) -> CheckConfig:
    return CheckConfig("command", text, interval_s=0.01, timeout_s=LONG_S, failures=failures)


def daemon(tmp_path: Path, name: str, body: str = "exec sleep 1000") -> str:
    """A start command: it returns once a daemon in a session of its own has written its pid to NAME.pid."""
    script = tmp_path / f"{name}.sh"
    script.write_text(f"echo $$ > {tmp_path}/{name}.new\nmv {tmp_path}/{name}.new {tmp_path}/{name}.pid\n{body}\n")
    return f"setsid sh {script} & until [ -e {tmp_path}/{name}.pid ]; do sleep 0.01; done"


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class Watch:
    """What a watch has told, and the means to wait for it."""

    def __init__(self, tmp_path: Path) -> None:
        self.told: list[tuple[str, str]] = []
        self._looks = tmp_path / "looks"

    def check(self, condition: str, failures: int = 2) -> CheckConfig:
        """A check that is well if the shell says so of the condition; each look is counted."""
        return command_check(f"echo >> {self._looks}; {condition}", failures)

    def on_unwell(self, name: str, problem: str) -> None:
        self.told.append((name, problem))

    def looks(self) -> int:
        return len(self._looks.read_bytes()) if self._looks.exists() else 0

    async def more_looks(self, count: int) -> None:
        """Until the check has been run `count` times more from beginning to end."""
        before = self.looks()
        await eventually(lambda: self.looks() > before + count)


class HangingMount:
    """A FUSE mount that says that it is ready and then never answers anything."""

    def __init__(self, path: Path) -> None:
        """Mount it on `path`, a directory; needs root."""
        self.path = path
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"hanging", bytes(path), b"fuse", 0, options):
            number = ctypes.get_errno()
            os.close(self._device)
            raise OSError(number, os.strerror(number))
        unique = self.take()
        answer = _FUSE_INIT_OUT.pack(7, 31, 65536, 0, 0, 0, 65536, 1, 0, 0, 0)
        os.write(self._device, _FUSE_OUT_HEADER.pack(_FUSE_OUT_HEADER.size + len(answer), 0, unique) + answer)

    def take(self) -> int:
        """Wait for a request and take it; from then on who waits for its answer does not end on SIGKILL."""
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000), "no request has come"
        request = os.read(self._device, _FUSE_REQUEST_BYTES)
        assert len(request) >= _FUSE_IN_HEADER
        unique: int = struct.unpack_from("=Q", request, 8)[0]
        return unique

    def let_go(self) -> None:
        """Everybody who waits is told that the mount is gone, and then it is."""
        os.close(self._device)
        ctypes.CDLL(None).umount2(bytes(self.path), _MNT_DETACH)


@contextlib.contextmanager
def hanging_mount(path: Path) -> Iterator[HangingMount]:
    """A mount that hangs until the end of the block, or until it is let go."""
    path.mkdir()
    mount = HangingMount(path)
    released = contextlib.ExitStack()
    released.callback(mount.let_go)
    with released:
        yield mount
