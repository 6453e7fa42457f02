"""open(2): its flags, the permissions it asks for, and the order of its errors."""

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOTH,
    CREW,
    NEITHER,
    as_alice,
    errno_of,
    make,
    mkdir,
    mode_of,
    opened,
    owner_of,
    read,
    refused,
    touch,
    watching,
)


def _try(path: Path, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(path, flags, mode))


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o777, 0o1644, 0o2755, 0o4755, 0o7777])
def test_a_created_file_has_the_mode_that_was_asked_for(here: Path, mode: int) -> None:
    _try(here / "file", os.O_CREAT | os.O_WRONLY, mode)
    assert mode_of(here / "file") == mode


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o777, 0o000), (0o002, 0o664)])
def test_the_umask_takes_bits_from_a_created_file(here: Path, umask: int, mode: int) -> None:
    os.umask(umask)
    _try(here / "file", os.O_CREAT | os.O_WRONLY, 0o666)
    assert mode_of(here / "file") == mode


def test_a_created_file_belongs_to_who_made_it(here: Path) -> None:
    os.chmod(here, 0o777)
    as_alice(lambda: _try(here / "file", os.O_CREAT | os.O_WRONLY))
    assert owner_of(here / "file") == (ALICE, ALICE)


def test_creating_a_file_moves_the_times_of_its_directory_only_the_first_time(here: Path) -> None:
    with watching(here) as first:
        _try(here / "file", os.O_CREAT | os.O_WRONLY)
    with watching(here) as second:
        _try(here / "file", os.O_CREAT | os.O_WRONLY)
    assert (first.changed, second.changed) == (BOTH, NEITHER)


def test_a_file_created_without_any_permission_is_writable_through_its_first_descriptor(here: Path) -> None:
    os.chmod(here, 0o777)

    def create() -> int:
        with opened(here / "file", os.O_CREAT | os.O_RDWR, 0) as file:
            return os.write(file, b"data")

    assert as_alice(create) == 4
    with refused(errno.EACCES):
        as_alice(lambda: _try(here / "file", os.O_RDONLY))


