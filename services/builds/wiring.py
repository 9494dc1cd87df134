"""What the builds service is made of."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
from aiohttp import web

from libs.bus.bus import Bus, BusUnavailable, Message
from libs.bus.jetstream import connect_jetstream
from libs.eventlog.checkpoints import RelayCheckpoints
from libs.eventlog.leadership import Leadership
from libs.eventlog.postgres import open_postgres_log
from libs.eventlog.projections import StoredProjection
from libs.eventlog.timers import Timers
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from libs.runtime.epoch import begin_epoch
from libs.runtime.ids import new_id
from libs.runtime.projector import Projector
from libs.runtime.reactions import ReactionConsumer
from libs.runtime.relay import Relay
from libs.runtime.service import Service
from libs.runtime.settings import decode
from libs.runtime.sweep import Sweep
from proto.private import Private
from proto.topology import BUILDS_REACTIONS, BUILDS_REPORTS, CONSUMERS, LOGS, REPORTS, STREAMS
from services.builds.alarm import Alarm
from services.builds.commands import Command, CreateBuild
from services.builds.decider import BuildDecider, State
from services.builds.leases import Leases
from services.builds.projection import timers
from services.builds.quota import Quota, Watched
from services.builds.reactions import on_event, on_fact, on_report

logger = structlog.get_logger()


class Settings(Private, frozen=True, kw_only=True):
    """Where the log and the bus are, and who this is to them. `instance` is for whoever sees to it that no two processes run under one name at
    a time: a successor of that name then leads at once, rather than after its predecessor's term."""

    database_url: str
    nats_url: str
    nats_seed: str
    instance: str = ""


TABLES = Path(__file__).parent / "tables.sql"


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> web.Application | None:
    """Build the service and start its parts: command loop, reactions, reports, timers, and the relay."""
    settings = decode(Settings, environ)
    log = await service.enter(open_postgres_log(settings.database_url))
    epoch = await begin_epoch(log, service.draining.set)
    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_seed, "builds"))
    bus.measure(service.registry)
    await _ensured(bus)
    decider = BuildDecider()
    commands: CommandLoop[Command, State] = CommandLoop(log, decider, new_id, creates=_creates)
    leadership = Leadership(log.pool, "relay-and-timers", settings.instance or new_id())
    relay = Relay(log, bus, RelayCheckpoints(log.pool), leadership)
    projector = Projector(log, StoredProjection(log.pool, timers(TABLES.read_text())), urgent=frozenset(), linger=0.1)
    alarm = Alarm(Timers(log.pool), projector.advanced, leadership, commands)

    leases = Leases(log)

    def react(message: Message) -> Sequence[tuple[Command, Cause]]:
        return on_event(message.data, epoch.number)

    def record(message: Message) -> Sequence[tuple[Command, Cause]]:
        return on_report(message.subject, message.data, leases.of)

    reactions = ReactionConsumer(bus, BUILDS_REACTIONS, react, commands, service.registry, prepare=epoch.load)
    reports = ReactionConsumer(bus, BUILDS_REPORTS, record, commands, service.registry, prepare=leases.load)

    quota = Quota(bus, [Watched(REPORTS, "reports", BUILDS_REPORTS), Watched(LOGS, "logs")], leadership, service.registry)
    sweep = Sweep(log, frozenset({"request", "lease"}), on_fact, decider, _creates, commands)

    projector.measure(service.registry)
    relay.measure(service.registry)
    service.depends("database", lambda: projector.problem)
    service.warns("projection", lambda: projector.stuck)
    service.depends("nats", lambda: None if bus.connected else "is not connected")
    service.depends("relay", lambda: relay.problem)
    service.warns("unpublished", lambda: relay.unpublished)
    service.spawn("epoch", epoch.watch())
    service.spawn("commands", commands.run())
    service.on_drain(leadership.resign)  # once it campaigns no more
    service.spawn("leadership", leadership.run())
    service.spawn("relay", relay.run())
    service.spawn("projector", projector.run())
    service.spawn("alarm", alarm.run())
    service.spawn("reactions", reactions.run())
    service.spawn("reports", reports.run())
    service.spawn("sweep", sweep.run())
    service.spawn("quota", quota.run())
    return None


def _creates(command: Command) -> bool:
    return isinstance(command, CreateBuild)


async def _ensured(bus: Bus) -> None:
    """Make the streams and consumers, as soon as the bus can be reached."""
    while True:
        try:
            await bus.ensure(STREAMS, CONSUMERS)
            return
        except BusUnavailable as error:
            logger.warning("the bus does not have its streams yet", why=str(error))
            await asyncio.sleep(0.5)
