"""Logs that have ended move from the bus into the store, on real Postgres, NATS and a real folder."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from libs.bus.bus import Bus
from libs.bus.jetstream import connect_jetstream
from libs.eventlog.log import NO_STREAM
from libs.eventlog.postgres import PostgresLog, open_pool, open_postgres_log
from proto.catalogue import decode
from proto.envelope import cloud_event, subject_of
from proto.events.artifact import LogArchived, LogGap
from proto.events.build import LogExtent, StageFinished
from proto.messages import Attempt, LogChunk, Segment
from proto.topology import CONSUMERS, STREAMS
from services.artifacts import late_logs
from tests.artifacts_fixture import Api, serving
from tests.controls import eventually, write
from tests.nats_fixture import SEEDS, NatsServer
from tests.postgres_fixture import Database


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


@pytest.fixture
async def builds_log(database: Database) -> AsyncIterator[PostgresLog]:
    async with open_postgres_log(database.url("builds")) as log:
        yield log


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    async with connect_jetstream(nats_server.url, SEEDS["builds"], "test") as bus:
        await bus.ensure(STREAMS, CONSUMERS)
        yield bus


class Ended:
    """An attempt of its own, whose worker has sent chunks."""

    def __init__(self, bus: Bus, log: PostgresLog, database: Database) -> None:
        self.build = uuid4().hex
        self.subject = f"logs.w1.{self.build}.s.1"
        self._bus = bus
        self._log = log
        self._database = database

    async def send(self, *numbers: int) -> None:
        for number in numbers:
            segments = [Segment("step", "stdout", 1, b"".join(b"line %d\n" % ((number - 1) * 10 + n) for n in range(10)))]
            chunk = LogChunk(attempt=Attempt(self.build, "s", 1), number=number, first_line=(number - 1) * 10, segments=segments)
            await self._bus.publish(self.subject, msgspec.msgpack.encode(chunk))

    async def finish(self, chunks: int, times: int = 1) -> None:
        """`times`: how often the bus delivers it."""
        extent = LogExtent(chunks=chunks, lines=chunks * 10, bytes=chunks * 80)
        event = StageFinished(stage="s", attempt=1, status="succeeded", worker="w1", log=extent)
        await self._log.append([write(f"build-{self.build}", event, expected=NO_STREAM)])
        [recorded] = (await self._log.read_streams([f"build-{self.build}"]))[f"build-{self.build}"]
        for n in range(times):
            await self._bus.publish(subject_of(recorded), cloud_event(recorded, 1), f"{recorded.event_id}-{self.build}-{n}")

    async def archives(self) -> list[LogArchived]:
        stream = f"artifact-log-{self.build}-s-1"
        return [decode(r.type, r.data) for r in (await self._log.read_streams([stream]))[stream]]

    async def purged(self) -> bool:
        return await self._bus.last("LOGS", self.subject) is None


@pytest.fixture
async def ended(bus: Bus, builds_log: PostgresLog, database: Database) -> Callable[[], Ended]:
    return lambda: Ended(bus, builds_log, database)


async def read_log(api: Api, build: str, query: str = "") -> tuple[str, list[tuple[int, Segment]]]:
    answer = await api.ask("GET", f"/logs/{build}/s/1{query}", api.grant(build, "log"))
    assert answer.status == 200, answer.body
    body = answer.body
    found = []
    while body:
        size = int.from_bytes(body[:4], "big")
        found.append(msgspec.msgpack.decode(body[4 : 4 + size], type=tuple[int, Segment]))
        body = body[4 + size :]
    return answer.headers["Penstock-Lines"], found


async def test_a_log_is_archived_whole_purged_and_read_by_line(api: Api, ended: Callable[[], Ended]) -> None:
    attempt = ended()
    await attempt.send(2, 1, 2, 3)
    assert (await api.ask("GET", f"/logs/{attempt.build}/s/1", api.grant(attempt.build, "log"))).status == 404
    await attempt.finish(chunks=3, times=2)
    [archived] = await eventually(attempt.archives)
    assert (archived.archive, archived.chunks, archived.lines, archived.gaps) == (1, 3, 30, [])
    lines, found = await read_log(api, attempt.build)
    assert lines == "30"
    assert b"".join(segment.data for _, segment in found) == b"".join(b"line %d\n" % n for n in range(30))
    assert [first for first, _ in (await read_log(api, attempt.build, "?from=15&limit=10"))[1]] == [10, 20]

    await eventually(attempt.purged)
    assert len(await attempt.archives()) == 1


async def test_chunks_that_come_after_the_end_are_waited_for(api: Api, ended: Callable[[], Ended]) -> None:
    """FAULTS 104"""
    attempt = ended()
    await attempt.send(1)
    await attempt.finish(chunks=2)
    await attempt.send(2)
    [archived] = await eventually(attempt.archives)
    assert (archived.chunks, archived.gaps) == (2, [])


async def test_what_never_comes_is_listed_as_a_gap(database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended]) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5") as api:
        attempt = ended()
        await attempt.send(1, 4)
        await attempt.finish(chunks=5)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.lines, archived.gaps) == (2, 50, [LogGap(first=2, last=3), LogGap(first=5, last=5)])
        assert [first for first, _ in (await read_log(api, attempt.build))[1]] == [0, 30]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes late is looked for at once."""
    monkeypatch.setattr(late_logs, "EVERY", 0.1)
    monkeypatch.setattr(late_logs, "_LATE", -0.5)
    monkeypatch.setattr(late_logs, "_SELDOM", 0.0)


