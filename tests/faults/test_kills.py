"""SIGKILL of every part while builds run: every accepted build ends once with the right result, and nothing is left running."""

import signal

import pytest

from penstock.up.processes import is_alive
from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.system import System
from tests.faults.traffic import Traffic

KILLS = 4


async def kill_often(system: System, traffic: Traffic, name: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Each time that all is well again and steps run."""
    for _ in range(KILLS):
        before = system.kill(name, number)
        await system.back(name, before)
        await traffic.under_way()


@pytest.mark.parametrize("name", ["gateway", "builds", "scheduler", "artifacts"])
async def test_builds_survive_the_death_of_a_service(system: System, name: str) -> None:
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            await kill_often(system, traffic, name)
        await traffic.verify()


@pytest.mark.parametrize("sandbox", [None, "none"], ids=["default sandbox", "no sandbox"])
async def test_builds_survive_the_death_of_their_worker_and_its_steps_do_not(start: Start, sandbox: str | None) -> None:
    """FAULTS 44: killed in the middle of steps; the next life finds nothing of the last one's running."""
    system = start(sandbox=sandbox)
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            for _ in range(KILLS):
                steps = {step.pid for step in system.steps()}
                before = system.kill("worker")
                await system.back("worker", before)
                await eventually(lambda steps=steps: not steps & {step.pid for step in system.steps()})
                await traffic.under_way()
        await traffic.verify()


async def test_builds_survive_the_death_of_the_bus(system: System) -> None:
    """FAULTS 57: kill -9, again and again."""
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            await kill_often(system, traffic, "nats")
        await traffic.verify()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
async def test_builds_survive_the_death_of_the_database(system: System, number: signal.Signals) -> None:
    """FAULTS 69: at once (SIGQUIT is Postgres's immediate shutdown), in the middle of appends."""
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            await kill_often(system, traffic, "postgres", number)
        await traffic.verify()


@pytest.mark.parametrize("sandbox", [None, "none"], ids=["default sandbox", "no sandbox"])
async def test_the_supervisors_death_is_everyones_and_up_goes_on_with_what_was_accepted(start: Start, sandbox: str | None) -> None:
    system = start(sandbox=sandbox)
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            for _ in range(2):
                run = system.run()
                system.kill("supervisor")
                await eventually(lambda run=run: not any(is_alive(child) for child in run.children.values()), timeout=20)
                system.up()
                await traffic.under_way()
        await traffic.verify()


@pytest.mark.parametrize("sandbox", [None, "none"], ids=["default sandbox", "no sandbox"])
async def test_after_the_supervisors_death_nothing_runs(start: Start, sandbox: str | None) -> None:
    """No step either, although nobody comes to look after it."""
    system = start(sandbox=sandbox)
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            system.kill("supervisor")
            await eventually(lambda: system.leftovers() == [], timeout=20)
            system.up()
        await traffic.verify()
