"""Due times. A service projects them into a table `timers(key, due_at, payload, …)` of its schema as into any other read model; whoever leads asks
here what is due and issues the command, and the decider ignores one that is stale."""

from datetime import datetime

from asyncpg import UndefinedTableError
from msgspec import Struct

from libs.eventlog.postgres import Pool, unavailable

_DUE = "SELECT key, due_at, payload FROM timers WHERE due_at <= now() ORDER BY due_at, key LIMIT $1"
_NEXT = "SELECT extract(epoch FROM min(due_at) - now())::float8 FROM timers"


class Timer(Struct, frozen=True):
    """`payload` is JSON, as projected."""

    key: str
    due_at: datetime
    payload: bytes


class Timers:
    """On the database's clock. Both calls may raise LogUnavailable."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def due(self, limit: int = 500) -> list[Timer]:
        """The longest overdue first; none before the projection has made its table."""
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                try:
                    rows = await connection.fetch(_DUE, limit, timeout=2.4)
                except UndefinedTableError:
                    return []
        return [Timer(row["key"], row["due_at"], row["payload"]) for row in rows]

    async def next_due(self) -> float | None:
        """Seconds until the next timer is due (below 0: it is overdue); None when there is none."""
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                try:
                    seconds: float | None = await connection.fetchval(_NEXT, timeout=2.4)
                except UndefinedTableError:
                    return None
        return seconds
