"""The commands of the failover controller."""

from concurrent.futures import Future, wait
from contextlib import suppress
from threading import Thread
from typing import Annotated, Any, Final

import typer

from mirrorfs import control
from mirrorfs.cli_base import ConfigFile, LogFormat, NodeName, configure_logging, load
from mirrorfs.config import Config
from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.progress_show import progress

STATUS_TIMEOUT_S: Final = 10.0
SWITCH_S: Final = 180.0
_POLL_S: Final = 0.5


def has_controller(loaded: Config) -> bool:
    """Whether a controller runs here: then it moves addresses and services too."""
    try:
        control.request(loaded.node.controller, "status", timeout_s=STATUS_TIMEOUT_S)
    except control.NotRunningError:
        return False
    return True


def say(loaded: Config, command: str, *, timeout_s: float = SWITCH_S, **arguments: Any) -> None:
    """Ask the controller of this node and print what it answers; meanwhile, what it does."""
    socket = loaded.node.controller
    answer = Future[dict[str, Any]]()

    def ask() -> None:
        try:
            answer.set_result(control.request(socket, command, timeout_s=timeout_s, **arguments))
        except BaseException as error:
            answer.set_exception(error)

    # No pool: its thread would be waited for after Ctrl-C.
    Thread(target=ask, daemon=True).start()
    with progress(command) as show:
        while not wait([answer], timeout=_POLL_S).done:
            with suppress(MirrorfsError):
                found = control.request(socket, "status", timeout_s=STATUS_TIMEOUT_S)
                show(f"{command}: {found['posture']} ({found['because']}), the other controller: {found['peer']['posture']}")
    print(answer.result()["message"])


def preview(loaded: Config, *, yes: bool, force: bool, automatic: bool = False) -> dict[str, Any]:
    """What a promotion of this node would do, by the controller if one runs here."""
    socket = loaded.node.controller if has_controller(loaded) else loaded.node.control
    return control.request(socket, "promote", dry_run=True, yes=yes, force=force, automatic=automatic)


def switchover(
    context: typer.Context,
    *,
    timeout: Annotated[
        float, typer.Option(min=1, max=86400, metavar="SECONDS", help="So long it may take; what is under way then goes on.")
    ] = 120,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as it is under way.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Move the application to the other node, from either node, and wait until it answers at its addresses there.

    Exit status 0 says that it is served there. Needs both controllers.
    """
    loaded = load(context, config, node)
    say(loaded, "switchover", timeout_s=timeout + STATUS_TIMEOUT_S, within_s=timeout, wait=not no_wait)


def maintenance(
    context: typer.Context,
    state: Annotated[str, typer.Argument(metavar="on|off")],
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Let the controllers of both nodes do nothing automatically, or let them again. `off` ends a hold, too."""
    if state not in ("on", "off"):
        raise UsageError(f"{state!r} is neither on nor off")
    say(load(context, config, node), "maintenance", on=state == "on")


def controller(
    context: typer.Context, *, log_format: LogFormat = None, config: ConfigFile = None, node: NodeName = None
) -> None:
    """Look after the pair, in the foreground: watch, fail over, move addresses and services."""
    loaded = load(context, config, node)
    configure_logging(loaded, log_format)

    from mirrorfs.controller import run

    run(loaded)


def make_key(context: typer.Context, config: ConfigFile = None, node: NodeName = None) -> None:
    """Make a key of the heartbeats in a file of its own; copy it to the other node then. Without, the nodes' keys serve."""
    loaded = load(context, config, node)
    if loaded.failover is None:
        raise UsageError(f"{loaded.file}: [failover] is missing: no controller, no key")

    if loaded.failover.key_file is None:
        raise UsageError(
            f"{loaded.file}: failover.key_file is not set, and none is needed: the nodes' own keys make that of the heartbeats"
        )

    from mirrorfs import heartbeat

    heartbeat.make_key(loaded.failover.key_file)
    print(f"{loaded.failover.key_file} is made: copy it to the other node, mode 0600")
