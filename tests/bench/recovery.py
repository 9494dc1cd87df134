"""How soon a build runs through again after `kill -9`: of each part, of a worker in the middle of a step, of the scheduler that leads of two."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from statistics import median
from typing import Any

import asyncpg
import msgspec

from penstock.up.datadir import DataDir, Ports
from penstock.up.processes import is_alive, send
from tests.bench.figures import Figure, at_most
from tests.bench.http import Connection
from tests.bench.machine import pss
from tests.bench.system import System
from tests.bench.work import no_op, task
from tests.faults.processes import descendants
from tests.second import second

PARTS = ("scheduler", "builds", "gateway", "nats", "postgres")
LEASE_SECONDS = 15.0
POLL = 0.005
PATIENCE = 60.0


async def recovery(system: System, times: int) -> list[Figure]:
    """Each part `times` over; the medians."""
    figures: list[Figure] = []
    await _runs_through(system)
    for name in PARTS:
        taken = [await _killed(system, name) for _ in range(times)]
        figures.append(Figure(f"kill -9 of {name} → it is back (median of {times})", median(back for back, _ in taken), "s"))
        figures.append(Figure(f"{name} is back → a build runs through (median of {times})", median(after for _, after in taken), "s", at_most(2)))
    figures.append(Figure("kill -9 of a worker that comes back → its step runs again", await _step_again(system), "s", at_most(LEASE_SECONDS + 1)))
    size, again = await _step_elsewhere(system)
    figures.append(Figure("PSS of an idle worker on its own", size, "MB"))
    figures.append(Figure("kill -9 of a worker for good → its step runs elsewhere", again, "s", at_most(LEASE_SECONDS + 1)))
    term, after = await _takeover(system)
    figures.append(Figure("kill -9 of the leading of two schedulers → its term ends", term, "s"))
    figures.append(Figure("its term ends → the other has a build run through", after, "s", at_most(2)))
    return figures


async def _killed(system: System, name: str) -> tuple[float, float]:
    """Seconds until another process does its work, and from then until a build has run through."""
    data = DataDir(system.data)
    run = data.run()
    assert run is not None
    before = run.children[name]
    send(before, signal.SIGKILL)
    killed = time.time()
    building = asyncio.create_task(_runs_through(system))

    def another() -> bool:
        now = data.run()
        return now is not None and now.children.get(name, before) != before

    await _until(another)
    back = time.time()
    return back - killed, max(0.0, await building - back)


async def _runs_through(system: System) -> float:
    """When the end of a build that is submitted now was recorded."""
    build = await _insist(system, "POST", "", no_op())
    while build["status"] != "succeeded":
        await asyncio.sleep(0.02)
        build = await _insist(system, "GET", f"/{build['id']}")
    return _seconds(build["finished_at"])


async def _step_again(system: System) -> float:
    """Seconds until the second attempt of a step whose worker was killed has started."""
    build = (await _insist(system, "POST", "", task("sleep", "300")))["id"]
    await _runs(system, build, 1)
    run = DataDir(system.data).run()
    assert run is not None
    send(run.children["worker"], signal.SIGKILL)
    killed = time.time()
    again = await _runs(system, build, 2)
    await _insist(system, "PUT", f"/{build}/abort")
    return again - killed


async def _step_elsewhere(system: System) -> tuple[float, float]:
    """MB of a worker that was added, and seconds until what it ran, when it is killed and stays away, runs on the other."""
    with _another_worker(system) as worker:
        while all(each["name"] != "another" or each["status"] != "available" for each in (await _insist(system, "GET", "/api/v1/workers"))["items"]):
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)
        size = pss(worker.pid)
        builds: list[str] = []
        while not builds or await _worker_of(system, builds[-1]) != "another":
            builds.append((await _insist(system, "POST", "", task("sleep", "300")))["id"])
            await _runs(system, builds[-1], 1)
        steps = descendants(worker.pid)
        worker.kill()
        killed = time.time()
        again = await _runs(system, builds[-1], 2)
        for step in steps:
            with suppress(ProcessLookupError):  # without a sandbox they live on until the worker's next start, which never comes
                os.kill(step, signal.SIGKILL)
    for build in builds:
        await _insist(system, "PUT", f"/{build}/abort")
    return size, again - killed


@contextmanager
def _another_worker(system: System) -> Iterator["subprocess.Popen[bytes]"]:
    token = system.penstock("worker", "token", "create").stdout.strip()
    folder = system.data.parent / "another"
    options = ["--register", token, "--server", system.url, "--name", "another", "--dir", str(folder), "--slots", "8", "--sandbox", "none"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "penstock", "worker", "start", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


async def _worker_of(system: System, build: str) -> str:
    return str((await _insist(system, "GET", f"/{build}"))["stages"][0]["worker"])


async def _runs(system: System, build: str, attempt: int) -> float:
    """When that attempt of its only stage was recorded to have started."""
    while True:
        (stage,) = (await _insist(system, "GET", f"/{build}/preparation"))["stages"]
        if stage["attempt"] == attempt and stage["started_at"]:
            return _seconds(stage["started_at"])
        await asyncio.sleep(0.02)


async def _takeover(system: System) -> tuple[float, float]:
    """Seconds from the leader's death to the end of its term, and from then until a build has run through by the other."""
    data = DataDir(system.data)
    run = data.run()
    assert run is not None
    with second(data, "scheduler"):
        log = data.logs / "scheduler-second.log"
        await _until(lambda: '"started"' in log.read_text())
        await asyncio.sleep(2.0)  # it hears the worker, and reads on
        send(run.supervisor, signal.SIGSTOP)
        try:
            leader = data.run()
            assert leader is not None
            send(leader.children["scheduler"], signal.SIGKILL)
            killed = time.time()
            until = await _term_ends(data)
            ended = await _runs_through(system)
        finally:
            send(run.supervisor, signal.SIGCONT)
        await _until(lambda: (now := data.run()) is not None and is_alive(now.children.get("scheduler", run.supervisor)))
    return until - killed, ended - until


async def _term_ends(data: DataDir) -> float:
    ports = msgspec.json.decode((data.path / "ports.json").read_bytes(), type=Ports)
    database = await asyncpg.connect(
        host="127.0.0.1", port=ports.postgres, user="postgres", password=data.secrets().database["postgres"], database="postgres", ssl=False
    )
    try:
        until: datetime = await database.fetchval("SELECT until FROM scheduler.leadership WHERE name = 'placement'")
    finally:
        await database.close()
    return until.timestamp()


async def _insist(system: System, method: str, path: str, content: object = None) -> Any:
    """Ask until it is answered with yes, on a connection of its own each time; one key says that it is the same request."""
    headers = {"Idempotency-Key": os.urandom(8).hex()} if method == "POST" else {}
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError, EOFError, RuntimeError, TimeoutError):
            async with asyncio.timeout(5):
                connection = await Connection(system.url, system.token).open()
                try:
                    return await connection.json(
                        method, path if path.startswith("/api") else f"/api/v1/teams/{system.team}/builds{path}", content, headers
                    )
                finally:
                    connection.close()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{method} {path}: no answer for {PATIENCE:g} s")
        await asyncio.sleep(0.02)


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:g} s")
        await asyncio.sleep(POLL)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
