"""Timers that are due become commands; the decider ignores those that are stale."""

import asyncio

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

LOOK = 1.0
"""At most this long (seconds) after it is due, a timer is seen."""

_PAYLOAD = msgspec.json.Decoder(TimerPayload)


class Alarm:
    """Whoever leads issues the command for each timer that is due; its projection drops it once the step is over."""

    def __init__(self, timers: Timers, projected: asyncio.Event, leadership: Leadership, commands: CommandLoop[Command, State]) -> None:
        """`projected` is set once there are timers to look at."""
        self._timers = timers
        self._projected = projected
        self._leadership = leadership
        self._commands = commands

    async def run(self) -> None:
        """Look, ring, wait for the next one, for ever."""
        await self._projected.wait()
        while True:
            await self._leadership.wait()
            try:
                for timer in await self._timers.due():
                    await self._ring(timer)
                next_due = await self._timers.next_due()
            except LogUnavailable:
                next_due = None
            await asyncio.sleep(min(LOOK, max(0.05, next_due if next_due is not None else LOOK)))

    async def _ring(self, timer: Timer) -> None:
        payload = _PAYLOAD.decode(timer.payload)
        command = TimeOutStep(build=payload.build, stage=payload.stage, attempt=payload.attempt, step=payload.step)
        cause = Cause(team=payload.team, correlation_id=payload.correlation_id, causation_id=payload.event_id, actor="timer")
        try:
            await self._commands.execute(command, cause)
        except (Refused, Early) as error:
            logger.info("a stale timer", timer=timer.key, why=str(error))
