"""`mirrorfs doctor`: does this machine have what a node needs, and does its node have what a pair needs?

Each check looks at one thing and says what it found; what is not well says what to do about it. Nothing is changed, nothing is
loaded, and no check waits longer than `_ANSWER_S` for anybody.
"""

import contextlib
import errno
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from mirrorfs import backing, control
from mirrorfs.config import Config
from mirrorfs.errors import MirrorfsError
from mirrorfs.kernel.loop import is_supported
from mirrorfs.trust import Trust

_ANSWER_S: Final = 3.0
_LEAST_FREE_BYTES: Final = 1 << 30
_LEAST_STATE_BYTES: Final = 100 << 20
_FEW_FILES: Final = 65_536


class Grade(Enum):
    """How well a thing is: `BAD` keeps a node from working, `POOR` makes it less than it should be."""

    GOOD = "ok"
    POOR = "warning"
    BAD = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing, and for what is not well what to do."""

    about: str
    grade: Grade
    found: str
    advice: str = ""


Check = Callable[[], Finding]


def examine(config: Config | None, path: Path | None) -> Iterator[Finding]:
    """Look at the machine, and at the node of `config` with its files at `path`, as far as they are given."""
    checks: list[Check] = [_root, _fuse, _kernel, _descriptors, _clock]
    if path is not None:
        checks += [lambda: _attributes(path), lambda: _room("the files", path, _LEAST_FREE_BYTES)]
    if config is not None:
        state = config.node.state_dir
        checks += [lambda: _address(config), lambda: _room("the state directory", state, _LEAST_STATE_BYTES)]
        if config.peer is not None:
            checks += [lambda: _keys(config), lambda: _node(config), lambda: _peer(config)]
        if config.arbiter.kind != "none":
            checks += [lambda: _arbiter(config)]
        if config.failover is not None:
            checks += [lambda: _controller(config)]
    for check in checks:
        yield check()


# ---- the machine


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("user", Grade.GOOD, "root")
    return Finding("user", Grade.BAD, f"user {os.geteuid()}", "mirrorfs mounts, adopts and sets owners: run it as root")


def _fuse() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = "modprobe fuse" if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else "run it as root"
        return Finding("/dev/fuse", Grade.BAD, f"cannot be opened ({error.strerror})", advice)
    return Finding("/dev/fuse", Grade.GOOD, "can be opened")


def _kernel() -> Finding:
    release = os.uname().release
    if is_supported():
        return Finding("kernel", Grade.GOOD, f"Linux {release}")
    return Finding("kernel", Grade.POOR, f"Linux {release}", "from Linux 5.11 on mirrorfs is several times as fast")


def _descriptors() -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= _FEW_FILES:
        return Finding("open files", Grade.GOOD, f"up to {most}")
    return Finding(
        "open files", Grade.POOR, f"up to {most}", f"allow at least {_FEW_FILES}: LimitNOFILE= of the unit, or ulimit -Hn"
    )


def _clock() -> Finding:
    if backing.clock_is_kept():
        return Finding("clock", Grade.GOOD, "is kept by a time service")
    advice = "run chrony or systemd-timesyncd: promises do not need it, certificates and the times in logs do"
    return Finding("clock", Grade.POOR, "no time service keeps it", advice)


# ---- where the files are


def _existing(path: Path) -> Path:
    """The path, or as much of it as is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _attributes(path: Path) -> Finding:
    """`trusted.` attributes and file handles, which ids and descriptors of known files need."""
    about = "extended attributes"
    place = _existing(path)
    if backing.is_ours(place):
        return Finding(about, Grade.GOOD, f"{path} is mounted already")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".mirrorfs-doctor-") as file:
            os.setxattr(file.fileno(), "trusted.mirrorfs.doctor", b"1")
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            advice = "put the files on ext4, XFS or btrfs: this file system has no trusted attributes"
        elif error.errno == errno.EPERM:
            advice = "run it as root; a directory that was adopted already (chattr +i) is looked at while it is mounted"
            return Finding(about, Grade.POOR, f"{place}: cannot be tried ({error.strerror})", advice)
        else:
            advice = "see what is wrong with the directory"
        return Finding(about, Grade.BAD, f"{place}: {error.strerror}", advice)
    return Finding(about, Grade.GOOD, f"{place} has them")


