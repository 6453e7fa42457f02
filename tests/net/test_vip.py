"""The virtual addresses, with real namespaces, a real switch between them and the kernel's own clocks."""

import contextlib
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorfs.errors import MirrorfsError
from mirrorfs.vip import VALID_S
from tests.net.support_vip import Bench, Driven, driven, eventually

pytestmark = pytest.mark.root

V4, V6 = "10.77.0.100/24", "fd77::100/64"
MORE = ["10.77.0.101/24", "10.99.0.1/16", "fd77::101/64"]
BOTH = pytest.mark.parametrize("vip", [V4, V6])


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(f"mfs-vip{os.getpid()}")
    try:
        bench.create()
        yield bench
    finally:
        bench.remove()


@pytest.fixture
def one(bench: Bench) -> Iterator[Driven]:
    with driven(bench, "one", [V4, V6]) as one:
        yield one


def ip_of(vip: str) -> str:
    return vip.partition("/")[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_addresses_of_both_families_are_raised_and_dropped(bench: Bench, one: Driven) -> None:
    assert one.call("is_up") is False
    one.call("raise_all")
    assert one.call("is_up") is True
    assert bench.virtual("one") == [V4, V6]
    one.call("drop_all")
    assert one.call("is_up") is False
    assert bench.virtual("one") == []
    assert {seen.address for seen in bench.addresses("one")} == {"10.77.0.1/24", "fd77::1/64"}


def test_several_addresses_on_several_interfaces_go_up_and_down_together(bench: Bench) -> None:
    bench.plug("one", "eth1")
    vips = [V4, V6, *MORE, "10.88.0.1/24@eth1", "10.88.0.2/24@eth1", "fd88::1/64@eth1"]
    with driven(bench, "one", vips) as one:
        one.call("raise_all")
        assert bench.virtual("one") == sorted([V4, V6, *MORE])
        assert bench.virtual("one", "eth1") == ["10.88.0.1/24", "10.88.0.2/24", "fd88::1/64"]
        one.call("drop_all")
        assert bench.virtual("one") == bench.virtual("one", "eth1") == []


def test_raising_and_dropping_can_be_repeated(bench: Bench, one: Driven) -> None:
    one.call("drop_all")
    for _ in range(2):
        one.call("raise_all")
        one.call("raise_all")
        assert bench.virtual("one") == [V4, V6]
        assert one.call("is_up") is True
        one.call("drop_all")
        one.call("drop_all")
        assert bench.virtual("one") == []
    assert one.troubles() == []


def test_an_address_is_valid_for_seconds_only_and_is_renewed(bench: Bench, one: Driven) -> None:
    one.call("raise_all")

    def lives() -> list[float]:
        seen = [seen for seen in bench.addresses("one") if seen.address in (V4, V6)]
        assert all(s.valid_s is not None and s.valid_s <= VALID_S for s in seen)
        return [s.lived_s for s in seen]

    # The same addresses, renewed at a time at which the first lease had long run out.
    eventually(lambda: len(lives()) == 2 and min(lives()) > VALID_S + 1)


def test_the_kernel_drops_the_addresses_of_a_controller_that_is_killed(bench: Bench, one: Driven) -> None:
    one.call("raise_all")
    one.kill()
    assert bench.virtual("one") == [V4, V6]
    eventually(lambda: not bench.virtual("one"))
    assert {seen.address for seen in bench.addresses("one")} == {"10.77.0.1/24", "fd77::1/64"}


@pytest.mark.parametrize("left", ["valid_lft 300 preferred_lft 300", ""])
def test_leftovers_are_replaced(bench: Bench, one: Driven, left: str) -> None:
    bench.shell("one", f"ip address add {V4} dev eth0 {left}; ip address add {V6} dev eth0 nodad {left}")
    one.call("raise_all")
    assert bench.virtual("one") == [V4, V6]
    assert [seen.valid_s is not None and seen.valid_s <= VALID_S for seen in bench.addresses("one")].count(True) == 2
    one.call("drop_all")
    assert bench.virtual("one") == []


def test_leftovers_with_other_prefix_lengths_are_replaced_and_dropped(bench: Bench, one: Driven) -> None:
    lives = "valid_lft 300 preferred_lft 300"
    leave = f"ip address add 10.77.0.100/32 dev eth0 {lives}; ip address add fd77::100/128 dev eth0 nodad {lives}"
    bench.shell("one", leave)
    one.call("raise_all")
    assert bench.virtual("one") == [V4, V6]
    bench.shell("one", f"ip address add 10.77.0.100/25 dev eth0; ip address del {V6} dev eth0; {leave}")
    one.call("drop_all")
    assert bench.virtual("one") == []


def test_a_restarted_controller_clears_what_the_killed_one_left(bench: Bench, one: Driven) -> None:
    bench.shell("one", f"ip address add {V4} dev eth0; ip address add {V6} dev eth0 nodad")
    one.call("drop_all")
    assert bench.virtual("one") == []


def test_the_route_of_the_own_prefix_outlives_a_permanent_leftover(bench: Bench, one: Driven) -> None:
    bench.shell("one", f"ip address add {V6} dev eth0 nodad")
    one.call("raise_all")
    (route,) = json.loads(bench.shell("one", "ip -6 -j route show fd77::/64"))
    assert "expires" not in route


def test_a_virtual_address_that_came_first_does_not_take_the_own_one_along(bench: Bench) -> None:
    with driven(bench, "one", ["10.55.0.100/24"]) as one:
        one.call("raise_all")
        bench.shell("one", "ip address add 10.55.0.1/24 dev eth0")
        one.call("drop_all")
        assert bench.virtual("one") == ["10.55.0.1/24"]


@pytest.mark.parametrize(("family", "peer", "own"), [("-4", "10.77.0.9", "10.77.0.1"), ("-6", "fd77::9", "fd77::1")])
def test_connections_of_the_machine_itself_keep_its_own_address(
    bench: Bench, one: Driven, family: str, peer: str, own: str
) -> None:
    one.call("raise_all")
    (route,) = json.loads(bench.shell("one", f"ip {family} -j route get {peer}"))
    assert route["prefsrc"] == own


@BOTH
def test_whoever_else_has_an_address_is_found_by_its_mac(bench: Bench, one: Driven, vip: str) -> None:
    assert one.call("conflicts") == []
    bench.shell("client", f"ip address add {vip} dev eth0 {'' if vip == V4 else 'nodad'}")
    assert one.call("conflicts") == [[ip_of(vip), bench.mac("client")]]


def test_all_conflicts_are_found_at_once(bench: Bench) -> None:
    with driven(bench, "one", [V4, V6, *MORE]) as one:
        for host in ("two", "client"):
            bench.shell(host, f"ip address add {V4} dev eth0; ip address add {V6} dev eth0 nodad")
        bench.shell("two", "ip address add 10.99.0.1/16 dev eth0")
        two, client = bench.mac("two"), bench.mac("client")
        found = {tuple(conflict) for conflict in one.call("conflicts")}
        pairs = {(ip_of(vip), mac) for vip in (V4, V6) for mac in (two, client)}
        assert found == pairs | {("10.99.0.1", two)}


def test_a_probe_leaves_no_trace_at_those_who_hear_it(bench: Bench, one: Driven) -> None:
    with bench.listening("client") as heard:
        one.call("conflicts")
        _, sender_ip, _, target_ip = struct.unpack("!6s4s6s4s", heard.recv(2048)[8:28])
    assert (sender_ip, target_ip) == (bytes(4), bytes((10, 77, 0, 100)))
    assert bench.neighbour("client", ip_of(V4)) == bench.neighbour("client", ip_of(V6)) == ""


def test_the_own_addresses_are_no_conflict(bench: Bench, one: Driven) -> None:
    one.call("raise_all")
    assert one.call("conflicts") == []
    assert bench.virtual("one") == [V4, V6]


def test_the_own_addresses_are_no_conflict_on_another_interface_on_the_same_link(bench: Bench, one: Driven) -> None:
    bench.plug("one", "eth1")
    bench.shell("one", f"ip address add {V4} dev eth1; ip address add {V6} dev eth1 nodad")
    bench.shell("client", f"ip address add {V6} dev eth0 nodad")
    assert one.call("conflicts") == [[ip_of(V6), bench.mac("client")]]


def test_the_macs_are_those_of_the_interfaces_that_exist(bench: Bench) -> None:
    with driven(bench, "one", [V4, V6, "10.88.0.1/24@eth7", "10.99.0.1/16@lo"]) as one:
        assert one.call("macs") == [bench.mac("one")]


@BOTH
def test_a_client_follows_an_address_that_moves_without_asking_again(bench: Bench, one: Driven, vip: str) -> None:
    with driven(bench, "two", [vip]) as two:
        two.call("raise_all")
        bench.resolve("client", ip_of(vip))
        assert bench.neighbour("client", ip_of(vip)) == bench.mac("two")
        two.call("drop_all")
        one.call("raise_all")
        eventually(lambda: bench.neighbour("client", ip_of(vip)) == bench.mac("one"))


def test_a_gratuitous_arp_is_sent_as_request_and_as_reply_and_repeated(bench: Bench, one: Driven) -> None:
    mac = bytes.fromhex(bench.mac("one").replace(":", ""))
    ip = bytes((10, 77, 0, 100))
    with bench.listening("client") as heard:
        one.call("raise_all")
        packets = [heard.recv(2048)[:28] for _ in range(6)]
    request = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, ip, bytes(6), ip)
    reply = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 2, mac, ip, mac, ip)
    assert packets == [request, reply] * 3


