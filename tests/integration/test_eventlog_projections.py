"""Projections: rows and checkpoint together, exactly once and in order, whatever happens in between."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Any

import asyncpg
import msgspec
import pytest
from msgspec import Struct

from libs.eventlog.log import Appended, LogUnavailable, NewEvent
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.eventlog.projections import Get, Gone, Projection, StoredProjection, Superseded, Table, Unprojectable
from libs.runtime.projector import Projector
from proto.envelope import Fact
from proto.events.build import BuildFinished, StepProgressed, StepStarted
from proto.events.lease import LeaseExpired
from tests.controls import counter, eventually, write
from tests.postgres_fixture import Database


class BuildRow(Struct, frozen=True):
    build: str
    number: int
    status: str
    percent: float
    workers: dict[str, str]
    note: msgspec.Raw
    aborted: bool
    finished_at: datetime | None
    error: str | None
    position: int


class TeamRow(Struct, frozen=True):
    team: str
    builds: int


class WaitingRow(Struct, frozen=True):
    """Exists while the build has not ended."""

    build: str


TABLES = """
CREATE TABLE build_row (
    build text PRIMARY KEY, number integer NOT NULL, status text NOT NULL, percent double precision NOT NULL, workers jsonb NOT NULL,
    note json NOT NULL, aborted boolean NOT NULL, finished_at timestamptz, error text, position bigint NOT NULL
);
CREATE INDEX ON build_row (number);
CREATE TABLE team_row (team text PRIMARY KEY, builds integer NOT NULL);
CREATE TABLE waiting_row (build text PRIMARY KEY);
"""


def keys(fact: Fact) -> Iterable[tuple[type[Any], str]]:
    return (BuildRow, fact.subject_id), (TeamRow, fact.team)


def project(fact: Fact, get: Get) -> Iterable[Struct]:
    row = get(BuildRow, fact.subject_id)
    if row is None:
        team = get(TeamRow, fact.team) or TeamRow(fact.team, 0)
        team = TeamRow(team.team, team.builds + 1)
        row = BuildRow(fact.subject_id, team.builds, "pending", 0.5, {}, msgspec.Raw(b'{"a": 1}'), False, None, None, 0)
        yield team
        yield WaitingRow(fact.subject_id)
    replace = msgspec.structs.replace
    match fact.event:
        case StepStarted(stage=stage, worker=worker):
            row = replace(row, status="started", workers={**row.workers, stage: worker})
        case StepProgressed(percent=percent):
            # Not idempotent on purpose: an event applied twice would show.
            row = replace(row, percent=row.percent + percent)
        case BuildFinished(status=status, error=error):
            row = replace(row, status=status, aborted=status == "aborted", finished_at=fact.recorded_at, error=error)
            yield Gone(WaitingRow, fact.subject_id)
    yield replace(row, position=fact.position)


BUILDS = Projection(
    name="builds",
    code_version="1",
    tables=(Table(BuildRow, "build_row", "build"), Table(TeamRow, "team_row", "team"), Table(WaitingRow, "waiting_row", "build")),
    tables_sql=TABLES,
    categories=frozenset({"build"}),
    project=project,
    keys=keys,
)


@pytest.fixture
async def log(database: Database) -> AsyncIterator[PostgresLog]:
    """As the superuser, who may append to all categories."""
    async with open_postgres_log(database.url("postgres")) as log:
        yield log


@pytest.fixture
async def service(database: Database) -> AsyncIterator[PostgresLog]:
    async with open_postgres_log(database.url("builds")) as log:
        yield log


async def history(log: PostgresLog, builds: int, ids=None) -> None:
    """Builds of which every third has ended, their events interleaved with one another and with another category's."""
    ids = ids or counter("e")
    steps = [
        StepStarted(stage="compile", attempt=1, step="s", worker="w1"),
        StepProgressed(stage="compile", attempt=1, step="s", percent=10),
        StepStarted(stage="test", attempt=1, step="s", worker="w2"),
        StepProgressed(stage="test", attempt=1, step="s", percent=20),
    ]
    for step in steps:
        await log.append([write(f"build-{n}", step, ids=ids, team=f"team{n % 2}") for n in range(builds)])
        await log.append([write(f"lease-{n}", LeaseExpired(stage="s", attempt=1, worker="w", evidence="e"), ids=ids) for n in range(builds)])
    end = BuildFinished(status="errored", error="no\x00good \\u0000 ü")
    await log.append([write(f"build-{n}", end, ids=ids, team=f"team{n % 2}") for n in range(0, builds, 3)])


async def finish(projection: StoredProjection, log: PostgresLog) -> None:
    head = await log.head()
    while await projection.advance() < head:
        pass


