"""The commands of the console: who may use it."""

import getpass
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mirrorfs.cli_base import ConfigFile, Json, NodeName, load
from mirrorfs.console.roles import Role
from mirrorfs.errors import UsageError

app = typer.Typer(
    help="Who may use the console of this node, the web page of its controller: people by password, programs by token.",
    no_args_is_help=True,
)
if TYPE_CHECKING:
    from mirrorfs.console.users import Users

RoleOption = Annotated[Role, typer.Option("--role", help="view: look at everything; operate: press the buttons, too.")]
Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.command()
def user(
    context: typer.Context,
    name: Name,
    *,
    role: RoleOption = Role.VIEW,
    stdin: Annotated[bool, typer.Option("--stdin", help="The password is the first line of standard input.")] = False,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Make a user, or give one a new password and role. Asks for the password."""
    loaded = load(context, config, node)
    if stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        if not sys.stdin.isatty():
            raise UsageError("no terminal to ask for the password: give it on standard input, with --stdin")
        password = getpass.getpass(f"Password of {name}: ")
        if getpass.getpass("Once more: ") != password:
            raise UsageError("the two are not the same")
    _users(context, config, node).add(name, password, role)
    print(f"{name} may {role} on the console of {loaded.node.name}")


@app.command()
def token(
    context: typer.Context, name: Name, *, role: RoleOption = Role.VIEW, config: ConfigFile = None, node: NodeName = None
) -> None:
    """Make a token for a program, as for Prometheus, and print it: it is not shown again."""
    print(_users(context, config, node).add_token(name, role))


@app.command("list")
def list_users(context: typer.Context, as_json: Json = False, config: ConfigFile = None, node: NodeName = None) -> None:
    """List users and tokens with their roles."""
    found = _users(context, config, node).listing()
    if as_json:
        print(json.dumps([{"name": name, "kind": kind, "role": role} for name, kind, role in found]))
        return
    for name, kind, role in found:
        print(f"{name}  {kind}, {role}")
    if not found:
        print("nobody: mirrorfs console user NAME --role operate")


@app.command()
def remove(context: typer.Context, name: Name, config: ConfigFile = None, node: NodeName = None) -> None:
    """Remove a user or a token; who is logged in is out at once."""
    _users(context, config, node).remove(name)
    print(f"{name} is removed")


def _users(context: typer.Context, config: Path | None, node: str | None) -> "Users":
    """Imported late: every command imports this file, and the library for keys takes its time."""
    from mirrorfs.console.users import Users

    return Users(load(context, config, node).node.keys)
