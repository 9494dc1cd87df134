"""An image registry with one image, by its real protocol; it fails as it is told to."""

import asyncio
import contextlib
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator

from aiohttp import encode_basic_auth, web

from tests.engine_fixture import root_filesystem

REPOSITORY = "team/tools"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


class Registry:
    """`down` is how many questions for the manifest are refused first; `hangs`: it never answers them; `login` is whom it wants to see."""

    def __init__(self) -> None:
        self.address = ""
        self.down = 0
        self.hangs = False
        self.login: tuple[str, str] | None = None
        self.asked: Counter[str] = Counter()
        self._root = root_filesystem()
        self._layer = gzip.compress(self._root, 1, mtime=0)
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, bytes] = {}
        self.digest = self.publish()

    @property
    def repository(self) -> str:
        return f"{self.address}/{REPOSITORY}"

    def publish(self, *environment: str) -> str:
        """Tag 1 means an image with this environment from now on. Its digest."""
        layer = self._layer
        root = {"type": "layers", "diff_ids": [_digest(self._root)]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Env": environment}, "rootfs": root, "history": []}).encode()
        self._blobs |= {_digest(each): each for each in (config, layer)}
        described = [{"digest": _digest(each), "size": len(each)} for each in (config, layer)]
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **described[0]},
                "layers": [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", **described[1]}],
            }
        ).encode()
        digest = _digest(manifest)
        self._manifests |= {digest: manifest, "1": manifest}
        return digest

    async def base(self, request: web.Request) -> web.Response:
        self._admit(request, "base")
        return web.json_response({})

    async def manifest(self, request: web.Request) -> web.Response:
        self._admit(request, "manifest")
        if self.hangs:
            await asyncio.Event().wait()
        if self.down:
            self.down -= 1
            raise web.HTTPServiceUnavailable
        if (manifest := self._manifests.get(request.match_info["reference"])) is None:
            return web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}, status=404)
        return web.Response(body=manifest, content_type=_MANIFEST, headers={"Docker-Content-Digest": _digest(manifest)})

    async def blob(self, request: web.Request) -> web.Response:
        self._admit(request, "blob")
        return web.Response(body=self._blobs[request.match_info["digest"]], content_type="application/octet-stream")

    def _admit(self, request: web.Request, what: str) -> None:
        self.asked[what] += 1
        if self.login is not None and request.headers.get("Authorization") != encode_basic_auth(*self.login):
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": 'Basic realm="tests"', "Docker-Distribution-Api-Version": "registry/2.0"})


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@contextlib.asynccontextmanager
async def a_registry() -> AsyncIterator[Registry]:
    registry = Registry()
    app = web.Application()
    app.add_routes(
        [
            web.get("/v2/", registry.base),
            web.get(f"/v2/{REPOSITORY}/manifests/{{reference}}", registry.manifest),
            web.get(f"/v2/{REPOSITORY}/blobs/{{digest}}", registry.blob),
        ]
    )
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    registry.address = f"{host}:{port}"
    try:
        yield registry
    finally:
        await runner.cleanup()
