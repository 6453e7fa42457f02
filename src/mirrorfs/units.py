"""The units of systemd that run a node: which they are, what keeps them from being started here, and starting them."""

import subprocess
from pathlib import Path
from typing import Final

from mirrorfs import config as configuration
from mirrorfs import control
from mirrorfs.config import Config
from mirrorfs.errors import MirrorfsError

#: Is there while systemd is the first process (sd_booted(3)).
_BOOTED: Final = Path("/run/systemd/system")
_ANSWER_S: Final = 10.0
#: A unit has 90 s to start, and no longer to end if it does not.
_START_S: Final = 240.0


def mount_unit(config: Config) -> str:
    """That of the mount."""
    return f"mirrorfs@{config.file.stem}.service"


def controller_unit(config: Config) -> str:
    """That of the controller; "" if the configuration asks for none."""
    return f"mirrorfs-controller@{config.file.stem}.service" if config.failover else ""


def names(config: Config) -> list[str]:
    """All of them, in the order in which they are started."""
    return list(filter(None, (mount_unit(config), controller_unit(config))))


def why_not(config: Config) -> str:
    """Why they cannot be started here; "" if they can."""
    if not _BOOTED.is_dir():
        return "systemd does not run here"
    if config.file.parent != configuration.DIRECTORY:
        return f"the units read {configuration.DIRECTORY}/NAME.toml, and this is {config.file}"
    for name in names(config):
        if _systemctl("cat", name).returncode:
            return f"{name} is not installed here"
    if config.mount is None:
        return f'{config.file} does not say where the volume is mounted: add mount = "/data" as one of its first lines'
    return ""


def by_hand(config: Config, *, set_aside: bool = False) -> list[str]:
    """The commands with which a person makes this machine ready and starts the node, for each a line."""
    chosen = "" if config.file.parent == configuration.DIRECTORY else f" --config {config.file}"
    is_to_be_prepared = config.failover and any(service.prepare for service in config.failover.services)
    first = [f"mirrorfs{chosen} prepare{' --set-aside' if set_aside else ''}"] if is_to_be_prepared or set_aside else []
    if _BOOTED.is_dir() and not chosen and not _systemctl("cat", *names(config)).returncode:
        return [*first, f"systemctl enable --now {' '.join(name.removesuffix('.service') for name in names(config))}"]
    where = "" if config.mount else " PATH"
    return [*first, f"mirrorfs{chosen} mount{where}", *([f"mirrorfs{chosen} controller"] if config.failover else [])]


def is_running(socket: Path) -> bool:
    """Whether somebody answers, or at least listens, on a control socket."""
    try:
        control.request(socket, "status", timeout_s=_ANSWER_S)
    except control.NotRunningError:
        return False
    except MirrorfsError:
        return True
    return True


def start(name: str) -> None:
    """Start a unit, now and with every boot; returns when it is ready. MirrorfsError with what it said if it does not start."""
    try:
        done = _systemctl("enable", "--now", name, timeout_s=_START_S)
    except _NoAnswerError:
        raise MirrorfsError(f"{name}: is not ready after {_START_S:g} s: `journalctl -u {name}` says what it does") from None
    if done.returncode:
        raise MirrorfsError(f"{name}: does not start: {_last_words(name) or _one_line(done.stderr)} (`journalctl -u {name}`)")


def make_mount_point(config: Config) -> bool:
    """Make the directory where the volume is mounted if it is not there; whether it was made. MirrorfsError if it cannot be."""
    assert config.mount is not None
    try:
        if config.mount.is_dir():
            return False
        config.mount.mkdir(parents=True)
    except OSError as error:
        raise MirrorfsError(f"{config.mount}: cannot be made: {error.strerror}") from None
    return True


class _NoAnswerError(MirrorfsError):
    """systemd is busy, or waits for what it was asked for."""


def _last_words(name: str) -> str:
    """What the program of the unit said last, and not what systemd says of it."""
    command = ("journalctl", "--quiet", "--unit", name, "--identifier=mirrorfs", "--lines=1", "--output=cat", "--boot")
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return _one_line(said).removeprefix("mirrorfs: ")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _systemctl(*arguments: str, timeout_s: float = _ANSWER_S) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ("systemctl", "--quiet", *arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"systemctl {arguments[0]} has not answered within {timeout_s:g} s") from None
    except FileNotFoundError:
        raise MirrorfsError("systemctl is not installed, though systemd runs here") from None
