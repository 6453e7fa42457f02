"""Two machines with Pacemaker and corosync, as docs/PACEMAKER.md says: a database and an address move with the volume."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from mirrorfs.lab import postgresql, public
from mirrorfs.lab.etcd import EtcdCluster
from mirrorfs.lab.network import DESK
from mirrorfs.lab.pair import wait_for
from tests.pair.machines import Machine, two_machines, why_not
from tests.pair.support import Client

_PAGE: Final = Path(__file__).parents[2] / "docs" / "PACEMAKER.md"
_ADDRESS: Final = "10.79.0.100"
_DEADLINE_S: Final = 300.0
_COROSYNC: Final = """
totem {
    version: 2
    cluster_name: site
    transport: knet
    crypto_cipher: none
    crypto_hash: none
}
nodelist {
    node {
        name: one
        nodeid: 1
        ring0_addr: 10.77.0.1
        ring1_addr: 10.79.0.1
    }
    node {
        name: two
        nodeid: 2
        ring0_addr: 10.77.0.2
        ring1_addr: 10.79.0.2
    }
}
quorum {
    provider: corosync_votequorum
    two_node: 1
    wait_for_all: 0
}
"""


def _why_not() -> str:
    for program in ("pacemakerd", "corosync", "crm"):
        if shutil.which(program, path="/usr/sbin:/usr/bin") is None:
            return f"{program} is not installed here"
    if postgresql.installed() is None or not Path("/usr/lib/postgresql/15/bin").exists():
        return "needs PostgreSQL 15 of Debian"
    return why_not()


pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


def _block(kind: str) -> str:
    """The code block of the page that is of that kind."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


@dataclass(slots=True)
class Cluster:
    """The two machines; the arbiter and the clients are on a third host."""

    one: Machine
    two: Machine
    etcd: EtcdCluster

    def __post_init__(self) -> None:
        for machine in (self.one, self.two):
            machine.run("sh", "-c", f"printf '{self.one.address} one\\n{self.two.address} two\\n' >>/etc/hosts")

    def install(self, package: Path) -> None:
        for machine in (self.one, self.two):
            machine.copy(package, "/root/mirrorfs.deb")
            machine.run("dpkg", "--install", "/root/mirrorfs.deb")
        waiting = self.one.popen("mirrorfs", "init", "db", "--address", self.one.address, "--mount", "/data", "--no-start")
        assert waiting.stdout is not None
        code = next(found[1] for line in waiting.stdout if (found := re.search(r"mirrorfs join (\S+)", line)))
        self.two.run("mirrorfs", "join", code, "--no-start")
        waiting.communicate(timeout=60)
        for machine in (self.one, self.two):
            machine.run("sh", "-c", f"cat >>/etc/mirrorfs/db.toml <<'end'\n\n{_block('toml')}end")
        # The files of a database are there before mirrorfs is.
        make = (
            "install -d -o postgres -g postgres -m 700 /data/main && cd / && "
            "runuser -u postgres -- /usr/lib/postgresql/15/bin/initdb --locale=C.UTF-8 --auth=trust -D /data/main && "
            "echo 'host all all 10.79.0.0/24 trust' >>/data/main/pg_hba.conf && "
            """echo "listen_addresses = '*'" >>/data/main/postgresql.conf"""
        )
        self.one.run("sh", "-c", make)

    def begin(self) -> None:
        """Start the cluster on both, and give it the configuration of the page."""
        for machine in (self.one, self.two):
            machine.write("/etc/corosync/corosync.conf", _COROSYNC)
            machine.run("systemctl", "enable", "--now", "corosync", "pacemaker")
        wait_for(lambda: "Online: [ one two ]" in self.look(), "both are in the cluster", _DEADLINE_S)
        # Nothing here can switch a machine off; the page says what that means.
        self.one.write("/root/page.crm", f"property stonith-enabled=false\n{_block('crm')}")
        self.one.run("crm", "configure", "load", "update", "/root/page.crm")

    def promote_first(self) -> None:
        """The new volume gets its primary, and one the application: Pacemaker promotes whichever node it looks at first."""
        self.one.run("mirrorfs", "promote")
        wait_for(lambda: self.serves(self.one) or self.serves(self.two), "the application is served", _DEADLINE_S)
        if self.serves(self.two):
            self.wait_mirrored(self.two)
            self.one.run("crm", "resource", "move", "volume-clone", "one")
            self.wait_serving(self.one)
            self.one.run("crm", "resource", "clear", "volume-clone")
        self.wait_mirrored(self.one)

    def look(self) -> str:
        """What Pacemaker says, on the machine that is up."""
        return self.two.run("crm_mon", "-1Arf", check=False)

    def query(self, text: str) -> subprocess.CompletedProcess[str]:
        """Ask the database as a client elsewhere does."""
        options = ["psql", "-X", "-q", "-A", "-t", f"host={_ADDRESS} user=postgres dbname=postgres connect_timeout=3", "-c"]
        command = [*self.one.network.entering(DESK), "timeout", "5", *options, text]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")

    def commit(self, number: int) -> bool:
        """Note a number in the database; whether that was acknowledged."""
        return self.query(f"insert into noted values ({number})").returncode == 0

    def serves(self, machine: Machine) -> bool:
        """Whether Pacemaker has promoted the volume there, and the address is there."""
        return f"Promoted: [ {machine.name} ]" in self.look() and _ADDRESS in machine.run("ip", "-4", "address")

    def wait_serving(self, machine: Machine) -> None:
        try:
            wait_for(lambda: self.serves(machine), f"the application is on {machine.name}", _DEADLINE_S)
        except Exception as error:
            log = self.two.run("journalctl", "--no-pager", "--lines=150", check=False)
            raise AssertionError(f"{error}\n{self.look()}\n{log}") from error

    def wait_mirrored(self, primary: Machine) -> None:
        def is_mirrored() -> bool:
            found = _status(primary)
            return (found.get("state"), found.get("in_sync")) == ("primary", ["one", "two"])

        wait_for(is_mirrored, f"{primary.name} leads, and both are in sync", _DEADLINE_S)
        score = r"Node: {0}:\s+\* master-volume\s+: {1}\b"
        other = self.two if primary is self.one else self.one
        wait_for(
            lambda: re.search(score.format(other.name, 1000), self.look()) is not None,
            "the standby may be promoted",
            _DEADLINE_S,
        )


