"""Application modules: services that are ready to be put into a volume's configuration.

A module is a TOML file: what it is for, its parameters, and for each of two ways to run it (a unit of systemd, commands of the
shell) the text of its [[service]] tables, in which $PARAMETER is replaced as `string.Template` does. The file's name is the
module's. Those of /etc/mirrorfs/modules go before those that come with mirrorfs.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Final, NamedTuple, cast

from mirrorfs import config as configuration
from mirrorfs.errors import ConfigError, UsageError
from mirrorfs.failover_config import read_failover
from mirrorfs.toml_table import Table, read, shown

#: Where the modules of a site are.
DIRECTORY: Final = configuration.DIRECTORY / "modules"
WAYS: Final = ("systemd", "commands")

_SHIPPED: Final = Path(__file__).parent
#: Of a module.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_DEFAULT_MOUNT: Final = "/data"
#: sd_booted(3).
_SYSTEMD_RUNS: Final = Path("/run/systemd/system")
#: What has no meaning to the shell, and variables of the environment.
_WORD: Final = re.compile(r"([A-Za-z0-9_./:@%+,=-]|\$[A-Z_][A-Z0-9_]*)+")
_KINDS: Final = {
    "word": (_WORD, "use A-Z a-z 0-9 _ . / : @ % + , = - and $VARIABLES"),
    "path": (
        re.compile(rf"(?=/|\$)(?:{_WORD.pattern})(?<!/)"),
        "begin it with /, do not end it with /, and use A-Z a-z 0-9 _ . / : @ % + , = - and $VARIABLES",
    ),
    "number": (re.compile(r"[0-9]{1,9}"), "use digits"),
    "command": (re.compile(r".+"), "write something, on one line"),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """What can be set of a module; without a `default` it has to be. A default may name parameters that stand before it."""

    name: str
    about: str
    default: str | None
    kind: str = "word"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the application: parameters of its own, and the text of its [[service]] tables."""

    parameters: tuple[Parameter, ...]
    configuration: str


@dataclass(frozen=True, slots=True)
class Module:
    """One module, as it stands in its `file`."""

    name: str
    file: Path
    summary: str
    description: str
    parameters: tuple[Parameter, ...]
    ways: Mapping[str, Way]

    @property
    def is_shipped(self) -> bool:
        """Whether it came with mirrorfs."""
        return self.file.parent == _SHIPPED


class Value(NamedTuple):
    """A parameter, and what it is now."""

    parameter: Parameter
    value: str
    is_set: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A module with its parameters set: `services` is TOML, the [[service]] tables named in `names`."""

    description: str
    values: tuple[Value, ...]
    services: str
    names: tuple[str, ...]


# ---- finding and reading


def find_all(directory: Path = DIRECTORY) -> dict[str, Path]:
    """The files of all modules by their names, in order; one of `directory` hides one that came with mirrorfs."""
    found = {file.stem: file for place in (_SHIPPED, directory) for file in place.glob("*.toml") if NAME.fullmatch(file.stem)}
    return dict(sorted(found.items()))


def find(name: str, directory: Path = DIRECTORY) -> Module:
    """The module of that name. Raises UsageError if there is none, ConfigError if it is wrong."""
    files = find_all(directory)
    if name not in files:
        raise UsageError(f"there is no module {shown(name)}, neither in {directory} nor with mirrorfs: {', '.join(files)}")
    return read_module(files[name])


def read_module(file: Path) -> Module:
    """The module in a file. Raises ConfigError, of one line."""
    top = Table(file, (), read(file))
    summary = top.take("summary", str)
    if not summary:
        raise top.error("summary", "missing, say in one line what the module is for")
    description = top.take("description", str) or ""
    parameters = _read_parameters(top, ())
    ways = {}
    for name in WAYS:
        if (part := top.take_table(name)) is not None:
            text = part.take("configuration", str)
            own = _read_parameters(part, [parameter.name for parameter in parameters])
            part.reject_rest()
            if text is None:
                raise part.error("configuration", "missing, write the [[service]] tables there, between ''' and '''")
            ways[name] = Way(own, text)
    top.reject_rest()
    if not ways:
        raise top.error("commands", "missing, add [commands] or [systemd] with a configuration")
    return Module(file.stem, file, summary, description, parameters, ways)


def _read_parameters(table: Table, known: Sequence[str]) -> tuple[Parameter, ...]:
    parts = table.take_table("parameters")
    return () if parts is None else tuple(_read_parameter(parts, name, known) for name in parts.take_rest())


def _read_parameter(parts: Table, name: str, known: Sequence[str]) -> Parameter:
    part = cast(Table, parts.take_table(name))
    parameter = Parameter(
        name,
        about=part.take("about", str) or "",
        default=part.take("default", str),
        kind=part.take_choice("kind", tuple(_KINDS), "word"),
    )
    part.reject_rest()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise parts.error(name, "is no name of a parameter, use a-z 0-9 _ beginning with a letter")
    if name in known or name in ("name", "mount", "run"):
        raise parts.error(name, "is there already, every module has name, mount and run: give it another name")
    return parameter


# ---- setting the parameters


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE, as given with --set; UsageError for what is none, or is there twice."""
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {shown(setting)}: write KEY=VALUE, as in port=5432")
        if key in found:
            raise UsageError(f"--set {key}: is there twice")
        found[key] = value
    return found


