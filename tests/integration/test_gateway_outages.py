"""The gateway while what it stands on is away."""

import asyncio
import os
import signal
import time

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
