"""The arbiter: who decides when the two nodes cannot see each other. The only module that speaks to one.

An arbiter holds one value and changes it by compare-and-swap. `Etcd` keeps it under a key of an etcd cluster and speaks to
the JSON gateway that each member has (from version 3.4 on); `Isolation` is what a node has without an arbiter: does an
address that belongs to neither node still answer a ping?

What a swap may do is decided by how a request can fail:

- It certainly was not done: the connection was not made, or the member refused the request for its token. Then it may be
  asked again, at the next endpoint or with a new token.
- Nobody knows: everything that fails once a connection stands. The change may have been made, and asking again would then
  find the own value there and call it somebody else's. So nothing is asked a second time: `ArbiterUnreachableError`, and
  the caller reads what is there.

For the same reason no connection is used for a second request. A kept connection that the server closes meanwhile fails in
the middle of a request, where nobody knows; a connection that cannot be made fails before it. Nodes ask an arbiter so
rarely that a connection for each request costs nothing.
"""

import base64
import math
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import httpx
import trio

from mirrorfs.errors import MirrorfsError
from mirrorfs.failover_config import ArbiterConfig

_PINGS: Final = 2
_PING_LIMIT_S: Final = 1.5  # for a ping that does not keep to its own second, as where a name service is asked
_SHOWN_CHARACTERS: Final = 200
_TOKEN_USED_S: Final = 60.0  # etcd itself lets go of one that was not used for 300 s, unless it is told otherwise

_T = TypeVar("_T")


class ArbiterUnreachableError(MirrorfsError):
    """Nobody knows whether what was asked of the arbiter was done; for a reading, there is none."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an arbiter holds at one moment.

    `cluster`: whose answer this is; another one is another arbiter. `revision`: of the whole store, it only ever grows, so
    that a lower one is a restored backup. `key_revision`: the revision that made the value, 0 if there is none.
    """

    cluster: str
    revision: int
    key_revision: int
    value: bytes | None


class Arbiter(Protocol):
    """One value that several nodes change by compare-and-swap."""

    @property
    def name(self) -> str:
        """What people know it by, as in "etcd at https://10.0.0.9:2379"."""

    async def read(self) -> Reading:
        """What is there now, at the latest from when this was called; raises ArbiterUnreachableError."""

    async def swap(self, expected: int, value: bytes) -> Reading | None:
        """Put `value` in the place of what has the key revision `expected`, 0 for nothing.

        Returns what is there then, or None if something else was there and nothing was changed. ArbiterUnreachableError:
        it may have been done, and as long as the key's revision is `expected` it may still be done later, by a request that
        is under way. What settles it is a reading with another key revision, or another swap that is answered. The same
        goes for a call that is cancelled.
        """

    async def aclose(self) -> None:
        """Give up what is held between calls."""


class _NotDoneError(Exception):
    """What was asked surely was not done; str() says why."""


class _TokenRefusedError(_NotDoneError):
    """The member does not know the token (any more)."""


class _NoLoginsError(_NotDoneError):
    """The cluster knows no users: it lets everybody in."""


class _UnansweredError(Exception):
    """What was asked may have been done; str() says why nobody knows."""


class _DisconnectedError(_UnansweredError):
    """The member closed the connection instead of answering."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer of the gateway that is one: it has a header."""

    cluster: str
    revision: int
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Token:
    """What a login gave, and the time of trio's clock until which it is used."""

    text: str
    used_until: float


@dataclass(frozen=True, slots=True)
class _Question:
    """One request to the gateway. One that changes something must not be asked again once it may have arrived."""

    path: str
    body: dict[str, Any]
    changes: bool


