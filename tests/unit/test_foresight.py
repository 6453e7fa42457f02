"""What is told to the peer before it is made: nothing that an application could make fail at will."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from mirrorfs.core import ids
from mirrorfs.core import operations as ops
from mirrorfs.foresight import Foresight
from mirrorfs.tree import Tree

pytestmark = pytest.mark.root
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(root)
    tree.set_volume(bytes(16))
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    monkeypatch.setattr(tree, "statvfs", lambda: SimpleNamespace(f_files=10**6, f_ffree=10**6, f_bavail=10**6, f_frsize=4096))
    yield tree
    tree.table.clear()
    os.close(root)


SURE: list[ops.Change] = [
    ops.MakeNode(ids.ROOT, b"new", 2, FILE, 0, 0),
    ops.Symlink(ids.ROOT, b"new", 2, b"x" * 255, 0, 0),
    ops.Unlink(ids.ROOT, b"file"),
    ops.Rename(ids.ROOT, b"file", ids.ROOT, b"new"),
    ops.Write(5, 0, b"data"),
    ops.SetAttributes(ids.ROOT, mode=0o700, mtime_ns=1),
]
UNSURE: list[ops.Change] = [
    ops.MakeNode(ids.ROOT, b"file", 2, FILE, 0, 0),
    ops.MakeNode(99, b"new", 2, FILE, 0, 0),
    ops.MakeNode(ids.ROOT, b"n" * 256, 2, FILE, 0, 0),
    ops.MakeNode(ids.ROOT, b"..", 2, FILE, 0, 0),
    ops.Symlink(ids.ROOT, b"new", 2, b"x" * 1024, 0, 0),
    ops.Unlink(ids.ROOT, b"directory"),
    ops.Unlink(ids.ROOT, b"missing"),
    ops.Rename(ids.ROOT, b"file", ids.ROOT, b"directory"),
    ops.Rename(ids.ROOT, b"directory", ids.ROOT, b"new"),
    ops.Rename(ids.ROOT, b"file", ids.ROOT, b"new", ops.RENAME_EXCHANGE),
    ops.Write(5, 1 << 40, b"data"),
    ops.Write(5, 0, b""),
    ops.SetAttributes(ids.ROOT, size=1),
    ops.SetAttributes(ids.ROOT, uid=1),
    ops.SetAttributes(99, mode=0o600),
    ops.SetXattr(5, b"user.a", b"value"),
]


@pytest.mark.parametrize("change", SURE, ids=repr)
async def test_what_nothing_speaks_against_is_told_first(tree: Tree, change: ops.Change) -> None:
    assert Foresight(tree).will_succeed(change)


@pytest.mark.parametrize("change", UNSURE, ids=lambda change: repr(change)[:60])
async def test_what_may_fail_is_made_first(tree: Tree, change: ops.Change) -> None:
    assert not Foresight(tree).will_succeed(change)


@pytest.mark.parametrize(("files", "blocks"), [(10**6, 1000), (100, 10**6)])
async def test_nothing_is_told_first_on_a_disk_that_is_nearly_full(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, files: int, blocks: int
) -> None:
    room = SimpleNamespace(f_files=10**6, f_ffree=files, f_bavail=blocks, f_frsize=4096)
    foresight = Foresight(tree)
    assert foresight.has_room()
    monkeypatch.setattr(tree, "statvfs", lambda: room)
    assert foresight.has_room()  # it has looked just now
    foresight.look_again()
    assert not any(foresight.will_succeed(change) for change in SURE)


async def test_after_a_wrong_guess_it_is_sure_of_nothing_for_a_while_and_for_longer_after_the_next(
    tree: Tree, autojump_clock: trio.testing.MockClock
) -> None:
    foresight = Foresight(tree)
    for refused_s in (60, 120):
        assert all(map(foresight.will_succeed, SURE))
        foresight.was_wrong()
        await trio.sleep(refused_s - 1)
        assert not any(map(foresight.will_succeed, SURE))
        await trio.sleep(2)
