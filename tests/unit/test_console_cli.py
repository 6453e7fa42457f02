"""The commands that say who may use the console, run as processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mirrorfs.console.roles import Role
from mirrorfs.console.users import Users


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "v.toml"
    file.write_text(f'volume = "v"\nnode = "one"\n[nodes.one]\naddress = "10.0.0.1"\nkeys = "{tmp_path / "keys"}"\n')
    return tmp_path / "keys"


def console(keys: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mirrorfs", "--config", str(keys.parent / "v.toml"), "console", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=60, check=False)


def test_a_user_is_made_listed_and_removed(keys: Path) -> None:
    made = console(keys, "user", "otto", "--role", "operate", "--stdin", said="correct horse\n")
    assert (made.returncode, made.stdout) == (0, "otto may operate on the console of one\n")
    users = Users(keys)
    users.refresh()
    assert users.check("otto", "correct horse") is Role.OPERATE
    assert json.loads(console(keys, "list", "--json").stdout) == [{"name": "otto", "kind": "user", "role": "operate"}]
    assert console(keys, "remove", "otto").returncode == 0
    assert console(keys, "list").stdout == "nobody: mirrorfs console user NAME --role operate\n"


def test_a_token_is_shown_once(keys: Path) -> None:
    token = console(keys, "token", "prometheus").stdout.strip()
    users = Users(keys)
    users.refresh()
    assert users.of_token(token) == ("prometheus", Role.VIEW)
    assert token not in console(keys, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "said", "words"),
    [
        (("user", "otto"), "", "give it on standard input, with --stdin"),
        (("user", "otto", "--stdin"), "short\n", "the password has 5 characters"),
        (("user", "a b", "--stdin"), "correct horse\n", "is not a name"),
        (("remove", "nobody"), "", "no such user"),
    ],
)
def test_what_will_not_do_is_one_line_and_status_2(keys: Path, arguments: tuple[str, ...], said: str, words: str) -> None:
    done = console(keys, *arguments, said=said)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
