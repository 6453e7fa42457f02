"""Writing a configuration: only what is one, as a whole, durably, and in the place of a link's target."""

import stat
from pathlib import Path
from typing import Final

from mirrorfs import config as configuration
from mirrorfs.errors import ConfigError, MirrorfsError
from mirrorfs.files import write_durably

_NEW_MODE: Final = 0o644


def check(file: Path, text: str, node: str) -> None:
    """ConfigError, as of that file, if it would be none with this text; nothing is changed. Raises MirrorfsError."""
    beside = file.resolve().with_name(f".{file.name}.checked")
    _write(beside, text, 0o600)
    try:
        configuration.load(beside, node)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(beside), str(file), 1)) from None
    finally:
        beside.unlink()


def write(file: Path, text: str) -> None:
    """Put a text there; a link stays one, and mode and owner are those of the file that was there. Raises MirrorfsError."""
    target = file.resolve()
    if not target.exists():
        _write(target, text, _NEW_MODE)
    else:
        there = target.stat()
        _write(target, text, stat.S_IMODE(there.st_mode), (there.st_uid, there.st_gid))


def _write(file: Path, text: str, mode: int, owner: tuple[int, int] | None = None) -> None:
    try:
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_durably(file, text.encode(), mode, owner)
    except OSError as error:
        raise MirrorfsError(f"{file}: cannot be written ({error.strerror}), are you root?") from None
