"""The commands: parse, call, print, exit status. What they do is done elsewhere, and imported when it is needed."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirrorfs import __version__, control, logs, preview_show, toml_table
from mirrorfs import config as configuration
from mirrorfs.cli_base import (
    All,
    Chosen,
    ConfigFile,
    Force,
    Json,
    LogFormat,
    MountPoint,
    NodeName,
    Sure,
    Yes,
    configure_logging,
    confirmed,
    load,
)
from mirrorfs.config import Config
from mirrorfs.console_cli import app as console_app
from mirrorfs.errors import ConfirmationNeededError, MirrorfsError, UsageError
from mirrorfs.failover_cli import controller, has_controller, maintenance, make_key, preview, say, switchover
from mirrorfs.lab.cli import app as lab_app
from mirrorfs.lab.cli import bench, demo
from mirrorfs.modules_cli import app as modules_app
from mirrorfs.setup_cli import check_config, doctor, init, join, prepare, support

if TYPE_CHECKING:
    from mirrorfs.lost import LostStore

_INTERRUPTED = 130
_WATCH_INTERVAL_S = 1.0
_STATUS_TIMEOUT_S = 10.0
#: Data is copied or read meanwhile.
_LONG_S = 24 * 3600.0
#: Set by the scripts of the shells (packaging/completions.py) when they ask what may follow.
_COMPLETION = "_MIRRORFS_COMPLETE"

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
split_app = typer.Typer(help="Two nodes that both acknowledged changes alone.", no_args_is_help=True)
app.add_typer(split_app, name="split-brain")
lost_app = typer.Typer(
    help="Versions of files that are kept aside on this node, also while it does not run.", no_args_is_help=True
)
app.add_typer(lost_app, name="lost")
app.add_typer(console_app, name="console")
app.add_typer(lab_app, name="lab")
app.add_typer(modules_app, name="modules")
app.command()(demo)
app.command()(bench)
for _command in (init, join, prepare, doctor, support, switchover, maintenance, controller):
    app.command()(_command)
app.command("make-key")(make_key)
app.command("check-config")(check_config)


def main() -> None:
    """Run the command line; never returns. An expected error is one line on stderr and its own exit status."""
    if _COMPLETION in os.environ:
        # With add_completion typer knows the shells, but would also install scripts, which the package does.
        from typer._completion_classes import completion_init

        completion_init()
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
        print(logs.error_line(f"mirrorfs: {error}"), file=sys.stderr)
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
    config: ConfigFile = None,
    node: NodeName = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = Chosen(config, node)


@app.command()
def mount(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="Default: the configuration's `mount`.")] = None,
    *,
    backing: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where the files underneath are. Default: the configuration's, else in place."),
    ] = None,
    discard_local_data: Annotated[
        bool, typer.Option("--discard-local-data", help="Let the peer's files replace what is here now.")
    ] = False,
    log_format: LogFormat = None,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Mount the volume on PATH and mirror it, in the foreground."""
    loaded = load(context, config, node)
    place = path or loaded.mount
    if place is None:
        raise UsageError(f'where? Give PATH, or write mount = "/data" into {loaded.file}')
    if backing is not None:
        loaded = configuration.with_backing(loaded, backing)
    configure_logging(loaded, log_format)

    from mirrorfs.daemon import run

    run(loaded, place, discard_local_data=discard_local_data)


