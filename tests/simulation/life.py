"""A world's life: what happens as a seed decides, then an end at which all must be well."""

import asyncio
import inspect

from proto.events.fleet import WorkerResumed
from services.gateway.projection import BuildRow
from tests.simulation.happenings import Happenings
from tests.simulation.world import World

ENOUGH = 900.0
"""Seconds of its own within which all builds end, once nothing goes wrong any more."""


async def lived(seed: int, steps: int) -> int:
    """Let a world live; how many steps it took in all. Raises AssertionError for what must not be."""
    world = World(seed)
    await _live(world, steps)
    await _settle(world)
    await _check(world)
    await asyncio.sleep(0)
    return world.steps


async def _live(world: World, steps: int) -> None:
    """So many steps with everything that may go wrong."""
    odds, chance = Happenings(world).odds, world.chance
    kinds, weights = list(odds), list(odds.values())
    while world.steps < steps:
        what = chance.random()
        if what < 0.2:
            await world.turn(chance.choice(world.instances))
        elif what < 0.202:
            await _wait(world)
        elif what < 0.4 and len(world.core):
            world.core.deliver(world.hear)
        elif what < 0.55 and len(world.events):
            world.events.deliver(world.react)
        elif what < 0.65 and len(world.reports):
            world.reports.deliver(world.record)
        elif inspect.isawaitable(happens := chance.choices(kinds, weights)[0]()):
            await happens


async def _wait(world: World) -> None:
    """Some time in which everybody does what is due, but for those who cannot."""
    for _ in range(world.chance.randint(2, 60)):
        world.now += 0.5
        for instance in world.instances:
            world.campaign(instance)
        await world.turns()
        for worker in world.lively():
            worker.tick()
        world.core.deliver_all(world.hear)


async def _settle(world: World) -> None:
    """Nothing goes wrong any more, and all must end."""
    for network in (world.core, world.events, world.reports):
        network.heal()
    world.leases.unsure = world.builds.unsure = 0.0
    world.cut_off.clear()
    for instance in list(world.instances):
        await world.thaw(instance, 0.0)
    for worker in world.workers:
        worker.stopped = False
        world.append(f"fleet-worker-{worker.name}", WorkerResumed())
    until = world.now + ENOUGH
    while world.ledger.open or any(worker.steps for worker in world.workers):
        assert world.now < until, f"after {ENOUGH:g} s without a fault {world.ledger.open} have not ended"
        world.now += 0.5
        for instance in world.instances:
            world.campaign(instance)
        await world.turns()
        world.core.deliver_all(world.hear)
        for worker in world.workers:
            worker.tick()
            worker.work()
        world.core.deliver_all(world.hear)
        world.events.deliver_all(world.react)
        world.reports.deliver_all(world.record)
        world.project(10_000)
        world.ring()


async def _check(world: World) -> None:
    """Everybody knows what there was, and nobody holds what is over."""
    world.project(100_000)
    for _ in range(2):
        await world.turns()
    world.builds.crash()
    world.leases.crash()
    world.refold()
    for instance in world.instances:
        board = instance.scheduler.board
        assert (board.leases, board.held, list(board.queue.all()), board.queue.running) == ({}, {}, [], {}), f"{instance.name} holds what is over"
    assert world.timers.rows == {}, world.timers.rows
    shown = {row.id: row.status for (kind, _), row in world.gateway.rows.items() if kind is BuildRow}
    assert shown == world.ledger.requested, "what people see is what is recorded"
