"""The commands of application modules: list, show, new, add."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mirrorfs import config as configuration
from mirrorfs import modules
from mirrorfs.cli_base import Chosen, ConfigFile, Json, NodeName, load
from mirrorfs.errors import ConfigError

app = typer.Typer(
    help="Ready-made services for databases and other applications, and your own (docs/MODULES.md).", no_args_is_help=True
)

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the module. Repeatable.")
]
_Module = Annotated[str, typer.Argument(metavar="NAME")]
_Directory = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where modules of your own are.")]


@app.command("list")
def list_modules(as_json: Json = False, directory: _Directory = modules.DIRECTORY) -> None:
    """List the modules, and where each is from."""
    found = []
    for name, file in modules.find_all(directory).items():
        try:
            module = modules.read_module(file)
        except ConfigError as error:
            found.append({"name": name, "from": str(file), "summary": "", "error": str(error)})
        else:
            place = "mirrorfs" if module.is_shipped else str(file)
            found.append({"name": name, "from": place, "summary": module.summary, "error": ""})
    if as_json:
        print(json.dumps(found))
        return
    name_width, place_width = (max(len(each[key]) for each in found) for key in ("name", "from"))
    for each in found:
        print(f"{each['name']:{name_width}}  {each['from']:{place_width}}  {each['error'] or each['summary']}")


@app.command()
def show(
    context: typer.Context,
    name: _Module,
    settings: Settings = None,
    directory: _Directory = modules.DIRECTORY,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Show what a module needs, its parameters, and what it adds to a configuration. All of it is TOML."""
    chosen: Chosen = context.obj
    file = configuration.find_if_any(config or chosen.config)
    mount = None if file is None else configuration.load(file, node or chosen.node).mount
    module = modules.find(name, directory)
    rendered = modules.render(module, modules.parse_settings(settings or []), mount)

    from mirrorfs.modules.adding import sections

    print(f"# {module.name}: {module.summary}")
    print("#", *(f"# {line}".rstrip() for line in rendered.description.splitlines()), "#", "# parameters:", sep="\n")
    for parameter, value, _ in rendered.values:
        print(f"#   {parameter.name} = {value}{f'  ({parameter.about})' if parameter.about else ''}")
    print(f"\n{sections(rendered.services)}", end="")


@app.command()
def new(
    name: _Module,
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where it is put.")] = modules.DIRECTORY,
) -> None:
    """Write the skeleton of a module of your own, which works, with comments."""
    from mirrorfs.modules.adding import new

    print(f"{new(name, directory)} is written: change it, then `mirrorfs modules show {name}` says what it comes to")


@app.command()
def add(
    context: typer.Context,
    name: _Module,
    settings: Settings = None,
    directory: _Directory = modules.DIRECTORY,
    config: ConfigFile = None,
    node: NodeName = None,
) -> None:
    """Add a module's services to the volume's configuration. Do the same on the other node: the file is the same on both."""
    from mirrorfs.modules.adding import add

    loaded = load(context, config, node)
    rendered = modules.render(modules.find(name, directory), modules.parse_settings(settings or []), loaded.mount)
    add(loaded, rendered)
    print(f"{loaded.file}: service {', '.join(rendered.names)} is added. Do the same on the other node; then start the")
    print("mount and the controller again, on the standby first (docs/MODULES.md)")
