"""The gateway while what it stands on is away."""

import asyncio
import os
import signal
import time

import asyncpg

from libs.eventlog.migrate import role_of
from proto.events.build import BuildFinished
from tests.controls import eventually
from tests.gateway_fixture import PLAN, Gateway, Sse, running_gateway
from tests.postgres_fixture import TEMPLATE, Database, make_template, postgres_cluster


async def test_without_the_bus_builds_are_accepted_durably_and_watched(database, nats_server) -> None:
    """FAULTS 16"""
    async with running_gateway(database, nats_server.url) as gateway:
        nats_server.kill()
        try:
            build = (await gateway.submit())["id"]
            assert [event.type for event in await gateway.logs["builds"].read(0, 10, ["request"])] == ["build.requested"]
            async with gateway.call("GET", f"/teams/main/builds/{build}/events") as answer:
                events = Sse(answer)
                assert (await events.next())[2]["status"] == "pending"
                await gateway.record(f"build-{build}", BuildFinished(status="errored", error="gone"))
                assert (await events.next("end"))[2]["error"] == "gone"
            async with gateway.call("GET", f"/teams/main/builds/{build}/log", headers={"Accept": "application/json"}) as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        finally:
            nats_server.start()


async def test_the_gateway_starts_without_the_bus(database, nats_server) -> None:
    """FAULTS 16"""
    async with running_gateway(database, "nats://127.0.0.1:1") as gateway:
        assert (await gateway.submit())["number"] == 1


async def test_without_the_database_the_answer_is_503_within_5_seconds_and_afterwards_all_is_well(nats_server) -> None:
    """FAULTS 17: also for one whose token is not remembered; a submission that got no answer is repeated safely."""
    with postgres_cluster(settings={}) as cluster:
        await make_template(cluster)
        async with running_gateway(Database(cluster, TEMPLATE), nats_server.url) as gateway:
            viewer = await gateway.token("other", "viewer")
            first = await gateway.submit()
            os.kill(cluster.pid, signal.SIGQUIT)
            await eventually(lambda: not cluster.running())
            for method, path, token in [
                ("POST", "/teams/main/builds", None),
                ("GET", "/teams/main/builds/1", None),
                ("GET", "/teams/other/builds", viewer),
            ]:
                started = time.monotonic()
                await _unavailable(gateway, method, path, token)
                assert time.monotonic() - started < 5
            cluster.start()
            key = {"Idempotency-Key": "k"}
            await eventually(lambda: _accepted(gateway, key))
            again = await gateway.submit(headers=key)
            assert again["number"] == first["number"] + 1


async def _unavailable(gateway: Gateway, method: str, path: str, token: str | None) -> None:
    more = {"token": token} if token else {}
    async with gateway.call(method, path, **more, **({"json": {"plan": PLAN}} if method == "POST" else {})) as answer:
        assert answer.status == 503, await answer.text()
        assert answer.headers["Retry-After"] == "1"
        assert "Postgres" not in await answer.text()


async def _accepted(gateway: Gateway, key: dict[str, str]) -> bool:
    async with gateway.call("POST", "/teams/main/builds", headers=key, json={"plan": PLAN}) as answer:
        return answer.status == 202 and bool((await answer.json())["number"])


async def test_when_all_connections_are_at_work_the_answer_is_503_at_once(database, nats_server) -> None:
    """FAULTS 77: a lock that somebody holds keeps every connection of the gateway's pool busy; whoever comes then is told so, however many they are,
    and what needs no database is none the worse."""
    async with running_gateway(database, nats_server.url) as gateway:
        build = await gateway.submit()
        holder = await asyncpg.connect(database.url("postgres"))
        try:
            await holder.execute("BEGIN; LOCK TABLE gateway.builds IN ACCESS EXCLUSIVE MODE")
            crowd = [asyncio.create_task(_timed(gateway, "/teams/main/builds")) for _ in range(90)]
            answers = await asyncio.gather(*crowd)
            assert {status for status, _ in answers} == {503}
            assert max(seconds for _, seconds in answers) < 5
            # Each of the pool's six is at work for 2.4 s; nobody waits for one for longer than 1.2 s.
            assert sum(seconds < 2.4 for _, seconds in answers) >= 80
            assert (await _timed(gateway, "/info"))[0] == 200
        finally:
            await holder.close()
        await eventually(lambda: _listed(gateway, build["id"]))


async def test_when_the_database_takes_no_more_connections_the_answer_is_503_at_once(database, nats_server) -> None:
    """FAULTS 77: its own limit, for the gateway's role."""
    async with running_gateway(database, nats_server.url) as gateway:
        build = await gateway.submit()
        superuser = await asyncpg.connect(database.url("postgres"))
        role = role_of("gateway")
        try:
            await superuser.execute(f"ALTER ROLE {role} CONNECTION LIMIT 0")
            await superuser.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND datname = $2", role, database.name)
            for _ in range(3):
                for method in ("GET", "POST"):
                    started = time.monotonic()
                    await _unavailable(gateway, method, "/teams/main/builds", None)
                    assert time.monotonic() - started < 2
        finally:
            await superuser.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1")
            await superuser.close()
        await eventually(lambda: _listed(gateway, build["id"]))


async def _timed(gateway: Gateway, path: str) -> tuple[int, float]:
    started = time.monotonic()
    async with gateway.call("GET", path) as answer:
        await answer.read()
        return answer.status, time.monotonic() - started


async def _listed(gateway: Gateway, build: str) -> bool:
    async with gateway.call("GET", "/teams/main/builds") as answer:
        return answer.status == 200 and [item["id"] for item in (await answer.json())["items"]] == [build]


async def test_open_streams_end_when_the_gateway_drains(database, nats_server) -> None:
    async with asyncio.timeout(20):
        async with running_gateway(database, nats_server.url) as gateway:
            build = (await gateway.submit())["id"]
            watch = await gateway.call("GET", f"/teams/main/builds/{build}/events")
            everything = await gateway.call("GET", "/events")
            assert (await Sse(watch).next())[1] == "status"
            started = time.monotonic()
        assert time.monotonic() - started < 3
        watch.close()
        everything.close()
