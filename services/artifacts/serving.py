"""Handlers of what is read and changed here: trees, files, chunks, archived logs, lifetimes; for the gateway, and for workers' inputs."""

import base64
import binascii
from collections.abc import Callable, Iterator
from itertools import islice

from aiohttp import web

from libs.archives.blobstream import MEDIA_TYPE as BLOBS
from libs.archives.blobstream import stream_size
from libs.archives.compression import Format, compressed
from libs.archives.pump import gathered, in_thread
from libs.archives.tree import DIGEST, Entry
from libs.blobstore.store import BlobMissing, BlobStore
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from libs.runtime.http import Problem, body_chunks, read_body, strict_json
from libs.tokens import BuildToken, Grant
from proto.api.artifacts import ArtifactChange, TreeEntry, TreePage, Usage
from services.artifacts.access import Access, Action
from services.artifacts.answers import (
    Traffic,
    absent,
    answer,
    byte_range,
    gone,
    invalid,
    number,
    part_tag,
    path_of,
    ranged,
    unchanged,
)
from services.artifacts.commands import ChangeLifetime, Command, DeleteArtifact
from services.artifacts.decider import Sealed, State
from services.artifacts.logs import Logs
from services.artifacts.queries import Queries
from services.artifacts.receiving import TREE, described
from services.artifacts.trees import NoSuchPath, Trees, listed
from services.artifacts.turns import Turns
from services.artifacts.uploads import Gone

_TYPES: dict[str, str] = {"tar": "application/x-tar", "tgz": "application/gzip", "tzst": "application/zstd", "tree": TREE}
_BYTES = "application/octet-stream"
_PAGE, _MOST = 1000, 5000
_MAX_CHANGE = 4096
DOWNLOADS = 96
"""How many bodies may go at once; each costs up to about 10 MiB when its reader is slow, twice that when it is quick."""
LISTS = 16
"""How many trees may be listed at once."""


