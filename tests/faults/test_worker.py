"""Workers that stop, come back too late, come twice, or have no room."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from libs.tokens import public_key
from penstock.up.datadir import LOCAL_WORKER
from proto.events.lease import LeaseExpired, StageLeased
from proto.events.worker import WorkerBooted
from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.system import LEASE_SECONDS, System
from tests.faults.traffic import Traffic
from tests.faults.work import MIX, Work, sleeping, talking


@pytest.mark.parametrize("sandbox", [None, "none"], ids=["default sandbox", "no sandbox"])
async def test_a_worker_that_slept_past_its_lease_changes_nothing_any_more(start: Start, sandbox: str | None) -> None:
    """FAULTS 45: attempt 1 of one build ends while its worker is stopped, that of the other goes on; both are lost, attempt 2 counts, and what ran
    of attempt 1 is killed."""
    system = start(sandbox=sandbox)
    short, long = sleeping(LEASE_SECONDS), Work("endless", "sleep 60", "aborted", None)
    async with Traffic(system) as traffic:
        builds = [await traffic.submit(work) for work in (short, long)]
        await eventually(lambda: both_started(traffic, [build.id for build in builds]))
        first = {step.pid for step in system.steps()}
        with system.stopped("worker"):
            await eventually(lambda: expired(system), timeout=4 * LEASE_SECONDS + 10)
        await eventually(lambda: not first & {step.pid for step in system.steps()})
        await eventually(lambda: attempts(traffic, builds[1].id, 2))
        await traffic.client.abort(builds[1].id)
        await traffic.verify()
        assert [(await traffic.client.build(build.id)).stages[0].attempt for build in builds] == [2, 2]


async def both_started(traffic: Traffic, builds: list[str]) -> bool:
    return all([(await traffic.client.build(build)).status == "started" for build in builds])


async def attempts(traffic: Traffic, build: str, number: int) -> bool:
    found = await traffic.client.build(build)
    return found.stages[0].attempt == number and found.stages[0].steps[0].status == "started"


async def expired(system: System) -> bool:
    return len([fact for fact in await system.log("lease") if isinstance(fact.event, LeaseExpired)]) == 2


@pytest.mark.parametrize("name", ["gateway", "builds", "scheduler", "artifacts"])
async def test_a_service_that_slept_goes_on_as_if_nothing_had_been(system: System, name: str) -> None:
    """FAULTS 45: for longer than a lease, and than any leadership."""
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            with system.stopped(name):
                await asyncio.sleep(2.5 * LEASE_SECONDS)
            await system.ready()
        await traffic.verify()


async def test_of_two_workers_with_one_identity_the_newer_wins(system: System) -> None:
    """FAULTS 46: the older one's leases are void, its steps die, and it is given nothing any more."""
    async with Traffic(system) as traffic:
        await traffic.submit(talking(100, 0.05))
        await traffic.under_way()
        first = {step.pid for step in system.steps()}
        before = len(await booted(system))
        async with another_worker(system):
            await eventually(lambda: boots(system, before + 1), timeout=20)
            await eventually(lambda: not first & {step.pid for step in system.steps()})
            for work in MIX:
                await traffic.submit(work)
            await traffic.verify()
            assert system.data.log("worker").read_text().count("another worker bears this name") == 1
            newer = (await booted(system))[-1].boot
            assert {fact.event.boot for fact in await system.log("lease") if isinstance(fact.event, StageLeased) and fact.event.attempt > 1} == {
                newer
            }


async def booted(system: System) -> list[WorkerBooted]:
    """The boots on record; the template's may be among them."""
    return [fact.event for fact in await system.log("worker") if isinstance(fact.event, WorkerBooted)]


async def boots(system: System, count: int) -> bool:
    return len(await booted(system)) >= count


@asynccontextmanager
async def another_worker(system: System) -> AsyncIterator[None]:
    """A worker process with the local worker's name and key, in a folder of its own."""
    known = system.data.secrets()
    settings = {
        "PENSTOCK_NATS_URL": system.bus_url(),
        "PENSTOCK_WORKER_NAME": LOCAL_WORKER,
        "PENSTOCK_WORKER_KEY": known.worker_key,
        "PENSTOCK_SERVER_PUBLIC_KEY": public_key(known.server_key),
        "PENSTOCK_WORKER_DIR": str(system.home / "other-worker"),
    }
    base = {name: value for name, value in system.environ.items() if not name.startswith("PENSTOCK_")}
    with (system.home / "other-worker.log").open("wb") as log:
        command = [sys.executable, "-P", "-m", "services.worker"]
        process = await asyncio.create_subprocess_exec(*command, env={**base, **settings}, cwd=system.home, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            await process.wait()


async def test_on_a_full_disk_the_build_errs_saying_so_and_the_worker_lives_on(start: Start) -> None:
    """FAULTS 53: a disk of 24 MB; a step fills it; the next build finds room again."""
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=24m tmpfs "$0" && exec "$@"'
    system = start(wrapped=())
    system.down()
    system.wrapped = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", mount, str(system.data.workers)]
    system.up()
    filling = Work("filling", "head -c 100000000 /dev/zero > all", "errored", 1)
    async with Traffic(system) as traffic:
        worker = system.process("worker")
        await traffic.submit(sleeping(0.1))
        await traffic.ended()
        build = await traffic.submit(filling)
        await traffic.ended()
        assert "worker's disk is full" in (await traffic.client.build(build.id)).error
        for work in MIX:
            await traffic.submit(work)
        await traffic.ended()
        assert system.process("worker") == worker
        assert {(await traffic.client.build(build)).status == work.status for build, work in traffic.accepted.items()} == {True}


async def test_a_log_flood_is_bounded_and_said_so(system: System) -> None:
    """FAULTS 100, 101: 100 MB of output; the log keeps its limit, ends with how much was dropped, and the build is none the worse."""
    flood = Work("flood", "head -c 100000000 /dev/zero | tr '\\0' 'x' | fold -w 999; echo >&2; echo the end")
    async with Traffic(system) as traffic:
        build = await traffic.submit(flood)
        await traffic.ended()
        await eventually(lambda: archived(traffic, build.id), timeout=30)
        size, tail = 0, b""
        async for piece in traffic.client.log_text(build.id):
            size, tail = size + len(piece), (tail + piece)[-200:]
        assert 60 << 20 < size < 65 << 20
        assert b"log limit of 64 MiB reached, " in tail and tail.endswith(b" bytes dropped\n"), tail
        assert (await traffic.client.build(build.id)).status == "succeeded"


async def archived(traffic: Traffic, build: str) -> bool:
    return (await traffic.client.log(build, start=10**9)).complete
