"""Disks of their own for the hosts of a lab, so that their power can be cut.

    DIR/disks/pool           a sparse file, through a loop device the XFS file system of all disks
    DIR/disks/mounted/NODE   a host's disk: an image in it, through a loop device an ext4 file system
    DIR/NODE/disk            that ext4 mounted; its `data` and `state` are bound over DIR/NODE/data and DIR/NODE/state, so
                             that a power cut takes the files underneath and the node's own state at the same instant

Between an application's write and the image stand the page cache of the ext4 and its journal that is not written yet: both
are memory, which a power cut takes. What the ext4 has written has arrived in the image, where it counts as being on the disk,
even while it is only in the page cache of the XFS. For that the inner loop device is a buffered one, and it is the reflink
clone that draws the line: XFS makes it with every writer of the image locked out, so it holds each block that was written
before, whole, and nothing of what came later. It is the disk as a power cut at that instant would have left it.

This is a disk without a cache of its own that it could lose: that a flush command reaches the disk at each fsync is ext4's
concern, and not looked at here.
"""

import fcntl
import subprocess
import uuid
from pathlib import Path
from typing import Self

from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import mounts, processes
from mirrorfs.lab.pair import Host, Lab

_FICLONE = 0x40049409
_POOL_MIN_BYTES = 512 << 20  # mkfs.xfs refuses less than 300 MB


class PowerDisks:
    """A disk for each host of a lab, from before its first start on; `Lab.down` takes them away with everything else."""

    def __init__(self, lab: Lab) -> None:
        """The disks of a lab that has some."""
        self._lab = lab

    @classmethod
    def create(cls, lab: Lab, *, size_bytes: int = 256 << 20) -> Self:
        """Give each host of a lab on which nothing runs yet an empty disk of that size; MirrorfsError if that cannot be."""
        made = cls(lab)
        made._mounted.mkdir(parents=True)
        # Twice for each host: while its power is off there are the disk and the clone of it.
        made._make_file(made._pool, _POOL_MIN_BYTES + 2 * size_bytes * len(lab.hosts))
        _run("mkfs.xfs", "-q", "-m", "reflink=1", made._pool)
        _mount_image(made._pool, made._mounted)
        for host in lab.hosts.values():
            made._make_file(made._image(host), size_bytes)
            _run("mkfs.ext4", "-q", "-m", "0", made._image(host))
            mounts.detach_below(host.home)
            _disk(host).mkdir()
            made._furnish(host)
            made._mount(host)
        return made

    def cut_power(self, *hosts: Host) -> None:
        """Cut the power of the hosts, of several at one instant. Nothing of them is heard any more; their disks are kept.

        The nodes are stopped before their disks are cloned, and killed afterwards: nothing can be acknowledged after the
        instant that the clone shows, so everything acknowledged may be demanded of it, and the end of a process, which makes
        ext4 write some files at once, comes too late to be in it.
        """
        try:
            processes.stop(processes.find_all(pid for host in hosts for pid in host.pids()))
            for host in hosts:
                _clone(self._image(host), self._clone(host))
            for host in hosts:  # or the peer would be told of the end by the kernel that lives on
                self._lab.cut(host.name)
        finally:
            for host in hosts:
                host.kill()

    def power_on(self, *hosts: Host) -> None:
        """Boot the hosts again, with their disks as the power cut left them and no node running; every cut cable is healed."""
        for host in hosts:
            if not self._clone(host).exists():
                raise MirrorfsError(f"the power of host {host.name} has not been cut")
            mounts.detach_below(host.home)
            self._clone(host).replace(self._image(host))
            self._mount(host)
            host.boot.write_text(str(uuid.uuid4()))
        self._lab.heal()

    @property
    def _pool(self) -> Path:
        return self._lab.disks / "pool"

    @property
    def _mounted(self) -> Path:
        return self._lab.disks / "mounted"

    def _image(self, host: Host) -> Path:
        return self._mounted / host.name

    def _clone(self, host: Host) -> Path:
        return self._mounted / f"{host.name}.cut"

    def _make_file(self, file: Path, size_bytes: int) -> None:
        with open(file, "xb") as new:
            new.truncate(size_bytes)

    def _furnish(self, host: Host) -> None:
        """Make the two directories on a new disk; unmounting it makes them durable."""
        _mount_image(self._image(host), _disk(host))
        for place in _places(host):
            (_disk(host) / place.name).mkdir()
        _run("umount", _disk(host))

    def _mount(self, host: Host) -> None:
        disk = _disk(host)
        _mount_image(self._image(host), disk)
        for place in _places(host):
            _run("mount", "--bind", disk / place.name, place)
            _run("mount", "--make-private", place)
        host.bind_under()


def _disk(host: Host) -> Path:
    return host.home / "disk"


def _places(host: Host) -> tuple[Path, Path]:
    """Where a host's disk is used."""
    return host.mount, host.state_dir


def _mount_image(image: Path, place: Path) -> None:
    """Mount it by a loop device that goes when it is unmounted, however that comes about; seen in no other namespace."""
    _run("mount", "-o", "loop", image, place)
    _run("mount", "--make-private", place)


def _clone(image: Path, clone: Path) -> None:
    with open(image, "rb") as source, open(clone, "xb") as target:
        fcntl.ioctl(target, _FICLONE, source.fileno())


def _run(*command: str | Path) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise MirrorfsError(f"{command[0]} is not installed (Debian: xfsprogs, e2fsprogs, mount)") from None
    except subprocess.CalledProcessError as error:
        line = " ".join(map(str, command))
        raise MirrorfsError(f"`{line}` failed: {error.stderr.strip() or error.returncode}") from error
