"""The console as an ASGI application: the pages, the API of `api`, the stream of pictures, the metrics."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from importlib import resources
from typing import Any, Final

import trio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mirrorfs.console import metrics, openapi
from mirrorfs.console.api import PREFIX, Api, Endpoint, HttpError, Who, status_of
from mirrorfs.errors import MirrorfsError, UsageError

log = logging.getLogger(__name__)

_MAX_BODY: Final = 64 << 10
_BODY_S: Final = 10.0
_MAX_STREAMS: Final = 50
#: Something is sent as often as that at least, so that who has gone away is found out.
_KEEP_ALIVE_S: Final = 15.0
_HEADERS: Final = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_ASSETS: Final = {
    "index.html": "text/html; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "console.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class _Headers:
    """What every answer carries; and the one place where it is told that something failed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, with_headers)
        except ClientDisconnect:
            pass
        except Exception:  # Starlette has answered, and raises it again
            log.exception("%s %s failed", scope.get("method"), scope.get("path"))


class Console:
    """The application for one node."""

    def __init__(self, api: Api, port: int) -> None:
        """`port` is in the name of the cookie: for a browser all ports of a host are one."""
        self._api = api
        self._cookie = openapi.cookie(port)
        self._streams = 0
        directory = resources.files("mirrorfs.console") / "assets"
        self._assets = {name: (directory / name).read_bytes() for name in _ASSETS}
        self._document = openapi.document(api.endpoints, port)

    def app(self) -> ASGIApp:
        """The application."""
        routes = [
            Route("/", self._asset("index.html")),
            *(Route(f"/{name}", self._asset(name)) for name in _ASSETS if name != "index.html"),
            Route("/openapi.json", self._openapi),
            Route("/metrics", self._metrics),
            Route(f"{PREFIX}/session", self._log_in, methods=["POST"]),
            Route(f"{PREFIX}/session", self._log_out, methods=["DELETE"]),
            Route(f"{PREFIX}/stream", self._stream),
            *(Route(PREFIX + each.path, self._endpoint(each), methods=[each.method]) for each in self._api.endpoints),
        ]
        # Around all of it: what Starlette answers by itself carries the headers too.
        return _Headers(
            Starlette(
                routes=routes,
                exception_handlers={MirrorfsError: _on_error, Exception: _on_failure},
            )
        )

    # ---- who asks

    def _who(self, request: Request) -> Who:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        return self._api.who(
            request.cookies.get(self._cookie),
            bearer.strip() if scheme.lower() == "bearer" else None,
            request.headers.get("x-csrf-token"),
            _address(request),
            changes=request.method not in ("GET", "HEAD"),
        )

    # ---- the answers

    def _asset(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return Response(self._assets[name], media_type=_ASSETS[name])

        return answer

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    def _endpoint(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            who = self._who(request)
            body = await _body(request) if endpoint.method != "GET" else {}
            return JSONResponse(await self._api.run(endpoint, who, body))

        return answer

    async def _log_in(self, request: Request) -> Response:
        body = await _body(request)
        match body:
            case {"user": str(user), "password": str(password), **rest} if not rest:
                session, role = await self._api.log_in(user, password, _address(request))
            case _:
                raise UsageError("give user and password")
        answer = JSONResponse({"user": session.user, "role": str(role), "csrf": session.csrf})
        answer.set_cookie(self._cookie, session.token, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    async def _log_out(self, request: Request) -> Response:
        await self._api.log_out(self._who(request))
        answer = Response(status_code=HTTPStatus.NO_CONTENT)
        answer.delete_cookie(self._cookie, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    async def _metrics(self, request: Request) -> Response:
        self._who(request)
        return Response(metrics.text(self._api.observer.latest), media_type=metrics.CONTENT_TYPE)

    async def _stream(self, request: Request) -> Response:
        who = self._who(request)
        if self._streams >= _MAX_STREAMS:
            raise HttpError(503, f"{_MAX_STREAMS} pages are open already: close some")
        return StreamingResponse(self._pictures(who), media_type="text/event-stream")

    async def _pictures(self, who: Who) -> AsyncIterator[str]:
        self._streams += 1
        try:
            while self._api.is_still_in(who):
                yield f"event: picture\ndata: {self._api.observer.encoded}\n\n"
                with trio.move_on_after(_KEEP_ALIVE_S):
                    await self._api.observer.wait()
            yield "event: over\ndata: {}\n\n"
        finally:
            self._streams -= 1


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MirrorfsError)
    kind = "HttpError" if isinstance(error, HttpError) else type(error).__name__
    headers = {name.replace("_", "-"): value for name, value in error.headers.items()} if isinstance(error, HttpError) else {}
    return JSONResponse({"error": str(error), "kind": kind}, status_of(error), headers)


async def _on_failure(request: Request, error: Exception) -> Response:
    wrong = f"this failed in the console ({type(error).__name__}): the log of the controller says where"
    return JSONResponse({"error": wrong, "kind": "ControlError"}, HTTPStatus.INTERNAL_SERVER_ERROR)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


async def _body(request: Request) -> dict[str, Any]:
    """The JSON of a request, {} for none. Raises UsageError, also for what a form of another page could send."""
    content = bytearray()
    with trio.move_on_after(_BODY_S) as reading:
        async for part in request.stream():
            content += part
            if len(content) > _MAX_BODY:
                raise UsageError(f"more than {_MAX_BODY} bytes")
    if reading.cancelled_caught:
        raise UsageError(f"the body did not come within {_BODY_S:g} s")
    if not content:
        return {}
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise UsageError("the content type must be application/json")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise UsageError("the body is no JSON") from None
    if not isinstance(found, dict):
        raise UsageError("the body must be one JSON object")
    return found
