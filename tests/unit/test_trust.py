"""Keys and certificates: made, renewed, refused."""

import datetime
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mirrorfs.channel import Channel
from mirrorfs.errors import ConfigError, LinkLostError, MirrorfsError, ProtocolError
from mirrorfs.lab.configuration import acquaint
from mirrorfs.trust import LINK_DAYS, WARN_DAYS, Trust

DAY = datetime.timedelta(days=1)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Trust, Trust]:
    """The keys of two nodes that trust each other."""
    one, two = tmp_path / "one" / "keys", tmp_path / "two" / "keys"
    acquaint(one, two)
    return Trust(one), Trust(two)


def shake_hands(server: Channel, client: Channel) -> None:
    """Until both are done; raises what either raises, after the other has heard of it."""
    done = [False, False]
    while not all(done):
        for index, (own, other) in enumerate(((client, server), (server, client))):
            try:
                done[index] = own.shake_hands()
            finally:
                other.arrived(own.to_send())


def channels(one: Trust, two: Trust, *, encrypted: tuple[bool, bool] = (True, True)) -> tuple[Channel, Channel]:
    server = Channel(one.context(server_side=True, encrypted=encrypted[0]), server_side=True)
    client = Channel(two.context(server_side=False, encrypted=encrypted[1]), server_side=False)
    return server, client


@pytest.mark.parametrize("encrypted", [True, False])
def test_two_nodes_that_trust_each_other_talk(pair: tuple[Trust, Trust], encrypted: bool) -> None:
    server, client = channels(*pair, encrypted=(encrypted, encrypted))
    shake_hands(server, client)
    secret = b"a secret of some length" * 10
    (sealed,) = client.seal(secret)
    assert (secret in sealed) is not encrypted
    server.arrived(sealed)
    assert server.plain(1000) == secret


@pytest.mark.parametrize("more", [b"", b"and more"])
def test_who_says_that_he_will_say_no_more_ends_the_link(pair: tuple[Trust, Trust], more: bytes) -> None:
    server, client = channels(*pair)
    shake_hands(server, client)
    with pytest.raises(ssl.SSLWantReadError):
        client._tls.unwrap()
    said = client.to_send() + more
    server.room[: len(said)] = said
    with pytest.raises(LinkLostError, match="closed"):
        list(server.received(len(said)))


@pytest.mark.parametrize("encrypted", [True, False])
def test_what_is_changed_or_said_again_is_refused(pair: tuple[Trust, Trust], encrypted: bool) -> None:
    server, client = channels(*pair, encrypted=(encrypted, encrypted))
    shake_hands(server, client)
    (first,) = client.seal(b"first")
    server.arrived(first)
    assert server.plain(1000) == b"first"
    server.arrived(first)
    with pytest.raises(ProtocolError, match="changed on its way"):
        server.plain(1000)


def test_records_in_another_order_are_refused(pair: tuple[Trust, Trust]) -> None:
    server, client = channels(*pair)
    shake_hands(server, client)
    (_,), (second,) = client.seal(b"first"), client.seal(b"second")
    server.arrived(second)
    with pytest.raises(ProtocolError, match="changed on its way"):
        server.plain(1000)


def test_a_whole_conversation_that_was_captured_says_nothing_the_second_time(pair: tuple[Trust, Trust]) -> None:
    server, client = channels(*pair)
    captured = []
    done = [False, False]
    while not all(done):
        done[0] = client.shake_hands()
        captured.append(client.to_send())
        server.arrived(captured[-1])
        done[1] = server.shake_hands()
        client.arrived(server.to_send())
    captured += client.seal(b"what was said")
    server.arrived(captured[-1])
    assert server.plain(1000) == b"what was said"
    again = Channel(pair[0].context(server_side=True), server_side=True)
    for said in captured:
        again.arrived(said)
    with pytest.raises(ProtocolError):
        again.shake_hands()


@pytest.mark.parametrize("encrypted", [True, False])
def test_any_bit_that_was_changed_on_the_way_is_noticed(pair: tuple[Trust, Trust], encrypted: bool) -> None:
    for bit in range(0, 8 * 60, 7):
        server, client = channels(*pair, encrypted=(encrypted, encrypted))
        shake_hands(server, client)
        (sealed,) = client.seal(b"some bytes " * 10)
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        server.arrived(bytes(damaged))
        try:
            assert server.plain(1000) == b"", bit
        except ProtocolError:
            continue
        assert 24 <= bit < 40, "a length that grew: it waits for the rest"


@pytest.mark.parametrize("stranger", ["server", "client"])
def test_a_node_with_another_identity_is_refused(pair: tuple[Trust, Trust], tmp_path: Path, stranger: str) -> None:
    other = Trust(tmp_path / "other")
    other.make("one" if stranger == "server" else "two")
    trusted = pair[1] if stranger == "server" else pair[0]
    other.pin(trusted.identity.read_bytes())
    server, client = channels(other, pair[1]) if stranger == "server" else channels(pair[0], other)
    with pytest.raises(ProtocolError, match="its certificate is not that of the other node"):
        shake_hands(server, client)


