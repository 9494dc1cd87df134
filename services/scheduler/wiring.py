"""What the scheduler is made of."""

import socket
import time
from collections.abc import Mapping

import msgspec
from aiohttp import web

from libs.bus.jetstream import connect_jetstream
from libs.eventlog.leadership import Leadership
from libs.eventlog.postgres import open_postgres_log
from libs.eventlog.snapshots import Snapshots
from libs.runtime.commands import CommandLoop
from libs.runtime.ids import new_id
from libs.runtime.service import Service
from libs.runtime.settings import decode
from services.scheduler.commands import BootWorker, Command, LeaseStage
from services.scheduler.decider import SchedulerDecider, State
from services.scheduler.leader import Scheduler
from services.scheduler.packages import Packer


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`server_key`: the seed it signs with. `worker_keys`: `name=public key`, comma-separated. `artifacts_url`: where workers reach the
    artifacts service. `lease_seconds`: how long a worker may be silent before its work is given to another. `instance` is for whoever sees
    to it that no two processes run under one name at a time: a successor of that name then leads at once, rather than after its
    predecessor's term."""

    database_url: str
    nats_url: str
    nats_user: str
    nats_password: str
    server_key: str
    worker_keys: str
    artifacts_url: str
    lease_seconds: float = 15.0
    instance: str = ""


def _creates(command: Command) -> bool:
    return isinstance(command, BootWorker) or (isinstance(command, LeaseStage) and command.attempt == 1)


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> web.Application | None:
    """Build the scheduler and start its parts."""
    settings = decode(Settings, environ)
    log = await service.enter(open_postgres_log(settings.database_url))
    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_user, settings.nats_password, "scheduler"))
    commands: CommandLoop[Command, State] = CommandLoop(log, SchedulerDecider(), new_id, creates=_creates)
    leadership = Leadership(log.pool, "placement", settings.instance or new_id())
    scheduler = Scheduler(
        log=log,
        bus=bus,
        commands=commands,
        leadership=leadership,
        snapshots=Snapshots(log.pool),
        packer=Packer(settings.server_key, settings.artifacts_url, settings.lease_seconds, time.time),
        worker_keys=dict(pair.split("=", 1) for pair in settings.worker_keys.split(",") if pair),
        lease_seconds=settings.lease_seconds,
        clock=time.monotonic,
        now=time.time,
    )
    service.depends("database", lambda: scheduler.problem)
    service.depends("nats", lambda: None if bus.connected else "is not connected")
    service.on_drain(leadership.resign)  # once it campaigns no more
    service.spawn("leadership", leadership.run())
    service.spawn("commands", commands.run())
    service.spawn("watch-log", scheduler.watch_log())
    service.spawn("listen", scheduler.listen())
    service.spawn("scheduler", scheduler.run())
    return None