class Serving:
    """Handlers. `now` is unix seconds; `most_chunks` is what one request may ask for, `expect` is told when something will be due, or that it is."""

    def __init__(
        self,
        access: Access,
        queries: Queries,
        trees: Trees,
        logs: Logs,
        store: BlobStore,
        commands: CommandLoop[Command, State],
        now: Callable[[], float],
        traffic: Traffic,
        most_chunks: int,
        expect: Callable[[float], None],
        at_once: int = DOWNLOADS,
    ) -> None:
        self._access = access
        self._queries = queries
        self._trees = trees
        self._logs = logs
        self._store = store
        self._commands = commands
        self._now = now
        self._traffic = traffic
        self._most_chunks = most_chunks
        self._expect = expect
        self._downloads = Turns(at_once, "downloads")
        self._lists = Turns(LISTS, "lists")
        self._log_reads = Turns(at_once, "logs")

    async def get_artifact(self, request: web.Request) -> web.StreamResponse:
        grant, sealed = await self._artifact(request, "get")
        with self._downloads.turn(grant.team):
            return await self._send_artifact(request, grant, sealed)

    async def _send_artifact(self, request: web.Request, grant: Grant, sealed: Sealed) -> web.StreamResponse:
        form, path, digest = request.query.get("format", "tar"), path_of(request), sealed.as_sealed.digest
        if form not in _TYPES:
            raise invalid("format", f"one of {', '.join(_TYPES)}")
        if path:
            return await self._send_path(request, grant.team, digest, path, form)
        if form == "tree":
            return await self._send_manifest(request, grant.team, digest)
        return await self._send_archive(request, grant.team, digest, b"", form)

    async def get_blobs(self, request: web.Request) -> web.StreamResponse:
        grant, sealed = await self._artifact(request, "get", "fetch")
        with self._downloads.turn(grant.team):
            return await self._send_blobs(request, grant.team, sealed.as_sealed.digest)

    async def get_tree(self, request: web.Request) -> web.StreamResponse:
        grant, sealed = await self._artifact(request, "see")
        path, recursive = path_of(request) or b"", request.query.get("recursive", "").lower() in ("1", "true", "yes")
        limit = number(request, "limit") or _PAGE
        if limit > _MOST:
            raise invalid("limit", f"at most {_MOST}")
        after = _cursor(request)
        with self._lists.turn(grant.team):
            return await self._send_list(grant.team, sealed.as_sealed.digest, path, recursive, after, limit)

    async def _send_list(self, team: str, digest: str, path: bytes, recursive: bool, after: bytes, limit: int) -> web.StreamResponse:
        tree = await self._trees.open(team, digest)
        found = await in_thread(lambda: list(islice(listed(tree, path, recursive, after), limit + 1)), self._store.threads)
        following = base64.urlsafe_b64encode(found[limit - 1].path).decode() if len(found) > limit else None
        return answer(200, TreePage(items=[_shown(entry) for entry in found[:limit]], next=following))

    async def change_artifact(self, request: web.Request) -> web.StreamResponse:
        grant, _ = await self._artifact(request, "change")
        change = strict_json(await read_body(request, _MAX_CHANGE), ArtifactChange)
        expires_at = None if change.keep is None else int(self._now()) + change.keep
        command = ChangeLifetime(artifact=grant.artifact, pinned=change.pinned, expires_at=expires_at, shorten=change.shorten)
        sealed = (await self._commands.execute(command, _cause(grant))).state
        assert isinstance(sealed, Sealed)
        if sealed.expires_at and not sealed.pinned:
            self._expect(sealed.expires_at)
        return answer(200, described(sealed))

    async def delete_artifact(self, request: web.Request) -> web.StreamResponse:
        grant, _ = await self._artifact(request, "change")
        await self._commands.execute(DeleteArtifact(artifact=grant.artifact), _cause(grant))
        self._expect(self._now())
        return web.Response(status=204)

    async def get_usage(self, request: web.Request) -> web.StreamResponse:
        grant = self._access.grant(request, "", "see")
        artifacts, size = await self._queries.artifacts(grant.team)
        quota = (await self._queries.policy(grant.team)).quota_bytes
        stored = await self._store.usage(grant.team)
        return answer(200, Usage(stored_bytes=stored, artifacts=artifacts, artifact_bytes=size, quota_bytes=quota or None))

    async def get_log(self, request: web.Request) -> web.StreamResponse:
        build, stage = request.match_info["build"], request.match_info["stage"]
        grant = self._access.grant(request, build, "log")
        archived = await self._queries.log_archive(grant.team, build, stage, int(request.match_info["attempt"]))
        if archived is None:
            raise absent()
        first = number(request, "from") or 0
        limit = number(request, "limit")
        headers = {"Content-Type": _BYTES, "Penstock-Lines": str(archived.lines), "Penstock-Archive": str(archived.archive)}
        with self._log_reads.turn(grant.team):
            return await self._traffic.send(request, await self._logs.read(grant.team, archived.digest, first, limit), headers)

    async def get_input(self, request: web.Request) -> web.StreamResponse:
        token, digest = await self._access.input(request, request.match_info["name"])
        with self._downloads.turn(token.team, build=True):
            try:
                return await self._send_manifest(request, token.team, digest)
            except BlobMissing as error:
                raise await self._lost(token, digest, error) from None

    async def get_input_blobs(self, request: web.Request) -> web.StreamResponse:
        token, digest = await self._access.input(request, request.match_info["name"])
        with self._downloads.turn(token.team, build=True):
            try:
                return await self._send_blobs(request, token.team, digest)
            except BlobMissing as error:
                raise await self._lost(token, digest, error) from None

    async def _lost(self, token: BuildToken, digest: str, error: BlobMissing) -> Exception:
        """An input that is not whole: its artifact was gone before the build could hold it; or it is not, and the store is damaged."""
        return error if await self._queries.with_tree(token.team, digest) is not None else Gone()

    async def _artifact(self, request: web.Request, *actions: Action) -> tuple[Grant, Sealed]:
        """One that is there. Raises Problem 404, 410."""
        grant = self._access.grant(request, request.match_info["artifact"], *actions)
        sealed = await self._queries.artifact(grant.team, grant.artifact)
        if sealed is None:
            raise absent()
        if sealed.gone:
            raise gone()
        return grant, sealed

    async def _send_manifest(self, request: web.Request, team: str, digest: str) -> web.StreamResponse:
        etag = f'"{digest}"'
        if has := unchanged(request, etag):
            return has
        tree = await self._trees.open(team, digest)
        headers = {"Content-Type": TREE, "ETag": etag, "Vary": "Accept-Encoding"}
        pieces: Iterator[bytes] = tree.manifest()
        if "zstd" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "zstd"
            pieces = compressed(pieces, "tzst")
        return await self._traffic.send(request, tree.drawn(gathered(pieces)), headers)

    async def _send_path(self, request: web.Request, team: str, digest: str, path: bytes, form: str) -> web.StreamResponse:
        """One file as it is, or a folder as an archive of what lies in it."""
        tree = await self._trees.open(team, digest)
        found = await tree.find(path)
        if found.kind == "folder":
            if form == "tree":
                raise invalid("path", "a part has no manifest: make it an artifact")
            return await self._send_archive(request, team, digest, path, form)
        if found.kind == "link":
            raise NoSuchPath
        etag = f'"{found.file_id}"'
        if has := unchanged(request, etag):
            return has
        headers = {"Content-Type": _BYTES, "ETag": etag}
        status, start, length = ranged(headers, byte_range(request, etag, found.size), found.size)
        return await self._traffic.send(request, tree.drawn(tree.file(found, start)), headers, status, length)

    async def _send_archive(self, request: web.Request, team: str, digest: str, path: bytes, form: Format | str) -> web.StreamResponse:
        etag = f'"{part_tag(digest, path) if path else digest}-{form}"'
        if has := unchanged(request, etag):
            return has
        tree = await self._trees.open(team, digest)
        headers = {"Content-Type": _TYPES[form], "ETag": etag}
        match form:
            case "tar":
                size = await tree.tar_size(path)
                status, start, length = ranged(headers, byte_range(request, etag, size), size)
                return await self._traffic.send(request, tree.drawn(tree.archive(path, "tar", start)), headers, status, length)
            case "tgz" | "tzst":
                return await self._traffic.send(request, tree.drawn(tree.archive(path, form)), headers)
        raise invalid("format", f"one of {', '.join(_TYPES)}")

    async def _send_blobs(self, request: web.Request, team: str, digest: str) -> web.StreamResponse:
        body = self._access.body(request, body_chunks(request, self._most_chunks * DIGEST))
        wanted = _digests(b"".join([piece async for piece in body]))
        tree = await self._trees.open(team, digest)
        if strange := await tree.select(lambda entries: _strange(entries, wanted)):
            raise Problem(422, "invalid", "The tree does not have these chunks", f"{strange.hex()} is none of its chunks", path="body")
        length = stream_size(len(wanted), sum(wanted.values()))
        return await self._traffic.send(request, tree.drawn(tree.blobs(wanted)), {"Content-Type": BLOBS}, length=length)


