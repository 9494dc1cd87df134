"""kill -9 × 100 of nats-server under traffic, and of Postgres in between: 0 builds lost, 0 doubled (FAULTS 57, 69).

`python -m tests.soak.kills [--rounds N] [--seed S]`."""

import asyncio
import random
import signal
import sys
import time
from collections import Counter

from tests.bench.figures import Figure
from tests.faults.traffic import Traffic
from tests.faults.work import MIX
from tests.soak.options import Options, none, say
from tests.soak.rounds import alone
from tests.soak.system import fresh_system

ROUNDS = 100
END_SECONDS = 120.0
FEW = 4
"""Kills, after which the builds so far are let end."""
ALSO = 0.3
"""So often Postgres dies, too: before the bus, after it, or in the same moment."""


async def run(options: Options) -> list[Figure]:
    figures = await kills(options.many(ROUNDS, 2), options.chance("kills"), options.until())
    return [options.done(figures[0].name, int(figures[0].measured), ROUNDS), *figures[1:]]


async def kills(rounds: int, chance: random.Random, until: float) -> list[Figure]:
    struck: Counter[str] = Counter()
    wrong, longest = 0, 0.0
    with fresh_system() as system:
        async with Traffic(system) as traffic:
            while struck["nats"] < rounds and time.monotonic() < until:
                submitting = asyncio.create_task(_some(traffic, chance))
                await traffic.under_way()
                await asyncio.sleep(chance.uniform(0, 0.5))
                names = chance.sample(["nats", "postgres"], 2) if chance.random() < ALSO else ["nats"]
                before = {}
                for name in names:
                    before[name] = system.kill(name, signal.SIGKILL)
                    struck[name] += 1
                    await asyncio.sleep(chance.choice((0, 0, 0.2)))
                began = time.monotonic()
                for name, process in before.items():
                    await system.back(name, process)
                longest = max(longest, time.monotonic() - began)
                await submitting
                if struck["nats"] % FEW == 0:  # a build may be tried ten times only
                    await traffic.ended(END_SECONDS)
                if struck["nats"] % 10 == 0:
                    say(f"{struck['nats']} kills of the bus, {struck['postgres']} of the database, {len(traffic.accepted)} builds")
            builds = await traffic.ended(END_SECONDS)
            async for what in traffic.wrong(builds, await system.log()):
                say(what)
                wrong += 1
    return [
        Figure("kills of the bus", struck["nats"], ""),
        Figure("kills of the database in between", struck["postgres"], ""),
        Figure("builds meanwhile", len(builds), ""),
        Figure("the longest until all was ready again", longest, "s"),
        none("builds lost, doubled or wrong", wrong),
    ]


async def _some(traffic: Traffic, chance: random.Random) -> None:
    for work in chance.sample(MIX, 4):
        await traffic.submit(work)


if __name__ == "__main__":
    sys.exit(alone("kills", "Kill the bus of a system that runs builds, again and again, and the database in between.", ROUNDS, kills))
