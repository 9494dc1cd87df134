"""The storage side of a projection: rows and checkpoint move together, exactly once and in order, whatever dies and however many instances run.

A batch is one statement: it moves the checkpoint from where the rows were computed, and writes the rows only if that moved. So nothing is ever
locked while a client thinks, instances take turns by themselves, and one that lost its turn has only computed in vain.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import asyncpg
import msgspec
from asyncpg.pool import PoolConnectionProxy
from msgspec import Struct

from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import Pool, unavailable
from proto.catalogue import category_of, decode
from proto.envelope import Fact

R = TypeVar("R", bound=Struct)
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")
_PAGE = """
WITH page AS MATERIALIZED (
    SELECT position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at,
        sum(pg_column_size(data)) OVER (ORDER BY position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS size_before
    FROM (SELECT * FROM eventlog.event WHERE position > $1 ORDER BY position LIMIT $2) next
), short AS MATERIALIZED (
    SELECT * FROM page WHERE coalesce(size_before, 0) < $4
)
SELECT position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at FROM short
WHERE split_part(stream, '-', 1) = ANY ($3) OR position = (SELECT max(position) FROM short)
ORDER BY position
"""
_CHECKPOINT = "SELECT code_version, generation, position FROM checkpoint WHERE name = $1"
_PAGE_BYTES = 16 << 20
_CACHED_ROWS = 50_000


class Table(Struct, frozen=True):
    """A read model: `row` is a frozen Struct whose fields are the columns of table `name`; `key` names its text primary key.

    A row's fields: str, int, float, bool, datetime, None beside these; dict, list or Struct for a jsonb column, msgspec.Raw for JSON as it is."""

    row: type[Struct]
    name: str
    key: str


class Gone(Struct, frozen=True):
    """What `project` returns to delete a row."""

    row: type[Struct]
    key: str


class Get(Protocol):
    """The row as it is now, earlier events of the batch applied. KeyError for a key that `keys` did not name."""

    def __call__(self, row: type[R], key: str, /) -> R | None: ...


class Projection(Struct, frozen=True, kw_only=True):
    """`project` is pure: (fact, get) → the rows that are different now. `keys` names every row that `project` will get for that fact.

    `tables_sql` creates the tables, in the service's schema. Another `code_version` means another meaning: the tables are dropped and built anew."""

    name: str
    code_version: str
    tables: Sequence[Table]
    tables_sql: str
    categories: frozenset[str]
    project: Callable[[Fact, Get], Iterable[Struct]]
    keys: Callable[[Fact], Iterable[tuple[type[Any], str]]]


class Superseded(Exception):
    """Other code has taken over the projection while this ran; this instance must not write any more."""


class Unprojectable(Exception):
    """The projection stays before the event at `position`: what its code or the database said of it is the cause."""

    def __init__(self, position: int, stream: str, tag: str, cause: Exception) -> None:
        super().__init__(f"event {position} ({tag} on {stream}) cannot be projected: {type(cause).__name__}: {cause}")
        self.position = position


class _Place(Struct, frozen=True):
    generation: int
    position: int


class StoredProjection:
    """One instance of a projection, over a pool of its service's role. Both calls may raise LogUnavailable.

    Text cannot hold NUL in Postgres: it is stored as U+FFFD."""

    def __init__(self, pool: Pool, projection: Projection, batch: int = 5000) -> None:
        self._pool = pool
        self._spec = projection
        self._batch = batch
        self._limit = batch
        self._page: Sequence[asyncpg.Record] = ()
        self._tables = {table.row: table for table in projection.tables}
        self._decoders = {table.row: msgspec.json.Decoder(list[table.row]) for table in projection.tables}  # type: ignore[name-defined]
        self._load = "SELECT " + ", ".join(_load_sql(table, number) for number, table in enumerate(projection.tables, 1))
        self._store = _store_sql(projection.tables)
        self._encoder = msgspec.json.Encoder()
        self._place: _Place | None = None
        self._started = False
        self._ahead: tuple[int, asyncio.Task[list[asyncpg.Record]]] | None = None
        """A page that is being read, and the position it comes after."""
        self.more = True
        """Whether the last batch was so full that the next one is likely there already."""
        self._quiet = False
        self._doubted = False
        self._rows: dict[tuple[type[Struct], str], Struct | None] = {}
        for table in projection.tables:
            if table.row.__struct_config__.omit_defaults:
                raise ValueError(f"{table.row.__name__} omits defaults, so its columns would be null")

    def doubt(self) -> None:
        """The database was away, and a batch is not synced when it is committed: rows and checkpoint may be, together, what they were before it.
        Look again before the next batch."""
        self._doubted = True

    async def position(self) -> int:
        """Everything up to here is in the tables, as this instance last knew."""
        return (await self._at()).position

    async def advance(self) -> int:
        """Apply the next batch, at most `batch` events; the position reached, unchanged when there was nothing to do or it was another's turn.

        A batch that fails by itself is tried again by halves, so that all before the event that is to blame is applied, and it is known which it is.
        Raises Unprojectable when that is the next one, and Superseded."""
        try:
            position = await self._advance()
        except (LogUnavailable, Superseded):
            self._drop_ahead()
            raise
        except Exception as error:
            self._drop_ahead()
            self._place = None  # it may have been the tables
            if not self._page:
                raise
            if len(self._page) == 1:
                position, stream, _, _, tag, *_ = self._page[0]
                raise Unprojectable(position, stream, tag, error) from error
            self._limit = max(1, self._limit // 2)
            self.more = True
            return (await self._at()).position
        except BaseException:
            self._drop_ahead()
            raise
        self._limit = min(self._batch, self._limit * 2)
        return position

    async def _advance(self) -> int:
        if self._doubted:
            self._doubted, self._place = False, None
            self._drop_ahead()
        self._page = ()
        place = await self._at()
        with unavailable():
            self._page = page = await self._page_after(place.position)
            self.more = bool(page) and page[-1][0] - place.position >= self._limit // 2
            if self.more and self._limit == self._batch:
                # The database reads the next page while this one is folded and stored.
                self._ahead = page[-1][0], asyncio.create_task(self._fetch_page(page[-1][0]))
                self._ahead[1].add_done_callback(lambda task: task.cancelled() or task.exception())
            async with self._pool.acquire(timeout=1.2) as connection:
                if not page:
                    return await self._look(connection, place)
                self._quiet = False
                facts = [_fact(row) for row in page if category_of(row[1]) in self._spec.categories]
                await self._fill(connection, facts)
                changed = self._project(facts)
                # Until the answer is here nothing is known, neither the place nor the rows.
                self._place, rows, self._rows = None, self._rows, {}
                moved = await connection.fetchval(
                    self._store,
                    self._spec.name,
                    self._spec.code_version,
                    place.generation,
                    place.position,
                    page[-1][0],
                    *self._arguments(changed),
                    timeout=20.0,
                )
        if not moved:
            return (await self._at()).position
        rows.update(changed)
        self._rows = rows
        self._place = _Place(place.generation, page[-1][0])
        return self._place.position

    async def _fetch_page(self, after: int) -> list[asyncpg.Record]:
        async with self._pool.acquire(timeout=1.2) as connection:
            page: list[asyncpg.Record] = await connection.fetch(_PAGE, after, self._limit, list(self._spec.categories), _PAGE_BYTES, timeout=10.0)
            return page

    async def _page_after(self, position: int) -> list[asyncpg.Record]:
        if self._ahead is not None and self._ahead[0] == position:
            (_, reading), self._ahead = self._ahead, None
            if page := await reading:
                return page  # an empty one may be old by now
        self._drop_ahead()
        return await self._fetch_page(position)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    async def _look(self, connection: PoolConnectionProxy, place: _Place) -> int:
        """When nothing happens for the second time there is leisure to see whether the tables are still there."""
        if self._quiet:
            self._place = await self._checkpoint(connection) or await self._rebuild(connection)
            if self._place != place:
                self._rows = {}
            return self._place.position
        self._quiet = True
        return place.position

    def _project(self, facts: Iterable[Fact]) -> dict[tuple[type[Struct], str], Struct | None]:
        changed: dict[tuple[type[Struct], str], Struct | None] = {}
        before = self._rows

        def get(row: type[R], key: str, /) -> R | None:
            place = (row, key)
            return changed[place] if place in changed else before[place]  # type: ignore[return-value]

        project, key_of = self._spec.project, {row: table.key for row, table in self._tables.items()}
        for each in facts:
            for row in project(each, get):
                if isinstance(row, Gone):
                    place = (row.row, row.key)
                    if before.get(place, row) is None:
                        changed.pop(place, None)  # it came and went within the batch: nothing was stored
                    else:
                        changed[place] = None
                else:
                    changed[(type(row), getattr(row, key_of[type(row)]))] = row
        return changed

    async def _fill(self, connection: PoolConnectionProxy, facts: Iterable[Fact]) -> None:
        """Know every row that will be asked for."""
        if len(self._rows) > _CACHED_ROWS:
            self._rows = {}
        wanted: dict[type[Struct], set[str]] = {row: set() for row in self._tables}
        for each in facts:
            for row, key in self._spec.keys(each):
                if (row, key) not in self._rows:
                    wanted[row].add(key)
        if not any(wanted.values()):
            return
        found = await connection.fetchrow(self._load, *(list(keys) for keys in wanted.values()), timeout=10.0)
        assert found is not None
        for (row, keys), text in zip(wanted.items(), found, strict=True):
            self._rows.update(dict.fromkeys((row, key) for key in keys))
            key = self._tables[row].key
            self._rows.update({(row, getattr(each, key)): each for each in self._decoders[row].decode(text)})

    def _arguments(self, changed: dict[tuple[type[Struct], str], Struct | None]) -> Iterable[object]:
        for row in self._tables:
            written = self._encoder.encode([each for (kind, _), each in changed.items() if kind is row and each is not None])
            yield _NUL.sub(rb"\1\\ufffd", written) if b"\\u0000" in written else written
            yield [key for (kind, key), each in changed.items() if kind is row and each is None]

    async def _at(self) -> _Place:
        if self._place is None:
            self._rows = {}
            with unavailable():
                async with self._pool.acquire(timeout=1.2) as connection:
                    self._place = await self._checkpoint(connection) or await self._rebuild(connection)
            self._started = True
        return self._place

    async def _checkpoint(self, connection: PoolConnectionProxy) -> _Place | None:
        row = await connection.fetchrow(_CHECKPOINT, self._spec.name, timeout=2.4)
        present = await connection.fetchval(
            "SELECT bool_and(to_regclass(name) IS NOT NULL) FROM unnest($1::text[]) name", [table.name for table in self._spec.tables], timeout=2.4
        )
        if row is None or not present:
            return None
        if row["code_version"] != self._spec.code_version:
            if self._started:
                raise Superseded(f"{self._spec.name} is now of code version {row['code_version']}, not {self._spec.code_version}")
            return None
        return _Place(row["generation"], row["position"])

    async def _rebuild(self, connection: PoolConnectionProxy) -> _Place:
        """Empty tables and a checkpoint at the beginning; what another instance has just begun is joined."""
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || '.' || $1, 0))", self._spec.name)
            if place := await self._checkpoint(connection):
                return place
            for table in self._spec.tables:
                await connection.execute(f"DROP TABLE IF EXISTS {table.name} CASCADE")
            await connection.execute(self._spec.tables_sql)
            generation: int = await connection.fetchval(
                "INSERT INTO checkpoint AS c (name, code_version, generation, position) VALUES ($1, $2, 1, 0) ON CONFLICT (name) "
                "DO UPDATE SET code_version = excluded.code_version, generation = c.generation + 1, position = 0 RETURNING generation",
                self._spec.name,
                self._spec.code_version,
            )
            return _Place(generation, 0)


