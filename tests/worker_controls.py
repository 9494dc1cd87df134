"""A worker under test, and the part of a scheduler that it needs: packages, answers to its heartbeats, an eye on what it says."""

import asyncio
import contextlib
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nacl.public import PrivateKey, PublicKey, SealedBox
from prometheus_client import CollectorRegistry

from libs.bus.bus import Bus, BusUnavailable
from libs.bus.memory import MemoryBus
from libs.tokens import new_seed, public_key, sign, verify
from proto.events.base import ArtifactRef
from proto.image import RUNNABLE
from proto.messages import (
    About,
    ArchivedLog,
    Attempt,
    Control,
    Heartbeat,
    Held,
    LogChunk,
    Mode,
    Offers,
    Package,
    ReportBody,
    Reports,
    ReportStageFinished,
    ReportStepFinished,
    ReportStepStarted,
    Signed,
)
from proto.plan import Run, RunStep, Stage, TaskConfig, TaskInput, TaskOutput
from proto.topology import CONSUMERS, STREAMS
from services.worker.artifacts import Artifacts
from services.worker.cache import Cache
from services.worker.condition import Condition
from services.worker.copying import reflinks_work
from services.worker.executors.executor import Executor, Executors
from services.worker.executors.orphans import Orphans
from services.worker.executors.process import ProcessExecutor
from services.worker.executors.processes import everything
from services.worker.executors.sandboxes import Choice, first_that_works, interpreter_folders
from services.worker.folders import FolderPool, next_boot
from services.worker.mounts import private_mounts, unmount
from services.worker.outbox import Outbox
from services.worker.placing import Means, means_here
from services.worker.session import HEARTBEAT_SECONDS, Session
from services.worker.spool import Spool
from services.worker.stage import Tools
from services.worker.wiring import Settings
from services.worker.worker import Metrics, Worker
from tests.controls import eventually
from tests.nats_fixture import NatsServer

SERVER = new_seed()
IDENTITY = new_seed()
PATH = "/usr/local/bin:/usr/bin:/bin"
XFS_BYTES = 512 << 20


def sandboxes_here() -> list[Choice]:
    """The sandboxes that this machine allows."""
    import tempfile

    found: list[Choice] = []
    choices: tuple[Choice, ...] = ("bwrap", "unshare", "none")
    for choice in choices:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(RuntimeError):
            first_that_works(choice, Path(folder), interpreter_folders(PATH))
            found.append(choice)
    return found


@pytest.fixture(scope="session")
def all_means(tmp_path_factory: pytest.TempPathFactory) -> Means:
    """All that this machine allows; from now on this process's mounts are its own."""
    return means_here(tmp_path_factory.mktemp("means") / "trial", private_mounts())


@pytest.fixture(params=["overlay", "reflink", "copy"])
def means(request: pytest.FixtureRequest, all_means: Means, tmp_path: Path) -> Iterator[Means]:
    """Each way to place a tree. `tmp_path` is on a file system that can do it."""
    if request.param == "copy":
        yield Means(None, False)
    elif request.param == "overlay":
        if all_means.overlays is None:
            pytest.skip("this machine allows no mounts")
        yield Means(all_means.overlays, False)
    elif all_means.reflinks:
        yield Means(None, True)
    else:
        if all_means.overlays is None or (make := shutil.which("mkfs.xfs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")) is None:
            pytest.skip("this file system shares no contents, and for one that does mkfs.xfs is missing, or the right to mount it")
        with an_xfs(make, tmp_path):
            yield Means(None, True)


@contextlib.contextmanager
def an_xfs(make: str, at: Path) -> Iterator[None]:
    """An empty XFS mounted at a folder, for this process and its children. However they end, nothing is left: the image has no name once it is
    mounted, and the loop device goes with the mount."""
    image = at.with_name(f"{at.name}.xfs")
    try:
        with image.open("xb") as file:
            file.truncate(XFS_BYTES)
        subprocess.run([make, "-q", image], check=True)
        subprocess.run(["mount", "-t", "xfs", "-o", "loop,nodiscard", image, at], check=True)
    finally:
        image.unlink()
    try:
        assert reflinks_work(at)
        for name in ("one", "two"):
            (at / name).unlink()
        yield
    finally:
        unmount(at)


