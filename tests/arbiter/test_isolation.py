"""Whether an address answers. No ping of these tests leaves the machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from mirrorfs import arbiter
from mirrorfs.arbiter import Isolation
from mirrorfs.errors import MirrorfsError

_ASK = """
import sys, trio
from mirrorfs.arbiter import Isolation
print(trio.run(Isolation(sys.argv[1]).is_reachable))
"""


def is_reachable_in_a_fresh_network(address: str, prepare: str) -> bool:
    """What a process says in a network namespace with nothing but a loopback that is down, after the shell's commands."""
    command = ["unshare", "--net", "sh", "-ec", f'{prepare}\nexec "$@"', "sh", sys.executable, "-c", _ASK, address]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return {"True\n": True, "False\n": False}[done.stdout]


def put_ping(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let `ping` be a shell script."""
    program = directory / "ping"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


async def test_an_address_that_answers_is_reachable() -> None:
    assert await Isolation("127.0.0.1").is_reachable()


@pytest.mark.root
def test_an_ipv6_address_that_answers_is_reachable() -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("there is no IPv6 here")
    assert is_reachable_in_a_fresh_network("::1", "ip link set lo up")


@pytest.mark.root
def test_an_address_to_which_no_way_leads_is_not_reachable() -> None:
    assert not is_reachable_in_a_fresh_network("192.0.2.1", "")


@pytest.mark.root
def test_an_address_that_is_silent_is_not_reachable() -> None:
    silence = "add table inet t; add chain inet t c { type filter hook input priority 0; policy drop; }"
    assert not is_reachable_in_a_fresh_network("127.0.0.1", f"ip link set lo up; nft '{silence}'")


async def test_one_ping_of_two_that_is_answered_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ping(tmp_path, monkeypatch, f'test -e "{tmp_path}/asked" || {{ touch "{tmp_path}/asked"; exit 1; }}')
    assert await Isolation("192.0.2.1").is_reachable()


async def test_two_pings_that_are_not_answered_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_ping(tmp_path, monkeypatch, f'echo "ping $@" >>"{tmp_path}/asked"; exit 1')
    assert not await Isolation("192.0.2.1").is_reachable()
    assert (tmp_path / "asked").read_text() == 2 * "ping -n -c 1 -W 1 -- 192.0.2.1\n"


async def test_a_ping_that_does_not_end_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arbiter, "_PING_LIMIT_S", 0.1)
    put_ping(tmp_path, monkeypatch, "exec sleep 60")
    with trio.fail_after(30):
        assert not await Isolation("192.0.2.1").is_reachable()


async def test_without_the_program_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MirrorfsError, match="needs the program ping"):
        await Isolation("127.0.0.1").is_reachable()
