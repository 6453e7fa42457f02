"""The quick start, as it stands on its page: two machines, Debian's PostgreSQL, five commands; and then one machine is lost.

So is the recipe for Redis, of docs/MODULES.md.
"""

import functools
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from mirrorfs import modules
from mirrorfs.lab import postgresql
from tests.pair.machines import Machine, two_machines, why_not
from tests.pair.support import Client

_DOCS: Final = Path(__file__).parents[2] / "docs"
_PAGE: Final = _DOCS / "QUICKSTART.md"
_RECIPES: Final = _DOCS / "MODULES.md"
_ADDRESS: Final = "10.77.0.100"
_CLUSTER: Final = "15"
_UNIT: Final = f"postgresql@{_CLUSTER}-main"
_DATA: Final = f"/var/lib/postgresql/{_CLUSTER}/main"
_CONFIGURATION: Final = f"/etc/postgresql/{_CLUSTER}/main"


def _why_not() -> str:
    if not Path(f"/usr/lib/postgresql/{_CLUSTER}/bin").exists() or postgresql.installed() is None:
        return f"needs PostgreSQL {_CLUSTER} of Debian"
    return why_not()


pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


def blocks_of(page: Path) -> list[list[tuple[str, str]]]:
    """The code blocks of a page: for each line that is a command the machine that it is run on, and the command."""
    text = page.read_text().replace("\\\n", "")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        [(host, line.split("  #")[0].strip()) for host, line in re.findall(r"^(\w+)# (.*)$", b, re.MULTILINE)] for b in blocks
    ]


@dataclass(slots=True)
class Site:
    """The two machines, whose /var/lib is on a file system that can be mirrored, and what `init` and `join` said there."""

    machines: dict[str, Machine]
    package: Path
    database: str = "postgresql"
    unit: str = _UNIT
    said: dict[str, str] = field(default_factory=dict)

    @property
    def one(self) -> Machine:
        return self.machines["one"]

    @property
    def two(self) -> Machine:
        return self.machines["two"]

    def install(self, machine: Machine) -> None:
        """What `apt-get install ./mirrorfs_*.deb postgresql` does: Debian's package has a cluster that runs, and is enabled."""
        machine.copy(self.package, "/root/mirrorfs.deb")
        machine.run("dpkg", "--install", "/root/mirrorfs.deb")
        if self.database == "mariadb":
            machine.run("install", "-d", "-o", "mysql", "-g", "mysql", "-m", "0755", "/var/lib/mysql")
            machine.run("mariadb-install-db", "--user=mysql", "--datadir=/var/lib/mysql", "--skip-test-db")
            machine.run("systemctl", "enable", "--now", "mariadb")
            return
        if self.database == "redis-server":
            machine.run("systemctl", "enable", "--now", "redis-server")
            return
        machine.run("pg_createcluster", _CLUSTER, "main", "--start")
        machine.run("systemctl", "enable", "--now", "postgresql")
        assert machine.is_active(_UNIT)

    def follow(self, block: list[tuple[str, str]]) -> None:
        """Run the commands of a block in their order. `init` waits for `join`, and both end before what follows."""
        code, waiting = "", None
        for host, command in block:
            machine = self.machines[host]
            if command.startswith("apt-get install "):
                assert command == f"apt-get install ./mirrorfs_*.deb {self.database}"
                self.install(machine)
            elif command.startswith("mirrorfs init "):
                waiting = machine.popen("sh", "-c", f"exec {command}")
                assert waiting.stdout is not None
                said = ""
                while not (found := re.search(r"mirrorfs join (\S+)", said)):
                    line = waiting.stdout.readline()
                    assert line, said
                    said += line
                code = found[1]
            elif waiting is not None and command.startswith("mirrorfs join mfs1..."):
                self.said[host] = machine.run("sh", "-c", command.replace("mfs1...", code))
                rest, _ = waiting.communicate(timeout=90)
                assert waiting.returncode == 0, rest
                self.said["one"] = rest
            else:
                machine.run("sh", "-c", command)

    def query(self, machine: Machine, text: str) -> list[str]:
        """What the database says to a client on a machine that has come through the virtual address."""
        return machine.run(*_at_the_address(), text).split()

    def serves(self, machine: Machine) -> bool:
        """Whether the database runs on the machine, and its address is there."""
        return machine.is_active(self.unit) and _ADDRESS in machine.run("ip", "-4", "address")

    def wait_mirrored(self, primary: Machine) -> None:
        """Until the other machine has everything, too."""

        def is_mirrored() -> bool:
            found = json.loads(primary.run("mirrorfs", "status", "--json"))
            return (found["state"], found["in_sync"]) == ("primary", ["one", "two"])

        primary.wait_for(is_mirrored, f"{primary.name} is the primary, and both are in sync")


