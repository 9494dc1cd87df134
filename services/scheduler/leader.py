"""What whoever leads does in a turn, beside what every instance does: it answers the workers, and sees to their boots and leases."""

from collections.abc import Collection

import structlog

from libs.bus.bus import Bus, TooLarge
from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.decisions import Cause
from proto.messages import Attempt, Control, Heartbeat, Held
from services.scheduler.board import Board
from services.scheduler.commands import BootWorker, Command
from services.scheduler.fleet import Worker
from services.scheduler.lessor import Lessor, Turn
from services.scheduler.orders import Orders, for_boot
from services.scheduler.packages import Packer
from services.scheduler.presence import Presence
from services.scheduler.reader import Reader
from services.scheduler.spooled import forgettable

logger = structlog.get_logger()


class Leader:
    """All that it knows is the reader's and the presence's: whoever led before, and whoever is next, does the same."""

    def __init__(
        self, *, log: EventLog, bus: Bus, orders: Orders, reader: Reader, presence: Presence, packer: Packer, lessor: Lessor, lease_seconds: float
    ) -> None:
        self._log = log
        self._bus = bus
        self._orders = orders
        self._reader = reader
        self._presence = presence
        self._packer = packer
        self._lessor = lessor
        self._lease_seconds = lease_seconds

    @property
    def _board(self) -> Board:
        return self._reader.board

    async def lead(self, turn: Turn, heard: dict[str, Worker], strangers: dict[str, Heartbeat], expelled: Collection[str]) -> bool:
        """Whether there is more to do at once. `heard` wait for an answer, `strangers` for the word that another follows them; of those that were
        `expelled` the leases end now. Raises LogUnavailable, BusUnavailable: what was not done is done in a later turn."""
        if self._reader.stuck is None:
            await self._boot(heard, turn.term)
        if self._reader.stuck is not None:  # perhaps since that read on; leases are renewed; to give or end any would rest on half of the truth
            for worker in heard.values():
                if self._presence.fleet.get(worker.name) is worker:
                    await self._answer(worker, turn.now)
            await self._interrupt(turn.now)
            return False
        for name, heartbeat in strangers.items():
            await self._send(name, Control(boot=heartbeat.boot, number=heartbeat.number, challenge=b"", lease_seconds=self._lease_seconds))
        for worker in heard.values():
            if self._presence.fleet.get(worker.name) is worker:
                await self._answer(worker, turn.now)
                await self._lessor.chase(worker, turn)
        await self._interrupt(turn.now)
        more = await self._lessor.place(turn)
        await self._lessor.explain(turn)
        await self._lessor.expire({*heard, *expelled}, turn)
        await self._reader.save()
        return more

    async def _boot(self, heard: dict[str, Worker], term: int) -> None:
        """Record new boots; then the leases of earlier ones end. One that is not recorded yet gets nothing before it is."""
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
            commands.append((boot, for_boot(heartbeat.boot)))
        if not commands:
            return
        try:
            await self._orders.give(commands)
            await self._reader.read()
        except LogUnavailable:
            self._presence.keep_heard(heard)
            raise
        self._presence.forget_expelled()
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
        await self._send(worker.name, control)

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
                await self._send(name, Control(boot=lease.boot, number=0, challenge=challenge, lease_seconds=self._lease_seconds, held=[early]))

    async def _send(self, worker: str, control: Control) -> None:
        """Whoever asks for more than one answer can hold gets none."""
        try:
            await self._bus.send(f"control.{worker}", self._packer.control(worker, control))
        except TooLarge as error:
            logger.error("the answer to a heartbeat is too large for the bus", worker=worker, why=str(error))
