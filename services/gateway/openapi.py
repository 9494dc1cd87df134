"""OpenAPI 3.1, generated from the endpoints and the structs that they speak."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from proto.api import ProblemDetails
from services.gateway.routes.endpoint import PREFIX, Endpoint

_REF = "#/components/schemas/{name}"
_ERRORS = {401: "no known token", 403: "the role is too low", 404: "absent, or another team's", 422: "invalid; `path` names the part"}
_BODY_ERRORS = {400: "malformed", 408: "the body comes too slowly", 413: "the body is too large"}


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
        "responses": {str(status): _response(kind) for status, kind in endpoint.answers.items()},
    }
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(endpoint.body)}
    errors = (_ERRORS if endpoint.least is not None else {}) | (_BODY_ERRORS if endpoint.body is not None else {})
    for status, about in {**errors, 503: "try again, after Retry-After seconds"}.items():
        if status not in endpoint.answers:
            operation["responses"][str(status)] = {"description": about, "content": {"application/problem+json": {"schema": _schema(ProblemDetails)}}}
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
    return {"application/json": {"schema": _schema(kind)}}


def _response(kind: Any) -> dict[str, Any]:
    return {"description": "done"} if kind is None else {"description": "the answer", "content": _content(kind)}
