"""Where a file has data, also while it is being truncated."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mirrorfs.resync import layout


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    made = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(made, b"x" * 65536, 0)
    return made


def test_what_lies_past_the_end_is_a_hole(descriptor: int) -> None:
    assert list(layout.segments(descriptor, 0, 131072)) == [(True, 0, 65536), (False, 65536, 131072)]
    os.close(descriptor)


def test_a_file_that_is_truncated_between_two_looks_raises_nothing(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(number: int, start: int, what: int) -> int:
        found = os.lseek(number, start, what)
        os.ftruncate(number, 0)
        return found

    monkeypatch.setattr(layout, "os", SimpleNamespace(lseek=lseek, SEEK_DATA=os.SEEK_DATA, SEEK_HOLE=os.SEEK_HOLE))
    assert list(layout.segments(descriptor, 0, 65536)) == [(True, 0, 65536)]
    os.close(descriptor)
