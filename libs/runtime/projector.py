"""Follow the log in order and keep a projection up to date (ARCHITECTURE.md: projections)."""

import asyncio
from collections.abc import Set
from functools import partial
from typing import Protocol

import structlog

from libs.eventlog.log import EventLog, LogUnavailable
from proto.catalogue import UnknownEvent

logger = structlog.get_logger()


class Advancing(Protocol):
    """A projection's storage: one call applies one batch, rows and checkpoint in one transaction, and gives the position reached."""

    @property
    def more(self) -> bool: ...

    async def advance(self) -> int: ...

    def doubt(self) -> None: ...


class Projector:
    """Advances a projection whenever the log grows. `problem` says why it stands still, None when it does not."""

    IDLE = 5.0
    """Seconds after which it looks by itself: a lost wake-up costs at most this."""

    def __init__(self, log: EventLog, projection: Advancing, urgent: Set[str] | None = None, linger: float = 0.0) -> None:
        """`urgent` and `linger`: which appends it follows at once, and how many seconds later the others (see Wakeup)."""
        self._wakeup = partial(log.wakeup, urgent, linger)
        self._projection = projection
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self.position = 0
        self.settled = 0
        """How often the read model has come to be all that the log says, from the start or after the database was away; negative while it is not."""
        self.problem: str | None = "has not read the log yet"
        self.advanced = asyncio.Event()
        """Set when the read model has come to exist, and whenever it has changed; whoever waits for the next change clears it."""

    async def run(self) -> None:
        """Advance for ever."""
        wakeup = self._wakeup()
        pause = 0.1
        try:
            while True:
                if wakeup.unheard:
                    wakeup.unheard = False
                    self._projection.doubt()
                    self.position = 0
                    self.settled = -abs(self.settled)
                try:
                    position = await self._projection.advance()
                except LogUnavailable as error:
                    self.problem = str(error) or "the log cannot be reached"
                    wakeup.unheard = True
                except UnknownEvent as error:
                    self.problem = f"met an event that this version does not know: {error}; deploy consumers first"
                    logger.error("projection stopped", why=self.problem)
                    pause = 5.0
                else:
                    pause = 0.1
                    if self.problem is not None or position != self.position:
                        self.advanced.set()
                    self.problem = None
                    self._reached(position)
                    if not self._projection.more:
                        if self.settled <= 0:
                            self.settled = 1 - self.settled
                        await wakeup.wait(self.IDLE)
                    continue
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)
        finally:
            wakeup.close()

    def _reached(self, position: int) -> None:
        self.position = max(self.position, position)
        waiting, self._waiters = self._waiters, []
        for wanted, future in waiting:
            if future.done():
                continue
            if wanted <= self.position:
                future.set_result(None)
            else:
                self._waiters.append((wanted, future))

    async def passed(self, position: int, timeout: float = 1.0) -> bool:
        """Whether the projection passes `position` within `timeout` seconds."""
        if position <= self.position:
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((position, future))
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            return False
        return True
