"""What is done once on a machine before its node is started: what services ask for, and files that are in the way."""

import stat
from pathlib import Path

import pytest

from mirrorfs import config as configuration
from mirrorfs.config import Config
from mirrorfs.errors import MirrorfsError
from mirrorfs.preparing import has_files, prepare_services, set_aside

NODES = '[nodes.one]\naddress = "10.0.0.1"\n[nodes.two]\naddress = "10.0.0.2"\n'


def loaded(tmp_path: Path, more: str = "") -> Config:
    """The configuration of a volume that is to be mounted at `tmp_path`/data, where there is a file."""
    file = tmp_path / "v.toml"
    file.write_text(f'volume = "v"\nnode = "one"\nmount = "{tmp_path}/data"\n{NODES}{more}')
    return configuration.load(file)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    directory.chmod(0o2751)
    (directory / "file").write_text("content")
    return directory


# ---- files that are in the way


def test_what_is_set_aside_stands_beside_it_as_it_was_and_an_empty_directory_in_its_place(data: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert has_files(config)
    aside = set_aside(config)
    assert aside == tmp_path / "data.before-mirrorfs"
    assert (aside / "file").read_text() == "content"
    for directory in (aside, data):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o2751
    assert list(data.iterdir()) == []
    assert not has_files(config)


def test_setting_aside_again_does_nothing(data: Path, tmp_path: Path) -> None:
    set_aside(loaded(tmp_path))
    assert set_aside(loaded(tmp_path)) is None


def test_what_was_set_aside_before_is_never_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data.before-mirrorfs").mkdir()  # which rename(2) would replace
    with pytest.raises(MirrorfsError, match=r"data\.before-mirrorfs: is there already, nothing was set aside: move it away$"):
        set_aside(loaded(tmp_path))
    assert (data / "file").read_text() == "content"


def test_the_files_of_a_link_are_set_aside_where_they_are(data: Path, tmp_path: Path) -> None:
    data.rename(tmp_path / "real")
    data.symlink_to(tmp_path / "real")
    assert set_aside(loaded(tmp_path)) == tmp_path / "real.before-mirrorfs"
    assert list(data.iterdir()) == []


def test_there_is_nothing_to_set_aside_in_a_directory_that_is_empty_missing_or_adopted(data: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path)
    (data / ".mirrorfs").mkdir()
    assert set_aside(config) is None
    (data / ".mirrorfs").rmdir()
    (data / "file").unlink()
    assert set_aside(config) is None
    data.rmdir()
    assert set_aside(config) is None


def test_a_file_system_of_its_own_cannot_be_set_aside(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == data)
    with pytest.raises(MirrorfsError, match="is a mount point, and its files cannot be set aside beside it"):
        set_aside(loaded(tmp_path))
    (data / "file").rename(data / "lost+found")
    assert set_aside(loaded(tmp_path)) is None


# ---- what services ask for


def service(name: str, prepare: str) -> str:
    return f'[[service]]\nname = "{name}"\nunit = "u"\nprepare = \'{prepare}\'\n'


def test_services_are_prepared_in_their_order_and_what_they_say_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = service("a", "echo of a; echo error >&2") + '[[service]]\nname = "b"\nunit = "u"\n' + service("c", "pwd")
    prepare_services(loaded(tmp_path, f"[failover]\n{more}"))
    assert capfd.readouterr() == (
        "preparing this machine for the service a\nof a\nerror\npreparing this machine for the service c\n/\n",
        "",
    )


@pytest.mark.parametrize(("command", "how"), [("exit 3", "exit status 3"), ("kill -9 $$", "ended by signal 9")])
def test_the_first_that_fails_is_the_last(tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, how: str) -> None:
    config = loaded(tmp_path, f"[failover]\n{service('a', command)}{service('b', 'echo never')}")
    with pytest.raises(MirrorfsError) as caught:
        prepare_services(config)
    assert str(caught.value) == f"service a: this machine could not be prepared for it ({how}, see above)"
    assert "never" not in capfd.readouterr().out


def test_without_services_there_is_nothing_to_prepare(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare_services(loaded(tmp_path))
    assert capfd.readouterr() == ("", "")
