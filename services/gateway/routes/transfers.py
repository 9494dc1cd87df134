"""Bytes of artifacts, piped to and from the artifacts service as they come, each side waiting for the other. Nothing is kept or unpacked here."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlencode

import aiohttp
import msgspec
from aiohttp import web

from libs.eventlog.log import EventLog
from libs.runtime.http import body_chunks, widen
from proto.api.artifacts import Artifact, PendingUpload
from proto.api.bodies import LONGEST, ProblemDetails
from proto.events.base import ArtifactRef
from services.gateway.artifacts import ArtifactsClient, Whose, relayed
from services.gateway.auth import Principal, require
from services.gateway.commands import request_name
from services.gateway.queries import Queries
from services.gateway.refusals import absent, gone, invalid
from services.gateway.routes.artifacts import READING, ArtifactRoutes, told
from services.gateway.routes.endpoint import PREFIX, Endpoint, Parameter, answer
from services.gateway.sse import cut, send
from services.gateway.views import artifact_view

TREE = "application/vnd.penstock.tree"
LED_TREE = "application/vnd.penstock.blobs+tree"
BLOBS = "application/vnd.penstock.blobs"
BYTES = "application/octet-stream"

_FORMS = {"tar": "application/x-tar", "tgz": "application/gzip", "tzst": "application/zstd", "tree": TREE}
_SENT = ("Content-Type", "Content-Length", "Content-Encoding")
_ASKED_FOR = ("Accept-Encoding", "If-None-Match", "If-Match", "If-Range", "Range")
_ANSWERED = (
    "Content-Type",
    "Content-Length",
    "Content-Encoding",
    "Content-Disposition",
    "Content-Range",
    "Accept-Ranges",
    "ETag",
    "Last-Modified",
    "Cache-Control",
    "Vary",
)
_UPLOADS = uuid.UUID("9f0e6a43-1f0d-4b36-8a0c-3d8c5e2a7f10")
_REFUSED = {409: ProblemDetails, 415: ProblemDetails, 507: ProblemDetails, **READING}

_ref = msgspec.json.Decoder(ArtifactRef).decode
_pending = msgspec.json.Decoder(PendingUpload).decode
DIRECT_URL, DIRECT_TOKEN = "Penstock-Direct-Url", "Penstock-Direct-Token"


class TransferRoutes:
    """`known` finds artifacts; `passed(position, timeout)` waits for the gateway's own read models."""

    def __init__(
        self,
        *,
        known: ArtifactRoutes,
        queries: Queries,
        artifacts: ArtifactsClient,
        log: EventLog,
        passed: Callable[[int, float], Awaitable[bool]],
        public_url: str,
    ) -> None:
        self._known = known
        self._queries = queries
        self._artifacts = artifacts
        self._log = log
        self._passed = passed
        self._public_url = public_url

    def endpoints(self) -> list[Endpoint]:
        artifacts, one = "/teams/{team}/user-artifacts", "/teams/{team}/user-artifacts/{artifact}"
        encoding = Parameter(name="Content-Encoding", place="header", about="`zstd`, for a body of one of our own types")
        return [
            Endpoint(
                method="POST",
                path=artifacts,
                summary=f"Upload a tree of files of any size: a tar (plain, gzip or zstd; recognised by its bytes), or its manifest ({TREE}), "
                f"which tells what is missing (202), and may come after a blob stream of at most 1 MiB with some of that ({LED_TREE}). "
                "Without a body, `tree` or `from` names what is there already",
                handler=self.upload,
                least="member",
                parameters=(
                    Parameter(name="name", about="for people; at most 200 characters"),
                    Parameter(name="keep", about="seconds to keep it, or `forever`; left away: as the team's policy says"),
                    Parameter(name="tree", about="the digest of a tree (hex): 404 `tree-unknown` when the team has not all of it"),
                    Parameter(name="from", about="an artifact's id: a new artifact of it, or of a part of it"),
                    Parameter(name="path", about="with `from`: the folder in it, or the one file"),
                    Parameter(name="Idempotency-Key", place="header", about="names the artifact: the same key continues, or gives, the same one"),
                    encoding,
                ),
                body=(*_FORMS.values(), LED_TREE),
                body_required=False,
                answers={201: Artifact, 202: PendingUpload, **_REFUSED},
            ),
            Endpoint(
                method="POST",
                path=artifacts + "/direct",
                summary="Where a tar may be POSTed past the gateway, if that can be; its artifact then answers to this key and its `tree`",
                handler=self.direct,
                least="member",
                parameters=(
                    Parameter(name="name", about="as for an upload"),
                    Parameter(name="keep", about="as for an upload"),
                    Parameter(name="Idempotency-Key", place="header", about="as for an upload"),
                ),
                answers={200: PendingUpload},
            ),
            Endpoint(
                method="PUT",
                path=one + "/blobs",
                summary="Send chunks that an upload misses; 200 says what is still missing, 201 is the artifact. Several may run at once",
                handler=self.send,
                least="member",
                parameters=(encoding,),
                body=BLOBS,
                answers={200: PendingUpload, 201: Artifact, **_REFUSED},
            ),
            Endpoint(
                method="POST",
                path=one + "/blobs",
                summary="Fetch chunks of a tree: the body is their digests, 32 bytes each; the answer's order is the server's",
                handler=self.fetch,
                least="member",
                parameters=(encoding,),
                body=BYTES,
                answers={200: BLOBS, 415: ProblemDetails, **READING},
            ),
            *(
                Endpoint(
                    method=method,
                    path=one,
                    summary="Download a tree, a folder or a file of it (members), or with `Accept: application/json` see what it is (viewers too). "
                    f"A manifest comes with {DIRECT_URL} and {DIRECT_TOKEN} when its chunks can be fetched there as well",
                    handler=self.download,
                    parameters=(
                        Parameter(name="format", about=f"one of {', '.join(_FORMS)}; left away: as `Accept` says, else tar"),
                        Parameter(name="path", about="only this file, as it is, or this folder, as an archive"),
                        Parameter(name="If-None-Match", place="header", about="the ETag that you have"),
                        Parameter(name="Range", place="header", about="bytes of a file, or of a plain tar"),
                        Parameter(name="If-Range", place="header", about="the ETag that the range is of; all comes when it is another now"),
                    ),
                    answers={
                        200: (Artifact, *_FORMS.values(), BYTES) if method == "GET" else None,
                        206: (_FORMS["tar"], BYTES) if method == "GET" else None,
                        304: None,
                        **dict.fromkeys((*READING, 416), ProblemDetails if method == "GET" else None),
                    },
                )
                for method in ("GET", "HEAD")
            ),
        ]

    async def upload(self, request: web.Request, principal: Principal) -> web.Response:
        artifact = _named(request, principal)
        if "from" in request.query:
            await self._known.find(request.query["from"], principal)
        return await self._take(request, principal, artifact, "POST", "")

    async def direct(self, request: web.Request, principal: Principal) -> web.Response:
        artifact = _named(request, principal)
        asked = urlencode({name: request.query[name] for name in ("name", "keep") if name in request.query})
        direct = self._artifacts.direct("tar", Whose(principal.team, artifact, principal.actor), f"?{asked}" if asked else "", request)
        return answer(PendingUpload(id=artifact, missing=[], missing_bytes=0, missing_blobs=0, direct=direct))

    async def send(self, request: web.Request, principal: Principal) -> web.Response:
        artifact = request.match_info["artifact"]
        row = await self._queries.artifact(artifact)
        if not _is_uuid(artifact) or (row is not None and row.team != principal.team):
            raise absent("upload", artifact)
        return await self._take(request, principal, artifact, "PUT", "/blobs")

    async def _take(self, request: web.Request, principal: Principal, artifact: str, method: str, below: str) -> web.Response:
        """Send the body on, and answer with what came of it."""
        headers = {name: request.headers[name] for name in _SENT if name in request.headers}
        body = _body(request) if request.can_read_body else None
        whose, query = Whose(principal.team, artifact, principal.actor), request.rel_url.raw_query_string
        async with self._artifacts.ask("put", whose, method, below, query=query, headers=headers, body=body, expect=_expects(request)) as inner:
            answered = await inner.read()
            if inner.status in (200, 202) and (direct := self._artifacts.direct("send", whose, "/blobs", request)):
                return answer(msgspec.structs.replace(_pending(answered), direct=direct), status=inner.status)
            if inner.status != 201:
                return relayed(inner, answered)
        await self._passed(await self._log.head(), 1.0)
        row = await self._queries.artifact(artifact)
        location = {"Location": f"{self._public_url}{PREFIX}/teams/{principal.team}/user-artifacts/{artifact}"}
        if row is None:  # sealed, but the read model is behind
            ref = _ref(answered)
            made = Artifact(id=artifact, kind="user", digest=ref.digest, size=ref.size, files=ref.files, name=request.query.get("name", ""))
            return answer(made, status=201, headers=location)
        if row.gone:  # the key stood for it
            raise gone("artifact", artifact, row.gone, row.expires_at)
        return answer(artifact_view(row), status=201, headers=location)

    async def fetch(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        row = await self._known.find(request.match_info["artifact"], principal)
        headers = {name: request.headers[name] for name in _SENT if name in request.headers}
        whose = Whose(principal.team, row.id, principal.actor)
        async with self._artifacts.ask("get", whose, "POST", "/blobs", headers=headers, body=_body(request), expect=_expects(request)) as inner:
            return await _piped(request, inner, row.id, {})

    async def download(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        row = await self._known.find(request.match_info["artifact"], principal)
        accept = request.headers.get("Accept", "")
        if "application/json" in accept and not request.query:
            return answer(artifact_view(row), headers={"Vary": "Accept"})
        require(principal, "member")
        query = request.rel_url.raw_query_string
        if request.query.get("format", "tar") not in _FORMS:
            raise invalid("format", f"one of {', '.join(_FORMS)}")
        if "format" not in request.query and (form := next((form for form, media in _FORMS.items() if media in accept), None)):
            query = f"{query}&format={form}" if query else f"format={form}"
        headers = {name: request.headers[name] for name in _ASKED_FOR if name in request.headers}
        whose, more = Whose(principal.team, row.id, principal.actor), {}
        if "format=tree" in query and (direct := self._artifacts.direct("fetch", whose, "/blobs", request)):
            more = {DIRECT_URL: direct.url, DIRECT_TOKEN: direct.token, "Cache-Control": "no-store"}
        async with self._artifacts.ask("get", whose, request.method, query=query, headers=headers) as inner:
            return await _piped(request, inner, row.id, more)


def _named(request: web.Request, principal: Principal) -> str:
    """The artifact that an upload will be. Raises Problem 422 for what the query asks for it."""
    if len(request.query.get("name", "")) > 200 or "\0" in request.query.get("name", ""):
        raise invalid("name", "at most 200 characters, and no NUL")
    _check_keep(request.query.get("keep"))
    key = request.headers.get("Idempotency-Key")
    return str(uuid.uuid5(_UPLOADS, request_name(principal.team, key)) if key else uuid.uuid4())


async def _piped(request: web.Request, inner: aiohttp.ClientResponse, artifact: str, more: dict[str, str]) -> web.StreamResponse:
    """The answer as it comes, in the pieces that the socket gives: to join them would only be copying."""
    if inner.status >= 400:
        return told(inner, await inner.read(), request, artifact)
    headers = {name: inner.headers[name] for name in _ANSWERED if name in inner.headers} | more
    response = web.StreamResponse(status=inner.status, headers=headers)
    await response.prepare(request)
    widen(inner.connection and inner.connection.transport)
    try:
        async for piece in inner.content.iter_any():
            await send(request, response, piece)
    except aiohttp.ClientPayloadError:
        cut(request)
        raise ConnectionResetError("the artifacts service stopped in the middle") from None
    await response.write_eof()
    return response


def _body(request: web.Request) -> AsyncIterator[bytes]:
    widen(request.transport)
    return body_chunks(request)


def _expects(request: web.Request) -> bool:
    """Whether the client waits to be told to send its body: then artifacts tells, once it wants it."""
    return request.headers.get("Expect", "").lower() == "100-continue"


def _check_keep(text: str | None) -> None:
    if text is None or text == "forever":
        return
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and 1 <= int(text) <= LONGEST):
        raise invalid("keep", f"seconds, from 1 to {LONGEST}, or `forever`")


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
