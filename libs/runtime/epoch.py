"""Which log this is: a restore, or a failover that lost a tail, makes it another, whose positions may name other events. An operator says so by
raising its epoch."""

import asyncio
from collections.abc import Callable

import structlog

from libs.eventlog.log import EventLog, LogUnavailable

logger = structlog.get_logger()

EVERY = 5.0
"""Seconds between two looks."""


class Epoch:
    """`number` is the epoch in which this process began, 0 while it is not known. Whatever the process remembers is of that log and no other: when
    it is raised, `end` is called, so that a successor begins with nothing."""

    def __init__(self, log: EventLog, end: Callable[[], None]) -> None:
        self._log = log
        self._end = end
        self.number = 0

    async def load(self, _: object = None) -> None:
        """Know it. Raises LogUnavailable."""
        self.number = self.number or await self._log.epoch()

    async def watch(self) -> None:
        """Look from time to time, for ever."""
        while True:
            try:
                await self.load()
                if (now := await self._log.epoch()) != self.number:
                    logger.warning("the log's epoch was raised: this service starts anew", epoch=now, began_in=self.number)
                    self._end()
            except LogUnavailable as error:
                logger.debug("the epoch is not known now", why=str(error))
            await asyncio.sleep(EVERY)
