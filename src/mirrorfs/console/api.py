"""The HTTP API: a table of what can be asked, from which the routes and the OpenAPI document are made.

Who asks has a session (the cookie, and for what changes something the CSRF token in `X-CSRF-Token`) or a token of a program
(`Authorization: Bearer`). An error is `{"error": one line, "kind": its class}`.
"""

import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from mirrorfs.console.gate import Session, Sessions, Throttle, who_is_throttled
from mirrorfs.console.lines import Lines
from mirrorfs.console.observer import Observer
from mirrorfs.console.roles import Role
from mirrorfs.console.users import Users
from mirrorfs.errors import (
    ConfigError,
    ConfirmationNeededError,
    MirrorfsError,
    RefusedError,
    UsageError,
)

log = logging.getLogger(__name__)

PREFIX: Final = "/api/v1"
_MOST_EVENTS: Final = 200
#: So many passwords may wait to be looked at; each takes a tenth of a second, one at a time.
_MOST_LOGINS: Final = 8
#: So long a line of the audit log may take.
_DISK_S: Final = 2.0
#: Characters: nobody drives out what stands there by a long one.
_LONGEST_NOTE: Final = 300


@dataclass(frozen=True, slots=True)
class Who:
    """Who asks: the name, the role, the address; the session if it is a person's, the token if it is a program."""

    name: str
    role: Role
    address: str
    session: Session | None = None
    token: str = ""


class HttpError(MirrorfsError):
    """An answer that is none of the node's: not logged in, not allowed, too often."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def status_of(error: MirrorfsError) -> int:
    """The HTTP status of an error."""
    match error:
        case HttpError():
            return error.status
        case UsageError() | ConfigError():
            return 400
        case ConfirmationNeededError():
            return 428
        case RefusedError():
            return 409
        case _:
            return 503


Handler = Callable[[Who, Mapping[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One line of the table. `role` None: everybody. `fields`: the JSON of the body, a schema for each; `needs`: which of them
    have to be there. `answer` is the schema of the answer. `audited`: who did it stands in the audit log."""

    method: str
    path: str
    summary: str
    role: Role | None
    handler: Handler
    answer: dict[str, Any]
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    audited: bool = False

    def check(self, body: Mapping[str, Any]) -> None:
        """UsageError unless the body is as the table says."""
        for name, value in body.items():
            if name not in self.fields:
                raise UsageError(f"{name}: unknown, use {', '.join(self.fields) or 'nothing'}")
            wanted = {"boolean": bool, "string": str}[self.fields[name]["type"]]
            if type(value) is not wanted:
                raise UsageError(f"{name}: must be a {self.fields[name]['type']}")
        for name in self.needs:
            if name not in body:
                raise UsageError(f"{name}: missing")


_YES: Final = {"yes": {"type": "boolean", "description": "A person has said yes to what the answer 428 asked."}}
_MESSAGE: Final = {
    "type": "object",
    "required": ["message"],
    "properties": {"message": {"type": "string", "description": "One line that says what was done."}},
}
_SESSION: Final = {
    "type": "object",
    "required": ["user", "role", "csrf"],
    "properties": {
        "user": {"type": "string"},
        "role": {"type": "string", "enum": [str(role) for role in Role]},
        "csrf": {"type": "string", "description": "To be sent as X-CSRF-Token with whatever changes something."},
    },
}
_EVENT: Final = {
    "type": "object",
    "required": ["at", "level", "text"],
    "properties": {
        "at": {"type": "number", "description": "UNIX time in seconds."},
        "level": {"type": "string", "enum": ["info", "warning", "bad"]},
        "text": {"type": "string"},
    },
}
_NULLABLE_NUMBER: Final = {"type": ["number", "null"]}
_LATENCY: Final = {
    "type": "object",
    "required": ["total", "local", "wire", "peer", "count"],
    "properties": {
        part: {"type": "object", "properties": {"p50_s": _NULLABLE_NUMBER, "p99_s": _NULLABLE_NUMBER}}
        for part in ("total", "local", "wire", "peer")
    }
    | {"count": {"type": "integer", "description": "How many were measured in the last minute."}},
}
_NODE: Final = {
    "type": "object",
    "required": ["name", "is_this", "state", "mount", "posture", "services", "addresses", "heard"],
    "properties": {
        name: {"type": "string"} for name in ("name", "state", "mount", "posture", "because", "services", "addresses", "since")
    }
    | {"is_this": {"type": "boolean"}, "heard": {"type": "boolean"}},
}
PICTURE: Final = {
    "type": "object",
    "required": ["at", "volume", "protection", "nodes", "serves", "can_switch_over", "epoch", "latency", "events"],
    "properties": {
        "at": {"type": "number"},
        "volume": {"type": "string"},
        "protection": {
            "type": "object",
            "required": ["level", "sentence"],
            "properties": {"level": {"enum": ["good", "warning", "bad"]}, "sentence": {"type": "string"}},
        },
        "nodes": {"type": "array", "items": _NODE, "minItems": 2, "maxItems": 2},
        "serves": {"type": ["string", "null"], "description": "Which node the application writes on."},
        "can_switch_over": {"type": "boolean"},
        "epoch": {"type": "integer"},
        "write_bytes_per_s": _NULLABLE_NUMBER,
        "changes_per_s": _NULLABLE_NUMBER,
        "syncs_per_s": _NULLABLE_NUMBER,
        "latency": {"type": "object", "properties": {"change": _LATENCY, "sync": _LATENCY}},
        "resync": {"type": ["object", "null"]},
        "verify": {"type": ["object", "null"]},
        "maintenance": {"type": "boolean"},
        "events": {"type": "array", "items": _EVENT},
    },
}


