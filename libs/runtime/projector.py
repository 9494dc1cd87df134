"""Follow the log in order and keep a projection up to date (ARCHITECTURE.md: projections)."""

import asyncio
from collections.abc import Callable, Set
from functools import partial
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Gauge

from libs.eventlog.log import EventLog, LogUnavailable
from libs.eventlog.projections import Unprojectable

logger = structlog.get_logger()


class Advancing(Protocol):
    """A projection's storage: one call applies one batch, rows and checkpoint in one transaction, and gives the position reached."""

    @property
    def more(self) -> bool: ...

    async def advance(self) -> int: ...

    def doubt(self) -> None: ...


def measure_stuck(registry: CollectorRegistry, stuck: Callable[[], Unprojectable | None]) -> None:
    """The alarm of whoever folds the log."""
    gauge = Gauge("penstock_projection_stuck", "The position of the event that cannot be projected, 0: there is none", registry=registry)
    gauge.set_function(lambda: error.position if (error := stuck()) else 0)


class Projector:
    """Advances a projection whenever the log grows. `problem` says why it cannot read, None when it can; `stuck` which event it cannot take, if there
    is one: what the read models hold may be read then, and stays as it is until other code, or a log that was mended, gets past that event."""

    IDLE = 5.0
    """Seconds after which it looks by itself: a lost wake-up costs at most this. So soon, too, it tries again what it could not take."""

    def __init__(self, log: EventLog, projection: Advancing, urgent: Set[str] | None = None, linger: float = 0.0) -> None:
        """`urgent` and `linger`: which appends it follows at once, and how many seconds later the others (see Wakeup)."""
        self._wakeup = partial(log.wakeup, urgent, linger)
        self._projection = projection
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self.position = 0
        self.settled = 0
        """How often the read model has come to be all that the log says, from the start or after the database was away; negative while it is not."""
        self.problem: str | None = "has not read the log yet"
        self.stuck: Unprojectable | None = None
        self.advanced = asyncio.Event()
        """Set when the read model has come to exist, and whenever it has changed; whoever waits for the next change clears it."""

    def measure(self, registry: CollectorRegistry) -> None:
        """What says how far it is, and that it cannot go on."""
        Gauge("penstock_projection_position", "The last event that the read models have taken", registry=registry).set_function(lambda: self.position)
        measure_stuck(registry, lambda: self.stuck)

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
                except Unprojectable as error:
                    if str(error) != str(self.stuck):
                        logger.error("the read models stand still", why=str(error), exc_info=error.__cause__)
                        self.advanced.set()
                    self.problem, self.stuck = None, error
                    self._reached(error.position - 1)
                    pause = self.IDLE
                else:
                    pause = 0.1
                    if self.problem is not None or position != self.position:
                        self.advanced.set()
                    self.problem = None
                    if self.stuck is not None and position >= self.stuck.position:
                        logger.warning("the read models go on", position=position)
                        self.stuck = None
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
