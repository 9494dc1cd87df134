"""A step's own word on how far it is: a stdout line that is exactly `::progress N::` (FAULTS 105)."""

import asyncio
import re
from collections.abc import Callable

SECONDS_BETWEEN = 1.0
_MARK = b"::progress "
_LINE = re.compile(rb"^::progress ([0-9]{1,3})::$", re.MULTILINE)


def last_percent(lines: bytes) -> int | None:
    """The last percent that whole lines announce."""
    if _MARK not in lines:
        return None
    percents = [percent for text in _LINE.findall(lines) if (percent := int(text)) <= 100]
    return percents[-1] if percents else None


class Progress:
    """The percent never falls, and is told at most once a second; the last is told in the end."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._percent = 0
        self._told = 0
        self._told_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def on_lines(self, lines: bytes) -> None:
        """Whole lines of stdout."""
        percent = last_percent(lines)
        if percent is None or percent <= self._percent:
            return
        self._percent = percent
        if self._timer is None:
            self._timer = self._loop.call_at(max(self._loop.time(), self._told_at + SECONDS_BETWEEN), self._due)

    def untold(self) -> int | None:
        """At the step's end: the percent that was not told yet. Nothing is told from here on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self._percent if self._percent > self._told else None

    def _due(self) -> None:
        self._timer = None
        self._told, self._told_at = self._percent, self._loop.time()
        self._tell(self._percent)
