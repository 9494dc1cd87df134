"""What time it is for all services alike: by the database's clock. So a machine whose own clock is off by an hour signs nothing that is too old for
the others, and believes nothing that is."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import Pool, unavailable

EVERY = 10.0
"""Seconds between two looks."""
APART = 5.0
"""Seconds that the two clocks may be apart before somebody should know."""

logger = structlog.get_logger()


class SharedClock:
    """`now` is this machine's own clock (unix seconds), which counts until the database was asked, `steady` one that nobody sets."""

    def __init__(self, pool: Pool, now: Callable[[], float], steady: Callable[[], float]) -> None:
        self._pool = pool
        self._own = now
        self._steady = steady
        self._base: float | None = None
        self._apart = False

    def now(self) -> float:
        """Unix seconds."""
        return self._own() if self._base is None else self._base + self._steady()

    async def look(self) -> None:
        """Ask the database. Raises LogUnavailable."""
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                before = self._steady()
                there: float = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8", timeout=2.4)
                after = self._steady()
        self._base = there - (before + after) / 2
        apart = self._own() - self.now()
        if abs(apart) > APART and not self._apart:
            logger.warning("this machine's clock is not the database's", seconds_ahead=round(apart))
        self._apart = abs(apart) > APART

    async def run(self) -> None:
        """Look for ever."""
        while True:
            with suppress(LogUnavailable):
                await self.look()
            await asyncio.sleep(EVERY)
