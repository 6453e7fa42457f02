"""Every labelled disk call of the journal meets every fault, on either node, whatever the pair is doing at that moment.

`MIRRORFS_CRASHES=all python -m pytest -s tests/pair/test_crash_matrix.py` is the whole matrix; without the variable it is a
sample of it, and with a number another sample.

A fault ends the node that meets it: by SIGKILL before the call, after it or in the middle of a write, or by itself, with one
line that says which file the disk would not take. The other one does what its part is. Then the node is started again, a
person says what only a person can know, and the pair has to become mirrored: with everything that was acknowledged, since
SIGKILL takes no page cache, and with equal trees.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pytest

from mirrorfs import dirty_log, journal
from mirrorfs.core.dirty import Head, Names
from mirrorfs.core.epochs import Record
from mirrorfs.dirty_log import DirtyLog
from mirrorfs.errors import MirrorfsError, RefusedError
from mirrorfs.journal import Journal
from mirrorfs.lab.faults import Fault, Faults, Kind
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import Load, NewLines, other, seeded, state, tree_differences, wait_peer_lost, wait_state

CRASHES = os.environ.get("MIRRORFS_CRASHES") or "10"

REPLACING = ("open", "write", "fsync", "rename", "fsync-directory")
LABELS = (
    *(f"{file}:{call}" for file, call in product(("record", "ids", "dirty"), REPLACING)),
    "dirty:truncate",
    "dirty-append:write",
    "dirty-append:fsync",
)
KINDS = ("names", "spread", "append-fsync")
DEAD = {"ECONNABORTED", "ENOTCONN", "EIO"}


def _of(*files: str) -> frozenset[str]:
    return frozenset(label for label in LABELS if label.split(":")[0] in files and label != "dirty:truncate")


#: What is read is synced before it counts.
STARTING = {f"{file}:{call}" for file, call in product(("record", "ids", "dirty"), ("fsync", "fsync-directory"))}
#: What the pair is doing, seen from the node that meets the fault, and the labels that it comes to then. Why it comes to no
#: others: only a primary gives ids and marks what it changes; the record changes with the epoch and the standing only; the log
#: of what is dirty is written afresh at checkpoints, which need both nodes, and is opened again after a start only.
OCCURS = {
    "mirrored, primary": _of("ids", "dirty", "dirty-append"),
    "mirrored, standby": _of("dirty"),
    "alone": _of("record", "ids", "dirty-append"),
    "alone, started again": _of("record", "ids", "dirty-append") | {"dirty:open", "dirty:truncate"} | STARTING,
    "resyncing, source": _of("record", "ids", "dirty", "dirty-append"),
    "resyncing, target": _of("record", "dirty"),
    "promoting": _of("record", "ids", "dirty-append"),
    "handing over": _of("record"),
    "taking over": _of("record", "ids", "dirty-append"),
}
#: What the node comes to besides, while it is still mirrored and the fault waits for what is to come.
BEFORE = {
    "alone": OCCURS["mirrored, primary"],
    "promoting": OCCURS["mirrored, standby"],
    "handing over": OCCURS["mirrored, primary"],
    "taking over": OCCURS["mirrored, standby"],
}
#: A node that was started has read its files by then: the record twice.
READ = {"record": 2, "dirty": 1}


@dataclass(frozen=True, slots=True)
class Case:
    """One fault of one node in one situation."""

    situation: str
    node: str
    fault: Fault

    @property
    def cannot_be(self) -> str:
        """Why this case cannot be; empty if it can."""
        if self.fault.kind is Kind.TORN_WRITE and not self.fault.label.endswith(":write"):
            return "only a write can be torn"
        if self.fault.label not in OCCURS[self.situation]:
            return "the node does not come to this call then"
        return ""

    def __str__(self) -> str:
        return f"{self.situation}, node {self.node}: {self.fault}"


def _times(situation: str, label: str) -> tuple[int, ...]:
    """Which times that a label comes are tried: a target writes record and log once when it begins and once when it joins."""
    return (1, 2) if situation == "resyncing, target" and label in OCCURS[situation] else (1,)


MATRIX = [
    Case(situation, node, Fault(label, kind, nth))
    for situation, node, label, kind in product(OCCURS, ("one", "two"), LABELS, Kind)
    for nth in _times(situation, label)
]
POSSIBLE = [case for case in MATRIX if not case.cannot_be]


# ---- the list is complete


def test_the_labels_of_the_matrix_are_those_that_the_journal_says(tmp_path: Path) -> None:
    said: set[str] = set()
    kept = Journal(tmp_path, at=said.add)
    files = {kept_in.path.name for kept_in in vars(kept).values() if isinstance(kept_in, journal.SafeFile)}
    assert files - {"place", "trial"} == {"record", "ids"}, "these two are for commands: nothing is decided by them"
    kept.save(Record())
    kept.save_ids(1)
    log = DirtyLog(tmp_path, at=said.add)
    log.rewrite(Head(), [])
    log.append([Names(1)])
    log.close()
    with open(log.path, "ab") as torn:
        torn.write(b"torn")
    log.load()
    log.append([Names(1)])
    log.close()
    assert said == set(LABELS)


def test_every_disk_call_of_the_journal_that_changes_something_has_a_label() -> None:
    changes = re.compile(r"\bos\.(write|pwrite|ftruncate|truncate|fsync|fdatasync|rename|replace|unlink|open)\(")
    unlabelled = []
    for module in (journal, dirty_log):
        assert module.__file__ is not None
        lines = Path(module.__file__).read_text().splitlines()
        for before, line in pairwise(lines):
            if changes.search(line) and "at(" not in before:
                unlabelled.append(line.strip())
    assert unlabelled == [
        "descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)",
        "os.fsync(descriptor)",  # of the directory: labelled by who asks for it
        "descriptor = os.open(path, os.O_RDONLY)",
    ]


# ---- one case


class Stage:
    """A pair on which one case after the other is played; each leaves it mirrored."""

    def __init__(self, lab: Lab, notes: Path) -> None:
        self.lab = lab
        self.notes = notes
        self.loads: list[Load] = []
        self.count = 0
        self.acknowledged = 0
        self._passed = 0
        #: What a node said when it was asked for what would lose something.
        self.refusals: Counter[str] = Counter()
        self.faults = {host.name: Faults(host.home / "faults") for host in lab.hosts.values()}

    def load(self, host: Host) -> Load:
        """A writing load on the host's mount."""
        self.count += 1
        self.loads.append(Load(host.mount, f"load-{self.count}", self.notes, seed=self.count, kinds=KINDS))
        self.loads[-1].wait_noted(20)
        return self.loads[-1]

    def load_mirrored(self, host: Host) -> Load:
        """The same while mirrored, with files that are no new ones any more: what changes in them needs marks."""
        load = self.load(host)
        passed = self.faults[host.name].passed
        goal = passed().count("dirty:fsync-directory") + 2
        wait_for(lambda: passed().count("dirty:fsync-directory") >= goal, "two checkpoints are made")
        return load

    def leads(self, host: Host) -> None:
        """Make the host the primary of the mirrored pair."""
        self.lab.wait_mirrored()
        if self.lab.primary() is not host:
            host.promote()
            self.lab.wait_mirrored()

    def goes_alone(self, host: Host) -> Load:
        """The host is a primary whose peer was killed, with changes that are durably marked from before and after."""
        self.leads(host)
        load = self.load_mirrored(host)
        other(self.lab, host).kill()
        wait_state(host, "solo")
        load.wait_noted(20)
        return load

    def arm(self, host: Host, fault: Fault, already: int = 0) -> None:
        """The host's node meets the fault from now on; `already`: so often it will come to the label before that counts."""
        self._passed = len(self.faults[host.name].passed())
        self.faults[host.name].arm(Fault(fault.label, fault.kind, fault.nth + already))

    def passed(self, host: Host) -> set[str]:
        """The labels that the host's node has come to since the last fault was armed."""
        return set(self.faults[host.name].passed()[self._passed :])

    def clear(self) -> None:
        """End what writes, and forget it."""
        for load in self.loads:
            load.kill()
        for faults in self.faults.values():
            faults.disarm()
        self.loads.clear()


