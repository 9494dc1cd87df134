"""Leases, given and ended: what waits is placed, packages are sent until they are shown, and what nobody can be running any more expires."""

import asyncio
from collections.abc import Callable, Collection, Sequence

import msgspec
import structlog

from libs.bus.bus import Bus, TooLarge
from libs.runtime.decisions import Cause
from proto.messages import Credit
from proto.plan import Stage
from services.scheduler.board import Board, Lease
from services.scheduler.commands import Command, DeferStage, ExpireLease, LeaseStage, LoseWorker
from services.scheduler.expiry import ends
from services.scheduler.fleet import Fleet, Worker, unlisted
from services.scheduler.grants import Grants
from services.scheduler.orders import Orders, for_attempt, for_boot
from services.scheduler.packages import Packer
from services.scheduler.placement import Assignment, Deferral, explain, place
from services.scheduler.queue import Queued
from services.scheduler.reader import NoStage, Reader
from services.scheduler.secret_index import Wanted
from services.scheduler.vault import Vault

logger = structlog.get_logger()

PATIENCE = 1.0
"""Seconds that an attempt waits before it is said why."""
WARM_UP = 2.5
"""Seconds of leading before "no worker" means anything."""
BATCH = 5_000
"""Attempts told at once why they wait."""
LOOK_AROUND = 0.5
"""Seconds between two looks for workers that are silent."""
PRUNE_EVERY = 60.0
SENDING = 3
"""Turns of the event loop after which an append that was asked for is on its way to the database."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn of whoever leads: its term; now, since when it leads, and since when it could hear all that was said (monotonic seconds)."""

    term: int
    now: float
    led_since: float
    listening_since: float


