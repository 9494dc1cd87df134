"""The event log in Postgres. All SQL that touches the log's table is here and in the projections.

An append is one call of one function in a transaction of its own: a client that stops in the middle of it holds nothing.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Collection, Iterator, Sequence, Set
from contextlib import asynccontextmanager, contextmanager, suppress

import asyncpg
import structlog
from asyncpg.pool import PoolAcquireContext

from libs.eventlog.log import PAGE_BYTES, Appended, Conflict, EventTooLarge, LogUnavailable, NotOwner, Wakeup, Write, check_writes
from proto.envelope import Recorded

Pool = asyncpg.Pool
logger = structlog.get_logger()
PATIENCE = 2.4
"""Seconds to wait for a connection of a pool's, all of which are at work."""
ECHO = 1.0
"""Seconds within which whoever appends hears of it, like everyone; or the connection that should tell it is not what it seems."""
ASK = 20.0
"""Seconds between two questions to a connection that has nothing to say."""
_PROBES = {socket.SO_KEEPALIVE: 1}, {socket.TCP_KEEPIDLE: 3, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3}
"""By the kernel, which wakes nobody: a machine that is gone is noticed after 6 s, one that has forgotten the connection after 3."""

_APPEND = "SELECT recorded, version, position, recorded_at FROM eventlog.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
_COLUMNS = "position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at"
_STREAMS = f"SELECT {_COLUMNS} FROM eventlog.event WHERE stream = ANY ($1) ORDER BY stream, version"  # noqa: S608  constants
_WINDOW = (
    f"SELECT {_COLUMNS} FROM (SELECT *, sum(pg_column_size(data)) OVER (ORDER BY position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) "  # noqa: S608
    f"AS size_before FROM (SELECT {_COLUMNS} FROM eventlog.event WHERE position > $1 %s ORDER BY position LIMIT $2) next) page "
    f"WHERE coalesce(size_before, 0) < {PAGE_BYTES} ORDER BY position"
)
_READ = _WINDOW % ""
_READ_SOME = _WINDOW % "AND split_part(stream, '-', 1) = ANY ($3)"
_ABSENT = "SELECT s.stream FROM unnest($1::text[]) AS s (stream) WHERE NOT EXISTS (SELECT FROM eventlog.event e WHERE e.stream = s.stream)"
_HEAD = "SELECT coalesce((SELECT position FROM eventlog.event ORDER BY position DESC LIMIT 1), 0)"
_EPOCH = "SELECT number FROM eventlog.epoch"
_CHANNEL = "eventlog"
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalServerError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.ReadOnlySQLTransactionError,
)


@contextmanager
def unavailable() -> Iterator[None]:
    """What the database says when it is down, full, overloaded or starting becomes LogUnavailable."""
    try:
        yield
    except _UNAVAILABLE as error:
        raise LogUnavailable(f"{type(error).__name__}: {error}") from error


class _PatientPool(asyncpg.Pool):
    """Nobody waits for a connection without end: TimeoutError after PATIENCE seconds, also where none was named."""

    def acquire(self, *, timeout: float | None = None) -> PoolAcquireContext:
        return super().acquire(timeout=PATIENCE if timeout is None else timeout)


@asynccontextmanager
async def open_pool(dsn: str, size: int = 4) -> AsyncIterator[Pool]:
    """Up to `size` connections, made when needed and closed when idle. Succeeds while Postgres is down.

    `json` is bytes, both ways. A DSN with a password and an sslmode keeps the driver from looking for files in HOME."""
    pool = _PatientPool(
        dsn,
        min_size=0,
        max_size=size,
        max_queries=50_000,
        loop=None,
        connection_class=asyncpg.Connection,
        record_class=asyncpg.Record,
        timeout=2.0,
        command_timeout=30.0,
        max_inactive_connection_lifetime=120.0,
        init=_prepare,
        reset=_nothing_to_reset,
    )
    await pool
    try:
        yield pool
    finally:
        try:
            await asyncio.wait_for(pool.close(), 5.0)
        except TimeoutError:
            pool.terminate()


async def _prepare(connection: asyncpg.Connection) -> None:
    await connection.set_type_codec("json", schema="pg_catalog", encoder=_same, decoder=_same, format="binary")


async def _nothing_to_reset(connection: asyncpg.Connection) -> None:
    """No one changes the session's state, so a release needs no round trip; asyncpg itself ends an open transaction."""


def _same(data: bytes) -> bytes:
    return data


