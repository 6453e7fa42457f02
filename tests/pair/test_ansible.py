"""The Ansible role and its playbooks, as an integrator runs them: over ssh, on two machines that a systemd has booted."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from mirrorfs.lab.network import ADDRESSES
from tests.pair.machines import Machine, two_machines, why_not

_ANSIBLE: Final = Path(__file__).parents[2] / "packaging" / "ansible"
_PROGRAMS: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_UNITS: Final = ("mirrorfs@db", "mirrorfs-controller@db")
_NEXT: Final = "99.0"
#: An application under the mount, and the module that makes it a service.
_APP: Final = '[Service]\nExecStart=/bin/sh -c "echo started >>/data/log; exec sleep infinity"\n'
_MODULE: Final = """
summary = "an application"
[systemd]
configuration = '''
[[service]]
name = "app"
unit = "app.service"
'''
"""


def _why_not() -> str:
    missing = [name for name in ("ansible-playbook", "sshd") if shutil.which(name, path=_PROGRAMS) is None]
    return f"{' and '.join(missing)} not installed here" if missing else why_not()


pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


@dataclass(frozen=True, slots=True)
class Play:
    """What a run of ansible-playbook came to."""

    status: int
    said: str

    @property
    def changed(self) -> int:
        """Tasks that changed something, on all hosts; AssertionError if the play did not end well."""
        assert self.status == 0, self.said
        return sum(map(int, re.findall(r" changed=(\d+)", self.said)))


class Site:
    """The two machines, an inventory with them, and a copy of the playbooks beside it, as an integrator has one."""

    def __init__(self, directory: Path, one: Machine, two: Machine) -> None:
        self.one, self.two = one, two
        self.directory = directory / "fleet"
        self._entering = one.network.entering(one.name)
        shutil.copytree(_ANSIBLE, self.directory)
        key = directory / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        for machine in (one, two):
            machine.write("/root/.ssh/authorized_keys", key.with_suffix(".pub").read_text())
            machine.run("sh", "-c", "chmod 700 /root/.ssh; ssh-keygen -A; systemctl start ssh")
        self.inventory = {
            "ansible_user": "root",
            "ansible_become": False,  # root already, and a small machine has no sudo
            "ansible_ssh_private_key_file": str(key),
            "ansible_ssh_common_args": "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
            "mirrorfs_volume": "db",
        }

    def play(self, playbook: str, *options: str, **variables: Any) -> Play:
        """Run a playbook, on a control machine that is on the network of the two."""
        hosts = {name: {"ansible_host": address, "mirrorfs_address": address} for name, address in ADDRESSES.items()}
        pair = {"children": {"pair_tests": {"hosts": hosts}}, "vars": self.inventory | variables}
        (self.directory / "inventory.yml").write_text(yaml.safe_dump({"mirrorfs": pair}))
        command = ["ansible-playbook", "--inventory", "inventory.yml", playbook, *options]
        environment = {
            "PATH": _PROGRAMS,
            "HOME": str(self.directory),
            "LANG": "C.UTF-8",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",  # what takes time here is Python's start, once for each task and not twice
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=10s",
        }
        done = subprocess.run(
            [*self._entering, *command],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return Play(done.returncode, done.stdout)

    def status(self, machine: Machine) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(machine.run("mirrorfs", "status", "--json", check=False))
        return found

    def wait_serves(self, machine: Machine) -> None:
        """Until the application is there with its address, and both nodes are in sync."""

        def serves() -> bool:
            is_there = machine.is_active("app") and "10.77.0.100" in machine.run("ip", "-4", "address")
            found = self.status(machine)
            return is_there and (found["state"], found["in_sync"]) == ("primary", ["one", "two"])

        machine.wait_for(serves, f"{machine.name} serves, and both are in sync")

    def pids(self) -> list[str]:
        """Of all that the units run, on both."""
        return [machine.property(unit, "MainPID") for machine in (self.one, self.two) for unit in _UNITS]


def _newer(package: Path, directory: Path, version: str, preinst: str = "") -> Path:
    """The package as one of that version, with that script."""
    root, target = directory / version, directory / f"mirrorfs_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", package, root], check=True)
    control = root / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*$", f"Version: {version}", control.read_text(), flags=re.MULTILINE))
    if preinst:
        (root / "DEBIAN" / "preinst").write_text(f"#!/bin/sh\n{preinst}\n")
        (root / "DEBIAN" / "preinst").chmod(0o755)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, target], check=True, stdout=subprocess.DEVNULL)
    return target


@pytest.fixture(scope="module")
def site(built_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A pair that the role has made of two machines with nothing but an application; tests leave it whole, one the primary."""
    directory = tmp_path_factory.mktemp("ansible")
    with two_machines(directory) as (one, two):
        site = Site(directory, one, two)
        site.inventory |= {
            "mirrorfs_package": str(built_package),
            "mirrorfs_mount": "/data",
            "mirrorfs_module": "app",
            "mirrorfs_vips": ["10.77.0.100/24@eth0"],
            "mirrorfs_set_aside": False,
        }
        for machine in (one, two):
            machine.write("/etc/systemd/system/app.service", _APP)
            machine.run("systemctl", "daemon-reload")
        one.write("/etc/mirrorfs/modules/app.toml", _MODULE)
        one.write("/data/before", "was here before mirrorfs")
        foreseen = site.play("site.yml", "--check")
        assert foreseen.status == 0, foreseen.said
        assert one.result("which", "mirrorfs").returncode != 0
        made = site.play("site.yml")
        assert made.changed > 0
        assert "mfs1" not in made.said, "the code is a secret"
        yield site


