"""The services that live where the primary is: starting them in order, stopping them in the reverse one, watching them.

A service is a systemd unit, or commands run by the shell. Whoever calls does one thing at a time with a service; only
`watch` runs beside the rest, and looks away while a service is being started or stopped.
"""

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from mirrorfs import commands
from mirrorfs.checks import check
from mirrorfs.commands import KILL_WAIT_S, Result, shell
from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import CheckConfig, ServiceConfig

#: What the processes that a start command leaves behind have in their environment, so that they can be told later, too, by
#: a controller that was restarted. The value has the directory in it: two controllers may have services of the same name.
MARK_VARIABLE: Final = "MIRRORFS_SERVICE"

#: While a service starts its checks are tried at least this often, so that the address can follow soon.
_START_INTERVAL_S = 0.5
_UNIT_INTERVAL_S = 0.2
#: Exit statuses of `systemctl is-active` (systemctl(1), LSB): the unit is not active; there is no such unit.
_NOT_ACTIVE = (3, 4)
_ON_ITS_WAY = ("activating", "deactivating", "reloading", "refreshing", "maintenance")


class ServiceError(MirrorfsError):
    """A service did not start.

    `what` happened, the `last_line` of its output if there is one, and the `log` that has the rest.
    """

    def __init__(self, name: str, what: str, last_line: str, log: str) -> None:
        """One line of all of it."""
        super().__init__(f"service {name} did not start: {what}{_after(last_line)}; see {log}")
        self.name = name
        self.what = what
        self.last_line = last_line
        self.log = log


@dataclass(slots=True)
class _Service:
    config: ServiceConfig
    log: Path
    mark: Mapping[str, str]
    is_changing: bool = False
    #: Starts and stops so far: what was seen before one of them says nothing about what is there after it.
    changes: int = 0

    @contextmanager
    def change(self) -> Iterator[None]:
        """While this is entered the service is being started or stopped."""
        self.is_changing = True
        try:
            yield
        finally:
            self.is_changing = False
            self.changes += 1


