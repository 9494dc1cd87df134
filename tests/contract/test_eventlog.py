"""What every event log promises, in memory and in Postgres alike."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec import structs

from libs.eventlog.log import ANY, NO_STREAM, Appended, Conflict, EventLog, EventTooLarge, NewEvent, NotOwner
from libs.eventlog.memory import MemoryLog
from libs.eventlog.postgres import open_postgres_log
from proto.catalogue import encode
from proto.events.lease import LeaseExpired
from proto.topology import MAX_EVENT, MAX_NAME
from tests.controls import write
from tests.postgres_fixture import Database

EXPIRED = LeaseExpired(stage="compile", attempt=1, worker="w1", evidence="silence")
BUILD, OTHER = "build-1f", "build-2e"


@pytest.fixture(params=["memory", "postgres"])
async def log(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[EventLog]:
    """As the service `builds`."""
    if request.param == "memory":
        yield MemoryLog("builds")
    else:
        async with open_postgres_log(database.url("builds")) as opened:
            yield opened


def event(event_id: str, data: bytes = b"{}") -> NewEvent:
    return NewEvent(event_id, "build.created", data)


async def append(log: EventLog, stream: str, *ids: str, expected: int = ANY) -> Appended | Conflict:
    (outcome,) = await log.append([write(stream, *(event(i) for i in ids), expected=expected)])
    return outcome


async def test_an_empty_log_has_head_0_and_no_streams(log: EventLog) -> None:
    assert await log.head() == 0
    assert await log.epoch() == 1
    assert await log.read(0, 10) == []
    assert await log.read_streams([BUILD]) == {BUILD: []}
    assert await log.append([]) == []


async def test_what_is_appended_is_read_back_whole(log: EventLog) -> None:
    new = NewEvent("e1", "lease.expired", encode(EXPIRED))
    (appended,) = await log.append([write(BUILD, new, expected=NO_STREAM)])
    assert isinstance(appended, Appended)
    (recorded,) = await log.read(0, 10)
    assert (recorded.stream, recorded.version, recorded.position) == (BUILD, 1, 1) == (appended.stream, appended.version, appended.position)
    assert (recorded.event_id, recorded.type, recorded.data) == ("e1", "lease.expired", encode(EXPIRED))
    assert (recorded.team, recorded.correlation_id, recorded.causation_id, recorded.actor) == ("main", "correlation", "cause", "tester")
    assert recorded.recorded_at == appended.recorded_at
    assert recorded.recorded_at.utcoffset() is not None
    assert await log.read_streams([BUILD, OTHER]) == {BUILD: [recorded], OTHER: []}


async def test_the_bytes_of_an_event_are_kept_exactly(log: EventLog) -> None:
    data = '{ "b": 1.0, "a":"\\u0000 \u00fc \U0001f6a2", "b":2 }'.encode()
    await log.append([write(BUILD, event("e1", data))])
    assert (await log.read(0, 1))[0].data == data


async def test_versions_count_in_the_stream_and_positions_in_the_log(log: EventLog) -> None:
    await append(log, BUILD, "a", "b")
    await append(log, OTHER, "c")
    outcome = await append(log, BUILD, "d", expected=2)
    assert isinstance(outcome, Appended)
    assert (outcome.version, outcome.position) == (3, 4)
    assert [(r.position, r.stream, r.version) for r in await log.read(0, 10)] == [(1, BUILD, 1), (2, BUILD, 2), (3, OTHER, 1), (4, BUILD, 3)]
    assert await log.head() == 4


async def test_a_stale_expected_version_is_a_conflict_that_says_where_the_stream_is(log: EventLog) -> None:
    assert await append(log, BUILD, "a", expected=1) == Conflict(BUILD, 0)
    await append(log, BUILD, "a", "b")
    for stale in (NO_STREAM, 1, 3):
        assert await append(log, BUILD, "c", expected=stale) == Conflict(BUILD, 2)
    assert await log.head() == 2


async def test_writes_of_one_call_succeed_and_fail_apart(log: EventLog) -> None:
    await append(log, BUILD, "a")
    outcomes = await log.append(
        [
            write("build-3", event("x1"), event("x2"), expected=NO_STREAM),
            write(BUILD, event("b"), event("c"), expected=NO_STREAM),
            write(OTHER, event("d"), expected=ANY),
        ]
    )
    first, conflict, last = outcomes
    assert conflict == Conflict(BUILD, 1)
    assert isinstance(first, Appended) and (first.version, first.position) == (2, 3)
    assert isinstance(last, Appended) and (last.version, last.position) == (1, 4)
    assert [r.event_id for r in await log.read(0, 10)] == ["a", "x1", "x2", "d"]


@pytest.mark.parametrize("expected", [NO_STREAM, ANY, 7])
async def test_the_same_event_ids_again_are_success_and_record_nothing(log: EventLog, expected: int) -> None:
    """FAULTS finding 8."""
    first = await append(log, BUILD, "a", "b", expected=NO_STREAM)
    await append(log, BUILD, "c")
    assert await append(log, BUILD, "a", "b", expected=expected) == first
    again, fresh = await log.append([write(BUILD, event("a"), event("b"), expected=expected), write(OTHER, event("d"))])
    assert again == first
    assert isinstance(fresh, Appended)
    assert await log.head() == 4


async def test_a_write_of_which_only_a_part_is_known_is_a_conflict(log: EventLog) -> None:
    await append(log, BUILD, "a")
    assert await append(log, BUILD, "a", "b", expected=1) == Conflict(BUILD, 1)
    assert await log.head() == 1


async def test_an_event_id_of_another_stream_is_refused(log: EventLog) -> None:
    await append(log, BUILD, "a")
    with pytest.raises(ValueError, match="a"):
        await append(log, OTHER, "a")
    with pytest.raises(ValueError, match="a"):
        await log.append([write("build-3", event("x")), write(OTHER, event("a"))])
    assert await log.head() == 1


async def test_a_category_of_another_service_is_refused_and_the_whole_call_with_it(log: EventLog) -> None:
    with pytest.raises(NotOwner):
        await log.append([write(BUILD, event("a")), write("lease-1f", event("b"))])
    with pytest.raises(NotOwner):
        await append(log, "unheard-of", "c")
    assert await log.head() == 0


async def test_an_event_over_the_limit_is_refused_and_one_at_the_limit_is_not(log: EventLog) -> None:
    text = b'"' + b"x" * (MAX_EVENT - 2) + b'"'
    with pytest.raises(EventTooLarge):
        await log.append([write(BUILD, event("a", text + b" "))])
    (outcome,) = await log.append([write(BUILD, event("a", text))])
    assert isinstance(outcome, Appended)
    assert (await log.read(0, 1))[0].data == text


MALFORMED = {
    "stream twice": [write(BUILD, event("a")), write(BUILD, event("b"))],
    "id twice": [write(BUILD, event("a")), write(OTHER, event("a"))],
    "no events": [write(BUILD)],
    "no id": [write("build", event("a"))],
    "empty id": [write("build-", event("a"))],
    "no category": [write("-1", event("a"))],
    "version": [write(BUILD, event("a"), expected=-2)],
    "not JSON": [write(BUILD, event("a", b"{"))],
    "stream of two words": [write("build-1.f", event("a"))],
    "space in a stream": [write("build-1 f", event("a"))],
    "wildcard": [write("build-*", event("a"))],
    "long stream": [write("build-" + "x" * MAX_NAME, event("a"))],
    "no team": [structs.replace(write(BUILD, event("a")), team="")],
    "team of two words": [structs.replace(write(BUILD, event("a")), team="a.b")],
    "long actor": [structs.replace(write(BUILD, event("a")), actor="ü" * MAX_NAME)],
    "space in an id": [write(BUILD, event("a b"))],
    "long id": [write(BUILD, event("a" * (MAX_NAME + 1)))],
    "type of three words": [write(BUILD, NewEvent("a", "build.created.again", b"{}"))],
    "space in a type": [write(BUILD, NewEvent("a", "build created", b"{}"))],
}
"""The bus would not carry most of them."""


@pytest.mark.parametrize("writes", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_writes_are_refused(log: EventLog, writes: list) -> None:
    with pytest.raises(ValueError):
        await log.append(writes)
    assert await log.head() == 0


async def test_reading_goes_on_after_a_position_and_can_be_limited_to_categories(database: Database) -> None:
    memory = MemoryLog()
    async with open_postgres_log(database.url("postgres")) as postgres:
        for log in (memory, postgres):
            await log.append([write(s, event(f"{s}{n}")) for n, s in enumerate(["build-1", "lease-1", "build-2", "team-1", "build-3"])])
            assert [r.position for r in await log.read(2, 2)] == [3, 4]
            assert [r.stream for r in await log.read(0, 2, {"build"})] == ["build-1", "build-2"]
            assert [r.stream for r in await log.read(1, 9, {"team", "lease"})] == ["lease-1", "team-1"]
            assert await log.read(0, 9, set()) == []
            assert await log.read(5, 9) == []


async def test_a_follower_is_woken_by_an_append_and_only_once(log: EventLog) -> None:
    wakeup = log.wakeup()
    try:
        waiting = asyncio.create_task(wakeup.wait(30))
        await asyncio.sleep(0)
        await append(log, BUILD, "a")
        await asyncio.wait_for(waiting, 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wakeup.wait(30), 0.05)
    finally:
        wakeup.close()


async def test_an_append_while_nobody_waits_is_not_forgotten(log: EventLog) -> None:
    wakeup = log.wakeup()
    try:
        await append(log, BUILD, "a")
        await asyncio.wait_for(wakeup.wait(30), 5)
    finally:
        wakeup.close()


async def test_waiting_ends_at_its_timeout_and_says_so(log: EventLog) -> None:
    wakeup = log.wakeup()
    assert not await asyncio.wait_for(wakeup.wait(0.01), 5)
    wakeup.close()


async def test_a_wait_that_ends_before_its_linger_is_over_forgets_nothing(log: EventLog) -> None:
    patient, prompt = log.wakeup(frozenset(), 30.0), log.wakeup()
    await append(log, BUILD, "a")
    assert await prompt.wait(5.0)
    assert await patient.wait(0.0)
    assert not await patient.wait(0.0)
    patient.close()
    prompt.close()


async def test_twenty_writers_of_one_version_have_one_winner(log: EventLog) -> None:
    """FAULTS 71"""
    outcomes = await asyncio.gather(*(append(log, BUILD, f"e{n}", expected=NO_STREAM) for n in range(20)))
    assert sum(isinstance(outcome, Appended) for outcome in outcomes) == 1
    assert await log.head() == 1


async def test_large_groups_keep_their_order(log: EventLog) -> None:
    writes = [write(f"build-{n}", *(event(f"{n}.{k}") for k in range(3)), expected=NO_STREAM) for n in range(200)]
    outcomes = await log.append(writes)
    assert [o.position for o in outcomes if isinstance(o, Appended)] == [3 * n + 3 for n in range(200)]
    assert [r.event_id for r in await log.read(0, 1000)] == [f"{n}.{k}" for n in range(200) for k in range(3)]
