"""Somebody on the network of the nodes who has no keys: he gains nothing, and the pair does not notice."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.lab import attacks
from mirrorfs.lab.configuration import PORT
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Lab, wait_for
from tests.pair.support import NewLines

pytestmark = pytest.mark.root

_ELSEWHERE = "10.77.0.66"
# Opens connections that say nothing, prints how many there are, and holds them; argv: source, address, port, how many to try.
_FLOOD = """
import errno, select, socket, sys
source, address, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
held = []
for _ in range(count):
    made = socket.socket()
    made.setblocking(False)
    made.bind((source, 0))
    made.connect_ex((address, port))
    held.append(made)
poll = select.poll()
for made in held:
    poll.register(made, select.POLLOUT)
poll.poll(1000)
print(sum(made.connect_ex((address, port)) == errno.EISCONN for made in held), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def _flood(lab: Lab, source: str, count: int) -> subprocess.Popen[str]:
    command = (sys.executable, "-c", _FLOOD, source, ADDRESSES["one"], str(PORT), str(count))
    flood: subprocess.Popen[str] = lab.two.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return flood


def _sockets(lab: Lab) -> int:
    """How many sockets the node has open."""
    (pid,) = lab.one.pids()
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += str(descriptor.readlink()).startswith("socket:")
    return found


def test_a_thousand_connections_from_elsewhere_never_reach_the_node(lab: Lab) -> None:
    lab.two.run("ip", "address", "add", f"{_ELSEWHERE}/24", "dev", _interface(lab), check=True)
    epoch, before, lines = lab.one.status()["epoch_tag"], _sockets(lab), NewLines(lab.one)
    flood = _flood(lab, _ELSEWHERE, 1000)
    try:
        assert flood.stdout is not None
        assert int(flood.stdout.readline()) == 0
        assert _sockets(lab) <= before + 1
        (lab.one.mount / "file").write_text("content")
        assert (lab.two.mount / "file").read_text() == "content"
        # Nor is the other node kept from coming back.
        lab.two.kill()
        lab.two.start()
        wait_for(lab.is_mirrored, "the pair is mirrored again while the connections are tried")
    finally:
        flood.communicate("", timeout=60)
    assert lab.one.status()["epoch_tag"] != epoch
    assert not [line for line in lines() if _ELSEWHERE in line]


def test_connections_of_the_other_node_that_say_nothing_are_bounded_and_end(lab: Lab) -> None:
    before = _sockets(lab)
    flood = _flood(lab, ADDRESSES["two"], 200)
    try:
        assert flood.stdout is not None
        flood.stdout.readline()
        assert _sockets(lab) <= before + 2 * 16 + 2
        (lab.one.mount / "file").write_text("content")
        assert (lab.two.mount / "file").read_text() == "content"
        assert lab.is_mirrored()
        wait_for(lambda: _sockets(lab) <= before + 1, "they are hung up on", 120)
    finally:
        flood.communicate("", timeout=60)
    assert lab.is_mirrored()


def test_no_attack_moves_the_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Wrong certificates, slow handshakes, captured frames and heartbeats: epoch, in-sync set and service stay as they are.
    assert attacks.run(directory=tmp_path, rounds=1, seconds=0.5) == 0
    printed = capsys.readouterr().out.splitlines()[1:]
    assert len(printed) == len(attacks.ATTACKS)
    assert not [line for line in printed if line.split()[-1] == "0"]


def _interface(lab: Lab) -> str:
    """The interface of host two that has its address."""
    shown = lab.two.run("ip", "-o", "address", "show", "to", ADDRESSES["two"], check=True, capture_output=True, text=True)
    return str(shown.stdout.split()[1])
