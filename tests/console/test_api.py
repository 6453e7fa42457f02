"""The HTTP API of a real pair, as a program uses it."""

import contextlib
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate

from mirrorfs.console.roles import Role
from mirrorfs.console.users import Users
from mirrorfs.lab.cluster import Cluster
from mirrorfs.lab.pair import wait_for
from tests.console.conftest import OPERATOR, PASSWORD, VIEWER
from tests.console.support import way_to

pytestmark = pytest.mark.root

API = "/api/v1"
_FLOOD = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = [socket.create_connection(("127.0.0.1", 7790), timeout=20) for _ in range(1000)]
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def clients(site: Cluster) -> Iterator[Callable[[], httpx.Client]]:
    """Makes clients of the console of `one`, which trust its certificate and nothing else."""
    with way_to(site.lab.one, 7790) as port:
        trusted = ssl.create_default_context(cafile=site.lab.one.keys / "console.pem")
        made: list[httpx.Client] = []

        def make() -> httpx.Client:
            made.append(httpx.Client(base_url=f"https://localhost:{port}", verify=trusted, timeout=130))
            return made[-1]

        yield make
        for client in made:
            client.close()


def log_in(client: httpx.Client, name: str, password: str = PASSWORD) -> httpx.Response:
    return client.post(f"{API}/session", json={"user": name, "password": password})


def csrf(client: httpx.Client) -> dict[str, str]:
    return {"X-CSRF-Token": client.get(f"{API}/session").json()["csrf"]}


@pytest.fixture
def operator(clients: Callable[[], httpx.Client]) -> httpx.Client:
    client = clients()
    assert log_in(client, OPERATOR).status_code == 200
    return client


def test_the_document_is_sound_and_lists_every_route(clients: Callable[[], httpx.Client]) -> None:
    document = clients().get("/openapi.json").json()
    validate(document)
    assert {"/metrics", f"{API}/picture", f"{API}/switchover", f"{API}/split-brain/resolve"} <= set(document["paths"])


