"""What the artifacts service is made of."""

import asyncio
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from uuid import uuid4

from aiohttp import web

from libs.archives.pages import Pages
from libs.archives.rules import Limits
from libs.archives.selftest import self_test
from libs.blobstore.store import open_blob_store
from libs.bus.bus import Bus, BusUnavailable
from libs.bus.jetstream import connect_jetstream
from libs.eventlog.clock import SharedClock
from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import open_postgres_log
from libs.eventlog.projections import StoredProjection
from libs.runtime.addresses import PROXIES, networks
from libs.runtime.commands import CommandLoop
from libs.runtime.epoch import begin_epoch
from libs.runtime.ids import new_id
from libs.runtime.memory import give_back_memory, keep_memory
from libs.runtime.projector import Projector
from libs.runtime.service import Service
from libs.runtime.settings import decode
from proto.private import Private
from proto.topology import CONSUMERS, STREAMS
from services.artifacts.access import Access
from services.artifacts.answers import Traffic
from services.artifacts.archivist import PATIENCE, Archivist
from services.artifacts.commands import ArchiveLog, Command, SealArtifact
from services.artifacts.decider import ArtifactDecider, State
from services.artifacts.janitor import Janitor
from services.artifacts.late_logs import LateLogs
from services.artifacts.logs import Logs
from services.artifacts.projection import ARTIFACTS
from services.artifacts.queries import Queries
from services.artifacts.receiving import UPLOADS, Receiving
from services.artifacts.routes import application
from services.artifacts.serving import DOWNLOADS, Serving
from services.artifacts.sessions import Sessions
from services.artifacts.trees import Trees
from services.artifacts.uploads import Uploads

_COMING = 50 << 20
"""Bytes of memory for large chunks between their sockets and the disk, of all uploads together: six."""
_KEPT = 128 << 20
"""Bytes of free memory that stay for the next body."""
_REST = 60.0
"""Seconds after which all that is free is given back."""


class Settings(Private, frozen=True, kw_only=True):
    """`store_url`: where blobs are kept (`file:///folder`, `s3://bucket/prefix`, …). `grant_public_key` is the gateway's, `server_public_key` the
    scheduler's. `max_artifact_bytes` and `max_artifact_files` bound one artifact, `max_uploads` what may come and `max_downloads`
    what may go at once; `log_patience` and
    `tidy_seconds` (how often what nobody needs is looked for) are in seconds. `instance` is for whoever sees to it that no two processes run
    under one name at a time: what a predecessor of that name left unfinished is collected at once. `trusted_proxies`: from which networks (CIDRs,
    comma-separated; none by default) X-Forwarded-For is believed."""

    database_url: str
    nats_url: str
    nats_seed: str
    store_url: str
    grant_public_key: str
    server_public_key: str
    max_artifact_bytes: int = Limits().max_bytes
    max_artifact_files: int = Limits().max_members
    max_uploads: int = UPLOADS
    max_downloads: int = DOWNLOADS
    log_patience: float = PATIENCE
    tidy_seconds: float = 60.0
    instance: str = ""
    trusted_proxies: str = ""


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> web.Application | None:
    """Build the service and start its parts: the store, the command loop, the projection, the archivist, the janitor, and the routes."""
    settings = decode(Settings, environ)
    keep_memory(_KEPT)
    self_test()
    log = await service.enter(open_postgres_log(settings.database_url))
    epoch = await begin_epoch(log, service.draining.set)
    clock = SharedClock(log.pool, time.time, time.monotonic)
    with suppress(LogUnavailable):
        await clock.look()
    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_seed, "artifacts"))
    bus.measure(service.registry)
    instance = f"{settings.instance}-" if settings.instance else ""
    life = f"{instance}{uuid4().hex[:12]}-"
    store = await service.enter(open_blob_store(settings.store_url, log.pool, lambda: uuid4().hex[:12], instance=instance))
    commands: CommandLoop[Command, State] = CommandLoop(log, ArtifactDecider(), new_id, creates=_creates)
    projector = Projector(log, StoredProjection(log.pool, ARTIFACTS), urgent=frozenset(), linger=0.1)
    queries = Queries(log, log.pool, projector)
    access = Access(settings.grant_public_key, settings.server_public_key, queries, clock.now, time.time, service.registry)
    limits = Limits(max_bytes=settings.max_artifact_bytes, max_members=settings.max_artifact_files)
    trees, logs, sessions, traffic = Trees(store), Logs(store), Sessions(log.pool), Traffic(service.registry)
    archivist = Archivist(bus, log, commands, logs, service.registry, settings.log_patience)
    uploads = Uploads(store, sessions, trees, commands, queries, limits, lambda: life + uuid4().hex, time.time)
    janitor = Janitor(log, log.pool, projector, store, sessions, uploads, trees, logs, commands, time.time, settings.tidy_seconds, instance, life)
    receiving = Receiving(access, queries, uploads, limits, traffic, Pages(_COMING), settings.max_uploads)
    most_chunks = settings.max_artifact_files + (settings.max_artifact_bytes >> 23)
    serving = Serving(access, queries, trees, logs, store, commands, time.time, traffic, most_chunks, uploads.agenda.expect, settings.max_downloads)

    projector.measure(service.registry)
    service.depends("database", lambda: projector.problem)
    service.warns("projection", lambda: projector.stuck)
    service.depends("nats", lambda: None if bus.connected else "is not connected")
    service.depends("store", lambda: store.problem)
    service.depends("uploads", lambda: janitor.problem)
    service.spawn("epoch", epoch.watch())
    service.spawn("store", store.run())
    service.spawn("clock", clock.run())
    service.spawn("commands", commands.run())
    service.spawn("projector", projector.run())
    service.spawn("archivist", _archiving(bus, archivist))
    service.spawn("late logs", LateLogs(bus, queries, archivist, settings.log_patience).run())
    service.spawn("janitor", janitor.run())
    service.spawn("memory", _giving_back())
    app = application(receiving, serving)
    app[PROXIES] = networks("PENSTOCK_TRUSTED_PROXIES", settings.trusted_proxies)
    return app


def _creates(command: Command) -> bool:
    return isinstance(command, SealArtifact) or (isinstance(command, ArchiveLog) and not command.replaces)


async def _giving_back() -> None:
    while True:
        await asyncio.sleep(_REST)
        await asyncio.to_thread(give_back_memory)


async def _archiving(bus: Bus, archivist: Archivist) -> None:
    while True:
        try:
            await bus.ensure(STREAMS, CONSUMERS)
            break
        except BusUnavailable:
            await asyncio.sleep(0.2)
    await archivist.run()
