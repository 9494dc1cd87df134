"""Disposable copies of large in-memory state, so that a failover takes seconds at any length of log."""

from libs.eventlog.postgres import Pool, unavailable

_LOAD = "SELECT position, data FROM snapshot WHERE name = $1 AND code_version = $2"
_SAVE = """
INSERT INTO snapshot AS s (name, position, code_version, data) VALUES ($1, $2, $3, $4)
ON CONFLICT (name) DO UPDATE SET position = excluded.position, code_version = excluded.code_version, data = excluded.data
WHERE s.position <= excluded.position OR s.code_version <> excluded.code_version
"""


class Snapshots:
    """Rows of the service's own schema; both calls may raise LogUnavailable. Losing a snapshot costs time, never truth."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None:
        """Of the state after `position`. An older one of the same code does not replace a newer."""
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                await connection.execute(_SAVE, name, position, code_version, data, timeout=10.0)

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None:
        """None when there is none of this code."""
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                row = await connection.fetchrow(_LOAD, name, code_version, timeout=10.0)
        return None if row is None else (row["position"], row["data"])
