"""Who waits while the node is frozen may be killed, unless what he asked for is made already; other signals change nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Lab, wait_for
from tests.pair.support import start_mirrored, tree_differences, wait_state

pytestmark = pytest.mark.root

#: One line is printed before the call that waits, and what became of it after.
_PROGRAM = """
import os, signal, sys
top, action = sys.argv[1:]
os.chdir(top)
file = os.open(action + "/file", os.O_RDWR | (os.O_DSYNC if action == "write-dsync" else 0))

class Caught(Exception):
    pass

def interrupted(number, frame):
    raise Caught

signal.signal(signal.SIGUSR1, interrupted)
signal.signal(signal.SIGUSR2, lambda number, frame: print("again", flush=True))
signal.siginterrupt(signal.SIGUSR2, False)
ACTIONS = {
    "write": lambda: os.pwrite(file, b"written", 0),
    "write-dsync": lambda: os.pwrite(file, b"written", 0),
    "fsync": lambda: os.fsync(file),
    "make": lambda: os.mkdir("make/new"),
    "rename": lambda: os.rename("rename/file", "rename/renamed"),
    "chmod": lambda: os.chmod("chmod/file", 0o600),
    "truncate": lambda: os.ftruncate(file, 1),
}
print("begins", flush=True)
try:
    ACTIONS[action]()
    print("done", flush=True)
except Caught:
    print("interrupted", flush=True)
"""
ACTIONS = ("write", "write-dsync", "fsync", "make", "rename", "chmod", "truncate")


class Application:
    """A process that does one thing on the mount of node one, in a directory of its own: the kernel lets nobody at a file or
    a directory where another waits with a change."""

    def __init__(self, lab: Lab, action: str) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(lab.one.mount), action]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.line() == "begins"

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    @property
    def waits(self) -> bool:
        """Whether it waits for an answer of the node."""
        return "request_wait_answer" in Path(f"/proc/{self.process.pid}/stack").read_text()

    def wait_waiting(self) -> None:
        wait_for(lambda: self.waits, "it waits for the node")

    def killed(self) -> int:
        """Kill it; returns what it ended with."""
        self.process.kill()
        return self.process.wait(60)


_OPTIONS = {"freeze_timeout": "1h", "ack_timeout": "1s"}


def _fill(lab: Lab) -> None:
    for action in ACTIONS:
        (lab.one.mount / action).mkdir()
        (lab.one.mount / action / "file").write_text("as it was")


def _started(lab: Lab, action: str, stack: ExitStack) -> Application:
    """One that is ended with the stack."""
    application = Application(lab, action)
    stack.callback(application.process.communicate)
    stack.callback(application.process.kill)
    return application


@pytest.fixture
def lab(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A pair whose primary freezes without its peer, for longer than any test lasts."""
    monkeypatch.setenv("MIRRORFS_SESSION", "kernel")
    lab = make_lab(on_peer_loss="freeze", **_OPTIONS)
    _fill(lab)
    return lab


@pytest.fixture
def start(lab: Lab) -> Iterator[Callable[[str], Application]]:
    """Starts applications; those that still wait after the test are ended."""
    with ExitStack() as stack:
        yield lambda action: _started(lab, action, stack)
        lab.two.kill()
        lab.one.kill()  # what waits for it would be waited for


@contextmanager
def _frozen(lab: Lab) -> Iterator[None]:
    """In here node one is frozen; afterwards the pair is mirrored again."""
    lab.two.kill()
    wait_state(lab.one, "waiting")
    yield
    lab.two.start()
    lab.wait_mirrored()


def _is_as_it_was(top: Path) -> bool:
    return all(
        os.listdir(top / action) == ["file"]
        and (top / action / "file").read_text() == "as it was"
        and (top / action / "file").stat().st_mode & 0o777 == 0o644
        for action in ACTIONS
    )


