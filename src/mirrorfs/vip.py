"""The virtual IP addresses of a node: whoever has them is who the clients talk to.

Two machines with the same address are worse than none, so an address is never simply there. It is put on its interface for
`VALID_S` seconds, and renewed while the controller lives; when that is killed or hangs, the kernel takes the address away by
itself. One that has vanished is put back only after nobody else on the link has answered for it: this process may have been
stopped for as long as it takes the other node to take over.
"""

import contextlib
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mirrorfs import commands, neighbours
from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import VipConfig
from mirrorfs.neighbours import Link, Target

log = logging.getLogger(__name__)

#: For how long the kernel keeps an address that nobody renews.
VALID_S: Final = 4
RENEW_EVERY_S: Final = 1.0
#: When an address is announced again after it was raised: a switch or a client may have missed the first ones.
ANNOUNCE_AFTER_S: Final = (0.2, 1.0, 2.0, 5.0)
ANNOUNCE_EVERY_S: Final = 60.0
HOOK_S: Final = 30.0
PROBE_S: Final = 0.25
# The kernel answers within milliseconds, unless something else holds the lock of its network configuration.
_KERNEL_S: Final = 2.0
_THREADS: Final = 4

_IFA_F_NODAD, _IFA_F_PERMANENT = 0x02, 0x80

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Conflict:
    """Another machine on the link that answers for one of the addresses, by its MAC."""

    address: str
    mac: str


