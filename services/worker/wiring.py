"""Where the worker is put together."""

import importlib.metadata
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from aiohttp import web
from nacl.public import PrivateKey

from libs.archives.pump import in_thread
from libs.archives.selftest import self_test
from libs.bus.accounts import inbox_prefix
from libs.bus.jetstream import connect_jetstream
from libs.runtime.memory import keep_memory
from libs.runtime.service import Service
from libs.runtime.settings import BadSettings, decode
from proto.image import RUNNABLE
from proto.messages import MAX_SLOTS, Mode, Offers
from proto.private import Private
from services.worker.artifacts import Artifacts
from services.worker.cache import Cache
from services.worker.condition import Condition, about, measure, sated, trouble
from services.worker.executors.docker import DockerExecutor, containers_here
from services.worker.executors.executor import CannotRun, Executors
from services.worker.executors.hardened import Limits
from services.worker.executors.orphans import Orphans
from services.worker.executors.owned import owner_of
from services.worker.executors.process import ProcessExecutor
from services.worker.executors.sandboxes import Choice, first_that_works, interpreter_folders
from services.worker.folders import FolderPool, Taken, alone_in, lost, next_boot, remove_tree
from services.worker.outbox import Outbox
from services.worker.placing import means_here
from services.worker.session import Session
from services.worker.spool import Spool
from services.worker.stage import Tools
from services.worker.standing import Link, Watch
from services.worker.worker import Metrics, Worker

