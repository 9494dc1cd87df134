"""Who may do what here: the gateway by a grant, a worker by its attempt's build token. Whoever may not is told no more than that."""

from collections.abc import Callable
from typing import Literal

from aiohttp import web

from libs.runtime.http import Problem
from libs.tokens import BadToken, BuildToken, Grant, read_token
from services.artifacts.queries import Queries

Action = Literal["put", "get", "see", "change", "log", "tar", "send", "fetch"]


class Access:
    """Checks tokens. `now` is unix seconds."""

    def __init__(self, grant_key: str, server_key: str, queries: Queries, now: Callable[[], float]) -> None:
        self._grant_key = grant_key
        self._server_key = server_key
        self._queries = queries
        self._now = now

    def grant(self, request: web.Request, subject: str, *actions: Action) -> Grant:
        """The gateway's grant for just this, which one of these actions allows. Raises Problem 401, 403."""
        try:
            grant = read_token(self._grant_key, _bearer(request), self._now(), Grant)
        except BadToken:
            raise _unknown() from None
        if grant.artifact != subject or grant.action not in actions:
            raise _forbidden()
        return grant

    async def input(self, request: web.Request, name: str) -> tuple[BuildToken, str]:
        """The token of a running attempt that has this input, and the input's tree. Raises Problem 401, 403, LogUnavailable."""
        token = await self._build_token(request)
        if name not in token.inputs:
            raise _forbidden()
        return token, token.inputs[name]

    async def output(self, request: web.Request, step: str, name: str) -> BuildToken:
        """The token of a running attempt that has this output. Raises as `input`."""
        token = await self._build_token(request)
        if f"{step}/{name}" not in token.outputs:
            raise _forbidden()
        return token

    async def _build_token(self, request: web.Request) -> BuildToken:
        try:
            token = read_token(self._server_key, _bearer(request), self._now(), BuildToken)
        except BadToken:
            raise _unknown() from None
        if await self._queries.is_over(token.build, token.stage, token.attempt):
            raise _forbidden()
        return token


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _unknown()
    return token


def _unknown() -> Problem:
    return Problem(401, "unauthorized", "A valid token is needed", headers={"WWW-Authenticate": "Bearer"})


def _forbidden() -> Problem:
    return Problem(403, "forbidden", "The token does not allow this")