class Addresses:
    """All virtual addresses of this node, raised and dropped together; `run` has to be running for them to stay.

    `on_trouble` is called with a line for a person whenever something new is wrong with addresses that are up, and
    `trouble` is that line for as long as it is true ("" if all is well).
    """

    def __init__(self, vips: Sequence[VipConfig], *, up_command: str = "", down_command: str = "") -> None:
        self.on_trouble: Callable[[str], object] = lambda _: None
        self.trouble = ""
        self._vips = tuple(vips)
        self._up_command, self._down_command = up_command, down_command
        # Held: to be kept on the interfaces. Up: held, and everything around it has been done.
        self._held = self._up = False
        self._unreachable: frozenset[str] = frozenset()
        self._turn = trio.Lock()  # one raise_all or drop_all at a time
        self._kernel = trio.Lock()  # one change of the interfaces at a time
        self._raising: trio.CancelScope | None = None
        self._begin_announcing = trio.Event()
        # Not trio's own threads: those may all be waiting for a disk that hangs.
        self._limiter = trio.CapacityLimiter(_THREADS)

    @property
    def is_up(self) -> bool:
        """True from the end of raise_all to the beginning of drop_all, whatever `trouble` there is meanwhile."""
        return self._up

    def macs(self) -> list[str]:
        """The MACs of the interfaces of the addresses, of those that are there and have one; does not block."""
        found: list[str] = []
        for name in dict.fromkeys(vip.interface for vip in self._vips):
            with contextlib.suppress(OSError):
                if mac := neighbours.find_link(name).mac:
                    found.append(neighbours.show_mac(mac))
        return found

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew and announce the addresses while they are up; forever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renewing)
            nursery.start_soon(self._announcing)
            task_status.started()

    async def conflicts(self, *, wait_s: float = PROBE_S) -> list[Conflict]:
        """Who else on the links answers for one of the addresses within `wait_s`; takes all of that time.

        Without carrier nobody answers, and so there is no conflict. Raises MirrorfsError, which names the interface, if that
        is missing or down or nothing can be asked on it.
        """
        return await self._probe(self._vips, wait_s)

    async def raise_all(self) -> None:
        """Put all addresses on their interfaces, run the up command, and announce them; if they are up, renew and announce.

        Raises MirrorfsError if that cannot be done, or if drop_all is called meanwhile; then none of them is left up, and if
        the up command was begun the down command has been run.
        """
        async with self._turn:
            with trio.CancelScope() as self._raising:
                await self._raise()
            dropped, self._raising = self._raising.cancelled_caught, None
            if dropped:
                raise MirrorfsError("the virtual addresses were dropped while they were being raised")

    async def drop_all(self) -> None:
        """Take all addresses off their interfaces, whoever put them there, then run the down command.

        Interrupts a raise_all. What is not there is no error, and a down command that fails is only logged. Raises
        MirrorfsError if an address cannot be removed: the kernel does that within `VALID_S` if it was put there by us.
        """
        self._held = self._up = False
        if self._raising is not None:
            self._raising.cancel()
        async with self._turn:
            self._held = self._up = False
            self.trouble, self._unreachable = "", frozenset()
            problem: MirrorfsError | None = None
            try:
                await self._remove()
            except MirrorfsError as error:
                problem = error
            await self._run_down_command()
            if problem is not None:
                raise problem

    async def _raise(self) -> None:
        hook_began = self._up
        try:
            async with self._kernel:
                self._held = True
                outcome = await self._bounded(_KERNEL_S, _put, self._vips, True, self._is_held)
            if outcome.problems:
                raise MirrorfsError(outcome.problems[0])
            if self._up_command and not hook_began:
                hook_began = True
                # run() renews meanwhile: a command may take longer than an address lives.
                await _run_hook("vip_up", self._up_command, self._vips)
            await self._announce_anew(self._vips)
        except BaseException as error:
            self._held = self._up = False
            with trio.move_on_after(2 * _KERNEL_S, shield=True):
                try:
                    await self._remove()
                except MirrorfsError as left:
                    log.warning("%s", left)
            if hook_began and isinstance(error, MirrorfsError):
                await self._run_down_command()
            raise
        self._up = True

    def _is_held(self) -> bool:
        return self._held

    async def _remove(self) -> None:
        async with self._kernel:
            problems = await self._bounded(_KERNEL_S, _take_away, self._vips)
        if problems:
            raise MirrorfsError(problems[0])

    async def _run_down_command(self) -> None:
        if self._down_command:
            try:
                await _run_hook("vip_down", self._down_command, self._vips)
            except MirrorfsError as error:
                log.warning("%s", error)

    async def _renewing(self) -> None:
        while True:
            try:
                problems = await self._renew()
            except MirrorfsError as error:
                problems = [str(error)]
            if self._held:
                self._tell("; ".join(problems))
            await trio.sleep(RENEW_EVERY_S)

    async def _renew(self) -> list[str]:
        """Renew what is there and put back what is not; what is wrong."""
        async with self._kernel:
            if not self._held:
                return []
            outcome = await self._bounded(_KERNEL_S, _put, self._vips, False, self._is_held)
        if self._unreachable - outcome.unreachable:
            await self._announce_anew(self._vips)
        self._unreachable = frozenset(outcome.unreachable)
        problems = outcome.problems + [f"{name} has no carrier, look at its cable" for name in sorted(outcome.dead)]
        if outcome.absent:
            problems += await self._put_back(outcome.absent)
        return problems

    async def _put_back(self, absent: list[VipConfig]) -> list[str]:
        claims = {conflict.address: conflict.mac for conflict in await self._probe(absent, PROBE_S)}
        problems = [f"{address} has vanished and is in use by {mac}, not raised again" for address, mac in claims.items()]
        free = [vip for vip in absent if str(vip.address.ip) not in claims]
        async with self._kernel:
            if not self._held or not free:
                return problems
            outcome = await self._bounded(_KERNEL_S, _put, free, True, self._is_held)
        await self._announce_anew(free)
        vanished = [f"{vip.address.ip} had vanished from {vip.interface}, raised again" for vip in outcome.absent]
        return problems + outcome.problems + vanished

    def _tell(self, trouble: str) -> None:
        before, self.trouble = self.trouble, trouble
        if trouble and trouble != before:
            self.on_trouble(trouble)

    async def _announcing(self) -> None:
        while True:
            anew = self._begin_announcing
            for pause_s in _pauses_s():
                with trio.move_on_after(pause_s):
                    await anew.wait()
                    break
                if self._up:
                    await self._announce(self._vips)

    async def _announce_anew(self, vips: Sequence[VipConfig]) -> None:
        """Announce these now, and begin the repetitions from the first one."""
        await self._announce(vips)
        self._begin_announcing.set()
        self._begin_announcing = trio.Event()

    async def _announce(self, vips: Sequence[VipConfig]) -> None:
        # No error: it is said again soon, and what it comes from is seen by the renewal.
        try:
            problems = await self._bounded(_KERNEL_S, _announce_all, vips)
        except MirrorfsError as error:
            problems = [str(error)]
        for problem in problems:
            log.warning("%s", problem)

    async def _probe(self, vips: Sequence[VipConfig], wait_s: float) -> list[Conflict]:
        targets = [Target(vip.address.ip, _find_link(vip)) for vip in vips]
        claims = await self._bounded(wait_s + _KERNEL_S, _ask, targets, wait_s)
        return [Conflict(str(ip), neighbours.show_mac(mac)) for ip, mac in claims]

    async def _bounded(self, limit_s: float, function: Callable[..., Result], *arguments: object) -> Result:
        """The function's result from a worker thread, which is left to itself after `limit_s` (MirrorfsError)."""
        try:
            with trio.fail_after(limit_s):
                return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True, limiter=self._limiter)
        except trio.TooSlowError:
            raise MirrorfsError(
                f"the kernel has not answered about the virtual addresses for {limit_s:g} s, see what holds it in `dmesg`"
            ) from None
        except (NetlinkError, OSError) as error:
            raise MirrorfsError(f"cannot work on the virtual addresses: {os.strerror(_code(error))}") from error


