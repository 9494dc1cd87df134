"""Workers, and why builds wait, over HTTP, on real Postgres and NATS."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from libs.tokens import new_seed, public_key, sign
from proto.events.build import BuildCreated, StageQueued
from proto.events.fleet import WorkerDeleted, WorkerDrained, WorkerRegistered
from proto.events.lease import Candidate, StageDeferred, StageLeased
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import About, Attempt, Availability, Credit, Heartbeat, Offers, SlotsHeld, StagesWait, StageWaits, WhyWaiting
from proto.plan import Plan, Requirements
from services.gateway.routes import preparation
from tests.controls import eventually
from tests.gateway_fixture import PLAN, Gateway, running_gateway

SEED = new_seed()
OFFERS = Offers(tags=("gpu",), sandbox="bubblewrap")


@pytest.fixture
async def gateway(database, nats_server) -> AsyncIterator[Gateway]:
    async with running_gateway(database, nats_server.url, owners=("builds", "scheduler", "artifacts", "gateway")) as running:
        yield running


async def register(gateway: Gateway, name: str = "w1") -> None:
    await gateway.record(f"fleet-worker-{name}", WorkerRegistered(worker=name, key=public_key(SEED)), team="system")


async def boot(gateway: Gateway, name: str = "w1") -> None:
    await gateway.record(
        f"worker-{name}-b1", WorkerBooted(worker=name, boot="b1", since=1, slots=2, offers=OFFERS, about=About(version="7")), team="system"
    )


async def beat(gateway: Gateway, name: str = "w1", **more: Any) -> None:
    availability = Availability(challenge=b"", offers=OFFERS, credits=[Credit("n", b"k" * 32)])
    heartbeat = Heartbeat(boot="b1", since=1, number=1, slots=2, availability=availability, about=About(version="7", hostname="rack"), **more)
    assert gateway.bus is not None
    await gateway.bus.send(f"presence.{name}", msgspec.msgpack.encode(sign(SEED, "presence", msgspec.msgpack.encode(heartbeat))))


async def shown(gateway: Gateway, **wanted: object) -> dict[str, Any] | None:
    found: dict[str, Any] = await gateway.json("GET", "/workers/w1", 200)
    return found if all(found[key] == value for key, value in wanted.items()) else None


async def test_a_workers_life_is_shown(gateway: Gateway) -> None:
    await register(gateway)
    await eventually(lambda: _listed(gateway))
    new = await gateway.json("GET", "/workers/w1", 200)
    assert new["status"] == "idle"
    assert new["reason"] == "it was never heard of" and new["last_checked_in"] is None
    await boot(gateway)
    await eventually(lambda: shown(gateway, build_limit=2, version="7"))
    await beat(gateway)
    available = await eventually(lambda: shown(gateway, status="available"))
    assert available["last_checked_in"] and available["hostname"] == "rack" and available["routes"] == ["linux", "gpu"]
    await beat(gateway, limited="no images: the engine is gone")
    await eventually(lambda: shown(gateway, status="available", reason="no images: the engine is gone"))
    await beat(gateway, busy=2, cache_used=5, cache_limit=9)
    busy = await eventually(lambda: shown(gateway, status="busy"))
    assert (busy["slots_in_use"], busy["cache_used"], busy["cache_limit"]) == (2, 5, 9)
    await beat(gateway, trouble="disk full: 3 MiB free")
    await eventually(lambda: shown(gateway, status="error", reason="disk full: 3 MiB free"))
    await beat(gateway)
    await gateway.record("fleet-worker-w1", WorkerDrained(reason="a new disk"), team="system")
    await eventually(lambda: shown(gateway, status="draining", reason="a new disk", active=False))
    await gateway.record("worker-w1-b1", WorkerLost(worker="w1", boot="b1", reason="silent"), team="system")
    await eventually(lambda: shown(gateway, status="lost"))
    await gateway.record("fleet-worker-w1", WorkerDeleted(), team="system")
    await eventually(lambda: _absent(gateway))
    assert (await gateway.json("GET", "/workers", 200))["items"] == []


async def _listed(gateway: Gateway) -> bool:
    return [worker["name"] for worker in (await gateway.json("GET", "/workers", 200))["items"]] == ["w1"]


async def _absent(gateway: Gateway) -> bool:
    async with gateway.call("GET", "/workers/w1") as answer:
        return bool(answer.status == 404)


async def test_workers_are_listed_by_name_in_pages(gateway: Gateway) -> None:
    for name in ("c", "a", "b"):
        await register(gateway, name)
    await eventually(lambda: _count(gateway, 3))
    first = await gateway.json("GET", "/workers?limit=2", 200)
    second = await gateway.json("GET", f"/workers?limit=2&cursor={first['next']}", 200)
    assert [worker["name"] for page in (first, second) for worker in page["items"]] == ["a", "b", "c"]
    assert second["next"] is None
    assert (await gateway.json("GET", "/workers?cursor=%00", 422))["path"] == "cursor"
    async with gateway.call("GET", "/workers", token=None) as answer:
        assert answer.status == 401


async def _count(gateway: Gateway, number: int) -> bool:
    return len((await gateway.json("GET", "/workers", 200))["items"]) == number


async def test_a_heartbeat_that_its_worker_did_not_sign_is_not_shown(gateway: Gateway) -> None:
    await register(gateway)
    await boot(gateway)
    await eventually(lambda: shown(gateway, version="7"))
    assert gateway.bus is not None
    await gateway.bus.send("presence.w1", b"\xc1")
    await beat(gateway, "w2")
    await beat(gateway)
    await eventually(lambda: shown(gateway, status="available"))
    await gateway.bus.send("presence.w1", msgspec.msgpack.encode(sign(new_seed(), "presence", b"")))
    await eventually(lambda: shown(gateway, last_checked_in=None))


async def test_another_teams_builds_are_only_counted(gateway: Gateway) -> None:
    await register(gateway)
    await boot(gateway)
    other = await gateway.token("other")
    mine, theirs = (await gateway.submit())["id"], (await gateway.submit(team="other", token=other))["id"]
    for build, team in ((mine, "main"), (theirs, "other")):
        await gateway.record(f"build-{build}", StageQueued(stage="main", attempt=1, requirements=Requirements()), team=team)
        await gateway.record(f"lease-{build}", StageLeased(stage="main", attempt=1, worker="w1", boot="b1", credit="c"), team=team)
    await eventually(lambda: _running(gateway, 2))
    seen = await gateway.json("GET", "/workers/w1", 200, token=other)
    assert ([build["id"] for build in seen["running_builds"]], seen["other_builds"], seen["hostname"]) == ([theirs], 1, "")


async def _running(gateway: Gateway, number: int) -> bool:
    return len((await gateway.json("GET", "/workers/w1", 200))["running_builds"]) == number


async def waiting(gateway: Gateway) -> str:
    """A build that is deferred."""
    build: str = (await gateway.submit())["id"]
    queued = StageQueued(stage="main", attempt=1, requirements=Requirements())
    await gateway.record(f"build-{build}", BuildCreated(plan=msgspec.convert(PLAN, Plan)), queued)
    await gateway.record(f"lease-{build}", StageDeferred(stage="main", attempt=1, reason="no worker offers docker", refused={"docker": 3}))
    return build


async def test_without_a_scheduler_what_was_recorded_is_told_soon(gateway: Gateway) -> None:
    build = await waiting(gateway)
    async with asyncio.timeout(preparation.PATIENCE + 3):
        told = await gateway.json("GET", f"/teams/main/builds/{build}/preparation", 200)
    (stage,) = told["stages"]
    assert (stage["state"], stage["reason"], stage["refused"], stage["live"]) == ("queued", "no worker offers docker", {"docker": 3}, False)
    assert (await gateway.json("GET", "/teams/main/builds/99/preparation", 404))["detail"] == "there is no build `99`"
    other = await gateway.token("other")
    await gateway.json("GET", f"/teams/main/builds/{build}/preparation", 404, token=other)


async def test_what_a_scheduler_says_is_told_with_the_teams_builds_by_number(gateway: Gateway) -> None:
    build, ahead = await waiting(gateway), (await gateway.submit())["id"]

    async def answer(subject: str, question: bytes) -> bytes:
        (attempt,) = msgspec.msgpack.decode(question, type=WhyWaiting).attempts
        assert (subject, attempt) == (f"why.{build}", Attempt(build, "main", 1))
        holders = [SlotsHeld(worker="w1", slots=2, offered=0, own=[Attempt(ahead, "main", 1)], others=1)]
        own = [Attempt(ahead, "main", 1)]
        waits = StageWaits(attempt=attempt, requires=["platform linux"], ahead=3, more=False, own=own, able=1, holders=holders)
        return msgspec.msgpack.encode(StagesWait(stages=[waits]))

    assert gateway.bus is not None
    async with gateway.bus.answering("why.*", "scheduler", answer):
        (stage,) = (await gateway.json("GET", f"/teams/main/builds/{build}/preparation", 200))["stages"]
    assert (stage["live"], stage["ahead"], stage["ahead_builds"], stage["able"]) == (True, 3, [{"build": 2, "stage": "main"}], 1)
    assert stage["holders"] == [{"worker": "w1", "slots": 2, "offered": 0, "builds": [2], "others": 1}]


async def test_why_a_stage_runs_where_it_runs(gateway: Gateway) -> None:
    build = await waiting(gateway)
    leased = StageLeased(stage="main", attempt=1, worker="w1", boot="b1", credit="c", why=[Candidate(worker="w1", load=0.5, missing=7)])
    await gateway.record(f"lease-{build}", leased)
    (stage,) = (await gateway.json("GET", f"/teams/main/builds/{build}/preparation", 200))["stages"]
    assert (stage["state"], stage["worker"], stage["why"]) == ("leased", "w1", [{"worker": "w1", "load": 0.5, "missing": 7}])
