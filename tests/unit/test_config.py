import math
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs import config
from mirrorfs.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "mirrorfs.toml"
ONE = 'volume = "v"\nnode = "one"\n[nodes.one]\naddress = "10.0.0.1"\n'
TWO = ONE + '[nodes.two]\naddress = "10.0.0.2"\n'
UNITS_S = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIRRORFS_NODE", raising=False)
    monkeypatch.delenv("MIRRORFS_CONFIG", raising=False)
    monkeypatch.delenv("MIRRORFS_SESSION", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "v.toml"


def loaded(file: Path, text: str, node: str | None = None) -> config.Config:
    file.write_text(text)
    return config.load(file, node)


def refusal(file: Path, text: str | bytes, node: str | None = None) -> str:
    """The error of loading `text`, without the file's name in front of it."""
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        config.load(file, node)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def test_a_small_file_has_the_documented_defaults(file: Path) -> None:
    one = config.NodeConfig(
        name="one",
        address="10.0.0.1",
        port=7788,
        backing=None,
        state_dir=Path("/var/lib/mirrorfs/v/one"),
        control=Path("/run/mirrorfs/v-one.sock"),
        controller=Path("/run/mirrorfs/v-one-controller.sock"),
        heartbeats=("10.0.0.1",),
        keys=Path("/etc/mirrorfs/keys/v/one"),
    )
    two = config.NodeConfig(
        name="two",
        address="10.0.0.2",
        port=7788,
        backing=None,
        state_dir=Path("/var/lib/mirrorfs/v/two"),
        keys=Path("/etc/mirrorfs/keys/v/two"),
        control=Path("/run/mirrorfs/v-two.sock"),
        controller=Path("/run/mirrorfs/v-two-controller.sock"),
        heartbeats=("10.0.0.2",),
    )
    assert loaded(file, TWO) == config.Config(
        file=file, volume="v", node=one, peer=two, replication=config.ReplicationConfig("continue", 2.0, 10.0, 30.0, 10.0)
    )
    assert loaded(file, TWO).resync == config.ResyncConfig(math.inf, "application")


def test_the_sample_says_what_the_defaults_are(file: Path) -> None:
    text = EXAMPLE.read_text()
    sample = loaded(file, text, "two")
    assert (sample.volume, sample.node.name, sample.node.address) == ("dispatch", "two", "10.77.0.2")
    assert sample.replication == config.ReplicationConfig()
    assert sample.resync == config.ResyncConfig()
    assert sample.verify == config.VerifyConfig()
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    spelled_out = loaded(file, "\n".join(line for line in lines if " = " in line or line.startswith("[")), "two")
    assert spelled_out.peer is not None
    assert sample.peer is not None
    assert spelled_out.peer.state_dir == sample.peer.state_dir
    assert spelled_out.peer.control == sample.peer.control
    assert spelled_out.peer.port == sample.peer.port
    assert spelled_out.node.backing == Path("/srv/dispatch")


def test_every_key_is_read(file: Path) -> None:
    text = """
        volume = "v"
        backing = "/srv/both"
        [nodes."one.example.org"]
        address = "one.example.org"
        port = 1
        state_dir = "/s"
        control = "/c"
        keys = "/k"
        backing = "/srv/one"
        [nodes.two]
        address = "fd00::2"
        [replication]
        on_peer_loss = "freeze"
        ack_timeout = "500ms"
        freeze_timeout = "1min"
        stall_timeout = "1.5 h"
        checkpoint_interval = "1min"
        [resync]
        rate_limit = "1.5 GiB/s"
        priority = "resync"
        [verify]
        rate = "1.5 GiB/s"
        every = "30d"
        [security]
        encryption = "off"
    """
    found = loaded(file, text, "two")
    name, controller = "one.example.org", Path("/run/mirrorfs/v-one.example.org-controller.sock")
    assert found.peer == config.NodeConfig(
        name, name, 1, Path("/srv/one"), Path("/s"), Path("/c"), controller, (name,), Path("/k")
    )
    assert found.node.backing == Path("/srv/both")
    assert found.replication == config.ReplicationConfig("freeze", 0.5, 60.0, 5400.0, 60.0)
    assert not found.encrypted
    assert found.resync == config.ResyncConfig(1.5 * 2**30, "resync")
    assert found.verify == config.VerifyConfig(1.5 * 2**30, 30 * 86400.0)


def test_a_schedule_may_be_off(file: Path) -> None:
    assert loaded(file, TWO).verify == config.VerifyConfig(50 * 2**20, 7 * 86400.0)
    assert loaded(file, TWO + '[verify]\nevery = "off"\n').verify.every_s is None


def test_the_session_is_the_environments_then_the_files_then_the_kernels(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(file, TWO).session == "kernel"
    assert loaded(file, 'session = "pyfuse3"\n' + TWO).session == "pyfuse3"
    monkeypatch.setenv("MIRRORFS_SESSION", "kernel")
    assert loaded(file, 'session = "pyfuse3"\n' + TWO).session == "kernel"
    monkeypatch.setenv("MIRRORFS_SESSION", "libfuse")
    assert refusal(file, TWO) == 'session: "libfuse" in $MIRRORFS_SESSION is not a session, use "kernel" or "pyfuse3"'


def test_a_single_node_has_no_peer(file: Path) -> None:
    assert loaded(file, ONE).peer is None


def test_two_nodes_may_share_an_address_or_a_port(file: Path) -> None:
    text = ONE + '[nodes.two]\naddress = "10.0.0.1"\nport = 7789\n'
    assert loaded(file, text).node.port == 7788


def test_the_own_node_is_taken_from_the_option_then_the_environment_then_the_file_then_the_host(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = socket.gethostname()
    names = ("a", "b")
    for own in {full, full.partition(".")[0]}:
        text = "".join(f'[nodes."{name}"]\naddress = "{name}.example"\n' for name in (own, "b"))
        assert loaded(file, f'volume = "v"\n{text}').node.name == own
    nodes = "".join(f'[nodes.{name}]\naddress = "{name}.example"\n' for name in names)
    assert loaded(file, f'volume = "v"\nnode = "b"\n{nodes}').node.name == "b"
    monkeypatch.setenv("MIRRORFS_NODE", "a")
    assert loaded(file, f'volume = "v"\nnode = "b"\n{nodes}').node.name == "a"
    assert loaded(file, f'volume = "v"\nnode = "a"\n{nodes}', "b").node.name == "b"
    monkeypatch.setenv("MIRRORFS_NODE", "")
    assert loaded(file, f'volume = "v"\nnode = "b"\n{nodes}').node.name == "b"


def test_the_short_host_name_comes_before_the_full_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "one.example.org")
    parts = '[nodes."one.example.org"]\naddress = "10.0.0.1"\n', '[nodes.one]\naddress = "10.0.0.2"\n'
    assert loaded(file, 'volume = "v"\n' + "".join(parts)).node.name == "one"
    assert loaded(file, 'volume = "v"\n' + parts[0]).node.name == "one.example.org"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'node = "one"\n[nodes.one]\naddress = "h"\n',
            'volume: missing, name the volume, as in volume = "data"',
        ),
        (
            TWO.replace('"v"', '"a/b"'),
            'volume: "a/b" is not a name, use 1 to 32 of A-Z a-z 0-9 _ -',
        ),
        (
            TWO.replace('"v"', f'"{"x" * 33}"'),
            f'volume: "{"x" * 33}" is not a name, use 1 to 32 of A-Z a-z 0-9 _ -',
        ),
        (
            TWO.replace('"v"', r'"v\n"'),
            r'volume: "v\n" is not a name, use 1 to 32 of A-Z a-z 0-9 _ -',
        ),
        (TWO.replace('"v"', "3"), "volume: is a whole number, must be a string"),
        (TWO.replace('"v"', "1979-05-27"), "volume: is a date or time, must be a string"),
        ("volme = 1\n" + TWO, "volme: unknown key, did you mean volume?"),
        (
            '"a\\nb" = 1\n' + TWO,
            r'"a\nb": unknown key, remove it (known here: volume, node, mount, backing, session, nodes, replication, resync, '
            "verify, security, arbiter, failover, console, vip, service)",
        ),
        (
            'volume = "v"\n',
            "nodes: missing, add a part [nodes.NAME] with an address for each of the two nodes",
        ),
        (
            'volume = "v"\n[nodes]\n',
            "nodes: missing, add a part [nodes.NAME] with an address for each of the two nodes",
        ),
        (
            TWO + '[nodes.three]\naddress = "h"\n',
            "nodes: 3 nodes (one, two, three) but a volume has two at most, remove the others",
        ),
        ('volume = "v"\nnodes = "one"\n', "nodes: is a string, must be a table"),
        ('volume = "v"\nnodes.one = "h"\n', "nodes.one: is a string, must be a table"),
        (
            TWO + '[nodes."../x"]\naddress = "h"\n',
            'nodes: 3 nodes (one, two, "../x") but a volume has two at most, remove the others',
        ),
        (
            ONE + '[nodes."../x"]\naddress = "h"\n',
            'nodes."../x": is not a name, use 1 to 63 of A-Z a-z 0-9 . _ - beginning with a letter or digit',
        ),
        (
            ONE + "[nodes.two]\n",
            'nodes.two.address: missing, give the address that this node listens on, as in address = "10.77.0.1"',
        ),
        (TWO + "prt = 1\n", "nodes.two.prt: unknown key, did you mean port?"),
        (
            ONE + '[nodes.two]\nadress = "10.0.0.2"\n',
            "nodes.two.adress: unknown key, did you mean address?",
        ),
        (
            TWO.replace("10.0.0.2", "10.0.0.2:7788"),
            'nodes.two.address: "10.0.0.2:7788" is neither an IP address nor a host name, '
            "write one of these (the port has a key of its own)",
        ),
        (
            TWO.replace("10.0.0.2", "10.0.2"),
            'nodes.two.address: "10.0.2" is neither an IP address nor a host name, '
            "write one of these (the port has a key of its own)",
        ),
        (
            TWO.replace("10.0.0.2", "0.0.0.0"),
            'nodes.two.address: "0.0.0.0" is not the address of one machine, give the one that this node listens on',
        ),
        (TWO + "port = 0\n", "nodes.two.port: 0 is not a port, use 1 to 65535"),
        (TWO + "port = 65536\n", "nodes.two.port: 65536 is not a port, use 1 to 65535"),
        (TWO + 'port = "7788"\n', "nodes.two.port: is a string, must be a whole number"),
        (TWO + "port = true\n", "nodes.two.port: is a boolean, must be a whole number"),
        (
            ONE + '[nodes.two]\naddress = "10.0.0.1"\n',
            'nodes.two: has the address and port of "one" (10.0.0.1, port 7788), give each node its own',
        ),
        (
            'volume = "v"\n[nodes.one]\naddress = "fd00::1"\n[nodes.two]\naddress = "fd00:0::1"\n',
            'nodes.two: has the address and port of "one" (fd00:0::1, port 7788), give each node its own',
        ),
        (
            TWO + 'state_dir = "var"\n',
            'nodes.two.state_dir: "var" is not an absolute path, begin it with /',
        ),
        (
            'backing = "srv"\n' + TWO,
            'backing: "srv" is not an absolute path, begin it with /',
        ),
        (
            TWO + 'backing = "/srv"\nstate_dir = "/srv/state"\n',
            'nodes.two.state_dir: "/srv/state" lies among the files it is about (/srv), put it elsewhere',
        ),
        (
            TWO + f'control = "/{"x" * 107}"\n',
            "nodes.two.control: 108 bytes are too long for a socket's path, use 107 or fewer",
        ),
        (
            ONE + "[replication]\n",
            'nodes: [replication] is there but the peer of "one" is missing, add [nodes.NAME] with its address, '
            "or remove [replication] to run alone",
        ),
        (
            ONE + "[verify]\n",
            'nodes: [verify] is there but the peer of "one" is missing, add [nodes.NAME] with its address, '
            "or remove [verify] to run alone",
        ),
        (TWO + '[verify]\nrate = "50MB/s"\n', 'verify.rate: "MB/s" is not a unit, use KiB/s, MiB/s or GiB/s'),
        (TWO + '[verify]\nrate = "0MiB/s"\n', 'verify.rate: "0MiB/s" would never end, make it 1KiB/s or more'),
        (
            TWO + '[verify]\nevery = "weekly"\n',
            'verify.every: "weekly" is not a duration, write a number and a unit, as in "2s" (ms, s, min, h, d)',
        ),
        (TWO + '[verify]\nevery = "400d"\n', 'verify.every: "400d" is too long, make it 366d or less'),
        (TWO + '[verify]\nevry = "7d"\n', "verify.evry: unknown key, did you mean every?"),
        (
            TWO + '[replication]\non_peer_loss = "stop"\n',
            'replication.on_peer_loss: "stop" is not known here, use "continue" or "freeze"',
        ),
        (
            TWO + "[replication]\nack_timeout = 2\n",
            'replication.ack_timeout: is a whole number, must be a string with a unit, as in "2s"',
        ),
        (
            TWO + "[replication]\nack_timeout = 2.5\n",
            'replication.ack_timeout: is a decimal number, must be a string with a unit, as in "2s"',
        ),
        (
            TWO + '[replication]\nfreeze_timeout = "10"\n',
            'replication.freeze_timeout: "10" has no unit, write it as in "10s" (ms, s, min, h, d)',
        ),
        (
            TWO + '[replication]\nfreeze_timeout = "10m"\n',
            'replication.freeze_timeout: "m" is not a unit, use ms, s, min, h or d',
        ),
        (
            TWO + '[replication]\nstall_timeout = "-1s"\n',
            'replication.stall_timeout: "-1s" is not a duration, write a number and a unit, as in "2s" (ms, s, min, h, d)',
        ),
        (
            TWO + '[replication]\nstall_timeout = "0.0s"\n',
            'replication.stall_timeout: "0.0s" is no time at all, make it longer than 0',
        ),
        (
            TWO + '[replication]\nstall_timeout = "25h"\n',
            'replication.stall_timeout: "25h" is too long, make it 24h or less',
        ),
        (
            TWO + '[replication]\nack_timout = "2s"\n',
            "replication.ack_timout: unknown key, did you mean ack_timeout?",
        ),
        (
            TWO + '[replication]\ncheckpoint_interval = "10 sec"\n',
            'replication.checkpoint_interval: "sec" is not a unit, use ms, s, min, h or d',
        ),
        (
            ONE + "[resync]\n",
            'nodes: [resync] is there but the peer of "one" is missing, add [nodes.NAME] with its address, '
            "or remove [resync] to run alone",
        ),
        (
            TWO + "[resync]\nrate_limit = 100\n",
            'resync.rate_limit: is a whole number, must be a string with a unit, as in "100MiB/s"',
        ),
        (
            TWO + '[resync]\nrate_limit = "fast"\n',
            'resync.rate_limit: "fast" is not a rate, write a number and a unit, as in "100MiB/s" (KiB/s, MiB/s, GiB/s), '
            'or "none"',
        ),
        (
            TWO + '[resync]\nrate_limit = "100"\n',
            'resync.rate_limit: "100" has no unit, write it as in "100MiB/s" (KiB/s, MiB/s, GiB/s)',
        ),
        (
            TWO + '[resync]\nrate_limit = "100MB/s"\n',
            'resync.rate_limit: "MB/s" is not a unit, use KiB/s, MiB/s or GiB/s',
        ),
        (
            TWO + '[resync]\nrate_limit = "100 MiB"\n',
            'resync.rate_limit: "MiB" is not a unit, use KiB/s, MiB/s or GiB/s',
        ),
        (
            TWO + '[resync]\nrate_limit = "0.5KiB/s"\n',
            'resync.rate_limit: "0.5KiB/s" would never end, make it 1KiB/s or more',
        ),
        (
            TWO + '[resync]\nrate_limit = "1025GiB/s"\n',
            'resync.rate_limit: "1025GiB/s" limits nothing, make it 1024GiB/s or less, or "none"',
        ),
        (
            'session = "libfuse"\n' + TWO,
            'session: "libfuse" is not a session, use "kernel" or "pyfuse3"',
        ),
        (
            TWO + '[resync]\npriority = "high"\n',
            'resync.priority: "high" is not known here, use "application" or "resync"',
        ),
        (
            TWO + '[resync]\nrate_limits = "none"\n',
            "resync.rate_limits: unknown key, did you mean rate_limit?",
        ),
        (
            TWO.replace('node = "one"', 'node = "three"'),
            'node: there is no node "three" as node says, use one of: one, two',
        ),
        (
            'volume = "v"\n\nnode = = 1\n',
            "line 3, column 8: not TOML (Invalid value), correct it there",
        ),
        (b'volume = "v"\n# \xff\n', "line 2: not UTF-8, save the file in that encoding"),
        ("x = " + "[" * 100_000, "nested too deeply, this file needs no more than tables in tables"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(file: Path, text: str | bytes, expected: str) -> None:
    assert refusal(file, text) == expected


def test_an_own_node_that_is_not_there_is_reported_with_where_its_name_came_from(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(file, TWO, "x") == 'nodes: there is no node "x" as --node says, use one of: one, two'
    monkeypatch.setenv("MIRRORFS_NODE", "y")
    assert refusal(file, TWO) == 'nodes: there is no node "y" as $MIRRORFS_NODE says, use one of: one, two'
    monkeypatch.delenv("MIRRORFS_NODE")
    monkeypatch.setattr(socket, "gethostname", lambda: "three.example.org")
    assert refusal(file, TWO.replace('node = "one"\n', "")) == (
        'nodes: none is named as this host, "three.example.org", give --node NAME or set node to one of: one, two'
    )


def test_a_file_that_cannot_be_read_is_reported(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(caught.value) == f"{file}: there is no such file, write it or give another with --config FILE"
    file.mkdir()
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(caught.value) == f"{file}: cannot be read (Is a directory), look at its type and mode"


@given(
    number=st.integers(min_value=1, max_value=10**7) | st.decimals("0.001", "20", places=3),
    unit=st.sampled_from(sorted(UNITS_S)),
)
def test_a_duration_is_its_number_times_its_unit(tmp_path_factory: pytest.TempPathFactory, number: float, unit: str) -> None:
    file = tmp_path_factory.getbasetemp() / "duration.toml"
    text = f'{TWO}[replication]\nack_timeout = "{number}{unit}"\n'
    expected_s = float(number) * UNITS_S[unit]
    if expected_s <= 24 * 3600:
        assert loaded(file, text).replication.ack_timeout_s == pytest.approx(expected_s)
    else:
        assert "is too long" in refusal(file, text)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("none", math.inf), ("1KiB/s", 1024), ("100MiB/s", 100 << 20), ("0.5 GiB/s", 1 << 29), ("1024GiB/s", 1 << 40)],
)
def test_a_rate_is_its_number_times_its_unit(file: Path, text: str, bytes_per_s: float) -> None:
    assert loaded(file, f'{TWO}[resync]\nrate_limit = "{text}"\n').resync.rate_limit_bytes_per_s == bytes_per_s


@given(text=st.text(st.characters(exclude_characters='"\\', min_codepoint=32, exclude_categories=["Cs", "Cc"])))
def test_any_text_is_a_positive_duration_or_one_line_of_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "duration.toml"
    try:
        ack_timeout_s = loaded(file, f'{TWO}[replication]\nack_timeout = "{text}"\n').replication.ack_timeout_s
    except ConfigError as error:
        problem = str(error)
    else:
        assert ack_timeout_s > 0
        return
    assert problem.startswith(f"{file}: replication.ack_timeout: ")
    assert len(problem.splitlines()) == 1


def test_find_prefers_the_given_file_then_the_environment_then_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = tmp_path / "only.toml"
    only.touch()
    (tmp_path / ".only.toml.swp").touch()
    (tmp_path / ".hidden.toml").touch()
    assert config.find(None, tmp_path) == only
    monkeypatch.setenv("MIRRORFS_CONFIG", "/from/environment")
    assert config.find(None, tmp_path) == Path("/from/environment")
    assert config.find(Path("given"), tmp_path) == Path("given")


def test_find_names_the_files_when_there_are_several(tmp_path: Path) -> None:
    for name in ("b.toml", "a.toml"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        config.find(None, tmp_path)
    assert str(caught.value) == f"{tmp_path}: several configurations (a.toml, b.toml), choose one with --config FILE"


@pytest.mark.parametrize("directory", [".", "missing"])
def test_find_says_how_to_begin_when_there_is_none(tmp_path: Path, directory: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.find(None, tmp_path / directory)
    assert str(caught.value) == (
        f"{tmp_path / directory}: no configuration here (*.toml), make one with `mirrorfs init` (or `join`) "
        "or give --config FILE"
    )
    assert config.find_if_any(None, tmp_path / directory) is None


def test_another_backing_is_checked_against_the_state_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(file, TWO)
    monkeypatch.chdir(file.parent)
    assert config.with_backing(found, Path("b")).node.backing == file.parent / "b"
    with pytest.raises(ConfigError) as caught:
        config.with_backing(found, Path("/var/lib"))
    assert str(caught.value) == (
        f'{file}: nodes.one.state_dir: "/var/lib/mirrorfs/v/one" lies among the files it is about (/var/lib), put it elsewhere'
    )
