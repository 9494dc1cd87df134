"""Which log this is: a restore, or a failover that lost a tail, makes it another, whose positions may name other events. An operator says so by
raising its epoch."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from libs.eventlog.log import EventLog, LogUnavailable

logger = structlog.get_logger()

EVERY = 5.0
"""Seconds between two looks."""
FIRST = 0.1
"""The same, until it is known: nobody else should have read much by then."""


class Epoch:
    """Whatever a process remembers is of the epoch in which it began and no other: when it is raised, `end` is called, so that a successor begins
    with nothing. It is made by `begin_epoch`."""

    def __init__(self, log: EventLog, end: Callable[[], None]) -> None:
        self._log = log
        self._end = end
        self._number: int | None = None

    @property
    def number(self) -> int:
        """That in which this process began. Raises LogUnavailable while it is not known (see `load`)."""
        if self._number is None:
            raise LogUnavailable("the log's epoch is not known yet")
        return self._number

    async def load(self, _: object = None) -> None:
        """Know it. Raises LogUnavailable."""
        if self._number is None:
            self._number = await self._log.epoch()

    async def watch(self) -> None:
        """Look from time to time, for ever."""
        while True:
            try:
                await self.load()
                if (now := await self._log.epoch()) != self._number:
                    logger.warning("the log's epoch was raised: this service starts anew", epoch=now, began_in=self._number)
                    self._end()
            except LogUnavailable as error:
                logger.debug("the epoch is not known now", why=str(error))
            await asyncio.sleep(EVERY if self._number is not None else FIRST)


async def begin_epoch(log: EventLog, end: Callable[[], None]) -> Epoch:
    """To be called before anything else is read: what is raised from then on is noticed. While the database is away it is known a little later."""
    epoch = Epoch(log, end)
    with suppress(LogUnavailable):
        await epoch.load()
    return epoch
