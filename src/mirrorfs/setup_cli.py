"""The commands with which machines are made ready, and looked at: init, join, doctor, support."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from mirrorfs import config as configuration
from mirrorfs import control, preparing, units
from mirrorfs.cli_base import Chosen, ConfigFile, Json, NodeName, load
from mirrorfs.config import DEFAULT_PORT, Config
from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.modules_cli import Settings

_ANSWER_S: Final = 60.0
_MEET_S: Final = 60.0
_POLL_S: Final = 0.2

Address = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Of this node, for the other one. Default: the only one that there is.")
]
SetAside = Annotated[
    bool,
    typer.Option("--set-aside", help="First move what stands where the volume will be mounted to PATH.before-mirrorfs."),
]
NoStart = Annotated[bool, typer.Option("--no-start", help="Do not start the node, also where systemd could.")]


def init(
    context: typer.Context,
    volume: Annotated[str, typer.Argument(metavar="NAME", help="Of the volume: 1 to 32 of A-Z a-z 0-9 _ -")],
    *,
    mount: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where both nodes mount it if `mirrorfs mount` does not say.")
    ] = None,
    address: Address = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On which the other node connects.")] = DEFAULT_PORT,
    minutes: Annotated[float, typer.Option(min=0.1, max=1440, help="So long the code is good.")] = 15,
    module: Annotated[str | None, typer.Option(metavar="NAME", help="A module whose services both nodes are to have.")] = None,
    settings: Settings = None,
    vips: Annotated[
        list[str] | None,
        typer.Option("--vip", metavar="ADDRESS/LENGTH@INTERFACE", help="An address that moves with them. Repeatable."),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Then make this node the primary of the new volume: its files are kept.")
    ] = False,
    code_file: Annotated[
        Path | None,
        typer.Option(
            "--code-file", metavar="FILE", help="Put the code there (mode 0600) while it is good, and do not print it."
        ),
    ] = None,
    no_start: NoStart = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Make configuration and keys, wait for the other node, which `mirrorfs join CODE` brings, and start with systemd."""
    import trio

    from mirrorfs.joining import Invitation, prepare
    from mirrorfs.modules import adding

    chosen: Chosen = context.obj
    # Before anything is written, as far as that can be said then.
    adding.of_options(module, settings or [], vips or [], mount, {"this node": [address] if address else []})
    prepared = prepare(volume, config or chosen.config, node or chosen.node, address, port, mount)
    why_not = "--no-start is given" if no_start else units.why_not(prepared)
    if promote and why_not and not units.is_running(prepared.node.control):
        raise UsageError(f"--promote: the node has to run for that, and it would not be started: {why_not}")
    addresses = {prepared.node.name: (prepared.node.address, *prepared.node.heartbeats)}
    sections = adding.of_options(module, settings or [], vips or [], prepared.mount, addresses)
    if sections and sections in prepared.file.read_text():
        sections = ""  # of an `init` that was broken off
    if sections and prepared.peer is not None:
        raise UsageError(f"{prepared.file} names both nodes already: `mirrorfs modules add` puts a module there")
    invitation = Invitation(prepared, sections)
    invitation.check()

    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            code = await nursery.start(invitation.wait, minutes * 60)
            if code_file is None:
                print(f"On the other node, within {minutes:g} minutes:\n\n    mirrorfs join {code}\n", flush=True)
            else:
                _write_code(code_file, str(code))
            print(f"waiting for it on {code.address} port {code.port} (Ctrl-C gives up) ...", file=sys.stderr, flush=True)

    try:
        trio.run(wait)
    finally:
        if code_file is not None:
            code_file.unlink(missing_ok=True)
    print(f"{invitation.joined} has joined: the nodes of {volume} know each other, {invitation.config.file} names both")
    loaded = configuration.load(prepared.file, prepared.node.name)
    _start_mount(loaded, no_start=no_start)
    _start_controller(loaded, no_start=no_start)  # before what may come to nothing: it is to be there in any case
    if promote:
        _promote_new(loaded)
    elif _is_new(loaded):
        print("then, once, on the node whose files are to be kept: mirrorfs promote")


