"""Logs that no message leads to an archive: the bus lost the end of their attempt, or some of their chunks came after the archive.

The read models know which these may be: logs without an archive, and archives that may lack something. Both are few.
"""

import asyncio

import asyncpg
import msgspec
import structlog

from libs.blobstore.store import StoreUnavailable
from libs.bus.bus import Bus, BusUnavailable
from libs.eventlog.log import LogUnavailable
from services.artifacts.archivist import Archivist
from services.artifacts.projection import LogRow
from services.artifacts.queries import Queries
from services.artifacts.reactions import EndedLog

logger = structlog.get_logger()

EVERY = 5.0
"""Seconds between two looks."""
_SELDOM = 300.0
"""Seconds between two looks at one that has been so for long: a worker may have been off for days."""
_LATE = 10.0
"""Seconds that the end of an attempt is given to come by itself, beyond the archivist's patience."""
_MOST = 5000
_AT_ONCE = 32


class LateLogs:
    """Looks for them for ever, and has them archived."""

    def __init__(self, bus: Bus, queries: Queries, archivist: Archivist, patience: float) -> None:
        self._bus = bus
        self._queries = queries
        self._archivist = archivist
        self._late = patience + _LATE
        self._clock = asyncio.get_running_loop().time
        self._looked: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except (BusUnavailable, LogUnavailable, StoreUnavailable) as error:
                logger.info("late logs wait", why=str(error))
            except asyncpg.UndefinedTableError:
                logger.info("late logs wait", why="the read models are still to be made")
            await asyncio.sleep(EVERY)

    async def look(self) -> None:
        """Once. Raises BusUnavailable, LogUnavailable, StoreUnavailable."""
        rows = await self._queries.unarchived(self._late, _MOST)
        self._looked = {row.stream: self._looked[row.stream] for _, row in rows if row.stream in self._looked}
        due = [row for age, row in rows if self._clock() - self._looked.get(row.stream, -_SELDOM) >= min(age / 8, _SELDOM)]
        for at in range(0, len(due), _AT_ONCE):
            for outcome in await asyncio.gather(*map(self._settle, due[at : at + _AT_ONCE]), return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _settle(self, row: LogRow) -> None:
        ended = msgspec.convert(row, EndedLog, from_attributes=True)
        if self._archivist.has_in_hand(ended):
            return
        if not row.archive or await self._bus.last("LOGS", ended.subject) is not None:
            try:
                await self._archivist.archive(ended)
            except (BusUnavailable, LogUnavailable, StoreUnavailable):
                raise
            except Exception as error:
                logger.error("a log cannot be archived", build=row.build, stage=row.stage, attempt=row.attempt, exc_info=error)
        self._looked[row.stream] = self._clock()
