"""The configuration: one TOML file, the same on both nodes; each node finds its own part by name.

Whatever is wrong with it is a ConfigError of one line: the file, the key, what is wrong, what to do.
"""

import ipaddress
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from mirrorfs import failover_config
from mirrorfs.core.beats import MAX_NETWORKS
from mirrorfs.errors import ConfigError
from mirrorfs.failover_config import ArbiterConfig, ConsoleConfig, FailoverConfig
from mirrorfs.toml_table import Table, key_in_words, read, shown

DIRECTORY = Path("/etc/mirrorfs")
DEFAULT_PORT = 7788

_VOLUME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # dots, so that a full host name can be one; safe in file names
_HOST_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_SOCKET_PATH_BYTES = 107  # sockaddr_un holds 108 with the final zero


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node's part. Paths are absolute; `backing` is None for a volume that lies in place, under its mount point.

    `control` is the socket of its mount, `controller` that of its controller, `heartbeats` are its addresses on all the
    networks over which the two controllers hear each other, `keys` is the directory of what makes its link authentic, and
    `console` the address on which its web page is served.
    """

    name: str
    address: str
    port: int
    backing: Path | None
    state_dir: Path
    control: Path
    controller: Path
    heartbeats: tuple[str, ...]
    keys: Path
    console: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ReplicationConfig:
    """What happens when the peer is lost, and after how many seconds of what."""

    on_peer_loss: Literal["continue", "freeze"] = "continue"
    ack_timeout_s: float = 2.0
    freeze_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    checkpoint_interval_s: float = 10.0


@dataclass(frozen=True, slots=True)
class ResyncConfig:
    """How fast a returning node is brought up to date, and whether the application or the resync goes first."""

    rate_limit_bytes_per_s: float = math.inf
    priority: Literal["application", "resync"] = "application"


@dataclass(frozen=True, slots=True)
class VerifyConfig:
    """How fast both trees are compared, on each node, and how often by itself; None is never."""

    rate_bytes_per_s: float = 50 * 2.0**20
    every_s: float | None = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Config:
    """The file as this node reads it. Without a peer the node runs alone."""

    file: Path
    volume: str
    node: NodeConfig
    peer: NodeConfig | None
    replication: ReplicationConfig
    resync: ResyncConfig = ResyncConfig()
    verify: VerifyConfig = VerifyConfig()
    arbiter: ArbiterConfig = field(default_factory=ArbiterConfig)
    failover: FailoverConfig | None = None
    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    session: Literal["kernel", "pyfuse3"] = "kernel"
    #: Where the volume is mounted if the command does not say; None: it has to.
    mount: Path | None = None
    #: Whether what the nodes say can be read by nobody else; that it is authentic is so in any case.
    encrypted: bool = True
    #: What has to be the same on both nodes, as one text for each key.
    shared: Mapping[str, str] = field(default_factory=dict, compare=False)


def default_keys(volume: str, node: str) -> Path:
    """Where the keys of a node are if its file says nothing else."""
    return DIRECTORY / "keys" / volume / node


def find(explicit: Path | None, directory: Path = DIRECTORY) -> Path:
    """The file to read: the one given, else $MIRRORFS_CONFIG, else the only *.toml in `directory`.

    Raises ConfigError if there is none to choose, or more than one.
    """
    file = find_if_any(explicit, directory)
    if file is None:
        raise ConfigError(
            f"{directory}: no configuration here (*.toml), make one with `mirrorfs init` (or `join`) or give --config FILE"
        )
    return file


def find_if_any(explicit: Path | None, directory: Path = DIRECTORY) -> Path | None:
    """As `find`, but None if there is no file at all; several to choose from are still a ConfigError."""
    if explicit is not None:
        return explicit
    if from_environment := os.environ.get("MIRRORFS_CONFIG"):
        return Path(from_environment)
    files = sorted(file for file in directory.glob("*.toml") if not file.name.startswith("."))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"{directory}: several configurations ({names}), choose one with --config FILE")
    return files[0] if files else None


def load(file: Path, node: str | None = None) -> Config:
    """Read `file` as the node named `node`, else $MIRRORFS_NODE, else `node` of the file, else the host name.

    Raises ConfigError.
    """
    content = read(file)
    top = Table(file, (), content)
    volume = top.take("volume", str)
    if volume is None:
        raise top.error("volume", 'missing, name the volume, as in volume = "data"')
    if not _VOLUME.fullmatch(volume):
        raise top.error("volume", f"{shown(volume)} is not a name, use 1 to 32 of A-Z a-z 0-9 _ -")
    named_in_file = top.take("node", str)
    mount = top.take_path("mount")
    backing = top.take_path("backing")
    session = _read_session(top)
    parts = top.take_table("nodes")
    replication, resync, verify, security, arbiter, failover, console = (
        top.take_table(name) for name in ("replication", "resync", "verify", "security", "arbiter", "failover", "console")
    )
    vips, services = top.take_tables("vip"), top.take_tables("service")
    top.reject_rest()

    nodes = _read_nodes(top, parts, volume, backing)
    own = _own_name(top, tuple(nodes), node, named_in_file)
    peer = next((part for name, part in nodes.items() if name != own), None)
    for name, table in (
        ("replication", replication),
        ("resync", resync),
        ("verify", verify),
        ("security", security),
        ("arbiter", arbiter),
        ("failover", failover),
        ("console", console),
    ):
        if peer is None and table is not None:
            raise top.error(
                "nodes",
                f"[{name}] is there but the peer of {shown(own)} is missing, add [nodes.NAME] with its address, "
                f"or remove [{name}] to run alone",
            )
    addresses = {name: (part.address, *part.heartbeats) for name, part in nodes.items()}
    return Config(
        file=file.absolute(),
        volume=volume,
        session=session,
        mount=mount,
        node=nodes[own],
        peer=peer,
        replication=ReplicationConfig() if replication is None else _read_replication(replication),
        resync=ResyncConfig() if resync is None else _read_resync(resync),
        verify=VerifyConfig() if verify is None else _read_verify(verify),
        encrypted=True if security is None else _read_encrypted(security),
        arbiter=failover_config.read_arbiter(arbiter),
        failover=failover_config.read_failover(failover, vips, services, volume=volume, nodes=addresses),
        console=failover_config.read_console(console),
        shared=_shared(content),
    )


def _read_session(top: Table) -> Literal["kernel", "pyfuse3"]:
    """Who speaks to the kernel; the environment goes before the file."""
    named = top.take("session", str)
    kind = os.environ.get("MIRRORFS_SESSION") or named or "kernel"
    if kind not in ("kernel", "pyfuse3"):
        where = "is not a session" if named == kind else "in $MIRRORFS_SESSION is not a session"
        raise top.error("session", f'{shown(kind)} {where}, use "kernel" or "pyfuse3"')
    return cast(Literal["kernel", "pyfuse3"], kind)


def _shared(content: dict[str, Any]) -> dict[str, str]:
    """The file less what each machine may have in its own way: who it is, and where its files and sockets are."""
    own = re.compile(
        r"node|mount|backing|session|(nodes\..*\.)?(backing|state_dir|control|controller|keys|console)|console\..*|failover\.key_file"
    )
    return {key: text for key, text in failover_config.flatten(content).items() if not own.fullmatch(key)}


def with_backing(config: Config, backing: Path) -> Config:
    """The same configuration with this node's files underneath at `backing`. Raises ConfigError as `load` does."""
    backing = backing.absolute()
    node = replace(config.node, backing=backing)
    _check_state_dir(Table(config.file, ("nodes", node.name), {}), node)
    return replace(config, node=node)