class Services:
    """All services of one volume, in the order in which they are started."""

    def __init__(self, configs: Sequence[ServiceConfig], directory: Path, systemctl: str = "systemctl") -> None:
        """`directory` is made if need be; it keeps what starts and stops say: NAME.log, and NAME.log.1 before that.

        It must not be on the volume. `systemctl` is the program that is run for units.
        """
        directory = directory.absolute()
        place = hashlib.sha256(bytes(directory)).hexdigest()[:16]
        self._services = {
            config.name: _Service(config, directory / f"{config.name}.log", {MARK_VARIABLE: f"{config.name}-{place}"})
            for config in configs
        }
        self._systemctl = systemctl

    async def start_all(self) -> None:
        """Start all, each once the one before answers to its checks.

        Raises ServiceError for the first that does not start within its `start_timeout_s`; those before it stay.
        """
        for service in self._services.values():
            with service.change():
                await self._start(service)

    async def stop_all(self) -> list[str]:
        """Stop all in the reverse order, and kill what does not stop within its `stop_timeout_s`.

        Returns a line for each service that had to be killed, or that is still there since even that did not help. A
        service that does not end takes a few seconds more than its timeout, never longer.
        """
        complaints = []
        for service in reversed(self._services.values()):
            with service.change():
                complaint, _ = await self._stop(service)
            if complaint:
                complaints.append(complaint)
        return complaints

    async def restart(self, name: str) -> None:
        """Stop and start one service.

        Raises ServiceError if it does not start, or is not started since the old one does not end on SIGKILL; KeyError if
        there is no service `name`.
        """
        service = self._services[name]
        with service.change():
            complaint, is_gone = await self._stop(service)
            if not is_gone:
                raise ServiceError(name, f"what was there is not gone: {complaint}", "", str(service.log))
            await self._start(service)

    async def running(self) -> dict[str, bool]:
        """Which services are there now, by name: their unit is active, or all their checks succeed.

        A service of commands without a check cannot be told, and counts as not there.
        """
        answers: dict[str, bool] = {}
        async with trio.open_nursery() as nursery:
            for service in self._services.values():
                nursery.start_soon(self._look, service, answers)
        return {name: answers[name] for name in self._services}

    async def left(self, running: Mapping[str, bool]) -> list[str]:
        """The services of which anything is there, well or not: those that are `running`, an active unit, a process of a start
        command."""
        return [name for name, service in self._services.items() if running[name] or await self._has_processes(service)]

    async def _has_processes(self, service: _Service) -> bool:
        if service.config.unit:
            state = await commands.run((self._systemctl, "is-active", service.config.unit), timeout_s=KILL_WAIT_S)
            return state.exit_status == 0 or state.last_line in _ON_ITS_WAY
        [(variable, value)] = service.mark.items()
        return bool(await commands.find_marked(variable, value))

    async def watch(self, on_unwell: Callable[[str, str], None]) -> None:
        """Run all checks at their intervals until cancelled; a unit without a check is to be active.

        `on_unwell(service name, what is wrong)` is called when a check has failed `failures` times in a row, and then not
        again for that check before it has succeeded or the service has been started or stopped.
        """
        async with trio.open_nursery() as nursery:
            for service in self._services.values():
                for config in self._checks(service.config):
                    nursery.start_soon(_watch, service, config, on_unwell)
            await trio.sleep_forever()

    def _checks(self, config: ServiceConfig) -> tuple[CheckConfig, ...]:
        return config.checks or ((self._unit_check(config.unit),) if config.unit else ())

    def _unit_check(self, unit: str) -> CheckConfig:
        return CheckConfig("command", shlex.join((self._systemctl, "is-active", unit)))

    async def _look(self, service: _Service, answers: dict[str, bool]) -> None:
        config = service.config
        problems: dict[CheckConfig, str] = {}
        checks = (self._unit_check(config.unit),) if config.unit else config.checks
        async with trio.open_nursery() as nursery:
            for one in checks:
                nursery.start_soon(_check_once, one, problems)
        answers[config.name] = bool(checks) and not any(problems.values())

    async def _start(self, service: _Service) -> None:
        config = service.config
        end = trio.current_time() + config.start_timeout_s
        log = f"journalctl --unit={config.unit}" if config.unit else str(service.log)
        command = (self._systemctl, "start", config.unit) if config.unit else shell(config.start)
        result = await commands.run(
            command,
            timeout_s=config.start_timeout_s,
            output=service.log,
            environment={} if config.unit else service.mark,
        )
        if result.problem:
            what = f"{command[0] if config.unit else 'its start command'} {_ending(result, config.start_timeout_s)}"
            raise ServiceError(config.name, what, result.last_line, log)
        if config.checks:
            await self._wait_until_well(service, end, log)

    async def _wait_until_well(self, service: _Service, end: float, log: str) -> None:
        config = service.config
        problems: dict[CheckConfig, str] = {}
        with trio.move_on_at(end):
            async with trio.open_nursery() as nursery:
                for one in config.checks:
                    nursery.start_soon(_check_until_well, one, problems)
            return
        wrong = "; ".join(filter(None, problems.values())) or "no answer"
        last_line = await trio.to_thread.run_sync(commands.last_logged, service.log)
        raise ServiceError(
            config.name, f"its checks did not succeed within {config.start_timeout_s:g} s: {wrong}", last_line, log
        )

    async def _stop(self, service: _Service) -> tuple[str, bool]:
        """What there is to complain about, and whether the service is gone as far as can be told."""
        if service.config.unit:
            complaint, is_gone = await self._stop_unit(service)
        elif service.config.stop:
            complaint, is_gone = await _stop_command(service)
        else:
            return "", True
        if not complaint:
            return "", is_gone
        complaint = f"service {service.config.name} did not stop: {complaint}"
        await trio.to_thread.run_sync(commands.append_note, service.log, complaint)
        return complaint, is_gone

    async def _stop_unit(self, service: _Service) -> tuple[str, bool]:
        unit, timeout_s = service.config.unit, service.config.stop_timeout_s
        result = await commands.run((self._systemctl, "stop", unit), timeout_s=timeout_s, output=service.log)
        if not result.problem:
            return "", True
        what = f"{self._systemctl} {_ending(result, timeout_s)}{_after(result.last_line)}"
        kill = (self._systemctl, "kill", "--signal=SIGKILL", unit)
        killed = await commands.run(kill, timeout_s=KILL_WAIT_S, output=service.log)
        is_gone = await self._unit_ends(unit)
        if is_gone:
            return f"{what}; {'it is not active' if killed.problem else 'it was killed'}", True
        if killed.problem:
            return f"{what}; it could not be killed: {killed.problem}{_after(killed.last_line)}", False
        return f"{what}; it is still there after SIGKILL", False

    async def _unit_ends(self, unit: str) -> bool:
        """Whether the unit is not active, or becomes so within the time that SIGKILL may take."""
        with trio.move_on_after(KILL_WAIT_S):
            while True:
                state = await commands.run((self._systemctl, "is-active", unit), timeout_s=KILL_WAIT_S)
                if state.exit_status in _NOT_ACTIVE and state.last_line not in _ON_ITS_WAY:
                    return True
                await trio.sleep(_UNIT_INTERVAL_S)
        return False


