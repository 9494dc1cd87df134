"""From a submission to the step's start and to the build's end, on an idle system."""

import asyncio
import time
from datetime import datetime

from tests.bench.figures import Figure, Goal, percentile
from tests.bench.http import Connection
from tests.bench.system import System
from tests.bench.work import task

PAUSE = 0.05
SHARES = (0.5, 0.95, 0.99)


async def latency(system: System, label: str, builds: int, p50: Goal | None, p95: Goal | None) -> list[Figure]:
    """One build at a time, with pauses. The task prints its own clock, the first thing it does."""
    path = f"/api/v1/teams/{system.team}/builds"
    connection = await Connection(system.url, system.token).open()
    sent: list[float] = []
    answered: list[float] = []
    ended: list[dict[str, str]] = []
    for _ in range(builds + 3):
        await asyncio.sleep(PAUSE)
        sent.append(time.time())
        ended.append(await connection.json("POST", path, task("date", "+%s%N"), {"Prefer": "wait=60"}))
        answered.append(time.time())
    stamps = [await _stamp(connection, f"{path}/{build['id']}/log") for build in ended]
    leased = [await _leased(connection, f"{path}/{build['id']}/preparation") for build in ended]
    connection.close()
    assert all(build["status"] == "succeeded" for build in ended), ended
    taken = {
        "the child's clock": stamps,
        "StepStarted recorded": [_seconds(build["started_at"]) for build in ended],
        "BuildFinished recorded": [_seconds(build["finished_at"]) for build in ended],
        "answer to `Prefer: wait`": answered,
    }
    figures: list[Figure] = []
    for name, times in taken.items():
        # The first ones warm up.
        delays = [(at - began) * 1000 for began, at in zip(sent, times, strict=True)][3:]
        goals = {0.5: p50, 0.95: p95} if times is stamps else {}
        figures += [Figure(f"submit → {name}, {label}, p{share * 100:.0f}", percentile(delays, share), "ms", goals.get(share)) for share in SHARES]
    spawned = [(at - began) * 1000 for began, at in zip(leased, stamps, strict=True)][3:]
    return [
        *figures,
        *(Figure(f"lease recorded → the child's clock, {label}, p{share * 100:.0f}", percentile(spawned, share), "ms") for share in SHARES),
    ]


async def _leased(connection: Connection, path: str) -> float:
    """When the only stage was given to its worker."""
    (stage,) = (await connection.json("GET", path))["stages"]
    return _seconds(stage["leased_at"])


async def _stamp(connection: Connection, path: str) -> float:
    """The one line of digits in a log."""
    status, text = await connection.request("GET", path)
    assert status == 200, f"{path}: {status} {text!r}"
    return next(int(line) / 1e9 for line in text.split(b"\n") if line.isdigit())


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
