"""One node, its directory and its mount: what adoption does and release undoes, what is refused, what the end takes away."""

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mirrorfs import backing, control
from mirrorfs.errors import ControlError
from mirrorfs.lab.configuration import acquaint
from mirrorfs.lab.pair import wait_for

pytestmark = pytest.mark.root

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True)
class Node:
    """A node without a peer: where it is mounted, and where its configuration and its log are."""

    path: Path
    room: Path
    processes: list[subprocess.Popen[bytes]]

    @property
    def config(self) -> Path:
        """Its configuration."""
        return self.room / "mirrorfs.toml"

    @property
    def log(self) -> Path:
        """What it has printed, over all its starts."""
        return self.room / "log"

    @property
    def hidden(self) -> Path:
        """Where its files are while they are adopted."""
        return self.path / backing.HIDDEN

    def launch(self, *before: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start it, through the command `before` if there is one, and wait for nothing."""
        command = [*before, sys.executable, "-m", "mirrorfs", "mount", str(self.path), "--config", str(self.config)]
        with open(self.log, "ab") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ | environment, cwd="/")
        self.processes.append(process)
        return process

    def start(self, *before: str) -> subprocess.Popen[bytes]:
        """Start it and wait until it serves."""
        process = self.launch(*before)
        wait_for(lambda: self.serves() or process.poll() is not None, "the node serves")
        assert process.poll() is None, self.log.read_text()
        return process

    def serves(self) -> bool:
        """Whether it can be written."""
        try:
            return control.request(self.room / "control", "status")["state"] in ("primary", "solo")
        except ControlError:
            return False

    def run(self, *arguments: str | Path) -> Done:
        """`mirrorfs ARGUMENTS` for this node."""
        command = [sys.executable, "-m", "mirrorfs", *map(str, arguments), "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd="/", check=False)

    def stop(self) -> None:
        """`mirrorfs unmount`; returns when it has ended."""
        assert self.run("unmount").returncode == 0
        assert self.processes[-1].wait(timeout=30) == 0


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Makes nodes: the directory's name, and lines for the configuration; all are taken down after the test."""
    with ExitStack() as stack:

        def make(name: str = "data", *, top: str = "", state_dir: Path | None = None) -> Node:
            room = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            room.mkdir()
            node = Node(tmp_path / name, room, [])
            node.path.mkdir(exist_ok=True)
            node.config.write_text(
                f'volume = "solo"\nnode = "one"\n{top}\n[nodes.one]\naddress = "127.0.0.1"\n'
                f'state_dir = "{state_dir or room / "state"}"\ncontrol = "{room / "control"}"\n'
            )
            stack.callback(_take_down, node)
            return node

        yield make


def _take_down(node: Node) -> None:
    for process in node.processes:
        process.kill()
        process.wait()
    while mount := backing.top_mount(node.path):
        backing.detach(node.path, mount)
    backing.set_immutable(node.path, False)


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """A node whose files lie in its directory; not started."""
    return make_node()


@pytest.fixture
def on_disk(node: Node, tmp_path: Path) -> Node:
    """A node whose directory is the root of a disk of its own; not started."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, node.path], check=True)
    subprocess.run(["mount", "--make-private", node.path], check=True)
    return node


def _refused(done: Done, *says: str, status: int = 1) -> None:
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("mirrorfs: ")
    for words in says:
        assert words in line


def _cannot_be_written(path: Path) -> None:
    with pytest.raises(PermissionError) as caught:
        (path / "by mistake").touch()
    assert caught.value.errno == errno.EPERM


# ---- the end


def _end_by_unmount(node: Node) -> None:
    assert node.run("unmount").returncode == 0


def _end_by_signals(node: Node) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # two different ones: the kernel would make one of two equal ones
        node.processes[-1].send_signal(number)


@pytest.mark.parametrize("end", [_end_by_unmount, _end_by_signals])
def test_the_end_takes_away_the_mount_and_not_the_disk_below_it(on_disk: Node, end: Callable[[Node], None]) -> None:
    node, disk = on_disk, backing.top_mount(on_disk.path)
    process = node.start()
    (node.path / "file").write_text("on the disk")
    end(node)
    assert process.wait(timeout=30) == 0
    assert backing.top_mount(node.path) == disk
    assert (node.hidden / "tree" / "file").read_text() == "on the disk"


def test_a_signal_takes_away_only_the_mount_even_if_a_file_is_open(on_disk: Node) -> None:
    node, disk = on_disk, backing.top_mount(on_disk.path)
    process = node.start()
    with suppress(OSError), open(node.path / "file", "w") as file:  # closing it fails: its file system is gone
        file.write("on the disk")
        file.flush()
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert backing.top_mount(node.path) == disk
    node.start()
    assert (node.path / "file").read_text() == "on the disk"


def test_an_unmount_while_a_file_is_open_is_refused_and_the_node_goes_on(node: Node) -> None:
    node.start()
    with open(node.path / "file", "w") as file:
        _refused(node.run("unmount"), "fuser -m")
        file.write("still written")
    assert (node.path / "file").read_text() == "still written"
    node.stop()


def test_a_mount_that_died_is_detached_at_the_next_start(node: Node) -> None:
    process = node.start()
    (node.path / "file").write_text("kept")
    process.kill()
    process.wait()
    with pytest.raises(OSError) as caught:
        os.statvfs(node.path)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    node.start()
    assert (node.path / "file").read_text() == "kept"
    node.stop()
    assert backing.top_mount(node.path) is None


# ---- a second mount


@pytest.mark.parametrize("spelled", ["data", "link to data", "data/", "data/../data", "a directory"])
def test_a_second_mount_is_refused_however_the_path_is_spelled(
    make_node: Callable[..., Node], tmp_path: Path, spelled: str
) -> None:
    first = make_node("a directory" if spelled == "a directory" else "data")
    (first.path / "file").write_text("precious")
    (tmp_path / "link to data").symlink_to(first.path)
    first.start()
    mounted = backing.top_mount(first.path)
    second = make_node(first.path.name)
    _refused(second.run("mount", f"{tmp_path}/{spelled}"), "mounted")
    assert backing.top_mount(first.path) == mounted
    assert (first.path / "file").read_text() == "precious"
    (first.path / "file").write_text("and writable")
    first.stop()


def test_a_second_start_with_the_same_configuration_is_refused(node: Node, tmp_path: Path) -> None:
    node.start()
    (node.path / "file").write_text("precious")
    _refused(node.run("mount", node.path), "unmount` first")
    (tmp_path / "elsewhere").mkdir()
    _refused(node.run("mount", tmp_path / "elsewhere"), "unmount` first")
    assert (node.path / "file").read_text() == "precious"
    assert os.listdir(tmp_path / "elsewhere") == []


# ---- the record and the tree belong together


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "with a backing directory"])
def test_a_node_whose_tree_was_replaced_by_an_empty_directory_refuses_to_start(
    make_node: Callable[..., Node], tmp_path: Path, in_place: bool
) -> None:
    node = make_node(top="" if in_place else f'backing = "{tmp_path / "backing"}"')
    base = node.hidden if in_place else tmp_path / "backing"
    node.start()
    (node.path / "file").write_text("precious")
    node.stop()
    (base / "tree").rename(base / "aside")
    (base / "tree").mkdir()
    _refused(node.run("mount", node.path), "--discard-local-data")
    assert backing.top_mount(node.path) is None
    assert os.listdir(base / "tree") == []
    (base / "tree").rmdir()
    (base / "aside").rename(base / "tree")
    node.start()
    assert (node.path / "file").read_text() == "precious"


# ---- adoption and release


def _attributes(path: Path) -> tuple[object, ...]:
    found = path.stat()
    xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path) if not name.startswith("trusted.mirrorfs")}
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns, xattrs


def test_adoption_moves_entries_in_place_and_release_undoes_it(node: Node) -> None:
    (node.path / "directory").mkdir()
    (node.path / "directory" / "file").write_text("precious")
    (node.path / "link").symlink_to("directory/file")
    os.setxattr(node.path, "user.colour", b"green")
    os.chown(node.path, 12, 34)
    node.path.chmod(0o2751)
    os.utime(node.path, ns=(10**18, 10**18 + 1))
    before, inode = _attributes(node.path), (node.path / "directory" / "file").stat().st_ino

    node.start()
    assert _attributes(node.path) == before
    assert set(os.listdir(node.path)) == {"directory", "link"}
    assert (node.path / "link").read_text() == "precious"
    _refused(node.run("release", node.path), "unmount` first")
    assert (node.path / "link").read_text() == "precious"
    node.path.chmod(0o2750)
    node.stop()

    assert os.listdir(node.path) == [backing.HIDDEN]
    assert (node.hidden / "tree" / "directory" / "file").stat().st_ino == inode, "moved, not copied"
    _cannot_be_written(node.path)

    assert node.run("release", node.path).returncode == 0
    assert set(os.listdir(node.path)) == {"directory", "link"}
    assert (node.path / "link").read_text() == "precious"
    assert (node.path / "directory" / "file").stat().st_ino == inode
    mode, uid, gid, _, xattrs = _attributes(node.path)
    assert (mode, uid, gid, xattrs) == (0o2750, 12, 34, {"user.colour": b"green"})
    (node.path / "writable").touch()
    _refused(node.run("release", node.path), "adopted")


def test_what_was_released_can_be_adopted_again(node: Node) -> None:
    (node.path / "file").write_text("precious")
    node.start()
    node.stop()
    assert node.run("release", node.path).returncode == 0
    fresh = replace(node, room=node.room / "fresh", processes=node.processes)
    fresh.room.mkdir()
    fresh.config.write_text(node.config.read_text().replace(str(node.room), str(fresh.room)))
    fresh.start()
    assert (node.path / "file").read_text() == "precious"
    fresh.stop()


def test_lost_and_found_of_a_disk_is_left_alone(on_disk: Node) -> None:
    node = on_disk
    (node.path / "file").write_text("precious")
    inode = (node.path / "lost+found").stat().st_ino
    node.start()
    assert os.listdir(node.path) == ["file"]
    node.stop()
    assert (node.path / "lost+found").stat().st_ino == inode
    assert node.run("release", node.path).returncode == 0
    assert set(os.listdir(node.path)) == {"file", "lost+found"}


def test_a_mount_point_below_the_path_is_refused_before_anything_is_moved(node: Node) -> None:
    names = [f"file-{number}" for number in range(20)]
    for name in names:
        (node.path / name).write_text(name)
    (node.path / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "below", node.path / "below"], check=True)
    try:
        _refused(node.run("mount", node.path), "'below' is a mount point")
        assert set(os.listdir(node.path)) - {backing.HIDDEN} == {*names, "below"}
        (node.path / names[0]).write_text("writable")
    finally:
        subprocess.run(["umount", node.path / "below"], check=True)


def test_with_a_backing_directory_the_files_are_in_its_tree(make_node: Callable[..., Node], tmp_path: Path) -> None:
    node = make_node(top=f'backing = "{tmp_path / "backing"}"')
    node.start()
    (node.path / "file").write_text("elsewhere")
    assert (tmp_path / "backing" / "tree" / "file").read_text() == "elsewhere"
    node.stop()
    assert os.listdir(node.path) == []
    _cannot_be_written(node.path)
    assert node.run("release", node.path).returncode == 0
    (node.path / "writable").touch()
    assert (tmp_path / "backing" / "tree" / "file").read_text() == "elsewhere"


def test_a_path_with_files_in_it_is_refused_if_there_is_a_backing_directory(
    make_node: Callable[..., Node], tmp_path: Path
) -> None:
    node = make_node(top=f'backing = "{tmp_path / "backing"}"')
    (node.path / "file").write_text("precious")
    _refused(node.run("mount", node.path), str(node.path), str(tmp_path / "backing" / "tree"))
    assert (node.path / "file").read_text() == "precious"
    (node.path / "writable").touch()


@pytest.mark.parametrize("below", ["", "state", "a/b"])
def test_a_state_directory_on_the_mount_is_refused(make_node: Callable[..., Node], tmp_path: Path, below: str) -> None:
    node = make_node(state_dir=tmp_path / "link" / below)
    (tmp_path / "link").symlink_to(node.path)
    _refused(node.run("mount", node.path), "state_dir")
    assert os.listdir(node.path) == []


# ---- around it


def test_systemd_is_told_when_the_node_is_ready_and_when_it_stops(node: Node) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(os.fspath(node.room / "notify"))
        systemd.settimeout(30)
        process = node.launch(NOTIFY_SOCKET=os.fspath(node.room / "notify"))
        assert systemd.recv(100) == b"READY=1"
        assert node.serves()
        process.send_signal(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"
        assert process.wait(timeout=30) == 0


def test_a_low_limit_of_open_files_is_raised_by_the_node_itself(node: Node) -> None:
    process = node.start("prlimit", "--nofile=256:")
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard > 256
    for number in range(2000):
        (node.path / f"{number}").touch()
    listed = subprocess.run(["ls", "-l", node.path], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 2001
    assert listed.stderr == ""
    node.stop()


def test_the_exit_status_says_what_kind_of_failure_it_was(node: Node, tmp_path: Path) -> None:
    assert node.run("status").returncode == 1, "not running"
    _refused(node.run("mount", tmp_path / "missing"), "not a directory")
    _refused(node.run("mount", node.config), "not a directory")
    _refused(node.run("release", node.path), "adopted")
    assert node.run("mount").returncode == 2, "no path"
    _refused(node.run("mount", node.path, "--node", "three"), "three", status=2)
    process = node.start()
    assert node.run("status").returncode == 0
    assert node.run("promote").returncode == 0, "it is the primary already"
    _refused(node.run("demote"), "--force", status=3)
    node.stop()
    assert process.returncode == 0
    node.config.write_text("volume = 7\n")
    _refused(node.run("mount", node.path), str(node.config), "volume", status=2)


def test_an_address_that_is_not_this_machines_is_one_clear_line_and_leaves_no_mount(node: Node) -> None:
    keys = node.room / "keys"
    acquaint(keys, node.room / "other" / "keys")
    text = node.config.read_text().replace('"127.0.0.1"', f'"192.0.2.1"\nkeys = "{keys}"')
    node.config.write_text(text + '[nodes.two]\naddress = "192.0.2.2"\n')
    done = node.run("mount", node.path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mirrorfs: cannot listen on 192.0.2.1 port 7788")
    assert "Traceback" not in done.stderr
    assert backing.top_mount(node.path) is None