def test_one_that_encrypts_and_one_that_does_not_say_so(pair: tuple[Trust, Trust]) -> None:
    server, client = channels(*pair, encrypted=(True, False))
    with pytest.raises(ProtocolError, match="encryption"):
        shake_hands(server, client)


def test_a_certificate_that_has_ended_is_refused_and_made_anew(pair: tuple[Trust, Trust]) -> None:
    one, two = pair
    two.renew(now=now() - (LINK_DAYS + 1) * DAY)
    old = (two.directory / "link.pem").read_bytes()
    assert "ends in 0 days" in two.warning()
    client = Channel(_context_as_it_is(two), server_side=False)
    server = Channel(one.context(server_side=True), server_side=True)
    with pytest.raises(ProtocolError, match="expired"):
        shake_hands(server, client)
    shake_hands(*channels(one, two))
    assert (two.directory / "link.pem").read_bytes() != old
    assert two.warning() == ""


def _context_as_it_is(trust: Trust) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_cert_chain(trust.directory / "link.pem")
    context.load_verify_locations(trust.peer)
    return context


def test_a_certificate_is_made_anew_long_before_it_ends_and_its_end_is_told(pair: tuple[Trust, Trust]) -> None:
    one, _ = pair
    assert one.renew()
    assert not one.renew(now=now() + (LINK_DAYS // 3 - 1) * DAY)
    assert one.warning(now=now() + (LINK_DAYS - WARN_DAYS - 1) * DAY) == ""
    assert "link.pem" in one.warning(now=now() + (LINK_DAYS - WARN_DAYS + 1) * DAY)
    assert one.renew(now=now() + (LINK_DAYS // 3 + 1) * DAY)


def test_a_certificate_is_made_once_by_several_who_come_together(pair: tuple[Trust, Trust]) -> None:
    with ThreadPoolExecutor(8) as executor:
        assert sum(executor.map(lambda _: pair[0].renew(), range(32))) == 1
    assert sorted(path.name for path in pair[0].directory.iterdir()) == ["identity.key", "identity.pem", "link.pem", "peer.pem"]


@pytest.mark.parametrize("harm", ["unreadable", "another mode", "gone"])
def test_a_certificate_that_cannot_be_made_anew_does_not_take_the_present_one_away(
    pair: tuple[Trust, Trust], harm: str
) -> None:
    one, two = pair
    one.renew(now=now() - (LINK_DAYS // 3 + 1) * DAY)
    identity, key = one.identity, one.directory / "identity.key"
    match harm:
        case "unreadable":
            identity.write_text("no certificate")
        case "another mode":
            key.chmod(0o644)
        case _:
            key.unlink()
    with pytest.raises(MirrorfsError):
        one.renew()
    shake_hands(*channels(one, two))
    (one.directory / "link.pem").unlink()
    with pytest.raises(MirrorfsError):
        one.context(server_side=True)


def test_a_context_is_made_once_and_anew_when_either_certificate_is_another_one(
    pair: tuple[Trust, Trust], tmp_path: Path
) -> None:
    one, two = pair
    first = one.context(server_side=True)
    assert one.context(server_side=True) is first
    assert one.context(server_side=False) is not first
    one.renew(now=now() + LINK_DAYS / 2 * DAY)
    second = one.context(server_side=True)
    assert second is not first
    stranger = Trust(tmp_path / "stranger")
    stranger.make("stranger")
    one.pin(stranger.identity.read_bytes())
    with pytest.raises((LinkLostError, ProtocolError)):
        shake_hands(*channels(one, two))


def test_keys_are_for_their_owner_only(pair: tuple[Trust, Trust]) -> None:
    one, _ = pair
    one.renew()
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in one.directory.iterdir()}
    assert modes == {"identity.key": "0o600", "link.pem": "0o600", "identity.pem": "0o644", "peer.pem": "0o644"}
    (one.directory / "identity.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        one.check()


def test_an_identity_stays(pair: tuple[Trust, Trust]) -> None:
    before = pair[0].identity.read_bytes()
    pair[0].make("one")
    assert pair[0].identity.read_bytes() == before


@pytest.mark.parametrize("missing", ["identity.pem", "identity.key", "peer.pem"])
def test_what_is_missing_is_named(pair: tuple[Trust, Trust], missing: str) -> None:
    (pair[0].directory / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        pair[0].check()


@pytest.mark.parametrize("content", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_only_an_identity_is_pinned(pair: tuple[Trust, Trust], content: bytes) -> None:
    before = pair[0].peer.read_bytes()
    with pytest.raises(MirrorfsError, match="no identity of a node"):
        pair[0].pin(content)
    assert pair[0].peer.read_bytes() == before


def test_the_certificate_of_a_link_is_no_identity(pair: tuple[Trust, Trust]) -> None:
    one, two = pair
    two.renew()
    with pytest.raises(MirrorfsError, match="no identity of a node"):
        one.pin((two.directory / "link.pem").read_bytes())
