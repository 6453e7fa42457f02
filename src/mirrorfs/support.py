"""`mirrorfs support`: what somebody who helps has to see, in one archive, and no secrets.

What is in it is listed in `_PARTS`, each part by itself: one that cannot be had says why in its place. Keys, passwords and the
commands of services, which may carry some, are never read into it; names and contents of the volume's files are not looked at.
"""

import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from mirrorfs import __version__, control, toml_table
from mirrorfs.config import Config
from mirrorfs.doctor import examine
from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import flatten

_ANSWER_S: Final = 5.0
_LOG_LINES: Final = 5000
#: Commands, which may have secrets among their words, and logins.
_LEFT_OUT: Final = re.compile(r".*\b(start|stop|command|kill|vip_up|vip_down|user)$")
_USER_IN_URL: Final = re.compile(r"//[^/@\s\"]*@")
_LIBRARIES: Final = (
    "cryptography",
    "httpx",
    "hypercorn",
    "msgpack",
    "prometheus-client",
    "pyfuse3",
    "pyroaring",
    "pyroute2",
    "rich",
    "starlette",
    "trio",
    "typer",
)


def collect(config: Config, file: Path, *, log: Path | None = None) -> list[str]:
    """Write the archive (tar, gzip; mode 0600); returns the names of its parts. `log` is where the mount's output goes, if not
    to systemd's journal. Raises MirrorfsError if it cannot be written, or something is there."""
    parts = _parts(config, log)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, part in parts.items():
                content = _said(part).encode(errors="replace")
                entry = tarfile.TarInfo(f"mirrorfs-support/{name}")
                entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
                archive.addfile(entry, io.BytesIO(content))
    except FileExistsError:
        raise MirrorfsError(f"{file}: is there already, give another name") from None
    except OSError as error:
        raise MirrorfsError(f"{file}: cannot be written ({error.strerror})") from None
    return list(parts)


def _parts(config: Config, log: Path | None) -> dict[str, Callable[[], str]]:
    node = config.node
    return {
        "versions": _versions,
        "configuration": lambda: _configuration(config),
        "doctor": lambda: "\n".join(f"{f.grade.value:8} {f.about}: {f.found} {f.advice}" for f in examine(config, None)),
        "status.json": lambda: _status(node.control),
        "controller.json": lambda: _status(node.controller),
        "state-directory": lambda: _listing(node.state_dir),
        "events": lambda: _lines(node.state_dir / "console-events.jsonl"),
        "keys-directory": lambda: _listing(node.keys),
        "mounts": lambda: Path("/proc/self/mountinfo").read_text(),
        "network": lambda: _output("ip", "-s", "address"),
        "processes": lambda: _output("ps", "-eo", "pid,ppid,user,stat,etime,time,rss,comm"),
        "memory": lambda: Path("/proc/meminfo").read_text(),
        "disks": lambda: _output("df", "-hT"),
        "log": lambda: _log(config, log),
    }


def _said(part: Callable[[], str]) -> str:
    try:
        return part()
    except Exception as error:  # one part less, and not no archive
        return f"(not to be had: {error})\n"


def _versions() -> str:
    lines = [f"mirrorfs {__version__}", f"Python {sys.version}", platform.platform()]
    for library in _LIBRARIES:
        try:
            lines.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{library} is not installed")
    return "\n".join(lines) + "\n"


def _configuration(config: Config) -> str:
    """The file, key by key, without what may be secret."""
    lines = []
    for key, text in flatten(toml_table.read(config.file)).items():
        shown = f"(left out: {len(text)} characters)" if _LEFT_OUT.fullmatch(key) else _USER_IN_URL.sub("//(left out)@", text)
        lines.append(f"{key} = {shown}")
    return f"# {config.file}, as node {config.node.name}\n" + "\n".join(lines) + "\n"


def _status(path: Path) -> str:
    status: dict[str, Any] = control.request(path, "status", _ANSWER_S)
    return json.dumps(status, indent=1) + "\n"


def _listing(directory: Path) -> str:
    """Names, modes, sizes and times in a directory of ours."""
    lines = []
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.st_mtime))
        lines.append(
            f"{status.st_mode:07o} {status.st_uid}:{status.st_gid} {status.st_size:>12} {when} {path.relative_to(directory)}"
        )
    return f"# {directory}\n" + "\n".join(lines) + "\n"


def _lines(file: Path) -> str:
    """The newest of a file."""
    return "".join(file.read_text(errors="replace").splitlines(keepends=True)[-_LOG_LINES:])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False, stdin=subprocess.DEVNULL)
    return done.stdout or f"(not to be had: {' '.join(command)} says: {done.stderr.strip()})\n"


def _log(config: Config, log: Path | None) -> str:
    if log is not None:
        return _lines(log)
    units = [f"--unit=mirrorfs@{config.volume}", f"--unit=mirrorfs-controller@{config.volume}"]
    return _output("journalctl", "--no-pager", f"--lines={_LOG_LINES}", "--output=short-iso", *units)
