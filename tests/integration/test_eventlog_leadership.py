"""One leader at a time, by the database's clock; checkpoints that name its term; snapshots; timers."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from libs.eventlog.checkpoints import RelayCheckpoint, RelayCheckpoints
from libs.eventlog.leadership import Leadership
from libs.eventlog.postgres import Pool, open_pool
from libs.eventlog.snapshots import Snapshots
from libs.eventlog.timers import Timers
from tests.controls import eventually
from tests.postgres_fixture import Database


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.url("scheduler")) as pool:
        yield pool


async def expire(pool: Pool) -> None:
    await pool.execute("UPDATE leadership SET until = clock_timestamp() - interval '1 second'")


async def test_the_first_candidate_leads_and_the_second_does_not(pool: Pool) -> None:
    first, second = Leadership(pool, "relay", "a"), Leadership(pool, "relay", "b")
    assert first.term is None
    assert await first.campaign()
    assert not await second.campaign()
    assert (first.term, second.term) == (1, None)


async def test_renewing_keeps_the_term_and_offices_are_apart(pool: Pool) -> None:
    relay, placement = Leadership(pool, "relay", "a"), Leadership(pool, "placement", "b")
    for _ in range(3):
        assert await relay.campaign()
        assert await placement.campaign()
    assert (relay.term, placement.term) == (1, 1)


async def test_each_takeover_is_a_later_term(pool: Pool) -> None:
    first, second = Leadership(pool, "relay", "a"), Leadership(pool, "relay", "b")
    await first.campaign()
    await expire(pool)
    assert await second.campaign()
    assert second.term == 2
    assert not await first.campaign()
    assert first.term is None


@pytest.mark.parametrize("ahead", ["9 seconds", "1 hour"])
async def test_a_dead_leader_is_followed_soon_though_the_databases_clock_was_set_back(pool: Pool, ahead: str) -> None:
    first, second = Leadership(pool, "relay", "a"), Leadership(pool, "relay", "b")
    await first.campaign()
    await pool.execute("UPDATE leadership SET until = clock_timestamp() + $1::text::interval", ahead)
    assert await second.campaign() == (ahead == "1 hour"), "by less it is only waited for"
    assert await first.campaign() == (ahead != "1 hour")


async def test_a_leader_that_let_its_term_run_out_gets_a_later_one(pool: Pool) -> None:
    """Another may have led, and ended, in between."""
    leader = Leadership(pool, "relay", "a")
    await leader.campaign()
    await expire(pool)
    await leader.campaign()
    assert leader.term == 2


async def test_a_stopped_leader_knows_by_its_own_clock_that_its_term_is_over(pool: Pool) -> None:
    """FAULTS 45: it is stopped, resumed, and asked before it has talked to anyone."""
    clock = Clock()
    leader = Leadership(pool, "relay", "a", ttl=5.0, clock=clock)
    await leader.campaign()
    clock.now += 4.4
    assert leader.term == 1
    clock.now += 0.2  # a margin before the 5 s are over
    assert leader.term is None


async def test_of_many_candidates_one_is_elected(pool: Pool) -> None:
    candidates = [Leadership(pool, "relay", f"c{n}") for n in range(20)]
    await asyncio.gather(*(candidate.campaign() for candidate in candidates))
    assert sum(candidate.term is not None for candidate in candidates) == 1


async def test_another_takes_over_when_the_leader_is_gone(pool: Pool) -> None:
    first, second = Leadership(pool, "relay", "a", ttl=0.6), Leadership(pool, "relay", "b", ttl=0.6)
    leading = asyncio.create_task(first.run())
    assert await asyncio.wait_for(first.wait(), 5) == 1
    waiting = asyncio.create_task(second.run())
    leading.cancel()
    assert await asyncio.wait_for(second.wait(), 5) == 2
    assert first.term is None
    waiting.cancel()
    await asyncio.wait([leading, waiting])


async def test_resigning_lets_another_lead_at_once(pool: Pool) -> None:
    first, second = Leadership(pool, "relay", "a", ttl=60), Leadership(pool, "relay", "b", ttl=60)
    await first.campaign()
    await first.resign()
    assert first.term is None
    assert await second.campaign()
    assert second.term == 2
    await first.resign()
    assert await second.campaign()


async def test_an_unreachable_database_ends_no_term_early_and_no_term_late(database: Database) -> None:
    clock = Clock()
    async with open_pool(database.url("scheduler")) as pool:
        leader = Leadership(pool, "relay", "a", ttl=5.0, clock=clock)
        await leader.campaign()
    assert await leader.campaign()  # the pool is closed
    assert leader.term == 1
    clock.now += 5
    assert not await leader.campaign()


async def test_a_renewal_is_counted_from_before_it_was_asked_for(pool: Pool) -> None:
    """The answer may be slow: another connection holds the row meanwhile."""
    clock = Clock()
    leader = Leadership(pool, "relay", "a", ttl=5.0, clock=clock)
    await leader.campaign()
    async with pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("SELECT FROM leadership FOR UPDATE")
            renewing = asyncio.create_task(leader.campaign())
            await eventually(lambda: pool.fetchval("SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
            clock.now += 4
        assert await renewing
    clock.now += 1
    assert leader.term is None


async def test_a_checkpoint_is_kept_and_a_leader_of_an_earlier_term_cannot_move_it(pool: Pool) -> None:
    checkpoints = RelayCheckpoints(pool)
    assert await checkpoints.load() is None
    first = RelayCheckpoint(stream_created="2026-01-01T00:00:00Z", sequence=10, position=10, term=2, left_out=((3, 0), (5, 9)))
    assert await checkpoints.save(first)
    assert not await checkpoints.save(RelayCheckpoint(stream_created="x", sequence=99, position=99, term=1))
    assert await checkpoints.load() == first
    rewound = RelayCheckpoint(stream_created="2026-02-02T00:00:00Z", sequence=0, position=0, term=2)
    assert await checkpoints.save(rewound)
    assert await checkpoints.load() == rewound


async def test_a_snapshot_is_for_the_code_that_wrote_it_and_never_goes_back(pool: Pool) -> None:
    snapshots = Snapshots(pool)
    assert await snapshots.load("fleet", "1") is None
    await snapshots.save("fleet", 10, "1", b"\x00state")
    assert await snapshots.load("fleet", "1") == (10, b"\x00state")
    assert await snapshots.load("fleet", "2") is None
    await snapshots.save("fleet", 5, "1", b"older")
    assert await snapshots.load("fleet", "1") == (10, b"\x00state")
    await snapshots.save("fleet", 5, "2", b"other code")
    assert await snapshots.load("fleet", "2") == (5, b"other code")


async def test_timers_are_due_by_the_databases_clock(database: Database, pool: Pool) -> None:
    timers = Timers(pool)
    connection = await asyncpg.connect(database.url("scheduler"))
    try:
        await connection.execute("CREATE TABLE timers (key text PRIMARY KEY, due_at timestamptz NOT NULL, payload json NOT NULL)")
        assert await timers.next_due() is None
        await connection.execute("INSERT INTO timers SELECT 'b', now() + interval '1 hour', '{\"n\": 1}'")
        seconds = await timers.next_due()
        assert seconds is not None and 3500 < seconds <= 3600
        assert await timers.due() == []
        await connection.execute("INSERT INTO timers SELECT 'a', now() - interval '1 hour', '{\"n\": 2}'")
        assert [(timer.key, timer.payload) for timer in await timers.due()] == [("a", b'{"n": 2}')]
    finally:
        await connection.close()
