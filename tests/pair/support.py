"""What the tests of a pair share: commands as an operator gives them, new log lines, trees, small disks, a writing load."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mirrorfs import backing
from mirrorfs.errors import ControlError
from mirrorfs.lab.pair import Host, Lab, wait_for
from mirrorfs.lab.trees import differences

WRITER = Path(__file__).with_name("writer.py")
WRITER_KINDS = ("append", "append-fsync", "overwrite", "names", "tree")
#: What these have noted is on stable storage.
DURABLE_KINDS = ("append-fsync", "append-dsync", "overwrite-fdatasync", "overwrite-msync", "names-fsync")


#: A server on port 7000 (Python; its argument is a file). It says of a number that it is told that it is kept once it is on
#: stable storage.
NUMBERS = """\
import os, socket, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
server = socket.create_server(("", 7000))
while True:
    connection, _ = server.accept()
    with connection:
        try:
            said = connection.recv(100)
        except ConnectionError:
            continue
        if said:
            os.write(file, said + bytes([10]))
            os.fsync(file)
            connection.sendall(b"kept")
"""
#: Tells it one (Python; its arguments are the address and the number); exit status 0 if that is kept.
TELL = """\
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=1) as made:
    made.sendall(sys.argv[2].encode())
    sys.exit(made.recv(100) != b"kept")
"""


def numbers(file: Path) -> set[int]:
    """What NUMBERS has kept in its file."""
    return set(map(int, file.read_text().split()))


def mirrorfs(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `mirrorfs ARGUMENTS` for the host's node."""
    command = [sys.executable, "-m", "mirrorfs", *arguments, "--config", str(host.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/", check=False)


def state(host: Host) -> str:
    """The node's state in one word; empty if it does not answer."""
    return str(status(host).get("state", ""))


def status(host: Host) -> dict[str, Any]:
    """The node's status; empty if it does not answer."""
    try:
        return host.status()
    except ControlError:
        return {}


def wait_state(host: Host, *wanted: str, deadline_s: float = 30) -> None:
    """Wait until the node is in one of the states."""
    wait_for(lambda: state(host) in wanted, f"{host.name} is {' or '.join(wanted)}", deadline_s)


def wait_peer_lost(host: Host) -> None:
    """Wait until the node knows that its link has ended."""
    wait_for(lambda: status(host).get("peer", {}).get("state") == "disconnected", f"{host.name} misses its peer")


def other(lab: Lab, host: Host) -> Host:
    """The host's peer."""
    return lab.two if host is lab.one else lab.one


def tree_differences(lab: Lab) -> list[str]:
    """How the two backing trees differ once the modification times are settled; the pair is mirrored."""
    primary = lab.primary()
    assert primary is not None
    wait_for(lambda: bool(status(primary).get("settled")), "modification times are settled")
    found: list[str] = []

    def equal() -> bool:
        found[:] = differences(lab.one.backing, lab.two.backing)
        return not found

    # The last of them is on the stream by then, but nobody waits for it to arrive.
    end = time.monotonic() + 5
    while not equal() and time.monotonic() < end:
        time.sleep(0.05)
    return found


class NewLines:
    """The lines that a node's log has gained since this was made."""

    def __init__(self, host: Host) -> None:
        self._log = host.log
        self._start = self._log.stat().st_size

    def __call__(self) -> list[str]:
        """Those lines, as they are now."""
        with open(self._log, errors="replace") as log:
            log.seek(self._start)
            return log.read().splitlines()

    def wait(self, condition: Callable[[str], bool], what: str) -> str:
        """Wait for a line that fulfils the condition, and return it."""
        wait_for(lambda: any(map(condition, self())), f"a log line: {what}")
        return next(line for line in self() if condition(line))


@contextmanager
def small_disk(lab: Lab, host: Host, image: Path, size_bytes: int) -> Iterator[None]:
    """Give a host of a lab that is not started yet a disk of its own of that size, until the block ends (lab down before)."""
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["umount", host.under], check=True)
    subprocess.run(["mount", "-o", "loop", image, host.mount], check=True)
    (host.mount / "lost+found").rmdir()  # files of an unknown volume would have to be discarded
    subprocess.run(["mount", "--bind", host.mount, host.under], check=True)
    subprocess.run(["mount", "--make-private", host.under], check=True)
    try:
        yield
    finally:
        lab.down()
        image.unlink()


def start_mirrored(lab: Lab) -> None:
    """Start both nodes of a lab that was only created, node one as the primary."""
    for host in lab.hosts.values():
        host.start()
    lab.one.promote(yes=True)
    lab.wait_mirrored()


class Load:
    """Several processes that write below a directory of a mount, each noting outside of it what was acknowledged."""

    def __init__(self, mount: Path, name: str, notes: Path, *, seed: int = 0, kinds: tuple[str, ...] = WRITER_KINDS) -> None:
        self.name = name
        self.notes = {kind: notes / f"{name}-{kind}" for kind in kinds}
        (mount / name).mkdir()
        self._writers: list[subprocess.Popen[str]] = []
        for kind, file in self.notes.items():
            file.touch()
            command = [sys.executable, str(WRITER), kind, str(mount / name), str(file), str(seed)]
            self._writers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))

    def noted(self, kinds: tuple[str, ...] | None = None) -> int:
        """How many notes have been made, by writers of these kinds or by all."""
        return sum(self.notes[kind].read_bytes().count(b"\n") for kind in kinds or self.notes)

    def wait_noted(self, more: int, kinds: tuple[str, ...] | None = None, deadline_s: float = 60) -> None:
        """Wait until every writer has begun and so many more notes were made, by writers of these kinds or by all."""
        goal = self.noted(kinds) + more
        wait_for(
            lambda: self.noted(kinds) >= goal and all(file.stat().st_size for file in self.notes.values()),
            f"{more} changes are acknowledged under load",
            deadline_s,
        )

    def ended(self) -> list[str]:
        """Wait until every writer has stopped by itself, and return the error that each ended with (none: empty)."""
        errors = [writer.communicate(timeout=60)[1].strip() for writer in self._writers]
        self._writers.clear()
        return errors

    def stop(self) -> list[str]:
        """Tell the writers to stop after their present change; the errors that they ended with."""
        for writer in self._writers:
            writer.terminate()
        return self.ended()

    def kill(self) -> None:
        """End the writers whatever they do, at the end of a test that failed."""
        for writer in self._writers:
            writer.kill()
            writer.communicate()

    def longest_stall_s(self) -> float:
        """The longest time that one writer waited between two notes, in seconds."""
        longest = 0.0
        for file in self.notes.values():
            moments = [json.loads(line)["at"] for line in file.read_text().splitlines()]
            longest = max([longest, *(after - before for before, after in pairwise(moments))])
        return longest

    def missing(self, mount: Path, kinds: tuple[str, ...] | None = None) -> list[str]:
        """What was acknowledged (to writers of these kinds, or to all) and cannot be found below the mount: a line each."""
        lost: list[str] = []
        for kind in kinds or self.notes:
            notes = [json.loads(line) for line in self.notes[kind].read_text().splitlines()]
            lost += [f"{kind}: {text}" for text in _missing_of(kind, mount / self.name, notes)]
        return lost


