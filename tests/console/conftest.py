"""A pair with controllers, and their consoles."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.console.roles import Role
from mirrorfs.console.users import Users
from mirrorfs.lab import cluster
from mirrorfs.lab.cluster import Cluster
from mirrorfs.lab.pair import wait_for
from mirrorfs.lab.postgresql import installed

OPERATOR, VIEWER, PASSWORD = "otto", "vera", "correct horse battery"


def add_users(site: Cluster) -> None:
    """An operator and a viewer on both nodes."""
    for host in site.lab.hosts.values():
        users = Users(host.keys)
        users.add(OPERATOR, PASSWORD, Role.OPERATE)
        users.add(VIEWER, PASSWORD, Role.VIEW)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A pair that serves a PostgreSQL behind a virtual address."""
    programs = installed()
    assert programs is not None, "PostgreSQL is installed by scripts/bootstrap"
    # Below /tmp, since PostgreSQL's user has to reach it.
    directory = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    directory.chmod(0o755)
    try:
        text = cluster.sections(cluster.postgresql(programs), failover='detection_timeout = "1500ms"')
        with Cluster(directory / "lab", text) as made:
            cluster.create_postgresql(made.lab.one, programs)
            add_users(made)
            made.start_controllers()
            wait_for(lambda: all("the console: https" in made.log(name).read_text() for name in made.lab.hosts), "the consoles")
            yield made
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", directory], check=True)