def _read_nodes(top: Table, parts: Table | None, volume: str, backing: Path | None) -> dict[str, NodeConfig]:
    names = [] if parts is None else parts.take_rest()
    if parts is None or not names:
        raise top.error("nodes", "missing, add a part [nodes.NAME] with an address for each of the two nodes")
    if len(names) > 2:
        listed = ", ".join(key_in_words(name) for name in names)
        raise top.error("nodes", f"{len(names)} nodes ({listed}) but a volume has two at most, remove the others")
    nodes = {name: _read_node(parts, name, volume, backing) for name in names}
    if len({(_same_address(node.address), node.port) for node in nodes.values()}) < len(nodes):
        first, second = nodes.values()
        raise parts.error(
            second.name,
            f"has the address and port of {shown(first.name)} ({second.address}, port {second.port}), give each node its own",
        )
    if len({len(node.heartbeats) for node in nodes.values()}) > 1:
        raise parts.error(names[1], f"{shown(names[0])} has another number of heartbeats, list one address for each network")
    return nodes


def _read_node(parts: Table, name: str, volume: str, backing: Path | None) -> NodeConfig:
    if not _NODE.fullmatch(name):
        raise parts.error(name, "is not a name, use 1 to 63 of A-Z a-z 0-9 . _ - beginning with a letter or digit")
    part = parts.take_table(name)
    assert part is not None
    address = part.take("address", str)
    port = part.take("port", int)
    node = NodeConfig(
        name=name,
        address="" if address is None else address,
        port=DEFAULT_PORT if port is None else port,
        backing=part.take_path("backing") or backing,
        state_dir=part.take_path("state_dir") or Path("/var/lib/mirrorfs") / volume / name,
        control=part.take_path("control") or Path("/run/mirrorfs") / f"{volume}-{name}.sock",
        controller=part.take_path("controller") or Path("/run/mirrorfs") / f"{volume}-{name}-controller.sock",
        heartbeats=tuple(part.take_texts("heartbeats")) or (() if address is None else (address,)),
        keys=part.take_path("keys") or default_keys(volume, name),
        console=_console_address(part),
    )
    part.reject_rest()
    if address is None:
        raise part.error("address", 'missing, give the address that this node listens on, as in address = "10.77.0.1"')
    if problem := _address_problem(address):
        raise part.error("address", f"{shown(address)} {problem}")
    if not 1 <= node.port <= 65535:
        raise part.error("port", f"{node.port} is not a port, use 1 to 65535")
    for heartbeat in node.heartbeats:
        if problem := _address_problem(heartbeat):
            raise part.error("heartbeats", f"{shown(heartbeat)} {problem}")
        if [_same_address(each) for each in node.heartbeats].count(_same_address(heartbeat)) > 1:
            raise part.error("heartbeats", f"{shown(heartbeat)} is there twice, list one address for each network")
    if len(node.heartbeats) > MAX_NETWORKS:
        raise part.error("heartbeats", f"{len(node.heartbeats)} networks are too many, use {MAX_NETWORKS} or fewer")
    for key, path in (("control", node.control), ("controller", node.controller)):
        if (length := len(os.fsencode(path))) > _SOCKET_PATH_BYTES:
            raise part.error(key, f"{length} bytes are too long for a socket's path, use {_SOCKET_PATH_BYTES} or fewer")
    _check_state_dir(part, node)
    return node


