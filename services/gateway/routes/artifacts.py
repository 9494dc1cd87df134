"""User artifacts: bytes are piped to and from the artifacts service, chunk by chunk, each side waiting for the other."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
from aiohttp import web

from libs.eventlog.log import EventLog
from libs.runtime.http import Problem, body_chunks, unavailable
from proto.api import Artifact, ArtifactPage
from services.gateway.artifacts import ArtifactsClient
from services.gateway.auth import Principal, absent
from services.gateway.queries import Queries
from services.gateway.routes.endpoint import PAGE, PREFIX, Endpoint, Parameter, answer, page
from services.gateway.sse import cut, send
from services.gateway.views import artifact_view

PIECE = 256 << 10

_ARCHIVES = ("application/x-tar", "application/gzip", "application/zstd")
_PASSED_ON = ("Content-Type", "Content-Length", "Content-Disposition", "Content-Range", "Accept-Ranges", "ETag", "Last-Modified", "Cache-Control")
_ASKED_FOR = ("If-None-Match", "If-Match", "If-Range", "Range", "Accept")
_FORMATS = ("tar", "tgz", "tzst")


class ArtifactRoutes:
    """`passed(position, timeout)` waits for the gateway's own read models."""

    def __init__(
        self, *, queries: Queries, artifacts: ArtifactsClient, log: EventLog, passed: Callable[[int, float], Awaitable[bool]], public_url: str
    ) -> None:
        self._queries = queries
        self._artifacts = artifacts
        self._log = log
        self._passed = passed
        self._public_url = public_url

    def endpoints(self) -> list[Endpoint]:
        artifacts = "/teams/{team}/user-artifacts"
        return [
            Endpoint(
                method="POST",
                path=artifacts,
                summary="Upload a tree of files as a tar (plain, gzip or zstd; recognised by its bytes), of any size",
                handler=self.upload,
                least="member",
                parameters=(Parameter(name="name", about="for people"),),
                body=_ARCHIVES,
                answers={201: Artifact},
            ),
            Endpoint(
                method="GET",
                path=artifacts,
                summary="The team's uploads, newest first",
                handler=self.list,
                parameters=PAGE,
                answers={200: ArtifactPage},
            ),
            Endpoint(
                method="GET",
                path=artifacts + "/{artifact}",
                summary="Download a tree, uploaded or made by a build, or one file of it",
                handler=self.download,
                parameters=(
                    Parameter(name="format", about=f"one of {', '.join(_FORMATS)}"),
                    Parameter(name="path", about="only this file, as it is"),
                    Parameter(name="If-None-Match", place="header", about="the ETag that you have"),
                ),
                answers={200: (*_ARCHIVES, "application/octet-stream"), 304: None},
            ),
        ]

    async def upload(self, request: web.Request, principal: Principal) -> web.Response:
        artifact = str(uuid.uuid4())
        name = request.query.get("name", "")
        if len(name) > 200 or "\0" in name:
            raise Problem(422, "invalid", "The request does not say what it must", "name: at most 200 characters", path="name")
        kind = request.headers.get("Content-Type", "")
        failure: list[Exception] = []
        try:
            async with self._artifacts.upload(principal.team, artifact, name, kind, _noting(body_chunks(request), failure)) as inner:
                body = await inner.read()
                if inner.status != 201:
                    return _relayed(inner, body)
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            if failure:  # it was the client's side that broke; the inner request was cut with it, so nothing is kept
                raise failure[0] from None
            raise unavailable("the artifacts service stopped answering") from error
        await self._passed(await self._log.head(), 1.0)
        row = await self._queries.artifact(artifact)
        location = {"Location": f"{self._public_url}{PREFIX}/teams/{principal.team}/user-artifacts/{artifact}"}
        if row is None:  # sealed, but the read model is behind
            return web.Response(body=body, status=201, content_type="application/json", headers=location)
        return answer(artifact_view(row), status=201, headers=location)

    async def list(self, request: web.Request, principal: Principal) -> web.Response:
        limit, before = page(request)
        rows = await self._queries.user_artifacts(principal.team, limit + 1, before)
        following = str(rows[limit - 1].position) if len(rows) > limit else None
        return answer(ArtifactPage(items=[artifact_view(row) for row in rows[:limit]], next=following))

    async def download(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        row = await self._queries.artifact(request.match_info["artifact"])
        if row is None or row.team != principal.team:
            raise absent("artifact")
        query = {name: request.query[name] for name in ("format", "path") if name in request.query}
        if query.get("format", "tar") not in _FORMATS:
            raise Problem(422, "invalid", "The request does not say what it must", f"format: one of {', '.join(_FORMATS)}", path="format")
        headers = {name: request.headers[name] for name in _ASKED_FOR if name in request.headers}
        async with self._artifacts.download(principal.team, row.id, query, headers) as inner:
            if inner.status >= 400:
                return _relayed(inner, await inner.read())
            response = web.StreamResponse(status=inner.status, headers={name: inner.headers[name] for name in _PASSED_ON if name in inner.headers})
            await response.prepare(request)
            try:
                async for piece in inner.content.iter_chunked(PIECE):
                    await send(request, response, piece)
            except aiohttp.ClientError:
                cut(request)
                raise ConnectionResetError("the artifacts service stopped in the middle") from None
            await response.write_eof()
            return response


def _relayed(inner: aiohttp.ClientResponse, body: bytes) -> web.Response:
    """What artifacts refused, in its words. That it refused our grant is no business of the client's."""
    if inner.status in (401, 403) or inner.content_type != "application/problem+json":
        raise unavailable(f"the artifacts service answered {inner.status}")
    retry = {"Retry-After": inner.headers["Retry-After"]} if "Retry-After" in inner.headers else None
    return web.Response(body=body, status=inner.status, content_type="application/problem+json", headers=retry)


async def _noting(chunks: AsyncIterator[bytes], failure: list[Exception]) -> AsyncIterator[bytes]:
    """The chunks; what ends them is noted, because the inner request only says that its body failed."""
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:
        failure.append(error)
        raise
