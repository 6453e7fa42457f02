"""An etcd of its own for tests and the lab: real members, their certificates, their users, and what can happen to them.

    DIR/ca.crt, client.crt, client.key, ...   with `tls`
    DIR/password                              with a password: that of the user `mirrorfs`
    DIR/0/data, DIR/0/log, DIR/1/...          of each member

The traffic between the members is neither encrypted nor authenticated, that of clients as `tls` and `password` say.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import ArbiterConfig
from mirrorfs.lab import processes

#: With a password, the user that may read and write everything that begins with PREFIX, and nothing else.
USER: Final = "mirrorfs"
PREFIX: Final = "/mirrorfs/"

_HEARTBEAT_MS = 50
_ELECTION_MS = 250
_START_DEADLINE_S = 20.0
_STOP_DEADLINE_S = 10.0
#: What a member writes to its log when it is a part of the cluster and listens to clients.
_READY = b"ready to serve client requests"
_LOG_TAIL_LINES = 8
_STARTS = 3  # with other ports each time, should somebody have taken one meanwhile
#: Below the ports that Linux gives to connections (ip_local_port_range), which could take that of a member that is stopped.
_PORTS = range(15_000, 32_000, 2)


class EtcdCluster:
    """A cluster of etcd; a context manager that starts it and ends it. Members have numbers from 0 on.

    What it is asked for and cannot do raises MirrorfsError, with the end of the log where a member does not come up.
    """

    def __init__(
        self,
        directory: Path,
        members: int = 1,
        *,
        tls: bool = False,
        password: str = "",
        address: Callable[[int], str] = lambda member: "127.0.0.1",
        port: int = 0,
        entering: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        """Nothing is made before `start`.

        `tls`: clients need a certificate. `password`: of the user USER, and then there are users. `address`: IPv4 of each
        member. `port`: of the first member for its clients; peers have the next one, members after it the next two; 0
        for free ones. `entering`: words to put before a command so that it runs where those addresses are, as
        `Network.entering` says them. `arguments`: more of them for each etcd.
        """
        self.directory = directory
        self.members = members
        self.tls = tls
        self._password = password
        self._address = address
        self._port = port
        self._entering = list(entering)
        self._arguments = list(arguments)
        self._ports: list[int] = []
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._log_begin: dict[int, int] = {}
        self._snapshots = 0

    def __enter__(self) -> Self:
        """Start all members."""
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End all members; their files stay."""
        self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs of the members for clients; there are none before the first `start`."""
        scheme = "https" if self.tls else "http"
        return tuple(f"{scheme}://{self._address(member)}:{port}" for member, port in enumerate(self._ports))

    def config(self, *, timeout_s: float = 2.0) -> ArbiterConfig:
        """What a node's configuration says of this cluster."""
        return ArbiterConfig(
            kind="etcd",
            endpoints=self.endpoints,
            ca=self.directory / "ca.crt" if self.tls else None,
            certificate=self.directory / "client.crt" if self.tls else None,
            key=self.directory / "client.key" if self.tls else None,
            user=USER if self._password else "",
            password_file=self.directory / "password" if self._password else None,
            timeout_s=timeout_s,
        )

    def start(self) -> None:
        """Start a new cluster, in a directory that has none yet; returns when all members answer and users are made."""
        for program in ("etcd", "etcdctl", *(["openssl"] if self.tls else [])):
            if shutil.which(program) is None:
                raise MirrorfsError(f"{program} is not installed (Debian: etcd-server, etcd-client, openssl)")
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.tls:
            make_certificates(self.directory, {self._address(member) for member in range(self.members)})
        try:
            self._start_new()
            if self._password:
                self._make_users()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill all members; without any, nothing happens."""
        for member in list(self._running):
            self.kill_member(member)

    def start_member(self, member: int, *, wait: bool = True) -> None:
        """Start a member that does not run; returns when it answers, which needs a quorum, or with `wait` false at once."""
        assert member not in self._running
        self._home(member).mkdir(exist_ok=True)
        with (self._home(member) / "log").open("ab") as log:
            self._log_begin[member] = log.tell()
            command = [*self._entering, "etcd", *_words(self._options(member)), *self._arguments]
            self._running[member] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            self._wait_for(member)

    def stop_member(self, member: int) -> None:
        """End a member in order."""
        self._end(member, signal.SIGTERM)

    def kill_member(self, member: int) -> None:
        """End a member as a crash would."""
        self._end(member, signal.SIGKILL)

    def pause_member(self, member: int) -> None:
        """Let a member stand still: connections to it are still made, and nothing is answered."""
        processes.stop(processes.find_all([self._running[member].pid]))

    def resume_member(self, member: int) -> None:
        """Let a paused member go on."""
        self._running[member].send_signal(signal.SIGCONT)

    def snapshot(self) -> Path:
        """Save what a running member has, as a backup does; returns the file."""
        self._snapshots += 1
        file = self.directory / f"snapshot-{self._snapshots}"
        self.etcdctl("snapshot", "save", str(file), member=min(self._running))
        return file

    def restore(self, snapshot: Path, *, token: str = "mirrorfs") -> None:  # noqa: S107 (a name of the cluster, no secret)
        """Make a cluster of the snapshot in the place of this one, and start it.

        The cluster id is made of the members' names, their URLs and `token`: with another token it is another cluster.
        """
        self.close()
        for member in range(self.members):
            data = self._home(member) / "data"
            shutil.rmtree(data, ignore_errors=True)
            kept = ("--name", "--initial-cluster", "--initial-advertise-peer-urls")
            options = {name: value for name, value in self._options(member).items() if name in kept}
            options |= {"--data-dir": str(data), "--initial-cluster-token": token}
            self._run("etcdctl", "snapshot", "restore", str(snapshot), *_words(options))
        self._start_all()

    def etcdctl(self, *arguments: str, member: int = 0) -> str:
        """What `etcdctl` prints, asked as root of one member."""
        options = ["--endpoints", self.endpoints[member]]
        if self.tls:
            for option, file in (("--cacert", "ca.crt"), ("--cert", "client.crt"), ("--key", "client.key")):
                options += [option, str(self.directory / file)]
        user = {"ETCDCTL_USER": f"root:{self._password}"} if (self.directory / "password").exists() else {}
        return self._run("etcdctl", *options, *arguments, environment=user)

    def _start_new(self) -> None:
        for attempt in range(1, _STARTS + 1):
            self._choose_ports()
            try:
                self._start_all()
                return
            except MirrorfsError as error:
                if self._port or "address already in use" not in str(error) or attempt == _STARTS:
                    raise
                self.close()
                for member in range(self.members):
                    shutil.rmtree(self._home(member))

    def _start_all(self) -> None:
        for member in range(self.members):
            self.start_member(member, wait=False)
        for member in range(self.members):
            self._wait_for(member)

    def _make_users(self) -> None:
        self.etcdctl("user", "add", f"root:{self._password}")
        self.etcdctl("user", "grant-role", "root", "root")
        self.etcdctl("user", "add", f"{USER}:{self._password}")
        self.etcdctl("role", "add", USER)
        self.etcdctl("role", "grant-permission", USER, "--prefix=true", "readwrite", PREFIX)
        self.etcdctl("user", "grant-role", USER, USER)
        self.etcdctl("auth", "enable")
        file = self.directory / "password"
        file.touch(mode=0o600)
        file.write_text(f"{self._password}\n")

    def _options(self, member: int) -> dict[str, str]:
        client, peer = self.endpoints[member], self._peer_url(member)
        options = {
            "--name": f"member-{member}",
            "--data-dir": str(self._home(member) / "data"),
            "--listen-client-urls": client,
            "--advertise-client-urls": client,
            "--listen-peer-urls": peer,
            "--initial-advertise-peer-urls": peer,
            "--initial-cluster": self._all_peers(),
            "--initial-cluster-token": "mirrorfs",
            "--heartbeat-interval": str(_HEARTBEAT_MS),
            "--election-timeout": str(_ELECTION_MS),
        }
        tls = {
            "--client-cert-auth": "true",
            "--trusted-ca-file": str(self.directory / "ca.crt"),
            "--cert-file": str(self.directory / "server.crt"),
            "--key-file": str(self.directory / "server.key"),
        }
        return options | (tls if self.tls else {})

    def _wait_for(self, member: int) -> None:
        """Wait until the member answers, with a quorum behind it."""
        deadline = time.monotonic() + _START_DEADLINE_S
        # First its own word: what answers at its port may be somebody else's, until the member finds the port taken.
        while not (self._has_said(member, _READY) and self._is_well(member)):
            if self._running[member].poll() is not None:
                raise MirrorfsError(f"etcd has ended: {self._log_tail(member)}")
            if time.monotonic() > deadline:
                raise MirrorfsError(f"etcd does not answer after {_START_DEADLINE_S:g} s: {self._log_tail(member)}")
            time.sleep(0.01)

    def _has_said(self, member: int, words: bytes) -> bool:
        """Whether the words are in the log since the member was started last."""
        with (self._home(member) / "log").open("rb") as log:
            log.seek(self._log_begin[member])
            return words in log.read()

    def _is_well(self, member: int) -> bool:
        try:
            self.etcdctl("endpoint", "health", "--command-timeout=1s", member=member)
        except MirrorfsError:
            return False
        return True

    def _log_tail(self, member: int) -> str:
        lines = (self._home(member) / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _end(self, member: int, number: signal.Signals) -> None:
        process = self._running.pop(member)
        process.send_signal(number)
        try:
            process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _choose_ports(self) -> None:
        free = _free_ports() if not self._port else iter(range(self._port, self._port + 2 * self.members, 2))
        self._ports = [next(free) for _ in range(self.members)]

    def _peer_url(self, member: int) -> str:
        return f"http://{self._address(member)}:{self._ports[member] + 1}"

    def _all_peers(self) -> str:
        return ",".join(f"member-{member}={self._peer_url(member)}" for member in range(self.members))

    def _home(self, member: int) -> Path:
        return self.directory / str(member)

    def _run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        return _run([*self._entering, *command], environment or {})


def make_certificates(directory: Path, addresses: set[str]) -> None:
    """A CA, a server's certificate for the addresses and a client's: ca.crt, server.crt, client.crt, each with its .key."""
    names = ",".join(f"IP:{address}" for address in sorted(addresses))
    # The gateway inside of etcd is a client of its own server and shows it the server's certificate: without clientAuth
    # in it every request through the gateway fails, and only those.
    usages = {
        "server": f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName={names}\n",
        "client": "extendedKeyUsage=clientAuth\n",
    }
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: str) -> None:
        _run(["openssl", *arguments], {})

    def files(name: str, *suffixes: str) -> list[str]:
        return [str(directory / f"{name}.{suffix}") for suffix in suffixes]

    ca_key, ca = files("ca", "key", "crt")
    openssl("req", "-x509", *key, "-keyout", ca_key, "-out", ca, "-subj", "/CN=mirrorfs lab CA", "-days", "30")
    for name, usage in usages.items():
        own_key, request, certificate, extensions = files(name, "key", "csr", "crt", "ext")
        Path(extensions).write_text(usage)
        # No common name: etcd would take a client's for a user, which its gateway refuses or ignores.
        openssl("req", "-new", *key, "-keyout", own_key, "-out", request, "-subj", f"/O=mirrorfs lab {name}")
        signed = ["-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "30", "-extfile", extensions]
        openssl("x509", "-req", "-in", request, "-out", certificate, *signed)


def _words(options: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


def _free_ports() -> Iterator[int]:
    """Ports that are free now, together with the next one of each."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as own, socket.socket() as next_one, contextlib.suppress(OSError):
            own.bind(("127.0.0.1", port))
            next_one.bind(("127.0.0.1", port + 1))
            yield port
    raise MirrorfsError("there are no free ports")


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            command, env=os.environ | dict(environment), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise MirrorfsError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise MirrorfsError(f"`{' '.join(command)}` failed: {error.stderr.strip() or error.returncode}") from error
    return done.stdout
