"""Services that are started, stopped and watched for real: shells, daemons, and a stand-in for systemctl.

systemd is not process 1 on the machines that these tests run on, so nothing here has been told by a real systemd: the
stand-in answers to `start`, `stop`, `is-active` and `kill` as systemctl(1) says that it does.
"""
# ruff: noqa: ASYNC240  (these tests may wait for their own small files)

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from mirrorfs.commands import MAX_LOG_BYTES
from mirrorfs.failover_config import CheckConfig, ServiceConfig
from mirrorfs.services import MARK_VARIABLE, ServiceError, Services
from tests.services.support import (
    DEADLINE_S,
    LONG_S,
    Watch,
    command_check,
    daemon,
    ending_what_is_started,
    environment_of,
    eventually,
    hanging_mount,
    install_systemctl,
    is_alive,
    pid_in,
)

SHORT_S = 0.5


@pytest.fixture(autouse=True)
def _cleanup(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ending_what_is_started(monkeypatch):
        yield


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def systemctl(tmp_path: Path) -> Path:
    return install_systemctl(tmp_path)


def service(name: str, start: str = "true", stop: str = "", *checks: CheckConfig) -> ServiceConfig:
    return ServiceConfig(name, start=start, stop=stop, start_timeout_s=LONG_S, stop_timeout_s=LONG_S, checks=tuple(checks))


def unit(name: str, *checks: CheckConfig) -> ServiceConfig:
    return replace(service(name, "", "", *checks), unit=f"{name}.service")


#: A daemon that ignores SIGTERM, and so do those that it starts.
STUBBORN = "trap '' TERM\nwhile :; do sleep 1000; done"


async def start_failing(services: Services) -> ServiceError:
    with pytest.raises(ServiceError) as raised:
        await services.start_all()
    return raised.value


# --- starting and stopping


async def test_services_start_in_order_and_stop_in_the_reverse_one(tmp_path: Path, logs: Path) -> None:
    say = f">> {tmp_path}/said echo"
    services = Services([service(name, f"{say} start {name}", f"{say} stop {name}") for name in "abc"], logs)
    await services.start_all()
    assert await services.stop_all() == []
    told = ["start a", "start b", "start c", "stop c", "stop b", "stop a"]
    assert (tmp_path / "said").read_text().splitlines() == told


async def test_a_service_starts_once_the_one_before_answers_to_all_its_checks(tmp_path: Path, logs: Path) -> None:
    # Each check fails when it is first tried.
    checks = [
        command_check(f"cd {tmp_path}; if [ -e {n}.tried ]; then touch {n}.well; else touch {n}.tried; exit 1; fi")
        for n in (1, 2)
    ]
    after = f"cd {tmp_path} && test -e 1.well -a -e 2.well"
    await Services([service("first", "true", "", *checks), service("second", after)], logs).start_all()


async def test_the_first_that_does_not_start_is_told_and_those_before_it_stay(tmp_path: Path, logs: Path) -> None:
    first = service("first", daemon(tmp_path, "first"))
    services = Services(
        [first, service("second", "echo one; echo two; exit 7"), service("third", f"touch {tmp_path}/third")], logs
    )
    error = await start_failing(services)
    log = logs / "second.log"
    assert (error.name, error.what, error.last_line, error.log) == (
        "second",
        "its start command failed, exit status 7",
        "two",
        str(log),
    )
    assert str(error) == f"service second did not start: its start command failed, exit status 7: two; see {log}"
    assert is_alive(pid_in(tmp_path / "first.pid"))
    assert not (tmp_path / "third").exists()


async def test_a_start_command_that_does_not_return_is_killed_with_its_group(tmp_path: Path, logs: Path) -> None:
    start = f"sleep 1000 & echo $! > {tmp_path}/pid; echo waiting; wait"
    error = await start_failing(Services([replace(service("slow", start), start_timeout_s=1.0)], logs))
    assert error.what == "its start command did not end within 1 s"
    assert error.last_line == "waiting"
    pid = pid_in(tmp_path / "pid")
    await eventually(lambda: not is_alive(pid))


async def test_a_start_command_is_killed_when_the_start_is_cancelled(tmp_path: Path, logs: Path) -> None:
    start = f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 1000"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Services([service("slow", start)], logs).start_all)
        await eventually((tmp_path / "pid").exists)
        nursery.cancel_scope.cancel()
    assert not is_alive(pid_in(tmp_path / "pid"))


async def test_a_service_that_ends_at_once_has_not_started(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> None:
    tmp_path = tmp_path_factory.mktemp("s")  # short: a problem is told in so many characters
    check = replace(command_check(""), kind="process", target=f"{tmp_path}/short.pid")
    start = f"sh -c 'echo $$ > {tmp_path}/short.pid; echo no room left'"
    error = await start_failing(Services([replace(service("short", start, "", check), start_timeout_s=SHORT_S)], logs))
    pid = pid_in(tmp_path / "short.pid")
    problem = f"process {tmp_path}/short.pid: there is no process {pid}"
    assert error.what == f"its checks did not succeed within 0.5 s: {problem}"
    assert error.last_line == "no room left"


async def test_a_daemon_that_keeps_the_output_of_its_start_is_not_waited_for(tmp_path: Path, logs: Path) -> None:
    stop = f"kill $(cat {tmp_path}/kept.pid)"
    services = Services([service("kept", f"{daemon(tmp_path, 'kept')}; echo up", stop)], logs)
    with trio.fail_after(DEADLINE_S):
        await services.start_all()
        pid = pid_in(tmp_path / "kept.pid")
        assert is_alive(pid)
        assert await services.stop_all() == []
    assert not is_alive(pid)


async def test_a_command_that_cannot_be_run_is_a_service_that_does_not_start_or_stop(logs: Path) -> None:
    services = Services([service("none", "/no/such/program", "/no/such/program")], logs)
    assert (await start_failing(services)).what == "its start command failed, exit status 127"
    [complaint] = await services.stop_all()
    assert complaint.startswith("service none did not stop: its stop command failed, exit status 127: ")
    assert complaint.endswith("not found; no process of its start command is left")


async def test_a_service_without_a_stop_command_is_left_as_it_is(tmp_path: Path, logs: Path) -> None:
    services = Services([service("once", daemon(tmp_path, "once"))], logs)
    await services.start_all()
    assert await services.stop_all() == []
    assert is_alive(pid_in(tmp_path / "once.pid"))


# --- what does not stop


async def test_a_service_that_does_not_stop_is_killed_and_the_others_are_stopped(tmp_path: Path, logs: Path) -> None:
    stop_pid = tmp_path / "stop.pid"
    hanging = f"echo $$ > {stop_pid}; trap '' TERM; echo still waiting; while :; do sleep 1000; done"
    services = Services(
        [
            service("first", "true", f"touch {tmp_path}/first.stopped"),
            replace(service("stubborn", daemon(tmp_path, "stubborn", STUBBORN), hanging), stop_timeout_s=1.0),
            service("last", "true", f"touch {tmp_path}/last.stopped"),
        ],
        logs,
    )
    await services.start_all()
    pid = pid_in(tmp_path / "stubborn.pid")
    [complaint] = await services.stop_all()
    assert complaint.startswith(
        "service stubborn did not stop: its stop command did not end within 1 s: still waiting; processes "
    )
    assert complaint.endswith(" killed")
    assert str(pid) in complaint.replace(",", "").split()
    assert not is_alive(pid)
    assert not is_alive(pid_in(stop_pid))
    assert (tmp_path / "first.stopped").exists()
    assert (tmp_path / "last.stopped").exists()
    assert complaint in (logs / "stubborn.log").read_text()


async def test_a_daemon_that_does_not_heed_its_stop_command_is_killed(tmp_path: Path, logs: Path) -> None:
    body = "trap '' TERM\nexec sleep 1000"
    stop = f"kill $(cat {tmp_path}/deaf.pid)"
    services = Services([replace(service("deaf", daemon(tmp_path, "deaf", body), stop), stop_timeout_s=SHORT_S)], logs)
    await services.start_all()
    pid = pid_in(tmp_path / "deaf.pid")
    assert await services.stop_all() == [
        f"service deaf did not stop: its stop command succeeded but after 0.5 s not all of it had ended; process {pid} killed"
    ]
    assert not is_alive(pid)


async def test_a_daemon_that_is_still_on_its_way_when_its_stop_command_returns_is_waited_for(
    tmp_path: Path, logs: Path
) -> None:
    body = f"trap 'sleep 0.3; touch {tmp_path}/flushed; exit' TERM\nwhile :; do sleep 0.01; done"
    stop = f"kill $(cat {tmp_path}/polite.pid)"
    services = Services([service("polite", daemon(tmp_path, "polite", body), stop)], logs)
    await services.start_all()
    assert await services.stop_all() == []
    assert (tmp_path / "flushed").exists()


async def test_a_controller_that_was_restarted_kills_what_it_had_started_and_nothing_else(tmp_path: Path, logs: Path) -> None:
    def services(name: str, directory: Path, mark: str) -> Services:
        return Services([service(name, daemon(tmp_path, mark), "exit 1")], directory)

    await services("pg", logs, "own").start_all()
    await services("pg", tmp_path / "other", "elsewhere").start_all()
    await services("pg-2", logs, "longer").start_all()
    own = pid_in(tmp_path / "own.pid")
    mark = environment_of(own)[MARK_VARIABLE]
    others = {**os.environ, MARK_VARIABLE: f"{mark}2", f"X_{MARK_VARIABLE}": mark}
    with subprocess.Popen(["sleep", "1000"], env=others) as stranger:  # noqa: ASYNC220  (does not block)
        [complaint] = await services("pg", logs, "own").stop_all()
        assert complaint == f"service pg did not stop: its stop command failed, exit status 1; process {own} killed"
        assert not is_alive(own)
        assert is_alive(pid_in(tmp_path / "elsewhere.pid"))
        assert is_alive(pid_in(tmp_path / "longer.pid"))
        assert is_alive(stranger.pid)
        stranger.kill()


@pytest.mark.root
async def test_a_process_that_does_not_end_on_sigkill_is_told_and_not_waited_for(tmp_path: Path, logs: Path) -> None:
    path = tmp_path / "mount"
    body = f"exec {sys.executable} -S -c 'import os; os.stat(\"{path}/file\")'"
    services = Services(
        [service("first", "true", f"touch {tmp_path}/stopped"), service("stuck", daemon(tmp_path, "stuck", body), "exit 1")],
        logs,
    )
    with hanging_mount(path) as mount:
        await services.start_all()
        await trio.to_thread.run_sync(mount.take)
        pid = pid_in(tmp_path / "stuck.pid")
        with trio.fail_after(DEADLINE_S):
            complaint = (
                f"service stuck did not stop: its stop command failed, exit status 1; process {pid} did not end on SIGKILL"
            )
            assert await services.stop_all() == [complaint]
            with pytest.raises(ServiceError, match="what was there is not gone"):
                await services.restart("stuck")
        assert is_alive(pid)
        assert (tmp_path / "stopped").exists()
    await eventually(lambda: not is_alive(pid))


# --- what they say


async def test_the_output_of_starts_and_stops_is_kept_below_the_time_and_the_command(logs: Path) -> None:
    services = Services([service("talking", "echo up; printf half >&2", "echo down")], logs)
    await services.start_all()
    await services.stop_all()
    lines = (logs / "talking.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] if line.startswith("--- ") else line for line in lines] == [
        "echo up; printf half >&2",
        "up",
        "half",
        "echo down",
        "down",
    ]
    assert (logs / "talking.log").stat().st_mode & 0o777 == 0o600


async def test_a_log_that_has_grown_too_long_is_moved_aside(logs: Path) -> None:
    logs.mkdir()
    log, older = logs / "talking.log", logs / "talking.log.1"
    older.write_text("oldest\n")
    log.write_bytes(b"x" * MAX_LOG_BYTES)
    services = Services([service("talking", "echo again")], logs)
    await services.start_all()
    assert older.read_text() == "oldest\n"
    grown = log.read_bytes()
    await services.start_all()
    assert older.read_bytes() == grown
    assert log.read_text().splitlines()[1:] == ["again"]


async def test_a_log_that_cannot_be_written_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    services = Services([service("silent", f"touch {tmp_path}/started")], tmp_path / "file")
    await services.start_all()
    assert (tmp_path / "started").exists()


# --- restart, running


async def test_a_restart_stops_and_starts_one_service_only(tmp_path: Path, logs: Path) -> None:
    say = f">> {tmp_path}/said echo"
    services = Services([service(name, f"{say} start {name}", f"{say} stop {name}") for name in "ab"], logs)
    await services.restart("a")
    assert (tmp_path / "said").read_text().splitlines() == ["stop a", "start a"]


async def test_a_restart_starts_even_if_the_stop_had_to_kill_and_fails_if_the_start_does(tmp_path: Path, logs: Path) -> None:
    start = f"{daemon(tmp_path, 'a')}; exit $(cat {tmp_path}/status)"
    services = Services([service("a", start, f"rm {tmp_path}/a.pid; exit 1")], logs)
    (tmp_path / "status").write_text("0")
    await services.start_all()
    before = pid_in(tmp_path / "a.pid")
    await services.restart("a")
    assert not is_alive(before)
    assert is_alive(pid_in(tmp_path / "a.pid"))
    (tmp_path / "status").write_text("5")
    with pytest.raises(ServiceError, match="service a did not start: its start command failed, exit status 5"):
        await services.restart("a")


async def test_what_runs_is_told_by_units_and_checks(logs: Path, systemctl: Path) -> None:
    good, bad = command_check("true"), command_check("false")
    configs = [
        unit("up", bad),
        unit("down", good),
        service("well", "true", "", good, replace(good, target="exit 0")),
        service("half", "true", "", good, bad),
        service("unknown"),
    ]
    (systemctl.parent / "up.service.active").touch()
    running = await Services(configs, logs, str(systemctl)).running()
    assert list(running.items()) == [("up", True), ("down", False), ("well", True), ("half", False), ("unknown", False)]


async def test_what_is_left_of_a_service_is_found_though_its_check_fails(tmp_path: Path, logs: Path, systemctl: Path) -> None:
    flag = tmp_path / "well"
    flag.touch()
    well = command_check(f"test -e {flag}")
    broken = replace(service("broken", daemon(tmp_path, "broken"), "true", well), stop_timeout_s=SHORT_S)
    services = Services([unit("up", well), unit("down"), broken], logs, str(systemctl))
    await services.start_all()
    (systemctl.parent / "down.service.active").unlink()
    flag.unlink()
    assert await services.left(await services.running()) == ["up", "broken"]
    await services.stop_all()
    assert await services.left(await services.running()) == []


# --- units


async def test_units_are_started_and_stopped_through_systemctl(logs: Path, systemctl: Path) -> None:
    services = Services([unit("a"), unit("b")], logs, str(systemctl))
    await services.start_all()
    assert await services.running() == {"a": True, "b": True}
    (systemctl.parent / "calls").unlink()
    assert await services.stop_all() == []
    assert (systemctl.parent / "calls").read_text().splitlines() == ["stop b.service", "stop a.service"]


async def test_a_unit_that_does_not_start_is_told_with_where_its_log_is(logs: Path, systemctl: Path) -> None:
    (systemctl.parent / "a.service.broken").touch()
    error = await start_failing(Services([unit("a")], logs, str(systemctl)))
    assert str(error) == (
        f"service a did not start: {systemctl} failed, exit status 1: Job for a.service failed.; "
        "see journalctl --unit=a.service"
    )


async def test_a_unit_that_does_not_stop_is_killed(logs: Path, systemctl: Path) -> None:
    services = Services([unit("first"), replace(unit("a"), stop_timeout_s=SHORT_S)], logs, str(systemctl))
    await services.start_all()
    (systemctl.parent / "a.service.stubborn").touch()
    assert await services.stop_all() == [f"service a did not stop: {systemctl} did not end within 0.5 s; it was killed"]
    assert await services.running() == {"first": False, "a": False}
    assert "kill --signal=SIGKILL a.service" in (systemctl.parent / "calls").read_text().splitlines()


async def test_a_unit_that_is_there_after_sigkill_is_told(logs: Path, systemctl: Path) -> None:
    services = Services([replace(unit("a"), stop_timeout_s=SHORT_S)], logs, str(systemctl))
    await services.start_all()
    (systemctl.parent / "a.service.stubborn").touch()
    (systemctl.parent / "a.service.immortal").touch()
    assert await services.stop_all() == [
        f"service a did not stop: {systemctl} did not end within 0.5 s; it is still there after SIGKILL"
    ]


async def test_without_systemctl_units_neither_start_nor_stop_nor_run(logs: Path) -> None:
    services = Services([unit("a")], logs, "/no/systemctl")
    assert (await start_failing(services)).last_line == "/no/systemctl: No such file or directory"
    assert await services.running() == {"a": False}
    [complaint] = await services.stop_all()
    assert "it could not be killed: exit status 127: /no/systemctl: No such file or directory" in complaint


# --- watching


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


async def test_a_watch_tells_once_of_each_spell(tmp_path: Path, logs: Path, watch: Watch) -> None:
    well = tmp_path / "well"
    well.touch()
    check = watch.check(f"test -e {well}", failures=3)
    services = Services([service("a", "true", "", check), service("b", "true", "", command_check("true"))], logs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.watch, watch.on_unwell)
        await watch.more_looks(5)
        assert watch.told == []
        for spell in (1, 2):
            well.unlink()
            await watch.more_looks(8)
            assert len(watch.told) == spell
            well.touch()
            await watch.more_looks(2)
        nursery.cancel_scope.cancel()
    assert {name for name, _ in watch.told} == {"a"}
    assert watch.told[0][1].endswith("exit status 1")


async def test_a_watch_does_not_tell_of_failures_that_are_not_in_a_row(tmp_path: Path, logs: Path, watch: Watch) -> None:
    # Every third look succeeds, and three in a row would have to fail.
    turns = f"echo >> {tmp_path}/turns; test $(( $(wc -l < {tmp_path}/turns) % 3 )) = 0"
    services = Services([service("a", "true", "", watch.check(turns, failures=3))], logs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.watch, watch.on_unwell)
        await watch.more_looks(12)
        nursery.cancel_scope.cancel()
    assert watch.told == []


async def test_a_check_that_hangs_does_not_keep_a_watch_from_the_others(logs: Path, watch: Watch) -> None:
    hanging = command_check("sleep 1000")
    services = Services([service("a", "true", "", hanging, watch.check("false")), service("b")], logs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.watch, watch.on_unwell)
        await eventually(lambda: bool(watch.told))
        nursery.cancel_scope.cancel()


def restarting(services: Services, watch: Watch, nursery: trio.Nursery) -> Callable[[str, str], None]:
    """Note what a watch tells, and restart the service the first time."""

    def on_unwell(name: str, problem: str) -> None:
        watch.on_unwell(name, problem)
        if len(watch.told) == 1:
            nursery.start_soon(services.restart, name)

    return on_unwell


async def test_a_watch_looks_away_during_a_restart_and_begins_anew_after_it(tmp_path: Path, logs: Path, watch: Watch) -> None:
    pipe, token = tmp_path / "pipe", tmp_path / "token"
    os.mkfifo(pipe)
    # It is well for one look only, and that is the one at the end of the restart.
    check = replace(watch.check(f"rm {token}", failures=1), interval_s=0.05)
    services = Services([service("a", f"read line < {pipe} && touch {token}", "", check)], logs)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.watch, restarting(services, watch, nursery))
        await eventually((logs / "a.log").exists)
        looks = watch.looks()
        await trio.sleep(5 * check.interval_s)
        assert watch.looks() == looks
        await trio.to_thread.run_sync(partial(pipe.write_text, "on\n"))
        await eventually(lambda: len(watch.told) == 2)
        nursery.cancel_scope.cancel()


async def test_a_watch_tells_again_after_a_restart_that_it_did_not_see(tmp_path: Path, logs: Path, watch: Watch) -> None:
    # The whole restart takes place between two looks, and it is well for the one look at its end only.
    check = replace(watch.check(f"rm {tmp_path}/token", failures=1), interval_s=1.0)
    services = Services([service("a", f"touch {tmp_path}/token", "", check)], logs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.watch, restarting(services, watch, nursery))
        await eventually(lambda: len(watch.told) == 2)
        nursery.cancel_scope.cancel()


async def test_a_unit_without_a_check_is_watched_by_whether_it_is_active(logs: Path, systemctl: Path, watch: Watch) -> None:
    services = Services([unit("a"), unit("b")], logs, str(systemctl))
    await services.start_all()
    (systemctl.parent / "b.service.active").unlink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.watch, watch.on_unwell)
        await eventually(lambda: bool(watch.told))
        nursery.cancel_scope.cancel()
    assert watch.told == [("b", f"command {systemctl} is-active b.service: exit status 3: inactive")] or (
        len(watch.told) == 1 and watch.told[0][1].endswith("...: exit status 3: inactive")
    )