def test_who_waits_in_a_freeze_can_be_killed_and_nothing_was_done(lab: Lab, start: Callable[[str], Application]) -> None:
    with _frozen(lab):
        for action in ACTIONS:
            application = start(action)
            application.wait_waiting()
            assert application.killed() == -signal.SIGKILL, action
        assert _is_as_it_was(lab.one.mount)
    assert _is_as_it_was(lab.two.backing)
    assert tree_differences(lab) == []


def test_who_catches_a_signal_in_a_freeze_goes_on_waiting_and_can_be_killed_later(
    lab: Lab, start: Callable[[str], Application]
) -> None:
    with _frozen(lab):
        for action in ACTIONS:
            application = start(action)
            application.wait_waiting()
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                application.process.send_signal(number)
            # The node is told of signals in their order: when this one has ended, it has heard of those.
            later = start("chmod" if action == "rename" else "rename")
            later.wait_waiting()
            assert later.killed() == -signal.SIGKILL
            assert application.waits, action
            assert application.killed() == -signal.SIGKILL, action
        assert _is_as_it_was(lab.one.mount)
    assert tree_differences(lab) == []


def test_a_signal_that_ends_a_process_ends_its_wait(lab: Lab, start: Callable[[str], Application]) -> None:
    with _frozen(lab):
        application = start("write")
        application.wait_waiting()
        application.process.terminate()
        assert application.process.wait(60) == -signal.SIGTERM
        assert _is_as_it_was(lab.one.mount)
    assert tree_differences(lab) == []


def test_what_waits_through_signals_is_done_once(lab: Lab, start: Callable[[str], Application]) -> None:
    with _frozen(lab):
        applications = [start(action) for action in ("write", "fsync")]
        for application in applications:
            application.wait_waiting()
            application.process.send_signal(signal.SIGUSR2)
    for application in applications:
        assert [application.line(), application.line()] == ["again", "done"]
    assert (lab.two.backing / "write" / "file").read_text() == "writtenas"
    assert tree_differences(lab) == []


def test_a_change_that_is_made_is_waited_for_and_a_sync_is_not(lab: Lab, start: Callable[[str], Application]) -> None:
    standby = [*map(str, lab.two.pids())]
    lab.two.run("kill", "-STOP", *standby, check=True)
    made = [start(action) for action in ("write", "write-dsync", "make")]
    sync = start("fsync")
    for application in (*made, sync):
        application.wait_waiting()
    wait_state(lab.one, "waiting")
    assert (lab.one.backing / "make" / "new").is_dir(), "it is made, and the standby may have it"
    for application in made:
        application.process.kill()
    # The node is told of signals in their order: when these two have ended, it has heard of those.
    assert sync.killed() == -signal.SIGKILL
    later = start("rename")
    later.wait_waiting()
    assert later.killed() == -signal.SIGKILL
    assert [application.process.poll() for application in made] == [None] * len(made)
    lab.two.run("kill", "-CONT", *standby, check=True)
    lab.wait_mirrored()
    assert [application.process.wait(60) for application in made] == [-signal.SIGKILL] * len(made)
    for action in ("write", "write-dsync"):
        assert (lab.two.backing / action / "file").read_text() == "writtenas"
    assert (lab.two.backing / "make" / "new").is_dir()
    assert (lab.two.backing / "rename" / "file").exists()
    assert tree_differences(lab) == []


#: An address of RFC 5737, where nobody is.
_ARBITER = '[arbiter]\nkind = "etcd"\nendpoints = ["http://192.0.2.1:2379"]\ntimeout = "500ms"\n'


def test_who_waits_for_an_arbiter_that_does_not_answer_can_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRRORFS_SESSION", "kernel")
    with Lab.create(tmp_path / "lab", options=_OPTIONS, sections=_ARBITER) as lab:
        start_mirrored(lab)
        _fill(lab)
        lab.two.kill()
        wait_state(lab.one, "waiting")
        with ExitStack() as stack:
            application = _started(lab, "write", stack)
            stack.callback(lab.one.kill)  # what waits for it would be waited for
            application.wait_waiting()
            assert application.killed() == -signal.SIGKILL
            assert (lab.one.mount / "write" / "file").read_text() == "as it was"