class Etcd:
    """A key of an etcd cluster.

    Endpoints are tried in turn, beginning with the one that answered last; of the time that is left, each gets a share for
    itself: `timeout_s` of the configuration is for all of them, logging in included. Certificates and the password are
    read anew whenever they are used, so that they can be replaced. Without `ca` the CAs of the system are trusted; nothing
    is taken from the environment (no proxy).
    """

    def __init__(self, config: ArbiterConfig, key: str) -> None:
        """Nothing is asked or read yet."""
        assert config.kind == "etcd"
        assert config.endpoints
        self.name = f"etcd at {', '.join(config.endpoints)}"
        self._config = config
        self._key = key
        self._token: _Token | None = None
        self._first = 0  # the endpoint to begin with

    async def read(self) -> Reading:
        """What is under the key. The members agree on it first (a linearizable read), so one without a quorum has no answer.

        Raises ArbiterUnreachableError.
        """

        def understand(answer: _Answer) -> Reading:
            found = answer.body.get("kvs") or [{}]
            # Nothing that is zero or empty is in the answer.
            key_revision = int(found[0].get("mod_revision", 0))
            value = base64.b64decode(found[0].get("value", ""), validate=True) if key_revision else None
            return Reading(answer.cluster, answer.revision, key_revision, value)

        return await self._ask(_Question("/v3/kv/range", {"key": _encoded(self._key.encode())}, changes=False), understand)

    async def swap(self, expected: int, value: bytes) -> Reading | None:
        """Put `value` there if the key's revision is `expected` (0: if there is no key); None if it is not.

        See `Arbiter.swap` for what an ArbiterUnreachableError means.
        """
        key = _encoded(self._key.encode())
        compare = {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(expected)}
        put = {"request_put": {"key": key, "value": _encoded(value)}}

        def understand(answer: _Answer) -> Reading | None:
            match answer.body.get("succeeded", False):
                case True:
                    return Reading(answer.cluster, answer.revision, answer.revision, value)
                case False:
                    return None
            raise ValueError

        return await self._ask(_Question("/v3/kv/txn", {"compare": [compare], "success": [put]}, changes=True), understand)

    async def aclose(self) -> None:
        """Forget the token; there is no connection to close."""
        self._token = None
        await trio.lowlevel.checkpoint()

    async def _ask(self, question: _Question, understand: Callable[[_Answer], _T]) -> _T:
        """The answer, understood, within the time; raises ArbiterUnreachableError."""
        failures: list[str] = []
        with trio.move_on_after(self._config.timeout_s):
            return await self._ask_in_turn(question, understand, failures)
        failures.append(f"{self.name}: no answer within {self._config.timeout_s:g} s")
        raise _unanswered(question, failures)

    async def _ask_in_turn(self, question: _Question, understand: Callable[[_Answer], _T], failures: list[str]) -> _T:
        """The answer of the first endpoint that has one, or of the first one that may have made the change."""
        deadline = trio.current_effective_deadline()
        # There are versions of etcd that close the connection on a token that they do not know (issues 15256 and 20332 of
        # etcd), where a swap cannot be asked again: no token is used for long, or again after anything went wrong.
        token, self._token = self._token, None
        if token is not None and token.used_until < trio.current_time():
            token = None
        async with await self._open() as client:
            for place, endpoint, left in self._turns():
                self._first = (place + 1) % len(self._config.endpoints)
                share_s = (deadline - trio.current_time()) / left
                member = _Member(client, endpoint, self._config, share_s, token)
                try:
                    understood = _understood(await member.answer(question), understand)
                except _NotDoneError as error:
                    failures.append(f"{endpoint}: {error}")
                except _UnansweredError as error:
                    failures.append(f"{endpoint}: {error}")
                    if question.changes:
                        raise _unanswered(question, failures) from error
                else:
                    self._first, self._token = place, member.token
                    return understood
                token = member.token
        raise ArbiterUnreachableError(f"the arbiter was not reached: {'; '.join(failures)}")

    def _turns(self) -> Iterator[tuple[int, str, int]]:
        """The endpoints in turn: the place in the configuration, the endpoint, and how many are left with this one."""
        endpoints = self._config.endpoints
        first = self._first
        for turn in range(len(endpoints)):
            place = (first + turn) % len(endpoints)
            yield place, endpoints[place].rstrip("/"), len(endpoints) - turn

    async def _open(self) -> httpx.AsyncClient:
        # In a thread: these are files, and a disk that hangs must not stop everything else of this node.
        context = await trio.to_thread.run_sync(_tls, self._config, abandon_on_cancel=True)
        return httpx.AsyncClient(verify=context, trust_env=False, headers={"Connection": "close"})


