"""A push and a pull worker with the real scheduler, over a log and a bus in memory."""

from collections import Counter
from pathlib import Path

from proto.catalogue import decode
from proto.events.build import BuildCreated, StageQueued
from proto.events.fleet import WorkerDrained, WorkerResumed
from proto.events.lease import LeaseExpired, StageLeased
from proto.plan import Plan, Requirements, Stage
from services.worker.condition import Condition
from tests.controls import eventually, write
from tests.integration.test_worker_hints import SLOTS, World, a_world
from tests.worker_controls import a_worker, sh

BEAT = 0.1
"""Seconds, so that nothing of it is waited for."""


class Machine:
    """What a worker would measure, as the test says it."""

    def __init__(self, **condition: object) -> None:
        self.now = Condition(**condition)

    def __call__(self) -> Condition:
        return self.now


async def queue(world: World, *scripts: str) -> list[str]:
    names = [world.new_name() for _ in scripts]
    for name, script in zip(names, scripts, strict=True):
        plan = Plan(stages=[Stage(name="main", steps=[sh(script)])])
        queued = StageQueued(stage="main", attempt=1, requirements=Requirements())
        await world.log.append([write(f"build-{name}", BuildCreated(plan=plan), queued)])
    world.scheduler.log_grew()
    return names


async def leases(world: World) -> dict[str, str]:
    """The worker of each build that was leased; none of them expired."""
    events = {each.stream.removeprefix("lease-"): decode(each.type, each.data) for each in await world.log.read(0, 10_000) if "lease-" in each.stream}
    assert not [event for event in events.values() if isinstance(event, LeaseExpired)]
    return {build: event.worker for build, event in events.items() if isinstance(event, StageLeased)}


async def succeeded(world: World, builds: list[str]) -> bool:
    return all(world.ended.get(build) == "succeeded" for build in builds)


async def test_a_mixed_fleet_fills_all_its_slots(tmp_path: Path) -> None:
    """Credits are taken one by one from the one, all at once from the other; both run as much as they may, and nothing is leased in vain."""
    async with (
        a_world(tmp_path) as world,
        a_worker(world.bus, tmp_path / "w1", "w1", slots=SLOTS, heartbeat=BEAT),
        a_worker(world.bus, tmp_path / "w2", "w2", slots=SLOTS, mode="pull", heartbeat=BEAT),
    ):
        await eventually(lambda: (world.credits("w1"), world.credits("w2")) == (SLOTS, 1))
        gate = tmp_path / "go"
        builds = await queue(world, *[f"while [ ! -e {gate} ]; do sleep 0.02; done"] * (2 * SLOTS + 2))

        async def full() -> bool:
            return Counter((await leases(world)).values()) == {"w1": SLOTS, "w2": SLOTS}

        await eventually(full)
        gate.touch()
        await eventually(lambda: succeeded(world, builds), timeout=30)
        assert set(await leases(world)) == set(builds)


async def test_a_pull_worker_gets_work_only_while_it_wants_some(tmp_path: Path) -> None:
    machine = Machine(sated="its load is 9")
    async with a_world(tmp_path) as world, a_worker(world.bus, tmp_path / "w2", "w2", slots=SLOTS, mode="pull", condition=machine, heartbeat=BEAT):
        await eventually(lambda: world.boot("w2"))
        (build,) = await queue(world, "true")
        said = world.scheduler.fleet.get("w2").heartbeat.number
        await eventually(lambda: world.scheduler.fleet.get("w2").heartbeat.number > said + 1)
        assert await leases(world) == {} and world.scheduler.fleet.get("w2").view().credits == []
        machine.now = Condition()
        await eventually(lambda: succeeded(world, [build]))


async def test_a_worker_in_trouble_gets_nothing_and_its_stage_goes_elsewhere(tmp_path: Path) -> None:
    machine = Machine()
    async with (
        a_world(tmp_path) as world,
        a_worker(world.bus, tmp_path / "w1", "w1", slots=SLOTS, condition=machine, heartbeat=BEAT),
        a_worker(world.bus, tmp_path / "w2", "w2", slots=SLOTS, heartbeat=BEAT),
    ):
        await eventually(lambda: world.credits("w1") == SLOTS)
        machine.now = Condition(trouble="disk full: 3 MiB free")
        await eventually(lambda: (worker := world.scheduler.fleet.get("w1")) is not None and worker.view().closed == "in trouble")
        await eventually(lambda: world.credits("w2") == SLOTS)
        builds = await queue(world, "true", "true", "true")
        await eventually(lambda: succeeded(world, builds))
        assert set((await leases(world)).values()) == {"w2"}


async def test_a_drained_worker_finishes_and_gets_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    """Told by the answer to its heartbeat: it says so itself from then on."""
    async with a_world(tmp_path) as world, a_worker(world.bus, tmp_path / "w1", "w1", slots=SLOTS, heartbeat=BEAT):
        await eventually(lambda: world.credits("w1") == SLOTS)
        gate = tmp_path / "go"
        (running,) = await queue(world, f"while [ ! -e {gate} ]; do sleep 0.02; done")
        await eventually(lambda: world.credits("w1") == SLOTS - 1)
        await world.log.append([write("fleet-worker-w1", WorkerDrained(reason="a new disk"))])
        world.scheduler.log_grew()
        await eventually(lambda: world.scheduler.fleet.get("w1").heartbeat.draining)
        (waiting,) = await queue(world, "true")
        gate.touch()
        await eventually(lambda: succeeded(world, [running]))
        assert waiting not in await leases(world)
        await world.log.append([write("fleet-worker-w1", WorkerResumed())])
        world.scheduler.log_grew()
        await eventually(lambda: succeeded(world, [waiting]))
