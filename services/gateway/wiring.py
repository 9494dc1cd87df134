"""What the gateway is made of."""

import hashlib
import hmac
import importlib.metadata
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import Counter

from libs.bus.jetstream import connect_jetstream
from libs.eventlog.clock import SharedClock
from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import open_postgres_log
from libs.eventlog.projections import StoredProjection
from libs.runtime.addresses import PROXIES, networks
from libs.runtime.commands import CommandLoop
from libs.runtime.epoch import begin_epoch
from libs.runtime.http import problems
from libs.runtime.ids import new_id
from libs.runtime.memory import keep_memory
from libs.runtime.projector import Projector
from libs.runtime.service import Service
from libs.runtime.settings import decode
from libs.tokens import public_key
from proto.api.bodies import TeamName
from proto.api.builds import Build
from proto.private import Private
from services.gateway import decider
from services.gateway.artifacts import ArtifactsClient
from services.gateway.audit import Audit
from services.gateway.auth import Authenticator
from services.gateway.bootstrap import Bootstrap
from services.gateway.certainty import ReadModels
from services.gateway.commands import FleetCommand, RequestBuild, RequestCommand, TeamCommand
from services.gateway.feed import LogFeed
from services.gateway.inputs import Inputs
from services.gateway.logs import LogReader
from services.gateway.presence import Presence
from services.gateway.projection import BuildRow, gateway_projection
from services.gateway.queries import Queries
from services.gateway.rates import Rate
from services.gateway.routes.about import AboutRoutes
from services.gateway.routes.artifacts import ArtifactRoutes
from services.gateway.routes.builds import BuildRoutes
from services.gateway.routes.endpoint import add
from services.gateway.routes.events import EventRoutes
from services.gateway.routes.fleet import FleetRoutes
from services.gateway.routes.logs import LogRoutes
from services.gateway.routes.preparation import PreparationRoutes
from services.gateway.routes.secrets import SecretRoutes
from services.gateway.routes.teams import TeamRoutes
from services.gateway.routes.transfers import TransferRoutes
from services.gateway.routes.workers import Site, WorkerRoutes
from services.gateway.secrets import SecretKeeper
from services.gateway.sse import Streams
from services.gateway.views import build_view
from services.gateway.watch import Hub, Limits, Sources

TABLES = Path(__file__).parent / "tables.sql"
URGENT = frozenset({"request", "team", "artifact", "fleet", "secret"})
"""What a caller waits for; everything else is shown LINGER seconds later, in larger batches."""
LINGER = 0.002


