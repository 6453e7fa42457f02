"""The configuration: one TOML file, the same on both nodes; each node finds its own part by name.

Whatever is wrong with it is a ConfigError of one line: the file, the key, what is wrong, what to do.
"""

import difflib
import ipaddress
import json
import math
import os
import re
import socket
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mirrorfs.errors import ConfigError

DIRECTORY = Path("/etc/mirrorfs")
DEFAULT_PORT = 7788

_T = TypeVar("_T")
_VOLUME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # dots, so that a full host name can be one; safe in file names
_HOST_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_DURATION_S = 24 * 3600.0
_LONGEST_SCHEDULE_S = 366 * 24 * 3600.0
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]*)")
_RATE_UNITS = {"KiB/s": 2.0**10, "MiB/s": 2.0**20, "GiB/s": 2.0**30}
_LOWEST_RATE = 2.0**10
_HIGHEST_RATE = 2.0**40
_SOCKET_PATH_BYTES = 107  # sockaddr_un holds 108 with the final zero
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TYPE_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "a whole number",
    float: "a decimal number",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node's part. Paths are absolute; `backing` is None for a volume that lies in place, under its mount point."""

    name: str
    address: str
    port: int
    backing: Path | None
    state_dir: Path
    control: Path


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


def find(explicit: Path | None, directory: Path = DIRECTORY) -> Path:
    """The file to read: the one given, else $MIRRORFS_CONFIG, else the only *.toml in `directory`.

    Raises ConfigError if there is none to choose, or more than one.
    """
    file = find_if_any(explicit, directory)
    if file is None:
        raise ConfigError(
            f"{directory}: no configuration here (*.toml), write one (examples/mirrorfs.toml is a sample to begin with) "
            "or give --config FILE"
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
    top = _Table(file, (), _read(file))
    volume = top.take("volume", str)
    if volume is None:
        raise top.error("volume", 'missing, name the volume, as in volume = "data"')
    if not _VOLUME.fullmatch(volume):
        raise top.error("volume", f"{_shown(volume)} is not a name, use 1 to 32 of A-Z a-z 0-9 _ -")
    named_in_file = top.take("node", str)
    backing = top.take_path("backing")
    parts = top.take_table("nodes")
    replication, resync, verify = (top.take_table(name) for name in ("replication", "resync", "verify"))
    top.reject_rest()

    nodes = _read_nodes(top, parts, volume, backing)
    own = _own_name(top, tuple(nodes), node, named_in_file)
    peer = next((part for name, part in nodes.items() if name != own), None)
    for name, table in (("replication", replication), ("resync", resync), ("verify", verify)):
        if peer is None and table is not None:
            raise top.error(
                "nodes",
                f"[{name}] is there but the peer of {_shown(own)} is missing, add [nodes.NAME] with its address, "
                f"or remove [{name}] to run alone",
            )
    return Config(
        file=file.absolute(),
        volume=volume,
        node=nodes[own],
        peer=peer,
        replication=ReplicationConfig() if replication is None else _read_replication(replication),
        resync=ResyncConfig() if resync is None else _read_resync(resync),
        verify=VerifyConfig() if verify is None else _read_verify(verify),
    )


def rate_bytes_per_s(text: str) -> float:
    """A rate such as "50MiB/s", infinite for "none"; ValueError, with what is wrong with it, if it is none."""
    if text == "none":
        return math.inf
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(
            f'{_shown(text)} is not a rate, write a number and a unit, as in "100MiB/s" (KiB/s, MiB/s, GiB/s), or "none"'
        )
    number, unit = match.groups()
    if not unit:
        raise ValueError(f'{_shown(text)} has no unit, write it as in "{number}MiB/s" (KiB/s, MiB/s, GiB/s)')
    if unit not in _RATE_UNITS:
        raise ValueError(f"{_shown(unit)} is not a unit, use KiB/s, MiB/s or GiB/s")
    rate = float(number) * _RATE_UNITS[unit]
    if rate < _LOWEST_RATE:
        raise ValueError(f"{_shown(text)} would never end, make it 1KiB/s or more")
    if rate > _HIGHEST_RATE:
        raise ValueError(f'{_shown(text)} limits nothing, make it 1024GiB/s or less, or "none"')
    return rate


def with_backing(config: Config, backing: Path) -> Config:
    """The same configuration with this node's files underneath at `backing`. Raises ConfigError as `load` does."""
    backing = backing.absolute()
    node = replace(config.node, backing=backing)
    _check_state_dir(_Table(config.file, ("nodes", node.name), {}), node)
    return replace(config, node=node)


class _Table:
    """One table of the file: keys are taken out of it; what is left at the end is unknown."""

    def __init__(self, file: Path, where: tuple[str, ...], entries: dict[str, Any]) -> None:
        self._file = file
        self._where = where
        self._rest = dict(entries)
        self._known: list[str] = []

    def error(self, key: str, problem: str) -> ConfigError:
        path = ".".join(_key(part) for part in (*self._where, key))
        return ConfigError(f"{self._file}: {path}: {problem}")

    def take(self, key: str, kind: type[_T], hint: str = "") -> _T | None:
        self._known.append(key)
        if key not in self._rest:
            return None
        value = self._rest.pop(key)
        if type(value) is not kind:  # not isinstance: a boolean is no whole number here
            raise self.error(key, f"is {_TYPE_NAMES.get(type(value), 'a date or time')}, must be {_TYPE_NAMES[kind]}{hint}")
        return value

    def take_table(self, key: str) -> "_Table | None":
        entries = self.take(key, dict)
        return None if entries is None else _Table(self._file, (*self._where, key), entries)

    def take_path(self, key: str) -> Path | None:
        value = self.take(key, str)
        if value is None:
            return None
        if not value.startswith("/") or "\0" in value:
            raise self.error(key, f"{_shown(value)} is not an absolute path, begin it with /")
        return Path(value)

    def take_duration_s(self, key: str, default_s: float, longest_s: float = _LONGEST_DURATION_S) -> float:
        value = self.take(key, str, ' with a unit, as in "2s"')
        if value is None:
            return default_s
        match = _DURATION.fullmatch(value)
        if match is None:
            raise self.error(
                key, f'{_shown(value)} is not a duration, write a number and a unit, as in "2s" (ms, s, min, h, d)'
            )
        number, unit = match.groups()
        if not unit:
            raise self.error(key, f'{_shown(value)} has no unit, write it as in "{number}s" (ms, s, min, h, d)')
        if unit not in _UNITS_S:
            raise self.error(key, f"{_shown(unit)} is not a unit, use ms, s, min, h or d")
        seconds = float(number) * _UNITS_S[unit]
        if seconds <= 0:
            raise self.error(key, f"{_shown(value)} is no time at all, make it longer than 0")
        if seconds > longest_s:
            longest = "24h" if longest_s == _LONGEST_DURATION_S else f"{longest_s / _UNITS_S['d']:g}d"
            raise self.error(key, f"{_shown(value)} is too long, make it {longest} or less")
        return seconds

    def take_schedule_s(self, key: str, default_s: float | None) -> float | None:
        """A duration, or None for "off"."""
        if self._rest.get(key) == "off":
            self.take(key, str)
            return None
        return self.take_duration_s(key, 0, _LONGEST_SCHEDULE_S) or default_s

    def take_rate(self, key: str, default: float = math.inf) -> float:
        """Bytes a second; infinite for "none"."""
        value = self.take(key, str, ' with a unit, as in "100MiB/s"')
        try:
            return default if value is None else rate_bytes_per_s(value)
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def take_choice(self, key: str, choices: Sequence[str], default: str) -> str:
        value = self.take(key, str)
        if value is not None and value not in choices:
            raise self.error(key, f"{_shown(value)} is not known here, use {' or '.join(_shown(c) for c in choices)}")
        return default if value is None else value

    def take_rest(self) -> list[str]:
        """The keys of a table that names its own; they count as known."""
        names = list(self._rest)
        self._known += names
        return names

    def reject_rest(self) -> None:
        for key in self._rest:
            close = difflib.get_close_matches(key, self._known, n=1)
            if close:
                raise self.error(key, f"unknown key, did you mean {close[0]}?")
            raise self.error(key, f"unknown key, remove it (known here: {', '.join(self._known)})")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file, write it or give another with --config FILE") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}), look at its type and mode") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: line {line}: not UTF-8, save the file in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at (.*)\)", str(error))
        problem, place = match.groups() if match else (str(error), "some line")
        raise ConfigError(f"{file}: {place}: not TOML ({problem}), correct it there") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply, this file needs no more than tables in tables") from None