def _digests(body: bytes) -> dict[bytes, int]:
    """Each with its size in the tree: not known yet."""
    if len(body) % DIGEST:
        raise invalid("body", f"must be digests of {DIGEST} bytes each")
    return dict.fromkeys((body[at : at + DIGEST] for at in range(0, len(body), DIGEST)), -1)


def _strange(entries: Iterator[Entry], wanted: dict[bytes, int]) -> bytes | None:
    """One that is no chunk of the tree; there may be very many, so they are noted in place."""
    left = len(wanted)
    for entry in entries:
        for digest, size in ((entry.digest, entry.size),) if len(entry.digest) == DIGEST else entry.chunks():
            if wanted.get(digest) == -1:
                wanted[digest] = size
                left -= 1
        if not left:
            return None
    return next((digest for digest, size in wanted.items() if size < 0), None)


def _shown(entry: Entry) -> TreeEntry:
    path = entry.path.decode("utf-8", "backslashreplace")
    return TreeEntry(
        path=path,
        kind=entry.kind,
        size=entry.size,
        executable=entry.executable,
        digest=entry.file_id if entry.kind == "file" else "",
        target=entry.target.decode("utf-8", "backslashreplace"),
        path_base64=None if path.encode() == entry.path else base64.b64encode(entry.path).decode(),
    )


def _cursor(request: web.Request) -> bytes:
    try:
        return base64.urlsafe_b64decode(request.query.get("cursor", ""))
    except (binascii.Error, ValueError):
        raise invalid("cursor", "must be one that a page gave") from None


def _cause(grant: Grant) -> Cause:
    return Cause(team=grant.team, correlation_id=grant.artifact, causation_id="", actor=grant.actor or "gateway")
