"""mkdir, mknod, mkfifo, bind, link and symlink: what is made, for whom, and what happens to the parent."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOTH,
    CREW,
    CTIME,
    FORMATS,
    KINDS,
    NEITHER,
    as_alice,
    bind,
    make,
    mkdir,
    mode_of,
    opened,
    owner_of,
    read,
    refused,
    remove,
    touch,
    watching,
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_has_its_kind_and_moves_the_times_of_its_parent(here: Path, kind: str) -> None:
    with watching(here) as parent:
        make(kind, here / "name")
    assert parent.changed == BOTH
    assert stat.S_IFMT(os.lstat(here / "name").st_mode) == FORMATS[kind]
    assert os.listdir(here) == ["name"]


@pytest.mark.parametrize("kind", KINDS)
def test_removing_moves_the_times_of_the_parent(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with watching(here) as parent:
        remove(kind, here / "name")
    assert parent.changed == BOTH
    assert os.listdir(here) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_name_has_fresh_times(here: Path, kind: str) -> None:
    reference = touch(here / "reference").stat().st_ctime_ns
    made = os.lstat(make(kind, here / "name"))
    a_day = 86_400 * 10**9
    for stamp in (made.st_mtime_ns, made.st_ctime_ns, made.st_atime_ns):
        assert 0 <= stamp - reference < a_day


@pytest.mark.parametrize("mode", [0o000, 0o151, 0o700, 0o755, 0o777, 0o1777])
def test_a_directory_has_the_mode_that_was_asked_for(here: Path, mode: int) -> None:
    os.mkdir(here / "directory", mode)
    assert mode_of(here / "directory") == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o501])
def test_the_umask_takes_bits_from_directories_and_nodes(here: Path, umask: int) -> None:
    os.umask(umask)
    os.mkdir(here / "directory", 0o777)
    os.mkfifo(here / "fifo", 0o777)
    os.mknod(here / "file", 0o100777)
    assert {mode_of(here / name) for name in ("directory", "fifo", "file")} == {0o777 & ~umask}


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o4755, 0o2755, 0o7777])
@pytest.mark.parametrize("kind", ["file", "fifo", "socket", "character device", "block device"])
def test_a_node_has_the_mode_that_was_asked_for(here: Path, kind: str, mode: int) -> None:
    os.mknod(here / "node", FORMATS[kind] | mode, os.makedev(1, 5))
    assert mode_of(here / "node") == mode


@pytest.mark.parametrize("kind", ["character device", "block device"])
@pytest.mark.parametrize("device", [(0, 0), (1, 3), (8, 17), (259, 0), (4095, 1048575)])
def test_a_device_keeps_its_numbers(here: Path, kind: str, device: tuple[int, int]) -> None:
    os.mknod(here / "device", FORMATS[kind] | 0o600, os.makedev(*device))
    number = os.stat(here / "device").st_rdev
    assert (os.major(number), os.minor(number)) == device


@pytest.mark.parametrize("kind", ["character device", "block device"])
def test_only_root_makes_devices(here: Path, kind: str) -> None:
    os.chmod(here, 0o777)
    with refused(errno.EPERM):
        as_alice(lambda: os.mknod(here / "device", FORMATS[kind] | 0o600, os.makedev(1, 3)))


def test_the_null_device_works_where_devices_are_allowed(here: Path) -> None:
    os.mknod(here / "null", 0o20666, os.makedev(1, 3))
    if os.statvfs(here).f_flag & os.ST_NODEV:
        with refused(errno.EACCES):
            read(here / "null")
        return
    assert read(here / "null") == b""


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket"])
def test_what_a_user_makes_is_the_users(here: Path, kind: str) -> None:
    os.chmod(here, 0o777)
    as_alice(lambda: make(kind, here / "name"))
    assert owner_of(here / "name") == (ALICE, ALICE)


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket"])
def test_in_a_setgid_directory_everything_gets_the_group_of_the_directory(here: Path, kind: str) -> None:
    mkdir(here / "shared", 0o2777, owner=(0, CREW))
    as_alice(lambda: make(kind, here / "shared" / "name"))
    assert owner_of(here / "shared" / "name") == (ALICE, CREW)


def test_directories_in_a_setgid_directory_are_setgid_too(here: Path) -> None:
    mkdir(here / "shared", 0o2777, owner=(0, CREW))
    os.mkdir(here / "shared" / "below", 0o750)
    os.makedirs(here / "shared" / "below" / "deeper")
    assert mode_of(here / "shared" / "below") == 0o2750
    assert mode_of(here / "shared" / "below" / "deeper") == 0o2777
    assert owner_of(here / "shared" / "below" / "deeper") == (0, CREW)


@pytest.mark.parametrize(("groups", "mode"), [((), 0o0755), ((CREW,), 0o2755)], ids=["outsider", "member"])
def test_a_setgid_program_in_a_setgid_directory_is_made_only_by_a_member(
    here: Path, groups: tuple[int, ...], mode: int
) -> None:
    mkdir(here / "shared", 0o2777, owner=(0, CREW))
    as_alice(lambda: os.close(os.open(here / "shared" / "file", os.O_CREAT | os.O_WRONLY, 0o2755)), groups)
    assert mode_of(here / "shared" / "file") == mode


def test_subdirectories_count_as_links_of_their_parent(here: Path) -> None:
    assert here.stat().st_nlink == 2
    for number in range(3):
        mkdir(here / f"{number}")
        assert here.stat().st_nlink == 3 + number
    touch(here / "file")
    assert here.stat().st_nlink == 5
    os.rmdir(here / "1")
    assert here.stat().st_nlink == 4
    assert (here / "0").stat().st_nlink == 2


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"directory"}))
def test_a_link_is_the_same_thing_under_another_name(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with watching(here / "name") as target, watching(here) as parent:
        os.link(here / "name", here / "link", follow_symlinks=False)
    one, two = os.lstat(here / "name"), os.lstat(here / "link")
    assert (one.st_ino, one.st_nlink, one.st_mode) == (two.st_ino, 2, two.st_mode)
    assert (target.changed, parent.changed) == (CTIME, BOTH)
    with watching(here / "name") as target:
        os.unlink(here / "link")
    assert target.changed == CTIME
    assert os.lstat(here / "name").st_nlink == 1


def test_a_change_through_one_link_is_seen_through_the_other(here: Path) -> None:
    touch(here / "one")
    os.link(here / "one", here / "two")
    with opened(here / "one", os.O_WRONLY) as file:
        os.write(file, b"data")
    os.chmod(here / "one", 0o600)
    os.chown(here / "two", ALICE, CREW)
    assert read(here / "two") == b"data"
    assert mode_of(here / "two") == 0o600
    assert owner_of(here / "one") == (ALICE, CREW)


def test_links_reach_across_directories(here: Path) -> None:
    mkdir(here / "a")
    mkdir(here / "b")
    touch(here / "a" / "file", data=b"data")
    os.link(here / "a" / "file", here / "b" / "file")
    os.unlink(here / "a" / "file")
    assert read(here / "b" / "file") == b"data"
    assert (here / "b" / "file").stat().st_nlink == 1


def test_many_links_are_all_counted(here: Path) -> None:
    touch(here / "file")
    for number in range(100):
        os.link(here / "file", here / f"{number}")
    assert (here / "file").stat().st_nlink == 101
    for number in range(100):
        os.unlink(here / f"{number}")
    assert (here / "file").stat().st_nlink == 1


def test_a_directory_has_no_second_name(here: Path) -> None:
    mkdir(here / "directory")
    with watching(here / "directory") as target, watching(here) as parent, refused(errno.EPERM):
        os.link(here / "directory", here / "link")
    assert (target.changed, parent.changed) == (NEITHER, NEITHER)


def test_a_link_to_what_exists_is_refused_before_the_directory_is_looked_at(here: Path) -> None:
    mkdir(here / "directory")
    touch(here / "file")
    with refused(errno.EEXIST):
        os.link(here / "directory", here / "file")


def test_a_link_does_not_leave_the_file_system(here: Path) -> None:
    touch(here / "file")
    assert os.stat("/dev/shm").st_dev != here.stat().st_dev
    with refused(errno.EXDEV):
        os.link(here / "file", f"/dev/shm/{os.getpid()}-link")


@pytest.mark.parametrize("length", [1, 2, 59, 60, 61, 255, 256, 1023, 1024, 4094, 4095])
def test_a_symbolic_link_keeps_its_target(here: Path, length: int) -> None:
    target = ("d/" * length)[:length]
    os.symlink(target, here / "link")
    assert os.readlink(here / "link") == target
    assert os.lstat(here / "link").st_size == length


@pytest.mark.parametrize(("target", "code"), [("t" * 4096, errno.ENAMETOOLONG), ("", errno.ENOENT)])
def test_a_symbolic_link_has_a_target_that_fits(here: Path, target: str, code: int) -> None:
    with refused(code):
        os.symlink(target, here / "link")
    assert os.listdir(here) == []


def test_a_symbolic_link_keeps_any_bytes(here: Path) -> None:
    target = bytes(range(1, 256))
    os.symlink(target, os.fsencode(here / "link"))
    assert os.readlink(os.fsencode(here / "link")) == target


@pytest.mark.parametrize("kind", ["file", "directory", "fifo"])
def test_only_a_symbolic_link_is_read_as_one(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with refused(errno.EINVAL):
        os.readlink(here / "name")


def test_forty_links_in_a_row_are_followed_and_forty_one_are_not(here: Path) -> None:
    touch(here / "0", data=b"end")
    for number in range(1, 42):
        (here / f"{number}").symlink_to(f"{number - 1}")
    assert read(here / "40") == b"end"
    with refused(errno.ELOOP):
        read(here / "41")


def test_a_socket_on_the_mount_takes_connections(here: Path) -> None:
    with bind(here / "socket") as listener, socket.socket(socket.AF_UNIX) as client:
        with opened(here, os.O_PATH) as parent:
            client.connect(f"/proc/self/fd/{parent}/socket")
        client.sendall(b"hello")
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(5) == b"hello"
        with refused(errno.EADDRINUSE):
            bind(here / "socket")
    assert stat.S_ISSOCK(os.lstat(here / "socket").st_mode)


def test_data_passes_through_a_fifo(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o600)
    with opened(here / "fifo", os.O_RDWR) as both, opened(here / "fifo", os.O_RDONLY) as reader:
        os.write(both, b"through")
        assert os.read(reader, 100) == b"through"
    assert os.stat(here / "fifo").st_size == 0