def _status(machine: Machine) -> dict[str, Any]:
    done = machine.result("mirrorfs", "status", "--json")
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


@pytest.fixture
def cluster(built_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("machines")
    with ExitStack() as stack:
        one, two = stack.enter_context(two_machines(directory, desk=True))
        etcd = EtcdCluster(
            directory / "etcd", address=lambda member: public.PUBLIC[DESK], port=2379, entering=one.network.entering(DESK)
        )
        found = Cluster(one, two, stack.enter_context(etcd))
        found.install(built_package)
        yield found


def test_a_database_moves_with_its_volume_by_command_and_by_a_power_cut(cluster: Cluster) -> None:
    one, two = cluster.one, cluster.two
    # A unit that would start it beside Pacemaker is refused, and named.
    two.run("systemctl", "enable", "mirrorfs@db")
    agent = ["env", "OCF_ROOT=/usr/lib/ocf", "OCF_RESKEY_config=/etc/mirrorfs/db.toml"]
    refused = two.result(*agent, "/usr/lib/ocf/resource.d/mirrorfs/volume", "start")
    assert refused.returncode == 5
    assert "what Pacemaker is to start: systemctl disable --now mirrorfs@db" in refused.stdout
    two.run("systemctl", "disable", "mirrorfs@db")

    cluster.begin()
    wait_for(lambda: "Unpromoted: [ one two ]" in cluster.look(), "both are started", _DEADLINE_S)
    assert _status(one)["epoch"] == 0, "whose files are kept is for a person to say"
    cluster.promote_first()
    assert cluster.query("create table noted (number bigint primary key)").returncode == 0
    events = one.run("journalctl", "--quiet", "--output=cat", "--identifier=mirrorfs", "MIRRORFS_EVENT=promoted")
    assert events.splitlines()[0] == "one was promoted"

    with Client(cluster.commit, deadline_s=_DEADLINE_S) as client:
        client.wait_noted(10)
        one.run("crm", "resource", "move", "volume-clone", "two")
        cluster.wait_serving(two)
        client.wait_noted(10)
        one.run("crm", "resource", "clear", "volume-clone")
        cluster.wait_mirrored(two)
        two.run("crm", "node", "standby", "two")
        cluster.wait_serving(one)
        client.wait_noted(10)
        two.run("crm", "node", "online", "two")
        cluster.wait_mirrored(one)

        one.cut_power()
        cluster.wait_serving(two)
        client.wait_noted(10)
    rows = set(map(int, cluster.query("select number from noted").stdout.split()))
    assert set(client.noted) - rows == set(), "acknowledged, and missing on the node that took over"

    one.boot()
    cluster.wait_mirrored(two)
    assert cluster.serves(two)
    assert not one.is_active("mirrorfs@db")


def test_a_mount_that_hangs_under_its_database_is_recovered(cluster: Cluster) -> None:
    cluster.begin()
    wait_for(lambda: "Unpromoted: [ one two ]" in cluster.look(), "both are started", _DEADLINE_S)
    cluster.promote_first()
    pid = str(_status(cluster.one)["pid"])
    cluster.one.run("kill", "-STOP", pid)
    wait_for(lambda: cluster.one.result("kill", "-0", pid).returncode != 0, "the hang is noticed, and ended", _DEADLINE_S)
    wait_for(lambda: cluster.query("select 1").returncode == 0, "the database answers again", _DEADLINE_S)
    assert "the mount hangs" in cluster.one.log("pacemaker")
