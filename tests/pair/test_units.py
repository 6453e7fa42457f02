"""What the units of systemd rely on: the configuration says where, and systemd hears that the node lives."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mirrorfs.lab.pair import Host, Lab

pytestmark = pytest.mark.root


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Lab.create(tmp_path_factory.mktemp("lab")) as lab:
        yield lab.one


def _mount(host: Host, **environment: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "mirrorfs", "--config", host.config, "mount")
    mounting: subprocess.Popen[str] = host.popen(*command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    return mounting


def test_mount_without_a_path_takes_that_of_the_configuration_and_shows_life(host: Host) -> None:
    host.config.write_text(f'mount = "{host.mount}"\n' + host.config.read_text())
    address = str(host.home / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(30)
        mounting = _mount(host, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        try:
            said = [systemd.recv(100) for _ in range(4)]
            assert os.path.ismount(host.mount)
        finally:
            mounting.terminate()
            mounting.communicate(timeout=30)
    assert said == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]


def test_without_either_it_says_what_to_do(host: Host) -> None:
    mounting = _mount(host)
    _, said = mounting.communicate(timeout=30)
    assert mounting.returncode == 2
    assert said == f'mirrorfs: where? Give PATH, or write mount = "/data" into {host.config}\n'
