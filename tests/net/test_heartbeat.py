"""Heartbeats over real sockets: loopback has as many networks as one likes. Time is trio's mock clock."""

import logging
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mirrorfs.config import NodeConfig
from mirrorfs.core import beats
from mirrorfs.core.beats import Beat, Echo
from mirrorfs.errors import ConfigError, MirrorfsError
from mirrorfs.heartbeat import Heartbeats, KeyFiles, load_key, make_key

KEY = b"k" * 32
SESSION = b"session1"
ABSENT = "192.0.2.77"  # of the addresses that documentation may use: no machine has it


def node(name: str, *heartbeats: str) -> NodeConfig:
    return NodeConfig(name, heartbeats[0], 7788, None, Path("/s"), Path("/c"), Path("/d"), heartbeats, Path("/k"))


ONE = node("one", "127.0.0.1", "127.0.1.1")
TWO = node("two", "127.0.0.2", "127.0.1.2")


@pytest.fixture
def port() -> int:
    """One that nobody uses, here for all of 127/8."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Controller:
    """What one side says and hears."""

    def __init__(self, own: NodeConfig, peer: NodeConfig, port: int, key: bytes = KEY, **options: Any) -> None:
        self.says: dict[str, Any] = {"i am": own.name}
        self.heard: list[dict[str, Any]] = []
        options.setdefault("on_heard", self.heard.append)
        self.heartbeats = Heartbeats("v", own, peer, port, key, content=lambda: self.says, **options)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Controller"]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.heartbeats.run)
            yield self
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Wait until it is true; by the clock of the test, for an hour."""
    with trio.fail_after(3600):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await trio.sleep(0.05)


@asynccontextmanager
async def stranger(address: str = "127.0.0.9", family: int = socket.AF_INET) -> AsyncIterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as plain:
        plain.setblocking(False)
        plain.bind((address, 0))
        yield plain


def beat(sequence: int, *, sender: str = "two", network: int = 0, **content: Any) -> bytes:
    """Of the node two, which has heard of SESSION."""
    said = Beat("v", sender, b"session2", 0, sequence, (Echo(SESSION, 0),), network, content)
    return beats.encode(said, KEY, os.urandom(beats.NONCE_BYTES))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- two controllers


async def test_two_controllers_hear_what_the_other_one_says_on_every_network(port: int, autojump_clock: MockClock) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    async with one.running(), two.running():
        await until(lambda: all(one.heartbeats.networks.values()) and all(two.heartbeats.networks.values()))
        assert one.heartbeats.networks == {"127.0.0.2": True, "127.0.1.2": True}
        assert two.heartbeats.networks == {"127.0.0.1": True, "127.0.1.1": True}
        assert one.heartbeats.heard_ever
        assert one.heard[-1] == {"i am": "two"}
        two.says = {"state": "stopped"}
        await until(lambda: one.heard[-1] == {"state": "stopped"})


async def test_what_is_said_is_heard_once_although_it_comes_over_two_networks(port: int, autojump_clock: MockClock) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    numbers = iter(range(1000))
    two.heartbeats._content = lambda: {"number": next(numbers)}
    async with one.running(), two.running():
        await until(lambda: len(one.heard) >= 20)
    found = [content["number"] for content in one.heard]
    assert found == list(range(found[0], found[0] + len(found)))


async def test_a_poke_sends_at_once(port: int, autojump_clock: MockClock) -> None:
    one, two = (Controller(*pair, port, interval_s=100.0) for pair in ((ONE, TWO), (TWO, ONE)))
    async with one.running(), two.running():
        await until(lambda: one.heartbeats.heard_ever and two.heartbeats.heard_ever)
        await trio.sleep(150)
        two.says = {"state": "stopped"}
        before = trio.current_time()
        two.heartbeats.poke()
        await until(lambda: one.heard[-1] == {"state": "stopped"})
        assert trio.current_time() - before < 20