def _write_code(file: Path, code: str) -> None:
    from mirrorfs.files import write_durably

    try:
        write_durably(file, f"{code}\n".encode(), 0o600)
    except OSError as error:
        raise MirrorfsError(f"--code-file {file}: cannot be written: {error.strerror}") from None


def join(
    context: typer.Context,
    code: Annotated[
        str, typer.Argument(metavar="CODE", help="What `mirrorfs init` printed on the other node; - reads it from stdin.")
    ],
    *,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of this node, for the other one. Default: that from which it is reached."),
    ] = None,
    set_aside: SetAside = False,
    no_start: NoStart = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Take configuration and trust over from the node that gave the code, in one step, and start with systemd."""
    import trio

    from mirrorfs.joining import join, parse_code

    chosen: Chosen = context.obj
    if code == "-":  # so that it stands in no list of processes
        code = sys.stdin.readline()
    loaded = trio.run(join, parse_code(code), config or chosen.config, node or chosen.node, address)
    assert loaded.peer is not None
    print(f"joined {loaded.peer.name}: {loaded.file} is written, the nodes of {loaded.volume} know each other")
    has_files = not set_aside and preparing.has_files(loaded)
    _start_mount(loaded, no_start=no_start, set_aside=set_aside)
    if has_files:
        _tell_of_files(loaded)
    _start_controller(loaded, no_start=no_start)


def check_config(context: typer.Context, *, as_json: Json = False, config: ConfigFile = None, node: NodeName = None) -> None:
    """Read the configuration and say what it is. Exit status 2, with one line, if it is none."""
    from mirrorfs.trust import Trust

    loaded = load(context, config, node)
    trust = Trust(loaded.node.keys)
    introduced = loaded.peer is not None and trust.identity.exists() and trust.peer.exists()
    if as_json:
        found = {
            "file": str(loaded.file),
            "volume": loaded.volume,
            "node": loaded.node.name,
            "peer": loaded.peer and loaded.peer.name,
            "introduced": introduced,
            "mount": loaded.mount and str(loaded.mount),
            "units": units.names(loaded),
        }
        print(json.dumps(found))
        return
    other = "there is no other one"
    if loaded.peer is not None:
        other = f"the other one is {loaded.peer.name}, {'known' if introduced else 'not yet known'} to this one"
    print(f"{loaded.file}: volume {loaded.volume}; this node is {loaded.node.name}, {other}")


def prepare(context: typer.Context, *, set_aside: SetAside = False, config: ConfigFile = None, node: NodeName = None) -> None:
    """Make this machine ready for its services, as `init` and `join` do before they start the node. It can be repeated."""
    loaded = load(context, config, node)
    if units.is_running(loaded.node.controller):
        raise MirrorfsError(
            f"the controller of {loaded.volume} runs here, and a service would be stopped under it: stop it first"
        )
    if set_aside and units.is_running(loaded.node.control):
        raise MirrorfsError(f"the node runs, and has {loaded.mount}: `mirrorfs unmount` first")
    _prepare(loaded, set_aside=set_aside)
    if loaded.mount is not None:
        _make_mount_point(loaded)


def _make_mount_point(loaded: Config) -> None:
    if units.make_mount_point(loaded):
        print(f"{loaded.mount} was not there, and is made")


def _prepare(loaded: Config, *, set_aside: bool) -> None:
    """In this order: what is moved must not be in use by a service that runs yet."""
    preparing.prepare_services(loaded)
    if set_aside and (aside := preparing.set_aside(loaded)):
        print(f"what stood in {loaded.mount} is now in {aside}")


def _tell_of_files(loaded: Config) -> None:
    """What a person does whose first `join` was without --set-aside."""
    again = [f"mirrorfs release {loaded.mount}", "mirrorfs prepare --set-aside"]
    if not units.why_not(loaded):
        stopped = " ".join(reversed([name.removesuffix(".service") for name in units.names(loaded)]))
        again = [f"systemctl stop {stopped}", *again, *units.by_hand(loaded)[-1:]]
    print(
        f"{loaded.mount} has files here, which nothing of the other node will replace: if its files are to be kept, run here: "
        + "; and ".join(again)
    )


def _start_mount(loaded: Config, *, no_start: bool, set_aside: bool = False) -> None:
    """By its unit where that is possible and wanted, on a machine that is made ready; else say what a person has to run."""
    if units.is_running(loaded.node.control):
        print("the node runs already")
        return
    if why_not := "" if no_start else units.why_not(loaded):
        print(f"not started, since {why_not}")
    if no_start or why_not:
        print("next, here: " + "; and ".join(units.by_hand(loaded, set_aside=set_aside)))
        return
    try:
        if not units.is_running(loaded.node.controller):  # which looks after services that may run
            _prepare(loaded, set_aside=set_aside)
    except MirrorfsError as error:
        then = "; and ".join(units.by_hand(loaded, set_aside=set_aside))
        raise MirrorfsError(f"{error}; nothing was started: mend that, then run here: {then}") from None
    _make_mount_point(loaded)
    _start(units.mount_unit(loaded))


def _start_controller(loaded: Config, *, no_start: bool) -> None:
    if loaded.failover and not (no_start or units.why_not(loaded) or units.is_running(loaded.node.controller)):
        _start(units.controller_unit(loaded))


def _start(unit: str) -> None:
    units.start(unit)
    print(f"{unit} is started, now and with every boot")


def _is_new(loaded: Config) -> bool:
    """Whether the volume has to be promoted yet, as far as this node knows."""
    from mirrorfs.journal import Journal

    record = Journal(loaded.node.state_dir).read()
    return record is None or record.epoch is None


def _promote_new(loaded: Config) -> None:
    """Make this node the first primary, once the other one is here."""
    assert loaded.peer is not None
    end = time.monotonic() + _MEET_S
    while control.request(loaded.node.control, "status", timeout_s=_ANSWER_S)["peer"]["state"] == "disconnected":
        if time.monotonic() > end:
            raise MirrorfsError(
                f"{loaded.peer.name} runs not yet, or cannot be reached: run `mirrorfs promote` here when it is connected "
                "(`mirrorfs status`)"
            )
        time.sleep(_POLL_S)
    print(control.request(loaded.node.control, "promote-new", timeout_s=_ANSWER_S)["message"])


def doctor(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="Where the volume is or will be mounted.")] = None,
    *,
    as_json: Json = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Check this machine, and its node if there is a configuration, and say what to do. Exit status 1 after an error."""
    from mirrorfs.doctor import Grade, examine

    chosen: Chosen = context.obj
    file = configuration.find_if_any(config or chosen.config)
    loaded = None if file is None else configuration.load(file, node or chosen.node)
    failed = False
    for finding in examine(loaded, path or (loaded.mount if loaded else None)):
        failed |= finding.grade is Grade.BAD
        if as_json:
            print(json.dumps(asdict(finding) | {"grade": finding.grade.value}), flush=True)
            continue
        print(f"{finding.grade.value:8} {finding.about}: {finding.found}", flush=True)
        if finding.grade is not Grade.GOOD:
            print(f"{'':8} -> {finding.advice}", flush=True)
    if loaded is None and not as_json:
        print(f"{'':8} no configuration here: only the machine was looked at (`mirrorfs init` makes one)")
    if failed:
        raise typer.Exit(1)


def support(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Default: mirrorfs-support-NODE-TIME.tar.gz here.")
    ] = None,
    *,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the mount's output goes. Default: systemd's journal.")
    ] = None,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Put what somebody who helps has to see into one archive: no keys, no passwords, nothing of the volume's files."""
    from mirrorfs.support import collect

    loaded = load(context, config, node)
    target = file or Path(f"mirrorfs-support-{loaded.node.name}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    for part in collect(loaded, target, log=log):
        print(part)
    print(f"{target} is written: look into it before you send it")
