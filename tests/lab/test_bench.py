"""The benchmark's parts: what is selected, the table, the picture, PostgreSQL and GlusterFS as it sets them up."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.lab import bench, gluster, pgbench, plot, postgresql
from mirrorfs.lab.cli import _named_directories

MEDIANS: Mapping[str, Mapping[str, float]] = {
    "write": {"native": 1000.0, "mirrored": 250.0, "a system with a long name": 1500.0},
    "read": {"native": 20_000.0, "mirrored": 20_000.0, "a system with a long name": 10.0},
}


def works() -> list[bench._Work]:
    return bench._works(Path("archive"), 1, {})


def rows(*only: str) -> list[str]:
    return [row for work in bench._selected(works(), only) for row in work.rows]


def test_without_only_everything_is_measured() -> None:
    expected = [*bench.FIO, *bench._SMALL_FILES, "untar", "sqlite commits"]
    if postgresql.installed():
        expected += pgbench.SCRIPTS
    assert rows() == expected


def test_only_selects_by_a_part_of_the_name_and_leaves_the_other_rows_of_a_workload_out() -> None:
    assert rows("SQLite", "stat") == ["stat files", "sqlite commits"]
    assert rows("small files") == list(bench._SMALL_FILES)
    assert rows("4k random") == ["write 4k random", "write 4k random, 8 jobs", "read 4k random, cached"]


def test_only_what_is_not_there_names_what_is() -> None:
    with pytest.raises(UsageError, match=r"--only nonsense: no workload .*untar"):
        rows("nonsense")


def test_without_postgresql_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(postgresql, "installed", lambda: None)
    assert not set(rows()) & set(pgbench.SCRIPTS)
    assert capsys.readouterr().err.count("PostgreSQL is not installed") == 1


def test_the_table_has_medians_and_what_they_are_of_natives() -> None:
    medians = bench._medians({"write": {"native": [1000, 900, 5000], "mirrored": [250, 249, 251]}})
    assert bench._table(medians, 3).splitlines() == [
        "operations per second, median of 3     native            mirrored",
        "write                                   1,000        250 (0.250x)",
    ]
    wide = bench._table(MEDIANS, 1).splitlines()
    assert len({len(line) for line in wide}) == 1
    assert wide[2].split()[-4:] == ["20,000", "(1.000x)", "10", "(0.001x)"]


def test_other_directories_are_named() -> None:
    assert _named_directories(["drbd=/mnt/a=b", "nfs=x"]) == {"drbd": Path("/mnt/a=b"), "nfs": Path("x")}


@pytest.mark.parametrize("given", [["drbd"], ["=/mnt"], ["drbd="], ["a=/x", "a=/y"]])
def test_a_directory_without_a_name_of_its_own_is_an_error(given: list[str]) -> None:
    with pytest.raises(UsageError, match="--and"):
        _named_directories(given)


def test_what_would_fail_at_the_end_fails_at_the_beginning(tmp_path: Path) -> None:
    bench._check({"drbd": tmp_path}, [tmp_path / "figures.json"])
    with pytest.raises(UsageError, match="no such directory"):
        bench._check({"drbd": tmp_path / "none"}, [])
    with pytest.raises(UsageError, match="measured anyway"):
        bench._check({"mirrored": tmp_path}, [])
    with pytest.raises(UsageError, match="cannot be written"):
        bench._check({}, [tmp_path / "none" / "figures.json"])


def test_the_picture_has_every_workload_every_system_and_every_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        plot.draw(bench._ratios(MEDIANS), tmp_path / name, base="native", title="a title")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    texts = {element.text for element in ElementTree.parse(tmp_path / "one.svg").iter() if element.tag.endswith("}text")}
    assert texts >= {"write", "read", "mirrored", "a system with a long name", "a title", "0.25", "1.5", "1", "0.0005"}


def test_without_matplotlib_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MirrorfsError, match="pip install matplotlib"):
        plot.require()


def test_without_glusterfs_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MirrorfsError, match="apt-get install glusterfs-server"):
        gluster.require()


def test_what_pgbench_says_is_read() -> None:
    assert pgbench.parse("latency average = 1.2 ms\ntps = 812.345 (without initial connection time)\n") == 812.345
    with pytest.raises(MirrorfsError, match="pgbench did not say"):
        pgbench.parse("latency average = 1.2 ms\n")


@pytest.mark.root
@pytest.mark.skipif(postgresql.installed() is None, reason="needs PostgreSQL")
def test_pgbench_makes_transactions_and_its_server_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgbench, "_SCALE", "1")
    # Not in tmp_path, which only root can reach.
    with bench._temporary(Path("/var/tmp"), "mirrorfs-test-") as place:
        with pgbench.serving(place, place / "private") as server:
            assert pgbench.transactions_per_second(server, "select-only", 0.1) > 0
            pid = int((place / "pgbench" / "postmaster.pid").read_text().split()[0])
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.root
@pytest.mark.skipif(postgresql.installed() is None, reason="needs PostgreSQL")
def test_a_place_that_postgresql_cannot_reach_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    with (
        pytest.raises(MirrorfsError, match="cannot be reached by user postgres"),
        pgbench.serving(tmp_path / "closed", tmp_path / "private"),
    ):
        pass


@pytest.mark.root
@pytest.mark.skipif(gluster.is_missing(), reason="needs glusterfs-server")
def test_glusterfs_has_both_bricks_says_if_it_had_not_and_leaves_nothing(tmp_path: Path) -> None:
    pair = gluster._Pair(tmp_path / "pair")

    def lose_a_brick() -> None:
        with gluster.mounted(tmp_path / "pair") as mount:
            (mount / "file").write_bytes(b"both")
            bricks = [tmp_path / "pair" / host / "brick" / "file" for host in ("one", "two")]
            assert [brick.read_bytes() for brick in bricks] == [b"both", b"both"]
            for pid in pair.network.pids("two"):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(MirrorfsError, match="did not have both bricks"):
        lose_a_brick()
    assert not (tmp_path / "pair").exists()
    assert not pair.network.exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "pair")], capture_output=True).stdout
