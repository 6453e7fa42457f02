"""The commands with which two nodes come to know each other."""

import sys
from typing import Annotated

import typer

from mirrorfs.cli_base import Chosen, ConfigFile, NodeName
from mirrorfs.config import DEFAULT_PORT

Address = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Of this node, for the other one. Default: the only one that there is.")
]


def init(
    context: typer.Context,
    volume: Annotated[str, typer.Argument(metavar="NAME", help="Of the volume: 1 to 32 of A-Z a-z 0-9 _ -")],
    *,
    address: Address = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On which the other node connects.")] = DEFAULT_PORT,
    minutes: Annotated[float, typer.Option(min=0.1, max=1440, help="So long the code is good.")] = 15,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Make configuration and keys of this node, then wait for the other one, which `mirrorfs join CODE` brings."""
    import trio

    from mirrorfs.joining import Invitation, prepare

    chosen: Chosen = context.obj
    invitation = Invitation(prepare(volume, config or chosen.config, node or chosen.node, address, port))

    async def wait() -> None:
        async with trio.open_nursery(strict_exception_groups=False) as nursery:
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
