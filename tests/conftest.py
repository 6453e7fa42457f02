"""Fixtures that every kind of test may use: a lab with a mirrored pair."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Lab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root there are no mounts and no namespaces: say so, test by test."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One mirrored pair for all tests that only use its file system; they leave it mirrored."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with Lab.up(Path(tmp_path_factory.mktemp("lab"))) as lab:
        yield lab
