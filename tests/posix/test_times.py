"""utimensat(2): exact nanoseconds, now, omit, and who may."""

import errno
import os
from pathlib import Path

import pytest

from tests.posix.support import (
    ALICE,
    BOTH,
    CTIME,
    KINDS,
    NEITHER,
    as_alice,
    make,
    opened,
    pass_tick,
    refused,
    touch,
    utimensat,
    watching,
)

NOW, OMIT = (0, (1 << 30) - 1), (0, (1 << 30) - 2)
SECOND = 10**9


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_kept_to_the_nanosecond(here: Path, kind: str) -> None:
    make(kind, here / "name")
    with watching(here / "name") as target, watching(here) as parent:
        os.utime(here / "name", ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321), follow_symlinks=False)
    after = os.lstat(here / "name")
    assert (after.st_atime_ns, after.st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321_987_654_321)
    assert "ctime" in target.changed
    assert parent.changed == NEITHER


@pytest.mark.parametrize(
    "stamp",
    [
        0,
        1,
        SECOND - 1,
        -1,
        -SECOND,
        -SECOND - 1,
        -(2**31) * SECOND,
        (2**31 - 1) * SECOND + 999_999_999,
        2**31 * SECOND,
        2**32 * SECOND + 1,
        2**33 * SECOND + 500_000_000,
        0x37FFFFFFF * SECOND,
    ],
)
def test_times_far_away_are_kept(here: Path, stamp: int) -> None:
    touch(here / "file")
    os.utime(here / "file", ns=(stamp, stamp))
    after = os.stat(here / "file")
    assert (after.st_atime_ns, after.st_mtime_ns) == (stamp, stamp)


@pytest.mark.parametrize("omitted", ["atime", "mtime"])
def test_an_omitted_time_stays(here: Path, omitted: str) -> None:
    touch(here / "file")
    os.utime(here / "file", ns=(1000 * SECOND, 2000 * SECOND))
    utimensat(here / "file", OMIT if omitted == "atime" else (3000, 7), OMIT if omitted == "mtime" else (4000, 8))
    after = os.stat(here / "file")
    assert after.st_atime_ns == (1000 * SECOND if omitted == "atime" else 3000 * SECOND + 7)
    assert after.st_mtime_ns == (2000 * SECOND if omitted == "mtime" else 4000 * SECOND + 8)


def test_two_omitted_times_change_nothing_and_ask_nothing(here: Path) -> None:
    touch(here / "file", 0o000)
    with watching(here / "file") as target:
        utimensat(here / "file", OMIT, OMIT)
        as_alice(lambda: utimensat(here / "file", OMIT, OMIT))
    assert target.changed == NEITHER


@pytest.mark.parametrize("which", ["atime", "mtime", "both"])
def test_now_is_the_time_of_the_call(here: Path, which: str) -> None:
    touch(here / "file")
    os.utime(here / "file", ns=(1000 * SECOND, 2000 * SECOND))
    before = pass_tick(here / "file").st_ctime_ns
    utimensat(here / "file", NOW if which != "mtime" else OMIT, NOW if which != "atime" else OMIT)
    after = os.stat(here / "file")
    assert (after.st_atime_ns > before) == (which != "mtime")
    assert (after.st_mtime_ns > before) == (which != "atime")
    assert after.st_ctime_ns > before


def test_now_for_one_and_a_value_for_the_other(here: Path) -> None:
    touch(here / "file")
    before = pass_tick(here / "file").st_ctime_ns
    utimensat(here / "file", (1000, 1), NOW)
    after = os.stat(here / "file")
    assert after.st_atime_ns == 1000 * SECOND + 1
    assert after.st_mtime_ns > before


