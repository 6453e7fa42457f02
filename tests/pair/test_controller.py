"""Two controllers on a real pair: a small service behind a virtual address, and what happens to it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirrorfs import control
from mirrorfs.errors import MirrorfsError
from mirrorfs.lab import cluster, public
from mirrorfs.lab.cluster import ADDRESS, Cluster
from mirrorfs.lab.pair import wait_for
from tests.pair.support import mirrorfs

pytestmark = pytest.mark.root

ADDRESS6 = "fd79::100"

#: Answers each connection with the name of its host, which it has written to the mount before.
SERVICE = '''
[[service]]
name = "echo"
start = """cat > $LAB_MOUNT/echo.py <<'END'
import os, pathlib, socket, sys
pathlib.Path(sys.argv[1], "served-by").write_text(sys.argv[2])
server = socket.create_server(("", 7000))
while True:
    connection, _ = server.accept()
    connection.sendall(pathlib.Path(sys.argv[1], "served-by").read_bytes())
    connection.close()
END
setsid --fork python3 $LAB_MOUNT/echo.py $LAB_MOUNT $(basename $LAB_HOME) >/dev/null 2>&1"""
stop = "pkill -KILL -f $LAB_MOUNT/echo.py || true"
start_timeout = "10s"
[[service.check]]
tcp = "127.0.0.1:7000"
interval = "300ms"
'''


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(services: str = SERVICE, *, start: bool = True, **options: str) -> Cluster:
        directory = tmp_path / f"lab{len(made)}"
        text = cluster.sections(services, **({"failover": 'detection_timeout = "1500ms"'} | options))
        made.append(Cluster(directory, text, options={"ack_timeout": "1s", "freeze_timeout": "3s"}))
        if start:
            made[-1].start_controllers()
        return made[-1]

    yield make
    for each in made:
        each.close()


def served_by(site: Cluster) -> str:
    """Who answers at the virtual address, "" if nobody does."""
    ask = f"import socket; print(socket.create_connection(('{ADDRESS}', 7000), timeout=1).recv(100).decode())"
    return site.at_desk("python3", "-c", ask).stdout.strip()


def trouble(site: Cluster, name: str) -> str:
    said = site.says(name)
    return "" if said is None else str(said["trouble"])


def wait_served_by(site: Cluster, name: str) -> None:
    wait_for(lambda: served_by(site) == name, f"{name} answers at the address")


def test_a_node_that_dies_is_replaced_and_comes_back_as_the_standby(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    wait_served_by(site, "one")
    site.kill_host("one")
    wait_served_by(site, "two")
    site.lab.one.start()
    site.start_controller("one")
    site.lab.wait_mirrored()
    assert site.lab.primary() is site.lab.two
    assert site.posture("one") == "idle"


def test_a_mount_that_dies_alone_is_replaced_at_once(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    site.lab.one.kill()
    wait_served_by(site, "two")
    assert site.posture("one") == "idle"
    site.lab.one.start()
    site.lab.wait_mirrored()


def test_a_mount_that_hangs_is_killed_and_replaced(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    for pid in site.lab.one.pids():
        os.kill(pid, signal.SIGSTOP)
    wait_served_by(site, "two")
    wait_for(lambda: not site.lab.one.pids(), "the mount that hangs is killed")


def test_a_switch_over_moves_everything_from_either_node(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    wait_served_by(site, "one")
    assert "serves" in site.command("two", "promote")
    assert served_by(site) == "two"
    site.lab.wait_mirrored()
    for node, command in (("two", "switchover"), ("two", "switchover")):
        to = "one" if served_by(site) == "two" else "two"
        done = mirrorfs(site.lab.host(node), command)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert served_by(site) == to, "what follows the command finds it at its address"
        site.lab.wait_mirrored()
    wait_for(lambda: site.posture("one") == "idle", "one has nothing to do any more")


def test_a_switch_over_that_nobody_waits_for_goes_on(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    for node, to in (("one", "two"), ("one", "one")):
        done = mirrorfs(site.lab.host(node), "switchover", "--no-wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert "it is under way" in done.stdout
        wait_served_by(site, to)
        site.lab.wait_mirrored()


def test_a_switch_over_fails_as_long_as_the_address_is_not_there(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    wait_served_by(site, "one")
    assert site.at_desk("ip", "address", "add", f"{ADDRESS}/24", "dev", "bridge").returncode == 0
    done = mirrorfs(site.lab.one, "switchover", "--timeout", "8")
    said = "mirrorfs: the other node serves without its addresses after 8 s: look at `mirrorfs status` there"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)
    assert done.stderr.startswith("switchover: "), "it shows progress meanwhile"
    site.lab.wait_mirrored()
    done = mirrorfs(site.lab.one, "switchover", "--timeout", "8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "mirrorfs: one serves without its addresses after 8 s: in use by another machine"
    )
    assert site.at_desk("ip", "address", "del", f"{ADDRESS}/24", "dev", "bridge").returncode == 0
    wait_served_by(site, "one")


def test_a_switch_over_to_a_node_that_cannot_start_the_service_fails_and_says_so(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster(SERVICE.replace('start = """', 'start = """test $(basename $LAB_HOME) = one || exit 3\n'))
    done = mirrorfs(site.lab.one, "switchover")
    said = "mirrorfs: not given: the other node could not start it: look at `mirrorfs status` there"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)
    wait_served_by(site, "one")
    site.lab.wait_mirrored()
    site.command("one", "maintenance", on=True)
    wait_for(lambda: bool((site.says("two") or {}).get("maintenance")), "the other controller knows")
    done = mirrorfs(site.lab.one, "switchover")
    said = "mirrorfs: the other node does not serve, it is held: `mirrorfs status` there says why"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)
    wait_for(lambda: (site.says("one") or {}).get("mount") == "standby", "the first one follows")
    done = mirrorfs(site.lab.one, "promote")
    assert done.returncode == 0, done.stderr
    assert served_by(site) == "one", "who is held gives it, too"
    wait_for(lambda: site.posture("two") == "idle", "it follows")


def test_a_switch_over_in_maintenance_moves_what_a_controller_has_not_taken_up(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    site.command("one", "maintenance", on=True)
    wait_for(lambda: bool((site.says("two") or {}).get("maintenance")), "the other controller knows")
    site.kill_controller("one")
    site.start_controller("one")
    assert site.posture("one") == "idle"
    done = mirrorfs(site.lab.one, "switchover")
    assert done.returncode == 0, done.stderr
    wait_served_by(site, "two")
    assert site.lab.one.run("pgrep", "-f", f"{site.lab.one.mount}/echo.py", capture_output=True).stdout == b""


def test_what_a_controller_has_found_in_maintenance_ends_with_the_mount(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    one = site.lab.one
    site.command("one", "maintenance", on=True)
    site.kill_controller("one")
    left = ("pgrep", "-f", f"{one.mount}/echo.py")
    pids = one.run(*left, capture_output=True).stdout
    site.start_controller("one")
    wait_for(lambda: (site.says("one") or {}).get("services") == "up", "it knows what is there")
    assert (site.posture("one"), one.run(*left, capture_output=True).stdout) == ("idle", pids)
    one.kill()
    wait_for(lambda: one.run(*left, capture_output=True).stdout == b"", "it is stopped")


def test_an_isolated_node_gives_up_and_follows_afterwards(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    site.lab.cut()
    public.unplug(site.lab.network, "one")
    wait_served_by(site, "two")
    wait_for(lambda: site.posture("one") == "idle", "one has stopped")
    said = site.says("one")
    assert said is not None
    assert said["addresses"] == "down"
    site.lab.heal()
    site.lab.wait_mirrored()
    assert site.lab.primary() is site.lab.two


@pytest.mark.parametrize("alone", [False, True])
def test_who_knows_that_the_primary_went_on_alone_is_not_promoted_by_itself(
    make_cluster: Callable[..., Cluster], alone: bool
) -> None:
    site = make_cluster(arbiter='[arbiter]\nkind = "none"\nallow_unarbitrated = true')
    if alone:
        site.lab.cut()  # the mounts' link, while the controllers hear each other over the other network
        wait_for(lambda: bool((site.says("two") or {"peer": {}})["peer"].get("alone")), "it goes on alone, and is heard")
        (site.lab.one.mount / "alone").write_text("acknowledged")
    site.kill_host("one")
    if not alone:
        wait_served_by(site, "two")
        return
    wait_for(lambda: "went on alone" in trouble(site, "two"), "it is refused")
    site.kill_controller("two")
    site.start_controller("two")
    wait_for(lambda: "went on alone" in trouble(site, "two"), "a controller that has not heard of it is refused, too")
    assert site.lab.two.status()["state"] == "waiting"
    site.lab.heal()
    site.lab.one.start()
    site.start_controller("one")
    wait_served_by(site, "one")
    site.lab.wait_mirrored()
    assert (site.lab.two.mount / "alone").read_text() == "acknowledged"


def test_without_the_arbiter_a_healthy_pair_goes_on(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    site.etcd.stop_member(0)
    wait_for(lambda: not site.lab.one.status()["arbiter"]["answers"], "one says that the arbiter is gone")
    assert served_by(site) == "one"
    assert "serves" in site.command("one", "switchover")
    wait_served_by(site, "two")


def test_a_preview_of_a_switch_over_knows_what_the_services_took_the_last_time(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    first = control.request(site.lab.two.control.with_suffix(".ctl"), "promote", dry_run=True)
    assert (first["does"], first["against"], first["services"]) == ("switch-over", "", {"stop_s": None, "start_s": None})
    site.command("two", "switchover")
    wait_served_by(site, "two")
    site.command("two", "switchover")
    wait_served_by(site, "one")
    site.lab.wait_mirrored()
    second = control.request(site.lab.two.control.with_suffix(".ctl"), "promote", dry_run=True)["services"]
    assert second["stop_s"] > 0
    assert second["start_s"] > 0
    assert served_by(site) == "one", "nothing was moved"


def test_a_switch_over_in_maintenance_starts_the_application_on_the_other_node(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    site.command("two", "maintenance", on=True)
    wait_for(lambda: bool((site.says("one") or {}).get("maintenance")), "the other controller knows")
    assert "the other node serves" in site.command("one", "switchover")
    wait_served_by(site, "two")


def test_the_preferred_node_gets_the_application_back(make_cluster: Callable[..., Cluster]) -> None:
    preferred = 'detection_timeout = "1500ms"\nfailback = "preferred"\npreferred = "one"\nfailback_after = "1s"'
    site = make_cluster(failover=preferred)
    site.kill_host("one")
    wait_served_by(site, "two")
    site.lab.one.start()
    site.start_controller("one")
    wait_served_by(site, "one")
    site.lab.wait_mirrored()
    assert site.lab.primary() is site.lab.one


def test_an_ipv6_address_moves_with_the_application(make_cluster: Callable[..., Cluster]) -> None:
    ask = f"import socket; print(socket.create_connection(('{ADDRESS6}', 7000), timeout=1).recv(100).decode())"
    services = f'[[vip]]\naddress = "{ADDRESS6}/64"\ninterface = "{public.INTERFACE}"\n' + SERVICE.replace(
        'socket.create_server(("", 7000))',
        'socket.create_server(("", 7000), family=socket.AF_INET6, dualstack_ipv6=True)',
    )
    site = make_cluster(services, start=False)
    assert site.at_desk("ip", "address", "add", "fd79::9/64", "dev", "bridge", "nodad").returncode == 0
    site.start_controllers()

    def answers(name: str) -> None:
        wait_for(lambda: site.at_desk("python3", "-c", ask).stdout.strip() == name, f"{name} answers at the IPv6 address")

    answers("one")
    site.kill_host("one")
    answers("two")
    wait_served_by(site, "two")


def test_a_service_that_never_ends_does_not_keep_a_mount_that_hangs(make_cluster: Callable[..., Cluster]) -> None:
    """It waits in a call to the mount, and its stop command for it: the addresses go, the mount is killed, it ends."""
    service = SERVICE.replace(
        "    connection, _ = server.accept()\n",
        "    connection, _ = server.accept()\n    pathlib.Path(sys.argv[1], 'asked').write_text('x')\n",
    ).replace("pkill -KILL -f $LAB_MOUNT/echo.py || true", "cat $LAB_MOUNT/asked; sleep 1000")
    place = service.index("[[service.check]]")
    site = make_cluster(service[:place] + 'stop_timeout = "2s"\n' + service[place:])
    for pid in site.lab.one.pids():
        os.kill(pid, signal.SIGSTOP)
    wait_served_by(site, "two")
    wait_for(lambda: site.posture("one") == "idle", "one has stopped")
    assert site.lab.one.run("pgrep", "-f", f"{site.lab.one.mount}/echo.py", capture_output=True).stdout == b""


def test_a_service_that_outlived_its_controller_and_its_mount_ends_on_the_standby(make_cluster: Callable[..., Cluster]) -> None:
    """Its check fails, and it is there."""
    service = SERVICE.replace('pathlib.Path(sys.argv[1], "served-by").read_bytes()', "sys.argv[2].encode()")
    site = make_cluster(f'{service}[[service.check]]\ncommand = "test -e $LAB_MOUNT/served-by"\ninterval = "300ms"\n')
    one = site.lab.one
    site.kill_controller("one")
    one.kill()
    wait_served_by(site, "two")
    left = ("pgrep", "-f", f"{one.mount}/echo.py")
    assert one.run(*left, capture_output=True).stdout != b""
    one.start()
    site.start_controller("one")
    wait_for(lambda: one.run(*left, capture_output=True).stdout == b"", "it is stopped")
    assert served_by(site) == "two"


def test_in_maintenance_nothing_is_done(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    site.command("two", "maintenance", on=True)
    wait_for(lambda: bool((site.says("one") or {}).get("maintenance")), "the other controller knows")
    site.lab.one.kill()
    wait_for(lambda: site.posture("one") == "idle", "one has stopped")
    wait_for(lambda: site.lab.two.status()["peer"]["state"] == "disconnected", "two has noticed")
    assert site.posture("two") == "idle"
    site.command("two", "maintenance", on=False)
    wait_served_by(site, "two")


def test_a_killed_controller_leaves_no_address_and_a_new_one_takes_the_application_over(
    make_cluster: Callable[..., Cluster],
) -> None:
    site = make_cluster()
    site.kill_controller("one")
    shown = ("ip", "-o", "address", "show", "to", ADDRESS)
    wait_for(lambda: site.lab.one.run(*shown, capture_output=True).stdout == b"", "the kernel has dropped the address")
    left = ("pgrep", "-f", f"{site.lab.one.mount}/echo.py")
    pids = site.lab.one.run(*left, capture_output=True).stdout
    site.start_controller("one")
    wait_served_by(site, "one")
    assert site.lab.one.run(*left, capture_output=True).stdout == pids, "it was not started anew"


def test_a_new_controller_does_not_stop_the_application_before_it_knows_the_mount(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster(failover='detection_timeout = "30s"')
    left = ("pgrep", "-f", f"{site.lab.one.mount}/echo.py")
    pids = site.lab.one.run(*left, capture_output=True).stdout
    site.kill_controller("one")
    mount = site.lab.one.pids()

    def send(number: signal.Signals) -> None:
        for pid in mount:
            os.kill(pid, number)

    send(signal.SIGSTOP)
    goes_on = threading.Timer(2, send, (signal.SIGCONT,))
    goes_on.start()
    try:
        site.start_controller("one")
    finally:
        goes_on.join()
    wait_served_by(site, "one")
    assert site.lab.one.run(*left, capture_output=True).stdout == pids, "it was not started anew"


def test_a_service_that_does_not_start_anywhere_ends_in_a_hold_that_says_why(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster('[[service]]\nname = "bad"\nstart = "echo no license; exit 3"\n', start=False)
    for name in ("one", "two"):
        site.start_controller(name)
    wait_for(lambda: "held" in (site.posture("one"), site.posture("two")), "it stops and says so")
    name = next(name for name in ("one", "two") if site.posture(name) == "held")
    said = site.says(name)
    assert said is not None
    assert "no license" in said["trouble"]
    assert said["addresses"] == "down"


def test_an_address_that_another_machine_has_is_not_raised_and_its_mac_is_told(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster(start=False)
    assert site.at_desk("ip", "address", "add", f"{ADDRESS}/24", "dev", "bridge").returncode == 0
    for name in ("one", "two"):
        site.start_controller(name)
    wait_for(lambda: site.posture("one") == "serving", "the service runs")
    wait_for(lambda: "in use by another machine" in trouble(site, "one"), "it says so")
    mac = site.at_desk("cat", "/sys/class/net/bridge/address").stdout.strip()
    assert mac in trouble(site, "one")
    assert not site.is_serving("one")
    assert site.at_desk("ip", "address", "del", f"{ADDRESS}/24", "dev", "bridge").returncode == 0
    wait_served_by(site, "one")


def test_an_interface_that_is_not_there_is_named(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster('[[vip]]\naddress = "10.79.0.101/24"\ninterface = "eth7"\n' + SERVICE, start=False)
    site.start_controller("one")
    wait_for(lambda: "eth7" in trouble(site, "one"), "it is named")
    assert not site.is_serving("one")


def test_a_service_that_does_not_stop_is_killed_and_the_role_moves_all_the_same(make_cluster: Callable[..., Cluster]) -> None:
    stubborn = SERVICE.replace("pkill -KILL -f $LAB_MOUNT/echo.py || true", "sleep 1000") + 'stop_timeout = "1s"\n'
    place = stubborn.index("[[service.check]]")
    site = make_cluster(stubborn[:place] + 'stop_timeout = "1s"\n' + stubborn[place:].replace('stop_timeout = "1s"\n', ""))
    assert "serves" in site.command("one", "switchover")
    wait_served_by(site, "two")
    assert "did not stop" in trouble(site, "one")


def test_with_another_configuration_on_the_other_node_nothing_happens_by_itself(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    two = site.lab.two
    two.config.write_text(two.config.read_text().replace('detection_timeout = "1500ms"', 'detection_timeout = "2s"'))
    site.kill_controller("two")
    two.kill()
    two.start()
    site.start_controller("two")
    site.lab.wait_mirrored()
    expected = ['failover.detection_timeout is "2s" here and "1500ms" on one']
    assert two.status()["differences"] == expected
    site.kill_host("one")
    wait_for(lambda: "failover.detection_timeout" in trouble(site, "two"), "two says why it does nothing")
    assert site.posture("two") in ("idle", "taking")


def hears(site: Cluster, name: str) -> bool:
    said = site.says(name)
    return said is not None and bool(said["peer"]["heard"])


def test_controllers_hear_each_other_again_after_a_node_was_replaced(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster()
    one, two = site.lab.one, site.lab.two
    site.kill_controller("two")
    two.stop()
    wait_for(lambda: not hears(site, "one"), "the controller that stays hears nobody")
    shutil.rmtree(two.keys)
    program = (sys.executable, "-m", "mirrorfs")
    init = one.popen(*program, "init", "lab", "--config", one.config, stdout=subprocess.PIPE, text=True)
    assert init.stdout is not None
    code = next(found[1] for line in init.stdout if (found := re.search(r"mirrorfs join (\S+)", line)))
    two.run(*program, "join", code, "--config", two.config, check=True)
    init.communicate(timeout=60)
    assert init.returncode == 0
    two.start()
    site.start_controller("two")
    wait_for(lambda: hears(site, "one") and hears(site, "two"), "both hear each other")
    site.lab.wait_mirrored()
    assert "serves" in site.command("two", "promote")
    wait_served_by(site, "two")


def test_a_controller_without_its_keys_says_what_to_do(make_cluster: Callable[..., Cluster]) -> None:
    site = make_cluster(start=False)
    site.lab.one.keys.rename(site.lab.one.home / "away")
    with pytest.raises(MirrorfsError, match="mirrorfs init"):
        site.start_controller("one")
    (site.lab.one.home / "away").rename(site.lab.one.keys)
