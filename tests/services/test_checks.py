"""Every kind of check, against real processes, sockets and servers, and a FUSE mount that hangs."""
# ruff: noqa: ASYNC220, ASYNC221, ASYNC222  (these tests may wait for their own small files and processes)

import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from mirrorfs.checks import check
from mirrorfs.failover_config import CheckConfig, CheckKind
from tests.services.support import (
    DEADLINE_S,
    ending_what_is_started,
    eventually,
    hanging_mount,
    is_alive,
    pid_in,
)

LONG_S = 2.0 * DEADLINE_S
SHORT_S = 0.3


@pytest.fixture(autouse=True)
def _cleanup(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ending_what_is_started(monkeypatch):
        yield


async def look(kind: CheckKind, target: object, timeout_s: float = LONG_S) -> str:
    with trio.fail_after(DEADLINE_S):
        return await check(CheckConfig(kind, str(target), timeout_s=timeout_s))


# --- process


async def test_a_process_that_is_there_is_well(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    file.write_text(f"{os.getpid()}\n/data/pg\n5432\n")  # as in postmaster.pid
    assert await look("process", file) == ""


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"garbage", b"-1", b"0", b"+1", b"1 2", b"99999999999999", b"\xff\0", b"1" * 9999]
)
async def test_a_pid_file_with_garbage_is_not_well(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pid"
    file.write_bytes(content)
    assert await look("process", file) == f"process {file}: its first line is not a process id"


async def test_a_pid_file_that_is_not_there_is_not_well() -> None:
    assert await look("process", "/proc/nothing") == "process /proc/nothing: No such file or directory"


async def test_a_pipe_in_the_place_of_a_pid_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pid"
    os.mkfifo(pipe)
    assert await look("process", pipe) == f"process {pipe}: its first line is not a process id"


async def test_a_process_that_has_ended_is_not_well_neither_as_a_zombie_nor_after_it(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        file = tmp_path / "pid"
        file.write_text(str(process.pid))
        assert await look("process", file) == f"process {file}: process {process.pid} has ended and is a zombie"
    assert await look("process", file) == f"process {file}: there is no process {process.pid}"


# --- tcp


@contextmanager
def listening(host: str = "127.0.0.1", backlog: int = 5) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(backlog)
        yield listener.getsockname()[1]


async def test_a_port_that_takes_connections_is_well() -> None:
    with listening() as port:
        assert await look("tcp", f"127.0.0.1:{port}") == ""
        assert await look("tcp", f"localhost:{port}") == ""


async def test_a_port_of_an_ipv6_address_is_well() -> None:
    try:
        with listening("::1") as port:
            assert await look("tcp", f"[::1]:{port}") == ""
    except OSError:
        pytest.skip("no IPv6 here")


async def test_a_port_that_nobody_listens_on_is_not_well() -> None:
    with listening() as port:
        pass
    assert await look("tcp", f"127.0.0.1:{port}") == f"tcp 127.0.0.1:{port}: Connection refused"


async def test_a_port_that_does_not_answer_is_not_well() -> None:
    with listening(backlog=0) as port, socket.create_connection(("127.0.0.1", port)):
        assert await look("tcp", f"127.0.0.1:{port}", SHORT_S) == f"tcp 127.0.0.1:{port}: no answer within 0.3 s"


@pytest.mark.parametrize("target", ["a..b:80", "127.0.0.1:99999"])
async def test_an_address_that_cannot_be_one_is_not_well(target: str) -> None:
    assert (await look("tcp", target)).startswith(f"tcp {target}: ")


# --- http


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x" * 65536)
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.send_header("Location", "/500")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what these tests do."""


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[int]:
    with _Server(("127.0.0.1", 0), _Pages) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [200, 204, 301, 399])
async def test_a_url_that_answers_well_is_well_and_a_redirect_is_not_followed(status: int) -> None:
    with serving() as port:
        assert await look("http", f"http://127.0.0.1:{port}/{status}") == ""


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (500, "500 Internal Server Error")])
async def test_a_url_that_answers_with_an_error_is_not_well(status: int, words: str) -> None:
    with serving() as port:
        url = f"http://127.0.0.1:{port}/{status}"
        assert await look("http", url) == f"http {url}: status {words}"


async def test_the_body_of_an_answer_is_not_read() -> None:
    with serving() as port:
        assert await look("http", f"http://127.0.0.1:{port}/endless") == ""


async def test_a_url_that_nobody_serves_is_not_well() -> None:
    with listening() as port:
        pass
    assert await look("http", f"http://127.0.0.1:{port}/") == f"http http://127.0.0.1:{port}/: Connection refused"


async def test_a_server_that_takes_the_request_and_says_nothing_is_not_well() -> None:
    with listening() as port:
        url = f"http://127.0.0.1:{port}/"
        assert await look("http", url, SHORT_S) == f"http {url}: no answer within 0.3 s"


async def test_a_server_that_does_not_speak_http_is_not_well() -> None:
    async def talk(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example ESMTP\r\n\r\n")

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, talk, [listener])
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        problem = await look("http", url)
        nursery.cancel_scope.cancel()
    assert problem.startswith(f"http {url}: ")
    assert "220 mail.example ESMTP" in problem


@pytest.mark.parametrize("url", ["http://[::1", "http://a..b/", "http://127.0.0.1:99999/"])
async def test_a_url_that_cannot_be_one_is_not_well(url: str) -> None:
    assert (await look("http", url)).startswith(f"http {url}: ")


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as nobody:
        pass
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{nobody}")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with serving() as port:
        assert await look("http", f"http://127.0.0.1:{port}/200") == ""


async def test_a_certificate_is_verified_against_the_trusted_ones_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    request = "req -x509 -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -days 2"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *request.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(context) as port:
        url = f"https://127.0.0.1:{port}/200"
        assert "certificate verify failed" in await look("http", url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await look("http", url) == ""


# --- command


async def test_a_command_that_succeeds_is_well_whatever_it_says() -> None:
    assert await look("command", "echo something; cat") == ""


async def test_a_command_that_fails_is_told_with_its_status_and_its_last_line() -> None:
    text = "echo first; echo last >&2; echo; exit 3"
    assert await look("command", text) == f"command {text}: exit status 3: last"


async def test_a_command_that_a_signal_ends_is_told_with_its_name() -> None:
    assert await look("command", "kill -SEGV $$") == "command kill -SEGV $$: ended by SIGSEGV"


async def test_a_long_command_is_shortened_and_its_lines_are_joined() -> None:
    assert await look("command", f"false\n#{'x' * 200}") == f"command false #{'x' * 70}...: exit status 1"


async def test_much_output_is_read_and_only_a_line_of_it_shown() -> None:
    text = "head -c 3000000 /dev/zero | tr '\\0' x; exit 1"
    assert await look("command", text) == f"command {text}: exit status 1: {'x' * 200}"


async def test_output_is_read_to_its_end_when_the_command_has_ended_first(tmp_path: Path) -> None:
    started, go, ended = tmp_path / "started", tmp_path / "go", tmp_path / "ended"
    much = "head -c 60000 /dev/zero | tr '\\0' x; echo; echo last"
    problems: list[str] = []

    async def look_once() -> None:
        problems.append(await look("command", f"touch {started}; until [ -e {go} ]; do :; done; {much}; touch {ended}; exit 1"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_once)
        await eventually(started.exists)
        go.touch()
        while not ended.exists():  # nobody reads while this blocks, and the pipe holds all of it
            time.sleep(0.01)  # noqa: ASYNC251
        time.sleep(0.05)  # noqa: ASYNC251
    assert problems[0].endswith("exit status 1: last")


async def test_output_that_is_no_text_is_shown_as_one_line() -> None:
    text = "printf 'a\\033[31mb\\377c\\td'; exit 1"
    assert await look("command", text) == f"command {text}: exit status 1: a [31mb\N{REPLACEMENT CHARACTER}c d"


async def test_a_command_that_does_not_end_is_killed_with_all_of_its_group(tmp_path: Path) -> None:
    text = f"sleep 1000 & echo $! > {tmp_path}/pid; echo busy; wait"
    problem = await look("command", text, 1.0)
    assert problem.endswith(": did not end within 1 s: busy")
    pid = pid_in(tmp_path / "pid")
    await eventually(lambda: not is_alive(pid))


async def test_a_command_that_is_cancelled_is_killed(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look, "command", f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 1000")
        await eventually((tmp_path / "pid").exists)
        nursery.cancel_scope.cancel()
    assert not is_alive(pid_in(tmp_path / "pid"))


async def test_a_process_that_a_command_leaves_behind_is_not_waited_for() -> None:
    text = "echo last; sleep 1000 & exit 1"
    assert await look("command", text) == f"command {text}: exit status 1: last"


# --- mount


async def test_a_mount_that_answers_is_well() -> None:
    assert await look("mount", "/proc") == ""


async def test_a_directory_on_which_nothing_is_mounted_is_not_well(tmp_path: Path) -> None:
    assert await look("mount", tmp_path) == f"mount {tmp_path}: nothing is mounted there"


async def test_a_mount_whose_directory_is_not_there_is_not_well(tmp_path: Path) -> None:
    assert await look("mount", tmp_path / "x") == f"mount {tmp_path}/x: No such file or directory"


async def test_two_services_may_look_at_one_mount_at_the_same_time() -> None:
    problems: list[str] = []

    async def look_once() -> None:
        problems.append(await look("mount", "/proc"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(look_once)
    assert problems == [""] * 5


async def test_a_look_that_was_cancelled_as_it_began_does_not_count_as_one_that_hangs() -> None:
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, "mount", "/sys")
            await trio.lowlevel.checkpoint()  # the one goes first or the other
            nursery.cancel_scope.cancel()
        # A thread that was begun and left behind comes back.
        with trio.fail_after(DEADLINE_S):
            while await look("mount", "/sys"):
                await trio.lowlevel.checkpoint()


@pytest.mark.root
async def test_a_mount_that_hangs_is_looked_at_by_one_thread_only_until_it_has_come_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("m") / "mount"  # short: a problem is told in so many characters
    with hanging_mount(path):
        assert await look("mount", path, SHORT_S) == f"mount {path}: no answer within 0.3 s"
        for _ in range(3):
            assert await look("mount", path) == f"mount {path}: hangs: the last look at it has not come back"
        assert await look("process", path / "pid", SHORT_S) == f"process {path}/pid: no answer within 0.3 s"
        assert await look("mount", "/proc") == ""
    problem = ""
    while not problem.endswith("nothing is mounted there"):
        problem = await look("mount", path)
        await trio.sleep(0.01)


@pytest.mark.root
async def test_a_command_that_does_not_end_on_sigkill_is_not_run_again_before_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "mount"
    text = f"echo $$ >> {tmp_path}/pids; exec {sys.executable} -S -c 'import os; os.stat(\"{path}/file\")'"
    with hanging_mount(path) as mount:
        problems: list[str] = []

        async def look_once() -> None:
            problems.append(await look("command", text, 2.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_once)
            await trio.to_thread.run_sync(mount.take)
        await look_once()
        pid = pid_in(tmp_path / "pids")
        assert "did not end within 2 s" in problems[0]
        assert problems[1].endswith(f"hangs: process {pid} of the last look does not end on SIGKILL")
        assert is_alive(pid)
    await eventually(lambda: not is_alive(pid))
    assert "No such file or directory" in await look("command", text)
    assert len((tmp_path / "pids").read_text().split()) == 2
