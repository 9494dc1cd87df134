"""Whether what the read models do not know is not there. They may be behind; and after a crash of the database they are, for a moment, what they
were before, because their commits are not synced: until the projector has noticed, the row that says how far they are is the only witness."""

from collections.abc import Awaitable, Callable

from libs.eventlog.log import EventLog
from libs.runtime.projector import Projector


class ReadModels:
    """The gateway's. `position` asks the database how far they are."""

    def __init__(self, projector: Projector, log: EventLog, position: Callable[[], Awaitable[int]]) -> None:
        self._projector = projector
        self._log = log
        self._position = position

    def mark(self) -> int:
        return self._projector.settled

    async def lasted(self, since: int) -> bool:
        """Raises LogUnavailable."""
        head = await self._log.head()
        caught_up = await self._projector.passed(head, 1.0) and await self._position() >= head
        return caught_up and 0 < since == self._projector.settled