async def test_whoever_greets_is_answered_at_once(port: int, autojump_clock: MockClock) -> None:
    one, two = (Controller(*pair, port, interval_s=100.0) for pair in ((ONE, TWO), (TWO, ONE)))
    async with one.running():
        await trio.sleep(20)
        async with two.running():
            before = trio.current_time()
            await until(lambda: two.heartbeats.heard_ever)
            assert trio.current_time() - before < 20


async def test_two_that_poke_whenever_they_hear_something_do_not_send_without_end(port: int, autojump_clock: MockClock) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    for controller in (one, two):
        controller.heartbeats._on_heard = lambda content, controller=controller: controller.heartbeats.poke()  # type: ignore[misc]
    async with one.running(), two.running():
        await trio.sleep(10)
        assert 100 < one.heartbeats._sequence <= 10 / 0.025 + 1


async def test_a_controller_that_starts_again_is_heard_again(port: int, autojump_clock: MockClock) -> None:
    one = Controller(ONE, TWO, port)
    async with one.running():
        for number in range(3):
            two = Controller(TWO, ONE, port)
            two.says = {"start": number}
            async with two.running():
                await until(lambda two=two: two.heard and one.heard and one.heard[-1] == two.says)  # type: ignore[misc]


# ---- silence


async def test_silence_counts_from_the_start_if_nobody_was_ever_heard(port: int, autojump_clock: MockClock) -> None:
    one = Controller(ONE, TWO, port)
    assert one.heartbeats.silent_s == 0
    await trio.sleep(50)
    async with one.running():
        await trio.sleep(10.1)
        assert one.heartbeats.silent_s == pytest.approx(10, abs=0.3)
        assert not one.heartbeats.heard_ever
        assert one.heartbeats.networks == {"127.0.0.2": False, "127.0.1.2": False}


async def test_silence_counts_from_what_was_heard_last(port: int, autojump_clock: MockClock) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    async with one.running():
        async with two.running():
            await until(lambda: one.heartbeats.heard_ever)
            await trio.sleep(5)
            assert one.heartbeats.silent_s < 0.3
        await trio.sleep(2)
        assert one.heartbeats.networks == {"127.0.0.2": True, "127.0.1.2": True}
        await trio.sleep(5)
        assert one.heartbeats.silent_s == pytest.approx(7, abs=0.5)
        assert one.heartbeats.networks == {"127.0.0.2": False, "127.0.1.2": False}


async def test_a_controller_that_stood_still_itself_does_not_call_that_silence(port: int, mock_clock: MockClock) -> None:
    """Its machine was suspended, say: what the other one has sent meanwhile waits in the socket."""
    one = Controller(ONE, TWO, port, session=SESSION)
    silent_s: list[float] = []
    one.heartbeats._content = lambda: {"silent": silent_s.append(one.heartbeats.silent_s)}  # type: ignore[func-returns-value]
    async with one.running(), stranger("127.0.0.2") as two:
        two.sendto(beat(1), ("127.0.0.1", port))
        await wait_all_tasks_blocked()
        assert one.heartbeats.heard_ever
        for number in range(2, 30):  # whichever of its tasks runs first then
            two.sendto(beat(number), ("127.0.0.1", port))
            mock_clock.jump(1000)
            silent_s.append(one.heartbeats.silent_s)
            await wait_all_tasks_blocked()
            assert len(one.heard) == number
    assert set(silent_s) == {0.0}


# ---- networks that do not work


