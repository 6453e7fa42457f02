"""Pairs that a test may break: each has its own."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Lab
from tests.pair.support import WRITER_KINDS, Load

_PROJECT = Path(__file__).parents[2]
_BUILD = _PROJECT / "packaging" / "build_deb.py"
#: The last commit with nothing but wire protocol 7.
_OLD = "e3197b0"
_IS_DEBIANS_PYTHON = sys.base_prefix == "/usr" and Path("/usr/bin/dpkg-deb").exists()


@pytest.fixture(scope="session")
def built_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this very source; it takes a while, and is made once for all tests, also of other processes."""
    if not _IS_DEBIANS_PYTHON:
        pytest.skip("the package is made of Debian's Python, and this is another one")
    processes = "PYTEST_XDIST_WORKER" in os.environ
    directory = (tmp_path_factory.getbasetemp().parent if processes else tmp_path_factory.getbasetemp()) / "built-package"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found := list(directory.glob("*.deb"))):
            built = subprocess.run([sys.executable, _BUILD, directory], capture_output=True, text=True, check=True)
            found = [Path(built.stdout.strip())]
    return found[0]


@pytest.fixture(scope="session")
def old_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it was before wire protocol 8: what a running pair is upgraded from."""
    done = subprocess.run(["git", "-C", str(_PROJECT), "archive", _OLD], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"the history of this repository is not here, and with it the version to upgrade from: {done.stderr!r}")
    directory = tmp_path_factory.mktemp("old")
    subprocess.run(["tar", "-x", "-C", directory], input=done.stdout, check=True)
    return directory


@pytest.fixture
def make_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Lab]]:
    """Makes mirrored pairs with the [replication] options that are given by keyword; all are taken down after the test."""
    with ExitStack() as stack:

        def make(**options: str) -> Lab:
            directory = tmp_path_factory.mktemp("lab")
            stack.callback(Lab(directory).down)  # a lab that does not come up leaves its files, some of them immutable
            return Lab.up(directory, options=options)

        yield make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A fresh mirrored pair, node one the primary, that misses its peer after a second of silence."""
    return make_lab(ack_timeout="1s")


@pytest.fixture
def start_load(tmp_path: Path) -> Iterator[Callable[..., Load]]:
    """Starts a writing load on a mount; whatever still writes after the test is ended."""
    loads: list[Load] = []

    def start(mount: Path, name: str = "load", seed: int = 0, kinds: tuple[str, ...] = WRITER_KINDS) -> Load:
        loads.append(Load(mount, name, tmp_path, seed=seed, kinds=kinds))
        return loads[-1]

    yield start
    for load in loads:
        load.kill()
