"""1,000 random faults during 500 builds: 0 accepted builds lost, 0 second terminal events, 0 orphans 60 s later."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from tests.bench.figures import Figure
from tests.faults.proxy import Proxy
from tests.faults.storage import nothing_but_what_lives, nothing_of_attempts
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import MIX
from tests.soak.faults import ENDLESS, LEASE_SECONDS, Faults
from tests.soak.options import Options, none, say
from tests.soak.outcomes import ends_of, given_up
from tests.soak.system import Mate, fresh_system, mates

FAULTS, BUILDS = 1000, 500
PACE = 1.0
"""Seconds from one fault to the next, on average."""
AHEAD = 40
"""Builds by which either may be ahead of the other, in all."""
END_SECONDS = 300.0
"""After the last fault, until every build has ended: the last ones of many."""


async def run(options: Options) -> list[Figure]:
    """Faults and builds come at once, in proportion; then all is accounted for."""
    chance, until = options.chance("chaos"), options.until()
    pace = 0.4 if options.smoke else PACE
    wanted, builds = options.many(FAULTS, 10), options.many(BUILDS, 12)
    async with AsyncExitStack() as stack:
        system = stack.enter_context(fresh_system(lease=LEASE_SECONDS))
        front = stack.enter_context(Proxy(int(system.url.rpartition(":")[2])))
        bus = stack.enter_context(Proxy(system.ports.nats))
        others = await stack.enter_async_context(mates(system, ["second", "third"], 3, f"nats://127.0.0.1:{bus.port}"))
        system.url = f"http://127.0.0.1:{front.port}"
        traffic = await stack.enter_async_context(Traffic(system))
        faults = Faults(system, traffic, others, front, bus, chance)

        async def submit() -> None:
            works = itertools.cycle([*MIX, ENDLESS])
            while len(traffic.accepted) < builds:
                if len(traffic.accepted) > faults.struck.total() * builds / wanted + AHEAD / 2:
                    await asyncio.sleep(0.1)
                    continue
                await traffic.submit(next(works))

        submitting = asyncio.create_task(submit())
        began = time.monotonic()
        while faults.struck.total() < wanted and time.monotonic() < until and not (submitting.done() and submitting.exception()):
            if len(traffic.accepted) < faults.struck.total() * builds / wanted - AHEAD / 2:
                await asyncio.sleep(0.1)  # so that there is somebody to hurt
                continue
            await faults.strike()
            if faults.struck.total() % 50 == 0:
                say(f"{faults.struck.total()} faults, {len(traffic.accepted)} builds, {time.monotonic() - began:.0f} s")
            await asyncio.sleep(chance.uniform(0, 2 * pace))
        await faults.over()
        if time.monotonic() >= until:
            submitting.cancel()
        await asyncio.wait([submitting])
        if not submitting.cancelled():
            submitting.result()
        await faults.abort_the_rest()
        for kind, count in faults.struck.most_common():
            say(f"  {count:>4} × {kind}")
        figures = [options.done("chaos: random faults", faults.struck.total(), FAULTS), options.done("chaos: builds", len(traffic.accepted), BUILDS)]
        return figures + await accounted(system, traffic, others, options)


async def accounted(system: System, traffic: Traffic, others: Sequence[Mate], options: Options) -> list[Figure]:
    """What became of everything. What is wrong is said in full."""
    await system.ready()
    try:
        await traffic.ended(END_SECONDS)
    except AssertionError as error:
        say(str(error))
    facts = await system.log()
    ends = ends_of(facts)
    spent = given_up(facts)
    lost = [build for build, work in traffic.accepted.items() if work.status not in ends.get(build, ()) and build not in spent]
    twice = [build for build, statuses in ends.items() if len(statuses) > 1]
    ended = {build: await traffic.client.build(build) for build in traffic.accepted if build in ends and build not in spent}
    wrong = [why async for why in traffic.wrong(ended, facts)]
    for why in wrong[:5]:
        say(why)
    await asyncio.sleep(options.many(60, 5))
    orphans = system.steps()
    for process in orphans:
        say(f"left behind: {process}")
    left = 0
    for check in (
        nothing_of_attempts(system),
        *(nothing_of_attempts(system, mate.folder, mate.process.pid) for mate in others if mate.process),
        nothing_but_what_lives(system, traffic.client),
    ):
        try:
            await check
        except AssertionError as error:
            left += 1
            say(f"left behind: {error}")
    broken = system.broken_services()
    for what in broken:
        say(what)
    figures = [
        Figure("chaos: builds given up, because all of their ten attempts were hit", len(spent), ""),
        none("chaos: accepted builds lost", len(lost)),
        none("chaos: builds with a second end", len(twice)),
        none("chaos: builds whose events, answer, log or outputs are wrong", len(wrong)),
        none("chaos: processes left a minute later", len(orphans)),
        none("chaos: workers and stores with mounts, folders or files left", left),
        none("chaos: services that ended by themselves", len(broken)),
    ]
    for figure in figures:
        say(f"{figure.name}: {figure.measured:g}")
    return figures