async def test_a_network_that_is_not_there_is_told_once_and_the_other_one_works(
    port: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    one = Controller(node("one", ABSENT, "127.0.0.1"), node("two", "192.0.2.78", "127.0.0.2"), port)
    two = Controller(node("two", "127.0.1.2", "127.0.0.2"), node("one", "127.0.1.1", "127.0.0.1"), port)
    async with one.running(), two.running():
        await until(lambda: one.heartbeats.heard_ever and two.heartbeats.heard_ever)
        await trio.sleep(60)
        assert one.heartbeats.networks == {"192.0.2.78": False, "127.0.0.2": True}
        assert one.heartbeats.silent_s < 0.3
    told = [text for text in warnings(caplog) if ABSENT in text]
    assert len(told) == 1
    assert re.fullmatch(rf"heartbeats from {re.escape(ABSENT)} to 192\.0\.2\.78: cannot be sent \(.+\)", told[0])


async def test_one_network_dies_and_the_peer_is_still_heard(port: int, autojump_clock: MockClock) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    async with one.running(), two.running():
        await until(lambda: all(one.heartbeats.networks.values()))
        two.heartbeats._networks[0].target = ("127.0.0.77", port)
        await until(lambda: one.heartbeats.networks == {"127.0.0.2": False, "127.0.1.2": True})
        assert one.heartbeats.silent_s < 0.3


async def test_a_port_in_use_is_told_and_taken_once_it_is_free(
    port: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port))
        async with one.running(), two.running():
            await until(lambda: one.heartbeats.heard_ever)
            await trio.sleep(10)
            assert one.heartbeats.networks == {"127.0.0.2": False, "127.0.1.2": True}
            other.close()
            await until(lambda: all(one.heartbeats.networks.values()))
    assert [text for text in warnings(caplog) if "in use" in text] == [
        f"heartbeats from 127.0.0.1 to 127.0.0.2: no socket (Address already in use), is the port {port} another volume's too?"
    ]