class Settings(Private, frozen=True, kw_only=True):
    """`artifacts_public_url` is where clients reach the artifacts service, to move bytes past the gateway ("": they do not); `grant_key` signs grants
    for it, and what workers are told; `server_public_key` is the scheduler's, which workers trust;
    `worker_nats_url`: where workers reach the bus, if not by `nats_url`. `bootstrap_*` name the first team, the SHA-256 (hex) of its first token, and
    the first workers (`name=public key`, comma-separated);
    `public_url` is what clients reach the gateway by; `trusted_proxies`: from which networks (CIDRs, comma-separated; none by default)
    X-Forwarded-For is believed; `max_submissions`: submissions under way at once, past that 429;
    `sse_*`: seconds between heartbeats, seconds in which a client must take something, bytes buffered for the watchers of one build;
    `log_wait_seconds`: how long the rest of a finished log is waited for."""

    database_url: str
    nats_url: str
    nats_seed: str
    artifacts_url: str
    artifacts_public_url: str = ""
    grant_key: str
    server_public_key: str
    worker_nats_url: str = ""
    bootstrap_team: TeamName = "main"
    bootstrap_token_sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F]{64})?$")] = ""
    bootstrap_workers: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9_-]{1,64}=[A-Za-z0-9_-]{43}(,|$))*$")] = ""
    public_url: str = ""
    trusted_proxies: str = ""
    max_submissions: int = 1000
    sse_heartbeat_seconds: float = 15.0
    sse_stall_seconds: float = 15.0
    sse_buffer_bytes: int = 8 << 20
    log_wait_seconds: float = 20.0


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> web.Application | None:
    """Build the service, start its parts, and give the application that it serves."""
    settings = decode(Settings, environ)
    keep_memory(8 << 20)
    public_url = settings.public_url.rstrip("/") or _url_of(sockets.get("http"))
    log = await service.enter(open_postgres_log(settings.database_url, size=6))
    epoch = await begin_epoch(log, service.draining.set)
    clock = SharedClock(log.pool, time.time, time.monotonic)
    with suppress(LogUnavailable):
        await clock.look()
    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_seed, "gateway"))
    bus.measure(service.registry)
    session = await service.enter(
        aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=300.0),
        )
    )

    projector = Projector(log, StoredProjection(log.pool, gateway_projection(TABLES.read_text())), urgent=URGENT, linger=LINGER)
    requests: CommandLoop[RequestCommand, decider.Request] = CommandLoop(
        log, decider.RequestDecider(), new_id, creates=lambda command: isinstance(command, RequestBuild)
    )
    teams: CommandLoop[TeamCommand, decider.Team] = CommandLoop(log, decider.TeamDecider(), new_id)
    fleet: CommandLoop[FleetCommand, decider.Fleet] = CommandLoop(log, decider.FleetDecider(), new_id)
    feed = LogFeed(log)
    queries = Queries(log.pool)
    keeper = SecretKeeper(bus, queries.sealing_key)
    artifacts = ArtifactsClient(session, settings.artifacts_url, settings.grant_key, clock.now, settings.artifacts_public_url)
    authenticator = Authenticator(queries.token, time.monotonic)
    presence = Presence(time.time)
    streams = Streams(settings.sse_heartbeat_seconds, settings.sse_stall_seconds)

    def view(row: BuildRow) -> Build:
        return build_view(row, public_url)

    def passed(position: int) -> Awaitable[bool]:
        return projector.passed(position, 1.0)

    async def read(position: int) -> bool:
        return await passed(position) or projector.stuck is not None

    bootstrap = Bootstrap(teams, fleet, log, read, settings.bootstrap_team, settings.bootstrap_token_sha256, _pairs(settings.bootstrap_workers))
    hub = Hub(
        Sources(row=queries.build, passed=passed, view=view, feed=feed, bus=bus, artifacts=artifacts),
        Limits(buffer=settings.sse_buffer_bytes, stall=settings.sse_stall_seconds, late=settings.log_wait_seconds),
    )
    builds = BuildRoutes(
        queries=queries,
        inputs=Inputs(queries, artifacts),
        requests=requests,
        log=log,
        passed=projector.passed,
        feed=feed,
        view=view,
        ids=new_id,
        secrets=keeper,
        mac=_mac_with(settings.grant_key),
        most_at_once=settings.max_submissions,
    )
    kept = ArtifactRoutes(queries=queries, artifacts=artifacts, log=log, passed=projector.passed)
    transfers = TransferRoutes(known=kept, queries=queries, artifacts=artifacts, log=log, passed=projector.passed, public_url=public_url)
    known = [
        *builds.endpoints(),
        *LogRoutes(builds=builds, hub=hub, streams=streams, reader=LogReader(bus, artifacts, queries.build)).endpoints(),
        *kept.endpoints(),
        *transfers.endpoints(),
        *TeamRoutes(queries=queries, teams=teams, passed=projector.passed, first=settings.bootstrap_team, ids=new_id, secret=new_token).endpoints(),
        *WorkerRoutes(
            fleet=fleet,
            queries=queries,
            passed=projector.passed,
            site=Site(
                server_public_key=settings.server_public_key,
                nats_url=settings.worker_nats_url or settings.nats_url,
                gateway_key=settings.grant_key,
                gateway_public_key=public_key(settings.grant_key),
            ),
            first=settings.bootstrap_team,
            ids=new_id,
            now=clock.now,
            rate=Rate(2.0, 30, time.monotonic),
            registrations=Counter("penstock_registrations", "Workers that wanted to be registered", ["result"], registry=service.registry),
            begun=lambda: bootstrap.problem is None,
        ).endpoints(),
        *FleetRoutes(queries=queries, presence=presence, first=settings.bootstrap_team, now=time.time).endpoints(),
        *SecretRoutes(queries=queries, keeper=keeper, passed=projector.passed, first=settings.bootstrap_team).endpoints(),
        *PreparationRoutes(queries=queries, log=log, bus=bus).endpoints(),
        *EventRoutes(feed=feed, streams=streams).endpoints(),
    ]
    about = AboutRoutes(version=importlib.metadata.version("penstock"), authenticator=authenticator, public_url=public_url, known=known)
    app = web.Application(middlewares=[problems])
    app[PROXIES] = networks("PENSTOCK_TRUSTED_PROXIES", settings.trusted_proxies)
    add(app, [*known, *about.endpoints()], authenticator, ReadModels(projector, log, queries.position), Audit(service.registry))

    async def close_streams(_: web.Application) -> None:
        streams.close()

    async def say_if_stale(_: web.Request, response: web.StreamResponse) -> None:
        if projector.stuck is not None:
            response.headers["Penstock-Stale"] = str(projector.position)

    app.on_shutdown.append(close_streams)
    app.on_response_prepare.append(say_if_stale)
    projector.measure(service.registry)
    service.depends("database", lambda: projector.problem)
    service.warns("projection", lambda: projector.stuck)
    service.depends("bootstrap", lambda: bootstrap.problem)
    service.depends("nats", lambda: None if bus.connected else "is not connected")
    service.spawn("epoch", epoch.watch())
    service.spawn("clock", clock.run())
    service.spawn("requests", requests.run())
    service.spawn("teams", teams.run())
    service.spawn("fleet", fleet.run())
    service.spawn("projector", projector.run())
    service.spawn("bootstrap", bootstrap.run())
    service.spawn("feed", feed.run())
    service.spawn("presence", presence.listen(bus))
    return app


def new_token() -> str:
    """A bearer token: 256 random bits."""
    return "pst_" + secrets.token_urlsafe(32)


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def _mac_with(grant_key: str) -> Callable[[bytes], str]:
    """A digest of bodies that nobody else can make; the same in all gateways, which share the key."""
    key = hashlib.sha256(b"penstock-body\0" + grant_key.encode()).digest()
    return lambda body: hmac.digest(key, body, "sha256").hex()


def _url_of(listening: socket.socket | None) -> str:
    """What a socket is reached by on this machine; "" without one: URLs are then relative."""
    if listening is None:
        return ""
    host, port = listening.getsockname()[:2]
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104  it is compared, not bound
