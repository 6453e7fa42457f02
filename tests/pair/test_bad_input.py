"""What a stranger on the network says, and files touched underneath: each is met with one clear line, the pair undisturbed."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mirrorfs.core import packing, wire
from mirrorfs.core.epochs import Hello, Record
from mirrorfs.core.wire import Kind
from mirrorfs.lab.configuration import PORT
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Lab, wait_for
from mirrorfs.trust import Trust
from tests.pair.support import NewLines, tree_differences, wait_state

pytestmark = pytest.mark.root

# Sends what it is given and reads until the node hangs up, for which the node has its own limits; argv: address, port,
# half-close, and the directory of the keys with which it speaks TLS, if it does.
_STRANGER = """
import socket, ssl, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    if keys := sys.argv[4]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_cert_chain(keys + "/link.pem")
        context.load_verify_locations(keys + "/peer.pem")
        connection = context.wrap_socket(connection)
    connection.sendall(sys.stdin.buffer.read())
    if sys.argv[3] == "close":
        connection.shutdown(socket.SHUT_WR)
    try:
        while connection.recv(65536):
            pass
    except (ConnectionResetError, ssl.SSLError):
        pass
"""

_HELLO = Hello("lab", "two", "another boot", Record(), serving=False, empty=True, discard_local_data=False)


def _hello(hello: Hello) -> bytes:
    return wire.preamble() + b"".join(wire.encode_message(Kind.HELLO, packing.pack_hello(hello)))


def _header(length: int, kind: int) -> bytes:
    return wire.HEADER.pack(length, kind, 0, 0, 0, 0, 0)


_NEWER = wire.preamble(wire.NEWEST + 1, wire.NEWEST + 2)
_GOOD = _hello(_HELLO)
_NOT_A_HELLO = wire.preamble() + b"".join(wire.encode_message(Kind.FOLLOW, {}))
_HOLLOW_HELLO = wire.preamble() + b"".join(wire.encode_message(Kind.HELLO, {"volume": "lab"}))
_NO_MAP = wire.preamble() + b"".join(wire.encode_message(Kind.HELLO, [1, 2, 3]))

#: What somebody sends who has no keys, whether it hangs up then, and what node one's log line has to say: each time something
#: else, since a node does not tell the same twice.
STRANGERS = {
    "a port scan": (b"", "close", "it said nothing"),
    "random bytes": (bytes(range(255, 127, -1)), "stay", "it does not speak TLS"),
    "silence": (b"", "stay", "did not greet within"),
}

#: What somebody sends who has the keys of node two.
PEERS = {
    "another program": (b"GET / HTTP/1.1\r\nHost: one\r\n\r\n", "stay", "not a mirrorfs node: it began with b'GET / HT'"),
    "another version": (_NEWER, "stay", f"it speaks protocol versions {wire.NEWEST + 1} to {wire.NEWEST + 2}, this node"),
    "a huge length": (wire.preamble() + _header(0xFFFFFFFF, Kind.HELLO), "stay", "a frame of 4294967295 bytes"),
    "a truncated frame": (_GOOD[:-10], "close", "inside the greeting"),
    "a frame of an unknown kind": (wire.preamble() + _header(0, 255), "stay", "unknown kind 255"),
    "another message than HELLO": (_NOT_A_HELLO, "stay", "FOLLOW instead of HELLO"),
    "a HELLO with holes in it": (_HOLLOW_HELLO, "stay", "a malformed HELLO"),
    "a HELLO that is no map": (_NO_MAP, "stay", "a malformed HELLO"),
    "another volume": (_hello(replace(_HELLO, volume="orders")), "stay", "'orders'"),
    "an unknown node": (_hello(replace(_HELLO, node="three")), "stay", "'three'"),
    "the same node twice": (_hello(replace(_HELLO, node="one")), "stay", "'one'"),
    "a second standby": (_GOOD, "stay", "two is connected already"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One mirrored pair for all strangers: none of them is to harm it."""
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def _call(lab: Lab, sent: bytes, then: str, keys: Path | None) -> None:
    arguments = [ADDRESSES["one"], str(PORT), then, "" if keys is None else str(keys)]
    lab.two.run(sys.executable, "-c", _STRANGER, *arguments, input=sent, check=True, timeout=60)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_met_with_one_clear_line_and_the_pair_stays_mirrored(pair: Lab, stranger: str) -> None:
    _is_met_with_one_line(pair, *STRANGERS[stranger], None)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_makes_no_sense_is_met_so_too(pair: Lab, peer: str) -> None:
    _is_met_with_one_line(pair, *PEERS[peer], pair.two.keys)


def test_a_node_with_other_keys_is_met_so_too(pair: Lab, tmp_path: Path) -> None:
    trust = Trust(tmp_path)
    trust.make("two")
    trust.pin((pair.one.keys / "identity.pem").read_bytes())
    trust.renew()
    _is_met_with_one_line(pair, _GOOD, "stay", "its certificate is not that of the other node", tmp_path)


def _is_met_with_one_line(pair: Lab, sent: bytes, then: str, said: str, keys: Path | None) -> None:
    epoch, pids = pair.one.status()["epoch_tag"], pair.one.pids()
    lines = {name: NewLines(host) for name, host in pair.hosts.items()}
    _call(pair, sent, then, keys)
    line = lines["one"].wait(lambda line: said in line, said)
    assert ADDRESSES["two"] in line, "it says who it was"
    (pair.one.mount / "file").write_text(said)
    assert (pair.two.mount / "file").read_text() == said, "writes go on"
    assert pair.is_mirrored()
    assert pair.one.status()["epoch_tag"] == epoch
    assert pair.one.pids() == pids
    assert [other for other in lines["one"]() if " INFO " not in other] == [line]
    assert [other for other in lines["two"]() if " INFO " not in other] == []


