"""The worker itself: hears packages and control, tells the session, does what it decides, and keeps its heart beating."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import assert_never

import msgspec
import structlog
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox
from prometheus_client import CollectorRegistry, Counter, Gauge

from libs.bus.bus import Bus, BusUnavailable, Message
from libs.tokens import BadSignature, sign, verify
from proto.messages import Attempt, Control, Package, Signed
from services.worker.condition import Condition
from services.worker.session import HEARTBEAT_SECONDS, Action, Followed, Forget, ForgetLog, Interrupt, Kill, Recorded, Refuse, Session, Start
from services.worker.stage import StageRun, Stop, Tools

logger = structlog.get_logger()

COALESCE_SECONDS = 0.005
"""Least time between two heartbeats: what happens within it shares one."""
TICK_SECONDS = 0.25
"""Between two looks at the clock while something runs."""
REST_SECONDS = 1.0
"""And while nothing does."""
SETTLE_SECONDS = 5.0

_encode = msgspec.msgpack.Encoder().encode
_decode_signed = msgspec.msgpack.Decoder(Signed).decode
_decode_package = msgspec.msgpack.Decoder(Package).decode
_decode_control = msgspec.msgpack.Decoder(Control).decode


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.refused = Counter("penstock_worker_messages_refused", "Packages and control that were not honoured", ["reason"], registry=registry)
        self.ended = Counter("penstock_worker_attempts", "Attempts by how they ended", ["status"], registry=registry)
        self.running = Gauge("penstock_worker_running", "Attempts that run", registry=registry)


class Worker:
    """One boot. `identity` is the Ed25519 seed to sign with, `server` the public key of the scheduler, `box` this boot's key to unseal with,
    `condition` how its machine is; it beats at least every `heartbeat_seconds`."""

    def __init__(
        self,
        bus: Bus,
        session: Session,
        tools: Tools,
        identity: str,
        server: str,
        box: PrivateKey,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        condition: Callable[[], Condition] = Condition,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._bus = bus
        self._condition = condition
        self._heartbeat_seconds = heartbeat_seconds
        self._session = session
        self._tools = tools
        self._outbox = tools.outbox
        self._identity = identity
        self._server = server
        self._box = SealedBox(box)
        self._metrics = metrics
        self._clock = clock
        self._runs: dict[Attempt, tuple[StageRun, asyncio.Task[None]]] = {}
        self._news = asyncio.Event()
        self._begun = asyncio.Event()
        self._quoted = b""
        self._left = False
        self._told: tuple[str, ...] = ()

    async def run(self) -> None:
        """Say again what an earlier life has left, then announce this one. Ends only by cancellation."""
        name = self._session.worker
        for attempt, reported in self._outbox.replay().items():
            self._session.on_replayed(attempt, reported)
        async with self._bus.listen(f"execute_build_package.{name}") as packages, self._bus.listen(f"control.{name}") as controls:
            await self._bus.wait_connected()
            self._outbox.on_time()
            await asyncio.sleep(0)
            await self._outbox.settle(SETTLE_SECONDS)
            async with asyncio.TaskGroup() as parts:
                parts.create_task(self._hear_packages(packages), name="packages")
                parts.create_task(self._hear_control(controls), name="control")
                parts.create_task(self._beat(), name="heartbeats")
                parts.create_task(self._keep_time(), name="time")

    async def drain(self) -> None:
        """Stop the steps, see that what has ended is said, and say goodbye: the owner may give the rest to others at once."""
        self._session.leaving = True
        await self._heartbeat()
        for attempt, (run, _) in self._runs.items():
            self._outbox.forget(attempt)
            run.stop(Stop("aborted", "the worker is stopping"))
        tasks = [task for _, task in self._runs.values()]
        if tasks:
            await asyncio.wait(tasks)
        await self._outbox.settle(SETTLE_SECONDS)
        self._left = True
        await self._heartbeat(goodbye=True)

    async def close(self) -> None:
        """Nothing runs afterwards, whatever happened before."""
        tasks = [task for _, task in self._runs.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._tools.orphans.sweep()
        self._tools.orphans.close()
        await self._tools.artifacts.close()
        self._tools.cache.close()
        await self._outbox.close()

    def on_disk_full(self, attempt: Attempt, error: OSError) -> None:
        """The spool could not keep what the attempt said: it may not go on."""
        logger.warning("the spool cannot be written", attempt=attempt, error=str(error))
        if attempt in self._runs:
            self._runs[attempt][0].stop(Stop("errored", f"worker's disk is full: {error.strerror}", at_once=True))

    async def _hear_packages(self, messages: AsyncIterator[Message]) -> None:
        context = f"execute_build_package.{self._session.worker}"
        async for message in messages:
            try:
                package = _decode_package(self._box.decrypt(verify(self._server, context, _decode_signed(message.data))))
            except (msgspec.DecodeError, BadSignature, CryptoError, ValueError) as error:
                self._refuse("package", type(error).__name__)
                continue
            match self._session.on_package(package, self._clock()):
                case Start():
                    self._start(package)
                    if self._session.pulls:
                        self._news.set()  # the next credit, if it is wanted
                case Refuse(reason):
                    self._refuse("package", reason)
                case None:
                    pass

    async def _hear_control(self, messages: AsyncIterator[Message]) -> None:
        context = f"control.{self._session.worker}"
        async for message in messages:
            try:
                control = _decode_control(verify(self._server, context, _decode_signed(message.data)))
            except (msgspec.DecodeError, BadSignature) as error:
                self._refuse("control", type(error).__name__)
                continue
            for action in self._session.on_control(control):
                self._do(action)
            if self._session.challenge != self._quoted:
                # Credits count only with the challenge of whoever leads: a new one is quoted at once.
                self._news.set()

    async def _beat(self) -> None:
        while True:
            self._news.clear()
            if not self._left:
                await self._heartbeat()
            await asyncio.sleep(COALESCE_SECONDS)
            try:
                async with asyncio.timeout(self._heartbeat_seconds - COALESCE_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _keep_time(self) -> None:
        while True:
            if not self._runs:
                self._begun.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REST_SECONDS - TICK_SECONDS):
                        await self._begun.wait()
            await asyncio.sleep(TICK_SECONDS)
            for action in self._session.on_time(self._clock()):
                self._do(action)
            self._outbox.on_time()
            self._tools.orphans.sweep()

    async def _heartbeat(self, goodbye: bool = False) -> None:
        self._told = self._tools.cache.hints()
        heartbeat = self._session.on_heartbeat_due(self._clock(), self._outbox.logs_in_turn(), self._told, goodbye, self._condition())
        self._quoted = heartbeat.availability.challenge
        signed = sign(self._identity, "presence", _encode(heartbeat))
        try:
            await self._bus.send(f"presence.{self._session.worker}", _encode(signed))
        except BusUnavailable:
            return

    def _do(self, action: Action) -> None:
        match action:
            case Interrupt(attempt, reason):
                if attempt in self._runs:
                    timed_out = reason.startswith(("timeout", "timed out"))
                    self._runs[attempt][0].stop(Stop("failed", "timed out") if timed_out else Stop("aborted", ""))
            case Kill(attempt, why):
                logger.warning("an attempt is lost", attempt=attempt, why=why)
                if attempt in self._runs:
                    self._runs[attempt][1].cancel()
            case Recorded(attempt, number):
                self._outbox.on_recorded(attempt, number)
            case Forget(attempt):
                self._outbox.forget(attempt)
            case ForgetLog(log):
                self._outbox.forget_log(log)
            case Followed():
                logger.error("another worker bears this name: a later boot, which gets all the work", worker=self._session.worker)
            case _:
                assert_never(action)

    def _start(self, package: Package) -> None:
        attempt = package.attempt
        run = StageRun(package, self._tools, lambda number: self._on_reported(attempt, number))
        self._outbox.open(attempt, run.on_window)
        self._runs[attempt] = run, asyncio.get_running_loop().create_task(self._follow(attempt, run), name=f"attempt {attempt}")
        self._metrics.running.set(len(self._runs))
        self._begun.set()

    def _on_reported(self, attempt: Attempt, number: int) -> None:
        self._session.on_reported(attempt, number)
        if self._tools.cache.hints() is not self._told:
            # What it was given is here: whatever wants the same had best come here too.
            self._news.set()

    async def _follow(self, attempt: Attempt, run: StageRun) -> None:
        status, began = "lost", self._clock()
        log = logger.bind(team=run.package.team, build=attempt.build, stage=attempt.stage, attempt=attempt.number)
        log.info("an attempt begins")
        try:
            status = await run.run()
        except Exception as error:
            logger.error("an attempt broke the worker's own code", attempt=attempt, exc_info=error)
            raise
        finally:
            del self._runs[attempt]
            self._metrics.running.set(len(self._runs))
            self._metrics.ended.labels(status).inc()
            log.info("an attempt ended", status=status, seconds=round(self._clock() - began, 2))
            self._session.on_attempt_ended(attempt)
            self._news.set()

    def _refuse(self, what: str, reason: str) -> None:
        self._metrics.refused.labels(f"{what}: {reason}").inc()
        logger.warning("refused", what=what, reason=reason)
