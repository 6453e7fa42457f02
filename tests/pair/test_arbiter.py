"""A pair with an arbiter, a real etcd on a third host: who goes on when the two cannot see each other, and who must not."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mirrorfs import control
from mirrorfs.core import claims
from mirrorfs.core.epochs import Epoch
from mirrorfs.errors import RefusedError
from mirrorfs.lab import public
from mirrorfs.lab.etcd import EtcdCluster
from mirrorfs.lab.network import DESK
from mirrorfs.lab.pair import Host, Lab, wait_for
from tests.pair.support import Load, lose_disks, state, tree_differences, wait_peer_lost, wait_state

pytestmark = pytest.mark.root

KEY = "/mirrorfs/lab"
ARBITER = f'[arbiter]\nkind = "etcd"\nendpoints = ["http://{public.PUBLIC[DESK]}:2379"]\ntimeout = "500ms"\n'


@dataclass
class Site:
    """A mirrored pair and its arbiter."""

    lab: Lab
    etcd: EtcdCluster

    @property
    def granted(self) -> Epoch:
        """What the arbiter holds, as soon as it holds anything."""
        wait_for(lambda: self.value != "", "there is a record")
        return claims.unpack(self.value.encode())[1]

    @property
    def value(self) -> str:
        """What stands there, as text."""
        return self.etcd.etcdctl("get", KEY, "--print-value-only")

    def isolate(self, host: Host) -> None:
        """Cut a host from everything."""
        self.lab.cut()
        public.unplug(self.lab.network, host.name)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        directory = tmp_path / "lab"
        stack.callback(Lab(directory).down)
        lab = Lab.create(directory, options={"ack_timeout": "1s", "freeze_timeout": "2s"}, sections=ARBITER, desk=True)
        etcd = EtcdCluster(
            tmp_path / "etcd", address=lambda member: public.PUBLIC[DESK], port=2379, entering=lab.network.entering(DESK)
        )
        stack.enter_context(etcd)
        lab.run_all()
        found = Site(lab, etcd)
        wait_for(lambda: found.granted.has("two"), "the arbiter knows that both are in sync")
        yield found


def _writes(host: Host) -> bool:
    try:
        with open(host.mount / "probe", "w") as file:
            file.write(host.name)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EROFS):
            raise
        return False
    return True


def _is_alone_by_the_arbiter(site: Site, host: Host) -> bool:
    return {member.node for member in site.granted.in_sync} == {host.name} == {site.granted.primary}


def _misses_the_arbiter(host: Host) -> bool:
    return not host.status()["arbiter"]["answers"]


def _take_over(host: Host) -> None:
    """What a controller does, again and again."""

    def promoted() -> bool:
        try:
            host.promote(automatic=True)
        except RefusedError:
            return False
        return True

    wait_for(promoted, f"{host.name} is promoted by itself")


def test_a_primary_that_loses_its_peer_asks_before_it_goes_on(site: Site) -> None:
    before = site.granted
    site.lab.two.kill()
    wait_state(site.lab.one, "solo")
    assert _is_alone_by_the_arbiter(site, site.lab.one)
    assert site.granted.number > before.number
    assert _writes(site.lab.one)
    site.lab.two.start()
    site.lab.wait_mirrored()
    wait_for(lambda: site.granted.has("two"), "the arbiter learns that two is back")


def test_a_standby_takes_over_with_nobody_asked_but_the_arbiter(site: Site, start_load: Callable[..., Load]) -> None:
    load = start_load(site.lab.one.mount)
    load.wait_noted(100)
    site.lab.one.kill()
    wait_peer_lost(site.lab.two)
    _take_over(site.lab.two)
    load.ended()
    assert load.missing(site.lab.two.mount) == []
    assert _is_alone_by_the_arbiter(site, site.lab.two)
    site.lab.one.start()
    site.lab.wait_mirrored()
    assert site.lab.primary() is site.lab.two
    assert tree_differences(site.lab) == []


@pytest.mark.parametrize("near", ["one", "two", "both"])
def test_in_a_partition_exactly_one_side_goes_on_and_the_other_follows_it_afterwards(site: Site, near: str) -> None:
    """Whichever side the arbiter is on."""
    one, two = site.lab.one, site.lab.two
    descriptor = os.open(one.mount / "open", os.O_RDWR | os.O_CREAT)
    try:
        site.lab.cut()
        public.part(site.lab.network)
        if near != "both":
            public.unplug(site.lab.network, "two" if near == "one" else "one")
        wait_peer_lost(two)
        if near == "two":
            _take_over(two)
        else:
            wait_state(one, "solo")
            with pytest.raises(RefusedError, match=r"granted epoch|nobody knows"):
                two.promote(automatic=True)
        winner, loser = (two, one) if near == "two" else (one, two)
        assert _writes(winner)
        assert not _writes(loser)
        site.lab.heal()
        site.lab.wait_mirrored()
        assert site.lab.primary() is winner
        assert tree_differences(site.lab) == []
        if winner is two:
            with pytest.raises(OSError) as caught:
                os.write(descriptor, b"late")
            assert caught.value.errno == errno.EROFS
    finally:
        os.close(descriptor)


def test_a_primary_that_sees_nobody_freezes_and_thaws_when_nothing_has_happened(site: Site) -> None:
    one = site.lab.one
    site.isolate(one)
    wait_for(lambda: one.status()["reason"].startswith("frozen"), "one says that it is frozen")
    assert state(one) == "waiting"
    assert not _writes(one)
    site.lab.heal()
    site.lab.wait_mirrored()
    assert site.lab.primary() is one
    assert _writes(one)
    assert tree_differences(site.lab) == []


def test_a_pair_that_sees_itself_but_no_arbiter_goes_on_and_says_so(site: Site) -> None:
    epoch = site.lab.one.status()["epoch"]
    site.etcd.stop_member(0)
    for host in site.lab.hosts.values():
        wait_for(partial(_misses_the_arbiter, host), f"{host.name} says that the arbiter is gone")
    assert _writes(site.lab.one)
    assert site.lab.is_mirrored()
    assert site.lab.one.status()["epoch"] == epoch
    site.lab.two.promote()
    site.lab.wait_mirrored()
    assert site.lab.primary() is site.lab.two, "a clean switch-over needs no arbiter"
    site.etcd.start_member(0)
    wait_for(lambda: site.granted.primary == "two", "the arbiter learns of it")


def test_with_the_arbiter_gone_and_then_the_peer_a_primary_waits_for_either(site: Site) -> None:
    site.etcd.stop_member(0)
    site.lab.two.kill()
    wait_state(site.lab.one, "waiting")
    assert not _writes(site.lab.one)
    site.etcd.start_member(0)
    wait_state(site.lab.one, "solo")
    assert _writes(site.lab.one)
    assert _is_alone_by_the_arbiter(site, site.lab.one)


def test_an_arbiter_that_was_restored_from_a_backup_decides_nothing(site: Site) -> None:
    backup = site.etcd.snapshot()
    site.lab.two.kill()
    wait_state(site.lab.one, "solo")
    site.lab.two.start()
    site.lab.wait_mirrored()
    wait_for(lambda: site.granted.has("two"), "the arbiter learns that two is back")
    site.lab.cut()
    public.part(site.lab.network)
    wait_state(site.lab.one, "solo")
    site.lab.one.kill()
    site.etcd.restore(backup)
    wait_peer_lost(site.lab.two)
    with pytest.raises(RefusedError, match="not the one that decided before"):
        site.lab.two.promote(automatic=True)
    assert state(site.lab.two) == "waiting"


def test_a_healthy_pair_writes_its_epoch_to_an_arbiter_that_has_lost_it(site: Site) -> None:
    site.etcd.etcdctl("del", KEY)
    wait_for(lambda: site.value != "", "the record is written anew")
    assert site.granted.has("one")
    assert site.granted.has("two")


def test_an_operator_may_promote_without_the_arbiter_and_a_lost_claim_stops_that_node(site: Site) -> None:
    one, two = site.lab.one, site.lab.two
    site.lab.cut()
    public.part(site.lab.network)
    public.unplug(site.lab.network, "two")
    wait_state(one, "solo")
    wait_peer_lost(two)
    with pytest.raises(RefusedError, match="--force"):
        two.promote(yes=True)
    two.promote(force=True)
    assert _writes(two)
    public.heal(site.lab.network)
    public.part(site.lab.network)
    wait_state(two, "waiting")
    assert "deposed" in two.status()["reason"]
    assert not _writes(two)
    assert _writes(one)


def test_a_preview_asks_the_arbiter_and_claims_nothing(site: Site) -> None:
    site.lab.cut()
    public.part(site.lab.network)
    wait_state(site.lab.one, "solo")
    wait_peer_lost(site.lab.two)
    before = site.value
    found = control.request(site.lab.two.control, "promote", dry_run=True)
    assert (found["does"], found["exit_status"]) == ("promotion", RefusedError.exit_status)
    assert "one was granted epoch" in found["missing"]
    assert (site.value, state(site.lab.two)) == (before, "waiting")


def test_a_new_volume_takes_the_place_of_one_that_the_arbiter_knows_by_force_only(site: Site) -> None:
    two = site.lab.two
    for host in (site.lab.one, two):
        host.kill()
    lose_disks(two)
    two.start()
    with pytest.raises(RefusedError, match="knows a volume of that name, which one led last"):
        two.promote(yes=True)
    assert state(two) == "waiting"
    old = site.granted
    two.promote(force=True)
    wait_for(lambda: site.granted.primary == "two", "the record is that of the new volume")
    assert not site.granted.same(old)
    assert _writes(two)


def test_an_empty_node_is_not_promoted_past_one_that_has_the_volume(site: Site) -> None:
    one, two = site.lab.one, site.lab.two
    for host in (one, two):
        host.kill()
    lose_disks(two)
    one.boot.write_text("another")  # it was restarted while in sync: a person has to choose
    one.start()
    two.start()
    wait_for(lambda: "is new" in two.status()["reason"], "they meet")
    with pytest.raises(RefusedError, match="holds nothing of the volume yet and one does"):
        two.promote(force=True)
    one.promote(force=True)
    site.lab.wait_mirrored()
    assert site.lab.primary() is one
