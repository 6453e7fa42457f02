"""The session of docs/TUTORIAL.md: every command as it stands there, in its order, and every answer."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from mirrorfs.lab.pair import Lab

_PAGE: Final = Path(__file__).parents[2] / "docs" / "TUTORIAL.md"
_DEFAULT: Final = "/var/lib/mirrorfs-lab/default"
#: What only looks is asked again until it has come to what the page says.
_LOOKS: Final = "mirrorfs lab status"
_DEADLINE_S: Final = 60.0
_END: Final = "-- that was all"

pytestmark = pytest.mark.root


def _session(directory: Path) -> list[tuple[str, str]]:
    """The commands and what each prints, of a lab in that directory."""
    blocks = re.findall(r"^```console\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks).replace(_DEFAULT, str(directory)), re.MULTILINE)
    assert len(commands) > 30
    return commands


class _Shell:
    """A bash that reads one command after the other."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def run(self, command: str) -> str:
        """Run it; what it has printed, on stdout and stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{{ {command}\n}} </dev/null; echo '{_END}'\n")
        self.process.stdin.flush()
        printed = ""
        for line in self.process.stdout:
            if line == f"{_END}\n":
                return printed
            printed += line
        raise AssertionError(f"bash has ended in {command}: {printed}")

    def end(self) -> None:
        """End it, whatever it does."""
        with self.process:  # closes the pipes, and waits
            self.process.kill()


def test_the_tutorial_is_what_happens(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    program = tmp_path / "bin" / "mirrorfs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mirrorfs "$@"\n')
    program.chmod(0o755)
    shell = _Shell(
        {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "MIRRORFS_LAB_DIR": str(directory),
            "LC_ALL": "C.UTF-8",
        }
    )
    try:
        for command, said in _session(directory):
            expected = re.escape(said).replace(re.escape("..."), ".*")
            end = time.monotonic() + _DEADLINE_S
            printed = shell.run(command)
            while not re.fullmatch(expected, printed) and command == _LOOKS and time.monotonic() < end:
                time.sleep(0.2)
                printed = shell.run(command)
            assert re.fullmatch(expected, printed), f"$ {command}\n{printed}"
        assert not directory.exists()
    finally:
        shell.end()
        if directory.exists():
            Lab(directory).down()
