"""The commands of the lab, the demo and the benchmark: parse, call, print, exit status."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mirrorfs.errors import ControlError, MirrorfsError, UsageError

# pair is imported inside the commands: every command of mirrorfs imports this file, and pyroute2 takes its time.

app = typer.Typer(
    help="Two hosts on this machine, made of network namespaces, for trying, testing and measuring. Needs root.",
    no_args_is_help=True,
)

_Directory = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Where the lab is. Default: $MIRRORFS_LAB_DIR, else below /var/lib."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Node = Annotated[str, typer.Argument(metavar="NODE", help="one or two")]


def _directory(given: Path | None) -> Path:
    from mirrorfs.lab import pair

    return given or pair.default_directory()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def up(
    directory: _Directory = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of [replication], as ack_timeout=500ms. Repeatable."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a fresh pair; ends when it is mirrored. What an earlier one left behind is cleared first."""
    from mirrorfs.lab.pair import Lab

    options = dict(_key_and_value(setting) for setting in settings or [])
    lab = Lab.up(_directory(directory), options=options, report=_say if not as_json else lambda line: None)
    if as_json:
        print(json.dumps(lab.describe(), indent=2))
    else:
        for host in lab.hosts.values():
            print(f"{host.name}: mounted on {host.mount}")


def _key_and_value(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise UsageError(f"--set {setting}: write KEY=VALUE, as in ack_timeout=500ms")
    return key.strip(), value.strip()


@app.command()
def down(directory: _Directory = None) -> None:
    """End the lab and remove everything of it, whatever state it is in."""
    from mirrorfs.lab.pair import Lab

    Lab(_directory(directory)).down()


@app.command()
def status(directory: _Directory = None, as_json: _Json = False) -> None:
    """Show both nodes, and which way the network between them is cut."""
    from mirrorfs.lab.pair import Lab

    lab = Lab.load(_directory(directory))
    shown = lab.describe()
    for node in shown["nodes"]:
        try:
            node["status"] = lab.host(node["name"]).status()
        except ControlError:
            node["status"] = None
    shown["cut"] = lab.network.cut_senders()
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    for node in shown["nodes"]:
        answer = node["status"] or {"state": "not answering" if node["pids"] else "not running", "reason": ""}
        pids = " ".join(map(str, node["pids"])) or "-"
        print(f"{node['name']}: {answer['state']}  pids {pids}  {node['mount']}  {answer.get('reason') or ''}".rstrip())
    for sender in shown["cut"]:
        print(f"cut: nothing that {sender} sends arrives")


@app.command("exec", context_settings={"ignore_unknown_options": True})
def execute(
    node: _Node,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...")],
    directory: _Directory = None,
) -> None:
    """Run a command on a node's host; its exit status is the command's."""
    from mirrorfs.lab.pair import Lab

    lab = Lab.load(_directory(directory))
    prefix = lab.network.entering(node)
    try:
        os.execvp(prefix[0], [*prefix, *command])  # noqa: S606 - no shell is wanted
    except OSError as error:
        raise MirrorfsError(f"{prefix[0]} cannot be run: {error.strerror}") from error


@app.command()
def kill(node: _Node, directory: _Directory = None) -> None:
    """End all mirrorfs processes of a node with kill -9."""
    from mirrorfs.lab.pair import Lab

    Lab.load(_directory(directory)).host(node).kill()


@app.command()
def start(node: _Node, directory: _Directory = None) -> None:
    """Start a node that was killed or unmounted; ends when it answers."""
    from mirrorfs.lab.pair import Lab

    Lab.load(_directory(directory)).host(node).start()


@app.command()
def cut(
    sender: Annotated[
        str | None,
        typer.Option("--from", metavar="NODE", help="Only what this node sends. Default: both directions."),
    ] = None,
    directory: _Directory = None,
) -> None:
    """Cut the network between the hosts: what is sent does not arrive, and nobody is told."""
    from mirrorfs.lab.pair import Lab

    Lab.load(_directory(directory)).cut(sender)


@app.command()
def heal(directory: _Directory = None) -> None:
    """Undo every cut."""
    from mirrorfs.lab.pair import Lab

    Lab.load(_directory(directory)).heal()


_Place = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Where to work. Default: a fresh directory below /var/tmp, removed at the end."),
]


def demo(directory: _Place = None, as_json: _Json = False) -> None:
    """Lose a primary under load and look for every acknowledged write; takes under a minute, needs root."""
    from mirrorfs.lab import demo as story

    raise typer.Exit(story.run(directory=directory, as_json=as_json))


def bench(
    directory: _Place = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each workload is measured.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each measurement runs.")] = 5.0,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="Only workloads whose name contains this. Repeatable."),
    ] = None,
    glusterfs: Annotated[
        bool, typer.Option("--glusterfs", help="Also GlusterFS, replica 2, which needs glusterfs-server.")
    ] = False,
    others: Annotated[
        list[str] | None, typer.Option("--and", metavar="NAME=DIR", help="Also this directory or mount. Repeatable.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Plot the ratios to native there; needs matplotlib.")
    ] = None,
    returns: Annotated[bool, typer.Option("--returns", help="Measure what the return of a node costs instead.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="With --returns: also a million files, and a million writes alone.")
    ] = False,
    drills: Annotated[bool, typer.Option("--failovers", help="Measure failovers instead, a table of seconds.")] = False,
    attacks: Annotated[
        bool, typer.Option("--attacks", help="Measure what an attacker on the nodes' network costs instead.")
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="With --failovers: how often each.")] = 20,
    drill: Annotated[list[str] | None, typer.Option("--drill", help="With --failovers: this one. Repeatable.")] = None,
) -> None:
    """Measure native, mounted alone and mirrored in one run, and print the ratios; needs root."""
    if drills:
        from mirrorfs.lab import drills as story

        raise typer.Exit(story.run(directory=directory, runs=runs, only=drill or [], as_json=False))
    if attacks:
        from mirrorfs.lab import attacks as attacked

        raise typer.Exit(attacked.run(directory=directory, rounds=rounds, seconds=seconds))
    if returns:
        from mirrorfs.lab import returns as costs

        raise typer.Exit(costs.run(directory=directory, full=full))

    from mirrorfs.lab import bench as measurement

    raise typer.Exit(
        measurement.run(
            directory=directory,
            rounds=rounds,
            seconds=seconds,
            json_file=json_file,
            only=only or [],
            glusterfs=glusterfs,
            others=_named_directories(others or []),
            plot_file=plot_file,
        )
    )


def _named_directories(given: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        name = name.strip()
        if not (equals and name and path):
            raise UsageError(f"--and {text}: write NAME=DIR, as in drbd=/mnt/drbd")
        if name in named:
            raise UsageError(f"--and {text}: there are two of the name {name}")
        named[name] = Path(path)
    return named
