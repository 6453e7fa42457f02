"""Reading a TOML file whose every mistake is told in one line: the file, the key, what is wrong, what to do."""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from mirrorfs.errors import ConfigError

LONGEST_DURATION_S = 24 * 3600.0

_T = TypeVar("_T")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_SCHEDULE_S = 366 * 24 * 3600.0
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]*)")
_RATE_UNITS = {"KiB/s": 2.0**10, "MiB/s": 2.0**20, "GiB/s": 2.0**30}
_LOWEST_RATE = 2.0**10
_HIGHEST_RATE = 2.0**40
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TYPE_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "a whole number",
    float: "a decimal number",
    list: "a list",
    dict: "a table",
}


def rate_bytes_per_s(text: str) -> float:
    """A rate such as "50MiB/s", infinite for "none"; ValueError, with what is wrong with it, if it is none."""
    if text == "none":
        return math.inf
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(
            f'{shown(text)} is not a rate, write a number and a unit, as in "100MiB/s" (KiB/s, MiB/s, GiB/s), or "none"'
        )
    number, unit = match.groups()
    if not unit:
        raise ValueError(f'{shown(text)} has no unit, write it as in "{number}MiB/s" (KiB/s, MiB/s, GiB/s)')
    if unit not in _RATE_UNITS:
        raise ValueError(f"{shown(unit)} is not a unit, use KiB/s, MiB/s or GiB/s")
    rate = float(number) * _RATE_UNITS[unit]
    if rate < _LOWEST_RATE:
        raise ValueError(f"{shown(text)} would never end, make it 1KiB/s or more")
    if rate > _HIGHEST_RATE:
        raise ValueError(f'{shown(text)} limits nothing, make it 1024GiB/s or less, or "none"')
    return rate


class Table:
    """One table of the file: keys are taken out of it; what is left at the end is unknown."""

    def __init__(self, file: Path, where: tuple[str, ...], entries: dict[str, Any]) -> None:
        self._file = file
        self._where = where
        self._rest = dict(entries)
        self._known: list[str] = []

    def error(self, key: str, problem: str, *, whole: bool = False) -> ConfigError:
        """What is wrong with a key of this table, or with the `whole` of it."""
        path = ".".join(key_in_words(part) for part in (self._where if whole else (*self._where, key)))
        return ConfigError(f"{self._file}: {path}: {problem}")

    def take(self, key: str, kind: type[_T], hint: str = "") -> _T | None:
        self._known.append(key)
        if key not in self._rest:
            return None
        value = self._rest.pop(key)
        if type(value) is not kind:  # not isinstance: a boolean is no whole number here
            raise self.error(key, f"is {_TYPE_NAMES.get(type(value), 'a date or time')}, must be {_TYPE_NAMES[kind]}{hint}")
        return value

    def take_table(self, key: str) -> "Table | None":
        entries = self.take(key, dict)
        return None if entries is None else Table(self._file, (*self._where, key), entries)

    def take_tables(self, key: str) -> "list[Table]":
        """The tables of an array of tables; each is known by its place, from 1 on."""
        entries = self.take(key, list) or []
        if not all(isinstance(entry, dict) for entry in entries):
            raise self.error(key, f"is not an array of tables, begin each of them with [[{key}]]")
        return [Table(self._file, (*self._where, f"{key}[{place}]"), entry) for place, entry in enumerate(entries, 1)]

    def take_texts(self, key: str) -> list[str]:
        """A list of strings; empty if the key is missing."""
        values = self.take(key, list)
        if values is None:
            return []
        if not values or not all(isinstance(value, str) and value for value in values):
            raise self.error(key, 'must be a list of strings, as in ["..."]')
        return values

    def take_count(self, key: str, default: int, least: int, most: int) -> int:
        """A whole number within bounds."""
        value = self.take(key, int)
        if value is None:
            return default
        if not least <= value <= most:
            raise self.error(key, f"{value} is out of bounds, use {least} to {most}")
        return value

    def take_path(self, key: str) -> Path | None:
        value = self.take(key, str)
        if value is None:
            return None
        if not value.startswith("/") or "\0" in value:
            raise self.error(key, f"{shown(value)} is not an absolute path, begin it with /")
        return Path(value)

    def take_duration_s(self, key: str, default_s: float, longest_s: float = LONGEST_DURATION_S) -> float:
        value = self.take(key, str, ' with a unit, as in "2s"')
        if value is None:
            return default_s
        match = _DURATION.fullmatch(value)
        if match is None:
            raise self.error(key, f'{shown(value)} is not a duration, write a number and a unit, as in "2s" (ms, s, min, h, d)')
        number, unit = match.groups()
        if not unit:
            raise self.error(key, f'{shown(value)} has no unit, write it as in "{number}s" (ms, s, min, h, d)')
        if unit not in _UNITS_S:
            raise self.error(key, f"{shown(unit)} is not a unit, use ms, s, min, h or d")
        seconds = float(number) * _UNITS_S[unit]
        if seconds <= 0:
            raise self.error(key, f"{shown(value)} is no time at all, make it longer than 0")
        if seconds > longest_s:
            unit = next((unit for unit in ("d", "h") if longest_s > _UNITS_S[unit]), "min")
            longest = f"{longest_s / _UNITS_S[unit]:g}{unit}"
            raise self.error(key, f"{shown(value)} is too long, make it {longest} or less")
        return seconds

    def take_schedule_s(self, key: str, default_s: float | None) -> float | None:
        """A duration, or None for "off"."""
        if self._rest.get(key) == "off":
            self.take(key, str)
            return None
        return self.take_duration_s(key, 0, _LONGEST_SCHEDULE_S) or default_s

    def take_rate(self, key: str, default: float = math.inf) -> float:
        """Bytes a second; infinite for "none"."""
        value = self.take(key, str, ' with a unit, as in "100MiB/s"')
        try:
            return default if value is None else rate_bytes_per_s(value)
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def take_choice(self, key: str, choices: Sequence[str], default: str) -> str:
        value = self.take(key, str)
        if value is not None and value not in choices:
            raise self.error(key, f"{shown(value)} is not known here, use {' or '.join(shown(c) for c in choices)}")
        return default if value is None else value

    def take_rest(self) -> list[str]:
        """The keys of a table that names its own; they count as known."""
        names = list(self._rest)
        self._known += names
        return names

    def reject_rest(self) -> None:
        for key in self._rest:
            close = difflib.get_close_matches(key, self._known, n=1)
            if close:
                raise self.error(key, f"unknown key, did you mean {close[0]}?")
            raise self.error(key, f"unknown key, remove it (known here: {', '.join(self._known)})")


def read(file: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(file.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file, write it or give another with --config FILE") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}), look at its type and mode") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: line {line}: not UTF-8, save the file in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at (.*)\)", str(error))
        problem, place = match.groups() if match else (str(error), "some line")
        raise ConfigError(f"{file}: {place}: not TOML ({problem}), correct it there") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply, this file needs no more than tables in tables") from None


def key_in_words(part: str) -> str:
    """A key as it stands in the file."""
    return part if _BARE_KEY.fullmatch(part) or part.endswith("]") else json.dumps(part)


def shown(value: str) -> str:
    """A value as it stands in the file."""
    return json.dumps(value, ensure_ascii=not value.isprintable())
