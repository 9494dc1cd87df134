"""A gateway served in the test's process, on real Postgres and NATS, with an artifacts service that a test commands."""

import asyncio
import contextlib
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import ClientResponse, ClientSession, web
from prometheus_client import CollectorRegistry

from libs.bus.jetstream import JetStreamBus, connect_jetstream
from libs.eventlog.log import ANY, Appended, NewEvent, Write
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.runtime.http import TIMEOUTS, Timeouts, runner
from libs.runtime.ids import new_id
from libs.runtime.service import Service
from libs.tokens import Grant, new_seed, public_key, read_token
from proto.catalogue import OWNERS, TAGS, category_of, encode
from proto.events.artifact import ArtifactDeleted, ArtifactLifetimeChanged, ArtifactSealed
from proto.events.base import Event
from proto.messages import Attempt, LogChunk, Segment, count_lines
from proto.topology import STREAMS
from services.gateway.wiring import wire
from tests.nats_fixture import SEEDS

TOKEN = "pst_" + "a" * 43
SERVER_KEY = new_seed()
PLAN: dict[str, Any] = {"stages": [{"name": "main", "steps": [{"step": "run", "name": "run", "config": {"run": {"path": "true"}}}]}]}


class FakeArtifacts:
    """What the gateway sees of the artifacts service: it keeps what it gets, seals it in the log, and serves log archives."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.log: PostgresLog | None = None
        self.stored: dict[str, bytes] = {}
        self.grants: list[Grant] = []
        self.cut_short: list[str] = []
        self.archives: dict[str, list[tuple[int, Segment]]] = {}
        self.refuse: web.Response | None = None
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        """Of each request: method, path with query, headers."""
        self.missing: dict[str, list[tuple[int, int]]] = {}
        """Uploads that miss chunks."""
        self.received = 0
        self.tells = True
        """Whether it tells a client that waits to send."""
        self.proceed = asyncio.Event()
        self.proceed.set()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/artifacts/{id}", self.put, expect_handler=self.expected)
        app.router.add_get("/artifacts/{id}", self.get)
        app.router.add_put("/artifacts/{id}/blobs", self.put)
        app.router.add_post("/artifacts/{id}/blobs", self.blobs)
        app.router.add_get("/artifacts/{id}/tree", self.tree)
        app.router.add_patch("/artifacts/{id}", self.change)
        app.router.add_delete("/artifacts/{id}", self.delete)
        app.router.add_get("/usage", self.usage)
        app.router.add_get("/logs/{build}/{stage}/{attempt}", self.archive)
        return app

    async def expected(self, request: web.Request) -> None:
        if self.tells:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0

    def _grant(self, request: web.Request, action: str) -> Grant:
        grant = read_token(public_key(self.key), request.headers["Authorization"].removeprefix("Bearer "), time.time(), Grant)
        assert grant.action == action
        self.grants.append(grant)
        self.asked.append((request.method, request.rel_url.raw_path_qs, dict(request.headers)))
        return grant

    async def put(self, request: web.Request) -> web.Response:
        grant = self._grant(request, "put")
        assert grant.artifact == request.match_info["id"]
        if self.refuse is not None:
            return self.refuse
        body = b""
        try:
            while chunk := await request.content.readany():
                self.received += len(chunk)
                await self.proceed.wait()
                if len(body) < 1 << 20:
                    body += chunk
        except Exception:
            self.cut_short.append(grant.artifact)
            raise
        if grant.artifact in self.missing and request.method == "POST":
            pending = {"id": grant.artifact, "missing": self.missing[grant.artifact], "missing_bytes": 3, "missing_blobs": 1}
            return web.json_response(pending, status=202)
        if request.query.get("tree") == "00" * 32:
            return _problem(404, "tree-unknown")
        if request.query.get("path") == "absent":
            return _problem(404, "not-found")
        self.stored[grant.artifact] = body
        digest = hashlib.sha256(body).hexdigest()
        sealed = ArtifactSealed(artifact=grant.artifact, kind="user", digest=digest, size=len(body), files=1, name=request.query.get("name", ""))
        assert self.log is not None
        await append(self.log, f"artifact-{grant.artifact}", sealed, team=grant.team)
        return web.json_response({"id": grant.artifact, "digest": digest, "size": len(body), "files": 1}, status=201)

    async def get(self, request: web.Request) -> web.StreamResponse:
        grant = self._grant(request, "get")
        if request.headers.get("If-None-Match") == '"same"':
            return web.Response(status=304, headers={"ETag": '"same"'})
        whole = self.stored[grant.artifact]
        headers = {"ETag": '"same"', "Accept-Ranges": "bytes", "Content-Type": "application/x-tar"}
        if "Range" not in request.headers or request.headers.get("If-Range", '"same"') != '"same"':
            return web.Response(body=whole, headers=headers)
        part = request.http_range
        start, stop, _ = part.indices(len(whole))
        if start >= stop:
            return _problem(416, "range", {"Content-Range": f"bytes */{len(whole)}"})
        return web.Response(status=206, body=whole[part], headers=headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"})

    async def blobs(self, request: web.Request) -> web.Response:
        self._grant(request, "get")
        return web.Response(body=b"frames of " + await request.read(), content_type="application/vnd.penstock.blobs")

    async def tree(self, request: web.Request) -> web.Response:
        self._grant(request, "see")
        if request.query.get("path") == "absent":
            return _problem(404, "not-found")
        return web.json_response({"items": [{"path": "a", "kind": "file", "size": 1}], "next": None})

    async def change(self, request: web.Request) -> web.Response:
        grant = self._grant(request, "change")
        change = await request.json()
        changed = ArtifactLifetimeChanged(artifact=grant.artifact, expires_at=change.get("keep", 0), pinned=change.get("pinned", False))
        assert self.log is not None
        await append(self.log, f"artifact-{grant.artifact}", changed, team=grant.team)
        return web.json_response({"id": grant.artifact})

    async def delete(self, request: web.Request) -> web.Response:
        grant = self._grant(request, "change")
        assert self.log is not None
        await append(self.log, f"artifact-{grant.artifact}", ArtifactDeleted(artifact=grant.artifact), team=grant.team)
        return web.Response(status=204)

    async def usage(self, request: web.Request) -> web.Response:
        grant = self._grant(request, "see")
        assert grant.artifact == ""
        return web.json_response({"stored_bytes": 5, "artifacts": 1, "artifact_bytes": 5, "quota_bytes": None})

    async def archive(self, request: web.Request) -> web.Response:
        self._grant(request, "log")
        if self.refuse is not None:
            return self.refuse
        names = request.match_info
        found = self.archives.get(f"{names['build']}/{names['stage']}/{names['attempt']}")
        if found is None:
            return web.Response(status=404)
        first = int(request.query.get("from", "0"))
        records = [msgspec.msgpack.encode(pair) for pair in found if pair[0] + count_lines(pair[1].data) > first]
        return web.Response(body=b"".join(len(record).to_bytes(4, "big") + record for record in records), headers={"Penstock-Lines": "0"})


def _problem(status: int, slug: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"type": f"urn:penstock:problem:{slug}", "title": slug, "status": status}
    return web.json_response(body, status=status, content_type="application/problem+json", headers=headers)


class Gateway:
    """The gateway and what surrounds it. `log(service)` writes as that service; `bus` as the worker's side; `registry` has its metrics."""

    def __init__(
        self,
        url: str,
        client: ClientSession,
        artifacts: FakeArtifacts,
        logs: Mapping[str, PostgresLog],
        bus: JetStreamBus | None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.url = url
        self.client = client
        self.artifacts = artifacts
        self.logs = logs
        self.bus = bus
        self.registry = registry

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def call(self, method: str, path: str, token: str | None = TOKEN, headers: Mapping[str, str] | None = None, **more: Any) -> Any:
        if isinstance(body := more.get("data"), bytes) and len(body) > 1 << 20:
            more["data"] = io.BytesIO(body)  # aiohttp does not like large ones otherwise
        own = dict(headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        return self.client.request(method, f"{self.url}/api/v1{path}", headers=own, **more)

    async def json(self, method: str, path: str, status: int | None = None, **more: Any) -> Any:
        async with self.call(method, path, **more) as answer:
            body = json.loads(await answer.read() or b"null")
            assert status in (None, answer.status), (answer.status, body)
            return body

    async def submit(self, plan: Any = PLAN, status: int = 202, team: str = "main", token: str = TOKEN, headers: Any = None, **more: Any) -> Any:
        return await self.json("POST", f"/teams/{team}/builds", status, token=token, headers=headers, json={"plan": plan, **more})

    async def record(self, stream: str, *events: Event, team: str = "main") -> int:
        """Append as the service that owns the stream."""
        return await append(self.logs[OWNERS[category_of(stream)]], stream, *events, team=team)

    async def token(self, team: str, role: str = "owner") -> str:
        """A token of a team, which is made when it is not there."""
        await self.json("PUT", f"/teams/{team}")
        answer = await self.json("POST", f"/teams/{team}/tokens", 201, json={"role": role})
        token: str = answer["token"]
        return token

    async def say(self, build: str, number: int, first_line: int, *texts: bytes, stage: str = "main", attempt: int = 1, worker: str = "w1") -> None:
        """A worker's log chunk."""
        chunk = LogChunk(
            attempt=Attempt(build, stage, attempt),
            number=number,
            first_line=first_line,
            segments=[Segment("run", "stdout", 1_700_000_000_000 + number, text) for text in texts],
        )
        assert self.bus is not None
        await self.bus.publish(f"logs.{worker}.{build}.{stage}.{attempt}", msgspec.msgpack.encode(chunk), new_id())


async def append(log: PostgresLog, stream: str, *events: Event, team: str) -> int:
    new = [NewEvent(new_id(), TAGS[type(event)], encode(event)) for event in events]
    write = Write(stream=stream, expected=ANY, events=new, team=team, correlation_id="c", causation_id="c", actor="tester")
    (outcome,) = await log.append([write])
    assert isinstance(outcome, Appended)
    return outcome.position


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    running = runner(app)
    await running.setup()
    await web.TCPSite(running, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{running.addresses[0][1]}"
    finally:
        await running.cleanup()


@contextlib.asynccontextmanager
async def running_gateway(
    database: Any, nats_url: str, owners: Sequence[str] = ("builds", "scheduler", "artifacts"), timeouts: Timeouts | None = None, **settings: object
) -> AsyncIterator[Gateway]:
    """A gateway that is ready. `settings`: its own, lower case."""
    key = new_seed()
    artifacts = FakeArtifacts(key)
    async with contextlib.AsyncExitStack() as stack:
        logs = {owner: await stack.enter_async_context(open_postgres_log(database.url(owner), size=2)) for owner in owners}
        artifacts.log = logs.get("artifacts")
        artifacts_url = await stack.enter_async_context(serving(artifacts.application()))
        bus = await stack.enter_async_context(connect_jetstream(nats_url, SEEDS["builds"], "test", patience=1.0))
        if bus.connected and await bus.stream_state("LOGS") is None:
            await bus.ensure(STREAMS, ())
        environ = {
            "PENSTOCK_DATABASE_URL": database.url("gateway"),
            "PENSTOCK_NATS_URL": nats_url,
            "PENSTOCK_NATS_SEED": SEEDS["gateway"],
            "PENSTOCK_ARTIFACTS_URL": artifacts_url,
            "PENSTOCK_GRANT_KEY": key,
            "PENSTOCK_SERVER_PUBLIC_KEY": public_key(SERVER_KEY),
            "PENSTOCK_BOOTSTRAP_TOKEN_SHA256": hashlib.sha256(TOKEN.encode()).hexdigest(),
            **{f"PENSTOCK_{name.upper()}": str(value) for name, value in settings.items()},
        }
        service = Service("gateway")
        stack.push_async_callback(service.aclose)
        app = await wire(service, environ, {})
        assert app is not None
        if timeouts is not None:
            app[TIMEOUTS] = timeouts
        url = await stack.enter_async_context(serving(app))
        client = await stack.enter_async_context(ClientSession())
        async with asyncio.timeout(10):
            while service.problems().keys() - {"nats"}:
                await asyncio.sleep(0.01)
        yield Gateway(url, client, artifacts, logs, bus, service.registry)


class Sse:
    """Reads server-sent events."""

    def __init__(self, answer: ClientResponse) -> None:
        self._answer = answer
        self._rest = b""

    async def next(self, event: str | None = None, timeout: float = 10.0) -> tuple[str, str, Any]:
        """The next message (of a kind): (id, event, data). EOFError at the end."""
        async with asyncio.timeout(timeout):
            while True:
                block, found, rest = self._rest.partition(b"\n\n")
                if not found:
                    more = await self._answer.content.readany()
                    if not more:
                        raise EOFError
                    self._rest = (self._rest + more).replace(b"\r\n", b"\n")
                    continue
                self._rest = rest
                fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":") and line)
                if fields and event in (None, fields[b"event"].decode()):
                    return fields[b"id"].decode(), fields[b"event"].decode(), json.loads(fields[b"data"])

    async def all(self) -> list[tuple[str, str, Any]]:
        """Everything to the end."""
        found = []
        with contextlib.suppress(EOFError):
            while True:
                found.append(await self.next())
        return found
