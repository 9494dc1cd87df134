"""Aborts, at every moment of a build's life."""

import asyncio
import random

from penstock.client import Build, Conflict
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import Work, sleeping


async def test_an_abort_that_races_the_end_leaves_one_end(system: System) -> None:
    """FAULTS 14, 15: 60 builds of 50 ms, each aborted some time in its life. Refused (409) is only what had ended by itself; either way there is
    one end, and it is the last event."""
    chance = random.Random(15)
    statuses: list[str] = []
    async with Traffic(system) as traffic:

        async def race(build: Build, moment: float) -> None:
            await asyncio.sleep(moment)
            try:
                await traffic.client.abort(build.id)
                refused = False
            except Conflict:
                refused = True
            ended = await traffic.client.wait(build.id)
            statuses.append(ended.status)
            assert ended.status in (("succeeded",) if refused else ("succeeded", "aborted"))
            traffic.accepted[build.id] = Work("raced", "", ended.status)

        for _ in range(15):
            builds = [await traffic.submit(sleeping(0.05)) for _ in range(4)]
            await asyncio.gather(*(race(build, chance.uniform(0, 0.25)) for build in builds))
        assert {"succeeded", "aborted"} == set(statuses), "both sides won some of the time"
        facts = await system.log()
        for build in traffic.accepted:
            traffic.verify_events(build, facts)
        await eventually(lambda: system.steps() == [])


async def test_an_abort_is_carried_out_whoever_dies_meanwhile(system: System) -> None:
    """The wish is recorded before it is answered: killed in turn are builds, scheduler and the bus."""
    async with Traffic(system) as traffic:
        for name in ("builds", "scheduler", "nats"):
            build = await traffic.submit(Work("endless", "sleep 60", "aborted"))
            await traffic.under_way()
            before = system.kill(name)
            await traffic.client.abort(build.id)
            await system.back(name, before)
            await traffic.ended()
            await eventually(lambda: system.steps() == [], timeout=20)
        facts = await system.log()
        for build_id in traffic.accepted:
            traffic.verify_events(build_id, facts)