def _room(what: str, path: Path, least: int) -> Finding:
    place = _existing(path)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(f"room for {what}", Grade.BAD, f"{place}: {error.strerror}", "see what is wrong with the directory")
    found = f"{free / 2**30:.1f} GiB free at {place}"
    if free >= least:
        return Finding(f"room for {what}", Grade.GOOD, found)
    return Finding(f"room for {what}", Grade.POOR, found, "make room: a node whose disk is full leaves the pair")


# ---- the node


def _address(config: Config) -> Finding:
    about, node = "address", config.node
    try:
        ((family, kind, protocol, _, target), *_) = socket.getaddrinfo(node.address, 0, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
    except OSError as error:
        advice = f"give nodes.{node.name}.address one of this machine's addresses, or bring the interface up"
        return Finding(about, Grade.BAD, f"{node.address}: {error.strerror or error}", advice)
    return Finding(about, Grade.GOOD, f"{node.address} is this machine's")


def _keys(config: Config) -> Finding:
    trust = Trust(config.node.keys)
    try:
        trust.check()
    except MirrorfsError as error:
        found, _, advice = str(error).partition(": ")
        return Finding("keys", Grade.BAD, found, advice)
    if config.node.keys.joinpath("link.pem").exists() and (warning := trust.warning()):
        return Finding("keys", Grade.POOR, warning, "is the mount running? It makes certificates anew long before they end")
    return Finding("keys", Grade.GOOD, f"this node's and the other one's are in {config.node.keys}")


def _status(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(MirrorfsError):
        return control.request(path, "status", _ANSWER_S)
    return None


def _node(config: Config) -> Finding:
    about = "the mount"
    status = _status(config.node.control)
    if status is None:
        return Finding(about, Grade.POOR, f"does not run (nobody answers on {config.node.control})", "mirrorfs mount PATH")
    if status.get("warning"):
        return Finding(about, Grade.POOR, str(status["warning"]), "see its log")
    found = f"{status['state']}, epoch {status['epoch']}: {status['reason']}"
    if status["state"] in ("primary", "standby"):
        return Finding(about, Grade.GOOD, found)
    return Finding(about, Grade.POOR, found, "`mirrorfs status` says what protects the data now")


def _peer(config: Config) -> Finding:
    peer = config.peer
    assert peer is not None
    about = "the other node"
    status = _status(config.node.control)
    if status is not None and status["peer"]["state"] != "disconnected":
        return Finding(about, Grade.GOOD, f"{peer.name} is connected")
    dialled = config.node.name > peer.name
    port = peer.port if dialled else config.node.port
    if not dialled:
        found = f"{peer.name} is not connected; it dials this node, {config.node.address} port {port}"
        return Finding(about, Grade.POOR, found, "does its mount run, and may it reach this port?")
    try:
        with socket.create_connection((peer.address, port), _ANSWER_S, (config.node.address, 0)):
            pass
    except OSError as error:
        found = f"{peer.address} port {port}: {error.strerror or error}"
        return Finding(about, Grade.POOR, found, "does its mount run, and is the port open in the firewalls?")
    return Finding(about, Grade.GOOD, f"{peer.address} port {port} can be reached")


def _arbiter(config: Config) -> Finding:
    status = _status(config.node.control)
    if status is None:
        return Finding("the arbiter", Grade.POOR, "was not asked: the mount does, and it does not run", "mirrorfs mount PATH")
    arbiter = status["arbiter"]
    if arbiter["answers"]:
        return Finding("the arbiter", Grade.GOOD, f"{arbiter['name']} answers")
    advice = "bring it back: as long as it is gone, a node that is lost is not taken over from by itself"
    return Finding("the arbiter", Grade.POOR, f"{arbiter['name']} does not answer: {arbiter['why']}", advice)


def _controller(config: Config) -> Finding:
    about = "the controller"
    status = _status(config.node.controller)
    if status is None:
        return Finding(about, Grade.POOR, "does not run: nothing fails over by itself", "mirrorfs controller")
    return Finding(about, Grade.GOOD, "runs")
