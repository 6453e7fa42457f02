"""Small files: put there as a whole or not at all, known again."""

import errno
import os
from pathlib import Path

import pytest

from mirrorfs.files import version, write_durably


def test_a_file_is_put_there_with_its_mode_in_place_of_another(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    before = version(file)
    write_durably(file, b"after", 0o600)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("after", 0o600)
    assert version(file) != before
    assert version(file) == version(file)


def test_what_cannot_be_written_changes_nothing_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(file, b"after", 0o600)
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_not_there_has_a_version_too(tmp_path: Path) -> None:
    file = tmp_path / "file"
    absent = version(file)
    file.touch()
    assert absent != version(file)
