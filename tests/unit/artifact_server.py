"""An honest server of the artifacts protocol, in memory: what the client's transfers are tried on. It can be told to misbehave in between."""

import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from backports import zstd

from penstock import Client
from penstock.client.tree import CHUNK, ZERO_CHUNK, Entry, manifest_of, read_manifest, tree_digest

Before = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
END = bytes(36)


def problem(status: int, kind: str = "about:blank", headers: dict[str, str] | None = None, **more: object) -> web.Response:
    body = json.dumps({"status": status, "type": kind, **more})
    return web.Response(status=status, content_type="application/problem+json", body=body, headers=headers)


def distinct(entries: list[Entry]) -> dict[bytes, int]:
    """The chunks of a tree with their sizes, in the order of their first appearance."""
    return {digest: size for entry in entries if entry.kind == "file" for digest, size in entry.chunks()}


class ArtifactServer:
    """`blobs` is what is stored, `received` the bytes of the bodies that came, `log` the requests. `before` may answer a request first;
    `cut_after`: a PUT's connection is broken after so many bytes, once for each number. `direct`: where it says
    that chunks may go (of the artifact `{}`) and come, too."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {ZERO_CHUNK: bytes(CHUNK)}
        self.manifests: dict[str, bytes] = {}
        self.keys: dict[str, str] = {}
        self.log: list[str] = []
        self.received = 0
        self.encodings: list[str] = []
        self.before: Before | None = None
        self.cut_after: list[int] = []
        self.cut_sending: list[int] = []
        self.asked: list[int] = []
        self.direct = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/api/v1/teams/main/user-artifacts")
        self.log.append(f"{request.method} {path}{'?tree' if 'tree' in request.query else ''}")
        if self.before and (answer := await self.before(request)) is not None:
            return answer
        match request.method, path.strip("/").split("/"):
            case "POST", [""]:
                return await self._post(request)
            case "PUT", [upload, "blobs"]:
                return await self._put(request, upload)
            case "POST", [artifact, "blobs"]:
                return await self._send(request, artifact)
            case "GET", [artifact] if request.query.get("format") == "tree":
                packed = request.headers.get("Accept-Encoding") == "zstd"
                manifest = self.manifests[artifact]
                headers = {"Content-Encoding": "zstd"} if packed else {}
                if self.direct:
                    headers |= {"Penstock-Direct-Url": self.direct, "Penstock-Direct-Token": "t"}
                return web.Response(body=zstd.compress(manifest) if packed else manifest, headers=headers)
            case "GET", [artifact]:
                return await self.handle_file(request)
        return problem(404)

    async def _body(self, request: web.Request) -> bytes:
        data = bytearray()
        cut = self.cut_after.pop(0) if self.cut_after and request.method == "PUT" else None
        async for piece in request.content.iter_any():
            data += piece
            self.received += len(piece)
            if cut is not None and len(data) >= cut:
                self._store(bytes(data[:cut]))
                assert request.transport
                request.transport.abort()
                raise web.HTTPBadRequest
        self.encodings.append(request.headers.get("Content-Encoding", ""))
        return bytes(data)  # aiohttp has decompressed it

    async def _post(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        key = request.headers["Idempotency-Key"]
        if tree := request.query.get("tree"):
            found = [artifact for artifact, manifest in self.manifests.items() if tree_digest([manifest]).hex() == tree]
            if not found or self._missing(found[0]):
                return problem(404, "tree-unknown")
            self.manifests[key] = self.manifests[found[0]]
            return self._answer(key)
        if request.content_type == "application/vnd.penstock.blobs+tree":
            end = self._end(body)
            if refused := self._store(body[:end]):
                return refused
            body = body[end:]
        assert b"".join(manifest_of(read_manifest(body))) == body
        self.manifests[key] = body
        return self._answer(key)

    def _missing(self, artifact: str) -> list[tuple[int, bytes, int]]:
        chunks = distinct(read_manifest(self.manifests[artifact]))
        return [(n, digest, size) for n, (digest, size) in enumerate(chunks.items()) if digest not in self.blobs]

    def _answer(self, artifact: str, pending: int = 202) -> web.Response:
        missing = self._missing(artifact)
        if not missing:
            entries = read_manifest(self.manifests[artifact])
            size = sum(entry.size for entry in entries if not entry.target)
            files = sum(entry.kind == "file" for entry in entries)
            digest = tree_digest([self.manifests[artifact]]).hex()
            return web.json_response({"id": artifact, "digest": digest, "size": size, "files": files}, status=201)
        ranges: list[list[int]] = []
        for n, _, _ in missing:
            if ranges and ranges[-1][1] == n - 1:
                ranges[-1][1] = n
            else:
                ranges.append([n, n])
        lacked = sum(size for _, _, size in missing)
        answer: dict[str, object] = {"id": artifact, "missing": ranges, "missing_bytes": lacked, "missing_blobs": len(missing)}
        if self.direct:
            answer["direct"] = {"url": self.direct.format(artifact), "token": "t"}
        return web.json_response(answer, status=pending)

    def _end(self, data: bytes) -> int:
        """Where the stream that the data begins with ends."""
        at = 0
        while data[at : at + 36] != END:
            at += 36 + int.from_bytes(data[at + 32 : at + 36], "big")
        return at + 36

    def _store(self, data: bytes) -> web.Response | None:
        """Frames up to the end or the cut."""
        at = 0
        while data[at : at + 36] != END:
            digest, size = data[at : at + 32], int.from_bytes(data[at + 32 : at + 36], "big")
            contents = data[at + 36 : at + 36 + size]
            if len(data) < at + 36 or len(contents) < size:
                return problem(422, "archive-refused", detail="the stream is cut")
            if hashlib.sha256(contents).digest() != digest:
                return problem(422, "archive-refused", detail="a chunk's bytes do not match its digest")
            self.blobs[digest] = contents
            at += 36 + size
        return None

    async def _put(self, request: web.Request, artifact: str) -> web.Response:
        if artifact not in self.manifests:
            return problem(404, "upload-unknown", detail="there is no such upload")
        return self._store(await self._body(request)) or self._answer(artifact, 200)

    async def _send(self, request: web.Request, artifact: str) -> web.StreamResponse:
        wanted = await request.read()
        digests = [wanted[at : at + 32] for at in range(0, len(wanted), 32)]
        assert set(digests) <= set(distinct(read_manifest(self.manifests[artifact])))
        self.asked.append(len(digests))
        response = web.StreamResponse()
        await response.prepare(request)
        stream = b"".join(digest + len(self.blobs[digest]).to_bytes(4, "big") + self.blobs[digest] for digest in sorted(digests)) + END
        if self.cut_sending:
            await response.write(stream[: self.cut_sending.pop(0)])
            assert request.transport
            request.transport.close()
            return response
        await response.write(stream)
        return response

    async def handle_file(self, request: web.Request) -> web.Response:
        """One file of an artifact, or a range of it."""
        entries = read_manifest(self.manifests[request.path.rpartition("/")[2]])
        wanted = os.fsencode(request.query["path"])
        entry = next(entry for entry in entries if entry.path == wanted)
        data = b"".join(self.blobs[digest] for digest, _ in entry.chunks())
        headers = {"ETag": f'"{entry.file_id}"'}
        asked = request.http_range
        if asked.start is None:
            return web.Response(body=data, headers=headers)
        if asked.start >= len(data):
            return problem(416)
        end = len(data) if asked.stop is None else min(asked.stop, len(data))
        headers["Content-Range"] = f"bytes {asked.start}-{end - 1}/{len(data)}"
        return web.Response(status=206, body=data[asked.start : end], headers=headers)


@asynccontextmanager
async def connected(server: ArtifactServer, patience: float = 30.0, patience_upload: float = 60.0) -> AsyncIterator[Client]:
    """A client of it, over a real connection."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        async with Client(f"http://127.0.0.1:{port}", "pst_x", "main", patience=patience, patience_upload=patience_upload) as client:
            yield client
    finally:
        await runner.cleanup()
