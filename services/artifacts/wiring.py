"""What the artifacts service is made of."""

import asyncio
import socket
import time
from collections.abc import Mapping
from uuid import uuid4

import msgspec
from aiohttp import web

from libs.archives.rules import Limits
from libs.archives.selftest import self_test
from libs.blobstore.store import open_blob_store
from libs.bus.bus import Bus, BusUnavailable
from libs.bus.jetstream import connect_jetstream
from libs.eventlog.postgres import open_postgres_log
from libs.eventlog.projections import StoredProjection
from libs.runtime.commands import CommandLoop
from libs.runtime.ids import new_id
from libs.runtime.projector import Projector
from libs.runtime.service import Service
from libs.runtime.settings import decode
from proto.topology import CONSUMERS, STREAMS
from services.artifacts.access import Access
from services.artifacts.archivist import PATIENCE, Archivist
from services.artifacts.commands import Command
from services.artifacts.decider import ArtifactDecider, State
from services.artifacts.logs import Logs
from services.artifacts.projection import OVER
from services.artifacts.queries import Queries
from services.artifacts.routes import Routes
from services.artifacts.trees import Trees


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`store_url`: where blobs are kept (`file:///folder`, `s3://bucket/prefix`, …). `grant_public_key` is the gateway's, `server_public_key` the
    scheduler's. `max_artifact_bytes` and `max_artifact_files` bound one artifact; `log_patience` is in seconds. `instance` is for
    whoever sees to it that no two processes run under one name at a time: what a predecessor of that name left unfinished is collected at once."""

    database_url: str
    nats_url: str
    nats_user: str
    nats_password: str
    store_url: str
    grant_public_key: str
    server_public_key: str
    max_artifact_bytes: int = Limits().max_bytes
    max_artifact_files: int = Limits().max_members
    log_patience: float = PATIENCE
    instance: str = ""


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> web.Application | None:
    """Build the service and start its parts: the store, the command loop, the projection, the archivist, and the routes."""
    settings = decode(Settings, environ)
    self_test()
    log = await service.enter(open_postgres_log(settings.database_url))
    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_user, settings.nats_password, "artifacts"))
    store = await service.enter(
        open_blob_store(settings.store_url, log.pool, lambda: uuid4().hex[:12], instance=f"{settings.instance}-" if settings.instance else "")
    )
    commands: CommandLoop[Command, State] = CommandLoop(log, ArtifactDecider(), new_id, creates=lambda _: True)
    projector = Projector(log, StoredProjection(log.pool, OVER), urgent=frozenset(), linger=0.1)
    archivist = Archivist(bus, log, commands, store, service.registry, settings.log_patience)
    queries = Queries(log, log.pool)
    access = Access(settings.grant_public_key, settings.server_public_key, queries, time.time)
    limits = Limits(max_bytes=settings.max_artifact_bytes, max_members=settings.max_artifact_files)
    routes = Routes(access, queries, Trees(store, limits), Logs(store), commands, time.time, service.registry)

    service.depends("database", lambda: projector.problem)
    service.depends("nats", lambda: None if bus.connected else "is not connected")
    service.depends("store", lambda: store.problem)
    service.spawn("store", store.run())
    service.spawn("commands", commands.run())
    service.spawn("projector", projector.run())
    service.spawn("archivist", _archiving(bus, archivist))
    return routes.application()


async def _archiving(bus: Bus, archivist: Archivist) -> None:
    while True:
        try:
            await bus.ensure(STREAMS, CONSUMERS)
            break
        except BusUnavailable:
            await asyncio.sleep(0.2)
    await archivist.run()
