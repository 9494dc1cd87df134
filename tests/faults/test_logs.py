"""Parts of logs that the bus has lost, or has late: they are archived nevertheless."""

from proto.events.artifact import LogArchived
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import talking


async def archives(system: System) -> list[LogArchived]:
    return [fact.event for fact in await system.log("artifact") if isinstance(fact.event, LogArchived)]


async def test_what_the_bus_has_lost_of_a_log_comes_from_the_worker_and_fills_the_gaps(system: System) -> None:
    """FAULTS 61: all chunks of an ended attempt vanish from LOGS before anybody has read them. The first archive lists them as gaps, and the
    worker, which is told so, sends them again."""
    work = talking(50, 0.001)
    async with system.bus() as bus, Traffic(system) as traffic:
        with system.without("artifacts"):
            await traffic.submit(work)
            await traffic.ended()
            await bus.jetstream().purge_stream("LOGS")

        async def filled() -> bool:
            first, *_, last = await archives(system)
            return bool(first.gaps and not last.gaps)

        async def begun() -> bool:
            return len(await archives(system)) > 1

        await eventually(begun, timeout=60)
        await eventually(filled, timeout=20)
        await traffic.verify()

        async def forgotten() -> bool:
            return (await bus.jetstream().stream_info("LOGS")).state.messages == 0

        await eventually(forgotten, timeout=20)


async def test_the_end_of_an_attempt_that_the_bus_has_lost_leads_to_an_archive_nevertheless(system: System) -> None:
    """FAULTS 61"""
    work = talking(20, 0.001)
    async with system.bus() as bus, Traffic(system) as traffic:
        with system.without("artifacts"):
            await traffic.submit(work)
            await traffic.ended()
            streams = bus.jetstream()

            async def purged() -> bool:
                """Once it is there, it goes, and only it."""
                subject = "events.build.*.*.StageFinished"
                there = (await streams.stream_info("EVENTS", subjects_filter=subject)).state.subjects
                await streams.purge_stream("EVENTS", subject=subject)
                return bool(there)

            await eventually(purged)
        await eventually(lambda: archives(system), timeout=60)
        [archived] = await archives(system)
        assert (archived.gaps, archived.lines) == ([], 1 + len(work.lines))
        await traffic.verify()
