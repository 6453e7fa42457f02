"""The command line, run as a process; nodes are control sockets that answer as one would."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mirrorfs import __version__, cli, control
from mirrorfs.errors import ConfirmationNeededError, RefusedError

STATUS: dict[str, Any] = {
    "volume": "v",
    "node": "one",
    "state": "primary",
    "epoch": 3,
    "in_sync": ["one", "two"],
    "since": "2025-01-02T03:04:05+00:00",
    "peer": {"name": "two", "state": "standby"},
    "dirty_bytes": 5 * 1024 * 1024,
    "resync": {
        "bytes_done": 1,
        "bytes_total": 2 * 1024**4,
        "files_done": 3,
        "files_total": 4,
        "bytes_per_second": 2048,
        "seconds_left": 61,
    },
    "reason": "Every write is on both nodes.",
}


class Node:
    """Answers the commands of a node and keeps them."""

    def __init__(self, control_socket: Path, file: Path) -> None:
        self.control = control_socket
        self.file = file
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.status = dict(STATUS)
        self.walk: list[dict[str, Any]] = []
        self.refused = False
        self.asked = trio.Event()  # a new one after each request

    async def handle(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((command, arguments))
        self.asked.set()
        self.asked = trio.Event()
        match command:
            case "status":
                return self.status
            case "verify":
                if self.refused:
                    raise RefusedError("not mirrored")
                return {}
            case "verify-look":
                found, self.walk = self.walk[0], self.walk[1:]
                return found
            case "promote" | "pause" if not (arguments["yes"] or arguments.get("force")):
                raise ConfirmationNeededError("the peer cannot be asked, was it lost? --yes says so")
            case "demote" if not arguments["force"]:
                raise RefusedError("the peer is not in sync, --force would stop all writes")
        return {"message": f"{command} is done"}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = Node(tmp_path / "one.sock", tmp_path / "v.toml")
    node.file.write_text(
        f"""
        volume = "v"
        node = "one"
        [nodes.one]
        address = "10.0.0.1"
        control = "{node.control}"
        state_dir = "{tmp_path}/state"
        [nodes.two]
        address = "10.0.0.2"
        control = "{tmp_path}/two.sock"
        """
    )
    return node


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(control.serve, node.control, node.handle))
        yield
        nursery.cancel_scope.cancel()


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MIRRORFS_")}
    return {**inherited, "PYTHONWARNINGS": "error::ResourceWarning", "COLUMNS": "100", "TERM": "dumb", **more}


async def mirrorfs(*arguments: str | Path, **more: str) -> tuple[int, str, str]:
    """Run the command line; exit status, stdout, stderr."""
    with trio.fail_after(60):
        ended = await trio.run_process(
            [sys.executable, "-m", "mirrorfs", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=environment(**more),
        )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


async def test_the_version_is_printed() -> None:
    assert await mirrorfs("--version") == (0, f"mirrorfs {__version__}\n", "")


async def test_the_help_names_every_command() -> None:
    status, out, err = await mirrorfs("--help")
    assert (status, err) == (0, "")
    listed = out.partition("Commands:\n")[2]
    commands = re.findall(r"^  (\w+)  ", listed, re.MULTILINE)
    assert set(commands) >= {"mount", "promote", "demote", "pause", "resume", "status", "unmount", "release", "journal"}
    assert set(commands) >= {"verify", "lab", "demo", "bench"}


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["status", "--bogus"], ["init"], ["release"], ["status", "--config"], ["promote", "here"]],
)
async def test_a_wrong_command_line_ends_with_2_and_no_traceback(arguments: Sequence[str]) -> None:
    status, out, err = await mirrorfs(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    ["mount PATH", "promote", "demote", "pause", "resume", "unmount", "status", "release PATH", "journal show", "check-config"],
)
async def test_every_command_reports_a_wrong_configuration_in_one_line(tmp_path: Path, command: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("volme = 1\n")
    expected = (2, "", f'mirrorfs: {file}: volume: missing, name the volume, as in volume = "data"\n')
    assert await mirrorfs(*command.split(), "--config", file) == expected


async def test_a_configuration_is_checked_without_a_node(tmp_path: Path) -> None:
    file, keys = tmp_path / "v.toml", tmp_path / "keys"
    file.write_text(
        f'volume = "v"\nmount = "/data"\nnodes.one = {{address = "10.0.0.1", keys = "{keys}"}}\n'
        'nodes.two.address = "10.0.0.2"\n[failover]\n'
    )
    command = ("check-config", "--config", file, "--node", "one")
    said = f"{file}: volume v; this node is one, the other one is two, not yet known to this one\n"
    assert await mirrorfs(*command) == (0, said, "")
    keys.mkdir()
    for name in ("identity.pem", "peer.pem"):
        (keys / name).touch()
    status, out, err = await mirrorfs(*command, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "file": str(file),
        "volume": "v",
        "node": "one",
        "peer": "two",
        "introduced": True,
        "mount": "/data",
        "units": ["mirrorfs@v.service", "mirrorfs-controller@v.service"],
    }


async def test_prepare_makes_the_mount_point(tmp_path: Path) -> None:
    file, mount = tmp_path / "v.toml", tmp_path / "not" / "there"
    file.write_text(f'volume = "v"\nmount = "{mount}"\nnodes.one.address = "10.0.0.1"\n')
    command = ("prepare", "--config", file, "--node", "one")
    assert await mirrorfs(*command) == (0, f"{mount} was not there, and is made\n", "")
    assert mount.is_dir()
    assert await mirrorfs(*command) == (0, "", "")


async def test_the_options_stand_before_or_after_the_command_or_in_the_environment(node: Node) -> None:
    async with running(node):
        for arguments in (
            ("--config", node.file, "--node", "one", "status", "--json"),
            ("status", "--json", "--config", node.file, "--node", "one"),
            ("--config", "missing", "--node", "two", "status", "--json", "--config", node.file, "--node", "one"),
        ):
            status, out, err = await mirrorfs(*arguments)
            assert (status, json.loads(out), err) == (0, STATUS, "")
        by_environment = await mirrorfs("status", "--json", MIRRORFS_CONFIG=str(node.file), MIRRORFS_NODE="one")
        assert by_environment[0] == 0
        other_node = await mirrorfs("status", "--json", "--config", node.file, "--node", "two")
        assert (other_node[0], json.loads(other_node[1])["node"]) == (1, "two")


async def test_the_status_in_words_is_aligned(node: Node) -> None:
    async with running(node):
        assert await mirrorfs("status", "--config", node.file) == (
            0,
            "volume   v\n"
            "node     one\n"
            "state    primary\n"
            "since    2025-01-02T03:04:05+00:00\n"
            "epoch    3\n"
            "in sync  one, two\n"
            "peer     two (standby)\n"
            "dirty    5.0 MiB\n"
            "resync   1 B of 2.0 TiB, 3 of 4 files, 2.0 KiB/s, 1 min 1 s left\n"
            "reason   Every write is on both nodes.\n",
            "",
        )


async def test_a_node_alone_has_no_peer_in_its_status(node: Node) -> None:
    node.status |= {"peer": None, "in_sync": ["one"], "resync": None, "dirty_bytes": 0}
    async with running(node):
        status, out, _ = await mirrorfs("status", "--config", node.file)
    assert status == 0
    assert "\npeer     none\ndirty    0 B\nreason " in out


async def test_a_node_that_is_not_running_is_stopped_and_ends_with_1(node: Node) -> None:
    reason = f"no mirrorfs node is running here (nothing listens on {node.control}), start it with: mirrorfs mount PATH"
    status, out, err = await mirrorfs("status", "--json", "--config", node.file)
    assert (status, err) == (1, "")
    assert json.loads(out) == {
        "volume": "v",
        "node": "one",
        "state": "stopped",
        "epoch": None,
        "in_sync": [],
        "since": None,
        "peer": {"name": "two", "state": "unknown"},
        "dirty_bytes": None,
        "reason": reason,
    }
    assert await mirrorfs("status", "--config", node.file) == (
        1,
        "volume   v\n"
        "node     one\n"
        "state    stopped\n"
        "since    -\n"
        "epoch    -\n"
        "in sync  -\n"
        "peer     two (unknown)\n"
        "dirty    -\n"
        f"reason   {reason}\n",
        "",
    )
    assert await mirrorfs("unmount", "--config", node.file) == (1, "", f"mirrorfs: {reason}\n")


async def test_commands_print_the_answer_and_pass_their_options_on(node: Node) -> None:
    async with running(node):
        for arguments, expected in (
            (("promote", "--yes"), ("promote", {"yes": True, "force": False, "automatic": False})),
            (("promote", "--force"), ("promote", {"yes": False, "force": True, "automatic": False})),
            (("demote", "--force"), ("demote", {"force": True})),
            (("unmount",), ("unmount", {})),
            (("pause", "--yes"), ("pause", {"yes": True})),
            (("resume",), ("resume", {})),
        ):
            assert await mirrorfs(*arguments, "--config", node.file) == (0, f"{arguments[0]} is done\n", "")
            assert node.requests.pop() == expected


async def test_a_refusal_ends_with_3(node: Node) -> None:
    async with running(node):
        assert await mirrorfs("demote", "--config", node.file) == (
            3,
            "",
            "mirrorfs: the peer is not in sync, --force would stop all writes\n",
        )


async def test_a_question_without_a_terminal_ends_with_4(node: Node) -> None:
    async with running(node):
        assert await mirrorfs("promote", "--config", node.file) == (
            4,
            "",
            "mirrorfs: the peer cannot be asked, was it lost? --yes says so\n",
        )
        assert (await mirrorfs("pause", "--config", node.file))[0] == 4
    assert node.requests == [("promote", {"yes": False, "force": False, "automatic": False}), ("pause", {"yes": False})]


@pytest.mark.parametrize(("typed", "status", "promoted"), [(b"y\n", 0, True), (b"n\n", 4, False), (b"\n", 4, False)])
async def test_a_question_is_asked_on_a_terminal(node: Node, typed: bytes, status: int, promoted: bool) -> None:
    terminal, inside = os.openpty()
    try:
        os.write(terminal, typed)
        with trio.fail_after(60):
            async with running(node):
                ended = await trio.run_process(
                    [sys.executable, "-m", "mirrorfs", "promote", "--config", str(node.file)],
                    stdin=inside,
                    stdout=inside,
                    capture_stderr=True,
                    check=False,
                    env=environment(),
                )
        shown = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
        os.close(inside)
    assert ended.returncode == status
    assert ended.stderr.strip() == b""
    assert "was it lost? --yes says so\r\nPromote this node? [y/N]:" in shown
    assert ("promote is done" in shown) is promoted
    assert [arguments["yes"] for _, arguments in node.requests] == ([False, True] if promoted else [False])


async def line(stream: trio.abc.ReceiveStream) -> bytes:
    received = b""
    while not received.endswith(b"\n"):
        chunk = await stream.receive_some(1)
        assert chunk, "ended in the middle of a line"
        received += chunk
    return received


async def test_watching_as_json_prints_each_change_and_ends_with_130(node: Node) -> None:
    with trio.fail_after(60):
        async with running(node):
            command = [sys.executable, "-m", "mirrorfs", "status", "--json", "--watch", "--config", str(node.file)]
            process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment())
            assert process.stdout is not None
            try:
                shown = [json.loads(await line(process.stdout))]
                for _ in range(2):  # asked again, with nothing new to show
                    await node.asked.wait()
                node.status["state"] = "solo"
                shown.append(json.loads(await line(process.stdout)))
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
                assert await process.stdout.receive_some() == b""
            finally:
                process.kill()
                await process.wait()
                await process.stdout.aclose()
    assert [found["state"] for found in shown] == ["primary", "solo"]


async def test_releasing_needs_no_configuration_but_takes_one_that_is_named(tmp_path: Path, node: Node) -> None:
    expected = f"mirrorfs: {tmp_path}/data: not a directory that mirrorfs has adopted\n"
    (tmp_path / "data").mkdir()
    assert await mirrorfs("release", tmp_path / "data", "--config", node.file) == (1, "", expected)
    status, _, err = await mirrorfs("release", tmp_path / "data", "--config", tmp_path / "missing.toml")
    assert (status, err) == (
        2,
        f"mirrorfs: {tmp_path}/missing.toml: there is no such file, write it or give another with --config FILE\n",
    )


async def test_the_journal_is_shown_also_without_a_running_node_and_ends_with_1_if_it_is_damaged(
    tmp_path: Path, node: Node
) -> None:
    shown = await mirrorfs("journal", "show", "--config", node.file)
    assert shown == (
        0,
        f"{tmp_path}/state/record\n  there is no such file\n"
        f"{tmp_path}/state/ids\n  there is no such file\n"
        f"{tmp_path}/state/dirty\n  there is no such file\n",
        "",
    )
    assert not (tmp_path / "state").exists(), "looking makes nothing"
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "dirty").write_bytes(b"?")
    status, out, err = await mirrorfs("--config", node.file, "journal", "show", "--json")
    assert (status, err) == (1, "")
    assert {name: json.loads(out)[name]["state"] for name in ("record", "ids", "dirty")} == {
        "record": "absent",
        "ids": "absent",
        "dirty": "damaged",
    }


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> object:
    """The exit status of `main` if the command raises `error`."""

    def app(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_errors_that_a_nursery_has_wrapped_are_one_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [RefusedError("first")]), RefusedError("second")])
    assert ending(monkeypatch, group) == 3
    assert capsys.readouterr().err == "mirrorfs: first\nmirrorfs: second\n"


def test_an_interrupt_that_a_nursery_has_wrapped_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ending(monkeypatch, KeyboardInterrupt()) == 130
    assert ending(monkeypatch, BaseExceptionGroup("nursery", [KeyboardInterrupt()])) == 130


def test_what_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExceptionGroup):
        ending(monkeypatch, ExceptionGroup("nursery", [RefusedError("expected"), ValueError("not expected")]))


def _looked(*differences: str, found: int = 0, running: bool = False) -> dict[str, Any]:
    """What a node answers while it compares, or when it has."""
    last = {"ended": "2025-01-02T03:04:05+00:00", "found": found, "repaired": 0, "files": 7, "bytes": 1 << 20}
    return {"running": running, "bytes": 0, "files": 0, "found": found, "last": last, "differences": list(differences)}


async def test_verify_follows_the_walk_and_its_exit_status_says_whether_the_trees_are_equal(node: Node) -> None:
    async with running(node):
        node.walk = [_looked(running=True), _looked()]
        assert await mirrorfs("verify", "--config", node.file) == (0, "", "both trees are equal (7 files, 1.0 MiB compared)\n")
        assert [command for command, _ in node.requests] == ["verify", "verify-look", "verify-look"]
        node.walk = [_looked("a: only on one", running=True, found=1), _looked("b: only on two", found=2), _looked(found=2)]
        status, out, err = await mirrorfs("verify", "--rate", "2MiB/s", "--repair", "--from", "two", "--config", node.file)
        assert (status, out) == (1, "a: only on one\nb: only on two\n")
        assert err == "differences: 2, of them repaired: 0 (7 files, 1.0 MiB compared)\n"
        assert node.requests[3:6] == [
            ("verify", {"good": "two", "rate": 2.0 * 2**20}),
            ("verify-look", {"since": 0}),
            ("verify-look", {"since": 1}),
        ]


async def test_verify_json_is_one_line(node: Node) -> None:
    async with running(node):
        node.walk = [_looked("a: only on one", found=1), _looked(found=1)]
        status, out, _ = await mirrorfs("verify", "--json", "--config", node.file)
        assert (status, len(out.splitlines())) == (1, 1)
        assert json.loads(out) == {**_looked(found=1)["last"], "differences": ["a: only on one"]}


async def test_a_refused_verify_has_a_status_of_its_own_and_one_line(node: Node) -> None:
    node.refused = True
    async with running(node):
        assert await mirrorfs("verify", "--config", node.file) == (3, "", "mirrorfs: not mirrored\n")


@pytest.mark.parametrize("arguments", [["--repair"], ["--from", "one"], ["--rate", "5"], ["--rate", "0MiB/s"]])
async def test_verify_with_half_of_what_it_needs_is_a_usage_error(node: Node, arguments: list[str]) -> None:
    status, out, err = await mirrorfs("verify", *arguments, "--config", node.file)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
