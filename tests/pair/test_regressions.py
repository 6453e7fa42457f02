"""Defects that were found in a pair once, each with the sequence that showed it."""

import errno
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import netns

from mirrorfs.core import ids, packing, wire
from mirrorfs.core import operations as ops
from mirrorfs.core.epochs import Epoch, Hello, Record
from mirrorfs.core.wire import Kind
from mirrorfs.errors import MirrorfsError
from mirrorfs.journal import Journal
from mirrorfs.lab.configuration import PORT
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Host, Lab, wait_for
from mirrorfs.trust import Trust
from tests.pair.support import NewLines, state, status, tree_differences, wait_state

pytestmark = pytest.mark.root


def _forget_caches() -> None:
    """Make the kernel forget the names and inodes that nobody uses."""
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # its mount may be dead
            os.close(descriptor)


def _fails(expected: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == expected, caught.value


@contextmanager
def _calling(host: Host, to: str) -> Iterator[socket.socket]:
    """A connection from the host to the other's port, with the host's keys."""

    def inside() -> socket.socket:
        # A thread can be in another network namespace than its process, and this one ends when it is done.
        netns.setns(f"/run/netns/{host.netns}", flags=0)
        return socket.create_connection((ADDRESSES[to], PORT), timeout=20)

    with ThreadPoolExecutor(max_workers=1) as executor:
        connection = executor.submit(inside).result()
    with Trust(host.keys).context(server_side=False).wrap_socket(connection) as secured:
        yield secured


class Writer:
    """Makes files below a mount, one after the other, whatever the node says; knows which of them were acknowledged."""

    def __init__(self, host: Host) -> None:
        self.acknowledged: list[str] = []
        self._host = host
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stopping.is_set():
            number += 1
            name = f"{self._host.name}-{number}"
            try:
                (self._host.mount / name).write_text(name)
                self.acknowledged.append(name)
            except OSError:
                self._stopping.wait(0.01)

    def wait_acknowledged(self, more: int) -> None:
        """Wait until so many more files were made."""
        goal = len(self.acknowledged) + more
        wait_for(lambda: len(self.acknowledged) >= goal, f"{more} files are made on {self._host.name}")

    def missing(self, lab: Lab) -> list[Path]:
        """The acknowledged files that are not whole in both trees."""
        found = [host.backing / name for host in lab.hosts.values() for name in self.acknowledged]
        return [path for path in found if not path.exists() or path.read_text() != path.name]


# ---- the record and the tree


def test_a_node_whose_tree_is_gone_refuses_to_start_and_nothing_is_deleted_on_the_other(lab: Lab) -> None:
    names = {f"file-{number}" for number in range(5)}
    for name in names:
        (lab.one.mount / name).write_text("precious")
    assert tree_differences(lab) == []
    lab.one.kill()
    lab.two.kill()
    lab.one.backing.rename(lab.one.backing.with_name("aside"))
    lab.one.backing.mkdir()
    lines = NewLines(lab.one)
    lab.one.launch()
    lab.two.start()
    wait_for(lambda: not lab.one.pids(), "node one refuses to start")
    assert "--discard-local-data" in lines()[-1]
    assert set(os.listdir(lab.two.backing)) == names
    lab.two.promote(yes=True)
    assert {(lab.two.mount / name).read_text() for name in names} == {"precious"}


# ---- strangers


def test_connections_that_are_reset_at_once_do_not_disturb_the_pair(mirrored: Lab) -> None:
    lab = mirrored
    epoch, pids = lab.one.status()["epoch_tag"], lab.one.pids()
    reset = (
        "import socket, struct, sys\n"
        "for _ in range(60):\n"
        "    with socket.socket() as s:\n"
        "        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        "        s.connect((sys.argv[1], int(sys.argv[2])))\n"
    )
    lab.two.run("python3", "-c", reset, ADDRESSES["one"], str(PORT), check=True, timeout=60)
    (lab.one.mount / "after the resets").write_text("written")
    assert (lab.two.mount / "after the resets").read_text() == "written"
    assert lab.is_mirrored()
    assert (lab.one.status()["epoch_tag"], lab.one.pids()) == (epoch, pids)


_HELLO = Hello("lab", "two", "another boot", Record(), serving=False, empty=True, discard_local_data=False)


def _greeting(hello: Hello, **changed: Any) -> bytes:
    content = packing.pack_hello(hello)
    content["record"] |= changed
    return wire.preamble() + b"".join(wire.encode_message(Kind.HELLO, content))


SENT = {
    "an infinite epoch": _greeting(_HELLO, epochs=[[float("inf"), "", "", [], False, 0.0]]),
    "rubbish after the greeting": _greeting(_HELLO) + b"\xff" * 64,
    "a room of one number": _greeting(_HELLO) + b"".join(wire.encode_message(Kind.SPACE, [1])),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Node one alone, so that anybody can say that he is two."""
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        lab.two.kill()
        wait_state(lab.one, "solo")
        yield lab


@pytest.mark.parametrize("what", SENT)
def test_what_a_stranger_sends_while_no_peer_is_linked_ends_the_link_and_not_the_node(alone: Lab, what: str) -> None:
    pids = alone.one.pids()
    with _calling(alone.two, "one") as connection, suppress(ConnectionResetError, ssl.SSLError):
        connection.sendall(SENT[what])
        while connection.recv(65536):
            pass
    (alone.one.mount / "file").write_text(what)
    assert (alone.one.mount / "file").read_text() == what
    wait_state(alone.one, "solo")
    assert alone.one.pids() == pids


# ---- names that lead out of the tree

_ID = ids.make(1, 1, 1)
_DIRECTORY = 0o040755
ESCAPES: dict[str, ops.Operation] = {
    "making a directory": ops.MakeNode(1, b"../made", _ID, _DIRECTORY, 0, 0),
    "making a file": ops.MakeNode(1, b"./../made", _ID, 0o100644, 0, 0),
    "a symbolic link": ops.Symlink(1, b"../made", _ID, b"target", 0, 0),
    "a hard link": ops.Link(1, 1, b"../made"),
    "removing": ops.Unlink(1, b"../victim"),
    "removing a directory": ops.RemoveDirectory(1, b"../orphans"),
    "renaming from": ops.Rename(1, b"../victim", 1, b"stolen"),
    "renaming to": ops.Rename(1, b"own", 1, b"../victim"),
    "introducing": ops.Introduce(1, b"..", _ID),
    "an entry": ops.Entry(1, b"../victim", _ID, 0o100644, 0, 0, 0, 0, b"", ()),
    "what vanished": ops.Vanish(1, b"../victim", True),
}


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Record]]:
    """Node one waits for two, which is gone; with the record, in which two leads, anybody can say that he is it."""
    with Lab.up(tmp_path_factory.mktemp("lab"), options={"ack_timeout": "5s"}) as lab:
        (lab.one.mount / "own").write_text("own")
        assert tree_differences(lab) == []
        lab.one.kill()
        lab.two.kill()
        lab.one.start()
        record = Journal(lab.two.state_dir).load()
        last = record.epoch
        assert last is not None
        one, two = (next(member for member in last.in_sync if member.node == name) for name in ("one", "two"))
        for number, members in enumerate(({two}, {one, two}), start=last.number + 1):
            record = record.begin(Epoch(number, f"tag {number}", "two", frozenset(members), forced=False, began=0.0))
        (lab.one.backing.parent / "victim").write_text("victim")
        yield lab, record


class _Impostor:
    """Somebody who says that he is the primary."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = wire.Decoder()
        self._greeted = b""

    def send(self, frame: wire.Encoded) -> None:
        """Send one frame."""
        self._connection.sendall(b"".join(frame))

    def wait(self, kind: Kind | None) -> None:
        """Read until a frame of that kind arrives; None: until the node hangs up."""
        while data := self._receive():
            if any(frame.kind is kind for frame in self._decoder.feed(data)):
                return
        assert kind is None, f"the node hung up before {kind}"

    def _receive(self) -> bytes:
        try:
            while len(self._greeted) < wire.PREAMBLE.size:
                self._greeted += self._connection.recv(wire.PREAMBLE.size - len(self._greeted))
            return self._connection.recv(65536)
        except (ConnectionResetError, ssl.SSLError):
            return b""


def _around(lab: Lab) -> dict[str, Any]:
    """What stands in and around node one's tree."""
    tree, base = lab.one.backing, lab.one.backing.parent
    return {
        "names": [sorted(os.listdir(path)) for path in (tree, base, base.parent, base.parent.parent)],
        "contents": [(base / "victim").read_text(), (tree / "own").read_text()],
    }


@pytest.mark.parametrize("joined", [False, True], ids=["in a resync", "in sync"])
@pytest.mark.parametrize("what", ESCAPES)
def test_an_operation_with_a_name_that_leads_out_of_the_tree_ends_the_link_and_touches_nothing(
    led: tuple[Lab, Record], what: str, joined: bool
) -> None:
    lab, record = led
    operation, pids, before = ESCAPES[what], lab.one.pids(), _around(lab)
    lines = NewLines(lab.one)
    hello = replace(_HELLO, record=record, serving=True, empty=False)
    with _calling(lab.two, "one") as connection:
        impostor = _Impostor(connection)
        connection.sendall(_greeting(hello))
        impostor.send(wire.encode_message(Kind.FOLLOW, {"record": packing.pack_record(record), "quick": False}))
        impostor.wait(Kind.FOLLOWING)
        if joined:
            impostor.send(wire.encode_message(Kind.JOIN, packing.pack_record(record)))
            impostor.wait(Kind.JOINED)
        impostor.send(wire.encode_message(wire.KIND_OF[type(operation)], astuple(operation), 1))
        impostor.wait(None)
    lines.wait(lambda line: "malformed" in line, "the operation is refused")
    assert len([line for line in lines() if " ERROR " in line]) == 1
    assert not any("Traceback" in line for line in lines())
    assert _around(lab) == before
    assert lab.one.pids() == pids


# ---- descriptors that are older than a role


def test_what_was_open_before_the_first_promotion_can_be_used_after_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Lab.create(tmp_path_factory.mktemp("lab")) as lab:
        directory = lab.one.mount / "app" / "log"
        directory.mkdir(parents=True)
        (directory / "a.log").write_text("one\n")
        lab.one.start()
        lab.two.start()
        with (
            _opened(directory, os.O_RDONLY | os.O_DIRECTORY) as held,
            _opened(directory / "a.log", os.O_RDONLY) as reader,
            subprocess.Popen(["sh", "-c", "read go; echo two > by-a-shell"], cwd=directory, stdin=subprocess.PIPE) as shell,
        ):
            assert os.pread(reader, 100, 0) == b"one\n"
            lab.one.promote(yes=True)
            lab.wait_mirrored()
            epoch = lab.one.status()["epoch_tag"]
            shell.communicate(b"go\n", timeout=30)
            assert shell.returncode == 0
            os.mkdir("made", dir_fd=held)
            os.close(os.open("made/file", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=held))
            with open(directory / "a.log", "w") as writer:
                writer.write("three, and longer\n")
            assert os.pread(reader, 100, 0) == b"three, and longer\n"
            assert os.fstat(reader).st_size == len("three, and longer\n")
        assert (lab.two.mount / "app" / "log" / "by-a-shell").read_text() == "two\n"
        assert (lab.two.mount / "app" / "log" / "made" / "file").exists()
        assert tree_differences(lab) == []
        assert lab.is_mirrored()
        assert lab.one.status()["epoch_tag"] == epoch


def test_an_open_file_whose_other_name_the_kernel_forgot_can_be_written_after_the_peer_came_back(lab: Lab) -> None:
    for name in ("a", "b"):
        (lab.one.mount / name).mkdir()
    (lab.one.mount / "a" / "x").write_text("1")
    os.link(lab.one.mount / "a" / "x", lab.one.mount / "b" / "y")
    with _opened(lab.one.mount / "a" / "x", os.O_WRONLY | os.O_APPEND) as descriptor:
        os.fsync(descriptor)
        _forget_caches()
        lab.two.kill()
        wait_state(lab.one, "solo")
        lab.two.start()
        lab.wait_mirrored()
        _forget_caches()
        assert os.write(descriptor, b"2") == 1
        os.fsync(descriptor)
    assert {(lab.two.backing / name).read_text() for name in ("a/x", "b/y")} == {"12"}
    assert lab.is_mirrored()
    assert tree_differences(lab) == []


def test_a_sync_after_a_handover_fails_for_writers_and_not_for_readers(lab: Lab) -> None:
    path = lab.one.mount / "file"
    with (
        _opened(path, os.O_RDWR | os.O_CREAT) as first,
        _opened(path, os.O_WRONLY) as second,
        _opened(path, os.O_WRONLY) as third,
    ):
        os.write(first, b"data")
        os.close(os.dup(first))
        with _opened(lab.two.mount / "file", os.O_RDONLY) as reader:
            lab.two.promote()
            lab.wait_mirrored()
            for descriptor in (first, second):
                _fails(errno.EROFS, partial(os.fsync, descriptor))
            os.close(os.dup(third))
            _fails(errno.EROFS, partial(os.fdatasync, third))
            os.fsync(reader)
    assert lab.is_mirrored()


# ---- a node that ends


def test_a_primary_that_ends_under_load_does_not_go_on_alone_so_that_its_peer_may_be_promoted(lab: Lab) -> None:
    lines = NewLines(lab.one)
    with Writer(lab.one) as writer:
        writer.wait_acknowledged(20)
        for pid in lab.one.pids():
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not lab.one.pids(), "node one ends")
    assert [line for line in lines() if "going on alone" in line] == []
    wait_state(lab.two, "waiting")
    lab.two.promote(yes=True)
    lab.one.start()
    lab.wait_mirrored()
    assert lab.primary() is lab.two
    assert writer.missing(lab) == []
    assert tree_differences(lab) == []


# ---- both nodes restarted


def test_a_pair_that_was_killed_comes_back_mirrored_by_itself(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("acknowledged")
    for host in lab.hosts.values():
        host.kill()
    for host in lab.hosts.values():
        host.launch()
    lab.wait_mirrored()
    assert [(host.mount / "file").read_text() for host in lab.hosts.values()] == ["acknowledged"] * 2
    assert tree_differences(lab) == []


def test_a_promotion_while_both_nodes_come_back_never_makes_two_histories(lab: Lab) -> None:
    for _ in range(4):
        primary = lab.primary()
        assert primary is not None
        would_be_standby = lab.two if primary is lab.one else lab.one
        lab.one.kill()
        lab.two.kill()
        would_be_standby.launch()
        primary.launch()
        with Writer(lab.one) as on_one, Writer(lab.two) as on_two:

            def come_back(host: Host = would_be_standby) -> bool:
                with suppress(MirrorfsError):
                    host.promote(yes=True)
                return lab.is_mirrored()

            wait_for(come_back, "the pair is mirrored while one of them is promoted again and again")
            lab.wait_mirrored()
            chosen = lab.primary()
            assert chosen is not None
            (on_one if chosen is lab.one else on_two).wait_acknowledged(10)
        assert not any(status(host).get("split_brain") for host in lab.hosts.values())
        assert tree_differences(lab) == []
        assert [*on_one.missing(lab), *on_two.missing(lab)] == []


# ---- freezing, and the role there and back


def test_writers_that_wait_for_a_thaw_keep_nobody_from_asking_for_the_free_space(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    lab = make_lab(on_peer_loss="freeze", freeze_timeout="120s", ack_timeout="1s")
    count = 230
    waiting = tmp_path / f"{os.minor(os.stat(lab.one.mount).st_dev)}" / "waiting"  # requests without an answer
    written: list[int] = []

    def write(descriptor: int) -> None:
        with suppress(OSError):
            written.append(os.write(descriptor, b"x"))

    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", tmp_path], check=True)
        stack.callback(partial(subprocess.run, ["umount", tmp_path], check=True))
        names = [lab.one.mount / f"{number}" for number in range(count)]
        descriptors = [stack.enter_context(_opened(name, os.O_WRONLY | os.O_CREAT)) for name in names]
        lab.two.kill()
        wait_state(lab.one, "waiting")
        writers = [threading.Thread(target=write, args=(descriptor,)) for descriptor in descriptors]
        for writer in writers:
            writer.start()
            stack.callback(writer.join)
        thaw = stack.enter_context(ExitStack())
        thaw.callback(lab.one.kill)  # after a failure it is this that answers the writers
        wait_for(lambda: int(waiting.read_text()) >= count, "all of them wait")
        subprocess.run(["stat", "-f", lab.one.mount], stdout=subprocess.DEVNULL, check=True, timeout=60)
        assert written == []
        assert state(lab.one) == "waiting"
        lab.two.start()
        wait_for(lambda: len(written) == count, "all of them have written")
        thaw.pop_all()
    lab.wait_mirrored()
    assert tree_differences(lab) == []


def _succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except MirrorfsError:
        return False
    return True


def test_the_role_given_away_and_taken_back_at_once_loses_nothing(lab: Lab) -> None:
    with Writer(lab.one) as on_one, Writer(lab.two) as on_two:
        for _ in range(10):
            on_one.wait_acknowledged(10)
            lab.one.demote()
            wait_for(lambda: _succeeds(lab.one.promote), "node one has the role again")
            lab.wait_mirrored()
            assert lab.primary() is lab.one
    assert tree_differences(lab) == []
    assert [*on_one.missing(lab), *on_two.missing(lab)] == []
    assert not any(status(host).get("split_brain") for host in lab.hosts.values())
