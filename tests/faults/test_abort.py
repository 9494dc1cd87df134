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


async def test_of_an_aborted_build_the_log_is_whole_to_its_last_words_and_says_so(system: System) -> None:
    """FAULTS 106: what the step had written, what it wrote when it was told to end, and the worker's mark between them."""
    script = "trap 'seq 1000; echo last words; exit 1' TERM; echo begin; while :; do sleep 0.05; done"
    async with Traffic(system) as traffic:
        build = await traffic.submit(Work("told to end", script, "aborted", 1))
        await eventually(lambda: says(traffic, build, "begin\n"))
        await traffic.client.abort(build.id)
        await traffic.ended()
        await eventually(lambda: is_complete(traffic, build), timeout=30)
        lines = [(line.stream, line.text) for line in (await traffic.client.log(build.id, limit=2000)).lines]
        assert [text for stream, text in lines if stream == "stdout"] == ["begin\n", *(f"{n}\n" for n in range(1, 1001)), "last words\n"]
        assert ("stderr", "penstock: interrupted: aborted\n") in lines


async def says(traffic: Traffic, build: Build, text: str) -> bool:
    return text in [line.text for line in (await traffic.client.log(build.id)).lines]


async def is_complete(traffic: Traffic, build: Build) -> bool:
    return (await traffic.client.log(build.id, start=10**9)).complete


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
