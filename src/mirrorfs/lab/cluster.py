"""A lab that looks after itself: a pair with controllers, an arbiter and a virtual address, clients on the desk, PostgreSQL."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from mirrorfs import control
from mirrorfs.errors import ControlError, MirrorfsError
from mirrorfs.lab import pair, public
from mirrorfs.lab.etcd import EtcdCluster
from mirrorfs.lab.network import DESK
from mirrorfs.lab.pair import Host, Lab, wait_for
from mirrorfs.lab.postgresql import as_postgres

ADDRESS: Final = "10.79.0.100"
ETCD: Final = f'[arbiter]\nkind = "etcd"\nendpoints = ["http://{public.PUBLIC[DESK]}:2379"]\ntimeout = "500ms"\n'


def sections(services: str, *, arbiter: str = ETCD, failover: str = "") -> str:
    """What such a lab has in its configuration, besides the nodes."""
    return f"""
{arbiter}
[failover]
{failover}
[[vip]]
address = "{ADDRESS}/24"
interface = "{public.INTERFACE}"
{services}
"""


def postgresql(programs: Path, *, restarts: int = 3) -> str:
    """The PostgreSQL on the mount as a service; $LAB_MOUNT is the host's, $LAB_HOME its directory."""
    control_program = f"{' '.join(as_postgres(str(programs / 'pg_ctl')))} -D $LAB_MOUNT/postgresql -w"
    options = "-c listen_addresses=* -c unix_socket_directories="
    # The hosts of a lab share their process ids, so a server that still ends on the other one would be taken for one of this.
    lock = "rm -f $LAB_MOUNT/postgresql/postmaster.pid"
    return f"""
[[service]]
name = "postgresql"
start = "cd /; {lock}; {control_program} -l $LAB_HOME/postgresql.log -o '{options}' start"
stop = "cd /; {control_program} -m fast stop"
start_timeout = "60s"
stop_timeout = "20s"
restarts = {restarts}
[[service.check]]
tcp = "127.0.0.1:5432"
interval = "500ms"
timeout = "1s"
"""


class Cluster:
    """The pair, its controllers, its arbiter. As a context manager it is taken down at the end."""

    def __init__(
        self,
        directory: Path,
        text: str,
        *,
        etcd: bool = True,
        options: dict[str, str] | None = None,
        source: Path | None = None,
    ) -> None:
        """Make the hosts, start etcd and the nodes (as `Host.launch`); returns when the pair is mirrored."""
        self._stack = contextlib.ExitStack()
        self._controllers: dict[str, subprocess.Popen[bytes]] = {}
        self._homes = Path(f"{directory}-servers")  # of what runs on the hosts besides mirrorfs, also as another user
        self._stack.callback(shutil.rmtree, self._homes, ignore_errors=True)
        self._stack.callback(Lab(directory).down)
        try:
            self.lab = Lab.create(directory, options=options, sections=text, desk=True)
            self.etcd = EtcdCluster(
                directory / "etcd",
                address=lambda _: public.PUBLIC[DESK],
                port=2379,
                entering=self.lab.network.entering(DESK),
            )
            if etcd:
                self._stack.enter_context(self.etcd)
                self._stack.callback(shutil.rmtree, directory / "etcd", ignore_errors=True)
            self.lab.run_all(source=source)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for name in list(self._controllers):
            self.kill_controller(name)
        self._stack.close()

    # ---- controllers

    def log(self, name: str) -> Path:
        """What the controller of a host has printed."""
        return self.lab.host(name).home / "controller-log"

    def start_controller(self, name: str, source: Path | None = None) -> None:
        """Start the controller of a host (as `Host.launch`), and wait until it answers."""
        host = self.lab.host(name)
        home = self._homes / name
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o777)
        environment = pair.node_environment(source) | {"LAB_MOUNT": str(host.mount), "LAB_HOME": str(home)}
        with self.log(name).open("ab") as log:
            self._controllers[name] = host.popen(
                *(sys.executable, "-m", "mirrorfs", "controller", "--config", str(host.config)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        process = self._controllers[name]
        wait_for(lambda: process.poll() is not None or self.says(name) is not None, f"the controller of {name} answers")
        if process.poll() is not None:
            raise MirrorfsError(f"the controller of {name} has ended: {self.log(name).read_text()[-2000:]}")

    def start_controllers(self, source: Path | None = None) -> None:
        """Start both, and wait until the application is served and could be by the other one."""
        for name in self.lab.hosts:
            if name not in self._controllers:
                self.start_controller(name, source)
        host = self.wait_serving()
        wait_for(lambda: ((self.says(host.name) or {}).get("peer") or {}).get("mount") == "standby", "the other is a standby")

    def kill_controller(self, name: str) -> None:
        """SIGKILL to one."""
        process = self._controllers.pop(name)
        process.kill()
        process.wait()

    def stop_controller(self, name: str, deadline_s: float = 60) -> int:
        """SIGTERM to one; returns its exit status."""
        process = self._controllers.pop(name)
        process.terminate()
        return process.wait(deadline_s)

    def kill_host(self, name: str) -> None:
        """SIGKILL to everything that runs on a host."""
        self.lab.kill_everything(name)
        if process := self._controllers.pop(name, None):
            process.wait()

    def says(self, name: str) -> dict[str, Any] | None:
        """The status of a controller, None if it does not answer."""
        try:
            return control.request(self.lab.host(name).control.with_suffix(".ctl"), "status", timeout_s=5)
        except ControlError:
            return None

    def posture(self, name: str) -> str:
        """What the controller of a host is doing."""
        said = self.says(name)
        return "not answering" if said is None else str(said["posture"])

    def command(self, name: str, command: str, **arguments: Any) -> str:
        """A command to a controller; raises its error."""
        done = control.request(self.lab.host(name).control.with_suffix(".ctl"), command, timeout_s=120, **arguments)
        return str(done["message"])

    def is_serving(self, name: str) -> bool:
        """Whether a host serves, with its addresses up."""
        said = self.says(name)
        return said is not None and said["posture"] == "serving" and said["addresses"] == "up"

    def wait_serving(self, name: str = "", deadline_s: float = 60) -> Host:
        """Wait until one host, or that one, serves; returns it."""
        names = [name] if name else list(self.lab.hosts)
        try:
            wait_for(lambda: any(self.is_serving(each) for each in names), f"{' or '.join(names)} serves", deadline_s)
        except MirrorfsError as error:
            said = "\n".join(f"{each}: {self.says(each)}\n{self.log(each).read_text()[-1500:]}" for each in names)
            raise MirrorfsError(f"{error}\n{said}") from None
        return next(self.lab.host(each) for each in names if self.is_serving(each))

    # ---- on the desk

    def at_desk(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run something where the clients are."""
        entering = self.lab.network.entering(DESK)
        return subprocess.run([*entering, *command], check=False, capture_output=True, text=True, **options)


def create_postgresql(host: Host, programs: Path) -> None:
    """Make a cluster of PostgreSQL on the host's mount that lets the desk in; its server does not run."""
    data = host.mount / "postgresql"
    data.mkdir(mode=0o700)
    shutil.chown(data, "postgres", "postgres")
    made = host.run(
        *as_postgres(str(programs / "initdb"), "-D", str(data), "-A", "trust", "--locale=C.UTF-8", "--no-sync"),
        cwd="/",
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise MirrorfsError(f"initdb failed on {data}: {made.stderr.strip()}")
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 10.79.0.0/24 trust\n")
