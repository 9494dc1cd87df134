"""When there is something to tidy up next: known the moment it is, rather than looked for."""

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

_GATHER = 1.0
"""Seconds for which more is waited for, and for the read models to hear of it."""
_FAR = 600.0
"""Seconds: what is due later, those who look before find in the read models."""


class Agenda:
    """Of this instance; what comes about in others they know. `now` is unix seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._due: set[int] = set()
        """Whole seconds: one look for all that is due in one. Each stays until then: who looks before may look too soon to see it."""
        self._sooner = asyncio.Event()

    def expect(self, at: float) -> None:
        """Something will be due then; or is, if that is not to come."""
        now = self._now()
        if at < now + _FAR:
            self._due.add(math.ceil(max(at, now + _GATHER)))
            self._sooner.set()

    def begin(self) -> None:
        """Whatever is due by now is seen to."""
        now = self._now()
        self._due = {at for at in self._due if at > now}

    async def rest(self, most: float) -> None:
        """Until something is due, `most` seconds at most: the clock may be put back."""
        clock = asyncio.get_running_loop().time
        end = clock() + most
        while (left := min(min(self._due, default=math.inf) - self._now(), end - clock())) > 0:
            self._sooner.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._sooner.wait()
