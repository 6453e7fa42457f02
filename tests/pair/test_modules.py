"""Application modules on a real pair with controllers: rows that were acknowledged through the address outlive the server."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mirrorfs import modules
from mirrorfs.lab import cluster, postgresql, scratch
from mirrorfs.lab.cluster import ADDRESS, Cluster
from mirrorfs.lab.pair import Host, wait_for
from mirrorfs.lab.postgresql import as_postgres
from mirrorfs.modules import adding
from tests.pair.support import Client, mirrorfs, tree_differences

pytestmark = pytest.mark.root

_NUMBERS = "noted"


@dataclass(slots=True)
class Site:
    """A cluster whose nodes have no service yet."""

    cluster: Cluster
    place: Path

    @property
    def one(self) -> Host:
        return self.cluster.lab.one

    @property
    def two(self) -> Host:
        return self.cluster.lab.two

    def home(self, host: Host) -> Path:
        """The directory of a host's own that its controller knows as $LAB_HOME."""
        return Path(f"{self.cluster.lab.dir}-servers") / host.name

    def add(self, module: str, **settings: str) -> None:
        """`mirrorfs modules add` on both nodes, as a person would do it; then both begin anew."""
        options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
        for host in (self.one, self.two):
            self.home(host).mkdir(parents=True, exist_ok=True)
            self.home(host).chmod(0o777)
            done = mirrorfs(host, "modules", "add", module, "--set", "run=commands", "--dir", str(self.place), *options)
            assert (done.returncode, done.stderr) == (0, "")
        for host in (self.two, self.one):
            host.stop()
            host.start()
            self.cluster.lab.wait_mirrored()
        assert self.one.status().get("differences") == []

    def run(self, host: Host, *command: str | Path) -> str:
        """What a command on a host printed; it succeeds."""
        done = host.run(*command, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def at_desk(self, *command: str) -> str:
        """What a command of a client printed; it succeeds."""
        done = self.cluster.at_desk(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def site() -> Iterator[Site]:
    """Not below pytest's directories, which are root's alone: the servers run as users of their own."""
    with scratch.place(None) as place:
        text = cluster.sections("", failover='detection_timeout = "1500ms"')
        try:
            with Cluster(place / "lab", text, options={"ack_timeout": "1s", "freeze_timeout": "3s"}) as made:
                yield Site(made, place)
        finally:
            for left in place.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def lose_host(site: Site) -> None:
    """SIGKILL to all that runs on host one."""
    site.cluster.kill_host("one")


def lose_mount(site: Site) -> None:
    """SIGKILL to the node of host one alone: the controller there has to end what still works on its mount."""
    site.one.kill()


def come_back(site: Site) -> None:
    """Host one is started again, and could have the application."""
    site.one.start()
    if site.cluster.says("one") is None:
        site.cluster.start_controller("one")
    site.cluster.lab.wait_mirrored()

    def can_have_it() -> bool:
        return ((site.cluster.says("two") or {}).get("peer") or {}).get("mount") == "standby"

    wait_for(can_have_it, "the controller that serves knows that the other node follows")


def fail_over(
    site: Site,
    insert: Callable[[int], list[str]],
    found: Callable[[], set[int]],
    check: Callable[[Host], None],
    fault: Callable[[Site], None] = lose_host,
) -> None:
    """Let host one fail under a client that commits, let it come back, and give it the application back."""
    with Client(lambda number: site.cluster.at_desk("timeout", "5", *insert(number)).returncode == 0) as client:
        client.wait_noted(25)
        fault(site)
        site.cluster.wait_serving("two", 120)
        client.wait_noted(10)
        assert set(client.noted) - found() == set(), "acknowledged, and missing on the node that took over"
        check(site.two)
        come_back(site)
        client.wait_noted(5)
        assert "serves" in site.cluster.command("two", "switchover")
        site.cluster.wait_serving("one")
        client.wait_noted(5)
    assert len(client.noted) > 40
    assert set(client.noted) - found() == set(), "acknowledged, and missing on the node that came back"
    check(site.one)
    assert tree_differences(site.cluster.lab) == []


def is_whole(file: Path) -> None:
    """SQLite's own check of a database."""
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]


# ---- PostgreSQL


@pytest.mark.skipif(postgresql.installed() is None, reason="needs PostgreSQL")
@pytest.mark.parametrize("fault", [lose_host, lose_mount])
def test_postgresql_of_its_module_fails_over_with_every_acknowledged_row(site: Site, fault: Callable[[Site], None]) -> None:
    programs = postgresql.installed()
    assert programs is not None
    psql = [str(programs / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
    psql += [f"host={ADDRESS} user=postgres dbname=postgres connect_timeout=2", "-c"]
    cluster.create_postgresql(site.one, programs)
    places = {"mount": "$LAB_MOUNT", "sockets": "$LAB_HOME", "log": "$LAB_HOME/postgresql.log"}
    site.add("postgresql", version=programs.parent.name, **places)
    site.cluster.start_controllers()
    site.at_desk(*psql, f"create table {_NUMBERS} (n bigint primary key, filler text default repeat('x', 500))")

    def found() -> set[int]:
        return {int(line) for line in site.at_desk(*psql, f"select n from {_NUMBERS}").split()}

    def check(host: Host) -> None:
        options = ["-h", str(site.home(host)), "--all", "--install-missing", "--heapallindexed", "--parent-check"]
        site.run(host, *as_postgres(str(programs / "pg_amcheck"), *options))

    fail_over(site, lambda number: [*psql, f"insert into {_NUMBERS} values ({number})"], found, check, fault)


# ---- MariaDB


@pytest.mark.skipif(shutil.which("mariadbd", path="/usr/sbin:/usr/bin") is None, reason="needs MariaDB")
@pytest.mark.parametrize("fault", [lose_host, lose_mount])
def test_mariadb_of_its_module_fails_over_with_every_acknowledged_row(site: Site, fault: Callable[[Site], None]) -> None:
    data = site.one.mount / "mysql"
    site.run(site.one, "mariadb-install-db", "--user=mysql", f"--datadir={data}", "--skip-test-db")
    places = {"mount": "$LAB_MOUNT", "socket": "$LAB_HOME/mysqld.sock", "log": "$LAB_HOME/mariadb.log"}
    site.add("mariadb", **places)
    site.cluster.start_controllers()

    def as_root(host: Host, program: str) -> list[str]:
        return [program, f"--socket={site.home(host)}/mysqld.sock", "--user=root"]

    script = (
        f"create database app; create table app.{_NUMBERS} (n bigint primary key, filler varchar(500)) engine=innodb; "
        "create user app@'10.79.0.%' identified by 'secret'; grant all on app.* to app@'10.79.0.%'"
    )
    site.run(site.one, *as_root(site.one, "mariadb"), "--execute", script)
    client = ["mariadb", f"--host={ADDRESS}", "--user=app", "--password=secret", "--connect-timeout=2", "--batch"]

    def found() -> set[int]:
        rows = site.at_desk(*client, "--skip-column-names", "--execute", f"select n from app.{_NUMBERS}")
        return {int(line) for line in rows.split()}

    def check(host: Host) -> None:
        said = site.run(host, *as_root(host, "mariadb-check"), "--all-databases", "--check", "--extended")
        assert {line.split()[-1] for line in said.splitlines()} == {"OK"}, said

    def insert(number: int) -> list[str]:
        return [*client, "--execute", f"insert into app.{_NUMBERS} values ({number}, repeat('x', 500))"]

    fail_over(site, insert, found, check, fault)


# ---- any application, by three files of one's own

_SERVER = f"""
import contextlib, socket, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("create table if not exists {_NUMBERS} (n integer primary key, filler text)")
server = socket.create_server(("", 7000))
while True:
    connection, _ = server.accept()
    with connection, connection.makefile("rw") as lines, contextlib.suppress(OSError, ValueError):
        asked = lines.readline().strip()
        if asked == "all":
            print(*(n for n, in database.execute("select n from {_NUMBERS}")), file=lines)
        else:
            database.execute("insert into {_NUMBERS} values (?, ?)", (int(asked), "x" * 500))
            print(asked, file=lines)
"""
_ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=3) as connection, connection.makefile("rw") as lines:
    print(sys.argv[2], file=lines, flush=True)
    answer = lines.readline()
print(answer, end="")
sys.exit(not answer.endswith("\\n"))
"""


def test_an_application_of_the_generic_module_fails_over_with_every_acknowledged_row(site: Site) -> None:
    own = site.place / "dispatch"
    own.mkdir()
    (own / "server.py").write_text(_SERVER)
    (own / "ask.py").write_text(_ASK)
    for name, line in {
        "start": f"python3 {own}/server.py $LAB_MOUNT/dispatch.sqlite </dev/null & echo $! >$LAB_HOME/pid",
        "stop": "pkill --pidfile $LAB_HOME/pid -f server.py || true",
        "check": f"python3 {own}/ask.py 127.0.0.1 all >/dev/null",
    }.items():
        (own / name).write_text(f"#!/bin/sh\n{line}\n")
        (own / name).chmod(0o755)
    files = {name: str(own / name) for name in ("start", "stop", "check")}
    site.add("generic", name="dispatch", interval="500ms", **files)
    site.cluster.start_controllers()

    def ask(what: object) -> list[str]:
        return ["python3", str(own / "ask.py"), ADDRESS, str(what)]

    def found() -> set[int]:
        return set(map(int, site.at_desk(*ask("all")).split()))

    fail_over(site, ask, found, lambda host: is_whole(host.mount / "dispatch.sqlite"))


# ---- a module of one's own, as docs/MODULES.md has it


def block_of_the_page(language: str) -> str:
    """The only block of docs/MODULES.md in a language."""
    page = (Path(__file__).parents[2] / "docs" / "MODULES.md").read_text()
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_example_of_the_page_fails_over_with_every_acknowledged_order(site: Site) -> None:
    (site.place / "orders.py").write_text(block_of_the_page("python"))
    (site.place / "orders.toml").write_text(block_of_the_page("toml"))
    (site.one.mount / "orders").mkdir()
    places = {"mount": "$LAB_MOUNT", "program": str(site.place / "orders.py"), "pid_file": "$LAB_HOME/orders.pid"}
    site.add("orders", **places)
    site.cluster.start_controllers()
    url = f"http://{ADDRESS}:8090/orders"

    def order(number: int) -> list[str]:
        ask = f"import urllib.request as r; r.urlopen('{url}', b'order-{number}', timeout=3).read()"
        return ["python3", "-c", ask]

    def found() -> set[int]:
        ask = f"import urllib.request as r; print(r.urlopen('{url}', timeout=3).read().decode())"
        return {int(line.split("-")[1]) for line in site.at_desk("python3", "-c", ask).split() if "-" in line}

    fail_over(site, order, found, lambda host: is_whole(host.mount / "orders" / "orders.sqlite"))
    for name in ("one", "two"):
        assert "did not stop" not in site.cluster.log(name).read_text()


# ---- the commands of modules, without a pair


_BUSY = "do 'begin loop null; end loop; end'"


def end_all_that_work_in(directory: Path) -> None:
    """SIGKILL to what a test that failed has left there."""
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if cwd.readlink() == directory:
                os.kill(int(cwd.parent.name), signal.SIGKILL)


def service_of(rendered: modules.Rendered) -> dict[str, str]:
    (service,) = tomllib.loads(rendered.services)["service"]
    return dict(service)


def shell(text: str) -> subprocess.CompletedProcess[bytes]:
    """As the controller runs it, what it says apart: a server that it leaves behind must not hold a pipe of ours."""
    return subprocess.run(["sh", "-c", text], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)


@pytest.mark.skipif(postgresql.installed() is None, reason="needs PostgreSQL")
def test_postgresql_believes_a_lock_file_only_of_a_server_that_works_there() -> None:
    """On the volume, that of the other machine is found, whose process here is somebody else; also with the same user."""
    programs = postgresql.installed()
    assert programs is not None
    with contextlib.ExitStack() as undo:
        directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="mirrorfs-modules-", dir="/var/tmp"))
        undo.callback(end_all_that_work_in, Path(directory) / "data")
        Path(directory).chmod(0o755)
        private = Path(directory) / "private"
        postgresql.make_private(private)
        server = postgresql.Server(programs, Path(directory) / "data", private)
        server.create()
        places = {"data": str(server.cluster), "sockets": str(private), "log": str(private / "log")}
        settings = {"run": "commands", "version": programs.parent.name, "listen": "127.0.0.1", "port": "15432"} | places
        service = service_of(modules.render(modules.find("postgresql"), settings))
        lock = server.cluster / "postmaster.pid"
        with subprocess.Popen(as_postgres("sleep", "1000")) as stranger:
            try:
                wait_for(lambda: Path(f"/proc/{stranger.pid}").stat().st_uid != 0, "it is postgres's")
                lock.write_text(f"{stranger.pid}\n{server.cluster}\n1\n15432\n{private}\n\n1 1\nready\n")
                assert shell(service["stop"]).returncode == 0
                assert stranger.poll() is None, "nobody else is stopped"
                assert shell(service["start"]).returncode == 0, (private / "log").read_text()
            finally:
                stranger.kill()
        running = lock.read_text()
        assert shell(service["start"]).returncode != 0
        assert lock.read_text() == running, "that of a server that is there stays"
        with subprocess.Popen(as_postgres(str(programs / "psql"), "-h", str(private), "-p", "15432", "-c", _BUSY)) as client:

            def backend() -> list[str]:
                query = "select pid from pg_stat_activity where query like 'do %'"
                return server.client("psql", "-p", "15432", "-Atc", query).split()

            wait_for(lambda: bool(backend()), "it is busy")
            (busy,) = map(int, backend())
            os.kill(int(running.split()[0]), signal.SIGKILL)
            assert shell(service["start"]).returncode != 0
            assert lock.read_text() == running, "a process of a server that was killed may still write"
            os.kill(busy, signal.SIGKILL)
            client.wait(timeout=30)
        assert shell(service["start"]).returncode == 0, (private / "log").read_text()
        assert shell(service["stop"]).returncode == 0
        wait_for(lambda: not lock.exists(), "it ends in order")
        assert shell(service["stop"]).returncode == 0


def test_the_skeleton_of_a_new_module_starts_answers_and_stops(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page").write_text("of the volume")
    file = adding.new("www", tmp_path / "modules")
    settings = {"mount": str(tmp_path), "pid_file": str(tmp_path / "pid"), "port": "18080"}
    service = service_of(modules.render(modules.read_module(file), settings))
    assert shell(service["stop"]).returncode == 0, "nothing is there"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen("http://127.0.0.1:18080/page", timeout=3) as page:
            return bool(page.read() == b"of the volume")
        return False

    assert shell(service["start"]).returncode == 0
    wait_for(answers, "it serves the file")
    assert [shell(service["stop"]).returncode for _ in range(2)] == [0, 0]
    wait_for(lambda: not answers(), "it has ended")
