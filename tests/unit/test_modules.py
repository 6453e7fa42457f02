"""Application modules: every one that comes with mirrorfs can be used as it is, and whatever is wrong is told in one line."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mirrorfs import config as configuration
from mirrorfs import modules
from mirrorfs.errors import ConfigError, MirrorfsError, UsageError
from mirrorfs.failover_config import ServiceConfig
from mirrorfs.modules import adding

SHIPPED = ("generic", "mariadb", "postgresql")
VOLUME = (
    'volume = "v"\nnode = "one"\nmount = "/srv/volume"\n[nodes.one]\naddress = "10.0.0.1"\n[nodes.two]\naddress = "10.0.0.2"\n'
)

MODULE = """
summary = "a test"
description = "on $mount"
[parameters.port]
default = "1000"
kind = "number"
[parameters.target]
default = "127.0.0.1:$port"
[commands]
configuration = '''
[[service]]
name = "$name"
start = "true"
[[service.check]]
tcp = "$target"
'''
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The configuration of a volume."""
    file = tmp_path / "v.toml"
    file.write_text(VOLUME)
    return file


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory of modules, with one in it: `own`."""
    directory = tmp_path / "modules"
    directory.mkdir()
    (directory / "own.toml").write_text(MODULE)
    return directory


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MIRRORFS_")}
    command = [sys.executable, "-m", "mirrorfs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd="/")


def refused(*arguments: str | Path) -> str:
    """The one line that it says; nothing was done, and the exit status is that of a usage error."""
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.removeprefix("mirrorfs: ").strip()


def services(file: Path) -> dict[str, ServiceConfig]:
    failover = configuration.load(file).failover
    assert failover is not None
    return {service.name: service for service in failover.services}


# ---- those that come with mirrorfs


def test_these_come_with_mirrorfs() -> None:
    assert tuple(name for name, file in modules.find_all().items() if modules.read_module(file).is_shipped) == SHIPPED


@pytest.mark.parametrize("run_by", modules.WAYS)
@pytest.mark.parametrize("name", SHIPPED)
def test_each_can_be_added_with_its_defaults(name: str, run_by: str, file: Path) -> None:
    loaded = configuration.load(file)
    module = modules.find(name)
    adding.add(loaded, modules.render(module, {"run": run_by}, loaded.mount))
    service = services(file)[name]
    assert bool(service.unit) == (run_by == "systemd")
    assert bool(service.start and service.stop) == (run_by == "commands")
    assert [check.kind for check in service.checks] == ["command"], "one that asks the application"
    assert module.summary
    assert all(parameter.about for parameter in module.parameters)
    assert all(parameter.about for way in module.ways.values() for parameter in way.parameters)


def test_the_volumes_mount_is_where_the_data_is_by_default(file: Path) -> None:
    adding.add(configuration.load(file), modules.render(modules.find("postgresql"), {"run": "commands"}, Path("/srv/volume")))
    assert "/srv/volume/postgresql" in services(file)["postgresql"].start


@pytest.mark.parametrize("name", ["postgresql", "mariadb", "generic"])
def test_the_commands_of_each_are_shell(name: str) -> None:
    for run_by in modules.WAYS:
        content = tomllib.loads(modules.render(modules.find(name), {"run": run_by}).services)
        (service,) = content["service"]
        for text in (
            *(service.get(key, "") for key in ("start", "stop", "prepare")),
            *(check["command"] for check in service["check"]),
        ):
            done = subprocess.run(["sh", "-n", "-c", text], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), text


def test_without_systemd_commands_are_what_is_added_and_with_it_a_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(modules, "_SYSTEMD_RUNS", tmp_path / "missing")
    assert "unit =" not in modules.render(modules.find("mariadb"), {}).services
    monkeypatch.setattr(modules, "_SYSTEMD_RUNS", tmp_path)
    assert 'unit = "mariadb.service"' in modules.render(modules.find("mariadb"), {}).services
    assert 'unit = "postgresql@16-main.service"' in modules.render(modules.find("postgresql"), {"version": "16"}).services


@pytest.mark.parametrize(("name", "unit"), [("postgresql", "postgresql@.service"), ("mariadb", "mariadb.service")])
def test_the_units_are_those_of_debian(name: str, unit: str) -> None:
    (service,) = tomllib.loads(modules.render(modules.find(name), {"run": "systemd"}).services)["service"]
    assert re.sub("@.*[.]", "@.", service["unit"]) == unit
    if Path(f"/usr/share/doc/{name}-common").exists() or Path(f"/usr/share/doc/{name}-server").exists():
        assert any((Path(place) / unit).exists() for place in ("/usr/lib/systemd/system", "/lib/systemd/system"))


def test_a_module_without_a_unit_is_run_by_commands_where_systemd_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: Path
) -> None:
    monkeypatch.setattr(modules, "_SYSTEMD_RUNS", tmp_path)
    assert 'start = "true"' in modules.render(modules.find("own", own), {}).services