def test_an_interface_that_is_not_there_is_one_clear_line(bench: Bench) -> None:
    with driven(bench, "one", [V4, V6, "10.88.0.1/24@eth7"]) as one:
        for method in ("raise_all", "conflicts"):
            with pytest.raises(MirrorfsError, match=r"^there is no interface eth7 for 10\.88\.0\.1/24, correct .*$"):
                one.call(method)
            assert bench.virtual("one") == []
        assert one.call("is_up") is False
        one.call("drop_all")


def test_an_interface_that_is_down_is_one_clear_line(bench: Bench, one: Driven) -> None:
    bench.shell("one", "ip link set eth0 down")
    for method in ("raise_all", "conflicts"):
        with pytest.raises(MirrorfsError, match=r"^the interface eth0 for 10\.77\.0\.100/24 is down, .*$"):
            one.call(method)
    assert bench.virtual("one") == []
    one.call("drop_all")
    bench.shell("one", "ip link set eth0 up")
    one.call("raise_all")
    assert bench.virtual("one") == [V4, V6]


def test_ipv6_that_is_off_is_one_clear_line_and_nothing_is_left_up(bench: Bench, one: Driven) -> None:
    bench.shell("one", "echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6")
    with pytest.raises(MirrorfsError, match=r"^cannot put fd77::100/64 on eth0: IPv6 is off there.*$"):
        one.call("raise_all")
    assert bench.virtual("one") == []