def sh(script: str, name: str = "step", **more: Any) -> RunStep:
    """A step that runs a shell script."""
    return step("sh", "-c", script, name=name, **more)


def step(
    path: str,
    *args: str,
    name: str = "step",
    inputs: list[TaskInput] | None = None,
    outputs: list[str | TaskOutput] | None = None,
    params: dict[str, str] | None = None,
    timeout: int = 60,
    dir: str | None = None,
) -> RunStep:
    config = TaskConfig(
        run=Run(path=path, args=list(args), dir=dir),
        inputs=inputs or [],
        outputs=[TaskOutput(name=each) if isinstance(each, str) else each for each in outputs or []],
        params=params or {},
    )
    return RunStep(name=name, config=config, timeout=timeout)


class Scheduler:
    """Answers one worker. `silent` stops its answers; `lost` are attempts it does not hold; `interrupted` says which must stop and why."""

    def __init__(self, bus: Bus, worker: str = "w1", lease_seconds: float = 15.0, artifacts_url: str = "") -> None:
        self.bus = bus
        self.worker = worker
        self.lease_seconds = lease_seconds
        self.artifacts_url = artifacts_url
        self.silent = False
        self.records = True
        self.archives = True
        self.lost: set[Attempt] = set()
        self.interrupted: dict[Attempt, str] = {}
        self.heartbeats: list[Heartbeat] = []
        self.reports: dict[Attempt, dict[int, ReportBody]] = {}
        self.messages = 0
        self.chunks: dict[Attempt, dict[int, LogChunk]] = {}
        self._fresh: dict[str, Any] = {}
        self._used: set[str] = set()
        self._waiting: asyncio.Future[None] | None = None
        self._numbers = itertools.count(1)

    async def run(self) -> None:
        async with (
            self.bus.listen(f"presence.{self.worker}") as presence,
            self.bus.tail("REPORTS", f"reports.{self.worker}.>") as reports,
            self.bus.tail("LOGS", f"logs.{self.worker}.>") as logs,
            asyncio.TaskGroup() as parts,
        ):
            parts.create_task(self._answer(presence))
            parts.create_task(self._note_reports(reports))
            parts.create_task(self._note_logs(logs))

    async def send(self, *steps: RunStep, inputs: dict[str, ArtifactRef] | None = None, token: str = "", team: str = "main") -> Attempt:
        """Lease a new attempt to the worker, on a fresh credit."""
        attempt = Attempt(f"build{next(self._numbers)}", "main", 1)
        await self.bus.send(f"execute_build_package.{self.worker}", await self.package(attempt, *steps, inputs=inputs, token=token, team=team))
        return attempt

    async def package(
        self,
        attempt: Attempt,
        *steps: RunStep,
        inputs: dict[str, ArtifactRef] | None = None,
        token: str = "",
        team: str = "main",
        signed_by: str = SERVER,
        signed_for: str = "",
        **forged: Any,
    ) -> bytes:
        """On a fresh credit. `signed_for` is another's name, perhaps, and `forged` are other fields than an honest one has."""
        async with asyncio.timeout(10):
            while (credit := self._credit()) is None:
                await self._next()
        package = Package(
            attempt=attempt,
            team=team,
            worker=self.worker,
            boot=self.heartbeats[-1].boot,
            credit=credit.nonce,
            lease_seconds=self.lease_seconds,
            stage=Stage(name="main", steps=list(steps)),
            inputs=inputs or {},
            token=token,
            artifacts_url=self.artifacts_url,
        )
        sealed = SealedBox(PublicKey(credit.key)).encrypt(msgspec.msgpack.encode(msgspec.structs.replace(package, **forged)))
        return msgspec.msgpack.encode(sign(signed_by, f"execute_build_package.{signed_for or self.worker}", sealed))

    async def finished(self, attempt: Attempt, timeout: float = 20) -> ReportStageFinished:
        """The stage's end, once it is said."""

        async with asyncio.timeout(timeout):
            while True:
                for body in self.reports.get(attempt, {}).values():
                    if isinstance(body, ReportStageFinished):
                        return body
                await self._next()

    async def started(self, attempt: Attempt) -> ReportStepStarted:
        return await eventually(lambda: next((b for b in self.reports.get(attempt, {}).values() if isinstance(b, ReportStepStarted)), None))

    def step(self, attempt: Attempt, name: str = "step") -> ReportStepFinished:
        bodies = self.reports[attempt].values()
        return next(body for body in bodies if isinstance(body, ReportStepFinished) and body.step == name)

    async def log(self, attempt: Attempt, stream: str | None = None) -> str:
        """The whole log, or one stream of it, of an attempt that has ended."""
        extent = await self.finished(attempt)

        def whole() -> bool:
            missing = self._missing(attempt)
            assert not missing, f"chunks {missing} of {extent.chunks} have not come"
            return True

        await eventually(whole)
        chunks = [chunk for _, chunk in sorted(self.chunks.get(attempt, {}).items())]
        return b"".join(s.data for c in chunks for s in c.segments if stream in (None, s.stream)).decode(errors="replace")

    def text(self, attempt: Attempt) -> str:
        """What of the log has arrived so far."""
        return b"".join(s.data for _, c in sorted(self.chunks.get(attempt, {}).items()) for s in c.segments).decode(errors="replace")

    async def control(self, control: Control) -> None:
        await self.bus.send(f"control.{self.worker}", msgspec.msgpack.encode(sign(SERVER, f"control.{self.worker}", msgspec.msgpack.encode(control))))

    def _missing(self, attempt: Attempt) -> list[int]:
        """The chunks that have not come of an attempt that has ended."""
        reports = self.reports.get(attempt, {}).values()
        extent = next((body for body in reports if isinstance(body, ReportStageFinished)), None)
        return sorted(set(range(1, extent.chunks + 1)) - self.chunks.get(attempt, {}).keys()) if extent else [1]

    async def _next(self) -> None:
        """Something was heard."""
        self._waiting = self._waiting or asyncio.get_running_loop().create_future()
        await asyncio.shield(self._waiting)

    def _heard(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        self._waiting = None

    def _credit(self) -> Any:
        for nonce, credit in self._fresh.items():
            if nonce not in self._used:
                self._used.add(nonce)
                return credit
        return None

    async def _answer(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            signed = msgspec.msgpack.decode(message.data, type=Signed)
            heartbeat = msgspec.msgpack.decode(verify(public_key(IDENTITY), "presence", signed), type=Heartbeat)
            self.heartbeats.append(heartbeat)
            self._fresh = {credit.nonce: credit for credit in heartbeat.availability.credits}
            self._heard()
            if self.silent:
                continue
            held = [
                Held(r.attempt, max(self.reports.get(r.attempt, {0: None})) if self.records else 0, self.interrupted.get(r.attempt, ""))
                for r in heartbeat.running
                if r.attempt not in self.lost
            ]
            archived = [ArchivedLog(*msgspec.structs.astuple(log)) for log in heartbeat.logs if self.archives and not self._missing(log)]
            answer = Control(
                boot=heartbeat.boot,
                number=heartbeat.number,
                challenge=secrets.token_bytes(8),
                lease_seconds=self.lease_seconds,
                held=held,
                archived=archived,
            )
            with contextlib.suppress(BusUnavailable):  # it went after the heartbeat had come
                await self.control(answer)

    async def _note_reports(self, batches: AsyncIterator[list[Any]]) -> None:
        async for batch in batches:
            for message in batch:
                self.messages += 1
                reports = msgspec.msgpack.decode(message.data, type=Reports)
                self.reports.setdefault(reports.attempt, {}).update(enumerate(reports.bodies, reports.first))
                self._heard()

    async def _note_logs(self, batches: AsyncIterator[list[Any]]) -> None:
        async for batch in batches:
            for message in batch:
                chunk = msgspec.msgpack.decode(message.data, type=LogChunk)
                self.chunks.setdefault(chunk.attempt, {})[chunk.number] = chunk


class Running(msgspec.Struct, frozen=True):
    worker: Worker
    outbox: Outbox
    tools: Tools
    folder: Path


@contextlib.asynccontextmanager
async def a_worker(
    bus: Bus,
    folder: Path,
    name: str = "w1",
    sandbox: Choice = "none",
    slots: int = 2,
    grace: float = 10.0,
    log_limit: int = 64 << 20,
    path: str = PATH,
    patience: float = 5.0,
    means: Means | None = None,
    cache_bytes: int = 1 << 30,
    tags: tuple[str, ...] = (),
    now: Callable[[], float] = time.time,
    mode: Mode = "push",
    condition: Callable[[], Condition] = Condition,
    containers: Executor | None = None,
    heartbeat: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[Running]:
    """A worker in this process; nothing of it is left afterwards. Its trees are copied unless `means` says otherwise."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    orphans = Orphans(folder / "spool" / "processes", work)
    orphans.start()
    chosen = first_that_works(sandbox, folder, interpreter_folders(path))
    box = PrivateKey.generate()
    offers = Offers(sandbox=chosen.name, tags=tags, images=RUNNABLE if containers else ())
    since, nonce = next_boot(folder, time.time()), lambda: secrets.token_urlsafe(12)
    session = Session(name, secrets.token_hex(8), since, bytes(box.public_key), slots, offers, nonce, About(mode=mode))
    outbox = Outbox(name, session.boot, bus, Spool(folder / "spool"), time.monotonic, lambda attempt, error: worker.on_disk_full(attempt, error))
    if not chosen.wraps:
        orphans.adopt()
    pool = FolderPool(work, session.boot, chosen.mounted)
    cache = Cache(folder / "cache", cache_bytes)
    cache.open()
    artifacts = Artifacts(cache, IDENTITY, now, patience)
    executors = Executors(ProcessExecutor(chosen, orphans, path), containers)
    tools = Tools(name, executors, orphans, pool, outbox, artifacts, cache, means or Means(None, False), grace, log_limit)
    timing = {"condition": condition, "heartbeat_seconds": heartbeat}
    worker = Worker(bus, session, tools, IDENTITY, public_key(SERVER), box, Metrics(CollectorRegistry()), **timing)
    task = asyncio.ensure_future(worker.run())
    try:
        yield Running(worker, outbox, tools, folder)
    finally:
        task.cancel()
        await asyncio.wait([task])
        await worker.close()
        if not task.cancelled() and task.exception() is not None:
            raise task.exception() or AssertionError


@contextlib.asynccontextmanager
async def a_scheduler(bus: Bus, **more: Any) -> AsyncIterator[Scheduler]:
    await bus.ensure(STREAMS, CONSUMERS)
    scheduler = Scheduler(bus, **more)
    task = asyncio.ensure_future(scheduler.run())
    try:
        yield scheduler
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            raise task.exception() or AssertionError


@contextlib.asynccontextmanager
async def a_system(folder: Path, *, lease_seconds: float = 15.0, artifacts_url: str = "", **more: Any) -> AsyncIterator[tuple[Scheduler, Running]]:
    """A worker and its scheduler over a bus in memory."""
    bus = MemoryBus()
    async with (
        a_scheduler(bus, lease_seconds=lease_seconds, artifacts_url=artifacts_url) as scheduler,
        a_worker(bus, folder, **more) as running,
    ):
        yield scheduler, running


def environment(folder: Path, url: str, sandbox: Choice, **more: str) -> dict[str, str]:
    """The settings of a worker that runs as a process of its own."""
    names = {field.name for field in msgspec.structs.fields(Settings)}
    settings = {
        "nats_url": url,
        "worker_name": "w1",
        "worker_key": IDENTITY,
        "server_public_key": public_key(SERVER),
        "worker_dir": str(folder),
        "worker_build_limit": "2",
        "worker_sandbox": sandbox,
        "worker_path": PATH,
        **more,
    }
    assert settings.keys() <= names
    return {"PATH": os.environ["PATH"], **{f"PENSTOCK_{name.upper()}": value for name, value in settings.items()}}


@contextlib.contextmanager
def a_process(
    folder: Path, nats: NatsServer, sandbox: Choice = "none", prefix: Sequence[str] = (), status: int = 0, **settings: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker as the process that it is, which writes `worker.log` beside its folder. `status` is the port at which it says how it is (0: any)."""
    folder.mkdir(exist_ok=True)
    with (folder.parent / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "services.worker"],
            env={**environment(folder, nats.url, sandbox, **settings), "PYTHONPATH": os.getcwd(), "PENSTOCK_STATUS_LISTEN": f"127.0.0.1:{status}"},
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def alive(marker: str) -> list[int]:
    """Processes whose command line holds `marker`; a zombie counts as gone."""
    found = []
    for seen in everything():
        with contextlib.suppress(OSError):
            if seen.state != "Z" and marker.encode() in Path(f"/proc/{seen.pid}/cmdline").read_bytes():
                found.append(seen.pid)
    return found