# ---- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prot": "1"}, "--set prot: module own has no such parameter with run=commands, did you mean port?"),
        ({"xyzzy": "1"}, "there are name, mount, run, port, target"),
        ({"port": "http"}, '--set port: "http" cannot be, use digits'),
        ({"port": ""}, '--set port: "" cannot be'),
        ({"target": "a b"}, '--set target: "a b" cannot be'),
        ({"target": "$(reboot)"}, "cannot be"),
        ({"target": '"'}, "cannot be"),
        ({"mount": "data"}, '--set mount: "data" cannot be, begin it with /'),
        ({"mount": "/data/"}, '--set mount: "/data/" cannot be'),
        ({"mount": "/a\nb"}, r'--set mount: "/a\nb" cannot be'),
        ({"run": "systemd"}, '--set run: module own runs with commands, not with "systemd"'),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(settings: dict[str, str], said: str, own: Path) -> None:
    with pytest.raises(UsageError) as raised:
        modules.render(modules.find("own", own), settings)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [["port"], ["=1"], ["port=1", "port=2"]])
def test_what_is_no_setting_is_refused(settings: list[str]) -> None:
    with pytest.raises(UsageError, match="--set"):
        modules.parse_settings(settings)


def test_a_command_may_have_all_that_a_line_can_have(file: Path) -> None:
    line = """sh -c 'echo "$HOME" \\t ${x:-1} | sed "s/a/b/" & # ü'"""
    rendered = modules.render(modules.find("generic"), {"run": "commands", "start": line})
    adding.add(configuration.load(file), rendered)
    assert services(file)["generic"].start == line


def test_a_word_may_name_what_is_elsewhere_on_each_server(own: Path) -> None:
    assert 'tcp = "$ADDRESS:1000"' in modules.render(modules.find("own", own), {"target": "$ADDRESS:1000"}).services


def test_a_parameter_without_a_default_has_to_be_set(own: Path) -> None:
    (own / "own.toml").write_text(MODULE.replace('default = "1000"', 'about = "where it listens"'))
    module = modules.find("own", own)
    with pytest.raises(UsageError, match=r"--set port=\.\.\.: where it listens"):
        modules.render(module, {})
    assert modules.render(module, {"port": "7"}).names == ("own",)


# ---- modules of one's own


def test_the_skeleton_of_a_new_module_can_be_added(file: Path, tmp_path: Path) -> None:
    done = run("modules", "new", "mine", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    module = modules.find("mine", tmp_path / "new")
    assert not module.is_shipped
    adding.add(configuration.load(file), modules.render(module, {}))
    (check,) = services(file)["mine"].checks
    assert check.target == "http://127.0.0.1:8080/"
    assert "is there already" in refused("modules", "new", "mine", tmp_path / "new")
    assert "is no name of a module" in refused("modules", "new", "../mine", tmp_path / "new")


def test_the_list_says_where_each_is_from_and_what_is_wrong_with_one(own: Path) -> None:
    (own / "bad.toml").write_text("summary = 1")
    (own / "generic.toml").write_text(MODULE)
    done = run("modules", "list", "--json", "--dir", own)
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert list(found) == ["bad", "generic", "mariadb", "own", "postgresql"]
    assert [found[name]["from"] for name in ("mariadb", "own", "generic")] == [
        "mirrorfs",
        str(own / "own.toml"),
        str(own / "generic.toml"),
    ]
    assert "summary" in found["bad"]["error"]
    in_words = run("modules", "list", "--dir", own)
    assert (done.returncode, in_words.returncode) == (0, 0)
    assert len(in_words.stdout.splitlines()) == 5


def test_what_show_prints_is_toml_that_can_be_added_as_it_is(file: Path) -> None:
    done = run("modules", "show", "mariadb", "--set", "run=commands", "--set", "port=3307", "--config", file)
    assert done.returncode == 0, done.stderr
    for expected in ("/srv/volume/mysql", "port = 3307", "InnoDB"):
        assert expected in done.stdout
    file.write_text(VOLUME + done.stdout)
    assert list(services(file)) == ["mariadb"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('summary = "a test"', "", "summary: missing"),
        ("[commands]", "[command]", "command: unknown key, did you mean commands?"),
        ('kind = "number"', 'kind = "numbr"', 'parameters.port.kind: "numbr" is not known here'),
        ("[parameters.target]", "[parameters.mount]", "parameters.mount: is there already"),
        ("[parameters.target]", "[parameters.Target]", "parameters.Target: is no name"),
        ('tcp = "$target"', 'tcp = "$targt"', "commands.configuration: $targt is no parameter; a $ of the shell is written $$"),
        ('start = "true"', 'start = "echo $(date)"', "a $ of the shell is written $$"),
        ('start = "true"', 'strat = "true"', "did you mean start?"),
        ('start = "true"', "start = true", "must be a string"),
        ('start = "true"', "start", "not TOML"),
        ("[[service]]", "[vip]", "has to have [[service]] tables and nothing else"),
        ('default = "1000"', 'default = "abc"', "default of port: "),
        ('description = "on $mount"', 'description = "on $mont"', "description: $mont is no parameter"),
    ],
)
def test_a_wrong_module_is_told_in_one_line(before: str, after: str, said: str, own: Path) -> None:
    assert before in MODULE
    (own / "own.toml").write_text(MODULE.replace(before, after))
    with pytest.raises(ConfigError) as raised:
        modules.render(modules.find("own", own), {})
    assert str(own / "own.toml") in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- into the configuration of a volume


