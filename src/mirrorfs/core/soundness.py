"""What an operation that came over the wire must be to mean something."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final

from mirrorfs.core import operations as ops

_MAX: Final = (1 << 63) - 1

Check = Callable[[object], bool]


def check(operation: ops.Operation) -> None:
    """Raise ValueError unless the operation can mean something: ids, names and numbers as a primary sends them.

    A name that is more than a name would lead out of the tree.
    """
    if isinstance(operation, ops.Entry) and (operation.file, operation.parent, operation.name) == (1, 0, b""):
        operation = replace(operation, parent=1, name=b"root")  # the root has neither
    for (name, is_sound), value in zip(_CHECKS[type(operation)], ops.values(operation), strict=True):
        if not is_sound(value):
            raise ValueError(f"{name} {value!r}"[:100])


def _is_id(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX


def _is_allocate_mode(value: object) -> bool:
    return type(value) is int and value in ops.ALLOCATE_MODES


def _is_copy_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= ops.MAX_COPY


def _is_time(value: object) -> bool:
    return type(value) is int and -_MAX <= value <= 2 * _MAX


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_bytes(value: object) -> bool:
    return type(value) is bytes


def is_name(value: object) -> bool:
    """Whether this can be a name in a directory: one that is more would lead out of the tree."""
    return (
        type(value) is bytes
        and 0 < len(value) <= 255
        and b"/" not in value
        and b"\0" not in value
        and value not in (b".", b"..")
    )


def _is_xattr_name(value: object) -> bool:
    return type(value) is bytes and 0 < len(value) <= 255 and b"\0" not in value


def _is_entry(value: object) -> bool:
    return value == b"" or is_name(value)


def _is_path(value: object) -> bool:
    return type(value) is bytes and (value == b"" or all(map(is_name, value.split(b"/"))))


def _are_pairs(first: Check, second: Check) -> Check:
    def are_sound(value: object) -> bool:
        return type(value) is tuple and all(
            type(pair) is tuple and len(pair) == 2 and first(pair[0]) and second(pair[1]) for pair in value
        )

    return are_sound


_are_xattrs: Final = _are_pairs(_is_xattr_name, _is_bytes)


def _are_files(value: object) -> bool:
    """Field by field, for all files at once: of the many that come together each costs a part of what `check` would."""
    if type(value) is not tuple or any(type(file) is not ops.WholeFile for file in value):
        return False
    if not value:
        return True
    names, numbers, modes, uids, gids, times, xattrs, data = zip(*value, strict=True)
    return (
        _are_names(names)
        and _are_within(numbers, 1, _MAX)
        and _are_within(modes + uids + gids, 0, _MAX)
        and _are_within(times, -_MAX, 2 * _MAX)
        and all(given == () or _are_xattrs(given) for given in xattrs)
        and set(map(type, data)) == {bytes}
    )


def _are_names(values: tuple[Any, ...]) -> bool:
    if set(map(type, values)) != {bytes}:
        return False
    together = b"".join(values)
    lengths = set(map(len, values))
    return (
        min(lengths) > 0
        and max(lengths) <= 255
        and not any(bad in together for bad in (b"/", b"\0"))
        and {b".", b".."}.isdisjoint(values)
    )


def _are_within(values: tuple[Any, ...], least: int, most: int) -> bool:
    return set(map(type, values)) == {int} and min(values) >= least and max(values) <= most


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_CHECK_OF: Final[dict[str, Check]] = {
    **dict.fromkeys(("file", "parent", "new_parent", "directory", "source"), _is_id),
    **dict.fromkeys(
        ("mode", "uid", "gid", "rdev", "size", "flags", "number", "new_from", "offset", "source_offset"), _is_number
    ),
    **dict.fromkeys(("atime_ns", "mtime_ns"), _is_time),
    **dict.fromkeys(("data_only", "gone", "complete", "last"), _is_flag),
    **dict.fromkeys(("name", "new_name"), is_name),
    "entry": _is_entry,
    "path": _is_path,
    "ranges": _are_pairs(_is_number, _is_number),
    "xattrs": _are_xattrs,
    "names": _are_pairs(is_name, _is_number),
    "files": _are_files,
}


#: Fields that mean something else than those of the same name in other operations.
_SPECIAL: Final[dict[tuple[type, str], Check]] = {
    (ops.SetXattr, "name"): _is_xattr_name,
    (ops.RemoveXattr, "name"): _is_xattr_name,
    (ops.Allocate, "mode"): _is_allocate_mode,
    (ops.CopyRange, "size"): _is_copy_size,
    (ops.Times, "files"): _are_pairs(_is_id, _is_time),
}


def _check_of(operation: type, field: str) -> Check:
    check = _SPECIAL.get((operation, field)) or _CHECK_OF.get(field, _is_bytes)
    return _or_none(check) if operation is ops.SetAttributes and field != "file" else check


_CHECKS: Final = {kind: [(field.name, _check_of(kind, field.name)) for field in fields(kind)] for kind in ops.KINDS}
