"""Artifacts as the read models know them: list, look, change their lifetime, delete. Their bytes are in transfers.py."""

from collections.abc import Awaitable, Callable
from typing import get_args

import aiohttp
import msgspec
from aiohttp import web

from libs.eventlog.log import EventLog
from libs.runtime.http import read_body, strict_json, unavailable
from proto.api.artifacts import Artifact, ArtifactChange, ArtifactKind, ArtifactPage, TreePage, Usage
from proto.api.bodies import ProblemDetails
from services.gateway.artifacts import ArtifactsClient, Whose, relayed
from services.gateway.auth import Principal
from services.gateway.projection import ArtifactRow
from services.gateway.queries import Queries
from services.gateway.refusals import absent, gone, invalid
from services.gateway.routes.endpoint import PAGE, Endpoint, Parameter, answer, page
from services.gateway.views import artifact_view

MAX_BODY = 16 << 10
READING: dict[int, type[ProblemDetails]] = {410: ProblemDetails, 429: ProblemDetails, 500: ProblemDetails}
"""What else may come of looking into an artifact."""


class ArtifactRoutes:
    """`passed(position, timeout)` waits for the gateway's own read models."""

    def __init__(
        self,
        *,
        queries: Queries,
        artifacts: ArtifactsClient,
        log: EventLog,
        passed: Callable[[int, float], Awaitable[bool]],
    ) -> None:
        self._queries = queries
        self._artifacts = artifacts
        self._log = log
        self._passed = passed

    def endpoints(self) -> list[Endpoint]:
        artifacts, one = "/teams/{team}/user-artifacts", "/teams/{team}/user-artifacts/{artifact}"
        return [
            Endpoint(
                method="GET",
                path=artifacts,
                summary="The team's artifacts, newest first",
                handler=self.list,
                parameters=(
                    *PAGE,
                    Parameter(
                        name="kind",
                        about="only uploads (user), what builds made (output) or were given of others (part); left away: all but parts",
                        schema=ArtifactKind,
                    ),
                    Parameter(name="build", about="only what this build made, by number or id"),
                    Parameter(name="name", about="only those of this name"),
                ),
                answers={200: ArtifactPage},
            ),
            Endpoint(
                method="GET",
                path=one + "/tree",
                summary="What lies in a folder of a tree",
                handler=self.tree,
                parameters=(
                    Parameter(name="path", about="the folder; left away: the root"),
                    Parameter(name="recursive", about="also what lies below", schema=bool),
                    Parameter(name="limit", about="at most this many (1 to 5000)", schema=int),
                    Parameter(name="cursor", about="`next` of the page before"),
                ),
                answers={200: TreePage, **READING},
            ),
            Endpoint(
                method="PATCH",
                path=one,
                summary="Pin or unpin an artifact, or keep it longer",
                handler=self.change,
                least="member",
                body=ArtifactChange,
                answers={200: Artifact, 410: ProblemDetails},
            ),
            Endpoint(
                method="DELETE",
                path=one,
                summary="Delete an artifact; builds that have been asked for may still read it",
                handler=self.delete,
                least="member",
                answers={204: None},
            ),
            Endpoint(
                method="GET",
                path="/teams/{team}/usage",
                summary="How much the team stores",
                handler=self.usage,
                answers={200: Usage},
            ),
        ]

    async def find(self, artifact: str, principal: Principal) -> ArtifactRow:
        """An artifact that is there. Raises Problem 404, 410."""
        row = await self._of_team(artifact, principal)
        if row.gone:
            raise gone("artifact", artifact, row.gone, row.expires_at)
        return row

    async def _of_team(self, artifact: str, principal: Principal) -> ArtifactRow:
        row = await self._queries.artifact(artifact)
        if row is None or row.team != principal.team:
            raise absent("artifact", artifact)
        return row

    async def list(self, request: web.Request, principal: Principal) -> web.Response:
        limit, before = page(request)
        wanted = {name: request.query[name] for name in ("kind", "build", "name") if name in request.query}
        if wanted.get("kind", "user") not in get_args(ArtifactKind):
            raise invalid("kind", f"one of {', '.join(get_args(ArtifactKind))}")
        if "build" in wanted:
            build = await self._queries.build_of_team(principal.team, wanted["build"])
            if build is None:
                raise absent("build", wanted["build"])
            wanted["build"] = build.id
        if "name" in wanted and not _is_text(wanted["name"]):
            return answer(ArtifactPage(items=[]))
        rows = await self._queries.artifacts(principal.team, limit + 1, before, **wanted)
        following = str(rows[limit - 1].position) if len(rows) > limit else None
        return answer(ArtifactPage(items=[artifact_view(row) for row in rows[:limit]], next=following))

    async def tree(self, request: web.Request, principal: Principal) -> web.Response:
        row = await self.find(request.match_info["artifact"], principal)
        async with self._artifacts.ask(
            "see", Whose(principal.team, row.id, principal.actor), "GET", "/tree", query=request.rel_url.raw_query_string
        ) as inner:
            return told(inner, await inner.read(), request, row.id)

    async def change(self, request: web.Request, principal: Principal) -> web.Response:
        change = strict_json(await read_body(request, MAX_BODY), ArtifactChange)
        row = await self.find(request.match_info["artifact"], principal)
        whose = Whose(principal.team, row.id, principal.actor)
        headers = {"Content-Type": "application/json"}
        async with self._artifacts.ask("change", whose, "PATCH", headers=headers, body=msgspec.json.encode(change)) as inner:
            body = await inner.read()
            if inner.status != 200:
                return relayed(inner, body)
        return answer(artifact_view(await self._changed(row.id, principal)))

    async def delete(self, request: web.Request, principal: Principal) -> web.Response:
        row = await self._of_team(request.match_info["artifact"], principal)
        if not row.gone:
            async with self._artifacts.ask("change", Whose(principal.team, row.id, principal.actor), "DELETE") as inner:
                body = await inner.read()
                if inner.status not in (204, 410):
                    return relayed(inner, body)
            await self._passed(await self._log.head(), 1.0)
        return web.Response(status=204)

    async def usage(self, _: web.Request, principal: Principal) -> web.Response:
        async with self._artifacts.ask("see", Whose(principal.team, "", principal.actor), "GET", "/usage") as inner:
            return relayed(inner, await inner.read())

    async def _changed(self, artifact: str, principal: Principal) -> ArtifactRow:
        """The artifact after a change that is recorded by now."""
        if not await self._passed(await self._log.head(), 1.0):
            raise unavailable("it is recorded, but not to be seen yet")
        return await self._of_team(artifact, principal)


def told(inner: aiohttp.ClientResponse, body: bytes, request: web.Request, artifact: str) -> web.Response:
    """What artifacts answered about a part of an artifact that is there. Raises Problem 404 naming the path that it does not have."""
    if inner.status == 404 and (path := request.query.get("path")):
        raise absent(f"path in artifact `{artifact}` like", path)
    return relayed(inner, body)


def _is_text(name: str) -> bool:
    """Whether the database could have it."""
    return "\0" not in name and not any("\ud800" <= char <= "\udfff" for char in name)
