"""SQL over the gateway's read models. Every call raises LogUnavailable when the database cannot answer within a few seconds."""

import asyncio
from collections.abc import Collection
from typing import Generic, TypeVar

import asyncpg
import msgspec

from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import unavailable
from services.gateway.projection import SEALING, ArtifactRow, BuildRow, RevokedKeyRow, SealingKeyRow, SecretRow, TeamRow, TokenRow
from services.gateway.workers import LeaseRow, WorkerRow

R = TypeVar("R", bound=msgspec.Struct)

_BY_KEY = "SELECT t.{key}, row_to_json(t) FROM {table} t WHERE t.{key} = ANY ($1)"
_BUILD_BY_NUMBER = "SELECT row_to_json(b) FROM builds b WHERE team = $1 AND number = $2"
_BUILDS = """
    SELECT row_to_json(b) FROM builds b
    WHERE team = $1 AND ($2::bigint IS NULL OR number < $2) AND ($3::text IS NULL OR status = $3)
    ORDER BY number DESC LIMIT $4
"""
_ARTIFACTS = """
    SELECT row_to_json(a) FROM artifacts a
    WHERE team = $1 AND gone = '' AND ($2::bigint IS NULL OR position < $2){wanted}
    ORDER BY position DESC LIMIT $3
"""


_WORKERS = "SELECT row_to_json(w) FROM workers w WHERE name > $1 AND standing <> 'deleted' ORDER BY name LIMIT $2"
_SECRETS = "SELECT row_to_json(s) FROM secrets s WHERE team = $1 AND name > $2 ORDER BY name LIMIT $3"
_LEASES = "SELECT row_to_json(l) FROM leases l WHERE worker = ANY ($1) ORDER BY since, key"


class Lookup(Generic[R]):
    """Rows by key, in one query for all who ask while the last one is under way."""

    def __init__(self, pool: asyncpg.Pool, row: type[R], table: str, key: str) -> None:
        self._pool = pool
        self._decoder = msgspec.json.Decoder(row)
        self._query = _BY_KEY.format(table=table, key=key)
        self._waiting: dict[str, asyncio.Future[R | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def get(self, key: str) -> R | None:
        """The row as it is now, or later. Our keys are plain ASCII; a key that the database could not even read must not spoil the others' query."""
        if not key.isascii() or "\0" in key:
            return None
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(future)

    async def _ask(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, {}
                try:
                    rows = await _fetch(self._pool, self._query, list(asked))
                except BaseException as error:
                    for future in asked.values():
                        future.set_exception(error if isinstance(error, Exception) else ConnectionError("stopping"))
                        future.exception()
                    if not isinstance(error, Exception):
                        raise
                    continue
                found = {row[0]: self._decoder.decode(row[1]) for row in rows}
                for key, future in asked.items():
                    future.set_result(found.get(key))
        finally:
            self._asking = None


async def _fetch(pool: asyncpg.Pool, query: str, *arguments: object) -> list[asyncpg.Record]:
    with unavailable():
        # Getting a connection, the answer, and giving up on it in an orderly way each have their limit, also when the database only hangs.
        async with pool.acquire(timeout=1.2) as connection:
            try:
                rows: list[asyncpg.Record] = await connection.fetch(query, *arguments, timeout=2.4)
            except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
                raise LogUnavailable("the read models are being built") from error
            return rows


class Queries:
    """What the routes ask of the read models."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.build = Lookup(pool, BuildRow, "builds", "id").get
        self.artifact = Lookup(pool, ArtifactRow, "artifacts", "id").get
        self.token = Lookup(pool, TokenRow, "tokens", "sha256").get
        self.team = Lookup(pool, TeamRow, "teams", "name").get
        self.secret = Lookup(pool, SecretRow, "secrets", "id").get
        self.worker = Lookup(pool, WorkerRow, "workers", "name").get
        self.revoked_key = Lookup(pool, RevokedKeyRow, "revoked_keys", "key").get
        self._sealing_key = Lookup(pool, SealingKeyRow, "sealing_keys", "id").get

    async def position(self) -> int:
        """Up to where in the log the rows are what it says."""
        rows = await _fetch(self._pool, "SELECT position FROM checkpoint WHERE name = 'gateway'")
        return int(rows[0][0]) if rows else 0

    async def build_of_team(self, team: str, name: str) -> BuildRow | None:
        """By id, or by number within the team."""
        if name.isascii() and name.isdigit() and len(name) <= 18:
            rows = await self._rows(BuildRow, _BUILD_BY_NUMBER, team, int(name))
            return rows[0] if rows else None
        row = await self.build(name)
        return row if row is not None and row.team == team else None

    async def builds(self, team: str, limit: int, below: int | None, status: str | None) -> list[BuildRow]:
        """The team's builds, newest first, numbered below `below`."""
        return await self._rows(BuildRow, _BUILDS, team, below, status, limit)

    async def artifacts(self, team: str, limit: int, before: int | None, **wanted: str) -> list[ArtifactRow]:
        """The team's artifacts, newest first, sealed before position `before`; `wanted`: columns (kind, build, name) and their values. Parts that
        were made for builds are there only for whoever wants them."""
        conditions = "".join(f" AND {column} = ${number}" for number, column in enumerate(wanted, 4))
        if "kind" not in wanted:
            conditions += " AND kind <> 'part'"
        if "build" in wanted:
            conditions += " AND build <> ''"  # so that the index of what builds made serves
        return await self._rows(ArtifactRow, _ARTIFACTS.format(wanted=conditions), team, before, limit, *wanted.values())

    async def secrets(self, team: str, limit: int, after: str) -> list[SecretRow]:
        """The team's, by name, from the first one after `after`."""
        return await self._rows(SecretRow, _SECRETS, team, after, limit)

    async def sealing_key(self) -> SealingKeyRow | None:
        """What secrets are sealed to now; None before any scheduler has led."""
        return await self._sealing_key(SEALING)

    async def workers(self, limit: int, after: str) -> list[WorkerRow]:
        """Those that were not deleted, by name, from the first one after `after`."""
        return await self._rows(WorkerRow, _WORKERS, after, limit)

    async def leases(self, workers: Collection[str]) -> list[LeaseRow]:
        """What these workers have, oldest first."""
        return await self._rows(LeaseRow, _LEASES, list(workers))

    async def _rows(self, row: type[R], query: str, *arguments: object) -> list[R]:
        records = await _fetch(self._pool, query, *arguments)
        return [msgspec.json.decode(record[0], type=row) for record in records]
