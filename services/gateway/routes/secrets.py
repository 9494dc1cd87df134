"""A team's secrets: set, listed by name, removed; and the keys around all teams'. No route gives a value back."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from libs.runtime.http import read_body, strict_json, unavailable
from proto.api.secrets import Secret, SecretKeys, SecretPage, SecretValue
from proto.secrets import MAX_VALUE
from services.gateway.auth import Principal
from services.gateway.queries import Queries
from services.gateway.refusals import Denied, absent, invalid
from services.gateway.routes.endpoint import MAX_PAGE, Endpoint, Parameter, answer, number
from services.gateway.secrecy import is_name
from services.gateway.secrets import SecretKeeper
from services.gateway.views import secret_view

MAX_BODY = 6 * MAX_VALUE + (1 << 10)
"""A value with each byte of it escaped."""


class SecretRoutes:
    """Owners may change them: whoever may run builds can use each one, and so learn it. `passed(position, timeout)` waits for the read models.
    The keys are for owners of `first`, the team that the deployment began with."""

    def __init__(self, *, queries: Queries, keeper: SecretKeeper, passed: Callable[[int, float], Awaitable[bool]], first: str) -> None:
        self._queries = queries
        self._keeper = keeper
        self._passed = passed
        self._first = first

    def endpoints(self) -> list[Endpoint]:
        secrets, one = "/teams/{team}/secrets", "/teams/{team}/secrets/{secret}"
        return [
            Endpoint(
                method="GET",
                path=secrets,
                summary="The names of the team's secrets; never their values",
                handler=self.list,
                least="member",
                parameters=(
                    Parameter(name="limit", about=f"at most this many (1 to {MAX_PAGE})", schema=int),
                    Parameter(name="cursor", about="`next` of the page before"),
                ),
                answers={200: SecretPage},
            ),
            Endpoint(
                method="PUT",
                path=one,
                summary="Set a secret: `((name))` in plans stands for it. A value that was there is replaced",
                handler=self.set,
                least="owner",
                body=SecretValue,
                answers={200: Secret},
            ),
            Endpoint(
                method="DELETE",
                path=one,
                summary="Remove a secret and every value that it had",
                handler=self.remove,
                least="owner",
                answers={204: None},
            ),
            Endpoint(
                method="POST",
                path="/secret-keys",
                summary="Make a new key that secrets are sealed to on their way, and look at the master keys; done twice it does no harm",
                handler=self.rotate,
                least="owner",
                answers={200: SecretKeys},
            ),
        ]

    async def list(self, request: web.Request, principal: Principal) -> web.Response:
        limit = number(request, "limit", MAX_PAGE, 1, MAX_PAGE) or MAX_PAGE
        after = request.query.get("cursor", "")
        if after and not is_name(after):
            raise invalid("cursor", "`next` of the page before")
        rows = await self._queries.secrets(principal.team, limit + 1, after)
        page = rows[:limit]
        return answer(SecretPage(items=[secret_view(row) for row in page], next=page[-1].name if len(rows) > limit else None))

    async def set(self, request: web.Request, principal: Principal) -> web.Response:
        name = _name(request)
        value = strict_json(await read_body(request, MAX_BODY), SecretValue).value
        if not value:
            raise invalid("value", "is empty")
        if (size := len(value.encode())) > MAX_VALUE:
            raise invalid("value", f"is {size} bytes, over the limit of {MAX_VALUE}")
        kept = await self._keeper.set(principal.team, name, value, principal.actor)
        await self._passed(kept.position, 1.0)
        row = await self._queries.secret(f"{principal.team}/{name}")
        if row is None or row.version < kept.version:
            raise unavailable("it is set, but not to be seen yet")
        return answer(secret_view(row))

    async def remove(self, request: web.Request, principal: Principal) -> web.Response:
        name = _name(request)
        if await self._queries.secret(f"{principal.team}/{name}") is None:
            raise absent("secret", name)
        kept = await self._keeper.remove(principal.team, name, principal.actor)
        await self._passed(kept.position, 1.0)
        return web.Response(status=204)

    async def rotate(self, request: web.Request, principal: Principal) -> web.Response:
        if principal.team != self._first:
            raise Denied(403, "This token may not do that", "the keys are the first team's to decide about", why="another team")
        made = await self._keeper.rotate(principal.team, principal.actor)
        return answer(SecretKeys(sealing_version=made.version, master_key=made.master, values=made.under))


def _name(request: web.Request) -> str:
    name = request.match_info["secret"]
    if not is_name(name):
        raise invalid("secret", "a name has letters, digits, `_`, `-`, `.`, begins with a letter, a digit or `_`, and has at most 128 of them")
    return name
