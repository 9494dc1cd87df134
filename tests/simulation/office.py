"""The row of the database that says who leads, as `libs.eventlog.leadership` asks for it."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from libs.eventlog.log import LogUnavailable


class Office:
    """A pool with that row behind it. `now` is the database's clock (unix seconds), which may be set; `lost` says of a question whether nobody is
    told what came of it, and whether nothing did ("before") or something ("after")."""

    def __init__(self, now: Callable[[], float], lost: Callable[[], str]) -> None:
        self._now, self._lost = now, lost
        self._holder, self._term, self._until = "", 0, float("-inf")

    def acquire(self, *, timeout: float) -> AbstractAsyncContextManager["Office"]:
        return nullcontext(self)

    async def fetchval(self, campaign: str, name: str, holder: str, ttl: float, *, timeout: float) -> int | None:
        lost, now, term = self._lost(), self._now(), None
        if lost == "before":
            raise LogUnavailable("simulated")
        if holder == self._holder or not now < self._until <= now + 2 * ttl:
            if holder != self._holder or self._until <= now:
                self._term += 1
            self._holder, self._until, term = holder, now + ttl, self._term
        if lost:
            raise LogUnavailable("simulated")
        return term

    async def execute(self, resign: str, name: str, holder: str, term: int, *, timeout: float) -> None:
        if (holder, term) == (self._holder, self._term):
            self._until = self._now()