def _mirrored_primary(stage: Stage, host: Host, fault: Fault) -> None:
    stage.leads(host)
    stage.load_mirrored(host)
    stage.arm(host, fault)


def _mirrored_standby(stage: Stage, host: Host, fault: Fault) -> None:
    stage.leads(other(stage.lab, host))
    stage.load_mirrored(other(stage.lab, host))
    stage.arm(host, fault)


def _alone(stage: Stage, host: Host, fault: Fault) -> None:
    if fault.label in _of("record"):  # that it is alone now
        stage.leads(host)
        stage.load_mirrored(host)
        stage.arm(host, fault)
        other(stage.lab, host).kill()
    else:
        stage.goes_alone(host)
        stage.arm(host, fault)


def _started_again(stage: Stage, host: Host, fault: Fault) -> None:
    """It died in the middle of an append, and meets the fault when it reads its files or goes on writing."""
    stage.goes_alone(host)
    stage.arm(host, Fault("dirty-append:write", Kind.TORN_WRITE))
    _wait_dead(stage, host)
    stage.arm(host, fault)
    host.launch()
    with suppress(MirrorfsError):
        host.wait_answering()
        host.promote(yes=True)
        _write_until_it_ends(stage, host)


def _write_until_it_ends(stage: Stage, host: Host) -> None:
    """Change a file that is no new one, which needs a mark, then make new ones; the node ends meanwhile."""
    with suppress(OSError, MirrorfsError):
        (host.mount / stage.loads[0].name / "spread").chmod(0o600)
        stage.load(host)


