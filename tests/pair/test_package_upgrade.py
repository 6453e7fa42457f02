"""The package of an earlier version is upgraded on two machines that a systemd has booted, as docs/OPERATIONS.md says."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pair.machines import two_machines, why_not
from tests.pair.support import NUMBERS, TELL, Client
from tests.pair.test_systemd_boot import CONTROLLER, FAILOVER, MOUNT, Pair, status

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not())]

_PAGE = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"
_ADDRESS = "10.77.0.100"
#: Notes where it was started, then serves.
_APP = """
[Service]
ExecStartPre=/bin/sh -c "hostname >>/data/starts"
ExecStart=/usr/bin/python3 /root/numbers.py /data/numbers
"""
#: What the script of that version makes, with a lower number, and quickly: nothing is compiled or compressed.
_BUILD = """
import compileall, runpy, sys
from importlib import metadata
metadata.version = lambda name: "0.0.1"
compileall.compile_dir = lambda *arguments, **options: True
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands_of_the_page() -> list[tuple[str, str]]:
    """For each line of the first block on upgrading, the machine and the command."""
    section = _PAGE.read_text().partition("\n## Upgrading a running pair")[2]
    block = section.split("```")[1]
    return [(host, line.split("  #")[0].strip()) for host, line in re.findall(r"^(\w+)# (.*)$", block, re.MULTILINE)]


@pytest.fixture
def pair(old_project: Path, built_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two machines with the old package, whose controllers look after an application; the new one lies beside."""
    directory = tmp_path_factory.mktemp("machines")
    command = [sys.executable, "-c", _BUILD, str(old_project / "packaging" / "build_deb.py"), str(directory)]
    environment = {"PATH": "/usr/bin:/bin", "DPKG_DEB_COMPRESSOR_TYPE": "none"}
    built = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    with two_machines(directory) as (one, two):
        pair = Pair(one, two)
        pair.install(Path(built.stdout.strip()))
        for machine in (one, two):
            machine.copy(built_package, "/root/mirrorfs_NEW.deb")
            machine.write("/root/numbers.py", NUMBERS)
            machine.write("/etc/systemd/system/app.service", _APP)
        pair.acquaint()
        for machine in (one, two):
            machine.run("sh", "-c", f"cat >>/etc/mirrorfs/db.toml <<'end'\n{FAILOVER}\nend")
            machine.run("systemctl", "enable", "--now", MOUNT)
        one.run("mirrorfs", "promote")
        pair.wait_mirrored()
        for machine in (one, two):
            machine.run("systemctl", "enable", "--now", CONTROLLER)
        yield pair


def test_a_pair_is_upgraded_by_the_commands_of_the_page_and_the_application_moves_once(pair: Pair) -> None:
    machines = {"one": pair.one, "two": pair.two}

    def tell(number: int) -> bool:
        return pair.two.result("timeout", "5", "/usr/bin/python3", "-c", TELL, _ADDRESS, str(number)).returncode == 0

    serving, moves = "one", 0
    with Client(tell) as client:
        client.wait_noted(5)
        for host, command in commands_of_the_page():
            machine = machines[host]
            if command.startswith("apt-get install"):
                assert command == "apt-get install ./mirrorfs_NEW.deb"
                machine.run("dpkg", "--install", "/root/mirrorfs_NEW.deb")
                assert not machine.is_active(MOUNT)
                assert not machine.is_active(CONTROLLER)
            else:
                machine.run("sh", "-c", command)
            if command == "mirrorfs resume":
                pair.wait_mirrored(primary=machine)
            if command == "mirrorfs switchover":
                serving, moves = host, moves + 1
            assert [name for name, each in machines.items() if each.is_active("app")] == [serving], command
        client.wait_noted(5)
    assert moves == 1
    assert pair.two.run("cat", "/data/starts").split() == ["one", "two"]
    for machine in machines.values():
        assert machine.run("dpkg-query", "--show", "--showformat=${Version}", "mirrorfs") != "0.0.1"
        assert status(machine)["peer"]["protocol"] == 8
        assert machine.property(MOUNT, "NRestarts") == machine.property(CONTROLLER, "NRestarts") == "0"
        assert set(client.noted) - set(map(int, machine.run("cat", "/data/numbers").split())) == set()
