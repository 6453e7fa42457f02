"""What all command lines share: the options, the configuration, asking a person, the log."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mirrorfs import config as configuration
from mirrorfs import logs
from mirrorfs.config import Config
from mirrorfs.errors import ConfirmationNeededError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Default: $MIRRORFS_CONFIG, else the only /etc/mirrorfs/*.toml."),
]
NodeName = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="This node's part of it. Default: $MIRRORFS_NODE, else the host name."),
]
Yes = Annotated[bool, typer.Option("--yes", help="The other node is dead or did not go on alone: do not ask.")]
Force = Annotated[bool, typer.Option("--force", help="Even if acknowledged writes may be lost.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON.")]
Sure = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
All = Annotated[bool, typer.Option("--all", help="All that are kept, in place of one ID.")]
LogFormat = Annotated[
    logs.Format | None,
    typer.Option(
        "--log-format",
        envvar="MIRRORFS_LOG_FORMAT",
        help="Of the log on stderr. Default: systemd's journal under systemd, else text.",
    ),
]
MountPoint = Annotated[Path, typer.Argument(metavar="PATH")]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What stood before the command; the same options after it win."""

    config: Path | None
    node: str | None


def load(context: typer.Context, config: Path | None, node: str | None) -> Config:
    """The configuration that a command is about."""
    chosen: Chosen = context.obj
    return configuration.load(configuration.find(config or chosen.config), node or chosen.node)


def confirmed(action: Callable[[bool], None], yes: bool, question: str) -> None:
    """Do what may need a person's word, asking for it on a terminal."""
    try:
        action(yes)
    except ConfirmationNeededError as error:
        if yes or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise
        if not typer.confirm(f"{error}\n{question}"):
            raise typer.Exit(error.exit_status) from None
        action(True)


def configure_logging(loaded: Config, wanted: logs.Format | None) -> None:
    """Let the log of a node's process go where it is read."""
    logs.configure(wanted, loaded.volume, loaded.node.name)
