"""`mirrorfs doctor`: on a pair that is well, and with one thing wrong at a time."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.lab.pair import Host, Lab
from tests.pair.support import wait_state

pytestmark = pytest.mark.root

Findings = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def _doctor(host: Host, *arguments: str | Path) -> tuple[int, Findings]:
    command = (sys.executable, "-m", "mirrorfs", "--config", host.config, "doctor", "--json", *arguments)
    done = host.run(*command, stdout=subprocess.PIPE, text=True)
    return done.returncode, {finding["about"]: finding for finding in map(json.loads, done.stdout.splitlines())}


def _not_well(findings: Findings) -> set[str]:
    """What is the pair's; a clock and limits are this machine's."""
    return {about for about, finding in findings.items() if finding["grade"] != "ok"} - {"clock", "open files"}


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_pair_that_is_well_is_told_so(pair: Lab, name: str) -> None:
    host = pair.host(name)
    code, findings = _doctor(host, host.mount)
    assert code == 0
    assert _not_well(findings) == set()
    assert {"user", "/dev/fuse", "kernel", "address", "keys", "the mount", "the other node"} <= findings.keys()


def test_what_is_not_well_has_advice(pair: Lab) -> None:
    for finding in _doctor(pair.one)[1].values():
        assert finding["grade"] in ("ok", "warning", "error")
        assert bool(finding["advice"]) is (finding["grade"] != "ok")


def test_keys_that_are_not_there_are_an_error(pair: Lab) -> None:
    away = pair.one.keys.with_name("keys-away")
    pair.one.keys.rename(away)
    try:
        code, findings = _doctor(pair.one)
    finally:
        away.rename(pair.one.keys)
    assert code == 1
    assert _not_well(findings) == {"keys"}
    assert "mirrorfs init" in findings["keys"]["advice"]


def test_keys_that_others_can_read_are_an_error(pair: Lab) -> None:
    key = pair.one.keys / "identity.key"
    key.chmod(0o644)
    try:
        code, findings = _doctor(pair.one)
    finally:
        key.chmod(0o600)
    assert (code, _not_well(findings)) == (1, {"keys"})
    assert "chmod 600" in findings["keys"]["advice"]


def test_an_address_of_another_machine_is_an_error(pair: Lab, tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text(pair.one.config.read_text().replace('address = "10.77.0.1"', 'address = "10.77.0.9"'))
    done = pair.one.run(sys.executable, "-m", "mirrorfs", "--config", file, "doctor", stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "error    address: 10.77.0.9: Cannot assign requested address\n         -> give nodes.one.address" in done.stdout


def test_a_file_system_without_trusted_attributes_is_an_error(pair: Lab, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], check=True)
    try:
        code, findings = _doctor(pair.one, tmp_path / "not-there-yet")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert (code, findings["extended attributes"]["grade"]) == (1, "error")
    assert "ext4" in findings["extended attributes"]["advice"]


def test_a_node_that_is_gone_is_a_warning_on_both(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Lab.up(tmp_path_factory.mktemp("lab")) as lab:
        lab.two.kill()
        wait_state(lab.one, "solo")
        code, findings = _doctor(lab.one)
        assert (code, _not_well(findings)) == (0, {"the mount", "the other node"})
        assert "two is not connected" in findings["the other node"]["found"]
        code, findings = _doctor(lab.two)
        assert (code, _not_well(findings)) == (0, {"the mount"})
        assert "mirrorfs mount" in findings["the mount"]["advice"]


def test_without_a_configuration_the_machine_is_looked_at() -> None:
    without_etc = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /etc && exec "$@"', "sh")
    done = subprocess.run(
        [*without_etc, sys.executable, "-m", "mirrorfs", "doctor"], capture_output=True, text=True, check=True
    )
    assert "no configuration here" in done.stdout