def _at_the_address() -> list[str]:
    options = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
    return [*options, f"host={_ADDRESS} user=app password=secret dbname=app connect_timeout=3", "-c"]


def _prepare(machine: Machine) -> None:
    """/var/lib on the machine's disk, as it is on one that has a disk for everything; of this machine's databases there is
    nothing left."""
    machine.run("cp", "-a", "/var/lib", "/data/lib")
    machine.run("rm", "-rf", "/etc/postgresql", "/data/lib/postgresql", "/data/lib/mysql", "/data/lib/mirrorfs")
    machine.run("install", "-d", "-o", "postgres", "-g", "postgres", "/etc/postgresql", "/data/lib/postgresql")
    machine.write("/etc/fstab", "/data/lib /var/lib none bind 0 0\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "var-lib.mount")


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path_factory.mktemp("machines")) as found:
        for machine in found:
            _prepare(machine)
        yield found


@pytest.fixture
def site(built_package: Path, machines: tuple[Machine, Machine]) -> Site:
    return Site({machine.name: machine for machine in machines}, built_package)


def _commit(machine: Machine, number: int) -> bool:
    """Whether a client on the machine was told that its row is there."""
    command = ("timeout", "5", *_at_the_address(), f"insert into noted values ({number})")
    return machine.result(*command).returncode == 0


def test_five_commands_make_a_postgresql_that_outlives_its_machine(site: Site) -> None:
    first, then, switchovers, loss, *_ = blocks_of(_PAGE)
    assert len(first) <= 5
    site.follow(first)
    site.one.wait_for(lambda: site.serves(site.one), "the database is at its address")
    for machine in (site.one, site.two):
        assert "mirrorfs@db.service is started, now and with every boot" in site.said[machine.name]
    assert "what stood in /var/lib/postgresql is now in /var/lib/postgresql.before-mirrorfs" in site.said["two"]
    assert site.two.run("cat", f"/var/lib/postgresql.before-mirrorfs/{_CLUSTER}/main/PG_VERSION") == _CLUSTER
    assert not site.two.is_active(_UNIT)

    site.follow(then)
    site.wait_mirrored(site.one)

    site.one.run("runuser", "-u", "postgres", "--", "psql", "-c", "create role app login password 'secret'")
    site.one.run("runuser", "-u", "postgres", "--", "createdb", "--owner=app", "app")
    site.query(site.two, "create table noted (number bigint primary key)")
    with Client(functools.partial(_commit, site.two)) as client:
        client.wait_noted(10)
        there, back = switchovers
        site.follow([there])
        assert site.serves(site.two)
        assert not site.one.is_active(_UNIT)
        client.wait_noted(10)
        site.wait_mirrored(site.two)
        site.follow([back])
        assert site.serves(site.one)
        client.wait_noted(10)
        site.wait_mirrored(site.one)
        site.one.cut_power()
        site.follow(loss)
        site.two.wait_for(lambda: site.serves(site.two), "the database is on two after the loss of one")
        client.wait_noted(10)
    rows = set(map(int, site.query(site.two, "select number from noted")))
    assert set(client.noted) - rows == set(), "acknowledged, and missing on the node that took over"

    site.one.boot()
    site.wait_mirrored(site.two)
    assert not site.one.is_active(_UNIT), "nobody but the controller starts it, with the machine neither"


