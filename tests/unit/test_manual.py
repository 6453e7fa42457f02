"""The pages of the manual and what completes the command line, as `packaging/` makes them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mirrorfs.cli import app
from tests.unit.test_cli import environment

_PROJECT = Path(__file__).parents[2]


def _make(program: str, directory: Path) -> None:
    subprocess.run([sys.executable, _PROJECT / "packaging" / program, directory], check=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages by their names, as in mirrorfs-mount.1."""
    directory = tmp_path_factory.mktemp("man")
    _make("man_pages.py", directory)
    return {page.name: page for page in directory.glob("man?/*")}


def _commands(command: Any, name: str) -> dict[str, Any]:
    """A command and all that are in it, by the names of their pages."""
    inside = {
        key: each
        for key, child in getattr(command, "commands", {}).items()
        for key, each in _commands(child, f"{name}-{key}").items()
    }
    return {name: command, **inside}


COMMANDS = _commands(typer.main.get_command(app), "mirrorfs")


def test_each_command_has_a_page_that_names_all_its_options(pages: dict[str, Path]) -> None:
    assert set(pages) == {f"{name}.1" for name in COMMANDS} | {"mirrorfs.toml.5"}
    for name, command in COMMANDS.items():
        text = pages[f"{name}.1"].read_text().replace("\\-", "-")
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("-")):
            assert re.search(rf"^\\fB(.*, )?{option}( .*)?\\fR$", text, re.MULTILINE), f"{name} {option}"


def test_the_page_of_the_configuration_names_every_key_of_the_documentation(pages: dict[str, Path]) -> None:
    text = pages["mirrorfs.toml.5"].read_text().replace("\\-", "-")
    documented = re.findall(r"^\| `([^`]+)`", (_PROJECT / "docs" / "CONFIGURATION.md").read_text(), re.MULTILINE)
    assert len(documented) > 40
    assert [key for key in documented if f"\n\\fB{key}" not in text] == []
    assert "default: 7788" in text


def test_nothing_of_markdown_is_left(pages: dict[str, Path]) -> None:
    for page in pages.values():
        assert not re.search(r"`|\]\(|\*\*|^#", page.read_text(), re.MULTILINE), page.name


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff here")
def test_groff_has_nothing_to_say_about_them(pages: dict[str, Path]) -> None:
    done = subprocess.run(
        ["groff", "-ww", "-man", "-z", "-Tutf8", *pages.values()], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man here")
def test_a_reader_sees_what_the_help_says(pages: dict[str, Path]) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", pages["mirrorfs-release.1"]],
        capture_output=True,
        text=True,
        env=environment(MANWIDTH="300", MAN_KEEP_FORMATTING="", LC_ALL="C.UTF-8"),
        check=True,
    )
    assert done.stderr == ""
    assert "mirrorfs release [OPTIONS] PATH\n" in done.stdout
    assert "Give PATH back: its files stand there again as before mirrorfs. Nothing may be mounted on it.\n" in done.stdout


def test_the_shells_get_scripts_that_ask_the_program(tmp_path: Path) -> None:
    _make("completions.py", tmp_path)
    made = {
        str(path.relative_to(tmp_path / "usr" / "share")): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert set(made) == {
        "bash-completion/completions/mirrorfs",
        "zsh/vendor-completions/_mirrorfs",
        "fish/vendor_completions.d/mirrorfs.fish",
    }
    assert all("_MIRRORFS_COMPLETE=complete_" in text for text in made.values())
    assert made["zsh/vendor-completions/_mirrorfs"].startswith("#compdef mirrorfs\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mirrorfs sta", ["status"]),
        ("mirrorfs lab ", ["up", "down", "status", "exec", "kill", "start", "cut", "heal"]),
        ("mirrorfs mount --dis", ["--discard-local-data"]),
        ("mirrorfs nothing-like-it", []),
    ],
)
def test_the_program_says_what_may_follow(typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "mirrorfs"],
        capture_output=True,
        text=True,
        env=environment(_MIRRORFS_COMPLETE="complete_bash", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1)),
        check=False,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, offered, "")