def render(module: Module, settings: Mapping[str, str], mount: Path | None = None) -> Rendered:
    """The module with these settings, for a volume that is mounted at `mount`.

    Raises UsageError for a setting that cannot be, ConfigError for a module that does not come to [[service]] tables.
    """
    run = settings.get("run") or ("systemd" if _SYSTEMD_RUNS.is_dir() and "systemd" in module.ways else "commands")
    if run not in module.ways:
        if "run" in settings:
            raise UsageError(f"--set run: module {module.name} runs with {' or '.join(module.ways)}, not with {shown(run)}")
        (run,) = module.ways
    way = module.ways[run]
    parameters = {
        parameter.name: parameter
        for parameter in (
            Parameter("name", "of the service", module.name),
            Parameter("mount", "where the volume is mounted", str(mount or _DEFAULT_MOUNT), "path"),
            Parameter("run", f"by a unit or by commands: {' or '.join(module.ways)}", run),
            *module.parameters,
            *way.parameters,
        )
    }
    for key in settings:
        if key not in parameters:
            close = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(parameters)}"
            raise UsageError(f"--set {key}: module {module.name} has no such parameter with run={run}, {hint}")
    values: dict[str, str] = {}
    for name, parameter in parameters.items():
        values[name] = _value(module, parameter, settings, values)
    escaped = {name: _escaped(value) for name, value in values.items()}
    services = _substituted(module, f"{run}.configuration", way.configuration, escaped).strip() + "\n"
    return Rendered(
        description=_substituted(module, "description", module.description, values).strip(),
        values=tuple(Value(parameter, values[name], name in settings) for name, parameter in parameters.items()),
        services=services,
        names=_checked_names(module, run, services),
    )


def _value(module: Module, parameter: Parameter, settings: Mapping[str, str], before: Mapping[str, str]) -> str:
    pattern, hint = _KINDS[parameter.kind]
    if parameter.name in settings:
        value = settings[parameter.name]
        if not value.isprintable() or not pattern.fullmatch(value):
            raise UsageError(f"--set {parameter.name}: {shown(value)} cannot be, {hint}")
        return value
    if parameter.default is None:
        raise UsageError(f"module {module.name} has to be told with --set {parameter.name}=...: {parameter.about}")
    value = _substituted(module, f"default of {parameter.name}", parameter.default, before)
    if not value.isprintable() or not pattern.fullmatch(value):
        raise ConfigError(f"{module.file}: default of {parameter.name}: {shown(value)} cannot be, {hint}")
    return value


def _escaped(value: str) -> str:
    """As it stands between quotes in TOML; a JSON string is one."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def _substituted(module: Module, where: str, text: str, values: Mapping[str, str]) -> str:
    try:
        return Template(text).substitute(values)
    except KeyError as error:
        raise ConfigError(f"{module.file}: {where}: ${error.args[0]} is no parameter; a $ of the shell is written $$") from None
    except ValueError as error:
        raise ConfigError(f"{module.file}: {where}: {error}; a $ of the shell is written $$") from None


def _checked_names(module: Module, run: str, services: str) -> tuple[str, ...]:
    """The names of the services in it."""
    where = f"{module.file}: {run}.configuration"
    try:
        content = tomllib.loads(services)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML ({error}), `mirrorfs modules new` makes one to begin with") from None
    if set(content) != {"service"}:
        raise ConfigError(f"{where}: has to have [[service]] tables and nothing else")
    table = Table(Path(where), (), {"failover": {}} | content)
    failover = read_failover(table.take_table("failover"), [], table.take_tables("service"), volume="", nodes={})
    assert failover is not None
    return tuple(service.name for service in failover.services)
