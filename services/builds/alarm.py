"""Timers that are due become commands; the decider ignores those that are stale."""

import asyncio
from contextlib import suppress

import msgspec
import structlog

from libs.eventlog.leadership import Leadership
from libs.eventlog.log import LogUnavailable
from libs.eventlog.timers import Timer, Timers
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Early, Refused
from services.builds.commands import Command, TimeOutStep
from services.builds.decider import State
from services.builds.projection import TimerPayload

logger = structlog.get_logger()

PRECISION = 0.5
"""Seconds by which a timer may ring late; changes that come closer together are looked at once."""
LONGEST = 30.0

_PAYLOAD = msgspec.json.Decoder(TimerPayload)


class Alarm:
    """Whoever leads issues the command for each timer that is due; its projection drops it once the step is over."""

    def __init__(self, timers: Timers, changed: asyncio.Event, leadership: Leadership, commands: CommandLoop[Command, State]) -> None:
        """`changed` is set when there are timers to look at, and when they have changed."""
        self._timers = timers
        self._changed = changed
        self._leadership = leadership
        self._commands = commands

    async def run(self) -> None:
        """Look, ring, wait for the next one or for a change, for ever."""
        await self._changed.wait()
        while True:
            await self._leadership.wait()
            self._changed.clear()
            wait = LONGEST
            try:
                for timer in await self._timers.due():
                    await self._ring(timer)
                next_due = await self._timers.next_due()
                if next_due is not None:
                    wait = min(max(0.0, next_due), LONGEST)
            except LogUnavailable:
                wait = 1.0
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            await asyncio.sleep(PRECISION)

    async def _ring(self, timer: Timer) -> None:
        payload = _PAYLOAD.decode(timer.payload)
        command = TimeOutStep(build=payload.build, stage=payload.stage, attempt=payload.attempt, step=payload.step)
        cause = Cause(team=payload.team, correlation_id=payload.correlation_id, causation_id=payload.event_id, actor="timer")
        try:
            await self._commands.execute(command, cause)
        except (Refused, Early) as error:
            logger.info("a stale timer", timer=timer.key, why=str(error))
        except LogUnavailable:
            raise
        except Exception as error:  # of its own stream: the other timers ring
            logger.error("a timer cannot ring", timer=timer.key, exc_info=error)
