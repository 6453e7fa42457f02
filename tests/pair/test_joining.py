"""`mirrorfs init` and `mirrorfs join`: two nodes that know nothing of each other become a pair."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs import config as configuration
from mirrorfs.joining import Code, parse_code
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.pair import Host, Lab, wait_for
from mirrorfs.trust import Trust, fingerprint

pytestmark = pytest.mark.root
VOLUME = "joining-test"


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts; what the lab has written for its nodes is not used."""
    with Lab.create(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def _mirrorfs(host: Host, *arguments: str) -> list[str]:
    return [*host.network.entering(host.name), sys.executable, "-m", "mirrorfs", *arguments]


class _Init:
    """`mirrorfs init` on a host, and the code that it has printed."""

    def __init__(self, host: Host, file: Path, *more: str) -> None:
        name, address = host.name, ADDRESSES[host.name]
        arguments = ("init", VOLUME, "--node", name, "--address", address, "--config", str(file), *more)
        self.process = subprocess.Popen(_mirrorfs(host, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.code = ""
        for line in self.process.stdout:
            if found := re.search(r"mirrorfs join (\S+)", line):
                self.code = found[1]
                break

    def __enter__(self) -> "_Init":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


def _join(host: Host, code: str, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = _mirrorfs(host, "join", code, "--node", host.name, "--config", str(file), *more)
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _with_places(host: Host, file: Path) -> None:
    """What a node of the lab has elsewhere than one of a machine of its own; init and join keep what is there."""
    text = file.read_text() if file.exists() else ""
    assert text == ""
    keys = {"address": ADDRESSES[host.name], "keys": str(host.home / "k"), "state_dir": str(host.state_dir)}
    keys |= {"control": str(host.control), "controller": str(host.control.with_suffix(".ctl"))}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    file.write_text("\n".join(['volume = "joining-test"', f'node = "{host.name}"', f"[nodes.{host.name}]", *lines]) + "\n")


@contextlib.contextmanager
def _without_default_keys() -> Iterator[None]:
    """The keys of volume `v` lie where those of a real one do: none before, none after."""
    directory = configuration.default_keys(VOLUME, "one").parent
    shutil.rmtree(directory, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_two_nodes_that_have_joined_are_a_pair(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    _with_places(lab.one, one)
    with _Init(lab.one, one) as init:
        _with_places(lab.two, two)
        with two.open("a") as file:
            file.write(f'[nodes.one]\naddress = "{ADDRESSES["one"]}"\n')
        done = _join(lab.two, init.code, two)
        assert (done.returncode, done.stderr) == (0, "")
        assert "joined one" in done.stdout
        code, said = init.end()
        assert code == 0, said
        assert "two has joined" in said
    first, second = configuration.load(one, "one"), configuration.load(two, "two")
    assert first.peer is not None
    assert first.peer.address == ADDRESSES["two"]
    for own, other in ((first, second), (second, first)):
        assert Trust(own.node.keys).peer_fingerprint() == fingerprint(Trust(other.node.keys).identity.read_bytes())
    assert Trust(first.node.keys).shared_key("x") == Trust(second.node.keys).shared_key("x")
    assert Trust(first.node.keys).shared_key("x") != Trust(first.node.keys).shared_key("y")
    lab.one.config.write_text(one.read_text())
    lab.two.config.write_text(two.read_text())
    for host in lab.hosts.values():
        host.start()
    lab.one.promote(yes=True)
    lab.wait_mirrored()
    (lab.one.mount / "file").write_text("content")
    assert (lab.two.mount / "file").read_text() == "content"


def test_a_file_that_is_there_keeps_its_mode_and_its_owner_and_a_link_to_it_stays_one(lab: Lab, tmp_path: Path) -> None:
    real, link, two = tmp_path / "real.toml", tmp_path / "one.toml", tmp_path / "two.toml"
    _with_places(lab.one, real)
    real.chmod(0o600)
    os.chown(real, 1, 2)
    link.symlink_to(real)
    with _without_default_keys(), _Init(lab.one, link) as init:
        assert _join(lab.two, init.code, two).returncode == 0
        assert init.end()[0] == 0
    assert link.is_symlink()
    there = real.stat()
    assert (there.st_mode & 0o777, there.st_uid, there.st_gid) == (0o600, 1, 2)
    loaded = configuration.load(link, "one")
    assert loaded.peer is not None
    assert loaded.peer.name == "two"
    assert {each.name for each in tmp_path.iterdir()} == {real.name, link.name, two.name}


def test_the_second_node_gets_the_file_of_the_first(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    with _without_default_keys(), _Init(lab.one, one, "--port", "7799") as init:
        done = _join(lab.two, init.code, two)
        assert done.returncode == 0, done.stderr
        assert init.end()[0] == 0
    first, second = configuration.load(one), configuration.load(two)
    assert (first.node.name, second.node.name) == ("one", "two")
    assert first.shared == second.shared
    assert second.peer is not None
    assert second.peer.port == first.node.port == second.node.port == 7799


def test_the_code_can_go_from_a_file_to_stdin_and_is_printed_nowhere(lab: Lab, tmp_path: Path) -> None:
    one, two, code_file = (tmp_path / name for name in ("one.toml", "two.toml", "code"))
    arguments = ("--node", "one", "--address", ADDRESSES["one"], "--config", str(one), "--code-file", str(code_file))
    with _without_default_keys():
        command = _mirrorfs(lab.one, "init", VOLUME, *arguments)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as waiting:
            try:
                wait_for(code_file.exists, "the code is there")
                assert code_file.stat().st_mode & 0o777 == 0o600
                code = code_file.read_text()
                joining = _mirrorfs(lab.two, "join", "-", "--node", "two", "--config", str(two))
                done = subprocess.run(joining, input=code, capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, done.stderr
                said, _ = waiting.communicate(timeout=60)
            finally:
                waiting.kill()
        assert waiting.returncode == 0, said
    assert "two has joined" in said
    assert code.strip() not in said
    assert not code_file.exists()


def test_a_file_for_the_code_that_cannot_be_written_is_told(lab: Lab, tmp_path: Path) -> None:
    arguments = ("--node", "one", "--address", ADDRESSES["one"], "--config", str(tmp_path / "one.toml"))
    with _without_default_keys():
        command = _mirrorfs(lab.one, "init", VOLUME, *arguments, "--code-file", "/nowhere/code")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mirrorfs: --code-file /nowhere/code: cannot be written: No such file or directory\n"


def test_a_module_and_an_address_given_to_init_are_on_both_nodes(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    options = ("--mount", "/d", "--module", "generic", "--set", "run=commands", "--set", "start=run $(it)", "--vip")
    with _without_default_keys(), _Init(lab.one, one, *options, "10.77.0.100/24@eth0") as init:
        assert configuration.load(one).failover is None, "it needs two nodes"
        done = _join(lab.two, init.code, two)
        assert done.returncode == 0, done.stderr
        assert init.end()[0] == 0
    first, second = configuration.load(one), configuration.load(two)
    assert first.shared == second.shared
    for loaded in (first, second):
        assert loaded.failover is not None
        assert [(service.name, service.start) for service in loaded.failover.services] == [("generic", "run $(it)")]
        assert [(str(vip.address), vip.interface) for vip in loaded.failover.vips] == [("10.77.0.100/24", "eth0")]


def test_where_systemd_does_not_start_the_node_it_says_what_to_run(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    with _without_default_keys(), _Init(lab.one, one) as init:
        done = _join(lab.two, init.code, two)
        assert f"next, here: mirrorfs --config {two} mount PATH\n" in done.stdout
        code, said = init.end()
    assert code == 0
    assert f"next, here: mirrorfs --config {one} mount PATH\n" in said
    assert "then, once, on the node whose files are to be kept: mirrorfs promote\n" in said


def test_where_the_node_is_not_started_the_machine_is_not_prepared_but_it_says_how(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    place = tmp_path / "data"
    place.mkdir()
    (place / "file").touch()
    # A cluster that there is not, so that nobody's can be stopped by a mistake here.
    settings = ("--set", "run=systemd", "--set", "cluster=of-no-machine")
    options = ("--mount", str(place), "--module", "postgresql", *settings, "--vip", "10.77.0.100/24@eth0")
    with _without_default_keys(), _Init(lab.one, one, *options) as init:
        done = _join(lab.two, init.code, two, "--set-aside")
        assert done.returncode == 0, done.stderr
        code, said = init.end()
    assert code == 0
    for file, option, told in ((one, "", said), (two, " --set-aside", done.stdout)):
        chosen = f"mirrorfs --config {file}"
        assert f"next, here: {chosen} prepare{option}; and {chosen} mount; and {chosen} controller\n" in told
    assert (place / "file").exists()
    command = _mirrorfs(lab.two, "--config", str(two), "prepare", "--set-aside")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "there is no cluster 15 of-no-machine here" in refused.stdout
    assert refused.stderr == (
        "mirrorfs: service postgresql: this machine could not be prepared for it (exit status 1, see above)\n"
    )
    assert (place / "file").exists(), "what a service may still use is not moved"


def test_a_node_that_would_not_be_started_cannot_be_promoted(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "one.toml"
    arguments = ("init", VOLUME, "--node", "one", "--address", ADDRESSES["one"], "--config", str(file), "--promote")
    with _without_default_keys():
        done = subprocess.run(_mirrorfs(lab.one, *arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("mirrorfs: --promote: the node has to run for that, and it would not be started: ")
    assert done.stderr.count("\n") == 1


_SCAN = """
import socket, ssl, struct, sys
place = sys.argv[1], int(sys.argv[2])
for _ in range(5):
    with socket.create_connection(place) as made:  # and an RST
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
trusting = ssl._create_unverified_context()
for said in (b"[" * 20_000 + b"\\n", b"{}\\n", b"GET / HTTP/1.1\\r\\n\\r\\n"):
    with socket.create_connection(place) as made, trusting.wrap_socket(made) as secured:
        secured.sendall(said)
        secured.recv(1000)
"""


def test_a_port_scan_does_not_end_the_wait(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    with _without_default_keys(), _Init(lab.one, one) as init:
        port = str(parse_code(init.code).port)
        lab.two.run(sys.executable, "-c", _SCAN, ADDRESSES["one"], port, check=True)
        assert _join(lab.two, init.code, two).returncode == 0
        assert init.end()[0] == 0


def test_init_again_goes_on_where_it_was_and_says_what_would_be_another_volume(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    options = (
        "--mount",
        "/d",
        "--module",
        "generic",
        "--set",
        "run=commands",
        "--set",
        "start=run",
        "--vip",
        "10.77.0.9/24@eth0",
    )
    with _without_default_keys():
        with _Init(lab.one, one, *options) as init:
            assert _join(lab.two, init.code, two).returncode == 0
            assert init.end()[0] == 0
        with _Init(lab.one, one, *options) as again:  # as if the answer to the other node had been lost
            assert _join(lab.two, again.code, two).returncode == 0
            assert again.end()[0] == 0
        assert configuration.load(one).shared == configuration.load(two).shared
        with _Init(lab.one, one, "--mount", "/elsewhere") as other:
            code, said = other.end()
        assert code == 2
        assert said.startswith("mirrorfs: --mount /elsewhere: ")
        assert "says /d: change it there" in said


def test_a_code_is_good_once_and_for_its_node_only(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    _with_places(lab.one, one)
    _with_places(lab.two, two)
    with two.open("a") as file:
        file.write(f'[nodes.one]\naddress = "{ADDRESSES["one"]}"\n')
    with _Init(lab.one, one) as init:
        good = parse_code(init.code)
        wrong = str(good._replace(secret=bytes(16)))
        refused = _join(lab.two, wrong, two)
        assert (refused.returncode, refused.stderr) == (
            1,
            f"mirrorfs: {ADDRESSES['one']}: the code is wrong, or was used already\n",
        )
        assert not Trust(configuration.load(two, "two").node.keys).peer.exists()
        other = _join(lab.two, str(good._replace(fingerprint=bytes(16))), two)
        assert "is not the node that gave the code" in other.stderr
        assert _join(lab.two, init.code, two).returncode == 0
        assert init.end()[0] == 0
    again = _join(lab.two, init.code, two)
    assert again.returncode == 1
    assert "cannot be reached" in again.stderr


def test_who_guesses_at_the_secret_ends_the_code(lab: Lab, tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    _with_places(lab.one, one)
    _with_places(lab.two, two)
    with _Init(lab.one, one) as init:
        wrong = str(parse_code(init.code)._replace(secret=bytes(16)))
        for _ in range(5):
            assert _join(lab.two, wrong, two).returncode == 1
        wait_for(lambda: init.process.poll() is not None, "it gives up")
        code, said = init.end()
    assert code == 1
    assert "somebody has tried wrong codes" in said


def test_a_code_ends_by_itself(lab: Lab, tmp_path: Path) -> None:
    one = tmp_path / "one.toml"
    _with_places(lab.one, one)
    with _Init(lab.one, one, "--minutes", "0.1") as init:
        code, said = init.end()
    assert code == 1
    assert "no node has joined within 0.1 minutes" in said


@pytest.mark.parametrize(("volume", "address"), [("no name", "10.77.0.1"), ("v", "no address")])
def test_a_wrong_name_or_address_is_told_and_leaves_no_file(lab: Lab, tmp_path: Path, volume: str, address: str) -> None:
    file = tmp_path / "one.toml"
    command = _mirrorfs(lab.one, "init", volume, "--node", "one", "--address", address, "--config", str(file))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not file.exists()


@pytest.mark.parametrize("mistake", ["", "mfs1", "mfs1abc", "hello"])
def test_what_is_no_code_is_told(lab: Lab, tmp_path: Path, mistake: str) -> None:
    done = _join(lab.two, mistake, tmp_path / "two.toml")
    assert done.returncode == 2
    assert "no code of `mirrorfs init`" in done.stderr


def test_a_code_that_was_not_copied_as_a_whole_is_told() -> None:
    code = str(Code("v", "10.0.0.1", 7788, bytes(range(16)), bytes(range(16))))
    assert parse_code(f" {code}\n") == Code("v", "10.0.0.1", 7788, bytes(range(16)), bytes(range(16)))
    for cut in (code[:-1], code[:-8], code[:10] + code[11:]):
        with pytest.raises(Exception, match="not all of it"):
            parse_code(cut)


def test_a_node_without_keys_says_what_to_do(lab: Lab) -> None:
    for path in lab.one.keys.iterdir():
        path.unlink()
    lab.one.keys.rmdir()
    done = lab.one.run(
        sys.executable, "-m", "mirrorfs", "mount", lab.one.mount, "--config", lab.one.config, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "mirrorfs init" in done.stderr
