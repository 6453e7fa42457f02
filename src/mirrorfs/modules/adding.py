"""Putting a module into a volume's configuration, and making one of one's own."""

import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mirrorfs import config_file
from mirrorfs.config import Config
from mirrorfs.errors import UsageError
from mirrorfs.failover_config import read_failover
from mirrorfs.modules import DIRECTORY, NAME, Rendered, find, parse_settings, render
from mirrorfs.toml_table import Table, read, shown

_SKELETON: Final = Path(__file__).with_name("_skeleton.toml")


def new(name: str, directory: Path = DIRECTORY) -> Path:
    """Write the skeleton of a module; its file. UsageError if the name is none or the file is there, MirrorfsError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{shown(name)} is no name of a module, use 1 to 63 of A-Z a-z 0-9 _ - beginning with a letter or digit"
        )
    file = directory / f"{name}.toml"
    if file.exists():
        raise UsageError(f"{file}: is there already, give another name or edit it")
    config_file.write(file, _SKELETON.read_text())
    return file


def vip(text: str) -> str:
    """The [[vip]] for ADDRESS/LENGTH@INTERFACE; UsageError if it is not written like that."""
    address, at, interface = text.partition("@")
    if not at:
        raise UsageError(f"--vip {shown(text)}: write ADDRESS/LENGTH@INTERFACE, as in 10.77.0.100/24@eth0")
    return f"[[vip]]\naddress = {json.dumps(address)}\ninterface = {json.dumps(interface)}\n"


def sections(services: str, vips: Sequence[str] = (), *, there: Mapping[str, Any] | None = None) -> str:
    """What is added to a configuration that has `there`: [failover] if it has none yet, the addresses, the services."""
    failover = [] if "failover" in (there or {}) else ["[failover]\n"]
    return "\n".join([*failover, *(vip(each) for each in vips), *([services] if services else [])])


def of_options(
    module: str | None, settings: Sequence[str], vips: Sequence[str], mount: Path | None, nodes: Mapping[str, Collection[str]]
) -> str:
    """The sections that `mirrorfs init --module ... --set ... --vip ...` asks for, "" for none of these.

    `nodes` are the addresses of nodes, as far as they are known. Raises UsageError, ConfigError.
    """
    if settings and module is None:
        raise UsageError("--set goes with --module")
    services = "" if module is None else render(find(module), parse_settings(settings), mount).services
    if not services and not vips:
        return ""
    text = sections(services, vips)
    table = Table(Path("what is to be added"), (), tomllib.loads(text))
    parts = [table.take_tables(name) for name in ("vip", "service")]
    read_failover(table.take_table("failover"), *parts, volume="", nodes=nodes)
    return text


def add(loaded: Config, rendered: Rendered) -> None:
    """Add a module to the file of a volume, as a whole or not at all, durably.

    Raises UsageError if a service of its names is there, ConfigError if the file with it would be none, MirrorfsError.
    """
    there = () if loaded.failover is None else loaded.failover.services
    for service in there:
        if service.name in rendered.names:
            raise UsageError(
                f"{loaded.file}: there is a service {shown(service.name)} already, give another name with --set name=..."
            )
    addition = sections(rendered.services, there=read(loaded.file))
    text = loaded.file.read_bytes().decode().rstrip("\n") + "\n\n" + addition
    config_file.check(loaded.file, text, loaded.node.name)
    config_file.write(loaded.file, text)
