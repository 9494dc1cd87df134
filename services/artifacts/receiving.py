"""Handlers of what is sent here: tars, manifests, chunks; for the gateway, and for workers' outputs."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext

import msgspec
from aiohttp import web

from libs.archives.blobstream import MEDIA_TYPE as BLOBS
from libs.archives.blobstream import Fill, poured, whole_pieces
from libs.archives.compression import Decompressor, Format, unpacked
from libs.archives.pages import Pages
from libs.archives.rules import ArchiveRefused, Limits
from libs.blobstore.store import BlobMissing
from libs.runtime.decisions import Cause
from libs.runtime.http import TIMEOUTS, Problem, StraightBody, Timeouts, body_chunks, straight, widen
from libs.runtime.memory import give_back_memory
from libs.tokens import BuildToken, Grant
from proto.api.artifacts import PendingUpload
from proto.api.bodies import LONGEST
from proto.events.base import ArtifactRef
from services.artifacts.access import Access, Action
from services.artifacts.answers import Traffic, absent, answer, damaged, invalid, path_of, refused
from services.artifacts.commands import SealArtifact
from services.artifacts.decider import Sealed
from services.artifacts.queries import Queries
from services.artifacts.turns import Turns
from services.artifacts.uploads import Gone, TreeUnknown, Uploads

TREE = "application/vnd.penstock.tree"
LED_TREE = "application/vnd.penstock.blobs+tree"
"""A blob stream of at most 1 MiB, and after it the manifest of a tree that has these blobs."""
UPLOADS = 32
"""How many bodies may come at once."""
_LEAST = 64 << 10
"""Bytes that a body brings in the time that a body has, while others wait for its turn."""

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OUTPUTS = uuid.UUID("2f1d6c1e-5f0b-4c0e-9d5a-7b8f3a1c9e42")


class Receiving:
    """Handlers."""

    def __init__(
        self,
        access: Access,
        queries: Queries,
        uploads: Uploads,
        limits: Limits,
        traffic: Traffic,
        pages: Pages,
        at_once: int = UPLOADS,
    ) -> None:
        self._access = access
        self._queries = queries
        self._uploads = uploads
        self._limits = limits
        self._traffic = traffic
        self._pages = pages
        self._turns = Turns(at_once, "uploads")

    async def put_artifact(self, request: web.Request) -> web.StreamResponse:
        grant, artifact = self._granted(request, "tar")
        team, query = grant.team, request.query
        if grant.action == "tar" and (request.content_type in (TREE, LED_TREE) or not query.keys() <= {"name", "keep"}):
            raise Problem(403, "forbidden", "The token does not allow this")
        if len(query.get("name", "")) > 200 or "\0" in query.get("name", ""):
            raise invalid("name", "at most 200 characters, and no NUL")
        seal = SealArtifact(artifact=artifact, kind="user", digest="", size=0, files=0, name=query.get("name", ""))
        keep, cause = await self._keep(request, team), _cause(grant, artifact)
        with self._turns.turn(team):
            if "tree" in query:
                if not _DIGEST.fullmatch(query["tree"]):
                    raise invalid("tree", "must be a digest in hex")
                return _answer(await self._uploads.known(team, seal, keep, cause, query["tree"]))
            if "from" in query:
                seal = msgspec.structs.replace(seal, part=query.get("kind") == "part")
                return _answer(await self._part(request, team, seal, keep, cause))
            if request.content_type in (TREE, LED_TREE):
                return _answer(await self._manifest(request, team, seal, keep, cause))
            self._check_length(request, self._limits.max_stream)
            with self._pages.share() as filling:
                return _answer(await self._uploads.tar(team, seal, keep, cause, self._received(request, team), filling))

    async def put_blobs(self, request: web.Request) -> web.StreamResponse:
        grant, artifact = self._granted(request, "send")
        with self._turns.turn(grant.team):
            return _answer(await self._blobs(request, grant.team, artifact, _cause(grant, artifact)), more=200)

    async def put_output(self, request: web.Request) -> web.StreamResponse:
        token, artifact, cause = await self._output(request)
        if request.content_type != TREE:
            raise Problem(415, "unsupported-media-type", "An output comes as a manifest", TREE)
        seal = SealArtifact(
            artifact=artifact,
            kind="output",
            digest="",
            size=0,
            files=0,
            name=request.match_info["name"],
            build=token.build,
            stage=token.stage,
            attempt=token.attempt,
            step=request.match_info["step"],
        )
        with self._turns.turn(token.team, build=True):
            keep = await self._queries.output_lifetime(token.team, token.build)
            return _answer_ref(await self._manifest(request, token.team, seal, keep, cause))

    async def put_output_blobs(self, request: web.Request) -> web.StreamResponse:
        token, artifact, cause = await self._output(request)
        with self._turns.turn(token.team, build=True):
            return _answer_ref(await self._blobs(request, token.team, artifact, cause), more=200)

    def _granted(self, request: web.Request, direct: Action) -> tuple[Grant, str]:
        """The gateway may, and a client that it has given the action `direct`."""
        artifact = request.match_info["artifact"]
        grant = self._access.grant(request, artifact, "put", direct)
        if not _UUID.fullmatch(artifact):
            raise invalid("id", "must be a UUID")
        return grant, artifact

    async def _output(self, request: web.Request) -> tuple[BuildToken, str, Cause]:
        step, name = request.match_info["step"], request.match_info["name"]
        token = await self._access.output(request, step, name)
        cause = Cause(team=token.team, correlation_id=token.build, causation_id="", actor=f"worker:{token.worker}")
        return token, output_id(token, step, name), cause

    async def _manifest(self, request: web.Request, team: str, seal: SealArtifact, keep: int, cause: Cause) -> Sealed | PendingUpload:
        self._check_length(request, self._limits.max_manifest)
        try:
            led = request.content_type == LED_TREE
            body = self._access.body(request, self._received(request, team))
            return await self._uploads.manifest(team, seal, keep, cause, body, _form(request), led)
        except ArchiveRefused as error:
            raise refused("manifest-refused", error) from None

    async def _blobs(self, request: web.Request, team: str, artifact: str, cause: Cause) -> Sealed | PendingUpload:
        if request.content_type != BLOBS:
            raise Problem(415, "unsupported-media-type", "Chunks come as a blob stream", BLOBS)
        self._check_length(request, self._limits.max_stream)
        form = _form(request)
        try:
            with straight(request) if form == "tar" else nullcontext() as body, self._pages.share() as filling:
                if body is not None:
                    await asyncio.to_thread(give_back_memory)  # what small pieces left free would come on top
                fill = self._straight(request, team, body) if body is not None else poured(self._unpacked(request, team, form))
                return await self._uploads.blobs(team, artifact, cause, whole_pieces(fill, filling))
        except ArchiveRefused as error:
            raise refused("blobs-refused", error) from None

    async def _part(self, request: web.Request, team: str, seal: SealArtifact, keep: int, cause: Cause) -> Sealed:
        """A new artifact of another, or of a part of it. No bytes are moved."""
        source = await self._queries.artifact(team, request.query["from"])
        if source is None:
            raise absent()
        if source.gone:
            raise Gone
        try:
            if path := path_of(request):
                return await self._uploads.part(team, seal, keep, cause, source.as_sealed.digest, path)
            return await self._uploads.copy(team, seal, keep, cause, source)
        except (BlobMissing, TreeUnknown):
            sealed = await self._queries.artifact(team, request.query["from"])
            if sealed is None or sealed.gone:
                raise Gone from None
            raise damaged(f"artifact {request.query['from']} is not whole") from None

    async def _keep(self, request: web.Request, team: str) -> int:
        """Seconds for which an upload is kept; 0: for ever."""
        match request.query.get("keep"):
            case None:
                return (await self._queries.policy(team)).input_seconds
            case "forever":
                return 0
            case text if text.isascii() and text.isdigit() and len(text) < 12 and 1 <= int(text) <= LONGEST:
                return int(text)
        raise invalid("keep", f"seconds, from 1 to {LONGEST}, or `forever`")

    def _check_length(self, request: web.Request, most: int) -> None:
        if (request.content_length or 0) > most:
            raise Problem(413, "too-large", "What is sent is too large", f"at most {self._limits.max_bytes} bytes of files", limit=most)

    async def _received(self, request: web.Request, team: str) -> AsyncIterator[bytes]:
        """The body. Raises Problem 408 when it dawdles; while others wait for its turn, that is said sooner."""
        widen(request.transport)
        pace = self._pace(request, team)
        async for piece in body_chunks(request):
            pace.came(len(piece))
            yield piece
            pace.wait()

    def _unpacked(self, request: web.Request, team: str, form: Format) -> AsyncIterator[bytes]:
        body = self._received(request, team)
        return body if form == "tar" else unpacked(body, Decompressor(self._limits, form))

    def _straight(self, request: web.Request, team: str, body: StraightBody) -> Fill:
        """The same, into memory that it is to stay in."""
        pace = self._pace(request, team)

        async def fill(memory: memoryview) -> int:
            size = len(memory)
            pace.wait()
            while memory and (came := await body.into(memory)):
                pace.came(came)
                memory = memory[came:]
            return size - len(memory)

        return fill

    def _pace(self, request: web.Request, team: str) -> "_Pace":
        seconds = request.app.get(TIMEOUTS, Timeouts()).body
        return _Pace(seconds, self._traffic, lambda: self._turns.waited_for(team), asyncio.get_running_loop().time)


class _Pace:
    """What a body brings in the time that it is waited for. Raises Problem 408 when that is little, while others wait for its turn."""

    def __init__(self, seconds: float, traffic: Traffic, waited_for: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._traffic = traffic
        self._waited_for = waited_for
        self._clock = clock
        self._waited, self._brought = 0.0, 0
        self.wait()

    def wait(self) -> None:
        """From now on."""
        self._since = self._clock()

    def came(self, size: int) -> None:
        self._traffic.came(size)
        now = self._clock()
        self._waited, self._since, self._brought = self._waited + now - self._since, now, self._brought + size
        if self._waited > self._seconds:
            if self._brought < _LEAST and self._waited_for():
                raise Problem(408, "slow-body", "The body came too slowly", f"under {_LEAST} bytes in {self._seconds:g} s while others wait")
            self._waited, self._brought = 0.0, 0


def output_id(token: BuildToken, step: str, name: str) -> str:
    """The artifact of an attempt's output: always the same, so that a worker may try again."""
    return str(uuid.uuid5(_OUTPUTS, "\0".join((token.team, token.build, token.stage, str(token.attempt), step, name))))


