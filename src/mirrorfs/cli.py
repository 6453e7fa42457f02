"""The commands: parse, call, print, exit status. What they do is done elsewhere, and imported when it is needed."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mirrorfs import __version__, control
from mirrorfs import config as configuration
from mirrorfs.config import Config
from mirrorfs.errors import ConfirmationNeededError, MirrorfsError
from mirrorfs.lab.cli import app as lab_app
from mirrorfs.lab.cli import bench, demo

_INTERRUPTED = 130
_WATCH_INTERVAL_S = 1.0
_STATUS_TIMEOUT_S = 10.0

app = typer.Typer(
    name="mirrorfs",
    help="A file system mirrored between two Linux servers. Exit status: 0 done, 1 failed, 2 usage or configuration, "
    "3 refused (--force would do it), 4 needs --yes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
journal_app = typer.Typer(help="What this node keeps outside the tree, on disk.", no_args_is_help=True)
app.add_typer(journal_app, name="journal")
app.add_typer(lab_app, name="lab")
app.command()(demo)
app.command()(bench)

_ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Default: $MIRRORFS_CONFIG, else the only /etc/mirrorfs/*.toml."),
]
_NodeName = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="This node's part of it. Default: $MIRRORFS_NODE, else the host name."),
]
_Yes = Annotated[bool, typer.Option("--yes", help="The other node is dead or did not go on alone: do not ask.")]
_Force = Annotated[bool, typer.Option("--force", help="Even if acknowledged writes may be lost.")]
_MountPoint = Annotated[Path, typer.Argument(metavar="PATH")]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What stood before the command; the same options after it win."""

    config: Path | None
    node: str | None


def main() -> None:
    """Run the command line; never returns. An expected error is one line on stderr and its own exit status."""
    try:
        app(prog_name="mirrorfs")
    except MirrorfsError as error:
        _exit_with([error])
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BaseExceptionGroup as group:  # of trio's nurseries
        interrupted, others = group.split(KeyboardInterrupt)
        if interrupted is not None and others is None:
            sys.exit(_INTERRUPTED)
        expected, unexpected = group.split(MirrorfsError)
        if expected is None or unexpected is not None:
            raise
        _exit_with(list(_leaves(expected)))


def _exit_with(errors: list[MirrorfsError]) -> None:
    for error in errors:
        print(f"mirrorfs: {error}", file=sys.stderr)
    sys.exit(errors[0].exit_status)


