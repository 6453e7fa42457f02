"""Modification times: many files in one operation, and none is forgotten for another's sake."""

import errno
import os
import stat
from types import SimpleNamespace
from typing import Any

import pytest

from mirrorfs.core import operations as ops
from mirrorfs.settling import Settling
from mirrorfs.table import Known


class _Tree:
    """Knows files by numbers; the modification time of each is ten times its number."""

    def __init__(self, count: int) -> None:
        self.files = {number: Known(number, stat.S_IFREG) for number in range(1, count + 1)}
        self.table = SimpleNamespace(find=self.files.get, drop_unused=lambda known: None)

    def stat(self, known: Known) -> Any:
        return SimpleNamespace(st_mtime_ns=known.id * 10)


def _settling(tree: Any) -> tuple[Settling, list[ops.SetAttributes]]:
    told: list[ops.SetAttributes] = []
    return Settling(tree, told.append), told


def test_many_times_are_told_in_few_operations_each_once() -> None:
    tree, told, introduced = _Tree(2300), list[ops.Times](), list[int]()
    settling, singly = _settling(tree)
    for number in (*tree.files, 5, 7):
        settling.add(number)
    settling.settle_together(introduced.append, told.append)
    assert [len(times.files) for times in told] == [1000, 1000, 300]
    assert [time for times in told for time in times.files] == [(number, number * 10) for number in tree.files]
    assert introduced == list(tree.files)
    assert not settling
    assert singly == []
    assert all(known.kept == 0 for known in tree.files.values())


def test_nothing_to_tell_is_no_operation() -> None:
    told = list[ops.Times]()
    settling, _ = _settling(_Tree(1))
    settling.settle_together(lambda number: None, told.append)
    assert told == []


def test_a_file_that_cannot_be_introduced_is_skipped_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tree, told = _Tree(4), list[ops.Times]()
    settling, _ = _settling(tree)

    def introduce(number: int) -> None:
        assert not told, "every file is introduced before the times are told"
        if number == 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for number in tree.files:
        settling.add(number)
    tree.files[3].gone = True
    settling.settle_together(introduce, told.append)
    assert told == [ops.Times(((1, 10), (4, 40)))]
    assert "cannot settle the modification time of 2" in caplog.text
    assert not settling
    assert all(known.kept == 0 for known in tree.files.values())


@pytest.mark.parametrize(
    ("change", "files"),
    [
        (ops.Write(1, 0, b"data"), {1}),
        (ops.Allocate(2, 0, 0, 4096), {2}),
        (ops.CopyRange(1, 0, 2, 0, 4096), {2}),
        (ops.SetAttributes(1, mode=0o600), set()),
        (ops.SetXattr(1, b"user.name", b"value"), set()),
    ],
)
def test_what_changes_data_changes_a_time(change: ops.Change, files: set[int]) -> None:
    settling, told = _settling(_Tree(2))
    settling.note(change)
    settling.settle_all()
    assert {change.file for change in told} == files