def test_answers_are_as_the_document_says(operator: httpx.Client) -> None:
    document = operator.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        if "get" not in operations or path.endswith("stream") or path == "/metrics":
            continue
        answer = operator.get(path)
        assert answer.status_code == 200, answer.text
        schema = operations["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), schema)


@pytest.mark.parametrize("path", ["picture", "events", "audit", "session", "stream"])
def test_nobody_sees_anything_without_logging_in(clients: Callable[[], httpx.Client], path: str) -> None:
    answer = clients().get(f"{API}/{path}")
    assert answer.status_code == 401
    assert set(answer.json()) == {"error", "kind"}


def test_the_picture_says_what_protects_the_data(operator: httpx.Client) -> None:
    picture = operator.get(f"{API}/picture").json()
    assert picture["protection"] == {"level": "good", "sentence": "Every write is on both nodes before it returns."}
    assert [node["name"] for node in picture["nodes"]] == ["one", "two"]
    assert picture["can_switch_over"]


def test_a_viewer_may_look_and_not_press(clients: Callable[[], httpx.Client]) -> None:
    client = clients()
    log_in(client, VIEWER)
    assert client.get(f"{API}/picture").status_code == 200
    refused = client.post(f"{API}/switchover", json={}, headers=csrf(client))
    assert (refused.status_code, "operate" in refused.json()["error"]) == (403, True)
    assert client.get(f"{API}/audit").status_code == 403


def test_nothing_is_changed_without_the_csrf_token(operator: httpx.Client, site: Cluster) -> None:
    for headers in ({}, {"X-CSRF-Token": "wrong"}):
        assert operator.post(f"{API}/maintenance", json={"on": True}, headers=headers).status_code == 403
    form = operator.post(f"{API}/maintenance", content="on=true", headers=csrf(operator))
    assert form.status_code == 400, "a form of another page"
    said = site.says("one")
    assert said is not None
    assert not said["maintenance"]


def test_the_cookie_is_for_this_page_only(clients: Callable[[], httpx.Client]) -> None:
    cookie = log_in(clients(), OPERATOR).headers["set-cookie"]
    assert cookie.startswith("__Host-")
    for attribute in ("HttpOnly", "Secure", "SameSite=strict", "Path=/"):
        assert attribute in cookie


def test_answers_forbid_frames_scripts_from_elsewhere_and_caches(clients: Callable[[], httpx.Client]) -> None:
    headers = clients().get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_after_a_log_out_the_cookie_is_worth_nothing(operator: httpx.Client) -> None:
    kept = httpx.Cookies(operator.cookies)
    assert operator.delete(f"{API}/session", headers=csrf(operator)).status_code == 204
    operator.cookies = kept
    assert operator.get(f"{API}/picture").status_code == 401


def add(site: Cluster, name: str, password: str = PASSWORD) -> None:
    Users(site.lab.one.keys).add(name, password, Role.VIEW)


def comes_in(clients: Callable[[], httpx.Client], name: str, password: str = PASSWORD) -> httpx.Client:
    """A client who is logged in: the console sees within a second who is new."""
    client = clients()
    wait_for(lambda: log_in(client, name, password).status_code == 200, f"{name} comes in")
    return client


def test_a_user_that_is_removed_or_has_a_new_password_is_out(clients: Callable[[], httpx.Client], site: Cluster) -> None:
    for name in ("gone", "changed"):
        add(site, name)
    inside = {name: comes_in(clients, name) for name in ("gone", "changed")}
    Users(site.lab.one.keys).remove("gone")
    add(site, "changed", "another password")
    for name, client in inside.items():
        wait_for(lambda client=client: client.get(f"{API}/picture").status_code == 401, f"{name} is out")  # type: ignore[misc]
    comes_in(clients, "changed", "another password")


def test_a_token_lets_a_program_in(clients: Callable[[], httpx.Client], site: Cluster) -> None:
    users = Users(site.lab.one.keys)
    headers = {"Authorization": f"Bearer {users.add_token('prometheus', Role.VIEW)}"}
    client = clients()
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
    wait_for(lambda: client.get("/metrics", headers=headers).status_code == 200, "the token is known")
    assert client.post(f"{API}/verify", headers=headers).status_code == 403, "its role is to look"


def test_what_prometheus_gets_passes_promtool(clients: Callable[[], httpx.Client], site: Cluster) -> None:
    headers = {"Authorization": f"Bearer {Users(site.lab.one.keys).add_token('promtool', Role.VIEW)}"}
    client = clients()
    wait_for(lambda: "mirrorfs_changes_total" in client.get("/metrics", headers=headers).text, "measures of the mount")
    text = client.get("/metrics", headers=headers).text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    assert "mirrorfs_protected 1.0" in text
    assert 'mirrorfs_state{mirrorfs_state="primary"} 1.0' in text


def test_the_rules_and_the_dashboard_name_metrics_that_there_are(clients: Callable[[], httpx.Client], site: Cluster) -> None:
    headers = {"Authorization": f"Bearer {Users(site.lab.one.keys).add_token('names', Role.VIEW)}"}
    client = clients()
    wait_for(lambda: client.get("/metrics", headers=headers).status_code == 200, "the token is known")
    known = set(re.findall(r"^(mirrorfs_[a-z_]+)", client.get("/metrics", headers=headers).text, re.MULTILINE))
    known |= {"mirrorfs_resync_done_bytes", "mirrorfs_resync_size_bytes", "mirrorfs_verify_differences"}  # not always there
    known |= {"mirrorfs_verify_last_ended_timestamp_seconds"}
    directory = Path(__file__).parents[2] / "packaging" / "monitoring"
    for file in ("mirrorfs.rules.yml", "mirrorfs-dashboard.json"):
        used = set(re.findall(r"\b(mirrorfs_[a-z_]+)", (directory / file).read_text()))
        assert used, file
        assert used <= known, file


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("maintenance", {}, 400, "on: missing"),
        ("maintenance", {"on": "yes"}, 400, "on: must be a boolean"),
        ("maintenance", {"on": True, "off": True}, 400, "off: unknown"),
        ("split-brain/resolve", {"keep": "one"}, 503, "split brain"),
        ("pause", {}, 428, "one"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(
    operator: httpx.Client, path: str, body: dict[str, Any], status: int, word: str
) -> None:
    answer = operator.post(f"{API}/{path}", json=body, headers=csrf(operator))
    assert answer.status_code in (status, 409), answer.text
    assert word in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_who_pressed_what_stands_in_the_audit_log(operator: httpx.Client) -> None:
    headers = csrf(operator)
    for on in (True, False):
        assert operator.post(f"{API}/maintenance", json={"on": on}, headers=headers).status_code == 200
    entries = operator.get(f"{API}/audit").json()["entries"]
    pressed = [entry for entry in entries if entry["action"].startswith("maintenance")]
    assert {entry["user"] for entry in pressed} == {OPERATOR}
    assert [entry["result"] for entry in pressed][:4:2] != ["asked", "asked"]
    assert PASSWORD not in str(entries)


def test_who_guesses_passwords_has_to_wait_longer_and_longer(clients: Callable[[], httpx.Client]) -> None:
    client = clients()
    assert log_in(client, OPERATOR).status_code == 200, "forgets what was before"
    answers = [log_in(client, OPERATOR, f"wrong {i}") for i in range(7)]
    assert {answer.status_code for answer in answers} == {401, 429}
    assert int(answers[-1].headers["retry-after"]) >= 1
    wait_for(lambda: log_in(client, OPERATOR).status_code == 200, "the wait is over")


def test_a_verify_is_begun_and_its_end_is_an_event(operator: httpx.Client) -> None:
    assert operator.post(f"{API}/verify", headers=csrf(operator)).status_code == 200

    def ended() -> bool:
        events = operator.get(f"{API}/events").json()["events"]
        return any(event["text"].startswith("verify ended, differences: 0") for event in events)

    wait_for(ended, "the end of the verify")


def test_the_stream_brings_pictures_and_ends_with_the_session(operator: httpx.Client, site: Cluster) -> None:
    with operator.stream("GET", f"{API}/stream") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: picture"
        assert '"protection"' in next(lines)
        operator.delete(f"{API}/session", headers=csrf(operator))
        assert "event: over" in lines


def test_somebody_who_does_not_read_does_not_keep_the_controller_from_ending(site: Cluster) -> None:
    follows = site.lab.two if site.wait_serving() is site.lab.one else site.lab.one
    trusting = ssl.create_default_context(cafile=follows.keys / "console.pem")
    with (
        way_to(follows, 7790) as port,
        socket.create_connection(("localhost", port)) as plain,
        trusting.wrap_socket(plain, server_hostname="localhost") as deaf,
    ):
        deaf.settimeout(5)
        with contextlib.suppress(TimeoutError):
            while True:  # until nothing more is taken, since nothing of the answers is
                deaf.sendall(b"GET /console.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        assert site.stop_controller(follows.name) == 0
    site.start_controller(follows.name)


def test_a_thousand_silent_connections_do_not_disturb_the_controller(
    clients: Callable[[], httpx.Client], site: Cluster
) -> None:
    wait_for(lambda: "'heard': True" in str(site.says("one")), "the other controller is heard")
    before = site.says("one")
    flood = site.lab.one.popen(sys.executable, "-c", _FLOOD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "1000\n"
        after = site.says("one")
        assert before is not None
        assert after is not None
        assert (after["posture"], after["peer"]) == (before["posture"], before["peer"])
    finally:
        flood.communicate("")

    def lets_in() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return log_in(clients(), VIEWER).status_code == 200
        return False

    wait_for(lets_in, "people come in")


def test_a_request_that_breaks_off_and_a_name_that_is_no_text_are_no_failures(
    clients: Callable[[], httpx.Client], site: Cluster
) -> None:
    refused = clients().post(
        f"{API}/session", content=b'{"user": "\\ud800", "password": "\\ud800"}', headers={"content-type": "application/json"}
    )
    assert refused.status_code == 401
    trusting = ssl.create_default_context(cafile=site.lab.one.keys / "console.pem")
    with (
        way_to(site.lab.one, 7790) as port,
        socket.create_connection(("localhost", port)) as plain,
        trusting.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        half = (
            b"POST /api/v1/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        secured.sendall(half)
    assert clients().get("/openapi.json").status_code == 200
    assert "Traceback" not in site.log("one").read_text()
