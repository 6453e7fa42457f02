"""`mirrorfs verify`: a pair that is equal is found equal whatever is written meanwhile, and a flipped bit is found and mended.

What is damaged here is damaged behind the back of both nodes: through the backing files, with their times put back.
"""

import fcntl
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mirrorfs.lab.pair import Host, Lab, wait_for
from mirrorfs.lost import LostStore
from tests.pair.support import (
    Load,
    NewLines,
    mirrorfs,
    other,
    seeded,
    small_disk,
    start_mirrored,
    status,
    tree_differences,
    wait_state,
)

pytestmark = pytest.mark.root

_FAST = "--rate=10GiB/s"
_BLOCK = 4096
_FIBMAP = 1


def _verify(host: Host, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of `mirrorfs verify`."""
    done = mirrorfs(host, "verify", "--json", _FAST, *arguments)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@contextmanager
def _behind_the_back(file: Path) -> Iterator[int]:
    """A descriptor of a backing file that is not in memory; its times are put back, and it is not in memory afterwards."""
    before = file.stat()
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
        yield descriptor
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _flip_bit(file: Path, offset: int) -> None:
    """What a disk does that forgets a bit: the block on it is another, nobody wrote."""
    with _behind_the_back(file) as descriptor:
        first = offset - offset % _BLOCK
        os.posix_fadvise(descriptor, first, _BLOCK, os.POSIX_FADV_DONTNEED)
        raw = os.open(file, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, _BLOCK) as block:
            size = os.preadv(raw, [block], first)
            block[offset - first] ^= 1
            os.pwritev(raw, [block], first)
            os.ftruncate(raw, first + size if size < _BLOCK else os.fstat(raw).st_size)
        os.close(raw)


def _write(host: Host, name: str, size: int) -> bytes:
    """A file of random bytes, on both disks."""
    data = seeded(name).randbytes(size)
    with open(host.mount / name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return data


def _kept(host: Host, exports: Path) -> dict[bytes, tuple[list[tuple[int, int]], bytes]]:
    """Ranges of each version that the host keeps, and the bytes in them as they come out of an export."""
    store = LostStore(host.backing.parent / "lost")
    exports.mkdir()
    found = {}
    for entry in store.entries():
        data = store.export(entry.id, exports / entry.id).read_bytes()
        ranges = entry.ranges or []
        found[entry.path] = (ranges, b"".join(data[first:last] for first, last in ranges))
    return found


def _on_disk(file: Path) -> bytes:
    """What the disk has of a backing file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return file.read_bytes()


@contextmanager
def _restless(lab: Lab, count: int) -> Iterator[None]:
    """So many processes that change files in every way that is compared."""
    command = [sys.executable, "-m", "tests.pair.restless"]
    restless = [subprocess.Popen([*command, lab.one.mount / f"restless-{n}", str(n)]) for n in range(count)]
    try:
        yield
        assert [process.poll() for process in restless] == [None] * count
    finally:
        for process in restless:
            process.terminate()
        assert [process.wait(60) for process in restless] == [0] * count


# ---- no false alarm


def test_an_equal_pair_is_found_equal_again_and_again_while_it_is_written_to(lab: Lab, start_load: Callable[..., Load]) -> None:
    _write(lab.one, "quiet", 3 << 20)
    load = start_load(lab.one.mount)
    load.wait_noted(50)
    for _ in range(3):
        load.wait_noted(10)
        returned, found = _verify(lab.one)
        assert (returned, found["differences"]) == (0, [])
        assert found["bytes"] >= 3 << 20
    assert load.stop() == [""] * len(load.notes)
    shutil.rmtree(lab.one.mount / load.name)
    with _restless(lab, 3):
        for _ in range(12):
            returned, found = _verify(lab.one)
            assert (returned, found["differences"]) == (0, [])
    assert tree_differences(lab) == []


def test_holes_and_files_of_every_kind_are_equal_on_an_equal_pair(lab: Lab) -> None:
    root = lab.one.mount
    with open(root / "sparse", "wb") as file:
        for offset in (0, 1 << 20, 300 << 20, (1 << 30) - 10):
            file.seek(offset)
            file.write(b"data")
    (root / "directory" / "below").mkdir(parents=True)
    (root / "directory" / "link").symlink_to("nowhere")
    (root / "directory" / "below" / "other name").hardlink_to(root / "sparse")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (root / os.fsdecode(b"\xff\n")).touch()
    os.setxattr(root / "directory", "user.name", b"value")
    returned, found = _verify(lab.one)
    assert (returned, found["differences"], found["files"]) == (0, [], 8)


# ---- what nobody wrote


@pytest.mark.parametrize(("damaged", "good"), [("two", "one"), ("one", "two")], ids=["on the standby", "on the primary"])
def test_a_flipped_bit_that_nobody_wrote_is_found_and_mended_and_the_bad_block_is_kept(
    lab: Lab, tmp_path: Path, damaged: str, good: str
) -> None:
    (lab.one.mount / "directory").mkdir()
    data = _write(lab.one, "directory/file", 1 << 20)
    _write(lab.one, "another", 100_000)
    assert _verify(lab.one)[0] == 0
    host = lab.hosts[damaged]
    _flip_bit(host.backing / "directory" / "file", 300_000)
    bad = _on_disk(host.backing / "directory" / "file")
    assert [at for at in range(len(data)) if data[at] != bad[at]] == [300_000]
    lines = NewLines(lab.one)
    line = "directory/file: content differs in bytes 299008-303103"
    returned, found = _verify(lab.one)
    assert (returned, found["differences"]) == (1, [line])
    assert any("ERROR" in logged and line in logged for logged in lines())
    assert lab.one.status()["verify"]["last"]["found"] == 1
    assert _on_disk(host.backing / "directory" / "file") == bad

    if damaged == "one":
        (lab.one.mount / "directory" / "file").read_bytes()  # the kernel may know the bad block now
    returned, found = _verify(lab.one, "--repair", "--from", good)
    assert (returned, found["differences"], found["repaired"]) == (1, [f"{line} (repaired from {good})"], 1)
    for mended in lab.hosts.values():
        assert _on_disk(mended.backing / "directory" / "file") == data
        assert (mended.mount / "directory" / "file").read_bytes() == data
    assert _verify(lab.one)[0] == 0
    assert tree_differences(lab) == []
    assert _kept(host, tmp_path / "damaged") == {b"/directory/file": ([(299_008, 303_104)], bad[299_008:303_104])}
    assert _kept(other(lab, host), tmp_path / "good") == {}


@pytest.mark.parametrize("damaged", ["two", "one"], ids=["on the standby", "on the primary"])
def test_a_bit_that_flips_on_the_disk_is_found_although_memory_has_the_right_one(tmp_path: Path, damaged: str) -> None:
    lab = Lab.create(tmp_path / "lab")
    host, image = lab.hosts[damaged], tmp_path / "disk"
    with small_disk(lab, host, image, 64 << 20):
        start_mirrored(lab)
        _write(lab.one, "file", 1 << 20)
        data = (host.backing / "file").read_bytes()
        with open(host.backing / "file", "rb") as file:
            block = int.from_bytes(fcntl.ioctl(file, _FIBMAP, (70).to_bytes(4, "little")), "little")
            size = os.fstatvfs(file.fileno()).f_bsize
        with open(image, "r+b") as disk:
            disk.seek(block * size)
            first = disk.read(1)
            assert first == data[70 * size :][:1]
            disk.seek(block * size)
            disk.write(bytes([first[0] ^ 1]))
        assert (host.backing / "file").read_bytes() == data, "memory has the right one"
        returned, found = _verify(lab.one)
        assert (returned, found["differences"]) == (
            1,
            [f"file: content differs in bytes {70 * size // _BLOCK * _BLOCK}-{70 * size // _BLOCK * _BLOCK + _BLOCK - 1}"],
        )


@pytest.mark.parametrize(("damaged", "good"), [("two", "one"), ("one", "two")], ids=["on the standby", "on the primary"])
def test_blocks_are_mended_while_they_are_written_to(lab: Lab, damaged: str, good: str) -> None:
    expected = bytearray(_write(lab.one, "file", 4 << 20))
    blocks = range(_BLOCK, len(expected), 32 * _BLOCK)
    for block in blocks:
        _flip_bit(lab.hosts[damaged].backing / "file", block + 900)
    done = threading.Event()

    def write(number: int) -> None:
        chance = seeded("writer", number)
        mine = blocks[number::4]
        with open(lab.one.mount / "file", "r+b", buffering=0) as file:
            for at in range(1000, _BLOCK - 3, 3):  # beside the bit, in the damaged blocks, and nowhere twice
                for block in chance.sample(mine, len(mine)):
                    if done.is_set():
                        return
                    expected[block + at : block + at + 3] = content = chance.randbytes(3)
                    os.pwrite(file.fileno(), content, block + at)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    try:
        returned, found = _verify(lab.one, "--repair", "--from", good)
        again = _verify(lab.one)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert (returned, found["repaired"], len(found["differences"])) == (1, 1, 1), found
    assert again[0] == 0, again
    assert tree_differences(lab) == []
    assert _on_disk(lab.one.backing / "file") == expected
    assert (lab.one.mount / "file").read_bytes() == expected


@pytest.mark.parametrize(("damaged", "good"), [("two", "one"), ("one", "two")], ids=["on the standby", "on the primary"])
def test_attributes_that_changed_underneath_are_found_and_mended(lab: Lab, damaged: str, good: str) -> None:
    _write(lab.one, "mode", 10)
    _write(lab.one, "names", 10)
    (lab.one.mount / "directory").mkdir()
    (lab.one.mount / "link").symlink_to("nowhere")
    os.setxattr(lab.one.mount / "names", "user.kept", b"value")
    os.setxattr(lab.one.mount / "names", "user.changed", b"value")
    os.setxattr(lab.one.mount / "names", "user.removed", b"value")
    assert tree_differences(lab) == []
    under = lab.hosts[damaged].backing
    (under / "mode").chmod(0o4777)
    os.setxattr(under / "names", "user.changed", b"other")
    os.setxattr(under / "names", "user.added", b"value")
    os.removexattr(under / "names", "user.removed")
    os.utime(under / "directory", ns=(0, 5))
    os.chown(under / "link", 1, 2, follow_symlinks=False)
    returned, found = _verify(lab.one)
    assert returned == 1
    assert [line.split(" ")[:2] for line in found["differences"]] == [
        ["directory:", "mtime"],
        ["link:", "uid"],
        ["mode:", "type"],
        ["names:", "extended"],
    ]
    returned, found = _verify(lab.one, "--repair", "--from", good)
    assert (returned, found["found"], found["repaired"]) == (1, 4, 4), found
    assert _verify(lab.one)[0] == 0
    assert tree_differences(lab) == []
    assert (lab.one.mount / "mode").stat().st_mode == 0o100644


@pytest.mark.parametrize(("damaged", "good"), [("two", "one"), ("one", "two")], ids=["on the standby", "on the primary"])
@pytest.mark.parametrize("size", [3000, 200_000, 300_001], ids=["much shorter", "shorter", "longer"])
def test_a_file_of_another_size_gets_the_right_one_and_what_it_had_more_is_kept(
    lab: Lab, tmp_path: Path, damaged: str, good: str, size: int
) -> None:
    data = _write(lab.one, "file", 300_000)
    host = lab.hosts[damaged]
    with _behind_the_back(host.backing / "file") as descriptor:
        os.ftruncate(descriptor, size)
    returned, found = _verify(lab.one, "--repair", "--from", good)
    assert (returned, found["repaired"]) == (1, 1), found
    assert f"size {size if damaged == 'one' else 300_000} bytes on one" in found["differences"][0]
    assert [_on_disk(mended.backing / "file") for mended in lab.hosts.values()] == [data, data]
    if size > len(data):
        assert _kept(host, tmp_path / "kept")[b"/file"][1].endswith(data[-20:] + b"\0")
    assert _verify(lab.one)[0] == 0
    assert tree_differences(lab) == []


def test_names_that_came_or_went_underneath_are_found_and_left_as_they_are(lab: Lab) -> None:
    (lab.one.mount / "directory").mkdir()
    for name in ("gone", "exchanged", "other"):
        _write(lab.one, f"directory/{name}", 10)
    under = lab.two.backing / "directory"
    before = under.stat()
    (under / "gone").unlink()
    (under / "strange").touch()
    (under / "exchanged").rename(under / "moved")
    (under / "other").rename(under / "exchanged")
    (lab.one.backing / "directory" / "strange here").touch()
    for host in (lab.one, lab.two):
        os.utime(host.backing / "directory", ns=(before.st_atime_ns, before.st_mtime_ns))
    for arguments in ([], ["--repair", "--from", "one"]):
        returned, found = _verify(lab.one, *arguments)
        assert returned == 1
        lines = {line.partition(":")[0]: line.partition(": ")[2] for line in found["differences"]}
        assert lines.keys() == {
            f"directory/{name}" for name in ("gone", "strange", "exchanged", "moved", "other", "strange here")
        }
        assert lines["directory/gone"].startswith("only on one")
        assert lines["directory/moved"].startswith("only on two")
        assert lines["directory/strange"].startswith("on two it was put there underneath")
        assert lines["directory/strange here"].startswith("on one it was put there underneath")
        assert lines["directory/exchanged"].startswith("another file on two")
        assert all(("not repaired" in line) == bool(arguments) for line in found["differences"])


# ---- when


def test_a_node_that_is_not_the_primary_of_a_mirrored_pair_refuses_in_one_line(lab: Lab) -> None:
    for host, advice in ((lab.two, "run it on one"), (lab.one, "not mirrored")):
        refused = mirrorfs(host, "verify")
        assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (3, "", 1)
        assert advice in refused.stderr
        lab.two.kill()
        wait_state(lab.one, "solo")


def test_there_is_one_walk_at_a_time_and_it_ends_with_its_command(lab: Lab) -> None:
    _write(lab.one, "file", 3 << 20)
    command = [sys.executable, "-m", "mirrorfs", "verify", "--rate=64KiB/s", "--config", str(lab.one.config)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lab.one.status()["verify"]["running"], "a walk is under way")
    refused = mirrorfs(lab.one, "verify")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (3, 1)
    assert "running already" in refused.stderr
    assert first.stderr is not None
    assert first.stderr.readline().startswith("verify: ")  # it shows how far it is
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=30)
    assert first.returncode == 130
    wait_for(lambda: not lab.one.status()["verify"]["running"], "the walk has ended")
    assert lab.one.status()["verify"]["last"] is None
    assert _verify(lab.one)[0] == 0