def test_a_play_makes_a_mirrored_pair_and_the_next_changes_nothing(site: Site) -> None:
    site.wait_serves(site.one)
    for machine in (site.one, site.two):
        assert [machine.run("systemctl", "is-enabled", unit) for unit in _UNITS] == ["enabled"] * 2
        assert machine.run("cat", "/data/before") == "was here before mirrorfs"
        assert machine.run("sh", "-c", "ls -d /run/mirrorfs-introduction-* 2>/dev/null; true") == ""
    pids = site.pids()
    again = site.play("site.yml")
    assert again.changed == 0, again.said
    assert site.play("site.yml", "--check").changed == 0
    assert site.pids() == pids


def test_a_wrong_variable_is_told_by_the_specification_of_the_role(site: Site) -> None:
    refused = site.play("site.yml", mirrorfs_port="many")
    assert refused.status != 0
    assert "argument 'mirrorfs_port' is of type" in refused.said, refused.said
    alone = site.play("site.yml", mirrorfs_pair="nobody")
    assert "the group nobody has 0 hosts: put the two of a pair into a group of their own" in alone.said


def test_a_configuration_is_read_by_mirrorfs_first_and_taken_without_a_stop(site: Site) -> None:
    site.wait_serves(site.one)
    before = site.one.run("cat", "/etc/mirrorfs/db.toml")
    own = {"mirrorfs_mount": "", "mirrorfs_module": "", "mirrorfs_vips": []}
    text = "\n".join(line for line in before.splitlines() if not line.startswith("node ="))
    wrong = site.play("site.yml", mirrorfs_config=text + "\n[resync]\nrate = 1\n", **own)
    assert wrong.status != 0
    assert "resync.rate: unknown" in wrong.said
    assert site.one.run("cat", "/etc/mirrorfs/db.toml") == before

    both = site.play("site.yml", mirrorfs_config=text)
    assert "mirrorfs_config is the whole configuration" in both.said

    pids, app = site.pids(), site.one.property("app", "MainPID")
    changed = site.play("site.yml", mirrorfs_config=text + '\n[resync]\nrate_limit = "900MiB/s"\n', **own)
    assert changed.changed > 0
    assert "the mounts have it after upgrade.yml -e mirrorfs_restart=true" in changed.said
    site.wait_serves(site.one)
    assert site.one.run("cat", "/etc/mirrorfs/db.toml") == site.two.run("cat", "/etc/mirrorfs/db.toml")
    assert site.one.property("app", "MainPID") == app, "the application has gone on"
    after = site.pids()
    assert [new == old for new, old in zip(after, pids, strict=True)] == [True, False] * 2, "the controllers alone"
    assert not site.status(site.one)["controller"]["maintenance"]