def test_a_symbolic_link_has_times_of_its_own(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    with watching(here / "file") as target:
        utimensat(here / "link", (1000, 1), (2000, 2), follow=False)
    assert os.lstat(here / "link").st_mtime_ns == 2000 * SECOND + 2
    assert target.changed == NEITHER
    with watching(here / "link") as link:
        utimensat(here / "link", (3000, 3), (4000, 4))
    assert os.stat(here / "file").st_mtime_ns == 4000 * SECOND + 4
    assert link.changed == NEITHER


def test_times_are_set_through_a_descriptor_opened_for_reading(here: Path) -> None:
    touch(here / "file")
    with opened(here / "file") as file:
        os.utime(file, ns=(1000 * SECOND, 2000 * SECOND))
    assert os.stat(here / "file").st_mtime_ns == 2000 * SECOND


@pytest.mark.parametrize("nanoseconds", [-1, SECOND, SECOND + 1])
def test_nanoseconds_that_are_none_are_refused(here: Path, nanoseconds: int) -> None:
    touch(here / "file")
    with refused(errno.EINVAL):
        utimensat(here / "file", (0, nanoseconds), (0, 0))
    with refused(errno.EINVAL):
        utimensat(here / "file", (0, 0), (0, nanoseconds))


@pytest.mark.parametrize(
    ("atime", "mtime"), [((1, 0), (1, 0)), (NOW, (1, 0)), ((1, 0), NOW), (NOW, OMIT), (OMIT, NOW), ((1, 0), OMIT)]
)
@pytest.mark.parametrize("mode", [0o666, 0o644])
def test_only_the_owner_chooses_times(here: Path, mode: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    touch(here / "file", mode)
    with watching(here / "file") as target, refused(errno.EPERM):
        as_alice(lambda: utimensat(here / "file", atime, mtime))
    assert target.changed == NEITHER
    os.chown(here / "file", ALICE, ALICE)
    os.chmod(here / "file", 0o000)
    as_alice(lambda: utimensat(here / "file", atime, mtime))


@pytest.mark.parametrize(("mode", "may"), [(0o666, True), (0o222, True), (0o644, False), (0o444, False)])
def test_whoever_may_write_may_set_both_times_to_now(here: Path, mode: int, may: bool) -> None:
    touch(here / "file", mode)
    with watching(here / "file") as target:
        if may:
            as_alice(lambda: utimensat(here / "file", NOW, NOW))
        else:
            with refused(errno.EACCES):
                as_alice(lambda: utimensat(here / "file", NOW, NOW))
    assert ("mtime" in target.changed) == may


def test_reading_leaves_mtime_and_ctime(here: Path) -> None:
    touch(here / "file", data=b"data")
    with watching(here / "file") as file, watching(here) as directory:
        (here / "file").read_bytes()
        os.listdir(here)
    assert (file.changed, directory.changed) == (NEITHER, NEITHER)


def test_writing_moves_the_times_that_a_descriptor_and_the_name_show(here: Path) -> None:
    touch(here / "file")
    with opened(here / "file", os.O_WRONLY) as file:
        with watching(file) as by_descriptor, watching(here / "file") as by_name, watching(here) as parent:
            os.write(file, b"data")
        assert (by_descriptor.changed, by_name.changed) == (BOTH, BOTH)
        assert parent.changed == NEITHER


def test_times_that_were_set_survive_the_close_of_a_writer(here: Path) -> None:
    with opened(here / "file", os.O_CREAT | os.O_WRONLY) as file:
        os.write(file, b"data")
        os.utime(here / "file", ns=(1000 * SECOND, 2000 * SECOND))
    assert os.stat(here / "file").st_mtime_ns == 2000 * SECOND


def test_an_empty_write_moves_no_time(here: Path) -> None:
    touch(here / "file", data=b"data")
    with opened(here / "file", os.O_WRONLY) as file, watching(here / "file") as target:
        assert os.write(file, b"") == 0
    assert target.changed == NEITHER


def test_a_new_extended_attribute_moves_only_the_ctime(here: Path) -> None:
    touch(here / "file")
    with watching(here / "file") as target:
        os.setxattr(here / "file", "user.a", b"1")
    assert target.changed == CTIME
    with watching(here / "file") as target:
        os.removexattr(here / "file", "user.a")
    assert target.changed == CTIME