def test_without_the_right_to_change_the_network_there_is_one_clear_line(bench: Bench) -> None:
    with driven(bench, "one", [V4], before=["setpriv", "--bounding-set=-net_admin", "--"]) as one:
        with pytest.raises(MirrorfsError, match=r"^cannot put 10\.77\.0\.100/24 on eth0: not permitted, .*root.*$"):
            one.call("raise_all")
        bench.shell("one", f"ip address add {V4} dev eth0")
        with pytest.raises(MirrorfsError, match=r"^cannot remove 10\.77\.0\.100/24 from eth0: not permitted, .*root.*$"):
            one.call("drop_all")


def test_without_any_own_ipv6_address_nobody_can_be_asked(bench: Bench, one: Driven) -> None:
    bench.shell("one", "ip -6 address flush dev eth0")
    with pytest.raises(MirrorfsError, match=r"^cannot ask on eth0 .*: it has no IPv6 address of its own yet.*$"):
        one.call("conflicts")


def test_a_kernel_that_does_not_answer_is_not_waited_for_and_what_it_does_late_is_undone(bench: Bench, tmp_path: Path) -> None:
    # Valid for longer than the test may last: what goes then was not dropped by the kernel.
    with driven(bench, "one", [V4], stall=f"{tmp_path}/go", valid_s=6000) as one:
        with pytest.raises(MirrorfsError, match=r"^the kernel has not answered about the virtual addresses for 2 s, .*$"):
            one.call("raise_all")
        assert one.call("threads") == 1
        (tmp_path / "go").touch()
        eventually(lambda: one.call("threads") == 0)
        assert bench.virtual("one") == []


def test_an_address_that_somebody_removes_is_raised_again_and_announced(bench: Bench, one: Driven) -> None:
    one.call("raise_all")
    bench.shell("one", f"ip address del {V4} dev eth0; ip address del {V6} dev eth0")
    eventually(lambda: bench.virtual("one") == [V4, V6])
    eventually(lambda: len(one.troubles()) == 1 and not one.call("trouble"))
    assert one.troubles() == [
        "10.77.0.100 had vanished from eth0, raised again; fd77::100 had vanished from eth0, raised again",
    ]


def test_a_controller_that_was_stopped_for_too_long_does_not_take_an_address_back(bench: Bench, one: Driven) -> None:
    one.call("raise_all")
    os.kill(one.pid, signal.SIGSTOP)
    eventually(lambda: not bench.virtual("one"))
    bench.shell("client", f"ip address add {V4} dev eth0; ip address add {V6} dev eth0 nodad")
    os.kill(one.pid, signal.SIGCONT)
    mac = bench.mac("client")
    wanted = "; ".join(f"{ip_of(vip)} has vanished and is in use by {mac}, not raised again" for vip in (V4, V6))
    eventually(lambda: one.call("trouble") == wanted)
    assert bench.virtual("one") == []
    bench.shell("client", f"ip address del {V4} dev eth0; ip address del {V6} dev eth0")
    eventually(lambda: bench.virtual("one") == [V4, V6])