async def contents(database: Database) -> list[Any]:
    connection = await asyncpg.connect(database.url("builds"))
    try:
        return [await connection.fetch(f"SELECT t::text FROM {table.name} t ORDER BY {table.key}") for table in BUILDS.tables]
    finally:
        await connection.close()


async def test_rows_are_what_the_events_say(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    await history(log, builds=4)
    await finish(StoredProjection(service.pool, BUILDS), log)
    async with service.pool.acquire() as connection:
        rows = await connection.fetch("SELECT * FROM build_row ORDER BY build")
        first = rows[0]
        assert [(row["build"], row["number"], row["status"], row["percent"]) for row in rows] == [
            ("0", 1, "errored", 30.5),
            ("1", 1, "started", 30.5),
            ("2", 2, "started", 30.5),
            ("3", 2, "errored", 30.5),
        ]
        assert msgspec.json.decode(first["workers"]) == {"compile": "w1", "test": "w2"}
        assert (first["note"], first["aborted"], first["error"]) == (b'{"a": 1}', False, "no\ufffdgood \\u0000 ü")
        ended = [recorded for recorded in await log.read(0, 1000) if recorded.type == "build.finished"]
        assert first["finished_at"] == ended[0].recorded_at
        assert [row["build"] for row in await connection.fetch("SELECT build FROM waiting_row ORDER BY build")] == ["1", "2"]


@pytest.mark.parametrize("batch", [1, 3, 7, 5000])
async def test_any_cut_into_batches_and_any_restart_give_the_same_rows(
    database: Database, log: PostgresLog, service: PostgresLog, batch: int
) -> None:
    await history(log, builds=5)
    await finish(StoredProjection(service.pool, BUILDS), log)
    expected = await contents(database)
    other = msgspec.structs.replace(BUILDS, code_version="2")
    head = await log.head()
    position = 0
    while position < head:
        position = await StoredProjection(service.pool, other, batch).advance()  # each batch by an instance that knows nothing
    assert await contents(database) == expected


async def test_a_dropped_projection_is_rebuilt_identically(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    """FAULTS 78: a table is lost, by hand; then everything is."""
    await history(log, builds=10)
    await finish(StoredProjection(service.pool, BUILDS), log)
    expected = await contents(database)
    for loss in ("DROP TABLE team_row", "DROP TABLE build_row, team_row, waiting_row; DELETE FROM checkpoint"):
        async with service.pool.acquire() as connection:
            await connection.execute(loss)
        await finish(StoredProjection(service.pool, BUILDS), log)
        assert await contents(database) == expected


async def test_a_projection_dropped_under_a_running_instance_is_rebuilt_without_a_new_event(
    database: Database, log: PostgresLog, service: PostgresLog
) -> None:
    """FAULTS 78: when nothing happens, it sees to its tables."""
    await history(log, builds=10)
    projection = StoredProjection(service.pool, BUILDS)
    await finish(projection, log)
    expected = await contents(database)
    async with service.pool.acquire() as connection:
        await connection.execute("DROP TABLE team_row")
    assert await projection.advance() == await log.head(), "the first time it could be between two events"
    assert await projection.advance() == 0
    await finish(projection, log)
    assert await contents(database) == expected


async def test_two_deliveries_are_one(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    await history(log, builds=3)
    first, second = StoredProjection(service.pool, BUILDS), StoredProjection(service.pool, BUILDS)
    assert await first.position() == await second.position() == 0
    await asyncio.gather(finish(first, log), finish(second, log))
    expected = await contents(database)
    await first.advance()
    await second.advance()
    assert await contents(database) == expected
    assert [row["percent"] for row in await service.pool.fetch("SELECT percent FROM build_row")] == [30.5] * 3


async def test_instances_take_turns_and_nothing_is_applied_twice(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    """Three instances race through a log that grows meanwhile; the rows are those of one that works alone."""
    instances = [StoredProjection(service.pool, BUILDS, batch=7) for _ in range(3)]
    growing = asyncio.create_task(history(log, builds=40))
    while not growing.done():
        await asyncio.gather(*(instance.advance() for instance in instances))
    await growing
    await asyncio.gather(*(finish(instance, log) for instance in instances))
    raced = await contents(database)
    await finish(StoredProjection(service.pool, msgspec.structs.replace(BUILDS, code_version="2")), log)
    assert await contents(database) == raced


async def test_code_of_another_version_takes_over_and_the_old_stops(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    await history(log, builds=3)
    old = StoredProjection(service.pool, BUILDS)
    await finish(old, log)
    new = StoredProjection(service.pool, msgspec.structs.replace(BUILDS, code_version="2"))
    assert await new.position() == 0
    await finish(new, log)
    expected = await contents(database)
    await history(log, builds=1, ids=counter("more"))
    with pytest.raises(Superseded):
        await old.advance()
    assert await contents(database) == expected


async def test_a_tag_that_is_not_known_stops_the_projection_before_it(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    await history(log, builds=1)
    projection = StoredProjection(service.pool, BUILDS, batch=3)
    await finish(projection, log)
    before, expected = await log.head(), await contents(database)
    await log.append([write("build-0", NewEvent("new", "build.from_the_future", b"{}"))])
    with pytest.raises(Unprojectable, match=r"build\.from_the_future on build-0.* UnknownEvent"):
        await projection.advance()
    assert await projection.position() == before
    assert await contents(database) == expected


@pytest.mark.parametrize("what", ["its data", "its projection", "its row"])
async def test_an_event_that_cannot_be_projected_stops_just_there_and_fixed_code_goes_on(
    database: Database, log: PostgresLog, service: PostgresLog, what: str
) -> None:
    """All that was before it is applied, in the middle of a batch too; it is named; nothing is skipped, nothing is applied twice."""

    def broken(fact: Fact, get: Get) -> Iterable[Struct]:
        if fact.stream == "build-bad":
            match what:
                case "its data":
                    msgspec.json.decode(b"{}", type=StepStarted)
                case "its projection":
                    raise ZeroDivisionError
                case _:
                    # no column of type integer holds it
                    return [TeamRow(fact.team, 2**40)]
        return project(fact, get)

    await history(log, builds=3)
    [bad] = await log.append([write("build-bad", StepProgressed(stage="s", attempt=1, step="a", percent=1, report=1))])
    assert isinstance(bad, Appended)
    await history(log, builds=4, ids=counter("more"))
    old = Projector(service, StoredProjection(service.pool, msgspec.structs.replace(BUILDS, project=broken)))
    running = asyncio.create_task(old.run())
    try:
        await eventually(lambda: old.stuck)
        assert old.stuck is not None and old.stuck.position == bad.position and "build-bad" in str(old.stuck)
        assert old.problem is None
        assert await old.passed(bad.position - 1) and not await old.passed(bad.position, timeout=0.05)
        assert [row["percent"] for row in await service.pool.fetch("SELECT percent FROM build_row")] == [30.5] * 3
    finally:
        running.cancel()
        await asyncio.wait([running])
    await finish(StoredProjection(service.pool, BUILDS), log)
    gone_on = await contents(database)
    await finish(StoredProjection(service.pool, msgspec.structs.replace(BUILDS, code_version="2")), log)
    assert gone_on == await contents(database)


async def test_a_tag_of_a_category_that_is_not_followed_is_passed_over(log: PostgresLog, service: PostgresLog) -> None:
    await log.append([write("lease-0", NewEvent("new", "lease.from_the_future", b"{}"))])
    assert await StoredProjection(service.pool, BUILDS).advance() == 1


async def test_a_row_that_was_not_named_beforehand_is_an_error(log: PostgresLog, service: PostgresLog) -> None:
    await history(log, builds=1)
    projection = StoredProjection(service.pool, msgspec.structs.replace(BUILDS, keys=lambda fact: ()))
    with pytest.raises(Unprojectable, match="KeyError"):
        while True:
            await projection.advance()


def test_rows_that_omit_defaults_are_refused(service: PostgresLog) -> None:
    class Omitting(Struct, frozen=True, omit_defaults=True):
        key: str

    with pytest.raises(ValueError, match="omits defaults"):
        StoredProjection(service.pool, msgspec.structs.replace(BUILDS, tables=(Table(Omitting, "t", "key"),)))


async def test_a_batch_whose_answer_is_lost_is_neither_lost_nor_repeated(database: Database, log: PostgresLog, service: PostgresLog) -> None:
    """Every connection of the service is cut again and again while it projects."""
    await history(log, builds=20)
    projection = StoredProjection(service.pool, BUILDS, batch=5)
    cutting = asyncio.create_task(cut_connections(database))
    head = await log.head()
    position = 0
    while position < head:
        try:
            position = await projection.advance()
        except LogUnavailable:
            await asyncio.sleep(0.005)
    cutting.cancel()
    await asyncio.wait([cutting])
    cut = await contents(database)
    await finish(StoredProjection(service.pool, msgspec.structs.replace(BUILDS, code_version="2")), log)
    assert await contents(database) == cut


async def cut_connections(database: Database) -> None:
    connection = await asyncpg.connect(database.url("postgres"))
    try:
        while True:
            await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'penstock_builds'")
            await asyncio.sleep(0.03)
    finally:
        await connection.close()