@pytest.mark.skipif(shutil.which("mariadbd", path="/usr/sbin:/usr/bin") is None, reason="needs MariaDB")
def test_the_same_commands_make_a_mariadb_that_moves(site: Site) -> None:
    site.database = "mariadb"
    first, *_ = blocks_of(_PAGE)
    other = {"/var/lib/postgresql": "/var/lib/mysql", "postgresql": "mariadb"}
    site.follow(
        [(host, functools.reduce(lambda text, old: text.replace(old, other[old]), other, line)) for host, line in first]
    )
    sql = "create database app; create user app@'10.77.0.%' identified by 'secret'; grant all on app.* to app@'10.77.0.%'"
    site.one.wait_for(lambda: site.one.result("mariadb", "--execute", "select 1").returncode == 0, "the server answers")
    site.one.run("mariadb", "--execute", sql)
    site.wait_mirrored(site.one)
    client = ("mariadb", f"--host={_ADDRESS}", "--user=app", "--password=secret", "--skip-column-names", "app", "--execute")
    site.two.run(*client, "create table noted (number bigint primary key) engine=innodb; insert into noted values (40), (2)")
    assert not site.two.is_active("mariadb")
    site.one.run("mirrorfs", "switchover")
    assert not site.one.is_active("mariadb")
    assert site.one.run(*client, "select sum(number) from noted") == "42"


# ---- Redis, by the recipe of docs/MODULES.md

_AT_REDIS: Final = ("env", "REDISCLI_AUTH=secret", "timeout", "5", "redis-cli", "-e", "-h", _ADDRESS)


def _is_pushed(machine: Machine, number: int) -> bool:
    """Whether Redis answered a client on the machine that its number is in the list."""
    done = machine.result(*_AT_REDIS, "rpush", "noted", str(number))
    return done.returncode == 0 and done.stdout.strip().isdigit()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs Redis")
def test_the_recipe_for_redis_keeps_what_was_answered(site: Site) -> None:
    site.database, site.unit = "redis-server", "redis-server.service"
    first, then = [block for block in blocks_of(_RECIPES) if any("redis" in command for _, command in block)]
    (settings,) = re.findall(r"^```ini\n(.*?)^```$", _RECIPES.read_text(), re.MULTILINE | re.DOTALL)
    for machine in (site.one, site.two):
        site.install(machine)
        machine.run("redis-cli", "-e", "set", "before", f"mirrorfs on {machine.name}")
    site.follow(first)
    for machine in (site.one, site.two):
        machine.run("sh", "-c", f"cat >>/etc/redis/redis.conf <<'end'\n{settings}end")
    site.follow(then)
    site.one.wait_for(lambda: site.serves(site.one), "Redis is at its address")
    assert not site.two.is_active(site.unit)
    for machine in (site.one, site.two):
        assert machine.run("systemctl", "is-enabled", site.unit, check=False) == "disabled"
    assert site.two.run("ls", "/var/lib/redis.before-mirrorfs") == "dump.rdb"
    site.wait_mirrored(site.one)

    with Client(functools.partial(_is_pushed, site.two)) as client:
        client.wait_noted(25)
        for primary, other in ((site.two, site.one), (site.one, site.two)):
            other.run("mirrorfs", "switchover")
            assert site.serves(primary)
            assert not other.is_active(site.unit)
            client.wait_noted(25)
            site.wait_mirrored(primary)
        site.one.cut_power()
        site.two.run("mirrorfs", "promote", "--yes")
        site.two.wait_for(lambda: site.serves(site.two), "Redis is on two after the loss of one")
        client.wait_noted(25)
    there = set(map(int, site.two.run(*_AT_REDIS, "lrange", "noted", "0", "-1").split()))
    assert set(client.noted) - there == set(), "answered, and missing on the node that took over"
    assert site.two.run(*_AT_REDIS, "get", "before") == "mirrorfs on one"

    site.one.boot()
    site.wait_mirrored(site.two)
    assert not site.one.is_active(site.unit), "nobody but the controller starts it, with the machine neither"
    # It opens for writing what it looks at, which the standby's mount refuses: so it looks at a copy.
    look = "cp -r /var/lib/redis/appendonlydir /tmp/copy && redis-check-aof /tmp/copy/appendonly.aof.manifest"
    for machine in (site.one, site.two):
        assert "All AOF files and manifest are valid" in machine.run("sh", "-c", look)


