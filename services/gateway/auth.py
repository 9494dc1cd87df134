"""Who is asking: bearer tokens, known by their SHA-256."""

import hashlib
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from proto.events.team import Role
from services.gateway.projection import TokenRow
from services.gateway.refusals import Denied

REMEMBERED = 10.0
"""Seconds for which a token is taken as known without asking the database."""
MANY = 10_000

_RANK: dict[Role, int] = {"viewer": 0, "member": 1, "owner": 2}


class Principal(msgspec.Struct, frozen=True):
    """Whoever shows a token: acts for `team` in `role`. `actor` goes into the log."""

    team: str
    role: Role
    actor: str

    def may(self, least: Role) -> bool:
        return _RANK[self.role] >= _RANK[least]


PRINCIPAL = web.RequestKey("principal", Principal)
"""Whom a request was found to be from."""


class Authenticator:
    """Finds the principal of a request. The token itself is neither kept nor logged."""

    def __init__(self, find: Callable[[str], Awaitable[TokenRow | None]], clock: Callable[[], float]) -> None:
        self._find = find
        self._clock = clock
        self._known: dict[str, tuple[float, Principal]] = {}

    async def principal(self, request: web.Request) -> Principal:
        """Raises Problem 401 without a known token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise unauthorized("no token")
        sha256 = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        known = self._known.get(sha256)
        if known is not None and known[0] > self._clock():
            return known[1]
        row = await self._find(sha256)
        if row is None:
            raise unauthorized("no known token")
        principal = Principal(row.team, row.role, f"token:{row.token_id}")
        if len(self._known) >= MANY:
            self._known.clear()
        self._known[sha256] = (self._clock() + REMEMBERED, principal)
        return principal


def unauthorized(why: str) -> Denied:
    """The same answer whatever the reason is."""
    return Denied(401, "Say who you are", "a valid bearer token is needed", why=why)


def require(principal: Principal, least: Role) -> None:
    """Raises Problem 403 when the role is too low."""
    if not principal.may(least):
        raise Denied(403, "This token may not do that", f"it takes the role {least}; this token is {principal.role}", why="role")