async def test_a_name_that_cannot_be_looked_up_stops_nothing(
    port: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = trio.socket.getaddrinfo

    async def getaddrinfo(host: str, *rest: Any, **options: Any) -> Any:
        if host == "forgotten":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if host == "slow":
            await trio.sleep_forever()
        return await known("127.0.0.1" if host == "here" else host, *rest, **options)

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    one = Controller(node("one", "forgotten", "here", "slow"), node("two", "127.0.1.2", "127.0.0.2", "127.0.2.2"), port)
    two = Controller(
        node("two", "127.0.1.2", "127.0.0.2", "127.0.2.2"), node("one", "127.0.1.1", "127.0.0.1", "127.0.2.1"), port
    )
    async with one.running(), two.running():
        await until(lambda: one.heartbeats.networks == {"127.0.1.2": False, "127.0.0.2": True, "127.0.2.2": False})
        await trio.sleep(20)
    assert sorted(warnings(caplog)) == [
        "heartbeats from forgotten to 127.0.1.2: no socket (Name or service not known)",
        "heartbeats from slow to 127.0.2.2: the addresses cannot be looked up (no answer)",
    ]


@pytest.mark.root
def test_a_network_that_comes_up_later_works_then() -> None:
    """On a host of its own, whose loopback has the addresses only once both controllers run."""
    script = """
        import subprocess, trio
        from tests.net.test_heartbeat import Controller, node, until

        async def main():
            nodes = node("one", "10.9.9.1"), node("two", "10.9.9.2")
            one, two = Controller(*nodes, 7789), Controller(*reversed(nodes), 7789)
            async with one.running(), two.running():
                await trio.sleep(1)
                assert not one.heartbeats.heard_ever
                assert one.heartbeats._networks[0].trouble
                for command in ("link set lo up", "address add 10.9.9.1/32 dev lo", "address add 10.9.9.2/32 dev lo"):
                    await trio.run_process(["ip", *command.split()])
                await until(lambda: one.heartbeats.heard_ever and two.heartbeats.heard_ever)
                assert not one.heartbeats._networks[0].trouble
                await trio.run_process(["ip", "link", "set", "lo", "down"])
                await until(lambda: one.heartbeats.networks == {"10.9.9.2": False})
                await trio.run_process(["ip", "link", "set", "lo", "up"])
                await until(lambda: one.heartbeats.networks == {"10.9.9.2": True})

        trio.run(main)
        """
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# ---- what is not the other controller


async def test_whoever_has_another_key_is_not_heard_and_told_of_once_a_minute(
    port: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port, b"x" * 32)
    async with one.running(), two.running():
        await trio.sleep(55)
        assert not one.heartbeats.heard_ever
        assert one.heartbeats.silent_s > 54
        assert one.heartbeats.rejected > 300
        told = [text for text in warnings(caplog) if "from 127.0.0.2" in text or "from 127.0.1.2" in text]
        assert len(told) == 1
        assert re.fullmatch(
            r"a datagram was ignored: from 127.0.[01].2, damaged, or made with another key: "
            r"have the two nodes joined each other[?] \(1 since the start\)",
            told[0],
        )
        await trio.sleep(10)
        assert len([text for text in warnings(caplog) if "from 127.0.0.2" in text or "from 127.0.1.2" in text]) == 2


async def test_a_stranger_is_never_answered(port: int, autojump_clock: MockClock) -> None:
    one = Controller(ONE, TWO, port, session=SESSION)
    async with one.running(), stranger() as somebody:
        for datagram in (b"", b"hello", b"x" * 5000, beats.MAGIC * 20, beat(1, sender="one")):
            somebody.sendto(datagram, ("127.0.0.1", port))
        await until(lambda: one.heartbeats.rejected == 5)
        await trio.sleep(5)
        with pytest.raises(BlockingIOError):
            somebody.recv(2000)
        assert not one.heartbeats.heard_ever


async def test_an_authentic_beat_counts_wherever_it_comes_from(port: int, autojump_clock: MockClock) -> None:
    one = Controller(ONE, TWO, port, session=SESSION)
    async with one.running(), stranger() as somebody:
        somebody.sendto(beat(1, state="solo"), ("127.0.0.1", port))
        await until(lambda: one.heard)
        assert one.heard == [{"state": "solo"}]
        somebody.sendto(beat(1, state="solo"), ("127.0.0.1", port))
        await trio.sleep(5)
        assert one.heard == [{"state": "solo"}]
        assert one.heartbeats.silent_s > 4
        with pytest.raises(BlockingIOError):
            somebody.recv(2000)


async def test_ipv6_works_too(port: int, autojump_clock: MockClock) -> None:
    one = Controller(node("one", "::1", "2001:db8::77"), node("two", "fd00::2", "2001:db8::78"), port, session=SESSION)
    async with one.running(), stranger("::1", socket.AF_INET6) as somebody:
        somebody.sendto(beat(1, state="solo"), ("::1", port))
        await until(lambda: one.heard)
        assert one.heartbeats.networks == {"fd00::2": True, "2001:db8::78": False}
        assert one.heartbeats._networks[1].endpoint is not None


@pytest.mark.parametrize("says", [{"t": "x" * 2000}, {"t": math.nan}, {"t": object()}], ids=["long", "nan", "object"])
async def test_what_cannot_be_said_does_not_keep_a_controller_from_being_heard(
    port: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, says: dict[str, Any]
) -> None:
    one, two = Controller(ONE, TWO, port), Controller(TWO, ONE, port)
    two.says = says
    async with one.running(), two.running():
        await until(lambda: one.heard)
        await trio.sleep(30)
        assert one.heartbeats.silent_s < 0.3
    assert one.heard[-1] == {}
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("a heartbeat says nothing but that this controller lives: what the controller wants")


async def test_a_mistake_in_what_listens_ends_it(port: int, autojump_clock: MockClock) -> None:
    def mistaken(content: dict[str, Any]) -> None:
        raise KeyError("state")

    one = Controller(ONE, TWO, port, on_heard=mistaken)
    two = Controller(TWO, ONE, port)
    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        async with two.running(), one.running():
            await trio.sleep(60)


# ---- the key


def refusal(act: Callable[[], object], kind: type[MirrorfsError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_key_that_was_made_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "v.key"
    before = os.umask(0)
    try:
        make_key(path)
        assert path.stat().st_mode & 0o7777 == 0o600
        os.umask(0o777)
        make_key(path.with_name("other.key"))
    finally:
        os.umask(before)
    assert re.fullmatch("[0-9a-f]{64}\n", path.read_text())
    assert load_key(path) == bytes.fromhex(path.read_text())
    assert path.with_name("other.key").stat().st_mode & 0o7777 == 0o600
    assert load_key(path) != load_key(path.with_name("other.key"))


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "v.key"
    make_key(path)
    before = path.read_text()
    assert refusal(partial(make_key, path), MirrorfsError) == (
        f"{path}: is there already, copy it to the other node; remove it on both nodes first to make another one"
    )
    assert path.read_text() == before
    link = tmp_path / "link.key"
    link.symlink_to(tmp_path / "elsewhere")
    refusal(partial(make_key, link), MirrorfsError)
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "v.key"
    assert refusal(partial(make_key, path), MirrorfsError) == (
        f"{path}: cannot be written (No space left on device), make room there"
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert refusal(partial(make_key, tmp_path / "file" / "v.key"), MirrorfsError) == (
        f"{tmp_path}/file: cannot be made (File exists), are you root?"
    )
    assert refusal(partial(make_key, tmp_path / ("k" * 300)), MirrorfsError) == (
        f"{tmp_path}/{'k' * 300}: cannot be made (File name too long), are you root?"
    )


@pytest.mark.parametrize("text", ["ab" * 32, "AB" * 32 + "\n", "  " + "ab" * 32 + "\r\n"])
def test_a_key_copied_by_hand_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "v.key"
    path.write_text(text)
    path.chmod(0o400)
    assert load_key(path) == b"\xab" * 32


HOW = "make it with `mirrorfs make-key` on one node and copy it to the other"


@pytest.mark.parametrize("content", [b"", b"ab" * 31, b"ab" * 33, b"xy" * 32, b"\xff" * 64, b"ab" * 32 + b"\nab"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.key"
    path.write_bytes(content)
    path.chmod(0o600)
    assert refusal(partial(load_key, path)) == f"{path}: a key is 64 hex digits and this is none, remove it and {HOW}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o700, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "v.key"
    make_key(path)
    path.chmod(mode)
    assert refusal(partial(load_key, path)) == (
        f"{path}: the key has the mode {mode:04o} and may not be secret, make it 0600: chmod 600 {path}"
    )


def test_a_key_that_is_put_in_place_of_another_is_found_and_one_that_is_none_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_key(path)
    keys = KeyFiles(partial(load_key, path), [path])
    first = keys.key
    assert not keys.refresh()
    path.unlink()
    assert not keys.refresh()
    path.write_text("half of")
    path.chmod(0o600)
    assert not keys.refresh()
    assert keys.key == first
    path.write_text(KEY.hex())
    assert keys.refresh()
    assert keys.key == KEY
    assert not keys.refresh()


def test_a_key_that_is_not_there_is_told_how_to_make(tmp_path: Path) -> None:
    path = tmp_path / "v.key"
    assert refusal(partial(load_key, path)) == f"{path}: there is no key, {HOW}"
    (tmp_path / "file").touch()
    assert refusal(partial(load_key, tmp_path / "file" / "k")) == (
        f"{tmp_path}/file/k: the key cannot be read (Not a directory), are you root?"
    )
    os.mkfifo(path, 0o600)
    for no_file in (path, tmp_path):
        assert refusal(partial(load_key, no_file)) == f"{no_file}: is no file, remove it, and for a key {HOW}"


@pytest.mark.root
def test_a_key_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.key"
    make_key(path)
    os.chown(path, 12345, 0)
    assert refusal(partial(load_key, path)) == f"{path}: the key belongs to user 12345, give it to root: chown root {path}"