def _resyncing_source(stage: Stage, host: Host, fault: Fault) -> None:
    load = stage.goes_alone(host)
    target = other(stage.lab, host)
    if fault.label in _of("ids", "dirty-append"):  # which come all the time
        with open(host.mount / load.name / "large", "wb") as large:
            large.write(os.urandom(32 << 20))
        lines = NewLines(host)
        target.launch()
        wait_for(lambda: any("bringing" in line for line in lines()), "the resync begins")
        stage.arm(host, fault)
    else:
        stage.arm(host, fault)
        target.launch()


def _resyncing_target(stage: Stage, host: Host, fault: Fault) -> None:
    stage.goes_alone(other(stage.lab, host))
    file, _, call = fault.label.partition(":")
    stage.arm(host, fault, already=READ[file] if call in ("fsync", "fsync-directory") else 0)
    host.launch()


def _promoting(stage: Stage, host: Host, fault: Fault) -> None:
    primary = other(stage.lab, host)
    stage.leads(primary)
    stage.load_mirrored(primary)
    primary.kill()
    wait_peer_lost(host)
    stage.arm(host, fault)
    with suppress(MirrorfsError):
        host.promote(yes=True)
        _write_until_it_ends(stage, host)


def _handing_over(stage: Stage, host: Host, fault: Fault) -> None:
    stage.leads(host)
    stage.load_mirrored(host)
    stage.arm(host, fault)
    with suppress(MirrorfsError):
        other(stage.lab, host).promote()


def _taking_over(stage: Stage, host: Host, fault: Fault) -> None:
    primary = other(stage.lab, host)
    stage.leads(primary)
    stage.load_mirrored(primary)
    stage.arm(host, fault)
    with suppress(MirrorfsError):
        host.promote()
        _write_until_it_ends(stage, host)


PLAYS: dict[str, Callable[[Stage, Host, Fault], None]] = {
    "mirrored, primary": _mirrored_primary,
    "mirrored, standby": _mirrored_standby,
    "alone": _alone,
    "alone, started again": _started_again,
    "resyncing, source": _resyncing_source,
    "resyncing, target": _resyncing_target,
    "promoting": _promoting,
    "handing over": _handing_over,
    "taking over": _taking_over,
}


def _wait_dead(stage: Stage, host: Host) -> None:
    faults = stage.faults[host.name]
    try:
        wait_for(lambda: faults.fired is not None, "the node meets the fault", 15)
        wait_for(lambda: not host.pids(), f"node {host.name} has ended", 20)
    except MirrorfsError as error:
        raise MirrorfsError(f"{error}; {host.name} is {state(host)}{host.log_tail()}") from None


def _play(stage: Stage, case: Case) -> None:
    lab, host = stage.lab, stage.lab.hosts[case.node]
    peer = other(lab, host)
    lines = {each.name: NewLines(each) for each in lab.hosts.values()}
    PLAYS[case.situation](stage, host, case.fault)
    _wait_dead(stage, host)
    _check_end(case, lines[host.name]())
    unforeseen = stage.passed(host) & set(LABELS) - OCCURS[case.situation] - BEFORE.get(case.situation, frozenset()) - STARTING
    assert not unforeseen, f"the node came to {unforeseen}: such cases can be"
    chance = seeded(str(case))
    if peer.pids():
        _check_other(stage, case, peer)
    _come_back(stage, case, host, chance.random() < 0.5)
    for each in lab.hosts.values():
        new = lines[each.name]()
        assert not [line for line in new if "a defect in" in line or "Traceback" in line], f"{each.name}: {new}"
    _check_everything(stage, case)


def _check_end(case: Case, lines: list[str]) -> None:
    """A node that saw the error says so in one line; one that was killed says nothing."""
    said = [line for line in lines if "cannot be written" in line]
    if case.fault.kind.ends_by_itself:
        assert len(said) == 1, lines
        file = case.fault.label.split(":")[0].removesuffix("-append")
        reason = os.strerror(5) if case.fault.kind is Kind.EIO else os.strerror(28)
        assert re.search(f"/{file}: cannot be written: {reason}. This node stops", said[0]), said
    else:
        assert said == []