def _pauses_s() -> itertools.chain[float]:
    first = (after - before for before, after in itertools.pairwise((0.0, *ANNOUNCE_AFTER_S)))
    return itertools.chain(first, itertools.repeat(ANNOUNCE_EVERY_S))


# From here to the next line of this kind: in worker threads.


@dataclass(slots=True)
class _Outcome:
    """What came of putting addresses on: which were not there before, what is wrong, which interfaces nobody can reach."""

    absent: list[VipConfig] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    unreachable: set[str] = field(default_factory=set)


def _put(vips: Sequence[VipConfig], add: bool, is_wanted: Callable[[], bool]) -> _Outcome:
    """Give each address another `VALID_S`; those that are not there are put there only if `add`."""
    outcome = _Outcome()
    with IPRoute() as kernel:
        for vip in vips:
            try:
                link = _find_link(vip)
                if not link.running:
                    outcome.dead.add(vip.interface)
                    outcome.unreachable.add(vip.interface)
                _put_one(kernel, link, vip, add, is_wanted, outcome)
            except MirrorfsError as error:
                outcome.unreachable.add(vip.interface)
                if str(error) not in outcome.problems:
                    outcome.problems.append(str(error))
            except (NetlinkError, OSError) as error:
                outcome.problems.append(f"cannot put {vip.address} on {vip.interface}: {_explain(error, vip)}")
    return outcome


def _put_one(kernel: IPRoute, link: Link, vip: VipConfig, add: bool, is_wanted: Callable[[], bool], outcome: _Outcome) -> None:
    present = _present(kernel, link, vip)
    if not present:
        outcome.absent.append(vip)
        if not add:
            return
    if not is_wanted():
        return
    for prefix_length, is_permanent in present:
        # Not changed in place: out of a permanent address the kernel then makes the route of the whole prefix one that
        # expires with it (IPv6), and another prefix length would be another address beside it (IPv4).
        if is_permanent or prefix_length != vip.address.network.prefixlen:
            _delete(kernel, link, vip, prefix_length)
    if vip.address.version == 4:
        _keep_secondaries(vip.interface)
    kernel.addr(
        "replace",
        index=link.index,
        family=_family(vip),
        address=str(vip.address.ip),
        prefixlen=vip.address.network.prefixlen,
        valid=VALID_S,
        # An IPv6 address that is not preferred is not taken as the source of connections from this machine, which would
        # break when the address moves: the kernel else prefers the newest one.
        preferred=VALID_S if vip.address.version == 4 else 0,
        flags=0 if vip.address.version == 4 else _IFA_F_NODAD,
    )
    # This thread may have been given up, and the address dropped, while the kernel kept it waiting.
    if not is_wanted():
        _delete(kernel, link, vip, vip.address.network.prefixlen)


def _take_away(vips: Sequence[VipConfig]) -> list[str]:
    """Remove the addresses, with any prefix length; what could not be done."""
    problems: list[str] = []
    with IPRoute() as kernel:
        for vip in vips:
            try:
                link = neighbours.find_link(vip.interface)
                for prefix_length, _ in _present(kernel, link, vip):
                    _delete(kernel, link, vip, prefix_length)
            except (NetlinkError, OSError) as error:
                if _code(error) != errno.ENODEV:
                    problems.append(f"cannot remove {vip.address} from {vip.interface}: {_explain(error, vip)}")
    return problems


