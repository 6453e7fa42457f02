"""Fixtures that every kind of test may use: a lab with a mirrored pair."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from mirrorfs.lab.pair import Lab

# How long an example takes says how busy the machine is.
settings.register_profile("mirrorfs", deadline=None)
settings.load_profile("mirrorfs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long and only computes begins first. Without root there are no mounts: say so, test by test."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session", params=["kernel", "pyfuse3"])
def fuse_session(request: pytest.FixtureRequest) -> str:
    """The sessions that speak to the kernel: each is the other's oracle. `MIRRORFS_SESSION` chooses one."""
    chosen = os.environ.get("MIRRORFS_SESSION", request.param)
    if chosen != request.param:
        pytest.skip(f"only {chosen} is asked for")
    return str(request.param)


@contextmanager
def served_by(kind: str) -> Iterator[None]:
    """Nodes that are started in here use that session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIRRORFS_SESSION", kind)
        yield


@pytest.fixture(scope="session")
def mirrored(fuse_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One mirrored pair for all tests that only use its file system; they leave it mirrored."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with served_by(fuse_session), Lab.up(Path(tmp_path_factory.mktemp("lab"))) as lab:
        yield lab
