"""The commands with which machines are made ready, and looked at: init, join, doctor, support."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mirrorfs import config as configuration
from mirrorfs.cli_base import Chosen, ConfigFile, Json, NodeName, load
from mirrorfs.config import DEFAULT_PORT
from mirrorfs.errors import UsageError
from mirrorfs.modules_cli import Settings

Address = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Of this node, for the other one. Default: the only one that there is.")
]


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
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Make configuration and keys of this node, then wait for the other one, which `mirrorfs join CODE` brings."""
    import trio

    from mirrorfs.joining import Invitation, prepare
    from mirrorfs.modules import adding

    chosen: Chosen = context.obj
    # Before anything is written, as far as that can be said then.
    adding.of_options(module, settings or [], vips or [], mount, {"this node": [address] if address else []})
    loaded = prepare(volume, config or chosen.config, node or chosen.node, address, port, mount)
    addresses = {loaded.node.name: (loaded.node.address, *loaded.node.heartbeats)}
    sections = adding.of_options(module, settings or [], vips or [], loaded.mount, addresses)
    if sections and loaded.peer is not None:
        raise UsageError(f"{loaded.file} names both nodes already: `mirrorfs modules add` puts a module there")
    invitation = Invitation(loaded, sections)

    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            code = await nursery.start(invitation.wait, minutes * 60)
            print(f"On the other node, within {minutes:g} minutes:\n\n    mirrorfs join {code}\n", flush=True)
            print(f"waiting for it on {code.address} port {code.port} (Ctrl-C gives up) ...", file=sys.stderr, flush=True)

    trio.run(wait)
    print(f"{invitation.joined} has joined: the nodes of {volume} know each other, {invitation.config.file} names both")


def join(
    context: typer.Context,
    code: Annotated[str, typer.Argument(metavar="CODE", help="What `mirrorfs init` printed on the other node.")],
    *,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of this node, for the other one. Default: that from which it is reached."),
    ] = None,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Take configuration and trust over from the node that gave the code, in one step."""
    import trio

    from mirrorfs.joining import join, parse_code

    chosen: Chosen = context.obj
    loaded = trio.run(join, parse_code(code), config or chosen.config, node or chosen.node, address)
    assert loaded.peer is not None
    print(f"joined {loaded.peer.name}: {loaded.file} is written, the nodes of {loaded.volume} know each other")


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
