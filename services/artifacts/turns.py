"""How many bodies come, or go, at once: nobody, and no team, may keep the others from theirs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from libs.runtime.http import Problem

_LATELY = 15.0
"""Seconds for which one that was sent away is taken to be waiting: it comes again within that time."""


class Turns:
    """At most `most` at once, a quarter of them of one team. People and builds leave each other a quarter, and a team's builds may have half of all.
    `what` is counted, for people."""

    def __init__(self, most: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._what = what
        self._clock = clock
        self._taken: Counter[tuple[bool, str]] = Counter()
        self._sent_away: dict[str, float] = {}

    @contextmanager
    def turn(self, team: str, build: bool = False) -> Iterator[None]:
        """Raises Problem 429 when too many are under way."""
        most, quarter, kind = self._most, self._most // 4, (build, team)
        of_kind = sum(count for (each, _), count in self._taken.items() if each == build)
        if self._taken[kind] >= max(quarter * (2 if build else 1), 1):
            raise self._full(team)
        if of_kind >= most - quarter or self._taken.total() >= most:
            raise self._full("")
        self._taken[kind] += 1
        try:
            yield
        finally:
            self._taken[kind] -= 1
            if not self._taken[kind]:
                del self._taken[kind]

    def waited_for(self, team: str) -> bool:
        """Whether somebody was sent away lately who could have come in place of this team."""
        return any(self._clock() - self._sent_away.get(whose, -_LATELY) < _LATELY for whose in (team, ""))

    def _full(self, whose: str) -> Problem:
        self._sent_away[whose] = self._clock()
        return Problem(429, f"too-many-{self._what}", f"Too many {self._what} run at once", "try again soon", headers={"Retry-After": "1"})
