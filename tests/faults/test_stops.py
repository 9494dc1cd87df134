"""For a minute each part stands still, or nobody reaches it, and then goes on where it was (FAULTS 45, 66): what it says late changes nothing."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest

from penstock.client import Build
from proto.events.lease import StageLeased
from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.network import Network, network
from tests.faults.processes import concerned
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import COPYING, FAILING, INSTANT, Work, sleeping, talking
from tests.faults.workers import registered, worker_process

SECONDS = 60.0
WORK = (sleeping(10), INSTANT, talking(50, 0.05), COPYING, FAILING)


@asynccontextmanager
async def under_traffic(system: System, names: Sequence[str]) -> AsyncIterator[Traffic]:
    """Builds come before, within and after; in the end each has ended as it should, and those that were stopped are the same processes as ever."""
    before = {name: system.process(name) for name in names}
    async with Traffic(system, patience=4 * SECONDS) as traffic:  # the client's, too, is a minute
        for work in WORK:
            await traffic.submit(work)
        await traffic.under_way()
        yield traffic
        await system.ready()
        for work in WORK:
            await traffic.submit(work)
        await traffic.verify()
    assert {name: system.process(name) for name in names} == before


async def stands_still(system: System, names: Sequence[str], seconds: float) -> None:
    async with under_traffic(system, names) as traffic:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(system.stopped(name))
            submitting = asyncio.create_task(_some(traffic))
            if {"scheduler", "nats"} & set(names):
                await eventually(lambda: system.steps() == [], timeout=20)  # nobody renews their leases
            await asyncio.sleep(seconds)
        await submitting


async def _some(traffic: Traffic) -> None:
    """The gateway may be the one that stands still: its answer comes late, if it does not have to be asked again."""
    for work in WORK:
        await traffic.submit(work)


class ForTheFar(Work):
    """Only workers of this tag may run it."""

    def plan(self, mark: str) -> dict[str, Any]:
        plan = super().plan(mark)
        plan["stages"][0]["tags"] = ["far"]
        return plan


async def workers_are_gone(system: System, net: Network, seconds: float) -> None:
    """The local one stands still, though its steps do not; the far one is cut off. A third does their work, and what both say when they are back is
    late: the end of a step that ended meanwhile, too; and of the steps that did not none is left."""
    far, third = [await registered(system, name, ["far"]) for name in ("far", "third")]
    ends, endless = sleeping(seconds / 3), Work("endless", "echo begin; sleep 600", "aborted", None, ("begin\n",))
    local, steps = system.process("worker"), system.data.path / "workers" / "local" / "work"
    async with Traffic(system) as traffic:
        here = [await traffic.submit(work) for work in (ends, endless)]
        await eventually(lambda: run(traffic, here, "local"), timeout=20)
        async with worker_process(system, far, ("ip", "netns", "exec", net.away)):
            there = [await traffic.submit(ForTheFar(*work)) for work in (ends, endless)]
            await eventually(lambda: run(traffic, there, "far"), timeout=20)
            with system.stopped("worker"):
                net.cut()
                async with worker_process(system, third):
                    await eventually(lambda: run(traffic, [*here, *there], "third"), timeout=30)
                    await asyncio.sleep(seconds)
                    for build in (here[1], there[1]):
                        await traffic.client.abort(build.id)
                    await traffic.ended()
                assert concerned(str(steps)), "nobody has looked after them"
                before = await system.log("build")
                net.heal()
            await eventually(lambda: concerned(str(steps)) == [])
            for name in ("local", "far"):
                await eventually(lambda name=name: is_back(traffic, name), timeout=30)
            again = [await traffic.submit(INSTANT), await traffic.submit(ForTheFar(*INSTANT))]
            await traffic.ended()
            assert [fact for fact in await system.log("build") if fact.subject_id not in {build.id for build in again}] == before
            await traffic.verify()
    assert system.process("worker") == local
    leases = [fact.event.worker for fact in await system.log(f"lease-{here[1].id}") if isinstance(fact.event, StageLeased)]
    assert leases == ["local", "third"]


async def run(traffic: Traffic, builds: Sequence[Build], worker: str) -> bool:
    found = [await traffic.client.build(build.id) for build in builds]
    assert {build.stages[0].worker for build in found} == {worker}, [build.stages[0].worker for build in found]
    return all(build.stages[0].steps[0].status == "started" for build in found)


async def is_back(traffic: Traffic, worker: str) -> bool:
    return (await traffic.client.worker(worker)).status in ("available", "busy")


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are root's to make")
@pytest.mark.timeout(400)
async def test_what_stands_still_for_a_minute_goes_on(start: Start, net: Network) -> None:
    """Everything at once, in systems of their own: the services, two at a time; the bus; workers."""
    async with asyncio.TaskGroup() as all_of_them:
        for names in (("gateway", "artifacts"), ("builds", "scheduler"), ("nats",)):
            all_of_them.create_task(stands_still(start(), names, SECONDS))
        all_of_them.create_task(workers_are_gone(start(host=net.host), net, SECONDS))
