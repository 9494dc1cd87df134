"""The load, in a process of its own: submits builds from many connections, and follows their ends on the log's event stream.

`python -m tests.bench.load` reads an Order from stdin and writes a Result to stdout, both JSON.
"""

import asyncio
import resource
import sys
import time
import uuid
from collections.abc import Iterator

import msgspec

from tests.bench.http import Connection
from tests.bench.work import no_op

PATIENCE = 300.0


class Order(msgspec.Struct, frozen=True):
    url: str
    token: str
    team: str
    builds: int
    clients: int


class Result(msgspec.Struct, frozen=True):
    """`seconds` from the first submission until the last end was seen; `submitting` until the last answer; `answers` in ms; `ends` by build: every
    BuildFinished that was seen; `cpu` seconds of this process; `events` that the builds cost in all, other categories included."""

    seconds: float
    submitting: float
    answers: list[float]
    ends: dict[str, list[str]]
    cpu: float
    events: int


class _Finished(msgspec.Struct, frozen=True):
    status: str


class _Event(msgspec.Struct, frozen=True):
    subject: str
    position: int
    data: _Finished


class Load:
    def __init__(self, order: Order) -> None:
        self._order = order
        self._path = f"/api/v1/teams/{order.team}/builds"
        self._body = msgspec.json.encode(no_op())
        self._submitted: set[str] = set()
        self._ends: dict[str, list[str]] = {}
        self._answers: list[float] = []
        self._last = 0
        self._all_submitted = False

    async def run(self) -> Result:
        order = self._order
        connections = [await Connection(order.url, order.token).open() for _ in range(order.clients)]
        # The place in the log to follow from: where a build that has just ended, ended.
        before = await connections[0].json("POST", self._path, no_op(), {"Prefer": "wait=60"})
        head = int(before["positions"]["status"])
        follower = await Connection(order.url, order.token).open()
        following = asyncio.create_task(self._follow(follower, str(head)))
        await asyncio.sleep(0.2)
        cpu, began = _cpu(), time.monotonic()
        numbers = iter(range(order.builds))
        await asyncio.gather(*(self._submit(connection, numbers) for connection in connections))
        self._all_submitted, submitting = True, time.monotonic() - began
        async with asyncio.timeout(PATIENCE):
            await following
        seconds = time.monotonic() - began
        for connection in (follower, *connections):
            connection.close()
        return Result(seconds, submitting, self._answers, self._ends, _cpu() - cpu, self._last - head)

    async def _submit(self, connection: Connection, numbers: Iterator[int]) -> None:
        for _ in numbers:
            sent = time.monotonic()
            status, body = await connection.request("POST", self._path, self._body, {"Idempotency-Key": uuid.uuid4().hex})
            self._answers.append((time.monotonic() - sent) * 1000)
            assert status == 202, f"{status} {body.decode(errors='replace')}"
            self._submitted.add(msgspec.json.decode(body)["id"])

    async def _follow(self, connection: Connection, last: str) -> None:
        decoder = msgspec.json.Decoder(_Event)
        async for batch in connection.events("/api/v1/events?category=build", last):
            for name, data in batch:
                if name == "build.finished":
                    event = decoder.decode(data)
                    self._last = event.position
                    self._ends.setdefault(event.subject.partition("-")[2], []).append(event.data.status)
            if self._all_submitted and self._submitted <= self._ends.keys():
                return


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(Load(msgspec.json.decode(sys.stdin.buffer.read(), type=Order)).run())))
