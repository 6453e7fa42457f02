"""What only the kernel session has: fallocate, holes, copies on both nodes; names that are known not to be; a clean end."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mirrorfs import backing
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import NewLines, other, state, status, tree_differences, wait_state

pytestmark = pytest.mark.root

KEEP_SIZE, PUNCH_HOLE = 1, 2
MIB = 1 << 20


@pytest.fixture
def lab(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("MIRRORFS_SESSION", "kernel")
    return make_lab(ack_timeout="1s")


def _data_ranges(file: Path) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    at = 0
    with open(file, "rb") as opened:
        descriptor = opened.fileno()
        while True:
            try:
                start = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return found
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            found.append((start, at))


def test_holes_and_preallocated_room_are_the_same_on_both_nodes(lab: Lab) -> None:
    file = lab.one.mount / "file"
    with open(file, "wb") as opened:
        opened.write(os.urandom(MIB))
        opened.flush()
        backing.allocate(opened.fileno(), KEEP_SIZE | PUNCH_HOLE, 64 << 10, 128 << 10)
        backing.allocate(opened.fileno(), 0, 2 * MIB, MIB)
        os.fsync(opened.fileno())
    assert file.stat().st_size == 3 * MIB
    assert _data_ranges(file) == [(0, 64 << 10), (192 << 10, MIB)]
    assert tree_differences(lab) == []
    for host in lab.hosts.values():
        under = host.backing / "file"
        assert _data_ranges(under) == [(0, 64 << 10), (192 << 10, MIB)]
        assert under.stat().st_blocks * 512 >= 2 * MIB - (128 << 10)


def test_a_copy_within_the_tree_is_made_on_both_nodes_and_its_bytes_do_not_travel(lab: Lab) -> None:
    content = os.urandom(4 * MIB)
    (lab.one.mount / "source").write_bytes(content)
    before = status(lab.one)["peer"]["bytes_sent"]
    with open(lab.one.mount / "source", "rb") as source, open(lab.one.mount / "copy", "wb") as target:
        left = len(content)
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    assert status(lab.one)["peer"]["bytes_sent"] - before < MIB
    assert tree_differences(lab) == []
    assert (lab.two.backing / "copy").read_bytes() == content


def test_a_name_that_was_not_there_is_found_once_the_other_node_has_made_it(lab: Lab) -> None:
    name = lab.one.mount / "name"
    for _ in range(3):
        assert not name.exists()
    lab.two.promote(yes=True)
    wait_state(lab.two, "primary")
    assert not (lab.two.mount / "name").exists()
    (lab.two.mount / "name").write_text("here")
    assert name.read_text() == "here"  # the one that was the primary has forgotten
    lab.one.promote(yes=True)
    wait_state(lab.one, "primary")
    assert name.read_text() == "here"
    name.unlink()
    assert not (lab.two.mount / "name").exists()


_KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"some"),
    "directory": Path.mkdir,
    "link": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(259, 65537)),
    "fifo": os.mkfifo,
}


def _statx(path: Path) -> tuple[str, ...]:
    """All that stat(1) says of a file without its name, device and inode number, and its birth time beside."""
    of_all = "%B %F %a %b %g %h %o %s %t %T %u %w %x %y %z"
    done = subprocess.run(["stat", "--format", of_all + "\n%w", path], capture_output=True, text=True, check=True)
    everything, birth = done.stdout.splitlines()
    return everything, birth


def test_birth_times_are_those_of_the_files_underneath(lab: Lab) -> None:
    for name, make in _KINDS.items():
        make(lab.one.mount / name)
    (lab.one.mount / "file").write_bytes(b"more than before")
    wait_for(lambda: lab.one.status()["settled"], "the other node has them, too")
    for host in lab.hosts.values():
        for name in _KINDS:
            number = os.lstat(host.mount / name).st_ino
            shown = _statx(host.mount / name)
            assert shown == _statx(host.backing / name)
            assert shown[1] != "-", "the file system underneath has birth times"
            assert _statx(host.mount / name) == shown, "asked again"
            assert os.lstat(host.mount / name).st_ino == number
            assert (host.mount / name).is_symlink() is (name == "link")


def test_a_birth_time_stays_when_the_file_is_changed_and_renamed(lab: Lab) -> None:
    file, renamed = lab.one.mount / "file", lab.one.mount / "renamed"
    file.write_bytes(b"some")
    birth = _statx(file)[1]
    with open(file, "ab") as opened:
        opened.write(b" more")
    file.rename(renamed)
    renamed.chmod(0o600)
    everything, same = _statx(renamed)
    assert same == birth
    assert everything.split()[3] == "600"
    assert renamed.stat().st_size == len(b"some more")


def test_an_open_file_of_the_standby_shows_what_the_primary_writes(lab: Lab) -> None:
    (lab.one.mount / "file").write_bytes(b"a" * 8192)
    with open(lab.two.mount / "file", "rb", buffering=0) as there:
        assert there.read() == b"a" * 8192
        with open(lab.one.mount / "file", "r+b") as here:
            here.write(b"b" * 8192)
        assert os.pread(there.fileno(), 8192, 0) == b"b" * 8192


#: What every Python process of the nodes does at its start: a kernel before 6.16 cannot forget all names at once.
_OLDER_KERNEL = "from mirrorfs.kernel import protocol\nprotocol.MINOR_WITH_EPOCHS = 1 << 30\n"
#: A process that works in a directory of the mount, and says for each line that it reads where that is and what it sees.
_AT_WORK = (
    "import os, sys\n"
    "os.chdir(sys.argv[1])\n"
    "print(flush=True)\n"
    "for line in sys.stdin:\n"
    "    print(os.getcwd(), *sorted(os.listdir()), open('file').read(), flush=True)\n"
)


@pytest.mark.parametrize("kernel", ["with epochs", "without epochs"])
def test_a_change_of_roles_takes_no_working_directory_away_and_no_mount_unless_it_has_to(
    make_lab: Callable[..., Lab], kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIRRORFS_SESSION", "kernel")
    if kernel == "without epochs":
        (tmp_path / "sitecustomize.py").write_text(_OLDER_KERNEL)
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    lab = make_lab(ack_timeout="1s")
    work, point = Path("top", "work"), lab.one.mount / "top" / "point"
    for name in (work, "top/point"):
        (lab.one.mount / name).mkdir(parents=True)
    (lab.one.mount / work / "file").write_text("old")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)
    process = subprocess.Popen(
        [sys.executable, "-c", _AT_WORK, str(lab.one.mount / work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def seen() -> list[str]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().split()

    try:
        process.stdout.readline()
        assert seen() == [str(lab.one.mount / work), "file", "old"]
        for number, (new, old) in enumerate([(lab.two, lab.one), (lab.one, lab.two)]):
            new.promote(yes=True)
            wait_state(new, "primary")
            lab.wait_mirrored()
            (new.mount / work / "new").write_text(f"new {number}")
            (new.mount / work / "new").rename(new.mount / work / "file")
            (new.mount / work / f"name-{number}").touch()
            wait_for((old.backing / work / f"name-{number}").exists, "the standby has applied it")
            names = ["file", *(f"name-{n}" for n in range(number + 1))]
            assert seen() == [str(lab.one.mount / work), *names, "new", str(number)]
            if kernel == "without epochs":  # an epoch takes it away, at the next look at a name above
                mounted = backing.top_mount(point)
                assert mounted is not None
                assert mounted.kind == "tmpfs"
        assert (lab.one.mount / work / "file").read_text() == "new 1"
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["umount", point], check=False)


def test_what_the_old_primary_has_cached_of_a_file_is_not_what_it_shows_later(lab: Lab) -> None:
    file = lab.one.mount / "file"
    file.write_bytes(b"a" * 8192)
    with open(file, "rb", buffering=0) as kept:
        assert kept.read() == b"a" * 8192
        lab.two.promote(yes=True)
        wait_state(lab.two, "primary")
        (lab.two.mount / "file").write_bytes(b"b" * 8192)
        wait_for(lambda: file.read_bytes() == b"b" * 8192, "the standby has applied it")
        lab.one.promote(yes=True)
        wait_state(lab.one, "primary")
        assert os.pread(kept.fileno(), 8192, 0) == b"b" * 8192


def test_a_connection_that_is_aborted_ends_the_node_and_the_other_one_takes_over(lab: Lab) -> None:
    number = os.minor(lab.one.mount.stat().st_dev)
    control = _fusectl()
    lines = NewLines(lab.one)
    (control / str(number) / "abort").write_text("1")
    wait_for(lambda: not lab.one.answers(), "the node has ended")
    assert not [line for line in lines() if "defect" in line or "Traceback" in line]
    wait_for(lambda: state(lab.two) == "waiting", "the other one misses it")
    lab.two.promote(yes=True)
    (lab.two.mount / "after").write_text("x")


def _fusectl() -> Path:
    control = Path("/sys/fs/fuse/connections")
    if not any(line.split()[1] == str(control) for line in Path("/proc/mounts").read_text().splitlines()):
        subprocess.run(["mount", "-t", "fusectl", "fusectl", control], check=True)
    return control


def test_the_other_session_is_one_line_of_the_configuration(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MIRRORFS_SESSION", raising=False)
    lab = make_lab()
    assert _has_reactor(lab.one)
    lab.two.kill()
    lab.two.config.write_text('session = "pyfuse3"\n' + lab.two.config.read_text())
    lab.two.start()
    lab.wait_mirrored()
    assert not _has_reactor(other(lab, lab.one))
    (lab.one.mount / "file").write_text("seen by both")
    wait_for((lab.two.mount / "file").exists, "it is there too")
    assert (lab.two.mount / "file").read_text() == "seen by both"


def _has_reactor(host: Host) -> bool:
    """Whether the node runs the kernel session: only that has an eventfd of its own syncs (`anon_inode:[eventfd]`)."""
    links = [os.readlink(link) for link in Path(f"/proc/{status(host)['pid']}/fd").iterdir() if link.is_symlink()]
    return sum("eventfd" in link for link in links) >= 2
