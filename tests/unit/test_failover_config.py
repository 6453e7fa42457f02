"""The parts of the configuration that are about failing over: every key, the defaults, and what is wrong in one line."""

from ipaddress import ip_interface
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs import config
from mirrorfs.errors import ConfigError
from mirrorfs.failover_config import ArbiterConfig, CheckConfig, FailoverConfig, ServiceConfig, VipConfig, flatten

BASE = 'volume = "v"\nnode = "one"\n[nodes.one]\naddress = "10.0.0.1"\n[nodes.two]\naddress = "10.0.0.2"\n'
FAILOVER = BASE + "[failover]\n"
ETCD = BASE + '[arbiter]\nkind = "etcd"\nendpoints = ["https://10.0.0.9:2379"]\n'
NONE = BASE + '[arbiter]\nkind = "none"\n'
VIP = FAILOVER + '[[vip]]\naddress = "10.77.0.100/24"\ninterface = "eth0"\n'
SERVICE = FAILOVER + '[[service]]\nname = "db"\nunit = "postgresql@15-main"\n'
CHECK = SERVICE + "[[service.check]]\n"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIRRORFS_NODE", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "v.toml"


def loaded(file: Path, text: str) -> config.Config:
    file.write_text(text)
    return config.load(file)


def failover(file: Path, text: str) -> FailoverConfig:
    found = loaded(file, text).failover
    assert found is not None
    return found


