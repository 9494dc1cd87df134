"""When there is something to tidy up next: known the moment it is, rather than looked for."""

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

_GATHER = 1.0
"""Seconds for which more is waited for, and for the read models to hear of it."""


class Agenda:
    """Of this instance; what comes about in others they know. `now` is unix seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._next = math.inf
        self._sooner = asyncio.Event()

    def expect(self, at: float) -> None:
        """Something will be due then; or is, if that is not to come."""
        at = max(at, self._now() + _GATHER)
        if at < self._next:
            self._next = at
            self._sooner.set()

    def begin(self) -> None:
        """Whatever is due by now is seen to."""
        self._next = math.inf

    async def rest(self, most: float) -> None:
        """Until something is due, `most` seconds at most: the clock may be put back."""
        clock = asyncio.get_running_loop().time
        end = clock() + most
        while (left := min(self._next - self._now(), end - clock())) > 0:
            self._sooner.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._sooner.wait()
