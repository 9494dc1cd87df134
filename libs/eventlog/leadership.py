"""Who does what only one instance may do: a row (holder, term, until) on the database's clock.

Never a session's lock, which a stopped process would hold for ever. A leader trusts its term only as long as the row surely names it, counted on its
own monotonic clock from before it asked; what it writes names the term. A row that reaches far ahead was written before the clock was set back, and
holds no more; its leader may believe in it for a little longer. All candidates for one office have the same `ttl`.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import Pool, unavailable

_CAMPAIGN = """
INSERT INTO leadership AS l (name, holder, term, until) VALUES ($1, $2, 1, clock_timestamp() + $3 * interval '1 second')
ON CONFLICT (name) DO UPDATE SET
    holder = excluded.holder,
    term = CASE WHEN l.holder = excluded.holder AND l.until > clock_timestamp() THEN l.term ELSE l.term + 1 END,
    until = clock_timestamp() + $3 * interval '1 second'
WHERE l.holder = excluded.holder OR l.until <= clock_timestamp() OR l.until > clock_timestamp() + $3 * 2 * interval '1 second'
RETURNING term
"""
_RESIGN = "UPDATE leadership SET until = clock_timestamp() WHERE name = $1 AND holder = $2 AND term = $3"


class Leadership:
    """One candidate for one office (`name`). No two that live at a time may have one `holder`; a successor of that name takes over the term too.
    `ttl` is in seconds."""

    def __init__(self, pool: Pool, name: str, holder: str, ttl: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._name = name
        self._holder = holder
        self._ttl = ttl
        self._clock = clock
        self._term = 0
        self._until = float("-inf")
        self._elected = asyncio.Event()

    @property
    def term(self) -> int | None:
        """None: not the leader, or not surely. Ask right before each act; a tenth of the ttl is kept as a margin."""
        return self._term if self._clock() < self._until else None

    async def run(self) -> None:
        """Campaign and renew, for ever. Cancelling it leaves the office to time out; `resign` gives it up at once."""
        while True:
            held = await self.campaign()
            await asyncio.sleep(self._ttl / (3 if held else 5))

    async def campaign(self) -> bool:
        """Ask for the office once, or renew it. A database that does not answer changes nothing: the term runs out by itself."""
        asked = self._clock()
        try:
            with unavailable():
                async with asyncio.timeout(self._ttl / 2), self._pool.acquire(timeout=self._ttl / 3) as connection:
                    term: int | None = await connection.fetchval(_CAMPAIGN, self._name, self._holder, self._ttl, timeout=self._ttl / 3)
        except LogUnavailable:
            return self.term is not None
        if term is None:
            self._lose()
            return False
        self._term = term
        self._until = asked + self._ttl * 0.9
        self._elected.set()
        return True

    async def wait(self) -> int:
        """The term, as soon as this is the leader."""
        while (term := self.term) is None:
            self._elected.clear()
            await self._elected.wait()
        return term

    async def resign(self) -> None:
        """Stop being the leader now, so that another need not wait. Best effort."""
        term = self.term
        self._lose()
        if term is not None:
            with suppress(LogUnavailable), unavailable():
                async with self._pool.acquire(timeout=1.0) as connection:
                    await connection.execute(_RESIGN, self._name, self._holder, term, timeout=1.0)

    def _lose(self) -> None:
        self._until = float("-inf")
        self._elected.clear()