def _read_nodes(top: _Table, parts: _Table | None, volume: str, backing: Path | None) -> dict[str, NodeConfig]:
    names = [] if parts is None else parts.take_rest()
    if parts is None or not names:
        raise top.error("nodes", "missing, add a part [nodes.NAME] with an address for each of the two nodes")
    if len(names) > 2:
        listed = ", ".join(_key(name) for name in names)
        raise top.error("nodes", f"{len(names)} nodes ({listed}) but a volume has two at most, remove the others")
    nodes = {name: _read_node(parts, name, volume, backing) for name in names}
    if len({(_same_address(node.address), node.port) for node in nodes.values()}) < len(nodes):
        first, second = nodes.values()
        raise parts.error(
            second.name,
            f"has the address and port of {_shown(first.name)} ({second.address}, port {second.port}), give each node its own",
        )
    return nodes


def _read_node(parts: _Table, name: str, volume: str, backing: Path | None) -> NodeConfig:
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
    )
    part.reject_rest()
    if address is None:
        raise part.error("address", 'missing, give the address that this node listens on, as in address = "10.77.0.1"')
    if problem := _address_problem(address):
        raise part.error("address", f"{_shown(address)} {problem}")
    if not 1 <= node.port <= 65535:
        raise part.error("port", f"{node.port} is not a port, use 1 to 65535")
    if (length := len(os.fsencode(node.control))) > _SOCKET_PATH_BYTES:
        raise part.error("control", f"{length} bytes are too long for a socket's path, use {_SOCKET_PATH_BYTES} or fewer")
    _check_state_dir(part, node)
    return node