@app.command()
def promote(
    context: typer.Context,
    yes: Yes = False,
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would happen; exits as the promotion would.")
    ] = False,
    automatic: Annotated[
        bool, typer.Option("--automatic", help="For another cluster manager: as the controller asks, no person answers for it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one line of JSON.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Make this node the primary. With the peer alive, the two swap roles and nothing is lost."""
    loaded = load(context, config, node)
    if as_json and not dry_run:
        raise UsageError("--json goes with --dry-run")
    if automatic and (yes or force):
        raise UsageError("--automatic goes with neither --yes nor --force: those are a person's word")
    if automatic and has_controller(loaded):
        raise UsageError("--automatic is for another cluster manager, and here the controller of mirrorfs runs: stop it first")
    if dry_run:
        found = preview(loaded, yes=yes, force=force, automatic=automatic)
        print(json.dumps(found) if as_json else preview_show.in_words(found))
        raise typer.Exit(found["exit_status"])
    if has_controller(loaded):
        confirmed(lambda sure: say(loaded, "promote", yes=sure, force=force), yes, "Promote this node?")
    else:
        _ask_first(loaded, "promote", "Promote this node?", yes=yes, force=force, automatic=automatic)


@app.command()
def demote(context: typer.Context, force: Force = False, config: ConfigFile = None, node: NodeName = None) -> None:
    """Stop being the primary: no more writes here."""
    loaded = load(context, config, node)
    print(control.request(loaded.node.control, "demote", force=force)["message"])


@app.command()
def pause(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: one node is enough until `mirrorfs resume`.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Pause the replication: the primary goes on alone, the other node is kept off until `resume`."""
    loaded = load(context, config, node)
    _ask_first(loaded, "pause", "Pause the replication?", yes=yes)


@app.command()
def resume(context: typer.Context, config: ConfigFile = None, node: NodeName = None) -> None:
    """End a pause: the other node is brought up to date and follows again."""
    loaded = load(context, config, node)
    print(control.request(loaded.node.control, "resume")["message"])


@app.command()
def unmount(context: typer.Context, config: ConfigFile = None, node: NodeName = None) -> None:
    """Unmount the volume and end this node's mirrorfs."""
    loaded = load(context, config, node)
    print(control.request(loaded.node.control, "unmount")["message"])


@app.command()
def status(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second until Ctrl-C; JSON: at each change.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Show what this node is, and why. Exit status 1 if it is not running."""
    loaded = load(context, config, node)
    if watch:
        _watch(loaded, as_json)
    else:
        found = _ask_status(loaded)
        print(json.dumps(found) if as_json else _in_words(found))
        raise typer.Exit(1 if found["state"] == "stopped" else 0)


@app.command()
def verify(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Replace what differs by what the node of --from has.")] = False,
    good: Annotated[str, typer.Option("--from", metavar="NODE", help="Whose data is right.")] = "",
    rate: Annotated[
        str,
        typer.Option("--rate", metavar="RATE", help='At most so many bytes a second, as in "50MiB/s". Default: [verify] rate.'),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON at the end.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Compare both nodes' trees while they are used. Exit status 1 if they differ, also if that was repaired."""
    if repair != bool(good):
        raise UsageError("--repair needs --from NODE, whose data is right, and --from needs --repair")
    try:
        rate_bytes_per_s = toml_table.rate_bytes_per_s(rate) if rate else 0
    except ValueError as error:
        raise UsageError(f"--rate: {error}") from None
    loaded = load(context, config, node)

    from mirrorfs import verify_show

    control.request(loaded.node.control, "verify", good=good, rate=rate_bytes_per_s)
    raise typer.Exit(verify_show.follow(loaded.node.control, as_json=as_json))


@app.command()
def release(context: typer.Context, path: MountPoint, config: ConfigFile = None, node: NodeName = None) -> None:
    """Give PATH back: its files stand there again as before mirrorfs. Nothing may be mounted on it."""
    chosen: Chosen = context.obj
    file = configuration.find_if_any(config or chosen.config)
    backing = None if file is None else configuration.load(file, node or chosen.node).node.backing

    from mirrorfs import backing as store

    store.release(path.absolute(), backing)


@journal_app.command()
def show(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Show epochs, ids and the dirty log from disk, also while the node runs. Exit status 1 if a file is damaged."""
    loaded = load(context, config, node)

    from mirrorfs import journal_show

    found = journal_show.describe(loaded.node.state_dir)
    print(json.dumps(found) if as_json else journal_show.in_words(found))
    raise typer.Exit(1 if journal_show.is_damaged(found) else 0)


@split_app.command("show")
def show_split_brain(context: typer.Context, as_json: Json = False, config: ConfigFile = None, node: NodeName = None) -> None:
    """Show which files and bytes differ by side. Both nodes have to be connected."""
    loaded = load(context, config, node)
    found = control.request(loaded.node.control, "split-brain-show", timeout_s=_LONG_S, offset=0)
    while len(found["differences"]) < found["total"]:
        offset = len(found["differences"])
        more = control.request(loaded.node.control, "split-brain-show", timeout_s=_LONG_S, offset=offset)
        found["differences"] += more["differences"]
        found["total"] = more["total"]

    from mirrorfs import split_brain_show

    print(json.dumps(found) if as_json else split_brain_show.in_words(found))


@split_app.command()
def resolve(
    context: typer.Context,
    keep: Annotated[str, typer.Option(metavar="NODE", help="The node whose history is kept; the other one's is set aside.")],
    yes: Sure = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Keep the history of one node. What the other one changed is kept there (`mirrorfs lost`), then it becomes a copy."""
    loaded = load(context, config, node)
    confirmed(lambda sure: print(_resolve(loaded, keep, yes=sure)), yes, "Keep that history?")


def _resolve(loaded: Config, keep: str, *, yes: bool) -> str:
    try:
        done = control.request(loaded.node.control, "split-brain-resolve", timeout_s=_LONG_S, keep=keep, yes=yes)
        return str(done["message"])
    except control.NotRunningError:
        if loaded.peer is None or keep != loaded.peer.name:
            raise

    from mirrorfs.yielding import give_up_offline

    return give_up_offline(loaded, keep, yes=yes)


@lost_app.command("list")
def list_lost(context: typer.Context, as_json: Json = False, config: ConfigFile = None, node: NodeName = None) -> None:
    """List what is kept, and why."""
    entries = _lost(load(context, config, node)).entries()

    from mirrorfs import split_brain_show

    print(json.dumps(split_brain_show.lost_in_values(entries)) if as_json else split_brain_show.lost_in_words(entries))


@lost_app.command()
def export(
    context: typer.Context,
    what: Annotated[list[str], typer.Argument(metavar="[ID] DEST")],
    *,
    every: All = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Copy one version to DEST, or all below it. Of a large file, it may be only the bytes that were changed."""
    if len(what) != (1 if every else 2):
        raise UsageError("give an ID and a destination, or --all and a destination")
    store, destination = _lost(load(context, config, node)), Path(what[-1]).absolute()
    if every:
        print(f"{store.export_all(destination)} versions are in {destination}")
    else:
        print(store.export(what[0], destination))


@lost_app.command()
def drop(
    context: typer.Context,
    what: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    *,
    every: All = False,
    yes: Sure = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Delete versions that are kept, for good."""
    if bool(what) == every:
        raise UsageError("give one or more IDs, or --all")
    store = _lost(load(context, config, node))

    def drop_them(sure: bool) -> None:
        if not sure:
            count = len(what or store.entries())
            raise ConfirmationNeededError(f"{count} versions of files will be deleted for good (--yes does it)")
        print(f"{store.drop(None if every else what)} versions are deleted")

    confirmed(drop_them, yes, "Delete them?")


def _lost(loaded: Config) -> "LostStore":
    """The store of the node that runs here, or of the directory that it last ran on."""
    from mirrorfs.lost import LostStore
    from mirrorfs.yielding import place_of

    try:
        directory = Path(control.request(loaded.node.control, "lost")["directory"])
    except control.NotRunningError:
        directory = place_of(loaded) / "lost"
    try:
        # Held by this process, so that an end of the node in the middle changes nothing.
        return LostStore(Path(f"/proc/self/fd/{os.open(directory, os.O_RDONLY | os.O_DIRECTORY)}"))
    except OSError as error:
        raise MirrorfsError(f"{directory}: cannot be reached: {error.strerror}") from error


def _ask_first(config: Config, command: str, question: str, *, yes: bool, **arguments: bool) -> None:
    """Run a command that may need a person's word, asking for it on a terminal."""
    confirmed(
        lambda sure: print(control.request(config.node.control, command, yes=sure, **arguments)["message"]), yes, question
    )


def _ask_status(config: Config) -> dict[str, Any]:
    found = _ask_mount(config)
    if config.failover is not None:
        with contextlib.suppress(control.NotRunningError):
            found["controller"] = control.request(config.node.controller, "status", timeout_s=_STATUS_TIMEOUT_S)
    return found


def _ask_mount(config: Config) -> dict[str, Any]:
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
