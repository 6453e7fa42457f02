"""Where the tests of POSIX behaviour run: a directory of the caller's choice, or the primary's mount of a mirrored pair.

With MIRRORFS_TEST_DIR=DIR they run in a fresh directory below DIR; on a local ext4 that shows that the tests themselves
are right. They need root, and every user must be able to reach the directory.
"""

import itertools
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Lab
from tests.conftest import served_by
from tests.posix.support import as_alice

_numbers = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def place(fuse_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh directory of root's on the file system under test, mode 0755."""
    chosen = os.environ.get("MIRRORFS_TEST_DIR")
    if chosen and fuse_session != "kernel":
        pytest.skip("one run is enough for a directory of the caller's choice")
    with ExitStack() as undo:
        if chosen:
            parent = Path(chosen).resolve()
        else:
            undo.enter_context(served_by(fuse_session))
            lab = undo.enter_context(Lab.up(Path(tmp_path_factory.mktemp("lab"))))
            parent = undo.enter_context(_reachable(lab.one.mount))
        place = Path(tempfile.mkdtemp(prefix="posix-", dir=parent))
        undo.callback(shutil.rmtree, place)
        place.chmod(0o755)
        assert as_alice(lambda: os.access(place, os.X_OK)), f"{place} must be reachable for every user"
        yield place


@contextmanager
def _reachable(mount: Path) -> Iterator[Path]:
    """Another path of the mount, for every user: pytest keeps its temporary directories, where the lab lies, to root."""
    door = Path(tempfile.mkdtemp(prefix="mirrorfs-posix-"))
    door.chmod(0o755)
    subprocess.run(["mount", "--bind", mount, door], check=True)
    mode = stat.S_IMODE(mount.stat().st_mode)
    mount.chmod(0o755)
    try:
        yield door
    finally:
        mount.chmod(mode)
        subprocess.run(["umount", "--lazy", door], check=True)
        door.rmdir()


@pytest.fixture
def here(place: Path) -> Path:
    """An empty directory of root's, mode 0755, for one test."""
    here = place / str(next(_numbers))
    here.mkdir(mode=0o755)
    return here


@pytest.fixture(scope="session")
def on_fuse(place: Path) -> bool:
    """Whether the file system under test is a FUSE mount, which leaves some answers to the library and the kernel."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = [fields[fields.index("-") + 1] for fields in mounts if fields[2] == number]
    return any(kind.startswith("fuse") for kind in kinds)


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)