def _console_address(part: Table) -> str:
    text = part.take("console", str)
    if text is None:
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise part.error(
            "console", f'{shown(text)} is not an IP address, use one of this node\'s, or "0.0.0.0" for all'
        ) from None


def _check_state_dir(part: Table, node: NodeConfig) -> None:
    if node.backing is not None and node.state_dir.is_relative_to(node.backing):
        raise part.error(
            "state_dir", f"{shown(str(node.state_dir))} lies among the files it is about ({node.backing}), put it elsewhere"
        )


def _read_replication(table: Table) -> ReplicationConfig:
    default = ReplicationConfig()
    on_peer_loss = table.take_choice("on_peer_loss", ("continue", "freeze"), default.on_peer_loss)
    replication = ReplicationConfig(
        on_peer_loss="freeze" if on_peer_loss == "freeze" else "continue",
        ack_timeout_s=table.take_duration_s("ack_timeout", default.ack_timeout_s),
        freeze_timeout_s=table.take_duration_s("freeze_timeout", default.freeze_timeout_s),
        stall_timeout_s=table.take_duration_s("stall_timeout", default.stall_timeout_s),
        checkpoint_interval_s=table.take_duration_s("checkpoint_interval", default.checkpoint_interval_s),
    )
    table.reject_rest()
    return replication


def _read_resync(table: Table) -> ResyncConfig:
    priority = table.take_choice("priority", ("application", "resync"), ResyncConfig().priority)
    resync = ResyncConfig(
        rate_limit_bytes_per_s=table.take_rate("rate_limit"),
        priority="resync" if priority == "resync" else "application",
    )
    table.reject_rest()
    return resync


def _read_verify(table: Table) -> VerifyConfig:
    default = VerifyConfig()
    verify = VerifyConfig(
        rate_bytes_per_s=table.take_rate("rate", default.rate_bytes_per_s),
        every_s=table.take_schedule_s("every", default.every_s),
    )
    table.reject_rest()
    return verify


def _read_encrypted(table: Table) -> bool:
    encryption = table.take_choice("encryption", ("on", "off"), "on")
    table.reject_rest()
    return encryption == "on"


def _own_name(top: Table, names: Sequence[str], asked: str | None, named_in_file: str | None) -> str:
    listed = ", ".join(key_in_words(name) for name in names)
    from_environment = os.environ.get("MIRRORFS_NODE") or None
    for name, origin, key in (
        (asked, "--node", "nodes"),
        (from_environment, "$MIRRORFS_NODE", "nodes"),
        (named_in_file, "node", "node"),
    ):
        if name is None:
            continue
        if name not in names:
            raise top.error(key, f"there is no node {shown(name)} as {origin} says, use one of: {listed}")
        return name
    full = socket.gethostname()
    short = full.partition(".")[0]
    for name in (short, full):
        if name in names:
            return name
    raise top.error("nodes", f"none is named as this host, {shown(full)}, give --node NAME or set node to one of: {listed}")


def _address_problem(address: str) -> str | None:
    try:
        literal = ipaddress.ip_address(address)
    except ValueError:
        labels = address.removesuffix(".").split(".")
        if len(address) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit():
            return None
        return "is neither an IP address nor a host name, write one of these (the port has a key of its own)"
    if literal.is_unspecified or literal.is_multicast:
        return "is not the address of one machine, give the one that this node listens on"
    return None


def _same_address(address: str) -> str:
    """A form in which two spellings of one address are equal."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address.removesuffix(".").lower()
