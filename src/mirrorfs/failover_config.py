"""The parts of the configuration that are about failing over: [arbiter], [failover], [[vip]], [[service]]."""

import ipaddress
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from mirrorfs.toml_table import Table, shown

DEFAULT_PORT: Final = 7789
CONSOLE_PORT: Final = 7790

CheckKind = Literal["process", "tcp", "http", "command", "mount"]

_SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_PREFIX = re.compile(r"/[!-~]{0,200}")
_INTERFACE_BYTES = 15


@dataclass(frozen=True, slots=True)
class ArbiterConfig:
    """Who decides when the two nodes cannot see each other.

    `etcd`: a key in the cluster of `endpoints`. `none`: nobody, and then automatic failover is allowed only with
    `allow_unarbitrated`, and if `isolation_check` (an IP address) is given only while that answers a ping.
    """

    kind: Literal["etcd", "none"] = "none"
    endpoints: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None
    prefix: str = "/mirrorfs"
    timeout_s: float = 2.0
    allow_unarbitrated: bool = False
    isolation_check: str = ""


@dataclass(frozen=True, slots=True)
class VipConfig:
    """One address that moves with the service, with its prefix length, and the interface that it is put on."""

    address: ipaddress.IPv4Interface | ipaddress.IPv6Interface
    interface: str


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """One look at a service. `target` is what `kind` needs: a file with a pid, HOST:PORT, a URL, a command, a path.

    It is not well after `failures` looks in a row that failed or took longer than `timeout_s`.
    """

    kind: CheckKind
    target: str
    interval_s: float = 2.0
    timeout_s: float = 5.0
    failures: int = 2


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """One service: a systemd `unit`, or commands (run by `sh -c`). A service without `stop` has nothing to stop.

    `prepare` is a command that makes a machine ready for it, once, before its node is started the first time: the controller
    never runs it. The service is restarted where it is `restarts` times in `restart_window_s`; after that the other node is
    to have it.
    """

    name: str
    unit: str = ""
    start: str = ""
    stop: str = ""
    prepare: str = ""
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 30.0
    checks: tuple[CheckConfig, ...] = ()
    restarts: int = 3
    restart_window_s: float = 600.0