async def _stop_command(service: _Service) -> tuple[str, bool]:
    timeout_s = service.config.stop_timeout_s
    end = trio.current_time() + timeout_s
    result = await commands.run(shell(service.config.stop), timeout_s=timeout_s, output=service.log)
    # A stop command may return while the daemon is still on its way; one that failed has not asked it to end.
    grace_s = 0.0 if result.problem else end - trio.current_time()
    [(variable, value)] = service.mark.items()
    killed, left = await commands.end_marked(variable, value, grace_s)
    if not result.problem and not killed and left == []:
        return "", True
    if result.problem:
        what = f"its stop command {_ending(result, timeout_s)}{_after(result.last_line)}"
    else:
        what = f"its stop command succeeded but after {timeout_s:g} s not all of it had ended"
    if left is None:
        return f"{what}; it cannot be told what is left of it", not result.problem
    if left:
        return f"{what}; {_processes(left)} did not end on SIGKILL", False
    return f"{what}; {f'{_processes(killed)} killed' if killed else 'no process of its start command is left'}", True


async def _check_once(config: CheckConfig, problems: dict[CheckConfig, str]) -> None:
    problems[config] = await check(config)


async def _check_until_well(config: CheckConfig, problems: dict[CheckConfig, str]) -> None:
    while problem := await check(config):
        problems[config] = problem
        await trio.sleep(min(config.interval_s, _START_INTERVAL_S))
    problems[config] = ""


async def _watch(service: _Service, config: CheckConfig, on_unwell: Callable[[str, str], None]) -> None:
    failed, changes = 0, service.changes
    while True:
        began = trio.current_time()
        if service.changes != changes:
            failed, changes = 0, service.changes
        problem = "" if service.is_changing else await check(config)
        if not problem or service.is_changing or service.changes != changes:
            failed = 0
        else:
            failed += 1
            if failed == config.failures:
                on_unwell(service.config.name, problem)
        await trio.sleep_until(began + config.interval_s)


def _ending(result: Result, timeout_s: float) -> str:
    """How a command did not succeed, to follow its name."""
    if not result.timed_out:
        return f"failed, {result.problem}"
    stuck = f", process {result.stuck.pid} did not end on SIGKILL" if result.stuck else ""
    return f"did not end within {timeout_s:g} s{stuck}"


def _processes(pids: list[int]) -> str:
    return f"{'process' if len(pids) == 1 else 'processes'} {', '.join(map(str, pids))}"


def _after(last_line: str) -> str:
    return f": {last_line}" if last_line else ""