def test_creating_exclusively_does_not_touch_what_exists(here: Path) -> None:
    touch(here / "file", data=b"data")
    with refused(errno.EEXIST):
        _try(here / "file", os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_WRONLY)
    assert read(here / "file") == b"data"


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket"])
def test_creating_exclusively_says_that_it_exists_whatever_the_permissions(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with refused(errno.EEXIST):
        as_alice(lambda: _try(here / "name", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


@pytest.mark.parametrize("mode", range(8))
@pytest.mark.parametrize("who", ["owner", "group", "other"])
def test_each_class_of_permission_decides_alone_what_may_be_opened(here: Path, who: str, mode: int) -> None:
    # The other two classes are given what this one is not, so that a mixed-up class shows.
    shift = {"owner": 6, "group": 3, "other": 0}[who]
    others = 0o777 & ~(7 << shift) if mode != 7 else 0
    owner = {"owner": (ALICE, 0), "group": (0, CREW), "other": (0, 0)}[who]
    touch(here / "file", others | mode << shift, owner=owner)
    wanted = {os.O_RDONLY: 4, os.O_WRONLY: 2, os.O_RDWR: 6}

    def tried() -> list[int]:
        return [errno_of(lambda flags=flags: _try(here / "file", flags)) for flags in wanted]  # type: ignore[misc]

    expected = [0 if mode & bits == bits else errno.EACCES for bits in wanted.values()]
    assert as_alice(tried, [CREW]) == expected


def test_truncating_asks_for_write_permission_even_when_opened_for_reading(here: Path) -> None:
    touch(here / "file", 0o444, data=b"data")
    with refused(errno.EACCES):
        as_alice(lambda: _try(here / "file", os.O_RDONLY | os.O_TRUNC))
    assert read(here / "file") == b"data"


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_truncating_empties_a_file_and_moves_its_times(here: Path, access: int) -> None:
    touch(here / "file", data=b"data")
    with watching(here / "file") as file, watching(here) as parent:
        _try(here / "file", access | os.O_TRUNC)
    assert (read(here / "file"), file.changed, parent.changed) == (b"", BOTH, NEITHER)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT])
def test_a_directory_cannot_be_opened_for_a_change(here: Path, flags: int) -> None:
    mkdir(here / "directory")
    with refused(errno.EISDIR):
        _try(here / "directory", flags)


@pytest.mark.parametrize("kind", ["file", "fifo", "socket", "character device"])
def test_only_a_directory_can_be_opened_as_one(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with refused(errno.ENOTDIR):
        _try(here / "name", os.O_RDONLY | os.O_DIRECTORY)


def test_a_slash_after_a_name_that_is_to_be_created_is_refused(here: Path) -> None:
    with refused(errno.EISDIR):
        os.open(f"{here}/name/", os.O_CREAT | os.O_WRONLY)
    assert os.listdir(here) == []


def test_a_slash_after_a_file_asks_for_a_directory(here: Path) -> None:
    touch(here / "file")
    with refused(errno.ENOTDIR):
        os.open(f"{here}/file/", os.O_RDONLY)


@pytest.mark.parametrize("target", ["file", "directory", "nowhere"])
def test_nofollow_refuses_a_symbolic_link_as_the_last_name(here: Path, target: str) -> None:
    touch(here / "file")
    mkdir(here / "directory")
    (here / "link").symlink_to(target)
    with refused(errno.ELOOP):
        _try(here / "link", os.O_RDONLY | os.O_NOFOLLOW)


def test_nofollow_follows_links_before_the_last_name(here: Path) -> None:
    touch(mkdir(here / "directory") / "file")
    (here / "link").symlink_to("directory")
    _try(here / "link" / "file", os.O_RDONLY | os.O_NOFOLLOW)


def test_nofollow_and_directory_on_a_link_say_that_it_is_no_directory(here: Path) -> None:
    (here / "link").symlink_to(".")
    with refused(errno.ENOTDIR):
        _try(here / "link", os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)


def test_creating_through_a_dangling_link_makes_its_target(here: Path) -> None:
    (here / "link").symlink_to("target")
    _try(here / "link", os.O_CREAT | os.O_WRONLY)
    assert (here / "target").is_file()
    assert (here / "link").is_symlink()


def test_creating_through_a_link_into_a_missing_directory_is_not_found(here: Path) -> None:
    (here / "link").symlink_to("missing/target")
    with refused(errno.ENOENT):
        _try(here / "link", os.O_CREAT | os.O_WRONLY)


def test_a_fifo_without_a_reader_cannot_be_opened_for_writing_without_waiting(here: Path) -> None:
    make("fifo", here / "fifo")
    with refused(errno.ENXIO):
        _try(here / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    _try(here / "fifo", os.O_RDONLY | os.O_NONBLOCK)


def test_a_socket_cannot_be_opened(here: Path) -> None:
    make("socket", here / "socket")
    with refused(errno.ENXIO):
        _try(here / "socket", os.O_RDONLY)


def test_a_device_without_a_driver_cannot_be_opened(here: Path) -> None:
    os.mknod(here / "device", 0o20666, os.makedev(239, 251))
    expected = errno.EACCES if os.statvfs(here).f_flag & os.ST_NODEV else errno.ENXIO
    with refused(expected):
        _try(here / "device", os.O_RDONLY)


def test_append_writes_at_the_end_wherever_the_offset_is(here: Path) -> None:
    touch(here / "file", data=b"first,")
    with opened(here / "file", os.O_RDWR | os.O_APPEND) as file:
        os.lseek(file, 2, os.SEEK_SET)
        os.write(file, b"second,")
        assert os.lseek(file, 0, os.SEEK_CUR) == 13
        with opened(here / "file", os.O_WRONLY | os.O_APPEND) as another:
            os.write(another, b"third,")
        # Linux appends even when pwrite names an offset.
        os.pwrite(file, b"fourth", 0)
    assert read(here / "file") == b"first,second,third,fourth"


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_synchronous_descriptors_write_what_others_read(here: Path, flag: int) -> None:
    with opened(here / "file", os.O_CREAT | os.O_RDWR | flag) as file:
        assert os.write(file, b"data") == 4
        assert os.pwrite(file, b"more", 4) == 4
        os.ftruncate(file, 6)
    assert read(here / "file") == b"datamo"


def test_direct_aligned_io_reads_what_it_wrote(here: Path) -> None:
    page = mmap.mmap(-1, 3 * 4096)
    page[:] = os.urandom(len(page))
    with opened(here / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as file:
        assert os.pwritev(file, [page], 4096) == len(page)
        back = mmap.mmap(-1, 5 * 4096)
        assert os.preadv(file, [back], 0) == 4 * 4096
    assert back[:4096] == bytes(4096)
    assert back[4096 : 4 * 4096] == page[:]
    assert read(here / "file")[4096:] == page[:]


def test_direct_and_cached_descriptors_see_each_others_writes(here: Path) -> None:
    page = mmap.mmap(-1, 4096)
    with opened(here / "file", os.O_CREAT | os.O_RDWR) as cached:
        os.write(cached, b"a" * 4096)
        with opened(here / "file", os.O_RDWR | os.O_DIRECT) as direct:
            assert os.preadv(direct, [page], 0) == 4096
            assert page[:] == b"a" * 4096
            page[:] = b"b" * 4096
            os.pwritev(direct, [page], 0)
        assert os.pread(cached, 4096, 0) == b"b" * 4096


def test_a_path_descriptor_needs_no_permission_and_cannot_read(here: Path) -> None:
    touch(here / "file", 0o000, data=b"data")

    def attempts() -> tuple[int, int, int, int]:
        with opened(here / "file", os.O_PATH) as file:
            size = os.fstat(file).st_size
            return (
                size,
                errno_of(lambda: os.read(file, 1)),
                errno_of(lambda: os.fchmod(file, 0)),
                errno_of(lambda: _try(Path(f"/proc/self/fd/{file}"), os.O_RDONLY)),
            )

    assert as_alice(attempts) == (4, errno.EBADF, errno.EBADF, errno.EACCES)


def test_a_path_descriptor_of_a_link_is_the_link(here: Path) -> None:
    (here / "link").symlink_to("nowhere")
    with opened(here / "link", os.O_PATH | os.O_NOFOLLOW) as link:
        assert os.readlink("", dir_fd=link) == "nowhere"


def test_a_path_descriptor_can_be_opened_again_after_a_rename(here: Path) -> None:
    touch(here / "old", data=b"data")
    with opened(here / "old", os.O_PATH) as file:
        os.rename(here / "old", here / "new")
        assert read(f"/proc/self/fd/{file}") == b"data"


def test_a_file_without_a_name_works_or_is_not_supported(here: Path, on_fuse: bool) -> None:
    flags = os.O_TMPFILE | os.O_RDWR
    if on_fuse:
        for _ in range(2):  # the second time the kernel knows
            with refused(errno.EOPNOTSUPP):
                _try(here, flags)
    else:
        with opened(here, flags, 0o600) as file:
            os.write(file, b"data")
            assert os.fstat(file).st_nlink == 0
    assert os.listdir(here) == []


def test_a_temporary_file_of_the_standard_library_works_either_way(here: Path) -> None:
    with tempfile.TemporaryFile(dir=here) as file:
        file.write(b"data")
        file.seek(0)
        assert file.read() == b"data"
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.listdir(here) == []


def test_a_file_that_has_lost_its_last_name_gets_none_again(here: Path) -> None:
    touch(here / "file", data=b"data")
    with opened(here / "file", os.O_RDWR) as file:
        os.unlink(here / "file")
        with refused(errno.ENOENT):
            os.link(f"/proc/self/fd/{file}", here / "again", src_dir_fd=file)  # with a directory Python calls linkat
        os.pwrite(file, b"D", 0)
        assert os.pread(file, 10, 0) == b"Data"
    assert os.listdir(here) == []


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
def test_a_running_program_cannot_be_opened_for_writing(here: Path, flags: int) -> None:
    program = here / "cat"
    shutil.copy(shutil.which("cat") or "/bin/cat", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin
        assert running.stdout
        running.stdin.write(b"x")
        running.stdin.flush()
        assert running.stdout.read(1) == b"x"
        with refused(errno.ETXTBSY):
            _try(program, flags)
        running.stdin.close()
    _try(program, os.O_WRONLY)


def test_a_file_open_for_writing_cannot_be_run(here: Path) -> None:
    program = here / "true"
    shutil.copy(shutil.which("true") or "/bin/true", program)
    with opened(program, os.O_WRONLY), refused(errno.ETXTBSY):
        subprocess.run([program])
    assert subprocess.run([program]).returncode == 0


@pytest.mark.parametrize(("flags", "refusal"), [(os.O_RDONLY, "write"), (os.O_WRONLY, "read")])
def test_a_descriptor_does_only_what_it_was_opened_for(here: Path, flags: int, refusal: str) -> None:
    touch(here / "file", data=b"data")
    with opened(here / "file", flags) as file, refused(errno.EBADF):
        if refusal == "write":
            os.write(file, b"x")
        else:
            os.read(file, 1)


def test_a_directory_is_not_read_as_a_file(here: Path) -> None:
    with opened(here) as directory, refused(errno.EISDIR):
        os.read(directory, 1)


def test_noatime_is_for_the_owner(here: Path) -> None:
    touch(here / "file", 0o666)
    with refused(errno.EPERM):
        as_alice(lambda: _try(here / "file", os.O_RDONLY | os.O_NOATIME))
    _try(here / "file", os.O_RDONLY | os.O_NOATIME)


def test_flags_can_be_changed_on_an_open_descriptor(here: Path) -> None:
    touch(here / "file", data=b"data")
    with opened(here / "file", os.O_RDWR) as file:
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
        os.write(file, b"+")
        fcntl.fcntl(file, fcntl.F_SETFL, 0)
        os.pwrite(file, b"D", 0)
    assert read(here / "file") == b"Data+"
