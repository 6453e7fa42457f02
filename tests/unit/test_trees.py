"""`differences` sees every kind of difference between two trees, and only that one."""

import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.trees import differences

KIB = 1024
ODD_NAME = b"caf\xc3\xa9 \xff\xfe\nline"
VOLUME = bytes(range(16))

pytestmark = pytest.mark.root


def _identity(volume: bytes, path: Path, file_id: int) -> bytes:
    return volume + struct.pack(">QQ", os.lstat(path).st_ino, file_id)


def _acl(user: int) -> bytes:
    """An access ACL, version 2: owner rw-, one named user r--, group r--, mask r--, others r--."""
    none = 0xFFFFFFFF
    entries = [(0x01, 6, none), (0x02, 4, user), (0x04, 4, none), (0x10, 4, none), (0x20, 4, none)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _make(root: Path) -> None:
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "plain").write_bytes(b"x" * 10_000)
    (root / "sub" / "other").write_bytes(b"other")
    with open(root / "sparse", "wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"y" * 8192, 512 * KIB)
    (root / "empty").touch()
    (root / os.fsdecode(ODD_NAME)).write_bytes(b"odd")
    os.symlink("plain", root / "link")
    os.mkfifo(root / "fifo")
    os.mknod(root / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    for name in ("group", "group-two", "sub/group-three"):
        if name == "group":
            (root / name).write_bytes(b"group")
        else:
            os.link(root / "group", root / name)
    (root / "twin").write_bytes(b"group")
    os.setxattr(root / "plain", "user.note", b"note")
    os.setxattr(root / "plain", "system.posix_acl_access", _acl(5))
    os.setxattr(root / "link", "trusted.note", b"on a link", follow_symlinks=False)
    os.setxattr(root / "device", "trusted.note", b"on a device")
    os.setxattr(root / "plain", "trusted.mirrorfs", _identity(VOLUME, root / "plain", 7))
    _settle_times(root)


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    left, right = tmp_path / "left", tmp_path / "right"
    for root in (left, right):
        _make(root)
    yield left, right
    shutil.rmtree(left)
    shutil.rmtree(right)


def test_equal_trees_have_no_difference(trees: tuple[Path, Path]) -> None:
    assert differences(*trees) == []


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.close(fd)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    os.chmod(path, 0o644)


def _relink(path: Path, to: Path) -> None:
    path.unlink()
    os.link(to, path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda r: (r / "empty").unlink(), "empty: only left"),
    "a further file": (lambda r: (r / "sub" / "new").touch(), "sub/new: only right"),
    "a name of odd bytes": (lambda r: (r / os.fsdecode(ODD_NAME)).unlink(), r"café \xff\xfe\nline: only left"),
    "a missing subtree": (lambda r: shutil.rmtree(r / "sub" / "deeper"), "sub/deeper: only left"),
    "a type": (lambda r: _replace(r / "fifo", _socket), "fifo: type: left fifo, right socket"),
    "a byte": (lambda r: _overwrite(r / "plain", 9000, b"z"), "plain: content at 9000: left 7878787878787878, right 7a"),
    "a byte behind a hole": (lambda r: _overwrite(r / "sparse", 516 * KIB, b"z"), f"sparse: content at {516 * KIB}: "),
    "a size": (lambda r: os.truncate(r / "plain", 9999), "plain: size: left 10000 bytes, right 9999 bytes"),
    "a hole filled with zeros": (
        lambda r: _overwrite(r / "sparse", 8 * KIB, bytes(4 * KIB)),
        f"sparse: holes, data at: left {512 * KIB}-{520 * KIB}, right {8 * KIB}-{12 * KIB}",
    ),
    "a hole filled at the end": (
        lambda r: _overwrite(r / "sparse", (1 << 40) - 1, b"\0"),
        f"sparse: holes, data at: left nothing more, right {(1 << 40) - 4 * KIB}-{1 << 40}",
    ),
    "a mode": (lambda r: os.chmod(r / "sub" / "other", 0o4711), "sub/other: mode: left 0644, right 4711"),
    "a directory's mode": (lambda r: os.chmod(r / "sub", 0o700), "sub: mode: left 0755, right 0700"),
    "an owner": (lambda r: os.chown(r / "fifo", 12, -1), "fifo: owner: left 0:0, right 12:0"),
    "a link's group": (lambda r: os.lchown(r / "link", -1, 34), "link: owner: left 0:0, right 0:34"),
    "a device number": (
        lambda r: _replace(r / "device", _other_device),
        "device: device: left 1:3, right 1:5",
    ),
    "a link's target": (
        lambda r: _replace(r / "link", _other_link),
        "link: target: left plain, right empty",
    ),
    "an attribute's value": (
        lambda r: os.setxattr(r / "plain", "user.note", b"NOTE"),
        "plain: user.note: left 0x6e6f7465, right 0x4e4f5445",
    ),
    "a missing attribute": (
        lambda r: os.removexattr(r / "plain", "user.note"),
        "plain: user.note: left 0x6e6f7465, right absent",
    ),
    "an attribute of a directory": (
        lambda r: os.setxattr(r / "sub", "security.note", b""),
        "sub: security.note: left absent, right 0x",
    ),
    "an attribute of a link": (
        lambda r: os.removexattr(r / "link", "trusted.note", follow_symlinks=False),
        "link: trusted.note: left 0x6f6e2061206c696e6b, right absent",
    ),
    "an attribute of a device": (
        lambda r: os.removexattr(r / "device", "trusted.note"),
        "device: trusted.note: left 0x6f6e206120646576696365, right absent",
    ),
    "an ACL": (
        lambda r: os.setxattr(r / "plain", "system.posix_acl_access", _acl(6)),
        f"plain: system.posix_acl_access: left 0x{_acl(5)[:40].hex()}... (44 bytes), right ",
    ),
    "an id": (
        lambda r: os.setxattr(r / "plain", "trusted.mirrorfs", _identity(VOLUME, r / "plain", 8)),
        "plain: trusted.mirrorfs: left 0x0000000000000007, right 0x0000000000000008",
    ),
    "a missing id": (
        lambda r: os.removexattr(r / "plain", "trusted.mirrorfs"),
        "plain: trusted.mirrorfs: left 0x0000000000000007, right absent",
    ),
    "a broken hard link": (
        lambda r: _replace(r / "group-two", lambda path: path.write_bytes(b"group")),
        "group-two: is the same file as: left group, right group-two",
    ),
    "a hard link across directories broken": (
        lambda r: _replace(r / "sub" / "group-three", lambda path: path.write_bytes(b"group")),
        "sub/group-three: is the same file as: left group, right sub/group-three",
    ),
    "a hard link too many": (
        lambda r: _relink(r / "twin", r / "group"),
        "twin: is the same file as: left twin, right group",
    ),
}


def _other_device(path: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    os.setxattr(path, "trusted.note", b"on a device")


def _other_link(path: Path) -> None:
    path.symlink_to("empty")
    os.setxattr(path, "trusted.note", b"on a link", follow_symlinks=False)


def _settle_times(root: Path) -> None:
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            os.utime(Path(directory) / name, ns=(0, 1_000_000_001), follow_symlinks=False)
    os.utime(root, ns=(0, 1_000_000_001))


@pytest.mark.parametrize("kind", CHANGES)
def test_one_change_is_found_and_nothing_else(trees: tuple[Path, Path], kind: str) -> None:
    change, expected = CHANGES[kind]
    left, right = trees
    change(right)
    _settle_times(right)
    found = differences(left, right)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize("name", ["plain", "sub", "link", "device", ""])
def test_an_mtime_that_differs_by_a_nanosecond_is_found(trees: tuple[Path, Path], name: str) -> None:
    left, right = trees
    os.utime(right / name, ns=(0, 1_000_000_002), follow_symlinks=False)
    assert differences(left, right) == [f"{name or '.'}: mtime: left 1000000001 ns, right 1000000002 ns"]


def test_the_volume_and_the_inode_number_of_an_identity_may_differ(trees: tuple[Path, Path]) -> None:
    left, right = trees
    os.setxattr(right / "plain", "trusted.mirrorfs", _identity(VOLUME[::-1], right / "empty", 7))
    assert differences(left, right) == []


def test_no_more_lines_than_the_limit_are_returned(trees: tuple[Path, Path]) -> None:
    left, right = trees
    for number in range(30):
        (right / f"new-{number}").touch()
    assert len(differences(left, right, limit=7)) == 7
    assert len(differences(left, right)) == 20


@pytest.mark.parametrize(("name", "levels"), [("n" * 255, 20), ("d", 2100)])
def test_trees_deeper_than_the_longest_path_are_compared(tmp_path: Path, name: str, levels: int) -> None:
    for side in ("left", "right"):
        (tmp_path / side).mkdir()
        fd = os.open(tmp_path / side, os.O_RDONLY)
        for _ in range(levels):
            os.mkdir(name, dir_fd=fd)
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.utime(fd, ns=(0, 0))
            os.close(fd)
            fd = below
        os.symlink(side, "bottom", dir_fd=fd)
        os.utime("bottom", ns=(0, 0), dir_fd=fd, follow_symlinks=False)
        os.utime(fd, ns=(0, 0))
        os.close(fd)
    try:
        bottom = "/".join([name] * levels + ["bottom"])
        assert differences(tmp_path / "left", tmp_path / "right") == [f"{bottom}: target: left left, right right"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "left", tmp_path / "right"], check=True)


def test_the_command_tells_by_its_exit_status(trees: tuple[Path, Path]) -> None:
    left, right = trees
    command = [sys.executable, "-m", "mirrorfs.lab.trees", str(left), str(right)]
    assert subprocess.run(command).returncode == 0
    os.chmod(right / "plain", 0o600)
    different = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert different.returncode == 1
    assert different.stdout.startswith("plain: mode: ")


def test_what_was_allocated_and_read_is_a_hole_all_the_same(tmp_path: Path) -> None:
    """The kernel takes it for data as long as it is in the page cache."""
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "file", "wb") as file:
            if name == "right":
                os.posix_fallocate(file.fileno(), 0, 1024 * KIB)
            os.ftruncate(file.fileno(), 1024 * KIB)
            os.pwrite(file.fileno(), b"x" * 4 * KIB, 0)
            os.fsync(file.fileno())
        (tmp_path / name / "file").read_bytes()
        os.utime(tmp_path / name / "file", ns=(0, 0))
        os.utime(tmp_path / name, ns=(0, 0))
    assert list(differences(tmp_path / "left", tmp_path / "right")) == []