def _check_state_dir(part: _Table, node: NodeConfig) -> None:
    if node.backing is not None and node.state_dir.is_relative_to(node.backing):
        raise part.error(
            "state_dir", f"{_shown(str(node.state_dir))} lies among the files it is about ({node.backing}), put it elsewhere"
        )


def _read_replication(table: _Table) -> ReplicationConfig:
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


def _read_resync(table: _Table) -> ResyncConfig:
    priority = table.take_choice("priority", ("application", "resync"), ResyncConfig().priority)
    resync = ResyncConfig(
        rate_limit_bytes_per_s=table.take_rate("rate_limit"),
        priority="resync" if priority == "resync" else "application",
    )
    table.reject_rest()
    return resync


def _read_verify(table: _Table) -> VerifyConfig:
    default = VerifyConfig()
    verify = VerifyConfig(
        rate_bytes_per_s=table.take_rate("rate", default.rate_bytes_per_s),
        every_s=table.take_schedule_s("every", default.every_s),
    )
    table.reject_rest()
    return verify


def _own_name(top: _Table, names: Sequence[str], asked: str | None, named_in_file: str | None) -> str:
    listed = ", ".join(_key(name) for name in names)
    from_environment = os.environ.get("MIRRORFS_NODE") or None
    for name, origin, key in (
        (asked, "--node", "nodes"),
        (from_environment, "$MIRRORFS_NODE", "nodes"),
        (named_in_file, "node", "node"),
    ):
        if name is None:
            continue
        if name not in names:
            raise top.error(key, f"there is no node {_shown(name)} as {origin} says, use one of: {listed}")
        return name
    full = socket.gethostname()
    short = full.partition(".")[0]
    for name in (short, full):
        if name in names:
            return name
    raise top.error("nodes", f"none is named as this host, {_shown(full)}, give --node NAME or set node to one of: {listed}")


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


def _key(part: str) -> str:
    return part if _BARE_KEY.fullmatch(part) else json.dumps(part)


def _shown(value: str) -> str:
    return json.dumps(value, ensure_ascii=not value.isprintable())
