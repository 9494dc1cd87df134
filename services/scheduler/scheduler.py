"""The scheduler's loop: read the log, hear the workers, and lead if this instance leads.

Every instance reads and listens, so that a takeover starts warm. One loop does it all in turn: what a turn appends, the next one has read.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from libs.bus.bus import Bus, BusUnavailable
from libs.eventlog.log import EventLog, LogUnavailable
from libs.eventlog.projections import Unprojectable
from libs.runtime.commands import CommandLoop
from proto.messages import Attempt, StagesWait
from services.scheduler.board import Board
from services.scheduler.commands import Command
from services.scheduler.decider import State
from services.scheduler.expelled import KNOWS_SECONDS, Door, Expelled
from services.scheduler.fleet import Fleet
from services.scheduler.leader import Leader
from services.scheduler.lessor import Lessor, Turn
from services.scheduler.orders import Orders
from services.scheduler.packages import Packer
from services.scheduler.presence import Presence
from services.scheduler.reader import Reader, Snapshots
from services.scheduler.vault import Vault
from services.scheduler.waiting import waits

TICK = 0.5
"""Seconds between two looks at the clock when nothing happens, for who leads."""
CANDIDATE_TICK = 0.25
"""For who does not: as soon, at most, an election is noticed."""
STALL = 2.0
"""A gap between two turns (seconds) after which this process was stopped, and what it did not hear proves nothing."""
RECENT = 3.0
"""Seconds within which a worker was heard that is told of a new leader."""
URGENT = frozenset({"build", "fleet"})
"""What must be read at once: attempts to place, and their ends; who may be a worker. What became of leases and workers is mostly our own doing."""
LINGER = 0.1


class Leading(Protocol):
    """Leadership: the term while it lasts, None otherwise."""

    @property
    def term(self) -> int | None: ...


class Scheduler:
    """`clock` is monotonic seconds, `now` unix seconds. `problem`: why it knows nothing now."""

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
        self._leadership = leadership
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._door = door
        self._expelled = Expelled(door)
        self._reader = reader = Reader(log, snapshots, clock)
        self._presence = presence = Presence(lambda: self.board.roster, clock)
        orders = Orders(commands, self.log_grew)
        lessor = Lessor(bus=bus, orders=orders, reader=reader, fleet=presence.fleet, packer=packer, vault=vault, lease_seconds=lease_seconds, now=now)
        self._leader = Leader(
            log=log, bus=bus, orders=orders, reader=reader, presence=presence, packer=packer, lessor=lessor, lease_seconds=lease_seconds
        )
        self.problem: str | None = "has not read the log yet"
        self._bell = asyncio.Event()
        self._bell.set()  # there is the log to read
        self._term: int | None = None
        self._led_since = float("-inf")
        self._listening_since = self._last_turn = clock()
        self._connections = -1

    # --- what it knows, leading or not ---------------------------------------------------------------------------------------------------

    @property
    def board(self) -> Board:
        """The log, as far as this instance has read it."""
        return self._reader.board

    @property
    def fleet(self) -> Fleet:
        """The workers, as this instance hears them."""
        return self._presence.fleet

    @property
    def stuck(self) -> Unprojectable | None:
        """The event that the board cannot take."""
        return self._reader.stuck

    @property
    def refused(self) -> int:
        """How many heartbeats were nobody's."""
        return self._presence.refused

    def knows(self) -> bool:
        """Whether it has read the log lately: who may work here may have changed since."""
        return self._clock() - self._reader.read_at <= KNOWS_SECONDS

    def key_of(self, worker: str) -> str | None:
        """The public key of one that may work here."""
        return self.board.roster.key_of(worker)

    def waits(self, attempts: Sequence[Attempt]) -> StagesWait:
        """Why these wait, as of the last turn. Raises LogUnavailable while this instance does not know."""
        if self.problem is not None:
            raise LogUnavailable(self.problem)
        return waits(attempts, self.board, self.fleet.pool)

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

    # --- the loop ----------------------------------------------------------------------------------------------------------------------

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
            except (LogUnavailable, BusUnavailable) as error:
                self.fail(error)
                await asyncio.sleep(0.1)
                self._bell.set()

    def fail(self, error: Exception) -> None:
        """Take note of a turn that came to nothing, or to its half: this instance goes on with what it knows."""
        self.problem = f"{type(error).__name__}: {error}"
        self._listening_since = self._clock()

    async def turn(self) -> None:
        """Read what is unread, and lead if this instance leads. Raises LogUnavailable, BusUnavailable."""
        now = self._clock()
        if now - self._last_turn > STALL or self._connections != self._bus.connections or not self._bus.connected:
            self._listening_since = now
            self._connections = self._bus.connections
        self._last_turn = now
        term = self._leadership.term
        elected = term not in (None, self._term)
        if self._reader.unread or elected:
            knew = self.knows()
            await self._reader.read()
            self._presence.forget_expelled()
            if not knew:
                self._door.look()
        self.problem = None
        self._enforce(now)
        if elected:
            self._presence.forget_followed()
        heard, strangers = self._presence.take_heard(), self._presence.take_strangers()
        if term is None:
            self._term = None
            self.board.news.clear()
            self._presence.forget_silent(self._lease_seconds)
            return
        if elected:  # another may have led since
            self._term = term
            self._led_since = self._listening_since = now
            heard = self._presence.recent(RECENT) | heard  # told at once whom to quote, rather than at their next heartbeat
            self._door.sweep()
            self.board.queue.bring_back()
        turn = Turn(term=term, now=now, led_since=self._led_since, listening_since=self._listening_since)
        if await self._leader.lead(turn, heard, strangers, self._expelled.names):
            self._bell.set()

    def _enforce(self, now: float) -> None:
        """Let nobody work who may not: their connections are cut, whoever leads. Whoever does ends their leases."""
        roster = self.board.roster
        while roster.news:
            name, key = roster.news.popleft()
            self.fleet.drain(name, roster.draining(name))
            if key and roster.key_of(name) != key:
                self._expelled.add(name, key, now)
        self._expelled.cut(roster, now)
