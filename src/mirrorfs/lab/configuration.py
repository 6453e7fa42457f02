"""The configuration file of a host of a lab, and its keys."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mirrorfs.errors import ConfigError
from mirrorfs.lab.network import ADDRESSES
from mirrorfs.lab.public import PUBLIC
from mirrorfs.trust import Trust

if TYPE_CHECKING:
    from mirrorfs.lab.pair import Host

PORT: Final = 7788


def text(own: "Host", hosts: "Iterable[Host]", options: Mapping[str, str], sections: str, *, desk: bool) -> str:
    """What `own` has in its file; ConfigError for an option that is no key."""
    lines = ['volume = "lab"', f"node = {_toml(own.name)}"]
    for host in hosts:
        lines += [
            "",
            f"[nodes.{host.name}]",
            f"address = {_toml(ADDRESSES[host.name])}",
            f"port = {PORT}",
            f"state_dir = {_toml(str(host.state_dir))}",
            f"keys = {_toml(str(host.keys))}",
            f"control = {_toml(str(host.control))}",
            f"controller = {_toml(str(host.control.with_suffix('.ctl')))}",
        ]
        if desk:
            lines += [f"heartbeats = [{_toml(ADDRESSES[host.name])}, {_toml(PUBLIC[host.name])}]"]
    if options:
        lines += ["", "[replication]"]
    for key, value in options.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise ConfigError(f"{own.config}: replication.{key}: not a key")
        bare = value in ("true", "false") or value.isdecimal()
        lines.append(f"{key} = {value if bare else _toml(value)}")
    return "\n".join([*lines, sections]) + "\n"


def acquaint(one: Path, two: Path) -> None:
    """Make the keys of two nodes in these directories, and let them trust each other, as `mirrorfs join` does."""
    first, second = Trust(one), Trust(two)
    for trust in (first, second):
        trust.make(trust.directory.parent.name)
    first.pin(second.identity.read_bytes())
    second.pin(first.identity.read_bytes())


def _toml(value: str) -> str:
    # A JSON string is a TOML string, as long as no surrogate pairs are written.
    return json.dumps(value, ensure_ascii=False)
