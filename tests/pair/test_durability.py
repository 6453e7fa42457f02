"""What was synced is on both disks: the sync calls of both nodes are traced while an application asks for them."""

import contextlib
import json
import mmap
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.conftest import served_by
from tests.pair.support import tree_differences

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
]

#: A thread's, and one that is handed to the kernel.
_SYNC = re.compile(r"(?:\b(?:fsync|fdatasync)\(|IOCB_CMD_FD?SYNC, aio_fildes=)\d+<(?P<path>[^>]*)>")

Syncs = Callable[[str], int]


@pytest.fixture(scope="module")
def pair(fuse_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One mirrored pair for all of this, patient because tracing is slow."""
    directory = tmp_path_factory.mktemp("lab")
    try:
        with served_by(fuse_session):
            yield Lab.up(directory, options={"ack_timeout": "10s"})
    finally:
        Lab(directory).down()


@contextlib.contextmanager
def _traced(lab: Lab, directory: Path) -> Iterator[dict[str, Syncs]]:
    """Trace both nodes; gives a function for each that counts the syncs of a path (relative to the tree) so far."""
    with contextlib.ExitStack() as stack:
        counts: dict[str, Syncs] = {}
        for host in lab.hosts.values():
            trace, tree = directory / f"trace-{host.name}", f"{host.backing.relative_to(host.under)}"
            command = ["strace", "-f", "-y", "-qq", "-e", "trace=fsync,fdatasync,io_submit", "-o", str(trace)]
            strace = subprocess.Popen([*command, "-p", *map(str, host.pids())], stderr=subprocess.DEVNULL)
            stack.callback(strace.wait, timeout=30)
            stack.callback(strace.terminate)
            _wait_traced(host.pids())

            def count(path: str, trace: Path = trace, tree: str = tree) -> int:
                called = _SYNC.findall(trace.read_text())
                return sum(f"/{name}".endswith(f"/{tree}/{path}".rstrip("/")) for name in called)

            counts[host.name] = count
        yield counts


@contextlib.contextmanager
def _endless_syncs(host: Host, path: str, trace: Path) -> Iterator[Callable[[], bool]]:
    """Let no sync of `path` end on this host's node until the block is left; gives whether one has begun there."""
    # Only of this file: what the node records for itself is as quick as ever. The node opened it before it mounted over it.
    opened = host.mount / host.backing.relative_to(host.under) / path
    inject = ["-P", str(opened), "-e", "trace=fsync,fdatasync", "--inject=fsync,fdatasync:delay_enter=60s"]
    command = ["strace", "-f", "-qq", *inject, "-o", str(trace), "-p", *map(str, host.pids())]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        try:
            _wait_traced(host.pids())
            yield lambda: "sync(" in trace.read_text()
        finally:
            strace.terminate()  # which lets go of whoever waits


def _wait_traced(pids: list[int]) -> None:
    """Wait until every thread of the processes has a tracer."""

    def traced() -> bool:
        threads = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in threads)

    wait_for(traced, "the node is traced")


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_an_asynchronous_direct_write_on_a_dsync_descriptor_is_synced_on_both_nodes_before_it_completes(
    pair: Lab, tmp_path: Path
) -> None:
    job = [
        "fio", "--name=job", f"--filename={pair.one.mount / 'fio'}", "--size=1m", "--bs=4k", "--rw=randwrite", "--direct=1",
        "--sync=dsync", "--ioengine=libaio", "--iodepth=4", "--number_ios=100", "--output-format=json", "--fallocate=none",
    ]  # fmt: skip
    with _traced(pair, tmp_path) as syncs:
        done = subprocess.run(job, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path)
        counted = {name: count("fio") for name, count in syncs.items()}
    writes = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]["total_ios"]
    assert writes >= 100
    assert all(count >= writes for count in counted.values()), (writes, counted)
    assert tree_differences(pair) == []


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC"])
def test_every_write_on_a_synchronous_descriptor_is_synced_on_both_nodes_before_it_returns(
    pair: Lab, tmp_path: Path, flag: str
) -> None:
    descriptor = os.open(pair.one.mount / flag, os.O_WRONLY | os.O_CREAT | getattr(os, flag), 0o644)
    try:
        with _traced(pair, tmp_path) as syncs:
            for written in range(1, 21):
                os.write(descriptor, b"x" * 100)
                assert all(count(flag) >= written for count in syncs.values()), flag
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("call", [os.fsync, os.fdatasync])
def test_a_sync_of_a_file_has_reached_both_nodes_when_it_returns(
    pair: Lab, tmp_path: Path, call: Callable[[int], None]
) -> None:
    descriptor = os.open(pair.one.mount / call.__name__, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        with _traced(pair, tmp_path) as syncs:
            for synced in range(1, 6):
                os.write(descriptor, b"not synced yet")
                before = {name: count(call.__name__) for name, count in syncs.items()}
                assert set(before.values()) == {synced - 1}, "a write alone syncs nothing"
                call(descriptor)
                assert {count(call.__name__) for count in syncs.values()} == {synced}
    finally:
        os.close(descriptor)


def test_a_sync_of_a_directory_has_reached_both_nodes_when_it_returns(pair: Lab, tmp_path: Path) -> None:
    (pair.one.mount / "directory").mkdir()
    descriptor = os.open(pair.one.mount / "directory", os.O_RDONLY)
    try:
        with _traced(pair, tmp_path) as syncs:
            (pair.one.mount / "directory" / "file").touch()
            os.fsync(descriptor)
            assert {name: count("directory") for name, count in syncs.items()} == {"one": 1, "two": 1}
    finally:
        os.close(descriptor)


def test_a_flushed_shared_mapping_is_synced_on_both_nodes(pair: Lab, tmp_path: Path) -> None:
    (pair.one.mount / "mapped").write_bytes(bytes(8192))
    with (
        open(pair.one.mount / "mapped", "r+b") as file,
        mmap.mmap(file.fileno(), 8192) as mapping,
        _traced(pair, tmp_path) as syncs,
    ):
        mapping[5000:5004] = b"data"
        mapping.flush()
        assert all(count("mapped") >= 1 for count in syncs.values())
    for host in pair.hosts.values():
        assert (host.backing / "mapped").read_bytes()[5000:5004] == b"data", host.name


def test_a_slow_sync_on_the_standby_does_not_hold_up_the_writes_behind_it(pair: Lab, fuse_session: str, tmp_path: Path) -> None:
    if fuse_session == "kernel":
        pytest.skip("what the kernel does by itself, in a queue of its own, cannot be held up from outside")
    slow = os.open(pair.one.mount / "slow", os.O_WRONLY | os.O_CREAT, 0o644)
    quick = os.open(pair.one.mount / "quick", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(slow, b"not synced yet")
        syncing = threading.Thread(target=os.fsync, args=(slow,))
        with _endless_syncs(pair.two, "slow", tmp_path / "trace") as has_begun:
            syncing.start()
            wait_for(has_begun, "the sync has begun on the standby")
            for number in range(50):
                os.write(quick, b"behind the sync")
                (pair.one.mount / f"quick-{number}").write_bytes(b"behind the sync too")
            assert syncing.is_alive(), "the writes waited for the sync"
            assert pair.one.status()["state"] == "primary"
        syncing.join(timeout=30)
        assert not syncing.is_alive()
    finally:
        os.close(slow)
        os.close(quick)
    assert tree_differences(pair) == []
