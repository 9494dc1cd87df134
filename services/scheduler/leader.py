"""The scheduler's loop: read the log, hear the workers; whoever leads also answers them, places what waits and expires what is lost.

Every instance reads and listens, so that a takeover starts warm. One loop does it all in turn: what a turn appends, the next one has read.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from libs.bus.bus import Bus, BusUnavailable, TooLarge
from libs.eventlog.log import EventLog, LogUnavailable
from libs.eventlog.projections import Unprojectable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from proto.catalogue import UnknownEvent
from proto.messages import Attempt, Control, Credit, Held, StagesWait
from services.scheduler.board import Board, Lease
from services.scheduler.commands import BootWorker, Command, DeferStage, ExpireLease, LeaseStage, LoseWorker
from services.scheduler.decider import State
from services.scheduler.expiry import ends
from services.scheduler.fleet import Worker, unlisted
from services.scheduler.grants import Grants
from services.scheduler.packages import Packer
from services.scheduler.placement import Assignment, explain, place
from services.scheduler.presence import Presence
from services.scheduler.queue import Queued
from services.scheduler.reader import Reader, Snapshots
from services.scheduler.secret_index import SecretIndex
from services.scheduler.spooled import forgettable
from services.scheduler.vault import Vault
from services.scheduler.waiting import waits

logger = structlog.get_logger()

TICK = 0.5
"""Seconds between two looks at the clock when nothing happens, for who leads."""
CANDIDATE_TICK = 0.25
"""For who does not: as soon, at most, an election is noticed."""
STALL = 2.0
"""A gap between two turns (seconds) after which this process was stopped, and what it did not hear proves nothing."""
PATIENCE = 1.0
"""Seconds that an attempt waits before it is said why."""
WARM_UP = 2.5
"""Seconds of leading before "no worker" means anything."""
BATCH = 5_000
"""Attempts told at once why they wait."""
RECENT = 3.0
"""Seconds within which a worker was heard that is told of a new leader."""
LOOK_AROUND = 0.5
"""Seconds between two looks for workers that are silent."""
PRUNE_EVERY = 60.0
CUT_SECONDS, CUT_EVERY = 10.0, 1.0
"""How long, and how often, the connections of one that was expelled are looked for: another instance may admit it until it has read as much."""
KNOWS_SECONDS = 15.0
"""So long after the log was last read it is still known who may work here; it is read every 5 s, if nothing happens."""
URGENT = frozenset({"build", "fleet"})
"""What must be read at once: attempts to place, and their ends; who may be a worker. What became of leases and workers is mostly our own doing."""
LINGER = 0.1
SENDING = 3
"""Turns of the event loop after which an append that was asked for is on its way to the database."""


class Door(Protocol):
    """What ends connections to the bus: `cut` those of a worker and its key, `sweep` those of all who are no workers."""

    def cut(self, worker: str, key: str) -> None: ...

    def sweep(self) -> None: ...


class Leading(Protocol):
    """Leadership: the term while it lasts, None otherwise."""

    @property
    def term(self) -> int | None: ...


class Scheduler:
    """`clock` is monotonic seconds, `now` unix seconds."""

    def __init__(
        self,
        *,
        log: EventLog,
        bus: Bus,
        commands: CommandLoop[Command, State],
        leadership: Leading,
        snapshots: Snapshots,
        packer: Packer,
        vault: Vault,
        door: Door,
        lease_seconds: float,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._log = log
        self._bus = bus
        self._commands = commands
        self._leadership = leadership
        self._reader = Reader(log, snapshots, clock)
        self._packer = packer
        self._vault = vault
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._now = now
        self._presence = Presence(lambda: self._board.roster, clock)
        self._fleet = self._presence.fleet
        self._door = door
        self._expelled: dict[tuple[str, str], tuple[float, float]] = {}
        """(worker, key): until when it is looked for, and when next."""
        self._grants = Grants()
        self.problem: str | None = "has not read the log yet"
        self.stuck: Unprojectable | None = None
        """The event that the board cannot take."""
        self._bell = asyncio.Event()
        self._listening_since = clock()
        self._term: int | None = None
        self._led_since = float("-inf")
        self._last_turn = clock()
        self._connections = -1
        self._looked_around = float("-inf")
        self._pruned_at = clock()

    @property
    def _board(self) -> Board:
        return self._reader.board

    @property
    def secret_index(self) -> SecretIndex:
        """Which secrets there are, as far as this instance has read."""
        return self._board.secrets

    @property
    def log_time(self) -> float:
        """By the log's own clock (unix seconds)."""
        return self._board.now

    def key_of(self, worker: str) -> str | None:
        """The public key of one that may work here, as far as this instance has read."""
        member = self._board.roster.get(worker)
        return member.key if member else None

    @property
    def refused(self) -> int:
        """How many heartbeats were nobody's."""
        return self._presence.refused

    def knows(self) -> bool:
        """Whether it has read the log lately: who may work here may have changed since."""
        return self._clock() - self._reader.read_at <= KNOWS_SECONDS

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
        self._reader.unread = True
        self._bell.set()

    async def listen(self) -> None:
        """Hear the workers."""
        async with self._bus.listen("presence.*") as messages:
            async for message in messages:
                self.hear(message.subject, message.data)

    def hear(self, subject: str, data: bytes) -> None:
        """Take note of one heartbeat, once it is known whose it may be."""
        if self._reader.whole and self._presence.hear(subject, data):
            self._bell.set()

    def waits(self, attempts: Sequence[Attempt]) -> StagesWait:
        """Why these wait, as of the last turn. Every instance knows, leading or not. Raises LogUnavailable while this one does not."""
        if self.problem is not None:
            raise LogUnavailable(self.problem)
        return waits(attempts, self._board, self._fleet.pool)

    async def run(self) -> None:
        """Turn for ever."""
        while True:
            try:
                async with asyncio.timeout(TICK if self._term else CANDIDATE_TICK):
                    await self._bell.wait()
            except TimeoutError:
                pass
            self._bell.clear()
            try:
                await self.turn()
            except (LogUnavailable, BusUnavailable, UnknownEvent) as error:
                self.problem = f"{type(error).__name__}: {error}"
                self._listening_since = self._clock()
                await asyncio.sleep(0.1)
                self._bell.set()

    # --- one turn ----------------------------------------------------------------------------------------------------------------------

    async def turn(self) -> None:
        """Read what is unread, and lead if this instance leads."""
        now = self._clock()
        if now - self._last_turn > STALL or self._connections != self._bus.connections or not self._bus.connected:
            self._listening_since = now
            self._connections = self._bus.connections
        self._last_turn = now
        term = self._leadership.term
        if self._reader.unread or term not in (None, self._term):
            await self._read()
        self.problem = None
        self._enforce(now)
        if term not in (None, self._term):
            self._presence.forget_followed()
        heard, strangers = self._presence.take_heard(), self._presence.take_strangers()
        if term is None:
            self._term = None
            self._board.news.clear()
            self._presence.forget_silent(self._lease_seconds)
            return
        if term != self._term:  # another may have led since
            self._term = term
            self._led_since = self._listening_since = now
            heard = self._presence.recent(RECENT) | heard  # told at once whom to quote, rather than at their next heartbeat
            self._door.sweep()
        if self.stuck is not None:  # leases are renewed; to give or end any would rest on half of the truth
            for worker in heard.values():
                await self._answer(worker, now)
            await self._interrupt(now)
            return
        try:
            await self._boot(heard, term)
        except LogUnavailable:
            self._presence.keep_heard(heard)  # a boot that is not recorded yet gets nothing before it is
            raise
        for name, heartbeat in strangers.items():
            await self._send_control(name, Control(boot=heartbeat.boot, number=heartbeat.number, challenge=b"", lease_seconds=self._lease_seconds))
        for worker in heard.values():
            if self._fleet.get(worker.name) is worker:
                await self._answer(worker, now)
                await self._chase(worker, term, now)
        await self._interrupt(now)
        await self._place(term, now)
        await self._explain(term, now)
        await self._expire(heard, term, now)
        await self._reader.save()

    async def _read(self) -> None:
        """Whoever may not work here any more is not there from then on: the very turn that reads of it gives it nothing."""
        try:
            await self._reader.read()
        except Unprojectable as error:
            if str(error) != str(self.stuck):
                logger.error("the board stands still: what is leased goes on, and nothing else is", why=str(error), exc_info=error.__cause__)
            self.stuck = error
            self._reader.unread = False  # until something is appended, or the next time that the log is looked at anyway
        else:
            self.stuck = None
        for name, key in self._board.roster.news:
            if key and self.key_of(name) != key:
                self._presence.dismiss(name)

    def _enforce(self, now: float) -> None:
        """Let nobody work who may not, whoever leads: their connections are cut. `_expire` ends the leases."""
        roster = self._board.roster
        while roster.news:
            name, key = roster.news.popleft()
            self._fleet.drain(name, roster.draining(name))
            if key and self.key_of(name) != key:
                self._expelled[name, key] = now + CUT_SECONDS, now
                self._looked_around = float("-inf")
        for (name, key), (until, due) in list(self._expelled.items()):
            if now >= until or self.key_of(name) == key:
                del self._expelled[name, key]
            elif now >= due:
                self._expelled[name, key] = until, now + CUT_EVERY
                self._door.cut(name, key)

    async def _do(self, commands: Sequence[tuple[Command, Cause]]) -> list[bool]:
        """Execute commands together; whether each was accepted. What another instance decided first is no error."""
        self.log_grew()
        results = await asyncio.gather(*(self._commands.submit(*one) for one in commands), return_exceptions=True)
        for result in results:
            if isinstance(result, LogUnavailable) or (isinstance(result, BaseException) and not isinstance(result, Exception)):
                raise result
            if isinstance(result, Exception) and not isinstance(result, Refused):  # of one stream: the others go on
                logger.error("a command failed", exc_info=result)
        return [not isinstance(result, Exception) for result in results]

    async def _boot(self, heard: Mapping[str, Worker], term: int) -> None:
        """Record new boots; `_expire` then ends the leases of earlier ones."""
        commands: list[tuple[Command, Cause]] = []
        for worker in heard.values():
            heartbeat = worker.heartbeat
            if heartbeat.goodbye or self._board.boots.get(worker.name) == heartbeat.boot:
                continue
            boot = BootWorker(
                worker=worker.name,
                boot=heartbeat.boot,
                since=heartbeat.since,
                slots=heartbeat.slots,
                offers=heartbeat.availability.offers,
                about=heartbeat.about,
                term=term,
            )
            commands.append((boot, self._own_cause(heartbeat.boot)))
        if commands:
            await self._do(commands)
            await self._read()
            self._presence.forget_followed()

    async def _answer(self, worker: Worker, now: float) -> None:
        """Answer a heartbeat with what its worker may hold."""
        heartbeat = worker.heartbeat
        leases = self._board.held.get(worker.name, {})
        held = [
            Held(running.attempt, own.recorded, own.interrupted)
            for running in heartbeat.running
            if (own := leases.get(running.attempt)) is not None and own.boot == heartbeat.boot
        ]
        control = Control(
            boot=heartbeat.boot,
            number=heartbeat.number,
            challenge=self._presence.challenges.current(now),
            lease_seconds=self._lease_seconds,
            held=held,
            archived=await forgettable(self._log, heartbeat.logs, self._board.archived, self._board.leases),
            drain=self._board.roster.draining(worker.name),
        )
        await self._send_control(worker.name, control)

    async def _interrupt(self, now: float) -> None:
        """Pass on interruptions early."""
        told: set[Attempt] = set()
        while self._board.news:
            name, attempt = self._board.news.popleft()
            lease = self._board.leases.get(attempt)
            if lease is not None and attempt not in told:
                told.add(attempt)
                early = Held(attempt, lease.recorded, lease.interrupted)
                challenge = self._presence.challenges.current(now)
                control = Control(boot=lease.boot, number=0, challenge=challenge, lease_seconds=self._lease_seconds, held=[early])
                await self._send_control(name, control)

    async def _send_control(self, worker: str, control: Control) -> None:
        """Whoever asks for more than one answer can hold gets none."""
        try:
            await self._bus.send(f"control.{worker}", self._packer.control(worker, control))
        except TooLarge as error:
            logger.error("the answer to a heartbeat is too large for the bus", worker=worker, why=str(error))

    async def _chase(self, worker: Worker, term: int, now: float) -> None:
        """Send again the packages that a worker does not show, and end the leases that it cannot take any more."""
        expired: list[tuple[Command, Cause]] = []
        for lease in list(self._board.held.get(worker.name, {}).values()):
            if lease.boot != worker.heartbeat.boot:
                continue
            if not unlisted(worker.heartbeat, lease.attempt):
                self._grants.shown(lease.attempt, now)
            elif evidence := self._grants.given_up(lease, now):
                expired.append(self._expiry(lease, evidence, term))
            elif (credit := self._grants.to_send_again(lease.attempt, now)) is not None:
                await self._send_package(lease.worker, await self._package(lease.queued, lease.worker, lease.boot, credit))
        if expired:
            await self._do(expired)

    async def _place(self, term: int, now: float) -> None:
        """Lease what can be placed, and send the packages."""
        assignments = place(self._board.queue, self._fleet.pool, self._board.now)
        if assignments:
            await self._grant(assignments, term, now)
        if self._board.queue.awake:
            self._bell.set()

    async def _explain(self, term: int, now: float) -> None:
        """Say why the rest cannot be placed."""
        if now - self._led_since <= WARM_UP:
            return
        deferrals = explain(self._board.queue, self._fleet.pool, self._now() - PATIENCE, BATCH)
        commands: list[tuple[Command, Cause]] = []
        for deferral in deferrals:
            attempt = deferral.queued.attempt
            command = DeferStage(
                build=attempt.build,
                stage=attempt.stage,
                attempt=attempt.number,
                term=term,
                reason=deferral.reason,
                refused=deferral.refused,
            )
            commands.append((command, self._cause(deferral.queued)))
        if commands:
            await self._do(commands)

    async def _grant(self, assignments: Sequence[Assignment], term: int, now: float) -> None:
        """All that is leased is noted before anything is sent: what cannot be made or sent now is sent by `_chase`."""
        stages = [await self._reader.stage(a.queued.attempt) for a in assignments]
        wanted = [self._board.secrets.wanted(a.queued.team, a.queued.attempt.build, stage) for a, stage in zip(assignments, stages, strict=True)]
        leases = [(self._lease(a, term, w.versions), self._cause(a.queued)) for a, w in zip(assignments, wanted, strict=True)]
        leasing = asyncio.ensure_future(self._do(leases))
        packages: list[bytes | None] = []
        try:
            for _ in range(SENDING):
                await asyncio.sleep(0)
            for a, stage, w in zip(assignments, stages, wanted, strict=True):
                # Sealed while the leases are being recorded (which gets on at each of these), sent only when they are.
                await asyncio.sleep(0)
                given = await self._vault.given(w)
                packages.append(self._packer.package(a.queued, stage, given, a.worker, self.key_of(a.worker) or "", a.boot, a.credit))
        finally:
            accepted = await leasing
            for assignment, ok in zip(assignments, accepted, strict=True):
                self._fleet.use(assignment.worker, assignment.credit)
                if ok:
                    self._grants.note(assignment.queued.attempt, assignment.credit, now)
        for assignment, package, ok in zip(assignments, packages, accepted, strict=True):
            if ok:
                await self._send_package(assignment.worker, package)

    async def _send_package(self, worker: str, package: bytes | None) -> None:
        """One that the bus does not carry, or that cannot be sealed, never arrives: its lease expires, and builds gives the stage up in the end."""
        if package is None:
            logger.error("nothing can be sealed to a worker's credit", worker=worker)
            return
        try:
            await self._bus.send(f"execute_build_package.{worker}", package)
        except TooLarge as error:
            logger.error("a package is too large for the bus", worker=worker, why=str(error))

    async def _package(self, queued: Queued, worker: str, boot: str, credit: Credit) -> bytes | None:
        """Made again; with the secrets as they are now."""
        stage = await self._reader.stage(queued.attempt)
        given = await self._vault.given(self._board.secrets.wanted(queued.team, queued.attempt.build, stage))
        return self._packer.package(queued, stage, given, worker, self.key_of(worker) or "", boot, credit)

    async def _expire(self, heard: Mapping[str, Worker], term: int, now: float) -> None:
        """End the leases of workers that are lost: of those just heard by their own word, of the others by their silence, which can wait a little."""
        names: set[str] = set(heard)
        if now - self._looked_around >= LOOK_AROUND:
            self._looked_around = now
            names.update(self._board.held, self._board.boots, (worker.name for worker in self._fleet))
        over = ends(names, self._board, self._fleet, self._grants, now=now, listening_since=self._listening_since, lease_seconds=self._lease_seconds)
        commands = [self._expiry(lease, evidence, term) for lease, evidence in over.leases]
        for name, reason in over.workers:
            boot = self._board.boots.get(name)
            if boot is not None:
                commands.append((LoseWorker(worker=name, boot=boot, reason=reason, term=term), self._own_cause(boot)))
        if commands:
            await self._do(commands)
        for name, _ in over.workers:
            self._fleet.remove(name)
        if now - self._pruned_at > PRUNE_EVERY:
            self._pruned_at = now
            self._grants.forget_all_but(self._board.leases)

    def _lease(self, assignment: Assignment, term: int, secrets: dict[str, int]) -> LeaseStage:
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
            secrets=secrets,
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
