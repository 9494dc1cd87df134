"""An artifacts service for workers under test. It speaks the real protocol, from folders and into folders."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from aiohttp import web

from libs.archives.blobstream import END_FRAME, BlobStreamReader, frame_header
from libs.archives.place import create_file, place
from libs.archives.tree import CHUNK, DIGEST, ZERO_CHUNK, Entry, Tree, TreeCheck, TreeSummary, read_manifest, root_of, tree_of
from proto.events.base import ArtifactRef

TOKEN = "token-of-the-attempt"


class Upload:
    """An output on its way."""

    def __init__(self, manifest: bytes) -> None:
        self.entries = read_manifest(manifest)
        check = TreeCheck()
        for entry in self.entries:
            check.add(entry)
        self.summary: TreeSummary = check.finish(root_of(manifest).digest)
        self.sizes = check.sizes


class Shop:
    """Inputs lie in `folder/in/NAME`; outputs come to `folder/out/STEP/NAME`, and are then inputs too.

    `token` is what it wants to see (None: it does not look); `down` is how many requests are refused first, as by a service that restarts;
    `cut_sending` and `cut_taking` break the next transfers of blobs after so many of them. What was moved is counted in `requests`, `sent` and
    `received`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token: str | None = TOKEN
        self.url = ""
        self.down = 0
        self.cut_sending: list[int] = []
        self.cut_taking: list[int] = []
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self.received = 0
        self.blobs: dict[bytes, bytes] = {ZERO_CHUNK: bytes(CHUNK)}
        self.writes = True
        self.trees: dict[str, Tree] = {}
        self.uploads: dict[str, Upload] = {}

    def ref(self, name: str) -> ArtifactRef:
        """The input as it is in its folder now."""
        self.trees[name] = tree_of(self._entries(self.folder / "in" / name))
        summary = self.trees[name].summary
        return ArtifactRef(id=f"id-of-{name}", digest=summary.digest, size=summary.size, files=summary.files)

    def refs(self, *names: str) -> dict[str, ArtifactRef]:
        return {name: self.ref(name) for name in names}

    def _entries(self, root: Path) -> Iterator[Entry]:
        links: dict[int, bytes] = {}
        for path in sorted(root.rglob("*"), key=lambda each: each.relative_to(root).parts):
            name, seen = os.fsencode(path.relative_to(root)), path.lstat()
            if path.is_symlink():
                yield Entry(name, "link", 0o777, target=os.fsencode(path.readlink()))
            elif path.is_dir():
                yield Entry(name, "folder", 0o755)
            else:
                digest = b""
                with path.open("rb") as file:
                    while piece := file.read(CHUNK):
                        digest += hashlib.sha256(piece).digest()
                        self.blobs[digest[-DIGEST:]] = piece
                first = links.setdefault(seen.st_ino, name)
                yield Entry(name, "file", 0o755 if seen.st_mode & 0o100 else 0o644, seen.st_size, digest, b"" if first == name else first)

    async def manifest(self, request: web.Request) -> web.Response:
        self._admit(request, "manifest")
        blobs = self.trees[request.match_info["name"]].root.blobs
        return web.Response(body=b"".join(blobs if len(blobs) == 1 else blobs[1:]))

    async def blobs_of_input(self, request: web.Request) -> web.StreamResponse:
        self._admit(request, "blobs")
        asked = await request.read()
        digests = [asked[at : at + DIGEST] for at in range(0, len(asked), DIGEST)]
        tree = {digest for entry in self.trees[request.match_info["name"]].entries for digest, _ in entry.chunks()}
        assert len(set(digests)) == len(digests) > 0
        assert tree.issuperset(digests)
        answer = web.StreamResponse()
        await answer.prepare(request)
        left = self.cut_sending.pop(0) if self.cut_sending else -1
        for digest in reversed(digests):
            if left == 0:
                assert request.transport is not None
                request.transport.abort()
                return answer
            left -= 1
            self.sent += 1
            await answer.write(frame_header(digest, len(self.blobs[digest])))
            await answer.write(self.blobs[digest])
        await answer.write(END_FRAME)
        return answer

    async def offer(self, request: web.Request) -> web.Response:
        where = f"{request.match_info['step']}/{request.match_info['name']}"
        manifest = await request.read()
        self._admit(request, "offer")
        self.uploads[where] = Upload(manifest)
        return self._answer(where)

    async def take(self, request: web.Request) -> web.Response:
        self._admit(request, "take")
        where = f"{request.match_info['step']}/{request.match_info['name']}"
        upload = self.uploads.get(where)
        if upload is None:
            return web.json_response({"type": "urn:penstock:problem:upload-unknown", "title": "It is unknown"}, status=404)
        reader = BlobStreamReader(lambda digest: upload.sizes.get(digest) if digest not in self.blobs else None)
        left = self.cut_taking.pop(0) if self.cut_taking else -1
        async for piece in request.content.iter_any():
            for digest, contents in reader.feed(piece):
                self.blobs[digest] = bytes(contents)
                self.received += 1
                left -= 1
                if left == 0:
                    assert request.transport is not None
                    request.transport.abort()
                    return web.Response()
        reader.finish()
        return self._answer(where)

    def _answer(self, where: str) -> web.Response:
        upload = self.uploads[where]
        missing = [(number, size) for number, (digest, size) in enumerate(upload.sizes.items()) if digest not in self.blobs]
        if missing:
            size = sum(size for _, size in missing)
            body = {"id": where, "missing": [(n, n) for n, _ in missing], "missing_bytes": size, "missing_blobs": len(missing)}
            return web.json_response(body, status=202)
        if self.writes:
            target = self.folder / "out" / where
            target.parent.mkdir(parents=True, exist_ok=True)
            place(upload.entries, target, lambda entry, at, name: create_file(entry, at, name, (self.blobs[d] for d, _ in entry.chunks())))
        self.trees[where.partition("/")[2]] = tree_of(upload.entries)
        digest, size, files = upload.summary
        return web.json_response({"id": where.replace("/", "-"), "digest": digest, "size": size, "files": files}, status=201)

    def _admit(self, request: web.Request, what: str) -> None:
        self.requests[what] += 1
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise web.HTTPForbidden
        if self.down:
            self.down -= 1
            raise web.HTTPServiceUnavailable


@contextlib.asynccontextmanager
async def a_shop(folder: Path) -> AsyncIterator[Shop]:
    shop = Shop(folder)
    app = web.Application(client_max_size=1 << 30)
    app.add_routes(
        [
            web.get("/inputs/{name}", shop.manifest),
            web.post("/inputs/{name}/blobs", shop.blobs_of_input),
            web.post("/outputs/{step}/{name}", shop.offer),
            web.put("/outputs/{step}/{name}/blobs", shop.take),
        ]
    )
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    shop.url = f"http://{host}:{port}"
    try:
        yield shop
    finally:
        await runner.cleanup()