class PostgresLog:
    """An EventLog. Every call gives up with LogUnavailable within 5 s. Made by open_postgres_log."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._wakeups: set[Wakeup] = set()
        self._tried = asyncio.Event()
        self._doubted = asyncio.Event()
        self._echoes = 0
        self._echo: asyncio.TimerHandle | None = None

    async def append(self, writes: Sequence[Write]) -> list[Appended | Conflict]:
        check_writes(writes)
        if not writes:
            return []
        arguments = (
            [write.stream for write in writes],
            [write.expected for write in writes],
            [write.team for write in writes],
            [write.correlation_id for write in writes],
            [write.causation_id for write in writes],
            [write.actor for write in writes],
            [number for number, write in enumerate(writes, 1) for _ in write.events],
            [event.event_id for write in writes for event in write.events],
            [event.type for write in writes for event in write.events],
            [event.data.decode() for write in writes for event in write.events],
        )
        echoes = self._echoes
        try:
            rows = await self._fetch(_APPEND, *arguments)
        except asyncpg.InsufficientPrivilegeError as error:
            raise NotOwner(str(error)) from error
        except asyncpg.ProgramLimitExceededError as error:
            raise EventTooLarge(str(error)) from error
        except (asyncpg.DataError, asyncpg.UniqueViolationError) as error:
            raise ValueError(str(error)) from error
        if self._echoes == echoes and self._echo is None and any(row[0] for row in rows):
            self._echo = asyncio.get_running_loop().call_later(ECHO, self._doubt)
        return [
            Appended(write.stream, row[1], row[2], row[3]) if row[0] else Conflict(write.stream, row[1])
            for write, row in zip(writes, rows, strict=True)
        ]

    async def read_streams(self, streams: Sequence[str]) -> dict[str, list[Recorded]]:
        found: dict[str, list[Recorded]] = {stream: [] for stream in streams}
        for row in await self._fetch(_STREAMS, list(found)):
            found[row[1]].append(recorded(row))
        return found

    async def read(self, after: int, limit: int, categories: Collection[str] | None = None) -> list[Recorded]:
        if categories is None:
            rows = await self._fetch(_READ, after, limit)
        else:
            rows = await self._fetch(_READ_SOME, after, limit, list(categories))
        return [recorded(row) for row in rows]

    async def absent(self, streams: Collection[str]) -> set[str]:
        return {row[0] for row in await self._fetch(_ABSENT, list(streams))}

    async def head(self) -> int:
        head: int = (await self._fetch(_HEAD))[0][0]
        return head

    async def epoch(self) -> int:
        epoch: int = (await self._fetch(_EPOCH))[0][0]
        return epoch

    def wakeup(self, urgent: Set[str] | None = None, linger: float = 0.0) -> Wakeup:
        wakeup = Wakeup(self._wakeups.discard, urgent, linger)
        self._wakeups.add(wakeup)
        return wakeup

    async def _fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        with unavailable():
            # Getting a connection, the answer, and giving up on it in an orderly way each have their limit.
            async with self.pool.acquire(timeout=1.2) as connection:
                rows: list[asyncpg.Record] = await connection.fetch(query, *arguments, timeout=2.4)
                return rows

    def _doubt(self) -> None:
        self._echo = None
        self._doubted.set()

    def _heard(self, *notification: object) -> None:
        self._echoes += 1
        if self._echo is not None:
            self._echo.cancel()
            self._echo = None
        self._wake(str(notification[-1]).split(","))

    def _wake(self, categories: Collection[str] = ()) -> None:
        for wakeup in self._wakeups:
            wakeup.ring(categories)

    async def _listen(self, dsn: str) -> None:
        """Keep one connection listening; whatever was appended while there was none is made up for by waking everyone."""
        pause, told = 0.05, False
        while True:
            try:
                connection = await asyncpg.connect(dsn, timeout=2.0, command_timeout=5.0)
                try:
                    _probe(connection)
                    connection.add_termination_listener(lambda _: self._doubted.set())
                    await connection.add_listener(_CHANNEL, self._heard)
                    self._wake()
                    self._tried.set()
                    pause, told = 0.05, False
                    await self._watch(connection)
                finally:
                    connection.terminate()
            except Exception as error:  # whatever it was: without a listener followers only look now and then
                if not told:
                    logger.warning("nobody listens to the log", why=f"{type(error).__name__}: {error}")
                told = True
            self._tried.set()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _watch(self, connection: asyncpg.Connection) -> None:
        """Until the connection is lost, and that raises something. One that only seems to be there is found out by the kernel's probes, by an append
        of ours that it does not tell of, and by asking now and then."""
        while True:
            self._doubted.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK):
                    await self._doubted.wait()
            await connection.fetchval("SELECT 1", timeout=2.0)


def _probe(connection: asyncpg.Connection) -> None:
    sock = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]  # it is there, and nothing else is
    if sock.family == socket.AF_UNIX:
        return  # there is no other machine
    for level, options in zip((socket.SOL_SOCKET, socket.IPPROTO_TCP), _PROBES, strict=True):
        for option, value in options.items():
            sock.setsockopt(level, option, value)


@asynccontextmanager
async def open_postgres_log(dsn: str, size: int = 4) -> AsyncIterator[PostgresLog]:
    """A log over a pool of its own (`log.pool`, which the service's other storage may share) and one listening connection.
    Succeeds while Postgres is down; calls then raise LogUnavailable, and work again when it is back."""
    async with open_pool(dsn, size) as pool:
        log = PostgresLog(pool)
        listening = asyncio.create_task(log._listen(dsn), name="eventlog-listener")
        try:
            await log._tried.wait()
            yield log
        finally:
            if log._echo is not None:
                log._echo.cancel()
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening


def recorded(row: asyncpg.Record) -> Recorded:
    return Recorded(
        position=row[0],
        stream=row[1],
        version=row[2],
        event_id=row[3],
        type=row[4],
        data=row[5],
        team=row[6],
        correlation_id=row[7],
        causation_id=row[8],
        actor=row[9],
        recorded_at=row[10],
    )
