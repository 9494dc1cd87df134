"""The scheduler's loop: read the log, hear the workers; whoever leads also answers them, places what waits and expires what is lost.

Every instance reads and listens, so that a takeover starts warm. One loop does it all in turn: what a turn appends, the next one has read.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec
import structlog

from libs.bus.bus import Bus, BusUnavailable, TooLarge
from libs.eventlog.log import EventLog, LogUnavailable, is_full
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from libs.tokens import BadSignature, verify
from proto.catalogue import UnknownEvent, decode
from proto.envelope import fact
from proto.events.build import BuildCreated
from proto.messages import Attempt, Control, Credit, Heartbeat, Held, Signed
from proto.plan import Stage
from services.scheduler.board import CATEGORIES, CODE_VERSION, Board, Lease
from services.scheduler.challenges import Challenges
from services.scheduler.commands import BootWorker, Command, DeferStage, ExpireLease, LeaseStage, LoseWorker
from services.scheduler.decider import State
from services.scheduler.fleet import Fleet, Worker, unlisted
from services.scheduler.packages import Packer
from services.scheduler.placement import Assignment, place
from services.scheduler.queue import Queued
from services.scheduler.spooled import forgettable

logger = structlog.get_logger()

TICK = 0.25
"""Seconds between two looks at the clock when nothing happens."""
STALL = 2.0
"""A gap between two turns (seconds) after which this process was stopped, and what it did not hear proves nothing."""
CREDIT_LIFE = 10.0
"""Seconds for which a worker honours a credit."""
RESEND = 1.0
"""Seconds after which a package that a heartbeat does not show is sent again."""
PATIENCE = 1.0
"""Seconds that an attempt waits before it is said why."""
WARM_UP = 2.5
"""Seconds of leading before "no worker" means anything."""
SNAPSHOT_EVERY = 20_000
"""Facts between two snapshots."""
BATCH = 5_000
PRUNE_EVERY = 60.0
URGENT = frozenset({"build"})
"""What must be read at once: attempts to place, and their ends. What became of leases and workers is mostly our own doing."""
LINGER = 0.1

_SIGNED = msgspec.msgpack.Decoder(Signed)
_HEARTBEAT = msgspec.msgpack.Decoder(Heartbeat)


class Leading(Protocol):
    """Leadership: the term while it lasts, None otherwise."""

    @property
    def term(self) -> int | None: ...


class Snapshots(Protocol):
    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None: ...

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None: ...


class Scheduler:
    """`worker_keys` maps each worker's name to its public key; `clock` is monotonic seconds, `now` unix seconds."""

    def __init__(
        self,
        *,
        log: EventLog,
        bus: Bus,
        commands: CommandLoop[Command, State],
        leadership: Leading,
        snapshots: Snapshots,
        packer: Packer,
        worker_keys: Mapping[str, str],
        lease_seconds: float,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._log = log
        self._bus = bus
        self._commands = commands
        self._leadership = leadership
        self._snapshots = snapshots
        self._packer = packer
        self._worker_keys = worker_keys
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._now = now
        self.board = Board()
        self.fleet = Fleet()
        self.problem: str | None = "has not read the log yet"
        self._bell = asyncio.Event()
        self._unread = True
        self._unanswered: dict[str, Worker] = {}
        self._strangers: dict[str, Heartbeat] = {}
        self._granted: dict[Attempt, tuple[float, Credit | None]] = {}
        self._resent: dict[Attempt, float] = {}
        self._evidence_since = clock()
        self._term: int | None = None
        self._led_since = float("-inf")
        self._last_turn = clock()
        self._connections = -1
        self._epoch: int | None = None
        self._epoch_checked = float("-inf")
        self._snapshot_at = 0
        self._pruned_at = clock()
        self._challenges = Challenges(clock())

    # --- what wakes the loop ---------------------------------------------------------------------------------------------------------

    async def watch_log(self) -> None:
        """Ring for every append, and now and then."""
        wakeup = self._log.wakeup(URGENT, LINGER)
        try:
            while True:
                await wakeup.wait(5.0)
                self.log_grew()
        finally:
            wakeup.close()

    def log_grew(self) -> None:
        """There may be something to read."""
        self._unread = True
        self._bell.set()

    async def listen(self) -> None:
        """Hear the workers. A heartbeat that its worker did not sign is nobody's."""
        async with self._bus.listen("presence.*") as messages:
            async for message in messages:
                self.hear(message.subject, message.data)

    def hear(self, subject: str, data: bytes) -> None:
        """Take note of one heartbeat, `presence.<worker>`."""
        name = subject.partition(".")[2]
        key = self._worker_keys.get(name)
        if key is None:
            logger.warning("a heartbeat of an unknown worker", worker=name)
            return
        try:
            heartbeat = _HEARTBEAT.decode(verify(key, "presence", _SIGNED.decode(data)))
        except (BadSignature, msgspec.MsgspecError) as error:
            logger.warning("a heartbeat that is not its worker's", worker=name, exc_info=error)
            return
        trusted = self._challenges.knows(heartbeat.challenge)
        worker = self.fleet.on_heartbeat(name, heartbeat, trusted, self._clock())
        if worker is not None:
            self._unanswered[name] = worker
            self._bell.set()
        elif (known := self.fleet.get(name)) is not None and known.heartbeat.boot != heartbeat.boot:
            self._strangers[name] = heartbeat
            self._bell.set()

    async def run(self) -> None:
        """Turn for ever."""
        while True:
            try:
                async with asyncio.timeout(TICK):
                    await self._bell.wait()
            except TimeoutError:
                pass
            self._bell.clear()
            try:
                await self.turn()
            except (LogUnavailable, BusUnavailable, UnknownEvent) as error:
                self.problem = f"{type(error).__name__}: {error}"
                self._evidence_since = self._clock()
                await asyncio.sleep(0.1)
                self._bell.set()

    # --- one turn ----------------------------------------------------------------------------------------------------------------------

    async def turn(self) -> None:
        """Read what is unread, and lead if this instance leads."""
        now = self._clock()
        if now - self._last_turn > STALL or self._connections != self._bus.connections or not self._bus.connected:
            self._evidence_since = now
            self._connections = self._bus.connections
        self._last_turn = now
        term = self._leadership.term
        if self._unread or term not in (None, self._term):
            await self._read()
        self.problem = None
        if term is None:
            self._term = None
            self._unanswered.clear()
            self._strangers.clear()
            self.board.news.clear()
            return
        if term != self._term:  # another may have led since
            self._term = term
            self._led_since = self._evidence_since = now
        await self._boot(term)
        await self._answer(term, now)
        await self._place(term, now)
        await self._expire(term, now)
        if self.board.position - self._snapshot_at >= SNAPSHOT_EVERY:
            self._snapshot_at = self.board.position
            await self._snapshots.save("scheduler-board", self.board.position, CODE_VERSION, self.board.snapshot())

    async def _read(self) -> None:
        """Fold everything up to the head of the log. It is unread again when this fails, when somebody appends, and when we do."""
        self._unread = False
        try:
            await self._fold()
        except BaseException:
            self._unread = True
            raise

    async def _fold(self) -> None:
        if self._clock() - self._epoch_checked > 5.0:
            epoch = await self._log.epoch()
            self._epoch_checked = self._clock()
            if epoch != self._epoch:
                stored = await self._snapshots.load("scheduler-board", CODE_VERSION) if self._epoch is None else None
                self.board = Board.restore(*stored) if stored else Board()
                self._snapshot_at = self.board.position
                self._epoch = epoch
        while True:
            rows = await self._log.read(self.board.position, BATCH, CATEGORIES)
            for row in rows:
                self.board.apply(fact(row))
            if not is_full(rows, BATCH):
                return

    async def _do(self, commands: Sequence[tuple[Command, Cause]]) -> list[bool]:
        """Execute commands together; whether each was accepted. What another instance decided first is no error."""
        self.log_grew()
        results = await asyncio.gather(*(self._commands.submit(*one) for one in commands), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Refused):
                raise result
        return [not isinstance(result, Refused) for result in results]

    async def _boot(self, term: int) -> None:
        """Record new boots; `_expire` then ends the leases of earlier ones."""
        commands: list[tuple[Command, Cause]] = []
        for worker in self._unanswered.values():
            heartbeat = worker.heartbeat
            if heartbeat.goodbye or self.board.boots.get(worker.name) == heartbeat.boot:
                continue
            boot = BootWorker(worker=worker.name, boot=heartbeat.boot, slots=heartbeat.slots, offers=heartbeat.offers, term=term)
            commands.append((boot, self._own_cause(heartbeat.boot)))
        if commands:
            await self._do(commands)
            await self._read()

    async def _answer(self, term: int, now: float) -> None:
        """Answer heartbeats with what their workers may hold, and pass on interruptions early."""
        for name, heartbeat in self._strangers.items():
            await self._send_control(name, Control(boot=heartbeat.boot, number=heartbeat.number, challenge=b"", lease_seconds=self._lease_seconds))
        self._strangers.clear()
        waiting, self._unanswered = self._unanswered, {}
        by_worker: dict[str, list[Lease]] = {}
        if waiting:
            for lease in self.board.leases.values():
                by_worker.setdefault(lease.worker, []).append(lease)
        for name, worker in waiting.items():
            heartbeat = worker.heartbeat
            leases = {lease.attempt: lease for lease in by_worker.get(name, []) if lease.boot == heartbeat.boot}
            held = [
                Held(own.attempt, own.recorded, own.interrupted) for running in heartbeat.running if (own := leases.get(running.attempt)) is not None
            ]
            control = Control(
                boot=heartbeat.boot,
                number=heartbeat.number,
                challenge=self._challenges.current(now),
                lease_seconds=self._lease_seconds,
                held=held,
                archived=await forgettable(self._log, heartbeat.logs, self.board.archived, self.board.leases),
            )
            await self._send_control(name, control)
            await self._chase(worker, leases.values(), term, now)
        told: set[Attempt] = set()
        while self.board.news:
            name, attempt = self.board.news.popleft()
            interrupted = self.board.leases.get(attempt)
            if interrupted is not None and attempt not in told:
                told.add(attempt)
                early = Held(attempt, interrupted.recorded, interrupted.interrupted)
                control = Control(
                    boot=interrupted.boot, number=0, challenge=self._challenges.current(now), lease_seconds=self._lease_seconds, held=[early]
                )
                await self._send_control(name, control)

    async def _send_control(self, worker: str, control: Control) -> None:
        await self._bus.send(f"control.{worker}", self._packer.control(worker, control))

    async def _chase(self, worker: Worker, leases: Iterable[Lease], term: int, now: float) -> None:
        """Send again the packages that a worker does not show, and end the leases that it cannot take any more."""
        expired: list[tuple[Command, Cause]] = []
        for lease in leases:
            if not unlisted(worker.heartbeat, lease.attempt):
                self._granted.pop(lease.attempt, None)
                continue
            granted, credit = self._granted.setdefault(lease.attempt, (now, None))
            if lease.recorded and now - granted > RESEND:
                expired.append(self._expiry(lease, f"worker {worker.name} gave it up", term))
            elif now - granted > CREDIT_LIFE + 1:
                expired.append(self._expiry(lease, f"worker {worker.name} never took it", term))
            elif credit is not None and now - self._resent.get(lease.attempt, granted) > RESEND:
                self._resent[lease.attempt] = now
                await self._send_package(lease.worker, await self._package(lease.queued, lease.worker, lease.boot, credit))
        if expired:
            await self._do(expired)

    async def _place(self, term: int, now: float) -> None:
        """Lease what can be placed, send the packages, and say why the rest cannot."""
        if not len(self.board.queue):
            return
        placement = place(self.board.queue, self.fleet.views(), self.board.running)
        if placement.assignments:
            await self._grant(placement.assignments, term, now)
        deferrals: list[tuple[Command, Cause]] = []
        unix = self._now()
        warm = now - self._led_since > WARM_UP
        for deferral in placement.deferrals if warm else ():
            for queued in self.board.queue.newest_first(deferral.group):
                if queued.deferred == deferral.reason or len(deferrals) >= BATCH:
                    break
                if unix - queued.queued_at < PATIENCE:
                    continue
                attempt = queued.attempt
                command = DeferStage(
                    build=attempt.build,
                    stage=attempt.stage,
                    attempt=attempt.number,
                    term=term,
                    reason=deferral.reason,
                    refused=deferral.refused,
                )
                deferrals.append((command, self._cause(queued)))
        if deferrals:
            await self._do(deferrals)

    async def _grant(self, assignments: Sequence[Assignment], term: int, now: float) -> None:
        """All that is leased is noted before anything is sent: what cannot be made or sent now is sent by `_chase`."""
        leasing = asyncio.ensure_future(self._do([(self._lease(a, term), self._cause(a.queued)) for a in assignments]))
        packages: list[bytes] = []
        try:
            for a in assignments:
                # Sealed while the leases are being recorded (which gets on at each of these), sent only when they are.
                await asyncio.sleep(0)
                packages.append(await self._package(a.queued, a.worker, a.boot, a.credit))
        finally:
            accepted = await leasing
            for assignment, ok in zip(assignments, accepted, strict=True):
                self.fleet.use(assignment.worker, assignment.credit)
                if ok:
                    self._granted[assignment.queued.attempt] = (now, assignment.credit)
        for assignment, package, ok in zip(assignments, packages, accepted, strict=True):
            if ok:
                await self._send_package(assignment.worker, package)

    async def _send_package(self, worker: str, package: bytes) -> None:
        """One that the bus does not carry never arrives: its lease expires, and builds gives the stage up in the end."""
        try:
            await self._bus.send(f"packages.{worker}", package)
        except TooLarge as error:
            logger.error("a package is too large for the bus", worker=worker, why=str(error))

    async def _package(self, queued: Queued, worker: str, boot: str, credit: Credit) -> bytes:
        return self._packer.package(queued, await self._stage(queued.attempt), worker, boot, credit)

    async def _stage(self, attempt: Attempt) -> Stage:
        """What the attempt runs: remembered, or from the build's stream."""
        plan = self.board.plans.get(attempt.build)
        if plan is None:
            history = (await self._log.read_streams([f"build-{attempt.build}"]))[f"build-{attempt.build}"]
            created = decode(history[0].type, history[0].data)
            assert isinstance(created, BuildCreated)
            plan = {stage.name: stage for stage in created.plan.stages}
        return plan[attempt.stage]

    async def _expire(self, term: int, now: float) -> None:
        """End the leases of workers that were not heard of for a whole lease, while this instance could have heard them; and of those that left."""
        lost: dict[str, str] = {}
        for worker in list(self.fleet):
            if worker.heartbeat.goodbye:
                lost[worker.name] = "drained"
            elif now - max(worker.heard, self._evidence_since) > self._lease_seconds:
                lost[worker.name] = "silent"
        commands: list[tuple[Command, Cause]] = []
        for lease in self.board.leases.values():
            granted, _ = self._granted.setdefault(lease.attempt, (now, None))
            heard = self.fleet.get(lease.worker)
            if self.board.boots.get(lease.worker, lease.boot) != lease.boot:
                commands.append(self._expiry(lease, f"worker {lease.worker} has restarted", term))
            elif lease.worker in lost:
                why = "has left" if lost[lease.worker] == "drained" else f"was silent for {self._lease_seconds:g} s"
                commands.append(self._expiry(lease, f"worker {lease.worker} {why}", term))
            elif heard is None and now - max(granted, self._evidence_since) > self._lease_seconds:
                commands.append(self._expiry(lease, f"worker {lease.worker} was silent for {self._lease_seconds:g} s", term))
        for name, reason in lost.items():
            boot = self.board.boots.get(name)
            if boot is not None:
                commands.append((LoseWorker(worker=name, boot=boot, reason=reason, term=term), self._own_cause(boot)))
        for name, boot in self.board.boots.items():
            if self.fleet.get(name) is None and name not in lost and now - self._evidence_since > self._lease_seconds:
                commands.append((LoseWorker(worker=name, boot=boot, reason="silent", term=term), self._own_cause(boot)))
        if commands:
            await self._do(commands)
        for name in lost:
            self.fleet.remove(name)
        if now - self._pruned_at > PRUNE_EVERY:
            self._pruned_at = now
            for attempt in [a for a in self._granted if a not in self.board.leases]:
                del self._granted[attempt]
            for attempt in [a for a in self._resent if a not in self._granted]:
                del self._resent[attempt]

    def _lease(self, assignment: Assignment, term: int) -> LeaseStage:
        attempt = assignment.queued.attempt
        return LeaseStage(
            build=attempt.build,
            stage=attempt.stage,
            attempt=attempt.number,
            term=term,
            worker=assignment.worker,
            boot=assignment.boot,
            credit=assignment.credit.nonce,
            lease_seconds=self._lease_seconds,
            why=assignment.why,
            refused=assignment.refused,
        )

    def _expiry(self, lease: Lease, evidence: str, term: int) -> tuple[Command, Cause]:
        attempt = lease.attempt
        command = ExpireLease(build=attempt.build, stage=attempt.stage, attempt=attempt.number, worker=lease.worker, evidence=evidence, term=term)
        return command, self._cause(lease.queued)

    @staticmethod
    def _cause(queued: Queued) -> Cause:
        return Cause(team=queued.team, correlation_id=queued.correlation_id, causation_id=queued.event_id, actor="scheduler")

    @staticmethod
    def _own_cause(boot: str) -> Cause:
        return Cause(team="system", correlation_id=boot, causation_id=boot, actor="scheduler")