def _fact(row: asyncpg.Record) -> Fact:
    return Fact(
        position=row[0],
        stream=row[1],
        version=row[2],
        event_id=row[3],
        event=decode(row[4], row[5]),
        team=row[6],
        correlation_id=row[7],
        causation_id=row[8],
        actor=row[9],
        recorded_at=row[10],
    )


def _load_sql(table: Table, number: int) -> str:
    return f"(SELECT coalesce(json_agg(t), '[]')::text FROM {table.name} t WHERE {table.key} = ANY (${number}))"  # noqa: S608  names from code


def _store_sql(tables: Sequence[Table]) -> str:
    """Parameters: name, code version, generation, old and new position, and for each table rows as a JSON array and deleted keys.

    Its commit need not reach the disk: rows and checkpoint are lost together, and made again from the log."""
    parts = [
        "WITH moved AS (UPDATE checkpoint SET position = $5 "
        "WHERE name = $1 AND code_version = $2 AND generation = $3 AND position = $4 RETURNING true)"
    ]
    for number, table in enumerate(tables):
        columns = [field.encode_name for field in msgspec.structs.fields(table.row)]
        every = ", ".join(columns)
        updates = ", ".join(f"{column} = excluded.{column}" for column in columns if column != table.key)
        action = f"UPDATE SET {updates}" if updates else "NOTHING"
        parts.append(
            f", written{number} AS (INSERT INTO {table.name} ({every}) SELECT {every} "  # noqa: S608
            f"FROM json_populate_recordset(NULL::{table.name}, ${6 + 2 * number}::json) WHERE EXISTS (SELECT FROM moved) "
            f"ON CONFLICT ({table.key}) DO {action}), "
            f"gone{number} AS (DELETE FROM {table.name} WHERE {table.key} = ANY (${7 + 2 * number}) AND EXISTS (SELECT FROM moved))"
        )
    return "".join([*parts, " SELECT count(*) FROM moved, set_config('synchronous_commit', 'off', true)"])