class Api:
    """What the endpoints do."""

    def __init__(self, observer: Observer, users: Users, audit: Lines, refused: Lines) -> None:
        """`audit` is for what users do, `refused` for logins of nobody: who has no password cannot drive out what is there."""
        self.observer = observer
        self.users = users
        self.sessions = Sessions()
        self._audit = audit
        self._refused = refused
        self._audit_limiter = trio.CapacityLimiter(1)
        self._throttle = Throttle()
        self._hashing = trio.CapacityLimiter(1)
        self._logins = 0
        view, operate = Role.VIEW, Role.OPERATE
        self.endpoints: Final = (
            Endpoint("GET", "/picture", "The pair as it is now.", view, self._picture, PICTURE),
            Endpoint(
                "GET",
                "/events",
                "What has happened, newest first.",
                view,
                self._events,
                {"type": "object", "required": ["events"], "properties": {"events": {"type": "array", "items": _EVENT}}},
            ),
            Endpoint(
                "GET",
                "/audit",
                "Who has pressed which button, and who has logged in, newest first.",
                operate,
                self._read_audit,
                {"type": "object", "required": ["entries"], "properties": {"entries": {"type": "array"}}},
            ),
            Endpoint("GET", "/session", "Who is logged in.", view, self._session, _SESSION),
            Endpoint(
                "POST",
                "/switchover",
                "Move addresses, services and role to the other node.",
                operate,
                self._switch_over,
                _MESSAGE,
                audited=True,
            ),
            Endpoint(
                "POST",
                "/promote",
                "Have the application on this node; without the other one only with `yes`.",
                operate,
                self._promote,
                _MESSAGE,
                _YES,
                audited=True,
            ),
            Endpoint(
                "POST",
                "/maintenance",
                "Do nothing automatically, on both nodes, or do it again.",
                operate,
                self._maintenance,
                _MESSAGE,
                {"on": {"type": "boolean"}},
                ("on",),
                audited=True,
            ),
            Endpoint(
                "POST", "/pause", "Pause the replication.", operate, partial(self._say, "pause"), _MESSAGE, _YES, audited=True
            ),
            Endpoint("POST", "/resume", "End a pause.", operate, partial(self._say, "resume"), _MESSAGE, audited=True),
            Endpoint(
                "POST", "/verify", "Compare both trees while they are used.", operate, self._verify, _MESSAGE, audited=True
            ),
            Endpoint("POST", "/verify/stop", "Stop comparing.", operate, self._stop_verify, _MESSAGE, audited=True),
            Endpoint(
                "POST",
                "/split-brain/resolve",
                "Keep the history of one node; what the other one changed is kept aside there.",
                operate,
                partial(self._say, "split-brain-resolve"),
                _MESSAGE,
                {"keep": {"type": "string", "description": "The node whose history is kept."}} | _YES,
                ("keep",),
                audited=True,
            ),
        )

    # ---- who asks

    def who(self, cookie: str | None, bearer: str | None, csrf: str | None, address: str, *, changes: bool) -> Who:
        """Who asks, by cookie or token. Raises HttpError 401 if it is nobody, 403 without the CSRF token where it is needed."""
        if bearer is not None:
            program = self.users.of_token(bearer)
            if program is None:
                raise HttpError(401, "this token is not known (any more)")
            return Who(program[0], program[1], address, token=bearer)
        session = self.sessions.find(cookie, trio.current_time()) if cookie else None
        if session is None:
            raise HttpError(401, "not logged in")
        role = self.users.role_of(session.user, session.proof)
        if role is None:
            self.sessions.end(session.token)
            raise HttpError(401, "this user is not known any more, or has a new password")
        if changes and (csrf is None or not secrets.compare_digest(csrf.encode(), session.csrf.encode())):
            raise HttpError(403, "the CSRF token is missing or wrong: load the page anew")
        return Who(session.user, role, address, session)

    def is_still_in(self, who: Who) -> bool:
        """Whether who began to watch may go on; watching is no use of a session."""
        if who.session is None:
            return self.users.of_token(who.token) is not None
        found = self.sessions.find(who.session.token, trio.current_time(), touch=False)
        return found is not None and self.users.role_of(who.name, found.proof) is not None

    async def log_in(self, name: str, password: str, address: str) -> tuple[Session, Role]:
        """Begin a session. Raises HttpError: 401 for a wrong name or password, 429 for too many tries."""
        now, key = trio.current_time(), who_is_throttled(address)
        if (wait_s := self._throttle.wait_s(key, now)) > 0:
            raise HttpError(429, f"too many tries: again in {math.ceil(wait_s)} s", retry_after=str(math.ceil(wait_s)))
        if self._logins >= _MOST_LOGINS:
            raise HttpError(429, "too many tries at once: again in a moment", retry_after="2")
        self._throttle.failed(key, now)  # until it turns out otherwise, or many at once would be one try
        self._logins += 1
        try:
            # The proof before: a password that is changed meanwhile must not count for a session that begins with the old one.
            proof = self.users.proof_of(name)
            role = await trio.to_thread.run_sync(self.users.check, name, password, limiter=self._hashing)
        finally:
            self._logins -= 1
        if role is None:
            await self.note(name, address, "login", "refused", self._refused)
            raise HttpError(401, "the name or the password is wrong")
        self._throttle.succeeded(key, now)
        await self.note(name, address, "login", "done")
        return self.sessions.begin(name, proof, now), role

    async def log_out(self, who: Who) -> None:
        """End the session."""
        if who.session is not None:
            self.sessions.end(who.session.token)
            await self.note(who.name, who.address, "logout", "done")

    async def note(self, name: str, address: str, action: str, result: str, lines: Lines | None = None) -> None:
        """Add a line to the audit log, and to that of the controller. A disk that hangs keeps nobody from acting."""
        name, action, result = name[:100], action[:_LONGEST_NOTE], result[:_LONGEST_NOTE]
        entry = {"at": round(time.time(), 3), "user": name, "address": address, "action": action, "result": result}
        log.info("console: %r from %s: %s: %s", name, address, action, result)
        add = (lines or self._audit).add
        with trio.move_on_after(_DISK_S):
            await trio.to_thread.run_sync(add, entry, limiter=self._audit_limiter, abandon_on_cancel=True)

    # ---- what is asked

    async def run(self, endpoint: Endpoint, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do it, and note who did; raises MirrorfsError."""
        assert endpoint.role is not None
        if not who.role.includes(endpoint.role):
            raise HttpError(403, f"{who.name} may only look ({who.role}): this needs the role {endpoint.role}")
        endpoint.check(body)
        if not endpoint.audited:
            return await endpoint.handler(who, body)
        said = endpoint.path[1:] + "".join(f" {name}={value!r}" for name, value in body.items())
        await self.note(who.name, who.address, said, "asked")  # before: what is asked stands there whatever comes of it
        try:
            answer = await endpoint.handler(who, body)
        except MirrorfsError as error:
            await self.note(who.name, who.address, said, f"refused: {error}")
            raise
        await self.note(who.name, who.address, said, str(answer.get("message", "done")))
        return answer

    async def _picture(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return self.observer.picture

    async def _events(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"events": self.observer.events(_MOST_EVENTS)}

    async def _read_audit(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        entries = await trio.to_thread.run_sync(
            self._audit.last, _MOST_EVENTS, limiter=self._audit_limiter, abandon_on_cancel=True
        )
        return {"entries": entries[::-1]}

    async def _session(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"user": who.name, "role": str(who.role), "csrf": who.session.csrf if who.session else ""}

    async def _switch_over(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self.observer.node.command("switchover", {})

    async def _promote(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self.observer.node.command("promote", {"yes": bool(body.get("yes"))})

    async def _maintenance(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self.observer.node.command("maintenance", {"on": body["on"]})

    async def _say(self, command: str, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self.observer.node.ask(command, **body)

    async def _verify(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        await self.observer.node.ask("verify")
        return {"message": "both trees are being compared"}

    async def _stop_verify(self, who: Who, body: Mapping[str, Any]) -> dict[str, Any]:
        await self.observer.node.ask("verify-stop")
        return {"message": "the comparison is stopped"}