logger = structlog.get_logger()

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Settings(Private, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`worker_path` is the steps' PATH (default: this Python's programs, then the standard ones); `worker_tags` are separated by commas.
    `worker_renew_seconds`: how often it connects anew, before the bus forgets it (see the scheduler's `worker_login_seconds`).
    `worker_queue_mode`: `push` has the worker offer every free slot; `pull` one at a time, while its load is under `worker_load_limit` (0: as many
    as it has cores) and its disk has room. `worker_cache_bytes` is how much of inputs and outputs is kept for later
    stages (0: nothing), never more than stays free on the disk. `server_url` is the gateway's, to ask there whether it is a worker still while the
    bus does not admit it ("": it asks nobody, and tries for ever), and `gateway_public_key` what such an answer must be signed by.

    `worker_executors`: `process`, `process,docker`, or `auto`, which is both where a Docker engine answers at `worker_docker_url`. A container gets
    `worker_container_memory_bytes` at most (0: its slot's share of the machine's), `worker_container_cpus` (0: all) and so many processes and
    threads; an image is given `worker_pull_seconds` to come. `worker_warm_containers`: how many are kept started for the next step (0: none).
    `worker_privileged`: steps may have all rights on this machine, if their team may."""

    nats_url: str
    worker_name: str
    worker_key: str
    server_public_key: str
    worker_dir: Path
    server_url: str = ""
    gateway_public_key: str = ""
    worker_build_limit: int = 4
    worker_sandbox: Choice = "auto"
    worker_path: str = f"{Path(sys.executable).parent}:{STANDARD_PATH}"
    worker_tags: str = ""
    worker_renew_seconds: float = 480.0
    grace_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 10.0
    log_limit_bytes: int = 64 << 20
    worker_cache_bytes: int = 10_000_000_000
    worker_queue_mode: Mode = "push"
    worker_load_limit: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    worker_executors: str = "auto"
    worker_docker_url: str = "unix:///var/run/docker.sock"
    worker_container_memory_bytes: int = 0
    worker_container_cpus: float = 0.0
    worker_container_pids: int = 4096
    worker_pull_seconds: float = 600.0
    worker_warm_containers: int = 2
    worker_privileged: bool = False


async def wire(service: Service, environ: Mapping[str, str], sockets: Mapping[str, socket.socket], private: bool = False) -> web.Application | None:
    """Serves nothing but its status: all that the worker hears comes by the bus. `private` says whether mounts are this process's own."""
    settings = decode(Settings, environ)
    keep_memory(8 << 20)
    self_test()
    if not 1 <= settings.worker_build_limit <= MAX_SLOTS:
        raise BadSettings(f"PENSTOCK_WORKER_BUILD_LIMIT: at least 1, at most {MAX_SLOTS}")
    if settings.worker_cache_bytes < 0:
        raise BadSettings("PENSTOCK_WORKER_CACHE_BYTES: at least 0")
    if settings.server_url and not settings.gateway_public_key:
        raise BadSettings("PENSTOCK_GATEWAY_PUBLIC_KEY: missing; without it nothing that PENSTOCK_SERVER_URL answers can be believed")
    name = settings.worker_name
    folder = settings.worker_dir.absolute()
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        there = await service.enter(alone_in(folder))
    except Taken as error:
        raise BadSettings(f"PENSTOCK_WORKER_DIR: {error}; a second one on this machine needs a folder, and a name, of its own") from None

    orphans = Orphans(folder / "spool" / "processes", work)
    killed = orphans.start()
    containers = await _containers(service, settings, folder)
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
    logger.info(
        "offering", sandbox=sandbox.name, images=containers is not None, slots=settings.worker_build_limit, inputs=means.name, orphans_killed=killed
    )

    bus = await service.enter(
        connect_jetstream(settings.nats_url, settings.worker_key, name, inbox_prefix(name), renew=settings.worker_renew_seconds)
    )
    bus.measure(service.registry)
    service.depends("nats", lambda: None if bus.connected else "not connected")
    box = PrivateKey.generate()
    offers = Offers(
        tags=_listed(settings.worker_tags),
        images=RUNNABLE if containers else (),
        user=containers is not None and os.geteuid() == 0,
        limits=containers is not None,
        privileged=containers is not None and settings.worker_privileged,
        sandbox=sandbox.name,
    )
    me = about(settings.worker_queue_mode, importlib.metadata.version("penstock"), settings.nats_url)
    since, nonce = next_boot(folder, time.time()), lambda: secrets.token_urlsafe(12)
    session = Session(name, secrets.token_hex(8), since, bytes(box.public_key), settings.worker_build_limit, offers, nonce, me)
    outbox = Outbox(name, session.boot, bus, Spool(folder / "spool"), time.monotonic, lambda attempt, error: worker.on_disk_full(attempt, error))
    tools = Tools(
        worker=name,
        executors=Executors(ProcessExecutor(sandbox, orphans, settings.worker_path), containers),
        orphans=orphans,
        folders=FolderPool(work, session.boot, sandbox.mounted),
        outbox=outbox,
        artifacts=Artifacts(cache, settings.worker_key, time.time),
        cache=cache,
        means=means,
        grace=settings.grace_seconds,
        log_limit=settings.log_limit_bytes,
    )
    most_load = settings.worker_load_limit or float(os.cpu_count() or 1)

    def condition() -> Condition:
        try:
            if not there():
                service.give_up(lost(folder))
                return Condition(trouble="its folder was removed")
            measured = measure(folder)
        except OSError as error:
            return Condition(trouble=f"its folder cannot be used: {error.strerror}")
        no_images = containers.trouble if containers else ""
        enough = sated(measured, most_load)
        return Condition(trouble=trouble(measured), no_images=no_images, sated=enough, cache_used=cache.bytes, cache_limit=cache.limit)

    worker = Worker(bus, session, tools, settings.worker_key, settings.server_public_key, box, Metrics(service.registry), condition=condition)
    service.on_drain(worker.close)
    link = Link(lambda: bus.connected, lambda: bus.refused)
    watch = Watch(link, name, settings.worker_key, settings.server_public_key, settings.gateway_public_key, settings.server_url, time.time)
    service.spawn("standing", watch.run())
    service.spawn("worker", worker.run())
    service.on_drain(worker.drain)
    return None


async def _containers(service: Service, settings: Settings, folder: Path) -> DockerExecutor | None:
    """What runs steps in containers, if anything does. Raises BadSettings."""
    wanted = set(_listed(settings.worker_executors))
    if wanted not in ({"auto"}, {"process"}, {"docker", "process"}):
        raise BadSettings("PENSTOCK_WORKER_EXECUTORS: auto, process or process,docker")
    if wanted == {"process"}:
        return None
    memory = settings.worker_container_memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // settings.worker_build_limit
    limits = Limits(memory=memory, cpus=settings.worker_container_cpus, pids=settings.worker_container_pids)
    try:
        owner, labels = owner_of(folder, lambda: secrets.token_hex(16)), {"penstock.worker": settings.worker_name}
        return await service.enter(
            containers_here(
                settings.worker_docker_url,
                owner,
                labels,
                limits,
                privileged=settings.worker_privileged,
                pull_seconds=settings.worker_pull_seconds,
                warm=settings.worker_warm_containers,
                folder=folder,
            )
        )
    except (CannotRun, OSError) as error:
        if wanted == {"auto"}:
            return None
        raise BadSettings(f"PENSTOCK_WORKER_DOCKER_URL: {error}") from None


def _listed(text: str) -> tuple[str, ...]:
    """What stands between commas, each once."""
    return tuple(sorted({part.strip() for part in text.split(",") if part.strip()}))