def _announce_all(vips: Sequence[VipConfig]) -> list[str]:
    problems: list[str] = []
    for vip in vips:
        try:
            neighbours.announce(Target(vip.address.ip, neighbours.find_link(vip.interface)))
        except OSError as error:
            problems.append(f"cannot announce {vip.address.ip} on {vip.interface}: {error.strerror}")
    return problems


def _ask(targets: Sequence[Target], wait_s: float) -> list[tuple[neighbours.IPAddress, bytes]]:
    try:
        return neighbours.probe(targets, wait_s)
    except OSError as error:
        where = f" on {error.filename}" if error.filename else ""
        reason = error.strerror
        if error.errno == errno.EADDRNOTAVAIL:
            reason = "it has no IPv6 address of its own yet, try again or see `ip -6 address`"
        raise MirrorfsError(f"cannot ask{where} who has the virtual addresses: {reason}") from None


def _present(kernel: IPRoute, link: Link, vip: VipConfig) -> list[tuple[int, bool]]:
    """The prefix lengths with which the address is on the interface, and whether it is there for ever."""
    found: list[tuple[int, bool]] = []
    for message in kernel.get_addr(family=_family(vip), index=link.index):
        # On IPv4 this is the address itself; IFA_ADDRESS may be that of the other end.
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if address == str(vip.address.ip):
            flags = message.get_attr("IFA_FLAGS") or message["flags"]
            found.append((message["prefixlen"], bool(flags & _IFA_F_PERMANENT)))
    return found


def _delete(kernel: IPRoute, link: Link, vip: VipConfig, prefix_length: int) -> None:
    try:
        kernel.addr("del", index=link.index, family=_family(vip), address=str(vip.address.ip), prefixlen=prefix_length)
    except NetlinkError as error:
        if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise


def _keep_secondaries(interface: str) -> None:
    """With an address that goes, the kernel else removes all that came later to the same IPv4 network: the machine's own.

    Nothing that is worth an error: the machine's own address is nearly always the older one.
    """
    with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv4/conf/{interface}/promote_secondaries", "r+") as setting:
        if setting.read().strip() == "0":
            setting.seek(0)
            setting.write("1")


def _find_link(vip: VipConfig) -> Link:
    """The interface of the address; raises MirrorfsError if it is not there or is down."""
    try:
        link = neighbours.find_link(vip.interface)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise MirrorfsError(f"cannot look at the interface {vip.interface}: {error.strerror}") from None
        raise MirrorfsError(
            f"there is no interface {vip.interface} for {vip.address}, correct [[vip]] or see `ip link`"
        ) from None
    if not link.up:
        raise MirrorfsError(
            f"the interface {vip.interface} for {vip.address} is down, bring it up: `ip link set {vip.interface} up`"
        )
    return link


def _family(vip: VipConfig) -> int:
    return int(socket.AF_INET if vip.address.version == 4 else socket.AF_INET6)


def _code(error: NetlinkError | OSError) -> int:
    return int((error.code if isinstance(error, NetlinkError) else error.errno) or errno.EIO)


def _explain(error: NetlinkError | OSError, vip: VipConfig) -> str:
    code = _code(error)
    if code == errno.EPERM:
        return "not permitted, the controller needs root (CAP_NET_ADMIN)"
    if code == errno.EACCES and vip.address.version == 6:
        return f"IPv6 is off there, see `sysctl net.ipv6.conf.{vip.interface}.disable_ipv6`"
    return f"{os.strerror(code)}, see `ip address show dev {vip.interface}`"


# Not in worker threads any more.


async def _run_hook(key: str, command: str, vips: Sequence[VipConfig]) -> None:
    """Run the shell command; raises MirrorfsError, with its last line, if it fails or takes longer than `HOOK_S`."""
    addresses = {"MIRRORFS_VIPS": " ".join(str(vip.address.ip) for vip in vips)}
    result = await commands.run(commands.shell(command), timeout_s=HOOK_S, environment=addresses, kill_wait_s=1.0)
    said = f": {result.last_line}" if result.last_line else ", and said nothing"
    if result.timed_out:
        raise MirrorfsError(f"{key} = {command!r} was ended, it took longer than {HOOK_S:g} s{said}")
    if result.problem:
        raise MirrorfsError(f"{key} = {command!r} failed with {result.problem}{said}")
