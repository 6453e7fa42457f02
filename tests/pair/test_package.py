"""The Debian package: built, installed, used, removed."""

import os
import pty
import select
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs import __version__
from tests.pair.machines import Machine, one_machine, why_not

#: One node, whose other one has never been there.
_CONFIGURATION = """
volume = "db"
node = "one"
mount = "/data"
[nodes.one]
address = "127.0.0.1"
"""

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture(scope="module")
def machine(built_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the package is installed."""
    with one_machine(tmp_path_factory.mktemp("machine")) as machine:
        machine.copy(built_package, "/root/mirrorfs.deb")
        machine.run("dpkg", "--install", "/root/mirrorfs.deb")
        yield machine


def test_what_is_in_it_belongs_to_root_and_has_its_place(machine: Machine) -> None:
    listed = machine.run("dpkg-deb", "--contents", "/root/mirrorfs.deb").splitlines()
    assert {line.split()[1] for line in listed} == {"root/root"}
    names = [line.split()[5].removeprefix(".") for line in listed]
    for name in (
        "/usr/bin/mirrorfs",
        "/usr/sbin/mount.fuse.mirrorfs",
        "/usr/lib/systemd/system/mirrorfs@.service",
        "/usr/lib/systemd/system/mirrorfs-controller@.service",
        "/usr/lib/ocf/resource.d/mirrorfs/volume",
        "/usr/share/doc/mirrorfs/README.md",
        "/usr/share/doc/mirrorfs/ansible/roles/mirrorfs/tasks/main.yml",
        "/usr/share/doc/mirrorfs/copyright",
        "/usr/share/man/man1/mirrorfs-mount.1.gz",
        "/usr/share/man/man5/mirrorfs.toml.5.gz",
        "/usr/share/zsh/vendor-completions/_mirrorfs",
        "/usr/share/fish/vendor_completions.d/mirrorfs.fish",
    ):
        assert name in names
    assert not [name for name in names if "/_pytest/" in name or "/matplotlib/" in name]


def test_the_program_runs_with_an_environment_of_its_own(machine: Machine) -> None:
    assert machine.run("mirrorfs", "--version") == f"mirrorfs {__version__}"
    machine.run("mirrorfs", "doctor")


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man here")
def test_the_manual_is_found(machine: Machine) -> None:
    for page in ("mirrorfs", "mirrorfs-split-brain-resolve", "mirrorfs.toml"):
        assert machine.run("zcat", machine.run("man", "-w", page)).startswith(".TH ")
    assert "mirrorfs mount [OPTIONS] [PATH]" in machine.run("man", "mirrorfs-mount")


def test_bash_completes_the_commands(machine: Machine) -> None:
    script = "/usr/share/bash-completion/completions/mirrorfs"
    assert "mirrorfs status " in _typed(machine, f"source {script}", "mirrorfs sta\t", "mirrorfs status ")


def _typed(machine: Machine, first: str, keys: str, expected: str) -> str:
    """What an interactive bash shows after a line and some keys: up to what is expected, or 20 s long."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = [*machine.entering(), "bash", "--norc", "--noprofile", "-i"]
        os.execvp(command[0], command)
    try:
        # The terminal shows what is typed, too: so the quotes.
        os.write(terminal, f"{first}; echo it' 'is' 'read\n".encode())
        _read_until(terminal, "it is read")
        os.write(terminal, keys.encode())
        return _read_until(terminal, expected)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def _read_until(terminal: int, expected: str) -> str:
    shown, end = "", time.monotonic() + 20
    while expected not in shown and (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 65536).decode()
    return shown


def test_a_node_of_the_package_keeps_it_installed_while_it_is_mounted(machine: Machine) -> None:
    machine.write("/etc/mirrorfs/db.toml", _CONFIGURATION)
    machine.run("systemctl", "start", "mirrorfs@db")
    try:
        assert "/usr/lib/mirrorfs/" in machine.run("cat", f"/proc/{machine.property('mirrorfs@db', 'MainPID')}/maps")
        refused = machine.result("dpkg", "--remove", "mirrorfs")
        assert refused.returncode != 0
        assert "unmount it first: mirrorfs unmount" in refused.stdout
        assert machine.is_active("mirrorfs@db")
        machine.run("mirrorfs", "unmount")
    finally:
        machine.run("systemctl", "stop", "mirrorfs@db")


def test_nothing_is_left_of_it(machine: Machine) -> None:
    machine.run("sh", "-c", "rm -rf /etc/mirrorfs/*")
    files = [line for line in machine.run("dpkg", "--listfiles", "mirrorfs").splitlines() if "mirrorfs" in line]
    assert len(files) > 1000
    machine.run("dpkg", "--purge", "mirrorfs")
    left = machine.run("sh", "-c", 'for file; do [ ! -e "$file" ] && [ ! -L "$file" ] || echo "$file"; done', "sh", *files)
    assert left == ""
