"""Figures of the event log on this machine, with a durable Postgres: `python -m tests.bench.eventlog`. Ratios count, not absolutes."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from uuid import uuid4

import msgspec

from libs.eventlog.log import NO_STREAM, NewEvent, Write
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.eventlog.projections import Get, Projection, StoredProjection, Table
from proto.catalogue import TAGS, encode
from proto.envelope import Fact
from proto.events.build import BuildFinished, StepProgressed, StepStarted
from tests.postgres_fixture import TEMPLATE, Database, make_template, postgres_cluster

EVENTS = [
    StepStarted(stage="compile", attempt=1, step="make", worker="w1", sandbox="bwrap"),
    *(StepProgressed(stage="compile", attempt=1, step="make", percent=percent) for percent in range(0, 90, 15)),
    BuildFinished(status="succeeded"),
]
ENCODED = [(TAGS[type(event)], encode(event)) for event in EVENTS]


class Row(msgspec.Struct, frozen=True):
    build: str
    team: str
    status: str
    percent: int


def project(fact: Fact, get: Get) -> Iterable[Row]:
    row = get(Row, fact.subject_id) or Row(fact.subject_id, fact.team, "pending", 0)
    match fact.event:
        case StepStarted():
            return (Row(row.build, row.team, "started", 0),)
        case StepProgressed(percent=percent):
            return (Row(row.build, row.team, row.status, percent),)
        case BuildFinished(status=status):
            return (Row(row.build, row.team, status, row.percent),)
    return ()


ROWS = Projection(
    name="bench",
    code_version="1",
    tables=(Table(Row, "bench_row", "build"),),
    tables_sql="CREATE TABLE bench_row (build text PRIMARY KEY, team text, status text, percent integer)",
    categories=frozenset({"build"}),
    project=project,
    keys=lambda fact: ((Row, fact.subject_id),),
)


def build(events: Iterable[tuple[str, bytes]]) -> Write:
    new = [NewEvent(uuid4().hex, *event) for event in events]
    return Write(stream=f"build-{uuid4()}", expected=NO_STREAM, events=new, team="main", correlation_id="c", causation_id="c", actor="a")


async def guarded(log: PostgresLog, appends: int) -> None:
    for _ in range(appends):
        await log.append([build(ENCODED[:1])])


async def measure(database: Database) -> None:
    async with AsyncExitStack() as stack:
        logs = [await stack.enter_async_context(open_postgres_log(database.url("builds"), size=1)) for _ in range(8)]
        await asyncio.gather(*(guarded(log, 20) for log in logs))
        for writers in (1, 8):
            started = time.perf_counter()
            await asyncio.gather(*(guarded(log, 2000 // writers) for log in logs[:writers]))
            print(f"one guarded event a call, {writers} connections: {2000 / (time.perf_counter() - started):,.0f} appends/s")

        log, builds = logs[0], 20_000
        groups = [[build(ENCODED) for _ in range(250)] for _ in range(builds // 250)]
        started = time.perf_counter()
        for group in groups:
            await log.append(group)
        rows = builds * len(ENCODED)
        print(f"grouped, {250 * len(ENCODED)} events a call: {rows / (time.perf_counter() - started):,.0f} rows/s")

        head, position = await log.head(), 0
        started = time.perf_counter()
        while position < head:
            position = (await log.read(position, 5000))[-1].position
        print(f"read back: {head / (time.perf_counter() - started):,.0f} events/s")

        projection = StoredProjection(log.pool, ROWS)
        started = time.perf_counter()
        while await projection.advance() < head:
            pass
        print(f"projection rebuilt: {head / (time.perf_counter() - started):,.0f} events/s")


async def main() -> None:
    with postgres_cluster(settings={}) as cluster:
        await make_template(cluster)
        await measure(Database(cluster, TEMPLATE))


if __name__ == "__main__":
    asyncio.run(main())
