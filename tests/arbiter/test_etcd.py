"""The arbiter of the kind etcd, against real clusters."""

import re
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from mirrorfs import arbiter
from mirrorfs.arbiter import ArbiterUnreachableError, Etcd, Reading
from mirrorfs.errors import MirrorfsError
from mirrorfs.lab.etcd import EtcdCluster, make_certificates

from .conftest import PASSWORD, Between, receive_request, serving, written

RANGE, TXN, LOGIN = "/v3/kv/range", "/v3/kv/txn", "/v3/auth/authenticate"


def unused_endpoint() -> str:
    """One where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


async def failure(etcd: Etcd, *, swap: bool = False) -> str:
    """What a reading or a swap for nothing says when it fails, which has to be one line."""
    with pytest.raises(ArbiterUnreachableError) as caught:
        await (etcd.swap(0, b"value") if swap else etcd.read())
    (line,) = str(caught.value).splitlines()
    return line


async def hang(stream: trio.SocketStream) -> None:
    """A member that stands still."""
    await trio.sleep_forever()


# One member


async def test_a_key_that_is_not_there_is_read_as_nothing(alone: EtcdCluster, key: str) -> None:
    reading = await Etcd(alone.config(), key).read()
    assert (reading.key_revision, reading.value) == (0, None)
    assert reading.cluster.isdecimal()
    assert reading.revision > 0


async def test_a_swap_for_nothing_makes_the_key(alone: EtcdCluster, key: str) -> None:
    etcd = Etcd(alone.config(), key)
    before = await etcd.read()
    done = await etcd.swap(0, b"first")
    assert done == Reading(before.cluster, before.revision + 1, before.revision + 1, b"first")
    assert await etcd.read() == done


async def test_a_swap_for_nothing_loses_to_what_is_there(alone: EtcdCluster, key: str) -> None:
    mine, theirs = Etcd(alone.config(), key), Etcd(alone.config(), key)
    done = await theirs.swap(0, b"theirs")
    assert await mine.swap(0, b"mine") is None
    assert await mine.read() == done


async def test_a_swap_wins_with_the_newest_revision_of_the_key_and_loses_with_an_older_one(
    alone: EtcdCluster, key: str
) -> None:
    etcd = Etcd(alone.config(), key)
    first = await etcd.swap(0, b"first")
    assert first is not None
    second = await etcd.swap(first.key_revision, b"second")
    assert second is not None
    assert await etcd.swap(first.key_revision, b"third") is None
    assert await etcd.read() == second


async def test_other_keys_change_the_revision_of_the_store_and_not_of_the_key(alone: EtcdCluster, key: str) -> None:
    etcd = Etcd(alone.config(), key)
    done = await etcd.swap(0, b"value")
    assert done is not None
    await Etcd(alone.config(), f"{key}/other").swap(0, b"other")
    reading = await etcd.read()
    assert reading == replace(done, revision=done.revision + 1)
    assert await etcd.swap(reading.key_revision, b"next") is not None


@pytest.mark.parametrize("value", [b"", bytes(range(256))], ids=["none", "every byte"])
async def test_any_value_is_read_as_it_was_written(alone: EtcdCluster, key: str, value: bytes) -> None:
    etcd = Etcd(alone.config(), key)
    done = await etcd.swap(0, value)
    assert done is not None
    assert await etcd.read() == done
    assert done.value == value


async def test_of_many_swaps_at_once_one_wins(alone: EtcdCluster, key: str) -> None:
    won: list[bytes] = []

    async def swap(value: bytes) -> None:
        if await Etcd(alone.config(timeout_s=10), key).swap(0, value):
            won.append(value)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(swap, b"%d" % number)
    assert [(await Etcd(alone.config(), key).read()).value] == won


async def test_no_proxy_of_the_environment_stands_between(
    alone: EtcdCluster, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", unused_endpoint())
    await Etcd(alone.config(), key).read()


async def test_it_is_called_after_its_endpoints(alone: EtcdCluster, key: str) -> None:
    assert Etcd(alone.config(), key).name == f"etcd at {alone.endpoints[0]}"


# Several endpoints


async def test_an_endpoint_where_nobody_listens_is_passed_over(alone: EtcdCluster, key: str) -> None:
    config = replace(alone.config(), endpoints=(unused_endpoint(), *alone.endpoints))
    done = await Etcd(config, key).swap(0, b"value")
    assert await Etcd(config, key).read() == done


async def test_a_failure_names_each_endpoint_with_its_own_reason(alone: EtcdCluster, key: str) -> None:
    one, two = unused_endpoint(), "http://127.0.0.1:port"
    line = await failure(Etcd(replace(alone.config(), endpoints=(one, two)), key), swap=True)
    assert line == f"the arbiter was not reached: {one}: Connection refused; {two}: Invalid port: 'port'"


async def test_a_reading_goes_on_behind_an_endpoint_that_hangs(alone: EtcdCluster, key: str) -> None:
    async with serving(hang) as hanging:
        await Etcd(replace(alone.config(), endpoints=(hanging, *alone.endpoints)), key).read()


async def test_a_swap_never_goes_on_behind_an_endpoint_that_it_may_have_reached(alone: EtcdCluster, key: str) -> None:
    way = Between(alone.endpoints[0], keeping=(TXN,))
    async with serving(way) as endpoint:
        etcd = Etcd(replace(alone.config(), endpoints=(endpoint, *alone.endpoints)), key)
        line = await failure(etcd, swap=True)
        assert line.startswith("the arbiter did not say whether it made the change")
        assert way.paths == [TXN]
        assert (await etcd.read()).value == b"value"
        # An endpoint that did not answer is not the one to begin with the next time.
        assert way.paths == [TXN]


async def test_a_swap_whose_answer_is_lost_fails_and_can_be_read_back(alone: EtcdCluster, key: str) -> None:
    way = Between(alone.endpoints[0], keeping=(TXN,), hanging=True)
    async with serving(way) as endpoint:
        etcd = Etcd(replace(alone.config(timeout_s=0.5), endpoints=(endpoint,)), key)
        line = await failure(etcd, swap=True)
        assert line == f"the arbiter did not say whether it made the change: etcd at {endpoint}: no answer within 0.5 s"
        assert (await etcd.read()).value == b"value"


async def test_no_connection_is_used_twice(alone: EtcdCluster, key: str) -> None:
    # `Between` closes each after its answer: one that is used again would look like a swap without an answer.
    way = Between(alone.endpoints[0])
    async with serving(way) as endpoint:
        etcd = Etcd(replace(alone.config(), endpoints=(endpoint,)), key)
        done = await etcd.swap(0, b"first")
        assert done is not None
        assert await etcd.swap(done.key_revision, b"second") is not None
    assert way.paths == [TXN, TXN]


async def test_with_one_member_of_three_away_it_goes_on_and_with_two_it_does_not(three: EtcdCluster, key: str) -> None:
    etcd = Etcd(three.config(timeout_s=10), key)
    first = await etcd.swap(0, b"first")
    assert first is not None
    three.kill_member(0)
    second = await _swap_until_done(etcd, first.key_revision, b"second")
    three.kill_member(1)
    # What is left answers the connection and cannot answer the question.
    line = await failure(Etcd(three.config(timeout_s=1), key))
    assert line.startswith(("the arbiter does not answer", "the arbiter was not reached"))
    assert "no answer within" in line
    line = await failure(Etcd(replace(three.config(timeout_s=1), endpoints=three.endpoints[2:]), key), swap=True)
    assert line.startswith("the arbiter did not say whether it made the change")
    await trio.to_thread.run_sync(partial(three.start_member, 0))
    await trio.to_thread.run_sync(partial(three.start_member, 1))
    reading = await etcd.read()
    assert (reading.cluster, reading.key_revision, reading.value) == (second.cluster, second.key_revision, b"second")


async def _swap_until_done(etcd: Etcd, expected: int, value: bytes) -> Reading:
    """As a caller has to: after a swap without an answer (here while a leader is elected) it is read what is there."""
    with trio.fail_after(60):
        while True:
            try:
                done = await etcd.swap(expected, value)
                assert done is not None
                return done
            except ArbiterUnreachableError:
                reading = await etcd.read()
                if reading.value == value:
                    return reading


# TLS


async def test_with_the_ca_and_a_client_certificate_it_works_over_tls(guarded: EtcdCluster, key: str) -> None:
    etcd = Etcd(guarded.config(), key)
    done = await etcd.swap(0, b"value")
    assert await etcd.read() == done


@pytest.mark.parametrize("swap", [False, True], ids=["reading", "swap"])
async def test_a_server_of_another_ca_is_told_nothing(guarded: EtcdCluster, key: str, tmp_path: Path, swap: bool) -> None:
    make_certificates(tmp_path, {"127.0.0.1"})
    line = await failure(Etcd(replace(guarded.config(), ca=tmp_path / "ca.crt"), key), swap=swap)
    assert line.startswith(f"the arbiter was not reached: {guarded.endpoints[0]}: its certificate is not to be trusted: ")


async def test_a_server_with_another_name_is_told_nothing(guarded: EtcdCluster, key: str) -> None:
    endpoint = guarded.endpoints[0].replace("127.0.0.1", "localhost")
    line = await failure(Etcd(replace(guarded.config(), endpoints=(endpoint,)), key))
    assert "its certificate is not to be trusted: Hostname mismatch" in line


async def test_without_a_ca_a_server_is_not_trusted_blindly(guarded: EtcdCluster, key: str) -> None:
    line = await failure(Etcd(replace(guarded.config(), ca=None), key))
    assert "its certificate is not to be trusted" in line


async def test_without_a_client_certificate_it_says_that_there_may_have_to_be_one(guarded: EtcdCluster, key: str) -> None:
    line = await failure(Etcd(replace(guarded.config(), certificate=None, key=None), key))
    assert line.endswith("(does it want another client certificate?)")


async def test_certificates_are_read_anew(guarded: EtcdCluster, key: str, tmp_path: Path) -> None:
    make_certificates(tmp_path, {"127.0.0.1"})
    etcd = Etcd(replace(guarded.config(), ca=tmp_path / "ca.crt"), key)
    await failure(etcd)
    (tmp_path / "ca.crt").write_bytes((guarded.directory / "ca.crt").read_bytes())
    await etcd.read()


@pytest.mark.parametrize("part", ["ca", "certificate", "key"])
async def test_a_file_that_is_missing_or_is_none_is_named(guarded: EtcdCluster, key: str, tmp_path: Path, part: str) -> None:
    file = tmp_path / "file"
    etcd = Etcd(replace(guarded.config(), **{part: file}), key)  # type: ignore[arg-type]
    missing = f"the arbiter cannot be asked: {file} cannot be read: No such file or directory"
    assert await failure(etcd) == missing
    file.write_text("nonsense")
    line = await failure(etcd)
    assert line.startswith("the arbiter cannot be asked: ")
    assert f"{file} " in f"{line} "
    assert "cannot be used: " in line


# Users


async def test_a_user_with_a_password_logs_in_once(users: EtcdCluster, key: str) -> None:
    way = Between(users.endpoints[0])
    async with serving(way) as endpoint:
        etcd = Etcd(replace(users.config(), endpoints=(endpoint,)), key)
        done = await etcd.swap(0, b"value")
        assert await etcd.read() == done
    assert way.paths == [LOGIN, TXN, RANGE]


async def test_a_wrong_password_is_one_line_without_it_until_it_is_corrected(
    users: EtcdCluster, key: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "password", "wrong\n")
    etcd = Etcd(replace(users.config(), password_file=file), key)
    line = await failure(etcd)
    assert line == f"the arbiter refuses: {users.endpoints[0]}: user mirrorfs or the password in {file} is wrong"
    written(file, PASSWORD)
    await etcd.read()


async def test_a_password_file_that_is_missing_or_no_text_is_named(users: EtcdCluster, key: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    etcd = Etcd(replace(users.config(), password_file=file), key)
    assert await failure(etcd) == f"the arbiter cannot be asked: {file} cannot be read: No such file or directory"
    file.write_bytes(b"\xff")
    assert await failure(etcd) == f"the arbiter cannot be asked: {file} is not text in UTF-8"


@pytest.mark.parametrize("swap", [False, True], ids=["reading", "swap"])
async def test_a_key_that_the_user_may_not_have_is_refused(users: EtcdCluster, swap: bool) -> None:
    line = await failure(Etcd(users.config(), "/elsewhere"), swap=swap)
    assert line == (
        f"the arbiter refuses: {users.endpoints[0]} does not let user mirrorfs read and write the key: "
        "etcdserver: permission denied"
    )


async def test_without_a_user_it_says_what_to_set(users: EtcdCluster, key: str) -> None:
    line = await failure(Etcd(replace(users.config(), user="", password_file=None), key))
    assert line == f"the arbiter refuses: {users.endpoints[0]} wants a user and a password, set user and password_file"


async def test_a_user_is_let_in_where_there_are_no_users(alone: EtcdCluster, key: str, tmp_path: Path) -> None:
    file = written(tmp_path / "password", "any")
    await Etcd(replace(alone.config(), user="mirrorfs", password_file=file), key).read()


@pytest.mark.parametrize("swap", [False, True], ids=["reading", "swap"])
async def test_a_token_that_is_not_known_any_more_is_renewed(users: EtcdCluster, key: str, swap: bool) -> None:
    way = Between(users.endpoints[0])
    async with serving(way) as endpoint:
        etcd = Etcd(replace(users.config(), endpoints=(endpoint,)), key)
        await etcd.read()
        # A restart of the member would not do: it takes the logins of its log up again.
        users.etcdctl("auth", "disable")
        users.etcdctl("auth", "enable")
        way.paths.clear()
        if swap:
            assert await etcd.swap(0, b"value") is not None
        reading = await etcd.read()
    asked = [TXN, LOGIN, TXN, RANGE] if swap else [RANGE, LOGIN, RANGE]
    assert way.paths == asked
    assert reading.value == (b"value" if swap else None)


async def test_a_token_that_a_change_of_users_has_made_old_is_renewed(key: str, tmp_path: Path) -> None:
    secret = written(tmp_path / "secret", "of the token's signature")
    signing = f"--auth-token=jwt,sign-method=HS256,priv-key={secret}"
    with EtcdCluster(tmp_path, password=PASSWORD, arguments=[signing]) as cluster:
        way = Between(cluster.endpoints[0])
        async with serving(way) as endpoint:
            etcd = Etcd(replace(cluster.config(), endpoints=(endpoint,)), key)
            await etcd.read()
            cluster.etcdctl("user", "add", "somebody:else")
            assert await etcd.swap(0, b"value") is not None
            cluster.etcdctl("user", "add", "nobody:else")
            assert (await etcd.read()).value == b"value"
    assert way.paths == [LOGIN, RANGE, TXN, LOGIN, TXN, RANGE, LOGIN, RANGE]


async def test_a_token_is_not_used_for_long(users: EtcdCluster, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arbiter, "_TOKEN_USED_S", -1.0)
    way = Between(users.endpoints[0])
    async with serving(way) as endpoint:
        etcd = Etcd(replace(users.config(), endpoints=(endpoint,)), key)
        await etcd.read()
        await etcd.read()
    assert way.paths == [LOGIN, RANGE, LOGIN, RANGE]


async def test_a_connection_that_is_closed_on_a_token_makes_a_reading_renew_it_and_a_swap_fail(
    users: EtcdCluster, key: str
) -> None:
    way = Between(users.endpoints[0])
    async with serving(way) as endpoint:
        etcd = Etcd(replace(users.config(), endpoints=(endpoint,)), key)
        await etcd.read()
        way.keeping = (RANGE,)
        await failure(etcd)
        assert way.paths == [LOGIN, RANGE, RANGE, LOGIN, RANGE]
        way.keeping = ()
        await etcd.read()
        way.keeping, way.paths = (TXN,), []
        await failure(etcd, swap=True)
        assert way.paths == [TXN]
        await etcd.read()
        assert way.paths == [TXN, LOGIN, RANGE]


# Answers that are none

NO_LEADER = b'{"error":"etcdserver: no leader","message":"etcdserver: no leader","code":14}'
HEADER = b'"header":{"cluster_id":"1","revision":"7"}'


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (b"503 Service Unavailable", NO_LEADER, "HTTP 503: etcdserver: no leader"),
        (b"404 Not Found", b"Not\nFound\n", "HTTP 404: Not Found"),
        (b"307 Temporary Redirect", b"", "HTTP 307: "),
        (b"200 OK", b"<html>", "no answer of etcd: <html>"),
        (b"200 OK", b"{}", "no answer of etcd: {}"),
        (b"200 OK", b"[]", "no answer of etcd: []"),
        (b"200 OK", b'{"header":{"cluster_id":"1","revision":"x"}}', "no answer of etcd: {"),
        (b"200 OK", b"{" + HEADER + b',"kvs":[{"mod_revision":"7","value":"?"}],"succeeded":"yes"}', "no answer of etcd: {"),
        (b"200 OK", b"{" + HEADER + b',"kvs":[7],"succeeded":7}', "no answer of etcd: {"),
    ],
)
@pytest.mark.parametrize("swap", [False, True], ids=["reading", "swap"])
async def test_an_answer_that_is_none_is_no_answer(
    alone: EtcdCluster, key: str, status: bytes, body: bytes, told: str, swap: bool
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await receive_request(stream)
            head = b"HTTP/1.1 %b\r\nLocation: /v3/kv/range\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
            await stream.send_all(head + body)

    async with serving(answer) as endpoint:
        line = await failure(Etcd(replace(alone.config(), endpoints=(endpoint,)), key), swap=swap)
        assert f"{endpoint}: {told}" in line
        assert line.startswith("the arbiter did not say whether it made the change") == swap
        both = Etcd(replace(alone.config(), endpoints=(endpoint, *alone.endpoints)), key)
        if swap:
            assert await failure(both, swap=True) == line
        assert (await both.read()).key_revision == 0


# A backup


@pytest.mark.parametrize("token", ["mirrorfs", "another"])
async def test_a_restored_backup_has_a_lower_revision_and_its_cluster_may_be_the_same(
    tmp_path: Path, key: str, token: str
) -> None:
    with EtcdCluster(tmp_path) as cluster:
        etcd = Etcd(cluster.config(), key)
        kept = await etcd.swap(0, b"kept")
        assert kept is not None
        backup = cluster.snapshot()
        lost = await etcd.swap(kept.key_revision, b"lost")
        assert lost is not None
        cluster.restore(backup, token=token)
        reading = await etcd.read()
        assert reading.revision < lost.revision
        assert (reading.key_revision, reading.value) == (kept.key_revision, b"kept")
        assert (reading.cluster == kept.cluster) == (token == "mirrorfs")


# The cluster of the lab


def test_a_cluster_that_does_not_come_up_shows_the_end_of_its_log(alone: EtcdCluster, tmp_path: Path) -> None:
    taken = int(alone.endpoints[0].rpartition(":")[2])
    with pytest.raises(MirrorfsError, match=r"etcd has ended: (?s:.)*address already in use"):
        EtcdCluster(tmp_path, port=taken).start()


async def test_a_member_that_stands_still_does_not_answer_until_it_goes_on(alone: EtcdCluster, key: str) -> None:
    alone.pause_member(0)
    try:
        line = await failure(Etcd(alone.config(timeout_s=0.5), key))
    finally:
        alone.resume_member(0)
    assert re.search("no answer within 0.5 s$", line)
    await Etcd(alone.config(timeout_s=10), key).read()