def refusal(file: Path, text: str) -> str:
    """The error of loading `text`, without the file's name in front of it."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


# ---- what is read


def test_a_file_that_says_nothing_of_it_has_no_arbiter_and_no_controller(file: Path) -> None:
    found = loaded(file, BASE)
    assert found.failover is None
    assert found.arbiter == ArbiterConfig(kind="none", allow_unarbitrated=False)
    assert loaded(file, NONE).arbiter == found.arbiter


def test_the_defaults_are_the_documented_ones(file: Path) -> None:
    assert failover(file, FAILOVER) == FailoverConfig(
        key_file=None,
        detection_timeout_s=3.0,
        port=7789,
        failback="manual",
        preferred="",
        failback_after_s=30.0,
        max_failovers=3,
        failover_window_s=3600.0,
        vip_up="",
        vip_down="",
        vips=(),
        services=(),
    )
    assert failover(file, SERVICE + '[[service.check]]\nmount = "/srv"\n').services == (
        ServiceConfig(
            name="db",
            unit="postgresql@15-main",
            start="",
            stop="",
            prepare="",
            start_timeout_s=60.0,
            stop_timeout_s=30.0,
            checks=(CheckConfig("mount", "/srv", interval_s=2.0, timeout_s=5.0, failures=2),),
            restarts=3,
            restart_window_s=600.0,
        ),
    )
    assert loaded(file, ETCD).arbiter == ArbiterConfig(
        kind="etcd", endpoints=("https://10.0.0.9:2379",), prefix="/mirrorfs", timeout_s=2.0
    )


def test_every_key_of_an_etcd_is_read(file: Path) -> None:
    text = """
        ca = "/c/ca"
        certificate = "/c/crt"
        key = "/c/key"
        user = "mirrorfs"
        password_file = "/c/password"
        prefix = "/there/it is not"
        timeout = "500ms"
    """
    with_two = ETCD.replace('"]', '", "http://etcd.example:2379"]')
    assert loaded(file, with_two + text.replace("it is not", "it-is")).arbiter == ArbiterConfig(
        kind="etcd",
        endpoints=("https://10.0.0.9:2379", "http://etcd.example:2379"),
        ca=Path("/c/ca"),
        certificate=Path("/c/crt"),
        key=Path("/c/key"),
        user="mirrorfs",
        password_file=Path("/c/password"),
        prefix="/there/it-is",
        timeout_s=0.5,
    )
    assert refusal(file, with_two + text) == (
        'arbiter.prefix: "/there/it is not" is not one, begin it with / and use printable ASCII'
    )


@pytest.mark.parametrize("address", ["10.0.0.254", "fd00::1"])
def test_every_key_without_an_arbiter_is_read(file: Path, address: str) -> None:
    text = f'allow_unarbitrated = true\nisolation_check = "{address}"\n'
    assert loaded(file, NONE + text).arbiter == ArbiterConfig(kind="none", allow_unarbitrated=True, isolation_check=address)


def test_every_key_of_the_controller_is_read(file: Path) -> None:
    text = """
        key_file = "/k"
        detection_timeout = "500ms"
        port = 65535
        failback = "preferred"
        preferred = "two"
        failback_after = "5min"
        max_failovers = 1000
        failover_window = "24h"
        vip_up = "up $1"
        vip_down = "down $1"
        [[vip]]
        address = "10.77.0.100/24"
        interface = "eth0"
        [[vip]]
        address = "fd00::100/64"
        interface = "bond0.1234567"
        [[service]]
        name = "db"
        unit = "postgresql@15-main.service"
        start_timeout = "2min"
        stop_timeout = "90s"
        restarts = 0
        restart_window = "1h"
        [[service]]
        name = "A.b_c@d-9"
        start = "start-it"
        stop = "stop-it"
        prepare = "make-it ready"
    """
    assert failover(file, FAILOVER + text) == FailoverConfig(
        key_file=Path("/k"),
        detection_timeout_s=0.5,
        port=65535,
        failback="preferred",
        preferred="two",
        failback_after_s=300.0,
        max_failovers=1000,
        failover_window_s=86400.0,
        vip_up="up $1",
        vip_down="down $1",
        vips=(
            VipConfig(ip_interface("10.77.0.100/24"), "eth0"),
            VipConfig(ip_interface("fd00::100/64"), "bond0.1234567"),
        ),
        services=(
            ServiceConfig(
                "db",
                unit="postgresql@15-main.service",
                start_timeout_s=120.0,
                stop_timeout_s=90.0,
                restarts=0,
                restart_window_s=3600.0,
            ),
            ServiceConfig("A.b_c@d-9", start="start-it", stop="stop-it", prepare="make-it ready"),
        ),
    )


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("process", "/run/db.pid"),
        ("tcp", "127.0.0.1:5432"),
        ("tcp", "[::1]:65535"),
        ("tcp", "db.example:1"),
        ("http", "https://localhost/health?deep=1"),
        ("command", "pg_isready | grep accepting"),
        ("mount", "/srv/data"),
    ],
)
def test_every_kind_of_check_is_read(file: Path, kind: str, target: str) -> None:
    text = f'{kind} = "{target}"\ninterval = "500ms"\ntimeout = "1s"\nfailures = 1000\n'
    (service,) = failover(file, CHECK + text).services
    assert service.checks == (CheckConfig(kind, target, interval_s=0.5, timeout_s=1.0, failures=1000),)  # type: ignore[arg-type]


def test_a_service_has_as_many_checks_as_it_likes_in_their_order(file: Path) -> None:
    text = 'tcp = "h:1"\n[[service.check]]\ncommand = "true"\n[[service.check]]\ntcp = "h:1"\n'
    (service,) = failover(file, CHECK + text).services
    assert [(check.kind, check.target) for check in service.checks] == [("tcp", "h:1"), ("command", "true"), ("tcp", "h:1")]


def test_heartbeats_go_over_the_networks_that_are_listed_else_over_that_of_the_data(file: Path) -> None:
    assert loaded(file, FAILOVER).node.heartbeats == ("10.0.0.1",)
    text = BASE.replace('"10.0.0.1"\n', '"10.0.0.1"\nheartbeats = ["10.0.0.1", "one.example"]\ncontroller = "/c"\n')
    found = loaded(file, text + 'heartbeats = ["10.0.0.2", "fd00::2"]\n')
    assert found.node.heartbeats == ("10.0.0.1", "one.example")
    assert found.node.controller == Path("/c")
    assert found.peer is not None
    assert found.peer.heartbeats == ("10.0.0.2", "fd00::2")
    assert found.peer.controller == Path("/run/mirrorfs/v-two-controller.sock")


# ---- what is wrong


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "[arbiter]\n", 'arbiter.kind: missing, use "etcd", or "none" for an operator who decides'),
        (BASE + '[arbiter]\nkind = "consul"\n', 'arbiter.kind: "consul" is not known here, use "etcd" or "none"'),
        (BASE + "arbiter = 1\n", "nodes.two.arbiter: unknown key, remove it (known here: address, port, backing, state_dir, "
         "control, controller, heartbeats, keys, console)"),
        ("arbiter = 1\n" + BASE, "arbiter: is a whole number, must be a table"),
        (
            BASE + '[arbiter]\nkind = "etcd"\n',
            'arbiter.endpoints: missing, list them, as in endpoints = ["https://10.0.0.9:2379"]',
        ),
        (BASE + '[arbiter]\nkind = "etcd"\nendpoints = []\n', 'arbiter.endpoints: must be a list of strings, as in ["..."]'),
        (
            BASE + '[arbiter]\nkind = "etcd"\nendpoints = ["10.0.0.9:2379"]\n',
            'arbiter.endpoints: "10.0.0.9:2379" is not one, write it as https://HOST:PORT',
        ),
        (
            BASE + '[arbiter]\nkind = "etcd"\nendpoints = ["https://h:1", "https://h:2/v3"]\n',
            'arbiter.endpoints: "https://h:2/v3" is not one, write it as https://HOST:PORT',
        ),
        (
            BASE + '[arbiter]\nkind = "etcd"\nendpoints = ["https://user:password@h:1"]\n',
            'arbiter.endpoints: "https://user:password@h:1" is not one, write it as https://HOST:PORT',
        ),
        (ETCD + 'ca = "ca.pem"\n', 'arbiter.ca: "ca.pem" is not an absolute path, begin it with /'),
        (ETCD + 'certificate = "/c"\n', "arbiter.key: missing, a client certificate needs both"),
        (ETCD + 'key = "/k"\n', "arbiter.certificate: missing, a client certificate needs both"),
        (ETCD + 'user = "u"\n', "arbiter.password_file: missing, a login needs both"),
        (ETCD + 'password_file = "/p"\n', "arbiter.user: missing, a login needs both"),
        (
            ETCD + 'prefix = "mirrorfs"\n',
            'arbiter.prefix: "mirrorfs" is not one, begin it with / and use printable ASCII',
        ),
        (ETCD + 'timeout = "0s"\n', 'arbiter.timeout: "0s" is no time at all, make it longer than 0'),
        (ETCD + "allow_unarbitrated = true\n", 'arbiter.allow_unarbitrated: means something with kind = "none" only'),
        (ETCD + 'isolation_check = "10.0.0.254"\n', 'arbiter.isolation_check: means something with kind = "none" only'),
        (ETCD + 'endpoint = "x"\n', "arbiter.endpoint: unknown key, did you mean endpoints?"),
        (NONE + 'endpoints = ["https://h:1"]\n', 'arbiter.endpoints: means something with kind = "etcd" only'),
        (NONE + 'ca = "/c"\n', 'arbiter.ca: means something with kind = "etcd" only'),
        (NONE + 'certificate = "/c"\n', 'arbiter.certificate: means something with kind = "etcd" only'),
        (NONE + 'key = "/c"\n', 'arbiter.key: means something with kind = "etcd" only'),
        (NONE + 'user = "u"\n', 'arbiter.user: means something with kind = "etcd" only'),
        (NONE + 'password_file = "/p"\n', 'arbiter.password_file: means something with kind = "etcd" only'),
        (
            NONE + 'isolation_check = "gateway"\n',
            'arbiter.isolation_check: "gateway" is not an IP address, give that of a gateway',
        ),
        (NONE + "allow_unarbitrated = 1\n", "arbiter.allow_unarbitrated: is a whole number, must be a boolean"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_arbiter_is_one_line(file: Path, text: str, expected: str) -> None:
    assert refusal(file, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            BASE + '[[vip]]\naddress = "10.77.0.100/24"\ninterface = "eth0"\n',
            "vip[1]: is there but [failover] is missing, add it: the controller needs it",
        ),
        (
            BASE + '[[service]]\nname = "db"\nunit = "db"\n',
            "service[1]: is there but [failover] is missing, add it: the controller needs it",
        ),
        (FAILOVER + 'key_file = "key"\n', 'failover.key_file: "key" is not an absolute path, begin it with /'),
        (
            FAILOVER + 'detection_timeout = "400ms"\n',
            "failover.detection_timeout: is too short for any network, make it 500ms or longer",
        ),
        (FAILOVER + "detection_timeout = 3\n", "failover.detection_timeout: is a whole number, must be a string with a unit, "
         'as in "2s"'),
        (FAILOVER + "port = 0\n", "failover.port: 0 is out of bounds, use 1 to 65535"),
        (FAILOVER + "port = 65536\n", "failover.port: 65536 is out of bounds, use 1 to 65535"),
        (FAILOVER + 'port = "7789"\n', "failover.port: is a string, must be a whole number"),
        (
            FAILOVER + 'failback = "auto"\n',
            'failover.failback: "auto" is not known here, use "manual" or "preferred"',
        ),
        (
            FAILOVER + 'failback = "preferred"\npreferred = "three"\n',
            'failover.preferred: there is no node "three", use one of: one, two',
        ),
        (
            FAILOVER + 'failback = "preferred"\n',
            'failover.preferred: missing, failback = "preferred" and preferred = "NODE" go together',
        ),
        (
            FAILOVER + 'preferred = "one"\n',
            'failover.failback: missing, failback = "preferred" and preferred = "NODE" go together',
        ),
        (FAILOVER + 'failback_after = "30"\n', 'failover.failback_after: "30" has no unit, write it as in "30s" '
         '(ms, s, min, h, d)'),
        (FAILOVER + "max_failovers = 0\n", "failover.max_failovers: 0 is out of bounds, use 1 to 1000"),
        (
            FAILOVER + 'failover_window = "25h"\n',
            'failover.failover_window: "25h" is too long, make it 24h or less',
        ),
        (FAILOVER + "vip_up = true\n", "failover.vip_up: is a boolean, must be a string"),
        (FAILOVER + 'fallback = "manual"\n', "failover.fallback: unknown key, did you mean failback?"),
        (
            'volume = "v"\nnode = "one"\n[nodes.one]\naddress = "10.0.0.1"\n[failover]\n',
            'nodes: [failover] is there but the peer of "one" is missing, add [nodes.NAME] with its address, '
            "or remove [failover] to run alone",
        ),
        (
            BASE + 'heartbeats = ["10.0.0.2", "10.1.0.2"]\n',
            'nodes.two: "one" has another number of heartbeats, list one address for each network',
        ),
        (
            BASE + 'heartbeats = ["10.0.0.2", "10.0.0.2"]\n',
            'nodes.two.heartbeats: "10.0.0.2" is there twice, list one address for each network',
        ),
        (
            BASE + f"heartbeats = {[f'10.0.{number}.2' for number in range(17)]}\n",
            "nodes.two.heartbeats: 17 networks are too many, use 16 or fewer",
        ),
        (BASE + 'heartbeats = "10.0.0.2"\n', "nodes.two.heartbeats: is a string, must be a list"),
        (
            BASE + 'heartbeats = ["10.0.2"]\n',
            'nodes.two.heartbeats: "10.0.2" is neither an IP address nor a host name, write one of these (the port has a key '
            "of its own)",
        ),
        (
            BASE + f'controller = "/{"x" * 107}"\n',
            "nodes.two.controller: 108 bytes are too long for a socket's path, use 107 or fewer",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_controller_is_one_line(file: Path, text: str, expected: str) -> None:
    assert refusal(file, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('vip = "10.77.0.100"\n' + FAILOVER, "vip: is a string, must be a list"),
        ('vip = ["10.77.0.100"]\n' + FAILOVER, "vip: is not an array of tables, begin each of them with [[vip]]"),
        (
            FAILOVER + '[[vip]]\ninterface = "eth0"\n',
            'vip[1].address: missing, give it with its prefix length, as in "10.77.0.100/24"',
        ),
        (
            FAILOVER + '[[vip]]\naddress = "10.77.0.100/24"\n',
            'vip[1].interface: missing, name the one that the address is put on, as in "eth0"',
        ),
        (
            VIP.replace("/24", ""),
            'vip[1].address: "10.77.0.100" is not an address with a prefix length, as in "10.77.0.100/24"',
        ),
        (
            VIP.replace("/24", "/33"),
            'vip[1].address: "10.77.0.100/33" is not an address with a prefix length, as in "10.77.0.100/24"',
        ),
        (
            VIP.replace("10.77.0.100", "one.example"),
            'vip[1].address: "one.example/24" is not an address with a prefix length, as in "10.77.0.100/24"',
        ),
        (VIP.replace("10.77.0.100", "127.0.0.2"), 'vip[1].address: "127.0.0.2/24" is not the address of one machine'),
        (VIP.replace("10.77.0.100", "224.0.0.1"), 'vip[1].address: "224.0.0.1/24" is not the address of one machine'),
        (VIP.replace("10.77.0.100", "::"), 'vip[1].address: "::/24" is not the address of one machine'),
        (VIP.replace("eth0", "e" * 16), f'vip[1].interface: "{"e" * 16}" is no name of an interface'),
        (VIP.replace("eth0", "eth/0"), 'vip[1].interface: "eth/0" is no name of an interface'),
        (VIP.replace("eth0", "eth 0"), 'vip[1].interface: "eth 0" is no name of an interface'),
        (VIP + 'adress = "x"\n', "vip[1].adress: unknown key, did you mean address?"),
        (
            VIP + '[[vip]]\naddress = "10.77.0.100/16"\ninterface = "eth1"\n',
            'vip[2].address: "10.77.0.100" is there twice',
        ),
        (
            VIP.replace("10.77.0.100", "10.0.0.2"),
            'vip[1].address: 10.0.0.2 is an address of "two", use one that no machine has',
        ),
    ],
)
def test_what_is_wrong_with_an_address_is_one_line(file: Path, text: str, expected: str) -> None:
    assert refusal(file, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            FAILOVER + '[[service]]\nunit = "db"\n',
            "service[1].name: missing or not a name, use 1 to 63 of A-Z a-z 0-9 . _ @ -",
        ),
        (
            SERVICE.replace('"db"', '"../db"'),
            "service[1].name: missing or not a name, use 1 to 63 of A-Z a-z 0-9 . _ @ -",
        ),
        (
            SERVICE.replace('"db"', f'"{"d" * 64}"'),
            "service[1].name: missing or not a name, use 1 to 63 of A-Z a-z 0-9 . _ @ -",
        ),
        (
            FAILOVER + '[[service]]\nname = "db"\n',
            "service[1].start: give either a systemd unit or a command, one of them",
        ),
        (SERVICE + 'start = "x"\n', "service[1].start: give either a systemd unit or a command, one of them"),
        (SERVICE + 'stop = "x"\n', "service[1].stop: a systemd unit knows how to stop"),
        (SERVICE + "restarts = -1\n", "service[1].restarts: -1 is out of bounds, use 0 to 1000"),
        (SERVICE + 'start_timeout = "0s"\n', 'service[1].start_timeout: "0s" is no time at all, make it longer than 0'),
        (SERVICE + 'stop_timeout = "2d"\n', 'service[1].stop_timeout: "2d" is too long, make it 24h or less'),
        (SERVICE + 'restart_windw = "1h"\n', "service[1].restart_windw: unknown key, did you mean restart_window?"),
        (
            SERVICE + '[[service]]\nname = "web"\nunit = "web"\n[[service]]\nname = "db"\nunit = "b"\n',
            'service[3].name: "db" is there twice',
        ),
        (SERVICE + "check = 1\n", "service[1].check: is a whole number, must be a list"),
        (CHECK, "service[1].check[1]: give one of process, tcp, http, command, mount"),
        (CHECK + 'tcp = ""\n', "service[1].check[1]: give one of process, tcp, http, command, mount"),
        (CHECK + 'tcp = "h:1"\nmount = "/m"\n', "service[1].check[1]: give one of process, tcp, http, command, mount"),
        (
            CHECK + 'mount = "/m"\n[[service.check]]\ntcp = "5432"\n',
            'service[1].check[2].tcp: "5432" is not HOST:PORT, as in "127.0.0.1:5432" or "[::1]:5432"',
        ),
        (
            CHECK + 'tcp = "::1:5432"\n',
            'service[1].check[1].tcp: "::1:5432" is not HOST:PORT, as in "127.0.0.1:5432" or "[::1]:5432"',
        ),
        (
            CHECK + 'tcp = "h:65536"\n',
            'service[1].check[1].tcp: "h:65536" is not HOST:PORT, as in "127.0.0.1:5432" or "[::1]:5432"',
        ),
        (
            CHECK + 'tcp = "h:0"\n',
            'service[1].check[1].tcp: "h:0" is not HOST:PORT, as in "127.0.0.1:5432" or "[::1]:5432"',
        ),
        (
            CHECK + 'http = "localhost"\n',
            'service[1].check[1].http: "localhost" is not a URL that begins with http:// or https://',
        ),
        (CHECK + 'process = "db.pid"\n', 'service[1].check[1].process: "db.pid" is not an absolute path'),
        (CHECK + 'mount = "m"\n', 'service[1].check[1].mount: "m" is not an absolute path'),
        (CHECK + 'mount = "/m"\nfailures = 0\n', "service[1].check[1].failures: 0 is out of bounds, use 1 to 1000"),
        (CHECK + 'mount = "/m"\nintervall = "1s"\n', "service[1].check[1].intervall: unknown key, did you mean interval?"),
        (CHECK + "tcp = 5432\n", "service[1].check[1].tcp: is a whole number, must be a string"),
    ],
)
def test_what_is_wrong_with_a_service_is_one_line(file: Path, text: str, expected: str) -> None:
    assert refusal(file, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ETCD + 'timeout = "2min"\n', 'arbiter.timeout: "2min" is too long, make it 1min or less'),
        (
            FAILOVER + 'detection_timeout = "10min"\n',
            'failover.detection_timeout: "10min" is too long, make it 5min or less',
        ),
    ],
)
def test_how_long_a_duration_may_be_is_told_in_words(file: Path, text: str, expected: str) -> None:
    assert refusal(file, text) == expected


# ---- what has to be the same on both nodes


def test_two_files_are_compared_key_by_key(file: Path) -> None:
    shared = loaded(file, CHECK + 'tcp = "h:1"\n[[service]]\nname = "web"\nstart = "s"\n').shared
    assert shared["service[1].check[1].tcp"] == '"h:1"'
    assert shared["service[2].name"] == '"web"'
    assert shared["nodes.two.address"] == '"10.0.0.2"'
    assert shared["volume"] == '"v"'
    assert loaded(file, ETCD).shared["arbiter.endpoints"] == "['https://10.0.0.9:2379']"


def test_what_each_machine_may_have_in_its_own_way_is_not_compared(file: Path) -> None:
    own = 'backing = "/b"\nstate_dir = "/s"\ncontrol = "/c"\ncontroller = "/d"\n'
    text = BASE + own + '[failover]\nkey_file = "/k"\nport = 1\n'
    assert set(loaded(file, 'backing = "/a"\n' + text).shared) == {
        "volume",
        "nodes.one.address",
        "nodes.two.address",
        "failover.port",
    }


_VALUES = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=8,
)
_FILES = st.dictionaries(st.text("abc", min_size=1, max_size=3), _VALUES, max_size=4)


@given(content=_FILES)
def test_a_key_is_one_line_whatever_its_value(content: dict[str, object]) -> None:
    for key, text in flatten(content).items():
        assert key
        assert "\n" not in text