def test_a_machine_that_was_replaced_is_introduced_by_the_same_play(site: Site) -> None:
    site.wait_serves(site.one)
    app = site.one.property("app", "MainPID")
    site.two.run("systemctl", "disable", "--now", *reversed(_UNITS))
    site.two.run("mirrorfs", "release", "/data")
    site.two.run("sh", "-c", "rm -r /etc/mirrorfs/db.toml /etc/mirrorfs/keys /var/lib/mirrorfs/db; rm -r /data/*")
    site.one.run("sh", "-c", "echo alone >/data/alone")
    made = site.play("site.yml")
    assert made.changed > 0
    site.wait_serves(site.one)
    assert site.two.run("cat", "/data/alone") == "alone"
    assert site.one.property("app", "MainPID") == app, "the application has gone on"
    site.one.run("mirrorfs", "switchover")
    site.wait_serves(site.two)
    site.two.run("mirrorfs", "switchover")
    site.wait_serves(site.one)


def test_an_upgrade_takes_one_node_at_a_time_and_loses_nothing(site: Site, built_package: Path, tmp_path: Path) -> None:
    site.wait_serves(site.one)
    broken = site.play("upgrade.yml", mirrorfs_package=str(_newer(built_package, tmp_path, "98.0", "exit 1")))
    assert broken.status != 0
    assert broken.said.rindex("TASK [") == broken.said.index("TASK [mirrorfs : Replace the package]"), broken.said
    assert site.one.is_active("app")
    assert site.status(site.one)["state"] == "solo"
    package = _newer(built_package, tmp_path, _NEXT)
    refused = site.play("upgrade.yml", mirrorfs_package=str(package))
    assert refused.status != 0
    assert "nothing was changed, since the pair is not well, or in maintenance" in refused.said
    site.two.run("systemctl", "start", *_UNITS)
    site.one.run("mirrorfs", "resume")
    site.one.run("mirrorfs", "maintenance", "off")
    site.wait_serves(site.one)

    pids = site.pids()
    site.one.run("sh", "-c", "echo acknowledged >/data/acknowledged")
    done = site.play("upgrade.yml", mirrorfs_package=str(package))
    assert done.changed > 0
    site.wait_serves(site.two)
    for machine in (site.one, site.two):
        assert machine.run("dpkg-query", "--show", "--showformat=${Version}", "mirrorfs") == _NEXT
        assert machine.run("cat", "/data/acknowledged") == "acknowledged"
        assert not site.status(machine)["controller"]["maintenance"]
    assert not set(site.pids()) & set(pids)
    assert site.play("upgrade.yml", mirrorfs_package=str(package)).changed == 0
    site.two.run("mirrorfs", "switchover")
    site.wait_serves(site.one)


def test_the_example_inventory_has_what_the_role_asks_for() -> None:
    example = yaml.safe_load((_ANSIBLE / "inventory.example.yml").read_text())["mirrorfs"]
    options = yaml.safe_load((_ANSIBLE / "roles/mirrorfs/meta/argument_specs.yml").read_text())["argument_specs"]["main"][
        "options"
    ]
    used = set(example["vars"])
    for name, pair in example["children"].items():
        assert name.startswith("pair_")
        assert len(pair["hosts"]) == 2
        used |= set(pair["vars"]).union(*pair["hosts"].values())
    assert used <= set(options)
    defaults = yaml.safe_load((_ANSIBLE / "roles/mirrorfs/defaults/main.yml").read_text())
    assert set(defaults) == set(options) - {"mirrorfs_volume"} | {"mirrorfs_restart"}
