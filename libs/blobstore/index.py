"""Where blobs lie: the index of the packs, in Postgres, and who may be writing packs. Whoever has its own schema and pool may have one."""

from collections.abc import Collection, Sequence
from pathlib import Path

import asyncpg

from libs.blobstore.packs import Place
from libs.eventlog.postgres import Pool, unavailable

_TABLES = Path(__file__).with_name("index.sql")
_FIND = "SELECT digest, size, pack, start FROM blob WHERE team = $1 AND digest = ANY ($2::bytea[])"
_ADD = """
INSERT INTO blob (team, digest, size, pack, start)
SELECT $1, * FROM unnest($2::bytea[], $3::bigint[], $4::text[], $5::bigint[]) ON CONFLICT DO NOTHING
"""
_ARRIVE = "INSERT INTO blob_writer (writer, seen_at) VALUES ($1, now()) ON CONFLICT (writer) DO UPDATE SET seen_at = now()"
_RENEW = "UPDATE blob_writer SET seen_at = now() WHERE writer = $1"
_LEAVE = "DELETE FROM blob_writer WHERE writer = $1"
_SUCCEED = "DELETE FROM blob_writer WHERE starts_with(writer, $1)"
_BURY = "DELETE FROM blob_writer WHERE seen_at < now() - make_interval(secs => $1)"


class WriterGone(Exception):
    """This instance was taken for dead, and its unfinished packs for garbage: it must write under a new name."""


class BlobIndex:
    """The rows of `blob` and `blob_writer`. All methods raise LogUnavailable when the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(self) -> None:
        """Make the tables if they are not there."""
        with unavailable():
            try:
                await self._pool.execute(_TABLES.read_text(encoding="utf-8"))
            except asyncpg.UniqueViolationError:
                # two instances starting at once: the other's tables are there
                await self._pool.execute(_TABLES.read_text(encoding="utf-8"))

    async def find(self, team: str, digests: Collection[bytes]) -> dict[bytes, Place]:
        """Places of those that the team has."""
        with unavailable():
            rows = await self._pool.fetch(_FIND, team, list(digests))
        return {row["digest"]: Place(row["digest"], row["size"], row["pack"], row["start"]) for row in rows}

    async def add(self, writer: str, team: str, places: Sequence[Place]) -> None:
        """Make blobs visible, all or none. Raises WriterGone."""
        if not places:
            return
        with unavailable():
            async with self._pool.acquire() as connection, connection.transaction():
                if await connection.fetchval("SELECT 1 FROM blob_writer WHERE writer = $1 FOR SHARE", writer) is None:
                    raise WriterGone(writer)
                await self._insert(connection, team, places)

    async def adopt(self, team: str, places: Sequence[Place]) -> None:
        """Rows read back from a pack's own index."""
        with unavailable():
            async with self._pool.acquire() as connection:
                await self._insert(connection, team, places)

    async def is_empty(self) -> bool:
        with unavailable():
            return not await self._pool.fetchval("SELECT EXISTS (SELECT FROM blob)")

    async def packs(self) -> set[tuple[str, str]]:
        """(team, pack) of every pack that holds a visible blob."""
        with unavailable():
            rows = await self._pool.fetch("SELECT DISTINCT team, pack FROM blob")
        return {(row["team"], row["pack"]) for row in rows}

    async def arrive(self, writer: str) -> None:
        with unavailable():
            await self._pool.execute(_ARRIVE, writer)

    async def renew(self, writer: str) -> bool:
        """False: it was taken for dead."""
        with unavailable():
            return bool(await self._pool.execute(_RENEW, writer) == "UPDATE 1")

    async def leave(self, writer: str) -> None:
        with unavailable():
            await self._pool.execute(_LEAVE, writer)

    async def succeed(self, instance: str) -> None:
        """Whoever wrote under a name that begins so is dead."""
        with unavailable():
            await self._pool.execute(_SUCCEED, instance)

    async def writers(self, silent_for: float) -> set[str]:
        """Those that live; whoever was silent for that many seconds is one no more."""
        with unavailable():
            await self._pool.execute(_BURY, silent_for)
            return {row["writer"] for row in await self._pool.fetch("SELECT writer FROM blob_writer")}

    @staticmethod
    async def _insert(connection: asyncpg.pool.PoolConnectionProxy, team: str, places: Sequence[Place]) -> None:
        digests, sizes, packs, starts = ([getattr(place, name) for place in places] for name in ("digest", "size", "pack", "start"))
        await connection.execute(_ADD, team, digests, sizes, packs, starts)
