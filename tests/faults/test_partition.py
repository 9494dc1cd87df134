"""A worker whose network is cut, by the kernel and without a word, while it runs builds (FAULTS 45, 66)."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from penstock.client import Build, Conflict
from proto.events.build import StageQueued
from proto.events.lease import LeaseExpired, StageLeased
from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.network import Network, network
from tests.faults.processes import Process, concerned
from tests.faults.system import LEASE_SECONDS, System
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, Work, sleeping, talking
from tests.faults.workers import registered, worker_process

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are root's to make")


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


@asynccontextmanager
async def far_worker(system: System, net: Network) -> AsyncIterator[None]:
    """A worker in a network of its own, which gets the next build: the near one's only slot is taken for as long as it takes."""
    async with Traffic(system) as near:
        busy = await near.submit(Work("busy", "sleep 600", "aborted", None))
        await eventually(lambda: is_at(near, busy, "local"))
        async with worker_process(system, await registered(system, "far"), ("ip", "netns", "exec", net.away), slots=1):
            try:
                yield
            finally:
                net.heal()
                with suppress(Conflict):
                    await near.client.abort(busy.id)


async def is_at(traffic: Traffic, build: Build, worker: str) -> bool:
    found = await traffic.client.build(build.id)
    return found.stages[0].worker == worker and found.stages[0].steps[0].status == "started"


async def free_the_near_one(traffic: Traffic) -> None:
    async for build in traffic.client.builds():
        if build.name == "busy":
            await traffic.client.abort(build.id)


async def test_a_worker_that_is_cut_off_for_less_than_its_lease_goes_on(start: Start, net: Network) -> None:
    """Its one attempt succeeds, and its log, some of which was written into the cut, is whole."""
    system = start(host=net.host, slots=1)
    work = talking(60, 0.1)
    async with far_worker(system, net), Traffic(system) as traffic:
        build = await traffic.submit(work)
        await eventually(lambda: is_at(traffic, build, "far"), timeout=20)
        net.cut()
        await asyncio.sleep(LEASE_SECONDS / 4)
        net.heal()
        await traffic.ended()
        assert (await traffic.client.build(build.id)).stages[0].attempt == 1
        assert [fact for fact in await system.log("lease") if isinstance(fact.event, LeaseExpired)] == []
        await eventually(lambda: traffic._verify_log(build.id), timeout=30)
        traffic.verify_events(build.id, await system.log())


@pytest.mark.parametrize(
    "work", [Work("endless", "echo begin; sleep 600", "aborted", None, ("begin\n",)), sleeping(LEASE_SECONDS * 2)], ids=["runs on", "ends in the cut"]
)
async def test_a_worker_that_is_cut_off_for_longer_kills_its_own_work_first(start: Start, net: Network, work: Work) -> None:
    """By the time that the attempt is another's, what the first one ran is dead, though nobody could tell its worker; and what that says when it is
    back, also the end of an attempt that ended in the cut, changes nothing."""
    system = start(host=net.host, slots=1)
    async with far_worker(system, net), Traffic(system) as traffic:
        build = await traffic.submit(work)
        await eventually(lambda: is_at(traffic, build, "far"), timeout=20)
        assert steps_of_the_far_one(system)
        net.cut()
        alive: list[bool] = []

        async def queued_again() -> bool:
            running = bool(steps_of_the_far_one(system))
            again = [fact for fact in await system.log(f"build-{build.id}") if isinstance(fact.event, StageQueued) and fact.event.attempt == 2]
            if again:
                alive.append(running)
            return bool(again)

        await eventually(queued_again, timeout=10 * LEASE_SECONDS)
        assert alive == [False], "the old attempt still ran when the new one was queued"
        await free_the_near_one(traffic)
        await eventually(lambda: is_at(traffic, build, "local"), timeout=20)
        before = await system.log(f"build-{build.id}")
        net.heal()
        await eventually(lambda: knows(system, "far"), timeout=30)
        if work.status == "aborted":
            assert await system.log(f"build-{build.id}") == before, "what the far one said, late"
            await traffic.client.abort(build.id)
        await traffic.ended()
        assert (await traffic.client.build(build.id)).stages[0].attempt == 2
        await eventually(lambda: traffic._verify_log(build.id), timeout=30)
        facts = await system.log()
        traffic.verify_events(build.id, facts)
        leases = [fact.event.worker for fact in facts if fact.stream == f"lease-{build.id}" and isinstance(fact.event, StageLeased)]
        assert leases == ["far", "local"]
        # and it is a worker like any other again
        again = await traffic.submit(INSTANT)
        await traffic.ended()
        traffic.verify_events(again.id, await system.log())


def steps_of_the_far_one(system: System) -> list[Process]:
    return concerned(str(system.home / "far" / "work"))


async def knows(system: System, worker: str) -> bool:
    """The worker is heard again."""
    async with system.client() as client:
        return (await client.worker(worker)).status in ("available", "busy")
