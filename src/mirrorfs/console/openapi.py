"""The OpenAPI document of the API, made from its table."""

from typing import Any

from mirrorfs import __version__
from mirrorfs.console.api import PREFIX, Endpoint
from mirrorfs.console.roles import Role

_ERRORS = {
    "400": "The request makes no sense.",
    "401": "Not logged in.",
    "403": "Not allowed with this role, or without the CSRF token.",
    "409": "Refused: it might lose data, or cannot be done now.",
    "428": "Only a person can know whether this is right: ask, and send it again with `yes`.",
    "503": "The node does not answer, or could not do it.",
}


def cookie(port: int) -> str:
    """The name of the session's cookie on a console of that port."""
    return f"__Host-mirrorfs-{port}"


def document(endpoints: tuple[Endpoint, ...], port: int) -> dict[str, Any]:
    """The document (OpenAPI 3.1) as plain values."""
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(PREFIX + endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    paths[f"{PREFIX}/session"] |= {"post": _log_in(), "delete": _log_out()}
    paths[f"{PREFIX}/stream"] = {"get": _stream()}
    paths["/metrics"] = {"get": _metrics()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mirrorfs",
            "version": __version__,
            "description": "One pair of mirrored nodes, as the controller of one of them sees it. Each node has its own.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "session": {"type": "apiKey", "in": "cookie", "name": cookie(port)},
                "token": {"type": "http", "scheme": "bearer"},
            },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error", "kind"],
                    "properties": {
                        "error": {"type": "string", "description": "One line: what is wrong, and what to do."},
                        "kind": {"type": "string"},
                    },
                }
            },
        },
        "security": [{"session": []}, {"token": []}],
    }


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(*codes: str) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/Error"}
    return {code: _answer(_ERRORS[code], reference) for code in codes}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    name = endpoint.path[1:].replace("/", "_").replace("-", "_")
    changes = endpoint.method != "GET"
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()}_{name}",
        "summary": endpoint.summary,
        "description": f"Needs the role {endpoint.role or Role.VIEW}.",
        "responses": {"200": _answer("Done.", endpoint.answer)}
        | _errors("401", "403", *(("400", "409", "428", "503") if changes else ())),
    }
    if endpoint.fields:
        schema = {"type": "object", "properties": endpoint.fields, "additionalProperties": False}
        if endpoint.needs:
            schema["required"] = list(endpoint.needs)
        operation["requestBody"] = {"required": bool(endpoint.needs), "content": {"application/json": {"schema": schema}}}
    return operation


def _log_in() -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": ["user", "password"],
        "properties": {"user": {"type": "string"}, "password": {"type": "string", "format": "password"}},
        "additionalProperties": False,
    }
    session = {
        "type": "object",
        "required": ["user", "role", "csrf"],
        "properties": {name: {"type": "string"} for name in ("user", "role", "csrf")},
    }
    return {
        "operationId": "log_in",
        "summary": "Log in: sets the cookie.",
        "security": [],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": _answer("Logged in.", session)}
        | _errors("400", "401")
        | {"429": {"description": "Too many tries; Retry-After says when again."}},
    }


def _log_out() -> dict[str, Any]:
    return {
        "operationId": "log_out",
        "summary": "Log out.",
        "responses": {"204": {"description": "Done."}} | _errors("401", "403"),
    }


def _stream() -> dict[str, Any]:
    return {
        "operationId": "stream",
        "summary": "The picture again and again, as server-sent events of the type `picture`, about once a second.",
        "responses": {
            "200": {"description": "A stream without end.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
        }
        | _errors("401"),
    }


def _metrics() -> dict[str, Any]:
    return {
        "operationId": "metrics",
        "summary": "Metrics in Prometheus's text format.",
        "responses": {"200": {"description": "The metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
        | _errors("401"),
    }
