"""The sweep finds what the bus lost, and asks for nothing else."""

import asyncio
from contextlib import asynccontextmanager, suppress

from libs.eventlog.log import NewEvent
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.runtime.sweep import Sweep
from proto.catalogue import decode
from proto.events.build import BuildCreated, BuildFinished, StageQueued
from proto.events.lease import LeaseExpired
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.plan import Plan, Run, RunStep, Stage, TaskConfig
from services.builds.commands import CreateBuild
from services.builds.decider import BuildDecider
from services.builds.reactions import on_fact
from tests.controls import counter, write

PLAN = Plan(stages=[Stage(name="main", steps=[RunStep(name="run", config=TaskConfig(run=Run(path="true")))])])


def creates(command):
    return isinstance(command, CreateBuild)


@asynccontextmanager
async def sweeping(log):
    decider = BuildDecider()
    loop = CommandLoop(log, decider, counter("swept"), creates=creates)
    task = asyncio.create_task(loop.run())
    try:
        yield Sweep(log, {"request", "lease"}, on_fact, decider, creates, loop)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def built(log, build):
    return [type(decode(r.type, r.data)) for r in (await log.read_streams([f"build-{build}"]))[f"build-{build}"]]


async def test_a_request_that_the_bus_lost_becomes_a_build_and_others_are_left_alone():
    # FAULTS 61
    log = MemoryLog()
    await log.append([write("request-1", BuildRequested(build="b1", plan=PLAN)), write("request-2", BuildRequested(build="b2", plan=PLAN))])
    async with sweeping(log) as sweep:
        await sweep.sweep(1)
        assert await built(log, "b1") == [BuildCreated, StageQueued] and await built(log, "b2") == []
        await sweep.sweep(2)
        assert await built(log, "b2") == [BuildCreated, StageQueued]
        assert sweep.found == 2
        head = await log.head()
        await sweep.sweep(head)
        assert (await log.head(), sweep.found) == (head, 2)


async def test_a_lost_expiry_and_a_lost_abort_are_asked_for_again():
    log = MemoryLog()
    await log.append([write("request-1", BuildRequested(build="b1", plan=PLAN))])
    async with sweeping(log) as sweep:
        await sweep.sweep(await log.head())
        await log.append([write("lease-b1", LeaseExpired(stage="main", attempt=1, worker="w", evidence="silent"))])
        await sweep.sweep(await log.head())
        assert await built(log, "b1") == [BuildCreated, StageQueued, StageQueued]
        await log.append([write("request-abort-b1", BuildAbortRequested(build="b1"))])
        await sweep.sweep(await log.head())
        assert (await built(log, "b1"))[-1] is BuildFinished
        assert sweep.found == 3


async def test_a_sweep_begins_near_the_head_of_a_long_log(monkeypatch):
    log = MemoryLog()
    monkeypatch.setattr("libs.runtime.sweep.LOOK_BACK", 1)
    await log.append([write("request-1", BuildRequested(build="b1", plan=PLAN)), write("request-2", BuildRequested(build="b2", plan=PLAN))])
    async with sweeping(log) as sweep:
        await sweep.sweep(2)
        assert await built(log, "b1") == [] and await built(log, "b2") != []


async def test_an_event_that_cannot_be_read_does_not_stop_the_sweep():
    log = MemoryLog()
    bad = NewEvent(event_id="bad", type="build.requested", data=b"{}")
    await log.append([write("request-1", bad), write("request-2", BuildRequested(build="b2", plan=PLAN))])
    async with sweeping(log) as sweep:
        await sweep.sweep(2)
        assert await built(log, "b2") == [BuildCreated, StageQueued]