#: Messages that are well formed and make no sense, from one who says that it is node two.
NONSENSE = {
    "a room of one number": wire.encode_message(Kind.SPACE, [1]),
    "a record that is a number": wire.encode_message(Kind.FOLLOW, {"record": 7, "quick": False}),
    "a record with holes": wire.encode_message(Kind.JOIN, {}),
    "a handover to a primary": wire.encode_message(Kind.HANDOVER, {}),
    "an operation for the primary": wire.encode_message(Kind.UNLINK, [1, b"file"]),
    "a second greeting": wire.encode_message(Kind.HELLO, {}),
    "a message that is not msgpack": wire.encode(wire.Frame(Kind.SPACE, payload=b"\xc1")),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A primary whose peer is gone, so that anybody can say that he is it."""
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        lab.two.kill()
        wait_state(lab.one, "solo")
        yield lab


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_message_that_makes_no_sense_ends_the_link_and_not_the_primary(alone: Lab, nonsense: str) -> None:
    pids = alone.one.pids()
    _call(alone, _GOOD + b"".join(NONSENSE[nonsense]), "stay", alone.two.keys)
    assert alone.one.pids() == pids
    (alone.one.mount / "file").write_text(nonsense)
    wait_state(alone.one, "solo")


def test_a_stranger_who_comes_again_and_again_does_not_fill_the_log(pair: Lab) -> None:
    lines = NewLines(pair.one)
    for _ in range(5):
        _call(pair, wire.preamble(wire.NEWEST + 2, 0), "stay", pair.two.keys)
    assert len(lines()) == 1
    assert pair.is_mirrored()


def test_many_strangers_at_once_keep_nobody_from_writing(pair: Lab) -> None:
    epoch = pair.one.status()["epoch_tag"]
    arguments = [sys.executable, "-c", _STRANGER, ADDRESSES["one"], str(PORT), "stay"]
    strangers = [pair.two.popen(*arguments, stdin=subprocess.PIPE) for _ in range(24)]
    try:
        for stranger in strangers:
            assert stranger.stdin is not None
            stranger.stdin.close()
        (pair.one.mount / "meanwhile").write_text("written all the same")
        assert (pair.two.mount / "meanwhile").read_text() == "written all the same"
    finally:
        for stranger in strangers:
            stranger.wait(timeout=60)
    assert pair.is_mirrored()
    assert pair.one.status()["epoch_tag"] == epoch


def test_nobody_but_the_configured_address_is_listened_on(pair: Lab) -> None:
    listening = pair.one.run("ss", "-Htln", capture_output=True, text=True, check=True).stdout.split("\n")
    assert [line.split()[3] for line in listening if line] == [f"{ADDRESSES['one']}:{PORT}"]


# ---- files touched underneath


def _inside(lab: Lab) -> set[str]:
    return set(os.listdir(lab.one.mount))


def test_a_file_put_underneath_the_primary_is_told_once_and_not_shown(lab: Lab) -> None:
    (lab.one.mount / "known").write_text("known")
    epoch = lab.one.status()["epoch_tag"]
    lines = NewLines(lab.one)
    (lab.one.backing / "smuggled").write_text("not written through the mount")
    for _ in range(3):
        assert _inside(lab) == {"known"}
        with pytest.raises(OSError) as caught:
            (lab.one.mount / "smuggled").read_text()
        assert caught.value.errno == errno.ENOENT
    assert len(lines()) == 1
    assert "underneath" in lines()[0]
    (lab.one.backing / "smuggled").unlink()
    (lab.one.mount / "after").write_text("after")  # and the directory's time is the mirror's again
    assert (lab.two.mount / "after").read_text() == "after"
    assert lab.is_mirrored()
    assert lab.one.status()["epoch_tag"] == epoch
    assert tree_differences(lab) == []


def _repaired(lab: Lab, epoch: str) -> None:
    """Wait until the divergence was found and mended."""
    wait_for(lambda: lab.is_mirrored() and lab.one.status()["epoch_tag"] != epoch, "the divergence is found and mended")
    assert tree_differences(lab) == []


def test_a_file_deleted_underneath_the_standby_is_found_when_it_is_changed_and_mended(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("first")
    assert tree_differences(lab) == []
    epoch = lab.one.status()["epoch_tag"]
    lines = NewLines(lab.two)
    (lab.two.backing / "file").unlink()
    with open(lab.one.mount / "file", "a") as file:
        file.write(" and second")
    _repaired(lab, epoch)
    assert len([line for line in lines() if " ERROR out of sync" in line]) == 1
    assert (lab.two.mount / "file").read_text() == "first and second"


def test_a_name_taken_away_underneath_the_standby_is_found_when_it_is_renamed_and_mended(lab: Lab) -> None:
    (lab.one.mount / "file").write_text("first")
    assert tree_differences(lab) == []
    epoch = lab.one.status()["epoch_tag"]
    (lab.two.backing / "file").unlink()
    (lab.one.mount / "file").rename(lab.one.mount / "renamed")
    _repaired(lab, epoch)
    assert (lab.two.mount / "renamed").read_text() == "first"


def test_a_file_put_underneath_the_standby_is_not_shown_and_does_not_outlive_one_of_its_name(lab: Lab) -> None:
    epoch = lab.one.status()["epoch_tag"]
    smuggled: Path = lab.two.backing / "file"
    smuggled.write_text("not written through the mount")
    (lab.one.mount / "file").write_text("the application's")
    _repaired(lab, epoch)
    assert (lab.two.mount / "file").read_text() == "the application's"