class Lessor:
    """`now` is unix seconds. All calls raise LogUnavailable and BusUnavailable; what was not done then is done in a later turn."""

    def __init__(
        self, *, bus: Bus, orders: Orders, reader: Reader, fleet: Fleet, packer: Packer, vault: Vault, lease_seconds: float, now: Callable[[], float]
    ) -> None:
        self._bus = bus
        self._orders = orders
        self._reader = reader
        self._fleet = fleet
        self._packer = packer
        self._vault = vault
        self._lease_seconds = lease_seconds
        self._now = now
        self._grants = Grants()
        self._looked_around = self._pruned_at = float("-inf")

    @property
    def _board(self) -> Board:
        return self._reader.board

    # --- given

    async def place(self, turn: Turn) -> bool:
        """Lease what can be placed, and send the packages. Whether there is more that might be placed at once."""
        assignments = place(self._board.queue, self._fleet.pool, self._board.now)
        if assignments:
            await self._grant(assignments, turn)
        return bool(self._board.queue.awake)

    async def _grant(self, assignments: Sequence[Assignment], turn: Turn) -> None:
        """All is noted before it is leased, which may have happened although nobody said so: what cannot be made or sent now is sent by `chase`."""
        ready = [(a, stage, self._wanted(a.queued, stage)) for a in assignments if (stage := await self._stage(a.queued)) is not None]
        leases = [(self._lease(a, turn.term, wanted.versions), for_attempt(a.queued)) for a, _, wanted in ready]
        for a, _, _ in ready:
            self._fleet.use(a.worker, a.credit)
            self._grants.note(a.queued.attempt, a.credit, turn.now)
        leasing = asyncio.ensure_future(self._orders.give(leases))
        packages: list[bytes | None] = []
        try:
            for _ in range(SENDING):
                await asyncio.sleep(0)
            for a, stage, wanted in ready:
                # Sealed while the leases are being recorded (which gets on at each of these), sent only when they are.
                await asyncio.sleep(0)
                packages.append(await self._package(a.queued, stage, wanted, a.worker, a.boot, a.credit))
        finally:
            accepted = await leasing
            for (a, _, _), ok in zip(ready, accepted, strict=True):
                if not ok:
                    self._grants.forget(a.queued.attempt)
        for (a, _, _), package, ok in zip(ready, packages, accepted, strict=True):
            if ok:
                await self._send(a.worker, package)

    async def _stage(self, queued: Queued) -> Stage | None:
        """What it runs. One of which that cannot be read waits, and no other for it."""
        try:
            return await self._reader.stage(queued.attempt)
        except NoStage as error:
            logger.error("an attempt cannot run, for its plan cannot be read", attempt=queued.attempt, why=str(error))
            self._board.queue.set_aside(queued.attempt)
            return None

    def _wanted(self, queued: Queued, stage: Stage) -> Wanted:
        return self._board.secrets.wanted(queued.team, queued.attempt.build, stage)

    async def chase(self, worker: Worker, turn: Turn) -> None:
        """Send again the packages that a worker does not show, and end the leases that it cannot take any more."""
        expired: list[tuple[Command, Cause]] = []
        for lease in list(self._board.held.get(worker.name, {}).values()):
            if lease.boot != worker.heartbeat.boot:
                continue
            if not unlisted(worker.heartbeat, lease.attempt):
                self._grants.shown(lease.attempt, turn.now)
            elif evidence := self._grants.given_up(lease, turn.now, turn.listening_since):
                expired.append(_expiry(lease, evidence, turn.term))
            elif (credit := self._grants.to_send_again(lease.attempt, turn.now)) and (stage := await self._stage(lease.queued)):
                wanted = self._wanted(lease.queued, stage)  # the secrets as they are now
                await self._send(lease.worker, await self._package(lease.queued, stage, wanted, lease.worker, lease.boot, credit))
        await self._orders.give(expired)

    async def _package(self, queued: Queued, stage: Stage, wanted: Wanted, worker: str, boot: str, credit: Credit) -> bytes | None:
        given, key = await self._vault.given(wanted), self._board.roster.key_of(worker) or ""
        package = self._packer.package(queued, stage, given, worker, key, boot, credit)
        if package is None:
            logger.error("nothing can be sealed to a worker's credit", worker=worker)
        return package

    async def _send(self, worker: str, package: bytes | None) -> None:
        """One that the bus does not carry, or that cannot be sealed, never arrives: its lease expires, and builds gives the stage up in the end."""
        try:
            if package is not None:
                await self._bus.send(f"execute_build_package.{worker}", package)
        except TooLarge as error:
            logger.error("a package is too large for the bus", worker=worker, why=str(error))

    # --- not given

    async def explain(self, turn: Turn) -> None:
        """Say why the rest cannot be placed."""
        if turn.now - turn.led_since <= WARM_UP:
            return
        deferrals = explain(self._board.queue, self._fleet.pool, self._now() - PATIENCE, BATCH)
        await self._orders.give([_deferral(one, turn.term) for one in deferrals])

    # --- ended

    async def expire(self, names: Collection[str], turn: Turn) -> None:
        """End the leases of workers that are lost, and those workers: of `names` at once, of the others, whose silence is all there is to see, now
        and then."""
        looked_at = set(names)
        if turn.now - self._looked_around >= LOOK_AROUND:
            self._looked_around = turn.now
            looked_at.update(self._board.held, self._board.boots, (worker.name for worker in self._fleet))
        over = ends(
            looked_at,
            self._board,
            self._fleet,
            self._grants,
            now=turn.now,
            listening_since=turn.listening_since,
            lease_seconds=self._lease_seconds,
        )
        commands = [_expiry(lease, evidence, turn.term) for lease, evidence in over.leases]
        for name, reason in over.workers:
            boot = self._board.boots.get(name)
            if boot is not None:
                commands.append((LoseWorker(worker=name, boot=boot, reason=reason, term=turn.term), for_boot(boot)))
        await self._orders.give(commands)
        for name, _ in over.workers:
            self._fleet.remove(name)
        if turn.now - self._pruned_at > PRUNE_EVERY:
            self._pruned_at = turn.now
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


def _expiry(lease: Lease, evidence: str, term: int) -> tuple[Command, Cause]:
    attempt = lease.attempt
    command = ExpireLease(build=attempt.build, stage=attempt.stage, attempt=attempt.number, worker=lease.worker, evidence=evidence, term=term)
    return command, for_attempt(lease.queued)


def _deferral(deferral: Deferral, term: int) -> tuple[Command, Cause]:
    attempt = deferral.queued.attempt
    command = DeferStage(
        build=attempt.build, stage=attempt.stage, attempt=attempt.number, term=term, reason=deferral.reason, refused=deferral.refused
    )
    return command, for_attempt(deferral.queued)