def test_an_interface_that_goes_is_trouble_until_it_is_back(bench: Bench) -> None:
    bench.plug("one", "eth1")
    with driven(bench, "one", [V4, "10.88.0.1/24@eth1"]) as one:
        one.call("raise_all")
        bench.shell("one", "ip link del eth1")
        eventually(lambda: "there is no interface eth1" in one.call("trouble"))
        assert bench.virtual("one") == [V4]
        assert one.call("is_up") is True
        bench.plug("one", "eth1")
        eventually(lambda: bench.virtual("one", "eth1") == ["10.88.0.1/24"])
        eventually(lambda: not one.call("trouble"))
        assert [text for text in one.troubles() if V4 in text or ip_of(V4) in text] == []


def test_after_a_loss_of_carrier_the_addresses_are_announced_anew(bench: Bench) -> None:
    with driven(bench, "one", [V4], announce_after_s=[]) as one:
        one.call("raise_all")
        bench.shell("switch", "ip link set one-eth0 down")
        eventually(lambda: one.call("trouble") == "eth0 has no carrier, look at its cable")
        with bench.listening("client") as heard:
            bench.shell("switch", "ip link set one-eth0 up")
            # The next one would else come a minute after raising.
            assert heard.recv(2048)[14:18] == bytes((10, 77, 0, 100))
        eventually(lambda: not one.call("trouble"))


def test_without_carrier_the_addresses_can_be_raised_all_the_same(bench: Bench, one: Driven) -> None:
    bench.shell("switch", "ip link set one-eth0 down")
    assert one.call("conflicts") == []
    one.call("raise_all")
    assert bench.virtual("one") == [V4, V6]


def test_the_commands_know_the_addresses_and_find_them_up_and_down(bench: Bench, tmp_path: Path) -> None:
    up = f'echo "$MIRRORFS_VIPS" >> {tmp_path}/up; ip -o address >> {tmp_path}/up'
    down = f'echo "$MIRRORFS_VIPS" >> {tmp_path}/down; ip -o address >> {tmp_path}/down; false'
    with driven(bench, "one", [V4, V6], up=up, down=down) as one:
        one.call("raise_all")
        one.call("raise_all")
        seen = (tmp_path / "up").read_text()
        assert seen.count("10.77.0.100 fd77::100\n") == 1
        assert V4 in seen
        assert V6 in seen
        one.call("drop_all")
        seen = (tmp_path / "down").read_text()
        assert seen.startswith("10.77.0.100 fd77::100\n")
        assert V4 not in seen
        assert V6 not in seen


def test_an_up_command_that_fails_leaves_nothing_up(bench: Bench, tmp_path: Path) -> None:
    up = "echo first; echo the reason is here >&2; exit 3"
    with driven(bench, "one", [V4, V6], up=up, down=f"touch {tmp_path}/down") as one:
        with pytest.raises(MirrorfsError, match=r"^vip_up = .* failed with exit status 3: the reason is here$"):
            one.call("raise_all")
        assert one.call("is_up") is False
        assert bench.virtual("one") == []
        assert (tmp_path / "down").exists()


def test_an_up_command_that_hangs_is_ended_with_its_children(bench: Bench, tmp_path: Path) -> None:
    up = f"echo waiting; sleep 600 & echo $! > {tmp_path}/pid; sleep 600"
    with driven(bench, "one", [V4, V6], up=up, hook_s=1.0) as one:
        with pytest.raises(MirrorfsError, match=r"^vip_up = .* was ended, it took longer than 1 s: waiting$"):
            one.call("raise_all")
        assert bench.virtual("one") == []
        eventually(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_command_may_leave_something_in_the_background(bench: Bench, tmp_path: Path) -> None:
    with driven(bench, "one", [V4, V6], up=f"sleep 600 & echo $! > {tmp_path}/pid", hook_s=20.0) as one:
        one.call("raise_all")
        pid = int((tmp_path / "pid").read_text())
        with contextlib.ExitStack() as stack:
            stack.callback(os.kill, pid, signal.SIGKILL)
            assert alive(pid)
            assert bench.virtual("one") == [V4, V6]


def test_a_slow_up_command_does_not_cost_the_addresses(bench: Bench) -> None:
    with driven(bench, "one", [V4, V6], up=f"sleep {VALID_S + 3}") as one:
        one.call("raise_all")
        assert bench.virtual("one") == [V4, V6]
        assert one.troubles() == []


def test_dropping_interrupts_raising(bench: Bench) -> None:
    with driven(bench, "one", [V4, V6], up="sleep 600") as one:
        one.begin("raise_all")
        eventually(lambda: bench.virtual("one") == [V4, V6])
        one.call("drop_all")
        assert bench.virtual("one") == []
        with pytest.raises(MirrorfsError, match=r"^the virtual addresses were dropped while they were being raised$"):
            one.result("raise_all")
        assert one.call("is_up") is False