@dataclass(slots=True)
class Client:
    """Commits one number after the other as long as the block lasts, and keeps those whose commit was acknowledged."""

    commit: Callable[[int], bool]
    noted: list[int] = field(default_factory=list)
    deadline_s: float = 90
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Client":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stopping.is_set():
            number += 1  # never the same twice: one that was not acknowledged may be there all the same
            if self.commit(number):
                self.noted.append(number)

    def wait_noted(self, more: int) -> None:
        """Wait until so many more were acknowledged."""
        goal = len(self.noted) + more
        wait_for(lambda: len(self.noted) >= goal, f"{more} more commits are acknowledged", self.deadline_s)


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _missing_appended(directory: Path, notes: list[dict[str, Any]], name: str) -> Iterator[str]:
    there = _content(directory / name)
    for note in notes:
        record = b"%011d\n" % note["record"]
        at = note["record"] * len(record)
        if there[at : at + len(record)] != record:
            yield f"record {note['record']} of {name}"
            return


def _missing_overwritten(directory: Path, notes: list[dict[str, Any]], name: str) -> Iterator[str]:
    newest: dict[int, int] = {note["slot"]: note["value"] for note in notes}
    there = _content(directory / name)
    for slot, value in newest.items():
        found = there[slot * 4096 : (slot + 1) * 4096]
        # What was not acknowledged may be there as well: one more value at most.
        values = {found[at : at + 8] for at in range(0, 4096, 8)}
        if len(values) != 1 or int.from_bytes(found[:8], "little") < value:
            yield f"value {value} in slot {slot}"


def _missing_spread(directory: Path, notes: list[dict[str, Any]], name: str) -> Iterator[str]:
    if not notes:
        return
    with open(directory / name, "rb", buffering=0) as there:
        for note in notes:
            there.seek(note["value"] << 22)
            if there.read(8) != note["value"].to_bytes(8, "little"):
                yield f"value {note['value']} of {name}"


def _missing_names(directory: Path, notes: list[dict[str, Any]]) -> Iterator[str]:
    unknown = {note["name"] for note in notes if note["what"] == "removing"}
    removed = {note["name"] for note in notes if note["what"] == "removed"}
    for note in notes:
        name = note["name"]
        path = directory / name
        if note["what"] == "renamed" and name not in unknown and (not path.exists() or path.read_text() != name * 50):
            yield f"{name} after it was renamed to that"
    for name in removed:
        if (directory / name).exists():
            yield f"the removal of {name}"


def _missing_tree(directory: Path, notes: list[dict[str, Any]]) -> Iterator[str]:
    for note in notes:
        path = directory / note["path"]
        if not path.is_symlink() or os.readlink(path) != note["path"]:
            yield f"the link {note['path']}"


def _missing_of(kind: str, directory: Path, notes: list[dict[str, Any]]) -> Iterator[str]:
    match kind.partition("-")[0]:
        case "append":
            return _missing_appended(directory, notes, kind)
        case "overwrite":
            return _missing_overwritten(directory, notes, kind)
        case "spread":
            return _missing_spread(directory, notes, kind)
        case "names":
            return _missing_names(directory, notes)
        case _:
            return _missing_tree(directory, notes)


def seeded(*what: object) -> random.Random:
    """A source of chance that is the same in every run."""
    return random.Random(repr(what))


def lose_disks(host: Host) -> None:
    """A new machine takes the place of a host whose node does not run: neither files nor a state directory."""
    backing.set_immutable(host.under, False)
    for entry in host.under.iterdir():
        shutil.rmtree(entry)
    shutil.rmtree(host.state_dir)
