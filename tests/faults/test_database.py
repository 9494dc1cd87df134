"""The database goes away, hangs, is blocked, or loses its read models."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import COPYING, FAILING, INSTANT, talking


def ask(system: System, method: str, path: str, body: object = None) -> tuple[int, Any, float]:
    """Status, body, and the seconds it took; asked once."""
    headers = {"Authorization": f"Bearer {system.token}", "Content-Type": "application/json", "Idempotency-Key": str(time.monotonic_ns())}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{system.url}/api/v1{path}", data=data, headers=headers, method=method)
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response), time.monotonic() - began
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), time.monotonic() - began


@pytest.mark.parametrize("how", ["down", "hanging"])
async def test_without_the_database_the_answer_is_503_within_5_s(system: System, how: str) -> None:
    """FAULTS 17; and once it is back all goes on by itself."""
    async with Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        await traffic.ended()
        post = ("POST", "/teams/main/builds", {"plan": INSTANT.plan(system.mark)})
        requests = [("GET", "/teams/main/builds", None), ("GET", "/teams/main/builds/1", None), post, post]
        before = system.process("postgres")
        with system.without("postgres") if how == "down" else system.hanging("postgres"):
            for method, path, body in requests:
                status, problem, seconds = await asyncio.to_thread(ask, system, method, path, body)
                assert (status, problem["type"]) == (503, "urn:penstock:problem:unavailable"), (method, path, problem)
                assert seconds < 5, (method, path, seconds)
        if how == "down":
            await system.back("postgres", before)
        await system.ready()
        # What was answered 503 may have been recorded or not, but nothing is half done: it is a build that ends, or none.
        for build in [build async for build in traffic.client.builds()]:
            traffic.accepted.setdefault(build.id, INSTANT)
        await traffic.submit(INSTANT)
        await traffic.verify()


async def test_an_idle_transaction_that_holds_the_log_is_ended(system: System) -> None:
    """FAULTS 70: a client of the log stops in the middle of a transaction that has appended; everyone waits 10 s at most, nothing is lost."""
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            connection = await system.database("builds")
            await connection.execute("BEGIN")
            await connection.fetch(
                "SELECT * FROM eventlog.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
                *(["build-idle"], [0], ["main"], ["c"], ["c"], ["idle"], [1], ["idle-1"], ["build.created"], ["{}"]),
            )
            began = time.monotonic()
            await eventually(connection.is_closed, timeout=15)
            assert time.monotonic() - began > 5
        assert not [fact for fact in await system.log("build") if fact.stream == "build-idle"]
        await traffic.verify()


async def test_a_dropped_projection_is_rebuilt_identically(system: System) -> None:
    """FAULTS 78: while the gateway runs, and while it does not."""
    async with Traffic(system) as traffic:
        for work in (INSTANT, FAILING, COPYING, talking(20, 0.01), INSTANT):
            await traffic.submit(work)
        await traffic.verify()
        before = await answers(system, traffic)
        for restart in (True, False):
            connection = await system.database()
            await connection.execute("DROP TABLE gateway.builds, gateway.artifacts, gateway.teams, gateway.tokens")
            await connection.close()
            if restart:
                await system.back("gateway", system.kill("gateway"))
            await eventually(lambda: rebuilt(system, traffic, before), timeout=20)
        await traffic.submit(INSTANT)
        await traffic.verify()


async def answers(system: System, traffic: Traffic) -> list[tuple[int, Any]]:
    """What the API says of everything."""
    paths = ["/info", "/teams/main/builds", "/teams/main/user-artifacts", *(f"/teams/main/builds/{build}" for build in traffic.accepted)]
    return [(await asyncio.to_thread(ask, system, "GET", path))[:2] for path in paths]


async def rebuilt(system: System, traffic: Traffic, before: list[tuple[int, Any]]) -> bool:
    now = await answers(system, traffic)
    for then, again in zip(before, now, strict=True):
        assert again in (then, (503, again[1])), "an answer is the right one, or there is none yet"
    return now == before