def described(sealed: Sealed) -> dict[str, object]:
    """An artifact, for the gateway. `expires_at` 0: never."""
    event = sealed.as_sealed
    return {
        "id": event.artifact,
        "digest": event.digest,
        "size": event.size,
        "files": event.files,
        "expires_at": sealed.expires_at,
        "pinned": sealed.pinned,
    }


def _answer(done: Sealed | PendingUpload, more: int = 202) -> web.Response:
    """201; or `more`, when more is to come."""
    return answer(more, done) if isinstance(done, PendingUpload) else answer(201, described(done))


def _answer_ref(done: Sealed | PendingUpload, more: int = 202) -> web.Response:
    if isinstance(done, PendingUpload):
        return answer(more, done)
    event = done.as_sealed
    return answer(201, ArtifactRef(id=event.artifact, digest=event.digest, size=event.size, files=event.files))


def _cause(grant: Grant, artifact: str) -> Cause:
    return Cause(team=grant.team, correlation_id=artifact, causation_id="", actor=grant.actor or "gateway")


def _form(request: web.Request) -> Format:
    """How a body of one of our own types is packed. Raises Problem 415."""
    match request.headers.get("Content-Encoding", "identity").lower():
        case "identity":
            return "tar"
        case "zstd":
            return "tzst"
    raise Problem(415, "unsupported-encoding", "The body is packed in an unknown way", "Content-Encoding: zstd, or none")
