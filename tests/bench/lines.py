"""Log lines from one step to a client that watches."""

import time
from collections.abc import AsyncIterator

import msgspec

from tests.bench.figures import Figure, at_least, at_most, percentile
from tests.bench.http import Connection
from tests.bench.system import System
from tests.bench.work import task


class _Log(msgspec.Struct, frozen=True):
    stream: str
    text: str


async def lines(system: System, count: int, single: int) -> list[Figure]:
    """A flood, then lines one at a time."""
    return [
        Figure(f"log lines from a step to an SSE client ({count:,} lines)", await _flood(system, count), "/s", at_least(100_000)),
        Figure("log line written → SSE client has it, p50", percentile(delays := await _drip(system, single), 0.5), "ms", at_most(30)),
        Figure("log line written → SSE client has it, p95", percentile(delays, 0.95), "ms"),
    ]


async def _flood(system: System, count: int) -> float:
    """From the child's clock when it begins to write until the client has all of it."""
    text: list[str] = []
    began = last = 0.0
    status = ""
    async for at, kind, data in _watch(system, task("sh", "-c", f"date +%s%N >&2; exec seq 1 {count}")):
        if kind == "log":
            log = msgspec.json.decode(data, type=_Log)
            if log.stream == "stdout":
                text.append(log.text)
                last = at
            elif log.text.strip().isdigit():
                began = int(log.text) / 1e9
        elif kind == "end":
            status = msgspec.json.decode(data)["status"]
    assert status == "succeeded", status
    assert began, "the child's clock was not printed"
    assert "".join(text) == "".join(f"{number}\n" for number in range(1, count + 1)), "lines are missing, or in another order"
    return count / (last - began)


async def _drip(system: System, count: int) -> list[float]:
    """Milliseconds a line."""
    script = f"i=0; while [ $i -lt {count} ]; do date +%s%N; sleep 0.02; i=$((i+1)); done"
    delays: list[float] = []
    async for at, kind, data in _watch(system, task("sh", "-c", script)):
        if kind == "log" and (log := msgspec.json.decode(data, type=_Log)).stream == "stdout":
            delays += [(at - int(line) / 1e9) * 1000 for line in log.text.split()]
    assert len(delays) == count, f"{len(delays)} of {count} lines"
    return delays


async def _watch(system: System, submission: object) -> AsyncIterator[tuple[float, str, bytes]]:
    """Submit, and give (time, event, data) until the build's stream ends."""
    path = f"/api/v1/teams/{system.team}/builds"
    connection = await Connection(system.url, system.token).open()
    try:
        build = await connection.json("POST", path, submission)
        async for batch in connection.events(f"{path}/{build['id']}/events"):
            at = time.time()
            for kind, data in batch:
                yield at, kind, data
    finally:
        connection.close()
