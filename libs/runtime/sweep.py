"""What the bus lost without anybody's noticing: a sweep reads the log behind the reactions and asks again for what has not come of it.

JetStream may drop a message from the middle of a stream (a damaged block) or tell a consumer that it has seen what it has not (a restored store).
The log knows better, and a repeated command decides nothing.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

import structlog

from libs.eventlog.log import EventLog, LogUnavailable, is_full
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Decider, Early, Refused
from proto.envelope import Fact, Recorded, fact

logger = structlog.get_logger()

C = TypeVar("C")

EVERY = 5.0
"""Seconds between two sweeps; an event is swept when it is at least that old."""
LOOK_BACK = 20_000
"""Events before the head at which the first sweep begins."""
BATCH = 2_000


class Sweep(Generic[C]):
    """Asks `loop` again for what `react` makes of facts of `categories`. A command that begins its stream (`creates`) is asked for only while there
    is no such stream, which one query tells for a whole batch."""

    def __init__(
        self,
        log: EventLog,
        categories: Collection[str],
        react: Callable[[Fact], Sequence[tuple[C, Cause]]],
        decider: Decider[C, Any],
        creates: Callable[[C], bool],
        loop: CommandLoop[C, Any],
    ) -> None:
        self._log = log
        self._categories = categories
        self._react = react
        self._decider = decider
        self._creates = creates
        self._loop = loop
        self._swept: int | None = None
        self.found = 0
        """How many commands had an effect: each is an event that the bus lost, or is very late with."""

    async def run(self) -> None:
        """Sweep for ever."""
        head = 0
        while True:
            try:
                await self.sweep(head)
                head = await self._log.head()
            except LogUnavailable as error:
                logger.info("the sweep waits", why=str(error))
            await asyncio.sleep(EVERY)

    async def sweep(self, until: int) -> None:
        """Look at what was appended since the last sweep and up to position `until`."""
        if self._swept is None:
            self._swept = max(0, until - LOOK_BACK)
        while self._swept < until:
            rows = await self._log.read(self._swept, BATCH, self._categories)
            due = [row for row in rows if row.position <= until]
            await self._ask([one for row in due for one in self._wanted(row)])
            self._swept = due[-1].position if len(due) == len(rows) and is_full(rows, BATCH) else until

    def _wanted(self, row: Recorded) -> Sequence[tuple[C, Cause]]:
        """What cannot be read is the reactions' to park; the sweep must get past it."""
        try:
            return self._react(fact(row))
        except Exception as error:
            logger.error("an event cannot be swept", position=row.position, stream=row.stream, tag=row.type, exc_info=error)
            return []

    async def _ask(self, commands: Sequence[tuple[C, Cause]]) -> None:
        creating = {self._decider.stream(command) for command, _ in commands if self._creates(command)}
        absent = await self._log.absent(creating) if creating else set()
        asked = [one for one in commands if not self._creates(one[0]) or self._decider.stream(one[0]) in absent]
        for outcome in await asyncio.gather(*(self._loop.submit(*one) for one in asked), return_exceptions=True):
            if isinstance(outcome, LogUnavailable):
                raise outcome
            if isinstance(outcome, BaseException):
                if not isinstance(outcome, Refused | Early):
                    logger.warning("a swept command failed", exc_info=outcome)
            elif outcome.events:
                self.found += 1
                logger.warning("the bus was late with an event, or has lost it", stream_version=outcome.version, position=outcome.position)
