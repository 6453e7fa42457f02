"""GlusterFS, replica 2, on two hosts made of network namespaces: what mirrorfs is measured beside.

Its write-behind is off, so that a write returns when both bricks have it, which is what mirrorfs promises. Each host has
a mount namespace of its own, in which the fixed places of glusterd are directories below ours:

    DIR/.mirrorfs-glusterfs              says that what is here is ours to remove
    DIR/mnt                              the volume, mounted by host one
    DIR/HOST/brick                       its half of the volume
    DIR/HOST/glusterd, run, glusterfs    its /var/lib/glusterd, /var/run, /var/log/glusterfs
    DIR/HOST/glusterd.log, client.log    what its daemon, what the mount has printed
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import mounts, processes
from mirrorfs.lab.network import ADDRESSES, Network, run
from mirrorfs.lab.pair import wait_for

_VOLUME = "bench"
_LOG_TAIL_LINES = 10
_MARKER = ".mirrorfs-glusterfs"
_PLACES = {"glusterd": "/var/lib/glusterd", "run": "/var/run", "glusterfs": "/var/log/glusterfs"}

# $1 is the directory of the host, the rest pairs of what is bound and where.
_START = """
home=$1; shift
mount --make-rprivate /
while [ $# -gt 0 ]; do mount --bind "$home/$1" "$2"; shift 2; done
mkdir /var/run/gluster
exec glusterd --no-daemon --log-file="$home/glusterd.log"
"""


def is_missing() -> bool:
    """True if GlusterFS is not installed."""
    return shutil.which("glusterd") is None or shutil.which("gluster") is None


def require() -> None:
    """MirrorfsError if GlusterFS is not installed, or if this is not root."""
    if is_missing():
        raise MirrorfsError("GlusterFS is not installed (Debian: apt-get install glusterfs-server)")
    if os.geteuid() != 0:
        raise MirrorfsError("GlusterFS needs root, for its namespaces and mounts")


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    """A fresh volume in `directory`; what is given is where it is mounted. Everything is removed at the end.

    Raises MirrorfsError if GlusterFS is missing or does not come up, if the directory holds other files, and at the end if
    one of the bricks was not connected all the time.
    """
    require()
    pair = _Pair(directory)
    pair.clear()
    try:
        pair.create()
        yield pair.mount
        pair.check_connected()
    finally:
        pair.clear()


class _Pair:
    """What belongs to `directory`, whether it is there or not; found again from the directory alone."""

    def __init__(self, directory: Path) -> None:
        self._dir = Path(os.path.realpath(directory))
        digest = hashlib.sha256(os.fsencode(self._dir)).hexdigest()[:6]
        self.network = Network(f"mfs-gluster-{digest}")  # those of a lab are mfs-DIGEST
        self.mount = self._dir / "mnt"
        self._client_log = self._dir / "client.log"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def create(self) -> None:
        """Start both hosts, make the volume and mount it; returns when the mount is connected to both bricks."""
        self._dir.mkdir(parents=True, exist_ok=True)
        if any(self._dir.iterdir()):
            raise MirrorfsError(f"{self._dir} holds files that are not the benchmark's: choose another directory with --dir")
        (self._dir / _MARKER).touch()
        self.mount.mkdir()
        self.network.create()
        for host in ADDRESSES:
            self._start(host)
        for host in ADDRESSES:
            wait_for(partial(self._answers, host), f"glusterd answers on host {host}")
        one, two = ADDRESSES
        self._gluster(one, "peer", "probe", ADDRESSES[two])
        for host in ADDRESSES:
            wait_for(partial(self._has_peer, host), f"the other glusterd is a peer of host {host}'s")
        bricks = [f"{address}:{self._dir / host / 'brick'}" for host, address in ADDRESSES.items()]
        # By force, which it wants where the brick is on the file system of /.
        self._gluster(one, "volume", "create", _VOLUME, "replica", str(len(bricks)), *bricks, "force")
        self._gluster(one, "volume", "set", _VOLUME, "performance.write-behind", "off")
        self._gluster(one, "volume", "start", _VOLUME)
        source = f"{ADDRESSES[one]}:/{_VOLUME}"
        mount = ["mount", "-t", "glusterfs", "-o", f"log-file={self._client_log}", source, str(self.mount)]
        run(*self.network.entering(one), *mount)
        wait_for(lambda: self._bricks_up() == len(bricks), "the mount of GlusterFS is connected to both bricks")

    def check_connected(self) -> None:
        """MirrorfsError if the mount was without one of the bricks at any time since it was made."""
        if self._bricks_up() != len(ADDRESSES) or "disconnected from" in self._client_log.read_text(errors="replace"):
            raise MirrorfsError("GlusterFS did not have both bricks all the time, its figures are worth nothing: measure again")

    def clear(self) -> None:
        """End and remove everything of it, or of what is left of it; without any, nothing happens."""
        while alive := [pid for host in ADDRESSES for pid in self.network.pids(host)]:
            processes.kill(processes.find_all(alive))
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        mounts.detach_below(self._dir)
        self.network.remove()
        if (self._dir / _MARKER).exists():
            shutil.rmtree(self._dir)

    def _start(self, host: str) -> None:
        home = self._dir / host
        for name in _PLACES:
            (home / name).mkdir(parents=True)
        bound = [word for name, place in _PLACES.items() for word in (name, place)]
        # Out of reach of Ctrl-C, so that the cleaning finds it in order. Nothing forks: the pid becomes glusterd's.
        self._daemons[host] = subprocess.Popen(
            [*self.network.entering(host), "unshare", "--mount", "sh", "-euc", _START, "sh", str(home), *bound],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _answers(self, host: str) -> bool:
        if self._daemons[host].poll() is not None:
            raise MirrorfsError(f"glusterd has ended at once on host {host}; its log is {self._log_tail(host)}")
        # Not earlier: until it has left the machine's own namespaces, the question would go to a glusterd of the machine.
        if not (self._dir / host / "run" / "glusterd.socket").exists():
            return False
        return self._command(host, "peer", "status").returncode == 0

    def _has_peer(self, host: str) -> bool:
        return "State: Peer in Cluster (Connected)" in self._gluster(host, "peer", "status")

    def _bricks_up(self) -> int:
        """To how many bricks the mount is connected."""
        state = self.mount / ".meta" / "graphs" / "active" / f"{_VOLUME}-replicate-0" / "private"
        return len(re.findall(r"^child_up\[\d+\] = 1$", state.read_text(), re.MULTILINE))

    def _gluster(self, host: str, *words: str) -> str:
        done = self._command(host, *words)
        if done.returncode:
            raise MirrorfsError(f"`gluster {' '.join(words)}` failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _command(self, host: str, *words: str) -> subprocess.CompletedProcess[str]:
        # Where glusterd is, with its socket and its logs.
        entering = ["nsenter", f"--target={self._daemons[host].pid}", "--mount", "--net", "--"]
        return subprocess.run([*entering, "gluster", "--mode=script", *words], capture_output=True, text=True, check=False)

    def _log_tail(self, host: str) -> str:
        log = self._dir / host / "glusterd.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "".join(f"\n  {line}" for line in lines[-_LOG_TAIL_LINES:]) or "empty"
