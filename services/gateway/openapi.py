"""OpenAPI 3.1, generated from the endpoints and the structs that they speak."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from proto.api.bodies import ProblemDetails
from services.gateway.routes.endpoint import PREFIX, Endpoint

_REF = "#/components/schemas/{name}"
_ERRORS = {401: "no known token", 403: "the role is too low", 404: "absent, or another team's", 422: "invalid; `path` names the part"}
_BODY_ERRORS = {400: "malformed", 408: "the body comes too slowly", 413: "the body is too large"}
_SAID = {
    **_ERRORS,
    **_BODY_ERRORS,
    200: "the answer",
    201: "made",
    202: "accepted",
    204: "done",
    206: "the range that was asked for",
    304: "it is what you have",
    400: "malformed",
    409: "it contradicts what is recorded",
    410: "it was there, and has expired or was deleted",
    412: "it is not what you have",
    415: "its media type, or its encoding, is not one of those that may be sent",
    416: "there is no such range",
    500: "what is stored of it is damaged or lost; `detail` names it, and uploading the same again mends it",
    429: "too many at once: try again, after Retry-After seconds",
    503: "try again, after Retry-After seconds",
    507: "there is no room: the store is full, or the team's quota is used up",
}
"""What each status means."""


def document(endpoints: Iterable[Endpoint], version: str, public_url: str) -> dict[str, Any]:
    """The description of the API."""
    known = list(endpoints)
    types: list[Any] = [ProblemDetails]
    for endpoint in known:
        for kind in (endpoint.body, *endpoint.answers.values()):
            types += [one for one in (kind if isinstance(kind, tuple) else (kind,)) if one is not None and not isinstance(one, str)]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in known:
        paths.setdefault(PREFIX + endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock",
            "version": version,
            "description": "Runs builds for teams. Errors are problems (RFC 9457). `Idempotency-Key` makes a POST safe to repeat.",
        },
        "servers": [{"url": public_url or "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"\{(\w+)\}", endpoint.path)
    ] + [
        {"name": p.name, "in": p.place, "required": False, "description": p.about, "schema": msgspec.json.schema(p.schema)}
        for p in endpoint.parameters
    ]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_"),
        "summary": endpoint.summary,
        "parameters": parameters,
        "responses": {str(status): _response(status, kind) for status, kind in endpoint.answers.items()},
    }
    if endpoint.body is not None:
        operation["requestBody"] = {"required": endpoint.body_required, "content": _content(endpoint.body)}
    for status in (*(_ERRORS if endpoint.least is not None else ()), *(_BODY_ERRORS if endpoint.body is not None else ()), 503):
        operation["responses"].setdefault(str(status), _response(status, ProblemDetails))
    if endpoint.least is None:
        operation["security"] = []
    return operation


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def _content(kind: Any) -> dict[str, Any]:
    """A struct is JSON; text names a media type; a tuple lists several of either."""
    if isinstance(kind, tuple):
        return {media: schema for one in kind for media, schema in _content(one).items()}
    if isinstance(kind, str):
        return {kind: {"schema": {"type": "string"} if kind.startswith("text/") else {}}}
    return {"application/problem+json" if issubclass(kind, ProblemDetails) else "application/json": {"schema": _schema(kind)}}


def _response(status: int, kind: Any) -> dict[str, Any]:
    return {"description": _SAID[status]} | ({"content": _content(kind)} if kind is not None else {})
