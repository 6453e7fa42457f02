"""Files mapped into memory, and programs run from the file system."""

import errno
import mmap
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    ChildDiedError,
    as_alice,
    in_child,
    opened,
    pass_tick,
    read,
    refused,
    touch,
)

PAGE = mmap.PAGESIZE


@pytest.fixture
def pages(here: Path) -> Path:
    """A file of three pages of one letter each."""
    return touch(here / "file", data=b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)


def _mapped(path: Path, length: int = 0, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    with opened(path, os.O_RDWR) as file:
        return mmap.mmap(file, length, flags)


def test_a_store_through_a_shared_mapping_is_read_by_everyone(pages: Path) -> None:
    with _mapped(pages) as memory:
        memory[PAGE : PAGE + 5] = b"store"
        with opened(pages) as file:
            assert os.pread(file, 5, PAGE) == b"store"
        assert in_child(lambda: read(pages)[PAGE : PAGE + 5]) == b"store"
        memory.flush()
    assert read(pages) == b"a" * PAGE + b"store" + b"b" * (PAGE - 5) + b"c" * PAGE


def test_a_write_is_seen_through_a_shared_mapping(pages: Path) -> None:
    with _mapped(pages) as memory:
        assert memory[0:1] == b"a"
        with opened(pages, os.O_RDWR) as file:
            os.pwrite(file, b"written", 10)
            os.lseek(file, 0, os.SEEK_END)
            os.write(file, b"more")
        assert memory[10:17] == b"written"


def test_two_processes_share_a_mapping(pages: Path) -> None:
    with _mapped(pages) as memory:

        def store() -> None:
            with _mapped(pages) as other:
                other[5:10] = b"child"

        in_child(store)
        assert memory[5:10] == b"child"


def test_a_store_survives_unmapping_without_msync(pages: Path) -> None:
    memory = _mapped(pages)
    memory[:4] = b"kept"
    memory.close()
    with opened(pages) as file:
        os.fsync(file)
    assert read(pages)[:5] == b"kepta"


def test_a_store_after_closing_the_descriptor_reaches_the_file_through_msync(pages: Path) -> None:
    with _mapped(pages) as memory:
        before = pass_tick(pages).st_mtime_ns
        memory[2 * PAGE :] = b"C" * PAGE
        memory.flush()
        assert os.stat(pages).st_mtime_ns > before
    assert read(pages)[2 * PAGE :] == b"C" * PAGE


def test_a_private_mapping_keeps_its_stores_to_itself(pages: Path) -> None:
    with _mapped(pages, flags=mmap.MAP_PRIVATE) as memory:
        memory[:5] = b"store"
        assert memory[:5] == b"store"
    assert read(pages)[:5] == b"aaaaa"


def test_a_shared_mapping_for_writing_needs_a_descriptor_for_both(pages: Path) -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with opened(pages, flags) as file, refused(errno.EACCES):
            mmap.mmap(file, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_directory_is_not_mapped(here: Path) -> None:
    with opened(here) as directory, refused(errno.ENODEV, errno.EACCES):
        mmap.mmap(directory, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)


def test_the_rest_of_the_last_page_is_zeros_and_never_reaches_the_file(here: Path) -> None:
    touch(here / "file", data=b"short")
    with _mapped(here / "file") as memory:
        memory.flush()
        with opened(here / "file", os.O_RDWR) as file:
            os.ftruncate(file, 100)
        memory[0:5] = b"SHORT"
        memory.flush()
    assert read(here / "file") == b"SHORT" + bytes(95)


def test_a_mapping_grows_into_what_is_added_to_the_file(pages: Path) -> None:
    with _mapped(pages) as memory, opened(pages, os.O_RDWR) as file:
        os.ftruncate(file, PAGE)
        os.ftruncate(file, 3 * PAGE)
        assert memory[PAGE:] == bytes(2 * PAGE)
        assert memory[:PAGE] == b"a" * PAGE
        memory[2 * PAGE] = ord("z")
        assert os.pread(file, 1, 2 * PAGE) == b"z"


def test_touching_a_page_beyond_the_end_is_a_bus_error(pages: Path) -> None:
    def touch_beyond() -> None:
        with _mapped(pages) as memory:
            os.truncate(pages, PAGE // 2)
            assert memory[PAGE // 2] == 0
            assert memory[PAGE] == 0

    with pytest.raises(ChildDiedError) as death:
        in_child(touch_beyond)
    assert death.value.signal == signal.SIGBUS


def test_a_mapping_of_an_unlinked_file_lives_on(pages: Path) -> None:
    with _mapped(pages) as memory:
        os.unlink(pages)
        memory[:4] = b"gone"
        memory.flush()
        assert memory[:8] == b"goneaaaa"


def test_a_mapping_follows_a_renamed_and_replaced_file(here: Path, pages: Path) -> None:
    with _mapped(pages) as memory:
        os.rename(pages, here / "renamed")
        touch(pages, data=b"another")
        memory[:4] = b"mine"
        memory.flush()
    assert read(here / "renamed")[:5] == b"minea"
    assert read(pages) == b"another"


def test_a_sparse_file_is_filled_through_a_mapping(here: Path) -> None:
    touch(here / "file")
    os.truncate(here / "file", 64 * PAGE)
    with _mapped(here / "file") as memory:
        for page in range(0, 64, 7):
            memory[page * PAGE + page] = page + 1
        memory.flush()
    data = read(here / "file")
    assert {index: byte for index, byte in enumerate(data) if byte} == {
        page * PAGE + page: page + 1 for page in range(0, 64, 7)
    }


def test_programs_and_scripts_run(here: Path) -> None:
    shutil.copy(shutil.which("echo") or "/bin/echo", here / "echo")
    touch(here / "script", 0o755, data=b'#!/bin/sh\necho "$0 ran"\n')
    assert subprocess.run([here / "echo", "ran"], capture_output=True).stdout == b"ran\n"
    assert subprocess.run([here / "script"], capture_output=True, text=True).stdout == f"{here}/script ran\n"


def test_a_user_runs_a_program_that_may_only_be_executed(here: Path) -> None:
    shutil.copy(shutil.which("true") or "/bin/true", here / "true")
    os.chmod(here / "true", 0o711)
    assert as_alice(lambda: subprocess.run([here / "true"]).returncode) == 0


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_setuid_and_setgid_programs_take_their_owner_where_that_is_allowed(here: Path, mode: int) -> None:
    program = here / "id"
    shutil.copy(shutil.which("id") or "/usr/bin/id", program)
    os.chown(program, ALICE, ALICE)
    os.chmod(program, mode)
    option = "-u" if mode == 0o4755 else "-g"
    answer = int(subprocess.run([program, option], capture_output=True, text=True).stdout)
    assert answer == (0 if os.statvfs(here).f_flag & os.ST_NOSUID else ALICE)