async def test_late_chunks_make_another_archive_of_the_same_lines_with_the_gaps_filled(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended], hasty: None
) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5") as api:
        attempt = ended()
        await attempt.send(2, 5)
        await attempt.finish(chunks=6)
        [first] = await eventually(attempt.archives)
        await attempt.send(5, 4, 2)

        async def archived(number: int) -> LogArchived | None:
            return next((each for each in await attempt.archives() if each.archive == number), None)

        second = await eventually(lambda: archived(2))
        assert (second.chunks, second.last, second.gaps) == (3, 6, [LogGap(first=1, last=1), LogGap(first=3, last=3), LogGap(first=6, last=6)])
        assert [line for line, _ in (await read_log(api, attempt.build))[1]] == [10, 30, 40]
        await attempt.send(6, 3, 1)
        third = await eventually(lambda: archived(3))
        assert (third.chunks, third.lines, third.gaps) == (6, 60, [])
        _, found = await read_log(api, attempt.build)
        assert b"".join(segment.data for _, segment in found) == b"".join(b"line %d\n" % n for n in range(60))
        await eventually(attempt.purged)
        assert len({first.digest, second.digest, third.digest}) == 3
        async with open_pool(database.url("artifacts")) as pool:
            only = "SELECT count(*) = 1 AND bool_and(holder LIKE '%:' || $1) FROM (SELECT DISTINCT holder FROM hold) h"
            await eventually(lambda: pool.fetchval(only, third.digest))


async def test_what_a_lost_worker_sends_when_it_is_back_is_added(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended], hasty: None
) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5") as api:
        attempt = ended()
        await attempt.finish(chunks=-1)
        [nothing] = await eventually(attempt.archives)
        assert (nothing.chunks, nothing.last) == (0, 0)
        await attempt.send(1, 3)

        async def again() -> LogArchived | None:
            return next(iter((await attempt.archives())[1:]), None)

        more = await eventually(again)
        assert (more.archive, more.chunks, more.gaps) == (2, 2, [LogGap(first=2, last=2)])
        assert [line for line, _ in (await read_log(api, attempt.build))[1]] == [0, 20]
        await eventually(attempt.purged)


async def test_an_end_that_the_bus_lost_leads_to_its_archive_nevertheless(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended], hasty: None
) -> None:
    """FAULTS 61"""
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5"):
        attempt = ended()
        await attempt.send(1, 2)
        await attempt.finish(chunks=2, times=0)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.gaps) == (2, [])
        await eventually(attempt.purged)


async def test_the_log_of_a_lost_worker_is_archived_as_far_as_it_came(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended]
) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_LOG_PATIENCE="0.5"):
        attempt, silent = ended(), ended()
        await attempt.send(1, 2)
        await attempt.finish(chunks=-1)
        await silent.finish(chunks=-1)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.lines, archived.gaps) == (2, 20, [])
        [nothing] = await eventually(silent.archives)
        assert (nothing.chunks, nothing.lines) == (0, 0)


async def test_archiving_goes_on_after_nats_was_killed(
    database: Database, nats_server: NatsServer, tmp_path: Path, ended: Callable[[], Ended]
) -> None:
    """FAULTS 57"""
    async with serving(database, nats_server, tmp_path / "store"):
        attempt = ended()
        await attempt.send(1)
        await attempt.finish(chunks=2)
        nats_server.restart()

        async def sent() -> bool:
            try:
                await attempt.send(2)
            except Exception:
                return False
            return True

        await eventually(sent)
        [archived] = await eventually(attempt.archives)
        assert (archived.chunks, archived.gaps) == (2, [])
