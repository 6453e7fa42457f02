"""What is done once on a machine before its node is started there: what the services ask for, and files that are in the way."""

import os
import stat
import subprocess
from pathlib import Path
from typing import Final

from mirrorfs import backing
from mirrorfs.config import Config
from mirrorfs.errors import MirrorfsError

_SUFFIX: Final = ".before-mirrorfs"


def prepare_services(config: Config) -> None:
    """Run the `prepare` commands of the services, in their order; what they say goes where we say what we say.

    No time is set for them: they may have to wait for a database that shuts down. Raises MirrorfsError for the first one that
    fails.
    """
    for service in config.failover.services if config.failover else ():
        if not service.prepare:
            continue
        print(f"preparing this machine for the service {service.name}", flush=True)
        done = subprocess.run(
            ("sh", "-c", service.prepare), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd="/", check=False
        )
        if done.returncode:
            how = f"exit status {done.returncode}" if done.returncode > 0 else f"ended by signal {-done.returncode}"
            raise MirrorfsError(f"service {service.name}: this machine could not be prepared for it ({how}, see above)")


def has_files(config: Config) -> bool:
    """Whether the directory where the volume will be mounted has files of its own that no mirrorfs has adopted yet."""
    if config.mount is None or config.node.backing is not None:
        return False
    path = Path(os.path.realpath(config.mount))
    try:
        return path.is_dir() and backing.HIDDEN not in os.listdir(path) and bool(backing.entries(path))
    except OSError:
        return False  # a dead mount, say: whoever mounts will tell


def set_aside(config: Config) -> Path | None:
    """Move the directory where the volume will be mounted beside itself if it has files, and make an empty one in its place.

    Nothing is deleted, and a power failure in the middle leaves the files in one of the two places. Returns where they are
    now, or None if there was nothing to move. Raises MirrorfsError if they cannot be moved by a rename.
    """
    if config.mount is None or not has_files(config):
        return None
    path = Path(os.path.realpath(config.mount))
    aside = path.with_name(path.name + _SUFFIX)
    if os.path.ismount(path):
        raise MirrorfsError(f"{path}: is a mount point, and its files cannot be set aside beside it: move them elsewhere")
    if os.path.lexists(aside):
        raise MirrorfsError(f"{aside}: is there already, nothing was set aside: move it away")
    try:
        before = os.stat(path)
        os.rename(path, aside)
        path.mkdir()
        os.chown(path, before.st_uid, before.st_gid)
        os.chmod(path, stat.S_IMODE(before.st_mode))
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise MirrorfsError(f"{path}: cannot be set aside as {aside}: {error.strerror}") from None
    return aside