class _Member:
    """One endpoint, within one question. `token` is the one to use from now on."""

    def __init__(
        self, client: httpx.AsyncClient, endpoint: str, config: ArbiterConfig, share_s: float, token: _Token | None
    ) -> None:
        self.token = token
        self._client = client
        self._endpoint = endpoint
        self._config = config
        self._share_s = share_s

    async def answer(self, question: _Question) -> _Answer:
        """The answer, after a login where one is needed.

        The share of the time is for everything, except that one waits for the answer to a change as long as one can: there
        will be no other endpoint to ask.
        """
        with trio.move_on_after(self._share_s) as share:
            new = await self._log_in() if self.token is None else False
            if question.changes:
                share.deadline = math.inf
            try:
                return await self._post(question)
            except _TokenRefusedError:
                if new:
                    raise
            except _DisconnectedError:
                if new or self.token is None or question.changes:
                    raise
            share.deadline = min(share.deadline, trio.current_time() + self._share_s)
            await self._log_in()
            if question.changes:
                share.deadline = math.inf
            return await self._post(question)
        raise _NotDoneError(f"no answer within {self._share_s:.2g} s")

    async def _log_in(self) -> bool:
        """Get a new token; False if none is needed."""
        self.token = None
        if not self._config.user:
            return False
        body = {
            "name": self._config.user,
            "password": await trio.to_thread.run_sync(_password, self._config, abandon_on_cancel=True),
        }
        try:
            answer = await self._post(_Question("/v3/auth/authenticate", body, changes=False))
        except _NoLoginsError:
            return False
        except _UnansweredError as error:
            raise _NotDoneError(f"the login failed, {error}") from error
        token = answer.body.get("token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise _NotDoneError("the login was answered without a token")
        self.token = _Token(token, trio.current_time() + _TOKEN_USED_S)
        return True

    async def _post(self, question: _Question) -> _Answer:
        # Only for making the connection; for the rest the caller has set a deadline.
        limits = httpx.Timeout(None, connect=max(self._share_s, 0.001))
        headers = {"Authorization": self.token.text} if self.token else {}
        try:
            request = self._client.build_request(
                "POST", self._endpoint + question.path, json=question.body, headers=headers, timeout=limits
            )
            request.stream = _Body(request.content)
            response = await self._client.send(request)
        except httpx.ConnectTimeout as error:
            raise _NotDoneError(f"no connection within {self._share_s:.2g} s") from error
        except (httpx.ConnectError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise _NotDoneError(_reason(error)) from error
        except (httpx.RemoteProtocolError, httpx.ReadError) as error:
            # The reason that a server gives when it refuses a client's certificate does not always get through.
            hint = " (does it want another client certificate?)" if self._endpoint.startswith("https:") else ""
            raise _DisconnectedError(f"{_reason(error)}{hint}") from error
        except httpx.HTTPError as error:
            raise _UnansweredError(_reason(error)) from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(response)
        return _answer(response)

    def _refusal(self, response: httpx.Response) -> Exception:
        """What an answer that is none means."""
        code, told = _error(response)
        user = self._config.user
        if code == 16 or "revision of auth store is old" in told or "revision in header is old" in told:
            # The second and the third: a JWT token is good only until the next change of any user or role. A change is
            # looked at for this before it is made.
            return _TokenRefusedError(told)
        if "user name is empty" in told:
            if user:  # it had no authentication when this node logged in
                return _TokenRefusedError(told)
            return _refused(f"{self._endpoint} wants a user and a password, set user and password_file")
        if "authentication failed" in told:
            return _refused(f"{self._endpoint}: user {user} or the password in {self._config.password_file} is wrong")
        if "authentication is not enabled" in told:
            return _NoLoginsError(told)
        if code == 7 and user:
            return _refused(f"{self._endpoint} does not let user {user} read and write the key: {told}")
        return _UnansweredError(f"HTTP {response.status_code}: {told}")


class _Body(httpx.AsyncByteStream):
    """The content of a request, in place of httpx's own: that is a generator, which is left unfinished when a connection
    breaks under a request, and trio warns of that."""

    def __init__(self, content: bytes) -> None:
        self._left = [content]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class Isolation:
    """Whether an address, such as that of a gateway, still answers: no arbiter, but a hint at who is cut off."""

    def __init__(self, address: str) -> None:
        """`address` is an IPv4 or IPv6 address."""
        self.address = address

    async def is_reachable(self) -> bool:
        """True if one of two pings is answered, each within a second; raises MirrorfsError without the program."""
        command = ["ping", "-n", "-c", "1", "-W", "1", "--", self.address]
        for _ in range(_PINGS):
            with trio.move_on_after(_PING_LIMIT_S):
                try:
                    done = await trio.run_process(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
                    )
                except FileNotFoundError:
                    raise MirrorfsError("isolation_check needs the program ping, install it (Debian: iputils-ping)") from None
                if done.returncode == 0:
                    return True
        return False


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _tls(config: ArbiterConfig) -> ssl.SSLContext:
    """Whom to trust and what to show; a server's certificate is always verified. ArbiterUnreachableError names a bad file."""
    if not any(endpoint.startswith("https:") for endpoint in config.endpoints):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used
    part = "ca"
    try:
        context = ssl.create_default_context(cafile=config.ca)
        if config.certificate is not None and config.key is not None:
            part = "certificate"
            config.certificate.read_bytes()  # the error of load_cert_chain does not tell one file from the other
            part = "key"
            # With a password, even a wrong one, nobody is asked for it on a terminal.
            context.load_cert_chain(config.certificate, config.key, password=lambda: "-")
    except ssl.SSLError as error:
        file = config.ca if part == "ca" else f"{config.certificate} with {config.key}"
        raise _unusable(f"{file} cannot be used: {error.reason or error}") from error
    except OSError as error:
        raise _unusable(f"{getattr(config, part)} cannot be read: {error.strerror}") from error
    return context


def _password(config: ArbiterConfig) -> str:
    """The password for the user of the configuration; ArbiterUnreachableError names a bad file."""
    assert config.password_file is not None
    try:
        return config.password_file.read_text("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise _unusable(f"{config.password_file} is not text in UTF-8") from None
    except OSError as error:
        raise _unusable(f"{config.password_file} cannot be read: {error.strerror}") from error


def _unanswered(question: _Question, failures: list[str]) -> ArbiterUnreachableError:
    missing = "did not say whether it made the change" if question.changes else "does not answer"
    return ArbiterUnreachableError(f"the arbiter {missing}: {'; '.join(failures)}")


def _refused(why: str) -> ArbiterUnreachableError:
    # No other member would say anything else.
    return ArbiterUnreachableError(f"the arbiter refuses: {why}")


def _unusable(what: str) -> ArbiterUnreachableError:
    return ArbiterUnreachableError(f"the arbiter cannot be asked: {what}")


def _answer(response: httpx.Response) -> _Answer:
    """The answer in a response with status 200; raises _UnansweredError if it is none of etcd."""
    try:
        body = response.json()
        # 64-bit integers are text in JSON. A store is at revision 1 from its beginning, so that neither is ever left out.
        cluster, revision = body["header"]["cluster_id"], int(body["header"]["revision"])
    except (ValueError, KeyError, TypeError) as error:
        raise _UnansweredError(f"no answer of etcd: {_one_line(response.text)}") from error
    return _Answer(str(cluster), revision, body)


def _understood(answer: _Answer, understand: Callable[[_Answer], _T]) -> _T:
    try:
        return understand(answer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _UnansweredError(f"no answer of etcd: {_one_line(str(answer.body))}") from error


def _error(response: httpx.Response) -> tuple[int, str]:
    """The code of gRPC, 0 if it is not known, and the words of a response that is an error."""
    code, told = {401: 16, 403: 7}.get(response.status_code, 0), response.text
    try:
        body = response.json()
        code, told = int(body["code"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        pass  # not of etcd, but of something between
    return code, _one_line(told)


def _reason(error: Exception) -> str:
    """Why the network did not do it, in one line: httpx keeps what the system says below its own error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not to be trusted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS does not work: {cause.reason or cause}"
        if isinstance(cause, socket.gaierror):
            return f"its name cannot be resolved: {cause.strerror}"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        below = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else None
        cause = below or cause.__cause__ or cause.__context__
    return _one_line(str(error)) or "the connection was closed"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_CHARACTERS]