# ---- what the module does to a machine, without a mirrorfs


def _prepare_of_the_module(**settings: str) -> str:
    more = {"run": "systemd", "version": _CLUSTER, "mount": "/var/lib/postgresql", **settings}
    (service,) = tomllib.loads(modules.render(modules.find("postgresql"), more).services)["service"]
    return str(service["prepare"])


def test_the_cluster_of_the_package_is_made_ready_and_once_more_changes_nothing(machines: tuple[Machine, Machine]) -> None:
    machine, _ = machines
    assert "there is no cluster 15 main here" in machine.result("sh", "-c", _prepare_of_the_module()).stdout
    machine.run("pg_createcluster", _CLUSTER, "main", "--start")
    machine.run("systemctl", "enable", _UNIT)
    elsewhere = machine.result("sh", "-c", _prepare_of_the_module(mount="/srv/volume"))
    assert elsewhere.returncode == 1
    assert f"its data is in {_DATA} and not below /srv/volume" in elsewhere.stdout
    assert machine.is_active(_UNIT), "what cannot be prepared is left as it was"

    machine.run("sh", "-c", _prepare_of_the_module())
    assert not machine.is_active(_UNIT)
    assert machine.run("systemctl", "is-enabled", _UNIT, check=False) == "disabled"
    files = ("postgresql.conf", "pg_hba.conf", "start.conf")
    once = [machine.run("cat", f"{_CONFIGURATION}/{file}") for file in files]
    assert "\nlisten_addresses = '*'" in once[0]
    assert once[1].endswith("\nhost all all samenet scram-sha-256")
    assert once[2] == "manual"
    assert {machine.run("stat", "-c", "%U", f"{_CONFIGURATION}/{file}") for file in files} == {"postgres"}
    machine.run("sh", "-c", _prepare_of_the_module())
    assert [machine.run("cat", f"{_CONFIGURATION}/{file}") for file in files] == once
    machine.run("systemctl", "restart", "postgresql")
    assert not machine.is_active(_UNIT), "it is no part of what starts with the machine"

    machine.run("sh", "-c", _prepare_of_the_module(clients="none"))
    assert machine.run("cat", f"{_CONFIGURATION}/pg_hba.conf") == once[1]


def test_a_lock_file_is_believed_only_of_a_server_that_works_there(machines: tuple[Machine, Machine]) -> None:
    """On the volume, that of the other machine is found; its pid is that of another PostgreSQL's process here."""
    machine, _ = machines
    machine.run("pg_createcluster", _CLUSTER, "main")
    machine.run("sh", "-c", _prepare_of_the_module())
    with machine.popen("bash", "-c", "cd /; echo $$; exec -a postgres sleep 1000") as stranger:
        assert stranger.stdout is not None
        try:
            pid = stranger.stdout.readline().strip()
            machine.write(f"{_DATA}/postmaster.pid", f"{pid}\n{_DATA}\n1\n5432\n/run/postgresql\n\n1 1\nready\n")
            machine.run("chown", "postgres:", f"{_DATA}/postmaster.pid")
            machine.run("systemctl", "start", _UNIT)
            assert machine.is_active(_UNIT)
            running = machine.run("cat", f"{_DATA}/postmaster.pid")
            assert running.split()[0] != pid
            # A second server is not started beside the first one, nor does the first one lose its lock.
            assert machine.result("pg_ctlcluster", "--skip-systemctl-redirect", _CLUSTER, "main", "start").returncode == 2
            machine.run("systemctl", "start", _UNIT)
            assert machine.run("cat", f"{_DATA}/postmaster.pid") == running
            assert machine.run("kill", "-0", pid) == ""
        finally:
            stranger.kill()
