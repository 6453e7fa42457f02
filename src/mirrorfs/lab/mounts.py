"""What is mounted below a directory, and taking it away."""

import os
import re
from pathlib import Path

from mirrorfs import backing
from mirrorfs.errors import MirrorfsError


def below(directory: Path) -> list[Path]:
    """The mount points below the directory, in the order in which they were made."""
    with open("/proc/self/mountinfo", "rb") as mounts:
        escaped = [line.split(b" ")[4] for line in mounts]
    points = [re.sub(rb"\\([0-7]{3})", lambda digits: bytes([int(digits[1], 8)]), point) for point in escaped]
    return [path for path in (Path(os.fsdecode(point)) for point in points) if directory in path.parents]


def detach_below(directory: Path) -> None:
    """Take everything away that is mounted below the directory, in use or not; MirrorfsError if something stays."""
    for mount in reversed(below(directory)):
        backing.detach(mount, backing.top_mount(mount))
    if left := below(directory):
        raise MirrorfsError(f"{left[0]} cannot be unmounted")
