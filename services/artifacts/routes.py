"""The service's HTTP edge: trees and archived logs in and out. For the gateway and for workers; people ask the gateway."""

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from libs.archives.compression import Format
from libs.archives.rules import ArchiveRefused, LimitExceeded
from libs.archives.tree import TreeSummary
from libs.blobstore.objects import StoreFull, StoreUnavailable
from libs.blobstore.store import BlobMissing
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from libs.runtime.http import Problem, body_chunks, expect_later, problems, unavailable
from libs.tokens import BuildToken
from proto.events.artifact import ArtifactSealed
from proto.events.base import ArtifactRef
from services.artifacts.access import Access
from services.artifacts.commands import Command, SealArtifact
from services.artifacts.decider import State
from services.artifacts.logs import Logs
from services.artifacts.queries import Queries
from services.artifacts.trees import Trees

USER_LIFETIME = 12 * 3600
OUTPUT_LIFETIME = 30 * 86400
"""Seconds an artifact can be read."""

_TYPES: dict[Format, str] = {"tar": "application/x-tar", "tgz": "application/gzip", "tzst": "application/zstd"}
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_OUTPUTS = uuid.UUID("2f1d6c1e-5f0b-4c0e-9d5a-7b8f3a1c9e42")
_WRITE_SECONDS = 60.0
"""How long a reader may take no byte."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """Handlers. `now` is unix seconds."""

    def __init__(
        self,
        access: Access,
        queries: Queries,
        trees: Trees,
        logs: Logs,
        commands: CommandLoop[Command, State],
        now: Callable[[], float],
        registry: CollectorRegistry,
    ) -> None:
        self._access = access
        self._queries = queries
        self._trees = trees
        self._logs = logs
        self._commands = commands
        self._now = now
        self._bytes = Counter("penstock_artifacts_bytes", "Bytes of archives, by direction", ["direction"], registry=registry)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[problems, store_problems])
        routes: tuple[tuple[str, str, Handler], ...] = (
            ("POST", "/artifacts/{artifact}", self.put_artifact),
            ("GET", "/artifacts/{artifact}", self.get_artifact),
            ("GET", "/logs/{build}/{stage}/{attempt:\\d{1,9}}", self.get_log),
            ("GET", "/inputs/{name}", self.get_input),
            ("POST", "/outputs/{step}/{name}", self.put_output),
        )
        for method, path, handler in routes:
            app.router.add_route(method, path, handler, expect_handler=expect_later)
        return app

    async def put_artifact(self, request: web.Request) -> web.StreamResponse:
        artifact = request.match_info["artifact"]
        grant = self._access.grant(request, artifact, "put")
        if not _UUID.fullmatch(artifact):
            raise Problem(422, "invalid", "The id is no UUID", artifact)
        tree = await self._keep(request, grant.team)
        command = SealArtifact(
            artifact=artifact,
            kind="user",
            digest=tree.digest,
            size=tree.size,
            files=tree.files,
            name=request.query.get("name", "")[:255],
            expires_at=int(self._now()) + USER_LIFETIME,
        )
        sealed = await self._seal(command, Cause(team=grant.team, correlation_id=artifact, causation_id="", actor="gateway"))
        answer = {"id": artifact, "digest": sealed.digest, "size": sealed.size, "files": sealed.files, "expires_at": sealed.expires_at}
        return _json(201, answer)

    async def get_artifact(self, request: web.Request) -> web.StreamResponse:
        artifact = request.match_info["artifact"]
        grant = self._access.grant(request, artifact, "get")
        sealed = await self._queries.artifact(grant.team, artifact, self._now())
        if sealed is None:
            raise _absent()
        form = _format(request)
        if "path" in request.query:
            return await self._send_path(request, grant.team, sealed.digest, request.query["path"], form)
        return await self._send_tree(request, grant.team, sealed.digest, form)

    async def get_log(self, request: web.Request) -> web.StreamResponse:
        build, stage = request.match_info["build"], request.match_info["stage"]
        grant = self._access.grant(request, build, "log")
        archived = await self._queries.log_archive(grant.team, build, stage, int(request.match_info["attempt"]))
        if archived is None:
            raise _absent()
        first = _number(request, "from") or 0
        records = await self._logs.read(grant.team, archived.digest, first, _number(request, "limit"))
        headers = {"Penstock-Lines": str(archived.lines), "Penstock-Archive": str(archived.archive)}
        return await self._send(request, records, "application/octet-stream", headers)

    async def get_input(self, request: web.Request) -> web.StreamResponse:
        token, digest = await self._access.input(request, request.match_info["name"])
        return await self._send_tree(request, token.team, digest, "tar")

    async def put_output(self, request: web.Request) -> web.StreamResponse:
        step, name = request.match_info["step"], request.match_info["name"]
        token = await self._access.output(request, step, name)
        tree = await self._keep(request, token.team)
        artifact = output_id(token, step, name)
        command = SealArtifact(
            artifact=artifact,
            kind="output",
            digest=tree.digest,
            size=tree.size,
            files=tree.files,
            name=name,
            build=token.build,
            stage=token.stage,
            attempt=token.attempt,
            step=step,
            expires_at=int(self._now()) + OUTPUT_LIFETIME,
        )
        cause = Cause(team=token.team, correlation_id=token.build, causation_id="", actor=f"worker:{token.worker}")
        sealed = await self._seal(command, cause)
        return _json(201, ArtifactRef(id=artifact, digest=sealed.digest, size=sealed.size, files=sealed.files))

    async def _keep(self, request: web.Request, team: str) -> TreeSummary:
        limits = self._trees.limits
        if (request.content_length or 0) > limits.max_stream:
            raise Problem(413, "too-large", "The archive is too large", f"at most {limits.max_bytes} bytes", limit=limits.max_bytes)
        return await self._trees.keep(team, self._received(request))

    async def _seal(self, command: SealArtifact, cause: Cause) -> ArtifactSealed:
        sealed = (await self._commands.execute(command, cause)).state
        assert isinstance(sealed, ArtifactSealed)
        return sealed

    async def _send_tree(self, request: web.Request, team: str, digest: str, form: Format) -> web.StreamResponse:
        etag = f'"{digest}-{form}"'
        if _has(request, etag):
            return web.Response(status=304, headers={"ETag": etag})
        entries = await self._trees.entries(team, digest)
        return await self._send(request, await self._trees.archive(team, entries, form), _TYPES[form], {"ETag": etag})

    async def _send_path(self, request: web.Request, team: str, digest: str, path: str, form: Format) -> web.StreamResponse:
        """One file as it is, or a folder as an archive of what lies in it."""
        wanted = path.strip("/").encode("utf-8", "surrogateescape")
        entries = await self._trees.entries(team, digest)
        found = next((entry for entry in entries if entry.path == wanted), None)
        if found is None or found.kind == "link":
            raise _absent()
        if found.kind == "file":
            etag = f'"{found.digest.hex()}"'
            if _has(request, etag):
                return web.Response(status=304, headers={"ETag": etag})
            headers = {"ETag": etag, "Content-Length": str(found.size)}
            return await self._send(request, await self._trees.file(team, found), "application/octet-stream", headers)
        inside = wanted + b"/"
        below = [msgspec.structs.replace(e, path=e.path.removeprefix(inside)) for e in entries if e.path.startswith(inside)]
        etag = f'"{_part(digest, wanted)}-{form}"'
        if _has(request, etag):
            return web.Response(status=304, headers={"ETag": etag})
        return await self._send(request, await self._trees.archive(team, below, form), _TYPES[form], {"ETag": etag})

    async def _send(self, request: web.Request, pieces: AsyncGenerator[bytes, None], kind: str, headers: dict[str, str]) -> web.StreamResponse:
        """Stream an answer as fast as it is read. What fails before its first piece is still answered as a problem; later the connection is cut."""
        response = web.StreamResponse(headers={**headers, "Content-Type": kind})

        counter = self._bytes.labels("out")
        async with aclosing(pieces):
            first = await anext(pieces, b"")
            await response.prepare(request)
            async with asyncio.timeout(_WRITE_SECONDS):
                await response.write(first)
            counter.inc(len(first))
            async for piece in pieces:
                async with asyncio.timeout(_WRITE_SECONDS):
                    await response.write(piece)
                counter.inc(len(piece))
            await response.write_eof()
        return response

    async def _received(self, request: web.Request) -> AsyncIterator[bytes]:
        counter = self._bytes.labels("in")
        async for piece in body_chunks(request):
            counter.inc(len(piece))
            yield piece


@web.middleware
async def store_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What archives and the store raise, as problems."""
    try:
        return await handler(request)
    except LimitExceeded as error:
        raise Problem(413, "too-large", "The archive is past a limit", str(error), member=error.member, rule=error.rule) from None
    except ArchiveRefused as error:
        raise Problem(422, "archive-refused", "The archive was refused", str(error), member=error.member, rule=error.rule) from None
    except StoreFull:
        raise Problem(507, "store-full", "There is no room left in the store") from None
    except StoreUnavailable:
        raise unavailable("the store cannot be reached") from None
    except BlobMissing:
        raise _absent() from None


def output_id(token: BuildToken, step: str, name: str) -> str:
    """The artifact of an attempt's output: always the same, so that a worker may try again."""
    return str(uuid.uuid5(_OUTPUTS, "\0".join((token.team, token.build, token.stage, str(token.attempt), step, name))))


def _json(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


def _absent() -> Problem:
    return Problem(404, "not-found", "There is no such thing")


def _has(request: web.Request, etag: str) -> bool:
    return etag in (tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(","))


def _part(digest: str, path: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(digest) + path).hexdigest()


def _format(request: web.Request) -> Format:
    match request.query.get("format", "tar"):
        case "tar" | "tgz" | "tzst" as form:
            return form
        case _:
            raise Problem(422, "invalid", "There is no such format", "format: tar, tgz or tzst", path="format")


def _number(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise Problem(422, "invalid", "The request does not say what it must", f"{name}: must be a number", path=name)
    return int(text)
