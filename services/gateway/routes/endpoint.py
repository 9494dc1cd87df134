"""An endpoint as data: it is served, authenticated and documented from one description."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from libs.runtime.http import Problem, expect_later, unavailable
from proto.events.team import Role
from services.gateway.audit import Audit
from services.gateway.auth import PRINCIPAL, Authenticator, Principal, require
from services.gateway.refusals import absent, invalid

PREFIX = "/api/v1"
MAX_PAGE = 200

Handler = Callable[[web.Request, Principal], Awaitable[web.StreamResponse]]
Served = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Certainty(Protocol):
    """Whether the read models know all that has happened."""

    def mark(self) -> int:
        """Now: for `lasted`."""

    async def lasted(self, since: int) -> bool:
        """Whether they knew it from the mark on, and know what had happened when this was asked."""


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter or header. `schema` is its type."""

    name: str
    about: str
    schema: Any = str
    place: str = "query"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`path` below the prefix. `least` is the role that it takes (None: no token needed); with `{team}` in its path it is for that team's tokens,
    and for all others as if absent, unless `any_team`. `answers`: status → type of the JSON body, or a media type. `body`: type, or a media type;
    or several."""

    method: str
    path: str
    summary: str
    handler: Handler
    least: Role | None = "viewer"
    any_team: bool = False
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    body_required: bool = True
    answers: dict[int, Any]


PAGE = (
    Parameter(name="limit", about=f"at most this many (1 to {MAX_PAGE})", schema=int),
    Parameter(name="cursor", about="`next` of the page before"),
)

LAST_EVENT = (
    Parameter(name="Last-Event-ID", place="header", about="go on after the message with this id"),
    Parameter(name="last_event_id", about="the same, for who can set no header"),
)

ANYBODY = Principal("", "viewer", "")


def add(app: web.Application, endpoints: Iterable[Endpoint], authenticator: Authenticator, certainty: Certainty, audit: Audit) -> None:
    """Serve the endpoints."""
    for endpoint in endpoints:
        guarded = _audited(_certain(_guarded(endpoint, authenticator), certainty), audit)
        app.router.add_route(endpoint.method, PREFIX + endpoint.path, guarded, expect_handler=expect_later)


def _audited(handler: Served, audit: Audit) -> Served:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Problem as problem:
            if problem.status in (401, 403):
                audit.note(request, problem)
            raise

    return handle


def _certain(handler: Served, certainty: Certainty) -> Served:
    """What the read models do not know may only be unknown to them: after a crash of the database they are, for a moment, what they were before.
    So nobody is told that something is not there unless that is certain."""

    async def handle(request: web.Request) -> web.StreamResponse:
        since = certainty.mark()
        try:
            return await handler(request)
        except Problem as problem:
            if problem.status in (401, 404, 422) and not await certainty.lasted(since):
                raise unavailable("the read models are catching up") from problem
            raise

    return handle


def _guarded(endpoint: Endpoint, authenticator: Authenticator) -> Served:
    handler, least = endpoint.handler, endpoint.least
    for_team = "{team}" in endpoint.path and not endpoint.any_team
    known = {parameter.name for parameter in endpoint.parameters if parameter.place == "query"}

    async def handle(request: web.Request) -> web.StreamResponse:
        principal = ANYBODY
        if least is not None:
            principal = request[PRINCIPAL] = await authenticator.principal(request)
            if for_team and request.match_info["team"] != principal.team:
                raise absent("team", request.match_info["team"])
            require(principal, least)
        if unknown := request.query.keys() - known:
            raise invalid(min(unknown), f"is no parameter here; there is {', '.join(sorted(known))}" if known else "is no parameter here")
        return await handler(request, principal)

    return handle


def answer(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers)


def number(request: web.Request, name: str, default: int | None, least: int = 0, most: int = 10**18) -> int | None:
    """A numeric query parameter. Raises Problem 422 naming it."""
    text = request.query.get(name)
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and least <= int(text) <= most):
        raise invalid(name, f"a whole number from {least} to {most}")
    return int(text)


def page(request: web.Request) -> tuple[int, int | None]:
    """(limit, cursor) of a list."""
    return number(request, "limit", 50, 1, MAX_PAGE) or 50, number(request, "cursor", None)
