"""Where the worker is put together."""

import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog
from aiohttp import web
from nacl.public import PrivateKey

from libs.archives.pump import in_thread
from libs.archives.selftest import self_test
from libs.bus.jetstream import connect_jetstream
from libs.runtime.memory import keep_memory
from libs.runtime.service import Service
from libs.runtime.settings import BadSettings, decode
from proto.messages import Offers
from services.worker.artifacts import Artifacts
from services.worker.cache import Cache
from services.worker.executors.commands import Commands
from services.worker.executors.orphans import Orphans
from services.worker.executors.sandboxes import Choice, first_that_works, interpreter_folders
from services.worker.folders import FolderPool, remove_tree
from services.worker.outbox import Outbox
from services.worker.placing import means_here
from services.worker.session import Session
from services.worker.spool import Spool
from services.worker.stage import Tools
from services.worker.worker import Metrics, Worker

logger = structlog.get_logger()

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`worker_path` is the steps' PATH (default: this Python's programs, then the standard ones); `worker_tags` are separated by commas.
    `worker_cache_bytes` is how much of inputs and outputs is kept for later stages (0: nothing), never more than stays free on the disk."""

    nats_url: str
    nats_user: str
    nats_password: str
    worker_name: str
    worker_key: str
    server_public_key: str
    worker_dir: Path
    worker_slots: int = 4
    worker_sandbox: Choice = "auto"
    worker_path: str = f"{Path(sys.executable).parent}:{STANDARD_PATH}"
    worker_tags: str = ""
    grace_seconds: float = 10.0
    log_limit_bytes: int = 64 << 20
    worker_cache_bytes: int = 10_000_000_000


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket], private: bool = False) -> web.Application | None:
    """Serves nothing but its status: all that the worker hears comes by the bus. `private` says whether mounts are this process's own."""
    settings = decode(Settings, environ)
    keep_memory(8 << 20)
    self_test()
    if settings.worker_slots < 1:
        raise BadSettings("PENSTOCK_WORKER_SLOTS: at least 1")
    if settings.worker_cache_bytes < 0:
        raise BadSettings("PENSTOCK_WORKER_CACHE_BYTES: at least 0")
    name = settings.worker_name
    folder = settings.worker_dir.absolute()
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)

    orphans = Orphans(folder / "spool" / "processes", work)
    killed = orphans.start()
    for left in work.iterdir():
        remove_tree(left)
    try:
        sandbox = first_that_works(settings.worker_sandbox, folder, interpreter_folders(settings.worker_path))
    except RuntimeError as error:
        raise BadSettings(f"PENSTOCK_WORKER_SANDBOX: {error}") from None
    if not sandbox.wraps:
        orphans.adopt()
    means = means_here(work / "trial", private)
    cache = Cache(folder / "cache", settings.worker_cache_bytes)
    await in_thread(cache.open)
    logger.info("offering", sandbox=sandbox.name, slots=settings.worker_slots, inputs=means.name, orphans_killed=killed)

    bus = await service.enter(connect_jetstream(settings.nats_url, settings.nats_user, settings.nats_password, name, inbox_prefix=f"_INBOX_{name}"))
    service.depends("nats", lambda: None if bus.connected else "not connected")
    box = PrivateKey.generate()
    offers = Offers(tags=tuple(sorted({tag.strip() for tag in settings.worker_tags.split(",") if tag.strip()})), sandbox=sandbox.name)
    session = Session(name, secrets.token_hex(8), bytes(box.public_key), settings.worker_slots, offers, lambda: secrets.token_urlsafe(12))
    outbox = Outbox(name, session.boot, bus, Spool(folder / "spool"), time.monotonic, lambda attempt, error: worker.on_disk_full(attempt, error))
    tools = Tools(
        worker=name,
        sandbox=sandbox,
        commands=Commands(sandbox),
        orphans=orphans,
        folders=FolderPool(work, session.boot),
        outbox=outbox,
        artifacts=Artifacts(cache),
        cache=cache,
        means=means,
        path=settings.worker_path,
        grace=settings.grace_seconds,
        log_limit=settings.log_limit_bytes,
    )
    worker = Worker(bus, session, tools, settings.worker_key, settings.server_public_key, box, Metrics(service.registry))
    service.on_drain(worker.close)
    service.spawn("worker", worker.run())
    service.on_drain(worker.drain)
    return None
