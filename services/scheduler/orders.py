"""What this instance asks of the streams that are the scheduler's: commands that are decided and recorded together."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from libs.eventlog.log import LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from services.scheduler.commands import Command
from services.scheduler.decider import State
from services.scheduler.queue import Queued

logger = structlog.get_logger()


class Orders:
    """`grows` is called before anything is asked: what comes of it is to be read."""

    def __init__(self, commands: CommandLoop[Command, State], grows: Callable[[], None]) -> None:
        self._commands = commands
        self._grows = grows

    async def give(self, commands: Sequence[tuple[Command, Cause]]) -> list[bool]:
        """Execute commands together; whether each was accepted. What another instance decided first is no error. Raises LogUnavailable."""
        if not commands:
            return []
        self._grows()
        results = await asyncio.gather(*(self._commands.submit(*one) for one in commands), return_exceptions=True)
        for result in results:
            if isinstance(result, LogUnavailable) or (isinstance(result, BaseException) and not isinstance(result, Exception)):
                raise result
            if isinstance(result, Exception) and not isinstance(result, Refused):  # of one stream: the others go on
                logger.error("a command failed", exc_info=result)
        return [not isinstance(result, Exception) for result in results]


def for_attempt(queued: Queued) -> Cause:
    """Why something is decided about an attempt: it was queued."""
    return Cause(team=queued.team, correlation_id=queued.correlation_id, causation_id=queued.event_id, actor="scheduler")


def for_boot(boot: str) -> Cause:
    """Why something is decided about a worker: it lives, or lived."""
    return Cause(team="system", correlation_id=boot, causation_id=boot, actor="scheduler")
