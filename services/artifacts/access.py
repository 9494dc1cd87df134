"""Who may do what here: the gateway by a grant, a worker by its attempt's build token and its own key. Whoever may not is told no more than that."""

import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from typing import Literal

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from libs.proofs import NOTHING, STREAM, Late, check_proof
from libs.runtime.addresses import address_of
from libs.runtime.http import Problem
from libs.tokens import BadSignature, BadToken, BuildToken, Grant, read_token
from services.artifacts.queries import Queries

Action = Literal["put", "get", "see", "change", "log", "tar", "send", "fetch"]

_CONTENT = web.RequestKey("content", str)

logger = structlog.get_logger()


class Access:
    """Checks tokens. `now` is unix seconds by the clock that all services share, `own` by this machine's, which is the one that workers are told."""

    def __init__(
        self, grant_key: str, server_key: str, queries: Queries, now: Callable[[], float], own: Callable[[], float], registry: CollectorRegistry
    ) -> None:
        self._grant_key = grant_key
        self._server_key = server_key
        self._queries = queries
        self._now = now
        self._own = own
        self._refusals = Counter("penstock_artifacts_refusals", "Requests that showed no right to what they asked", ["why"], registry=registry)

    def grant(self, request: web.Request, subject: str, *actions: Action) -> Grant:
        """The gateway's grant for just this, which one of these actions allows. Raises Problem 401, 403."""
        try:
            grant = read_token(self._grant_key, _bearer(request), self._now(), Grant)
        except BadToken:
            raise self._unknown(request, "no grant") from None
        if grant.artifact != subject or grant.action not in actions:
            raise self._forbidden(request, "another grant")
        return grant

    async def input(self, request: web.Request, name: str) -> tuple[BuildToken, str]:
        """The token of a running attempt that has this input, and the input's tree. Raises Problem 401, 403, LogUnavailable."""
        token = await self._build_token(request)
        if name not in token.inputs:
            raise self._forbidden(request, "another input", token)
        return token, token.inputs[name]

    async def output(self, request: web.Request, step: str, name: str) -> BuildToken:
        """The token of a running attempt that has this output. Raises as `input`."""
        token = await self._build_token(request)
        if f"{step}/{name}" not in token.outputs:
            raise self._forbidden(request, "another output", token)
        return token

    async def body(self, request: web.Request, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The body's pieces. Raises Problem 401 at their end if it is another body than its sender signed."""
        content = request.get(_CONTENT, STREAM)
        if content == STREAM:
            async for piece in pieces:
                yield piece
            return
        seen = hashlib.sha256()
        async for piece in pieces:
            seen.update(piece)
            yield piece
        if not hmac.compare_digest(seen.hexdigest(), content):
            raise self._unknown(request, "another body")

    async def _build_token(self, request: web.Request) -> BuildToken:
        try:
            shown = _bearer(request)
            token = read_token(self._server_key, shown, self._now(), BuildToken)
            content = check_proof(token.key, request.headers, shown, request.method, request.rel_url.raw_path_qs, self._own())
        except BadToken:
            raise self._unknown(request, "no build token") from None
        except BadSignature:
            raise self._unknown(request, "not signed by its worker", token) from None
        except Late:
            raise self._unknown(request, "another time", token) from None
        # Only blobs say themselves what they are.
        if content != NOTHING if request.method == "GET" else content == STREAM and request.method != "PUT":
            raise self._unknown(request, "an unnamed body", token)
        request[_CONTENT] = content
        if await self._queries.is_over(token.build, token.stage, token.attempt):
            raise self._forbidden(request, "over", token)
        return token

    def _unknown(self, request: web.Request, why: str, token: BuildToken | None = None) -> Problem:
        self._note(request, why, token)
        return Problem(401, "unauthorized", "A valid token is needed", headers={"WWW-Authenticate": "Bearer"})

    def _forbidden(self, request: web.Request, why: str, token: BuildToken | None = None) -> Problem:
        self._note(request, why, token)
        return Problem(403, "forbidden", "The token does not allow this")

    def _note(self, request: web.Request, why: str, token: BuildToken | None) -> None:
        self._refusals.labels(why).inc()
        named = {"worker": token.worker, "build": token.build, "stage": token.stage, "attempt": token.attempt} if token else {}
        logger.warning("refused", why=why, method=request.method, path=request.path, address=address_of(request), **named)


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise BadToken
    return token
