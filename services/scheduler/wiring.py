"""What the scheduler is made of."""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from prometheus_client import Gauge

from libs.bus.accounts import callout_seeds
from libs.bus.callout import connect_doorkeeper
from libs.bus.jetstream import connect_jetstream
from libs.eventlog.clock import SharedClock
from libs.eventlog.leadership import Leadership
from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import open_postgres_log
from libs.eventlog.snapshots import Snapshots
from libs.runtime.commands import CommandLoop
from libs.runtime.epoch import begin_epoch
from libs.runtime.ids import new_id
from libs.runtime.projector import measure_stuck
from libs.runtime.service import Service
from libs.runtime.settings import BadSettings, decode
from proto.private import Private
from services.scheduler.commands import BootWorker, Command, LeaseStage
from services.scheduler.decider import SchedulerDecider, State
from services.scheduler.master_keys import Keyring
from services.scheduler.packages import Packer
from services.scheduler.scheduler import Scheduler
from services.scheduler.sealing import SealingKeys
from services.scheduler.secrets import Secrets
from services.scheduler.vault import Vault
from services.scheduler.why import answer_why
from services.scheduler.withholding import heed_quotas


class Settings(Private, frozen=True, kw_only=True):
    """`server_key`: the seed it signs with. `callout_seed`: what the keys are made of by which schedulers admit workers to the bus, each for
    `worker_login_seconds`. `artifacts_url`: where workers reach the artifacts service. `secret_keys` are the master keys under which secrets are
    kept, or `secret_keys_file` is the file that holds them (`id:key,…`, the first encrypts; looked at again when it changes). `lease_seconds`: how
    long a worker may be silent before its work is given to another. `instance` is for whoever sees to it that no two processes run under one name
    at a time: a successor of that name then leads at once, rather than after its predecessor's term."""

    database_url: str
    nats_url: str
    nats_seed: str
    server_key: str
    callout_seed: str
    artifacts_url: str
    secret_keys: str = ""
    secret_keys_file: Path | None = None
    lease_seconds: float = 15.0
    worker_login_seconds: float = 600.0
    instance: str = ""


def _creates(command: Command) -> bool:
    return isinstance(command, BootWorker) or (isinstance(command, LeaseStage) and command.attempt == 1)


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> web.Application | None:
    """Build the scheduler and start its parts."""
    settings = decode(Settings, environ)
    log = await service.enter(open_postgres_log(settings.database_url))
    epoch = await begin_epoch(log, service.draining.set)
    clock = SharedClock(log.pool, time.time, time.monotonic)
    with suppress(LogUnavailable):
        await clock.look()
    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_seed, "scheduler"))
    bus.measure(service.registry)
    commands: CommandLoop[Command, State] = CommandLoop(log, SchedulerDecider(), new_id, creates=_creates)
    leadership = Leadership(log.pool, "placement", settings.instance or new_id())
    door = await service.enter(
        connect_doorkeeper(
            settings.nats_url,
            callout_seeds(settings.callout_seed),
            lambda worker: scheduler.key_of(worker),
            settings.worker_login_seconds,
            lambda: scheduler.knows(),
        )
    )
    door.measure(service.registry)
    vault = Vault(log.pool, master_keys(settings))
    scheduler = Scheduler(
        log=log,
        bus=bus,
        commands=commands,
        leadership=leadership,
        snapshots=Snapshots(log.pool),
        packer=Packer(settings.server_key, settings.artifacts_url, settings.lease_seconds, clock.now),
        vault=vault,
        door=door,
        lease_seconds=settings.lease_seconds,
        clock=time.monotonic,
        now=clock.now,
    )
    secrets = Secrets(
        log=log,
        bus=bus,
        commands=commands,
        vault=vault,
        sealing=SealingKeys(vault, commands, new_id, lambda: scheduler.board.now),
        index=lambda: scheduler.board.secrets,
        leads=lambda: leadership.term is not None and scheduler.problem is None and scheduler.stuck is None,
        ids=new_id,
        clock=time.monotonic,
    )
    nobodys = Gauge("penstock_scheduler_heartbeats_refused", "Heartbeats that no worker had signed", registry=service.registry)
    nobodys.set_function(lambda: scheduler.refused)
    service.depends("secrets", lambda: secrets.problem)
    measure_stuck(service.registry, lambda: scheduler.stuck)
    service.depends("database", lambda: scheduler.problem)
    service.warns("board", lambda: scheduler.stuck)
    service.depends("nats", lambda: None if bus.connected and door.connected else "is not connected")
    service.on_drain(leadership.resign)  # once it campaigns no more
    service.spawn("epoch", epoch.watch())
    service.spawn("clock", clock.run())
    service.spawn("leadership", leadership.run())
    service.spawn("commands", commands.run())
    service.spawn("watch-log", scheduler.watch_log())
    service.spawn("listen", scheduler.listen())
    service.spawn("scheduler", scheduler.run())
    service.spawn("secrets", secrets.serve())
    service.spawn("secrets-tidy", secrets.tidy())
    service.spawn("why", answer_why(bus, scheduler))
    service.spawn("door", door.keep())
    service.spawn("quotas", heed_quotas(bus, door))
    return None


def master_keys(settings: Settings) -> Callable[[], Keyring]:
    """The master keys as they are now: the same object until they change. Raises BadSettings at once when there are none."""
    file = settings.secret_keys_file
    if (file is None) == (not settings.secret_keys):
        raise BadSettings("PENSTOCK_SECRET_KEYS or PENSTOCK_SECRET_KEYS_FILE: one of them must give the master keys")
    known: tuple[str, Keyring] | None = None

    def keys() -> Keyring:
        nonlocal known
        text = settings.secret_keys if file is None else file.read_text(encoding="utf-8")
        if known is None or known[0] != text:
            known = text, Keyring(text)
        return known[1]

    try:
        keys()
    except (ValueError, OSError) as error:  # BadKeys, and what is no text
        raise BadSettings(f"PENSTOCK_SECRET_KEYS{'' if file is None else '_FILE'}: {error}") from None
    return keys
