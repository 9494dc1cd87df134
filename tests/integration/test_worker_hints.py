"""Two workers and the real scheduler, over a log and a bus in memory: a build goes where its inputs are."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from libs.bus.memory import MemoryBus
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.tokens import new_seed, public_key
from proto.catalogue import decode
from proto.events.build import BuildCreated, StageFinished, StageQueued
from proto.events.fleet import WorkerRegistered
from proto.events.lease import StageLeased
from proto.messages import TREE_HINT, Reports, ReportStageFinished
from proto.plan import Plan, Requirements, Stage, TaskInput
from proto.topology import CONSUMERS, STREAMS
from services.scheduler.decider import SchedulerDecider
from services.scheduler.master_keys import Keyring
from services.scheduler.packages import Packer
from services.scheduler.scheduler import Scheduler
from services.scheduler.vault import Vault
from tests.controls import counter, eventually, write
from tests.worker_controls import IDENTITY, SERVER, a_worker, sh
from tests.worker_shop import Shop, a_shop

NAMES = ("w1", "w2")
SLOTS = 2
LEASE = 15.0


class Leading:
    term = 1


class NoSnapshots:
    async def save(self, *_: object) -> None:
        raise AssertionError("too early for a snapshot")

    async def load(self, *_: object) -> None:
        return None


class World:
    """Does what the builds service would: queues stages, and records the reports of their ends."""

    def __init__(self, shop: Shop, scheduler: Scheduler, log: MemoryLog, bus: MemoryBus) -> None:
        self.shop = shop
        self.scheduler = scheduler
        self.log = log
        self.bus = bus
        self.ended: dict[str, str] = {}
        self.new_name = counter("b")

    async def build(self, input: str, tags: tuple[str, ...] = ()) -> StageLeased:
        """Run one that uses an input, while no worker does anything; the lease that it got."""
        name = self.new_name()
        await eventually(lambda: all(self.credits(worker) == SLOTS for worker in NAMES))
        inputs = {input: self.shop.ref(input)}
        plan = Plan(stages=[Stage(name="main", steps=[sh(f"cat {input}/file", inputs=[TaskInput(name=input)])], tags=list(tags))])
        queued = StageQueued(stage="main", attempt=1, requirements=Requirements(tags=tags), inputs=inputs)
        await self.log.append([write(f"build-{name}", BuildCreated(plan=plan, inputs=inputs), queued)])
        self.scheduler.log_grew()
        await eventually(lambda: self.ended.get(name) == "succeeded")
        (lease,) = [decode(each.type, each.data) for each in await self.log.read(0, 10_000) if each.stream == f"lease-{name}"]
        assert isinstance(lease, StageLeased)
        return lease

    def credits(self, name: str) -> int:
        worker = self.scheduler.fleet.get(name)
        return len(worker.credits) if worker else 0

    def boot(self, name: str) -> str:
        worker = self.scheduler.fleet.get(name)
        return worker.heartbeat.boot if worker else ""

    def known(self, name: str) -> tuple[str, ...]:
        worker = self.scheduler.fleet.get(name)
        return worker.cached if worker else ()

    async def record(self) -> None:
        async with self.bus.tail("REPORTS", "reports.>") as batches:
            async for batch in batches:
                for message in batch:
                    reports = msgspec.msgpack.decode(message.data, type=Reports)
                    for number, body in enumerate(reports.bodies, reports.first):
                        if isinstance(body, ReportStageFinished) and reports.attempt.build not in self.ended:
                            worker = message.subject.split(".")[1]
                            over = StageFinished(stage="main", attempt=1, status=body.status, worker=worker, error=body.error, report=number)
                            await self.log.append([write(f"build-{reports.attempt.build}", over)])
                            self.scheduler.log_grew()
                            self.ended[reports.attempt.build] = body.status


class NobodyComes:
    def cut(self, worker: str, key: str) -> None: ...

    def sweep(self) -> None: ...

    def look(self) -> None: ...


@asynccontextmanager
async def a_world(folder: Path) -> AsyncIterator[World]:
    log, bus = MemoryLog(), MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    await log.append([write(f"fleet-worker-{name}", WorkerRegistered(worker=name, key=public_key(IDENTITY))) for name in NAMES])
    commands = CommandLoop(log, SchedulerDecider(), counter())
    async with a_shop(folder) as shop, AsyncExitStack() as stack:
        shop.token = None
        scheduler = Scheduler(
            log=log,
            bus=bus,
            commands=commands,
            leadership=Leading(),
            snapshots=NoSnapshots(),
            vault=Vault(None, lambda: Keyring(f"k1:{new_seed()}")),
            packer=Packer(SERVER, shop.url, LEASE, time.time),
            door=NobodyComes(),
            lease_seconds=LEASE,
            clock=time.monotonic,
            now=time.time,
        )
        world = World(shop, scheduler, log, bus)
        for work in (commands.run(), scheduler.listen(), scheduler.run(), world.record()):
            task = asyncio.ensure_future(work)
            stack.push_async_callback(asyncio.wait, [task])
            stack.callback(task.cancel)
        yield world


async def test_a_build_goes_to_the_worker_that_has_its_input_again_and_again(tmp_path: Path) -> None:
    for name in ("src", "lib"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "file").write_text(name * 1000)
    async with a_world(tmp_path) as world, a_worker(world.bus, tmp_path / "w1", "w1", slots=SLOTS):
        src, lib = world.shop.ref("src"), world.shop.ref("lib")

        async def go_there(input: str, worker: str, other: str) -> None:
            for _ in range(4):
                lease = await world.build(input)
                assert lease.worker == worker
                assert [(candidate.worker, candidate.missing) for candidate in lease.why] == [(worker, 0), (other, len(input) * 1000)]

        async with a_worker(world.bus, tmp_path / "w2", "w2", slots=SLOTS, tags=("second",)):
            first = await world.build("src", tags=("second",))
            assert [(candidate.worker, candidate.missing) for candidate in first.why] == [("w2", src.size)]
            await eventually(lambda: world.known("w2") == (src.digest[:TREE_HINT],))
            await go_there("src", "w2", "w1")
            assert (await world.build("lib")).worker == "w1"
            await eventually(lambda: world.known("w1") == (lib.digest[:TREE_HINT],))
            await go_there("lib", "w1", "w2")
            first_life = world.boot("w2")
        async with a_worker(world.bus, tmp_path / "w2", "w2", slots=SLOTS):
            await eventually(lambda: world.boot("w2") != first_life)
            await eventually(lambda: world.known("w2") == (src.digest[:TREE_HINT],))
            await go_there("src", "w2", "w1")
        assert world.shop.requests == {"manifest": 2, "blobs": 2}