@dataclass(frozen=True, slots=True)
class FailoverConfig:
    """How the controller works; services are started in their order and stopped in the reverse one."""

    key_file: Path | None = None
    detection_timeout_s: float = 3.0
    port: int = DEFAULT_PORT
    failback: Literal["manual", "preferred"] = "manual"
    preferred: str = ""
    failback_after_s: float = 30.0
    max_failovers: int = 3
    failover_window_s: float = 3600.0
    vip_up: str = ""
    vip_down: str = ""
    vips: tuple[VipConfig, ...] = field(default=())
    services: tuple[ServiceConfig, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ConsoleConfig:
    """The web page of the controller. Without `certificate` and `key` (PEM files) the node makes its own."""

    enabled: bool = True
    port: int = CONSOLE_PORT
    certificate: Path | None = None
    key: Path | None = None


def read_console(table: Table | None) -> ConsoleConfig:
    """[console]; without one there is a console, which only this machine reaches."""
    if table is None:
        return ConsoleConfig()
    enabled = table.take("enabled", bool)
    console = ConsoleConfig(
        enabled=True if enabled is None else enabled,
        port=table.take_count("port", CONSOLE_PORT, 1, 65535),
        certificate=table.take_path("certificate"),
        key=table.take_path("key"),
    )
    table.reject_rest()
    if (console.certificate is None) != (console.key is None):
        raise table.error("key" if console.key is None else "certificate", "missing, give both or none")
    return console


def read_arbiter(table: Table | None) -> ArbiterConfig:
    """[arbiter]; without one there is none."""
    if table is None:
        return ArbiterConfig()
    default = ArbiterConfig()
    kind = table.take_choice("kind", ("etcd", "none"), "")
    if not kind:
        raise table.error("kind", 'missing, use "etcd", or "none" for an operator who decides')
    endpoints = tuple(table.take_texts("endpoints"))
    arbiter = ArbiterConfig(
        kind="etcd" if kind == "etcd" else "none",
        endpoints=endpoints,
        ca=table.take_path("ca"),
        certificate=table.take_path("certificate"),
        key=table.take_path("key"),
        user=table.take("user", str) or "",
        password_file=table.take_path("password_file"),
        prefix=table.take("prefix", str) or default.prefix,
        timeout_s=table.take_duration_s("timeout", default.timeout_s, 60.0),
        allow_unarbitrated=table.take("allow_unarbitrated", bool) or False,
        isolation_check=table.take("isolation_check", str) or "",
    )
    table.reject_rest()
    _check_arbiter(table, arbiter)
    return arbiter


def _check_arbiter(table: Table, arbiter: ArbiterConfig) -> None:
    only_etcd = ("endpoints", "ca", "certificate", "key", "user", "password_file")
    if arbiter.kind == "none":
        for name in only_etcd:
            if getattr(arbiter, name):
                raise table.error(name, 'means something with kind = "etcd" only')
        if arbiter.isolation_check and _literal(arbiter.isolation_check) is None:
            raise table.error(
                "isolation_check", f"{shown(arbiter.isolation_check)} is not an IP address, give that of a gateway"
            )
        return
    if arbiter.allow_unarbitrated or arbiter.isolation_check:
        name = "allow_unarbitrated" if arbiter.allow_unarbitrated else "isolation_check"
        raise table.error(name, 'means something with kind = "none" only')
    if not arbiter.endpoints:
        raise table.error("endpoints", 'missing, list them, as in endpoints = ["https://10.0.0.9:2379"]')
    for endpoint in arbiter.endpoints:
        if not re.fullmatch(r"https?://[^/\s@]+", endpoint):
            raise table.error("endpoints", f"{shown(endpoint)} is not one, write it as https://HOST:PORT")
    if (arbiter.certificate is None) != (arbiter.key is None):
        raise table.error("key" if arbiter.key is None else "certificate", "missing, a client certificate needs both")
    if bool(arbiter.user) != (arbiter.password_file is not None):
        raise table.error("user" if not arbiter.user else "password_file", "missing, a login needs both")
    if not _PREFIX.fullmatch(arbiter.prefix):
        raise table.error("prefix", f"{shown(arbiter.prefix)} is not one, begin it with / and use printable ASCII")


def read_failover(
    table: Table | None, vips: list[Table], services: list[Table], *, volume: str, nodes: Mapping[str, Collection[str]]
) -> FailoverConfig | None:
    """[failover] with all [[vip]] and [[service]]; None if the first is missing, and then none of the others may be there.

    `nodes` are the addresses of each node.
    """
    if table is None:
        for part in (*vips, *services):
            raise part.error("", "is there but [failover] is missing, add it: the controller needs it", whole=True)
        return None
    default = FailoverConfig()
    failback = table.take_choice("failback", ("manual", "preferred"), default.failback)
    failover = FailoverConfig(
        key_file=table.take_path("key_file"),
        detection_timeout_s=table.take_duration_s("detection_timeout", default.detection_timeout_s, 300.0),
        port=table.take_count("port", default.port, 1, 65535),
        failback="preferred" if failback == "preferred" else "manual",
        preferred=table.take("preferred", str) or "",
        failback_after_s=table.take_duration_s("failback_after", default.failback_after_s),
        max_failovers=table.take_count("max_failovers", default.max_failovers, 1, 1000),
        failover_window_s=table.take_duration_s("failover_window", default.failover_window_s),
        vip_up=table.take("vip_up", str) or "",
        vip_down=table.take("vip_down", str) or "",
        vips=tuple(_read_vip(part) for part in vips),
        services=tuple(_read_service(part) for part in services),
    )
    table.reject_rest()
    if failover.detection_timeout_s < 0.5:
        raise table.error("detection_timeout", "is too short for any network, make it 500ms or longer")
    if failover.preferred and failover.preferred not in nodes:
        raise table.error("preferred", f"there is no node {shown(failover.preferred)}, use one of: {', '.join(nodes)}")
    if (failover.failback == "preferred") != bool(failover.preferred):
        missing = "preferred" if failover.failback == "preferred" else "failback"
        raise table.error(missing, 'missing, failback = "preferred" and preferred = "NODE" go together')
    _check_twins(vips, [str(vip.address.ip) for vip in failover.vips], "address")
    for part, vip in zip(vips, failover.vips, strict=True):
        for name, addresses in nodes.items():
            if vip.address.ip in map(_literal, addresses):
                raise part.error("address", f"{vip.address.ip} is an address of {shown(name)}, use one that no machine has")
    _check_twins(services, [service.name for service in failover.services], "name")
    return failover


def _check_twins(parts: list[Table], values: list[str], key: str) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise parts[place].error(key, f"{shown(value)} is there twice")


def _read_vip(part: Table) -> VipConfig:
    address, interface = part.take("address", str), part.take("interface", str)
    part.reject_rest()
    if address is None:
        raise part.error("address", 'missing, give it with its prefix length, as in "10.77.0.100/24"')
    if not interface:
        raise part.error("interface", 'missing, name the one that the address is put on, as in "eth0"')
    if len(interface.encode()) > _INTERFACE_BYTES or re.search(r"[/\s]", interface):
        raise part.error("interface", f"{shown(interface)} is no name of an interface")
    try:
        if "/" not in address:
            raise ValueError
        found = ipaddress.ip_interface(address)
    except ValueError:
        raise part.error(
            "address", f'{shown(address)} is not an address with a prefix length, as in "10.77.0.100/24"'
        ) from None
    if found.ip.is_unspecified or found.ip.is_multicast or found.ip.is_loopback:
        raise part.error("address", f"{shown(address)} is not the address of one machine")
    return VipConfig(found, interface)


def _read_service(part: Table) -> ServiceConfig:
    default = ServiceConfig("")
    name = part.take("name", str) or ""
    if not _SERVICE.fullmatch(name):
        raise part.error("name", "missing or not a name, use 1 to 63 of A-Z a-z 0-9 . _ @ -")
    checks = tuple(_read_check(check) for check in part.take_tables("check"))
    service = ServiceConfig(
        name=name,
        unit=part.take("unit", str) or "",
        start=part.take("start", str) or "",
        stop=part.take("stop", str) or "",
        prepare=part.take("prepare", str) or "",
        start_timeout_s=part.take_duration_s("start_timeout", default.start_timeout_s),
        stop_timeout_s=part.take_duration_s("stop_timeout", default.stop_timeout_s),
        checks=checks,
        restarts=part.take_count("restarts", default.restarts, 0, 1000),
        restart_window_s=part.take_duration_s("restart_window", default.restart_window_s),
    )
    part.reject_rest()
    if bool(service.unit) == bool(service.start):
        raise part.error("start", "give either a systemd unit or a command, one of them")
    if service.unit and service.stop:
        raise part.error("stop", "a systemd unit knows how to stop")
    return service


def _read_check(part: Table) -> CheckConfig:
    default = CheckConfig("mount", "")
    found: list[tuple[Any, str]] = []
    for kind in get_args(CheckKind):
        target = part.take(kind, str)
        if target is not None:
            found.append((kind, target))
    if len(found) != 1 or not found[0][1]:
        raise part.error("", f"give one of {', '.join(get_args(CheckKind))}", whole=True)
    kind, target = found[0]
    check = CheckConfig(
        kind=kind,
        target=target,
        interval_s=part.take_duration_s("interval", default.interval_s),
        timeout_s=part.take_duration_s("timeout", default.timeout_s),
        failures=part.take_count("failures", default.failures, 1, 1000),
    )
    part.reject_rest()
    if problem := _target_problem(kind, target):
        raise part.error(kind, f"{shown(target)} {problem}")
    return check


def _target_problem(kind: str, target: str) -> str:
    if kind == "tcp" and not (
        re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):[0-9]{1,5}", target) and 1 <= int(target.rpartition(":")[2]) <= 65535
    ):
        return 'is not HOST:PORT, as in "127.0.0.1:5432" or "[::1]:5432"'
    if kind == "http" and not re.fullmatch(r"https?://\S+", target):
        return "is not a URL that begins with http:// or https://"
    if kind in ("process", "mount") and not target.startswith("/"):
        return "is not an absolute path"
    return ""


def _literal(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """A TOML value as one line of text for each key in it, so that two files can be compared key by key."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flatten(part, f"{key}.{name}" if key else name).items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for place, part in enumerate(value, 1) for k, v in flatten(part, f"{key}[{place}]").items()}
    return {key: shown(value) if isinstance(value, str) else str(value)}
