"""200 workers stopped past their leases and resumed: 0 stale events."""

import asyncio
import itertools
import random
import signal
import time
from collections.abc import Iterator, Sequence

from penstock.up.processes import send
from proto.catalogue import TAGS
from proto.envelope import Fact
from proto.events.build import BuildFinished, StageFinished, StageQueued, StepFinished, StepProgressed, StepStarted
from proto.events.lease import LeaseExpired
from tests.bench.figures import Figure
from tests.controls import eventually
from tests.faults.system import LEASE_SECONDS, System
from tests.faults.traffic import Traffic
from tests.faults.work import Work, sleeping, talking
from tests.soak.options import Options, none, say
from tests.soak.outcomes import given_up
from tests.soak.system import Mate, fresh_system, mates

STOPS, MATES, SLOTS = 200, 8, 2
WORKS = (sleeping(LEASE_SECONDS), talking(60, 0.05), sleeping(2 * LEASE_SECONDS), talking(200, 0.001))
"""They end while their worker is stopped, write on, or are killed when it wakes."""
MOST = 60.0
"""Seconds until the leases of those that are stopped have expired."""


async def run(options: Options) -> list[Figure]:
    """In rounds: each stops half of the workers that have something, until they have lost it."""
    chance, until, wanted = options.chance("stops"), options.until(), options.many(STOPS, 3)
    names = [f"mate-{number}" for number in range(options.many(MATES, 3))]
    stops = 0
    with fresh_system(slots=SLOTS) as system:
        async with mates(system, names, SLOTS) as others, Traffic(system) as traffic:
            works = itertools.cycle(WORKS)
            while stops < wanted and time.monotonic() < until:
                having = await busy(system, traffic, others, works)
                stops += await stopped(system, having, chance)
                say(f"{stops} workers stopped and resumed, {len(traffic.accepted)} builds")
            builds = await traffic.ended(300)
            facts = await system.log()
            late = stale(facts)
            spent = given_up(facts)
            wrong = [why async for why in traffic.wrong({build: builds[build] for build in builds if build not in spent}, facts)]
            for why in (*late[:5], *wrong[:5]):
                say(why)
            await eventually(lambda: system.steps() == [], timeout=60)
    return [
        options.done("stops: workers stopped past a lease, and resumed", stops, STOPS),
        Figure("stops: builds", len(builds), ""),
        Figure("stops: attempts that were lost by it", sum(isinstance(fact.event, LeaseExpired) for fact in facts), ""),
        Figure("stops: builds given up, because all of their ten attempts were hit", len(spent), ""),
        none("stops: stale events", len(late)),
        none("stops: builds whose events, answer or log are wrong", len(wrong)),
    ]


async def leased(system: System) -> list[str]:
    """A worker's name for each lease there is."""
    database = await system.database()
    try:
        return [row["worker"] for row in await database.fetch("SELECT worker FROM gateway.leases")]
    finally:
        await database.close()


async def ended(system: System) -> int:
    """How many builds have."""
    database = await system.database()
    try:
        count: int = await database.fetchval("SELECT count(*) FROM eventlog.event WHERE type = $1", TAGS[BuildFinished])
        return count
    finally:
        await database.close()


async def busy(system: System, traffic: Traffic, others: Sequence[Mate], works: Iterator[Work]) -> list[Mate]:
    """Until most of them have something: builds come as long as slots are free, and few wait for one."""
    slots = SLOTS * (len(others) + 1)

    async def found() -> list[Mate]:
        leases = await leased(system)
        if len(leases) < slots and len(traffic.accepted) - await ended(system) < 2 * slots:
            await traffic.submit(next(works))
        having = [mate for mate in others if mate.name in leases]
        return having if len(having) > len(others) // 2 else []

    return await eventually(found, timeout=MOST)


async def stopped(system: System, having: Sequence[Mate], chance: random.Random) -> int:
    """Stop half of these; resume them when their leases are over. How many had one to lose."""
    before = len(await system.log("lease"))
    processes = {mate.name: mate.hit(signal.SIGSTOP) for mate in chance.sample(having, (len(having) + 1) // 2)}
    try:

        async def over() -> bool:
            return not processes.keys() & set(await leased(system))

        await eventually(over, timeout=MOST)
        expired = {fact.event.worker for fact in (await system.log("lease"))[before:] if isinstance(fact.event, LeaseExpired)}
        await asyncio.sleep(chance.uniform(0, LEASE_SECONDS))
    finally:
        for process in processes.values():
            send(process, signal.SIGCONT)
    return len(expired & processes.keys())


def stale(facts: Sequence[Fact]) -> list[str]:
    """Words on attempts that were over, or of which the lease had expired and another was queued."""
    current: dict[tuple[str, str], int] = {}
    over: set[tuple[str, str]] = set()
    found: list[str] = []
    for fact in facts:
        match fact.event:
            case StageQueued() as event:
                current[fact.subject_id, event.stage] = event.attempt
            case StepStarted() | StepProgressed() | StepFinished() | StageFinished() as event:
                place = fact.subject_id, event.stage
                if event.attempt != current[place] or place in over:
                    found.append(f"stale: {fact.position} {fact.stream} {event}")
                if isinstance(event, StageFinished):
                    over.add(place)
            case _:
                pass
    return found