def _check_other(stage: Stage, case: Case, peer: Host) -> None:
    """What the node does that did not meet the fault."""
    load = stage.loads[0]
    match case.situation:
        case "mirrored, primary":
            wait_state(peer, "waiting")
        case "mirrored, standby" | "resyncing, target":
            wait_state(peer, "solo")
            load.wait_noted(20)
        case "resyncing, source":
            wait_state(peer, "waiting")
            if Journal(peer.state_dir).load().standing != "in sync":
                with pytest.raises(RefusedError) as refused:
                    peer.promote(yes=True)
                stage.refusals[re.sub(r"[0-9][0-9:-]*", "N", str(refused.value))] += 1
        case _:
            wait_peer_lost(peer)


def _come_back(stage: Stage, case: Case, host: Host, by_hand: bool) -> None:
    """Start what is dead; `by_hand`: a person promotes the one that has everything, else they find out by themselves."""
    lab, peer = stage.lab, other(stage.lab, host)
    if case.situation in ("alone", "alone, started again", "promoting"):
        host.start()
        if by_hand:
            host.promote(yes=True)
            _check_there(stage, host.mount)
        peer.start()
    elif case.situation == "mirrored, primary" and by_hand:
        peer.promote(yes=True)
        _check_there(stage, peer.mount)
        host.start()
    else:
        host.start()
    lab.wait_mirrored(30)


def _check_there(stage: Stage, place: Path) -> None:
    for load in stage.loads:
        assert load.missing(place) == [], f"missing in {place}"


def _check_everything(stage: Stage, case: Case) -> None:
    lab = stage.lab
    primary = lab.primary()
    assert primary is not None
    allowed = DEAD | {"", "EROFS"} | ({"ENOENT"} if case.fault.kind.ends_by_itself else set())  # unmounted
    survives = case.situation in ("mirrored, standby", "resyncing, target")
    for load in stage.loads:
        errors = load.stop()
        assert set(errors) <= ({""} if survives else allowed), errors
    assert tree_differences(lab) == []
    for host in lab.hosts.values():
        _check_there(stage, host.backing)
    for load in stage.loads:
        stage.acknowledged += load.noted()
        shutil.rmtree(primary.mount / load.name)
    stage.loads.clear()


# ---- the whole


@pytest.fixture
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Stage]]:
    """Makes a pair on which faults can be met; there is one at a time."""
    made: list[Stage] = []

    def end() -> None:
        for stage in made:
            stage.clear()
            stage.lab.down()
        made.clear()

    def make() -> Stage:
        end()
        directory = tmp_path_factory.mktemp("lab")
        lab = Lab.create(directory, options={"ack_timeout": "1s", "checkpoint_interval": "200ms"})
        made.append(Stage(lab, tmp_path_factory.mktemp("notes")))
        for faults in made[-1].faults.values():
            faults.enable()
        for host in lab.hosts.values():
            host.start()
        lab.one.promote(yes=True)
        lab.wait_mirrored()
        return made[-1]

    yield make
    end()


def _play_all(cases: list[Case], stages: Callable[[], Stage]) -> None:
    """Play them on one pair after the other: a new one only after a failure."""
    played = [stages()]
    failures: list[str] = []
    for case in cases:
        try:
            _play(played[-1], case)
        except (AssertionError, MirrorfsError, OSError) as error:
            failures.append(f"{case}: {type(error).__name__}: {error}")
            print(f"FAILED {failures[-1]}")
            played.append(stages())
    acknowledged = sum(stage.acknowledged for stage in played)
    print(f"{len(cases)} faults, {acknowledged} acknowledged changes, {len(failures)} cases failed")
    for refusal, times in sum((stage.refusals for stage in played), Counter[str]()).items():
        print(f"refused {times} times: {refusal}")
    assert failures == []


SAMPLED = CRASHES != "all"


@pytest.mark.root
@pytest.mark.skipif(not SAMPLED, reason="the whole matrix is played")
def test_a_fault_at_a_disk_call_of_the_journal_loses_nothing_in_a_sample_of_all_cases(stages: Callable[[], Stage]) -> None:
    _play_all(seeded("crashes").sample(POSSIBLE, int(CRASHES)), stages)


@pytest.mark.root
@pytest.mark.skipif(SAMPLED, reason="MIRRORFS_CRASHES=all plays the whole matrix")
@pytest.mark.parametrize("node", ["one", "two"])
@pytest.mark.parametrize("situation", OCCURS)
def test_a_fault_at_any_disk_call_of_the_journal_loses_nothing(stages: Callable[[], Stage], situation: str, node: str) -> None:
    here = [case for case in MATRIX if (case.situation, case.node) == (situation, node)]
    left_out = Counter(case.cannot_be for case in here if case.cannot_be)
    print(f"{situation}, node {node}: left out: {dict(left_out)}")
    _play_all([case for case in here if not case.cannot_be], stages)