def _leaves(group: BaseExceptionGroup[MirrorfsError]) -> Iterator[MirrorfsError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mirrorfs {__version__}")
        raise typer.Exit


@app.callback()
def _before_the_command(
    context: typer.Context,
    config: _ConfigFile = None,
    node: _NodeName = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = _Chosen(config, node)


def _load(context: typer.Context, config: Path | None, node: str | None) -> Config:
    chosen: _Chosen = context.obj
    return configuration.load(configuration.find(config or chosen.config), node or chosen.node)


@app.command()
def mount(
    context: typer.Context,
    path: _MountPoint,
    *,
    backing: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where the files underneath are. Default: the configuration's, else in place."),
    ] = None,
    discard_local_data: Annotated[
        bool, typer.Option("--discard-local-data", help="Let the peer's files replace what is here now.")
    ] = False,
    config: _ConfigFile = None,
    node: _NodeName = None,
) -> None:
    """Mount the volume on PATH and mirror it, in the foreground."""
    loaded = _load(context, config, node)
    if backing is not None:
        loaded = configuration.with_backing(loaded, backing)
    _configure_logging()

    from mirrorfs.daemon import run

    run(loaded, path, discard_local_data=discard_local_data)


@app.command()
def promote(
    context: typer.Context,
    yes: _Yes = False,
    force: _Force = False,
    config: _ConfigFile = None,
    node: _NodeName = None,
) -> None:
    """Make this node the primary. With the peer alive, the two swap roles and nothing is lost."""
    loaded = _load(context, config, node)
    _ask_first(loaded, "promote", "Promote this node?", yes=yes, force=force)


@app.command()
def demote(context: typer.Context, force: _Force = False, config: _ConfigFile = None, node: _NodeName = None) -> None:
    """Stop being the primary: no more writes here."""
    loaded = _load(context, config, node)
    print(control.request(loaded.node.control, "demote", force=force)["message"])


@app.command()
def pause(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: one node is enough until `mirrorfs resume`.")] = False,
    config: _ConfigFile = None,
    node: _NodeName = None,
) -> None:
    """Pause the replication: the primary goes on alone, the other node is kept off until `resume`."""
    loaded = _load(context, config, node)
    _ask_first(loaded, "pause", "Pause the replication?", yes=yes)


@app.command()
def resume(context: typer.Context, config: _ConfigFile = None, node: _NodeName = None) -> None:
    """End a pause: the other node is brought up to date and follows again."""
    loaded = _load(context, config, node)
    print(control.request(loaded.node.control, "resume")["message"])


@app.command()
def unmount(context: typer.Context, config: _ConfigFile = None, node: _NodeName = None) -> None:
    """Unmount the volume and end this node's mirrorfs."""
    loaded = _load(context, config, node)
    print(control.request(loaded.node.control, "unmount")["message"])


@app.command()
def status(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second until Ctrl-C; JSON: at each change.")] = False,
    config: _ConfigFile = None,
    node: _NodeName = None,
) -> None:
    """Show what this node is, and why. Exit status 1 if it is not running."""
    loaded = _load(context, config, node)
    if watch:
        _watch(loaded, as_json)
    else:
        found = _ask_status(loaded)
        print(json.dumps(found) if as_json else _in_words(found))
        raise typer.Exit(1 if found["state"] == "stopped" else 0)


@app.command()
def release(context: typer.Context, path: _MountPoint, config: _ConfigFile = None, node: _NodeName = None) -> None:
    """Give PATH back: its files stand there again as before mirrorfs. Nothing may be mounted on it."""
    chosen: _Chosen = context.obj
    file = configuration.find_if_any(config or chosen.config)
    backing = None if file is None else configuration.load(file, node or chosen.node).node.backing

    from mirrorfs import backing as store

    store.release(path.absolute(), backing)


@journal_app.command()
def show(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    config: _ConfigFile = None,
    node: _NodeName = None,
) -> None:
    """Show epochs, ids and the dirty log from disk, also while the node runs. Exit status 1 if a file is damaged."""
    loaded = _load(context, config, node)

    from mirrorfs import journal_show

    found = journal_show.describe(loaded.node.state_dir)
    print(json.dumps(found) if as_json else journal_show.in_words(found))
    raise typer.Exit(1 if journal_show.is_damaged(found) else 0)


def _ask_first(config: Config, command: str, question: str, *, yes: bool, **arguments: bool) -> None:
    """Run a command that may need a person's word, asking for it on a terminal."""
    try:
        answer = control.request(config.node.control, command, yes=yes, **arguments)
    except ConfirmationNeededError as error:
        if yes or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise
        if not typer.confirm(f"{error}\n{question}"):
            raise typer.Exit(error.exit_status) from None
        answer = control.request(config.node.control, command, yes=True, **arguments)
    print(answer["message"])


def _configure_logging() -> None:
    handler = logging.StreamHandler()
    with_time = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "  # systemd's journal has the time already
    handler.setFormatter(logging.Formatter(f"{with_time}%(levelname)s %(message)s"))
    logger = logging.getLogger("mirrorfs")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _ask_status(config: Config) -> dict[str, Any]:
    try:
        return control.request(config.node.control, "status", timeout_s=_STATUS_TIMEOUT_S)
    except control.NotRunningError as error:
        peer = {"name": None, "state": "none"} if config.peer is None else {"name": config.peer.name, "state": "unknown"}
        return {
            "volume": config.volume,
            "node": config.node.name,
            "state": "stopped",
            "epoch": None,
            "in_sync": [],
            "since": None,
            "peer": peer,
            "dirty_bytes": None,
            "reason": str(error),
        }


def _watch(config: Config, as_json: bool) -> None:
    if not as_json and sys.stdout.isatty():
        from rich.live import Live

        from mirrorfs.words import on_a_terminal

        with Live(on_a_terminal(_ask_status(config)), auto_refresh=False) as live:
            while True:
                time.sleep(_WATCH_INTERVAL_S)
                live.update(on_a_terminal(_ask_status(config)), refresh=True)
    shown = None
    while True:
        found = _ask_status(config)
        text = json.dumps(found) if as_json else _in_words(found) + "\n"
        if text != shown:
            print(text, flush=True)
            shown = text
        time.sleep(_WATCH_INTERVAL_S)


def _in_words(found: dict[str, Any]) -> str:
    from mirrorfs.words import status_in_words

    return status_in_words(found)