@pytest.mark.root
def test_adding_keeps_what_is_there_and_mode_and_owner_of_the_file(file: Path, own: Path) -> None:
    os.chown(file, 1, 2)
    file.chmod(0o640)
    link = file.with_name("link.toml")
    link.symlink_to(file)
    for name in ("first", "second"):
        done = run("modules", "add", "own", "--dir", own, "--set", f"name={name}", "--config", link)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"service {name} is added" in done.stdout
    assert file.read_text().startswith(VOLUME)
    assert list(services(file)) == ["first", "second"]
    there = file.stat()
    assert (there.st_mode & 0o777, there.st_uid, there.st_gid) == (0o640, 1, 2)
    assert link.is_symlink()
    assert {each.name for each in file.parent.iterdir()} == {"v.toml", "link.toml", "modules"}


def test_a_service_that_is_there_is_not_added_again(file: Path, own: Path) -> None:
    adding.add(configuration.load(file), modules.render(modules.find("own", own), {}))
    before = file.read_bytes()
    said = refused("modules", "add", "own", "--dir", own, "--config", file)
    assert said == f'{file}: there is a service "own" already, give another name with --set name=...'
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (VOLUME[: VOLUME.index("[nodes.two]")], "the peer of"),
        (VOLUME.replace('node = "one"\n', 'node = "one"\nservice = []\nfailover = {}\n'), "not TOML"),
    ],
)
def test_a_file_that_would_be_none_stays_as_it_is(file: Path, content: str, said: str, own: Path) -> None:
    file.write_text(content)
    complaint = refused("modules", "add", "own", "--dir", own, "--config", file)
    assert complaint.startswith(f"{file}: ")
    assert said in complaint
    assert file.read_text() == content
    assert {each.name for each in file.parent.iterdir()} == {"v.toml", "modules"}


def test_a_module_that_is_none_or_a_file_that_cannot_be_written_is_told(file: Path, own: Path) -> None:
    assert 'there is no module "ow"' in refused("modules", "show", "ow", "--dir", own)
    with pytest.raises(MirrorfsError, match="cannot be written"):
        adding.new("x", file)


# ---- with `mirrorfs init`


def test_the_sections_of_init_have_the_address_and_the_services() -> None:
    text = adding.of_options("generic", ["run=commands", "start=x"], ["10.0.0.9/24@eth0"], Path("/d"), {})
    content = tomllib.loads(text)
    assert list(content) == ["failover", "vip", "service"]
    assert content["vip"] == [{"address": "10.0.0.9/24", "interface": "eth0"}]
    assert adding.of_options(None, [], [], None, {}) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", "a=b"), "--set goes with --module"),
        (("--module", "nothing"), 'there is no module "nothing"'),
        (("--module", "generic", "--set", "x=1"), "--set x"),
        (("--vip", "10.0.0.9/24"), "write ADDRESS/LENGTH@INTERFACE"),
        (("--vip", "10.0.0.9@eth0"), "is not an address with a prefix length"),
        (("--vip", "10.0.0.1/24@eth0"), "is an address of"),
    ],
)
def test_init_refuses_what_cannot_be_before_it_writes_anything(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    file = tmp_path / "v.toml"
    assert said in refused("init", "v", "--address", "10.0.0.1", "--config", file, "--node", "one", *options)
    assert not file.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[nodes.one]\nheartbeats = ['10.0.0.1', '10.1.0.1']\naddress = '10.0.0.1'\nkeys = 'KEYS'\n", "number of heartbeats"),
        ("nodes = {one = {address = '10.0.0.1', keys = 'KEYS'}}\n", "not TOML"),
    ],
)
def test_init_says_at_once_if_the_other_node_cannot_be_put_into_a_file(
    file: Path, text: str, said: str, tmp_path: Path
) -> None:
    text = "volume = 'v'\n" + text.replace("KEYS", str(tmp_path / "keys"))
    file.write_text(text)
    complaint = refused("init", "v", "--config", file, "--node", "one", "--minutes", "0.1")
    assert said in complaint
    assert complaint.startswith(f"{file}: ")
    assert complaint.endswith("; so it would be with the other node in it: name both there before `mirrorfs init`")
    assert file.read_text() == text


def test_init_with_a_file_that_names_both_nodes_says_what_to_use(file: Path, tmp_path: Path) -> None:
    text = VOLUME.replace("[nodes.two]", f'keys = "{tmp_path}/keys"\n[nodes.two]')
    file.write_text(text)
    assert "`mirrorfs modules add`" in refused("init", "v", "--config", file, "--module", "generic")
    assert file.read_text() == text
