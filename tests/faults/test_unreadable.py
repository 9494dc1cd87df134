"""Events that nobody can read are in the log, as from a newer version or after a mistake: whoever folds it stands still there and says so, and all
the rest goes on."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from penstock.client import Build, Client
from proto.catalogue import CATEGORIES, TAGS, decode
from proto.events.build import BuildFinished
from proto.events.lease import StageLeased
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.test_database import ask
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, sleeping

INSERT = """
INSERT INTO eventlog.event (position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at)
SELECT (SELECT max(position) FROM eventlog.event) + n, split_part(tag, ' ', 1) || '-unreadable', n, 'unreadable-' || n, split_part(tag, ' ', 2), '{}',
    'main', 'c', 'c', 'test', clock_timestamp()
FROM unnest($1::text[]) WITH ORDINALITY AS t (tag, n)
"""
MEND = """
ALTER TABLE eventlog.event DISABLE TRIGGER append_only;
DELETE FROM eventlog.event WHERE stream LIKE '%-unreadable';
ALTER TABLE eventlog.event ENABLE ALWAYS TRIGGER append_only;
"""
FOLDING = {"gateway": "projection", "builds": "projection", "artifacts": "projection", "scheduler": "board"}


def unreadable() -> list[str]:
    """`category tag` of each event that must have some data, and of one that is of tomorrow."""
    found = ["build build.of_tomorrow"]
    for category in CATEGORIES:
        for event in category.events:
            with suppress(msgspec.ValidationError):
                decode(TAGS[event], b"{}")
                continue
            found.append(f"{category.name} {TAGS[event]}")
    return found


def asked(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def stands_still(system: System, name: str) -> str | None:
    """What a service that is ready says of the event that it cannot take."""
    status, said = await asyncio.to_thread(asked, f"http://{system.run().status[name]}/readyz")
    assert status == 200, said
    why: str | None = json.loads(said).get(FOLDING[name])
    _, metrics = await asyncio.to_thread(asked, f"http://{system.run().status[name]}/metrics")
    assert ("\npenstock_projection_stuck 0.0\n" in metrics) == (why is None), why
    return why


async def stale(system: System, path: str) -> str | None:
    """The header that says how old what the gateway shows is."""
    request = urllib.request.Request(f"{system.url}/api/v1{path}", headers={"Authorization": f"Bearer {system.token}"})

    def header() -> str | None:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.headers["Penstock-Stale"]

    return await asyncio.to_thread(header)


@asynccontextmanager
async def watching(client: Client, build: Build) -> AsyncIterator[None]:
    """Somebody has the build's page open all the time."""

    async def watch() -> None:
        async for _ in client.events(build.id):
            pass

    task = asyncio.create_task(watch())
    try:
        yield
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_events_that_nobody_can_read_stop_what_shows_them_and_nothing_else(system: System) -> None:
    """What runs is finished, what is asked for is accepted, what is shown is what was; when they can be read, or are gone, all goes on by itself."""
    services = {name: system.process(name) for name in FOLDING}
    database = await system.database()
    async with Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        await traffic.ended()
        assert await stale(system, "/teams/main/builds") is None
        running = await traffic.submit(sleeping(4))
        async with watching(traffic.client, running):
            await traffic.under_way()
            async with database.transaction():
                await database.execute("SELECT pg_advisory_xact_lock(x'70656e73746f636b'::bigint)")
                before = await database.fetchval("SELECT max(position) FROM eventlog.event")
                await database.execute(INSERT, unreadable())
            await database.execute("SELECT pg_notify('eventlog', 'build')")
            for name in FOLDING:
                why = await eventually(lambda name=name: stands_still(system, name))
                assert why is not None and "-unreadable) cannot be projected" in why

            async def finished() -> bool:
                return any(isinstance(fact.event, BuildFinished) for fact in await system.log(f"build-{running.id}"))

            await eventually(finished, timeout=20)
            assert await stale(system, "/teams/main/builds") == str(before)
            status, listed, _ = await asyncio.to_thread(ask, system, "GET", "/teams/main/builds")
            assert (status, [build["number"] for build in listed["items"]]) == (200, [2, 1])
            assert (await asyncio.to_thread(ask, system, "GET", "/teams/main/builds/99"))[0] == 503, "it may only not be shown"
            waiting = await traffic.submit(INSTANT)
            assert not [fact for fact in await system.log(f"lease-{waiting.id}") if isinstance(fact.event, StageLeased)]
            await database.execute(MEND)
            for name in FOLDING:
                await eventually(lambda name=name: goes_on(system, name), timeout=20)
        await traffic.verify()
    await database.close()
    assert await stale(system, "/teams/main/builds") is None
    assert {name: system.process(name) for name in services} == services
    leases = [fact.event.attempt for fact in await system.log(f"lease-{running.id}") if isinstance(fact.event, StageLeased)]
    assert leases == [1], "what ran was left alone"


async def test_an_event_that_the_bus_cannot_carry_stops_no_build_and_is_told_until_it_is_gone(system: System) -> None:
    """FAULTS 65: as somebody put it into the log by hand, for the log itself takes none such."""
    database = await system.database()

    async def unpublished() -> str | None:
        status, said = await asyncio.to_thread(asked, f"http://{system.run().status['builds']}/readyz")
        assert status == 200, said
        why: str | None = json.loads(said).get("unpublished")
        return why

    async with Traffic(system) as traffic:
        async with database.transaction():
            await database.execute("SELECT pg_advisory_xact_lock(x'70656e73746f636b'::bigint)")
            await database.execute(INSERT.replace("-unreadable'", "-no subject'").replace("'{}'", """'{"name": "x"}'"""), ["team team.created"])
        await traffic.submit(INSTANT)
        await traffic.ended()
        why = await eventually(unpublished)
        assert why is not None and "(team.created on team-no subject: not a " in why
        _, metrics = await asyncio.to_thread(asked, f"http://{system.run().status['builds']}/metrics")
        assert "\npenstock_relay_left_out 1.0\n" in metrics
        await database.execute(MEND.replace("-unreadable'", "-no subject'"))

        async def told_no_more() -> bool:
            return await unpublished() is None

        await eventually(told_no_more, timeout=20)
        await traffic.submit(INSTANT)
        await traffic.ended()
        await traffic.verify()
    await database.close()


async def goes_on(system: System, name: str) -> bool:
    return await stands_still(system, name) is None
