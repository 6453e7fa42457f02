"""The resource agent by itself, on the nodes of a lab: ocf-tester, and each action with what its exit status means."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import mirrorfs, state, wait_peer_lost, wait_state

_SOURCE: Final = Path(__file__).parents[2] / "packaging" / "ocf" / "volume"
_FUNCTIONS: Final = Path("/usr/lib/ocf/lib/heartbeat/ocf-shellfuncs")
_IS_HERE: Final = _FUNCTIONS.exists() and shutil.which("xmllint") is not None

pytestmark = [pytest.mark.root, pytest.mark.skipif(not _IS_HERE, reason="needs resource-agents and libxml2-utils of Debian")]

# OCF's exit statuses.
SUCCESS, GENERIC, ARGS, UNIMPLEMENTED, INSTALLED, CONFIGURED, NOT_RUNNING, PROMOTED = 0, 1, 2, 3, 5, 6, 7, 8


@dataclass(frozen=True, slots=True)
class Result:
    """How an action ended, and the reason that it gave."""

    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class Agent:
    """The agent on a host, told what Pacemaker would tell it; scores go into a file in place of the cluster."""

    host: Host
    home: Path

    def environment(self, **parameters: str) -> dict[str, str]:
        given = {"config": str(self.host.config), "binary": str(self.home / "mirrorfs"), "CRM_meta_interval": "10000"}
        return {
            **os.environ,
            "OCF_ROOT": "/usr/lib/ocf",
            "OCF_RESOURCE_INSTANCE": f"volume-{self.host.name}:0",
            "HA_RSCTMP": str(self.home / "tmp"),
            "HA_SBIN_DIR": str(self.home),
            "MIRRORFS_LOGS": str(self.home / f"logs-{self.host.name}"),
            "SCORE": str(self.score_file),
            "OCF_RESKEY_CRM_meta_promotable": "true",
            "OCF_RESKEY_CRM_meta_clone_max": "2",
            "OCF_RESKEY_crm_feature_set": "3.16.2",
            "__OCF_ACTION": "monitor",
            **{f"OCF_RESKEY_{key}": value for key, value in (given | parameters).items()},
        }

    @property
    def score_file(self) -> Path:
        return self.home / f"score-{self.host.name}"

    @property
    def score(self) -> str:
        """What it has set as its promotion score; empty if it has none."""
        return self.score_file.read_text().strip() if self.score_file.exists() else ""

    def run(self, action: str, **parameters: str) -> Result:
        """Have it do an action."""
        environment = self.environment(**parameters)
        done = self.host.run(
            self.home / "volume", action, env=environment, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL
        )
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ocf-exit-reason:")]
        return Result(done.returncode, reasons[-1].removeprefix("ocf-exit-reason:") if reasons else "")

    def is_after(self, action: str) -> int:
        """The exit status of an action that succeeds, and then that of a monitor."""
        result = self.run(action)
        assert result.status == SUCCESS, result
        return self.run("monitor").status


#: In place of crm_attribute: `-p -v VALUE` sets the score, `-p -D` deletes it.
_CRM_ATTRIBUTE = """#!/bin/sh
case "$2" in
-v) echo "$3" >"$SCORE" ;;
-D) rm -f "$SCORE" ;;
esac
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that everybody may enter: ocf-tester looks at the agent as `nobody`."""
    with tempfile.TemporaryDirectory(prefix="mirrorfs-ocf-") as directory:
        home = Path(directory)
        home.chmod(0o755)
        shutil.copy(_SOURCE, home)
        for name, text in {
            "mirrorfs": f'#!/bin/sh\nexec {sys.executable} -m mirrorfs "$@"\n',
            "crm_attribute": _CRM_ATTRIBUTE,
        }.items():
            (home / name).write_text(text)
            (home / name).chmod(0o755)
        yield home


@contextmanager
def _agents(home: Path, sections: str = "") -> Iterator[tuple[Agent, Agent]]:
    """Two hosts on which nothing runs yet, of a volume that is new."""
    with Lab.create(home / "lab", options={"ack_timeout": "1s"}, sections=sections) as lab:
        for host in lab.hosts.values():
            host.config.write_text(f'mount = "{host.mount}"\n{host.config.read_text()}')
        yield Agent(lab.one, home), Agent(lab.two, home)


@pytest.fixture
def agents(home: Path) -> Iterator[tuple[Agent, Agent]]:
    with _agents(home) as found:
        yield found


@pytest.fixture
def pair(agents: tuple[Agent, Agent]) -> tuple[Agent, Agent]:
    """Mirrored, one leads. Nothing is promoted yet, as far as Pacemaker knows."""
    Lab(agents[0].host.directory).run_all()
    return agents


# ---- what Debian's tester says


def test_ocf_tester_passes(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    Lab(one.host.directory).run_all()
    one.host.stop()
    options = [f"-o{name}={value}" for name, value in (("config", one.host.config), ("binary", one.home / "mirrorfs"))]
    environment = {key: value for key, value in one.environment().items() if not key.startswith("OCF_")}
    done = one.host.run(
        *("ocf-tester", "-v", "-n", "volume"),
        *(word for option in options for word in (option[:2], option[2:])),
        one.home / "volume",
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed all tests" in done.stdout
    assert state(two.host) == "solo"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", _SOURCE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_page_has_every_parameter_and_the_package_every_action(home: Path) -> None:
    said = subprocess.run([home / "volume", "meta-data"], capture_output=True, text=True, check=True, env={}).stdout
    tree = ElementTree.fromstring(said)
    page = (_SOURCE.parents[2] / "docs" / "PACEMAKER.md").read_text()
    for parameter in tree.iter("parameter"):
        assert f"| `{parameter.get('name')}` |" in page
    actions = {action.get("name") for action in tree.iter("action")}
    assert actions == {"start", "stop", "promote", "demote", "monitor", "validate-all", "meta-data"}


# ---- start and stop


def test_it_starts_and_stops_and_both_can_be_repeated(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    Lab(one.host.directory).run_all()
    one.host.stop()
    assert one.run("monitor").status == NOT_RUNNING
    for _ in range(2):
        assert one.is_after("start") == SUCCESS, "it leads, and is not promoted"
    assert (one.score, state(one.host)) == ("10000", "primary")
    assert os.path.ismount(one.host.mount)
    assert "ready: " in (one.home / "logs-one" / "mirrorfs.log").read_text()
    for _ in range(2):
        assert one.run("stop") == Result(SUCCESS, "")
        assert one.run("monitor").status == NOT_RUNNING
    assert one.score == ""
    assert not os.path.ismount(one.host.mount)
    assert state(two.host) == "solo", "the role was given to it first"


def test_a_mount_that_cannot_be_made_gives_its_own_line(agents: tuple[Agent, Agent]) -> None:
    one, _ = agents
    (one.host.state_dir / "record").write_text("nonsense")
    result = one.run("start")
    assert result.status == GENERIC
    assert result.reason.startswith(f"the volume cannot be mounted: {one.host.state_dir}/record: damaged")
    assert one.run("stop").status == SUCCESS


def test_a_stop_ends_what_uses_the_mount(pair: tuple[Agent, Agent]) -> None:
    one, _ = pair
    with subprocess.Popen(["sleep", "infinity"], cwd=one.host.mount) as user, subprocess.Popen(["sleep", "infinity"]) as other:
        try:
            assert one.run("stop").status == SUCCESS
            assert user.wait(30) == -signal.SIGTERM
            assert other.poll() is None
        finally:
            user.kill()
            other.kill()
    assert not os.path.ismount(one.host.mount)


def test_after_the_node_was_killed_a_stop_takes_away_what_is_left(pair: tuple[Agent, Agent]) -> None:
    one, _ = pair
    assert one.is_after("promote") == PROMOTED
    with subprocess.Popen(["sleep", "infinity"], cwd=one.host.mount) as user:
        try:
            one.host.kill()
            assert one.run("monitor").status == NOT_RUNNING
            assert one.run("demote").status == NOT_RUNNING
            assert one.run("stop").status == SUCCESS
            assert user.wait(30) == -signal.SIGTERM
        finally:
            user.kill()
    assert str(one.host.mount) not in [
        line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if "fuse" in line
    ]
    assert one.is_after("start") == SUCCESS


def test_a_mount_that_hangs_is_killed_by_the_monitor(pair: tuple[Agent, Agent]) -> None:
    one, _ = pair
    assert one.is_after("promote") == PROMOTED
    (pid,) = one.host.pids()
    os.kill(pid, signal.SIGSTOP)
    probe = one.run("monitor", CRM_meta_interval="0")
    assert (probe.status, one.host.pids()) == (GENERIC, [pid]), "a probe changes nothing"
    result = one.run("monitor")
    assert result.status == GENERIC
    assert "has not answered status within 10 s" in result.reason
    assert f"process {pid} is killed" in result.reason
    wait_for(lambda: not one.host.pids(), "it is gone")
    assert one.run("monitor").status == NOT_RUNNING


def test_a_controller_that_hangs_costs_no_mount(home: Path) -> None:
    with _agents(home, "[failover]\n") as (one, _):
        Lab(one.host.directory).run_all()
        assert one.is_after("promote") == PROMOTED
        pids = one.host.pids()
        controller = one.host.popen(sys.executable, "-m", "mirrorfs", "--config", one.host.config, "controller")
        try:
            wait_for(lambda: "controller" in mirrorfs(one.host, "status", "--json").stdout, "the controller answers")
            controller.send_signal(signal.SIGSTOP)
            result = one.run("monitor")
        finally:
            controller.kill()
            controller.wait(30)
        assert result.status == GENERIC
        assert "has not answered status within 10 s" in result.reason
        assert one.host.pids() == pids
        assert one.run("monitor").status == PROMOTED


def test_a_mount_that_hangs_can_be_stopped(pair: tuple[Agent, Agent]) -> None:
    _, two = pair
    assert two.run("monitor").status == SUCCESS
    (pid,) = two.host.pids()
    os.kill(pid, signal.SIGSTOP)
    assert two.run("stop") == Result(SUCCESS, "")
    assert two.host.pids() == []
    assert not os.path.ismount(two.host.mount)


# ---- promote and demote


def test_the_role_moves_and_each_step_can_be_repeated(pair: tuple[Agent, Agent]) -> None:
    one, two = pair
    for agent, score in ((one, "10000"), (two, "1000")):
        assert agent.run("monitor") == Result(SUCCESS, "")
        assert agent.score == score
    for _ in range(2):
        assert one.is_after("promote") == PROMOTED
    for _ in range(2):
        assert one.is_after("demote") == SUCCESS
        assert (state(one.host), state(two.host), one.score) == ("standby", "primary", "1000")
    assert two.run("monitor").status == SUCCESS, "it leads, and is not promoted"
    assert two.score == "10000"
    for _ in range(2):
        assert two.is_after("promote") == PROMOTED

    assert one.is_after("promote") == PROMOTED, "it is handed over, without a demotion before"
    assert two.run("monitor") == Result(SUCCESS, "this node has lost the role: standby, handed over to one")
    assert two.score == "1000"


def test_a_node_that_is_alone_is_demoted_and_leads_on(pair: tuple[Agent, Agent]) -> None:
    one, two = pair
    assert one.is_after("promote") == PROMOTED
    two.host.kill()
    wait_state(one.host, "solo")
    assert one.run("monitor").status == PROMOTED
    assert one.is_after("demote") == SUCCESS
    assert (state(one.host), one.score) == ("solo", "10000")
    assert one.is_after("promote") == PROMOTED


def test_a_standby_that_lost_its_primary_is_not_promoted_without_an_arbiter(pair: tuple[Agent, Agent]) -> None:
    one, two = pair
    assert two.run("monitor").status == SUCCESS
    assert two.score == "1000"
    one.host.kill()
    wait_peer_lost(two.host)
    result = two.run("promote")
    assert result.status == GENERIC
    assert result.reason.startswith("not promoted: there is no arbiter and allow_unarbitrated is not set")
    assert (state(two.host), two.score) == ("waiting", "")
    assert two.run("monitor").status == SUCCESS
    assert two.score == "", "it is not tried again"

    two.host.promote(yes=True)  # a person
    assert two.run("monitor").status == SUCCESS
    assert two.score == "10000"
    assert two.is_after("promote") == PROMOTED


def test_what_the_configuration_allows_without_an_arbiter_is_for_who_saw_the_loss(home: Path) -> None:
    with _agents(home, '[arbiter]\nkind = "none"\nallow_unarbitrated = true\n') as (one, two):
        Lab(one.host.directory).run_all()
        one.host.kill()
        wait_peer_lost(two.host)
        assert two.run("monitor").status == SUCCESS
        assert two.score == "1000"
        assert two.is_after("promote") == PROMOTED

        one.host.start()
        wait_state(two.host, "primary")
        wait_state(one.host, "standby")
        one.host.kill()
        wait_state(two.host, "solo")
        (two.host.mount / "alone").write_text("on two only")
        two.host.kill()
        one.host.start()
        assert one.run("monitor").status == SUCCESS
        assert one.score == ""
        result = one.run("promote")
        assert result.status == GENERIC
        assert "an operator has to promote" in result.reason


def test_a_standby_that_is_cut_off_itself_has_no_score(home: Path) -> None:
    sections = '[arbiter]\nkind = "none"\nallow_unarbitrated = true\nisolation_check = "10.77.0.9"\n'
    with _agents(home, sections) as (one, two):
        Lab(one.host.directory).run_all()
        one.host.kill()
        wait_peer_lost(two.host)
        assert two.run("monitor").status == SUCCESS
        assert two.score == ""
        result = two.run("promote")
        assert result.status == GENERIC
        assert "10.77.0.9 (isolation_check) answers: it is this node that is cut off" in result.reason


def test_nobody_is_promoted_while_the_volume_is_new(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    for agent in (one, two):
        assert agent.is_after("start") == SUCCESS
        assert agent.score == ""
    result = one.run("promote")
    assert result.status == GENERIC
    assert "the volume is new: an operator says which node's files are kept" in result.reason
    assert one.host.status()["epoch"] == 0


# ---- what is wrong


def test_what_is_wrong_is_said_in_one_line_with_its_status(agents: tuple[Agent, Agent]) -> None:
    one, _ = agents
    assert one.run("validate-all") == Result(SUCCESS, "")
    config = str(one.host.config)
    wrong = one.home / "wrong.toml"
    wrong.write_text("volume = 1\n")
    nowhere = one.home / "nowhere.toml"
    nowhere.write_text(one.host.config.read_text().partition("\n")[2])
    for action, parameters, status, reason in (
        ("validate-all", {"binary": "/nowhere/mirrorfs"}, INSTALLED, "/nowhere/mirrorfs: is not installed here"),
        ("validate-all", {"config": ""}, CONFIGURED, "config is not set"),
        ("validate-all", {"config": "/nowhere.toml"}, ARGS, "/nowhere.toml: is not there"),
        ("validate-all", {"config": str(wrong)}, ARGS, f"{wrong}: volume: "),
        ("validate-all", {"config": config, "node": "three"}, ARGS, f"{config}: "),
        ("validate-all", {"CRM_meta_promotable": "false"}, CONFIGURED, "this clone is not promotable"),
        ("start", {"config": str(nowhere)}, GENERIC, "the volume cannot be mounted: where? Give PATH"),
        ("monitor", {"config": str(wrong)}, ARGS, f"{wrong}: volume: "),
        ("monitor", {"config": "/nowhere.toml", "CRM_meta_interval": "0"}, NOT_RUNNING, ""),
        ("stop", {"config": "/nowhere.toml"}, SUCCESS, ""),
        ("promote", {}, NOT_RUNNING, "cannot be promoted: "),
        ("reload", {}, UNIMPLEMENTED, ""),
    ):
        result = one.run(action, **parameters)
        assert result.status == status, (action, parameters, result)
        assert result.reason.startswith(reason), (action, parameters, result)


def test_where_the_controller_runs_nothing_is_started_and_nobody_promotes_by_itself(home: Path) -> None:
    with _agents(home, "[failover]\n") as (one, _):
        assert "goes with neither" in mirrorfs(one.host, "promote", "--automatic", "--yes").stderr
        controller = one.host.popen(sys.executable, "-m", "mirrorfs", "--config", one.host.config, "controller")
        try:
            wait_for(lambda: "controller" in mirrorfs(one.host, "status", "--json").stdout, "the controller answers")
            for action in ("validate-all", "start"):
                result = one.run(action)
                assert result.status == INSTALLED
                assert result.reason.startswith("the controller of mirrorfs runs here")
            refused = mirrorfs(one.host, "promote", "--automatic")
            assert refused.returncode == 2
            assert "here the controller of mirrorfs runs: stop it first" in refused.stderr
        finally:
            controller.terminate()
            controller.wait(30)