def test_a_walk_that_loses_the_other_node_says_that_it_is_not_complete(lab: Lab) -> None:
    _write(lab.one, "file", 3 << 20)
    command = [sys.executable, "-m", "mirrorfs", "verify", "--rate=64KiB/s", "--config", str(lab.one.config)]
    walk = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lab.one.status()["verify"]["running"], "a walk is under way")
    lab.two.kill()
    out, err = walk.communicate(timeout=60)
    assert (walk.returncode, out) == (3, "")
    assert "not mirrored any more" in err.splitlines()[-1]


def test_the_schedule_finds_what_differs_and_raises_an_alarm(lab: Lab) -> None:
    for host in lab.hosts.values():
        host.stop()
        with open(host.config, "a") as file:
            file.write('\n[verify]\nevery = "1s"\nrate = "1GiB/s"\n')
        host.start()
    lab.wait_mirrored()
    primary = lab.primary()
    assert primary is not None
    wait_for(lambda: (status(primary)["verify"]["last"] or {}).get("found") == 0, "a scheduled walk found nothing")
    _write(primary, "file", 100_000)
    lines = NewLines(primary)
    _flip_bit(other(lab, primary).backing / "file", 50_000)
    lines.wait(lambda line: "ERROR" in line and "file: content differs in bytes 49152-53247" in line, "an alarm")
    wait_for(lambda: status(primary)["verify"]["last"]["found"] == 1, "the status says so")


def test_a_name_of_no_node_is_a_usage_error(lab: Lab) -> None:
    wrong = mirrorfs(lab.one, "verify", "--repair", "--from", "three")
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)
    assert "one, two" in wrong.stderr
