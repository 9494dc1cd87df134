"""Parts of logs that the bus has lost, or has late: they are archived nevertheless. And logs that are no text."""

import subprocess
import sys
import urllib.request

from proto.events.artifact import LogArchived
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, talking

NO_UTF_8 = b"latin1 \xe9 \xff\xfe\n\xc3(\x80 \xed\xa0\x80 \xf4\x90\x80\x80\n\r\x1b\x9b an unfinished one \xe2\x82"


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
                if there:  # what comes between asking and purging would go unseen
                    await streams.purge_stream("EVENTS", subject=subject)
                return bool(there)

            await eventually(purged)
        await eventually(lambda: archives(system), timeout=60)
        [archived] = await archives(system)
        assert (archived.gaps, archived.lines) == ([], 1 + len(work.lines))
        await traffic.verify()


async def test_a_log_that_is_no_utf_8_is_kept_byte_for_byte(system: System) -> None:
    """FAULTS 103: as the worker published it, and when only the archive has it; by HTTP, by the client and on the command line."""
    written = "".join(f"\\0{byte:03o}" for byte in NO_UTF_8)
    async with system.bus() as bus, Traffic(system) as traffic:

        async def seen(build: str) -> list[bytes]:
            headers = {"Authorization": f"Bearer {system.token}", "Accept": "text/plain"}
            request = urllib.request.Request(f"{system.url}/api/v1/teams/main/builds/{build}/log?stage=main&attempt=1&from=1", headers=headers)
            with urllib.request.urlopen(request, timeout=10) as response:
                by_http = response.read()
            by_client = b"".join([piece async for piece in traffic.client.log_text(build)])
            command = subprocess.run(
                [sys.executable, "-m", "penstock", "logs", build, "--plain"], env=system.environ, capture_output=True, timeout=30
            )
            return [by_http, *(text.partition(b"\n")[2] for text in (by_client, command.stdout))]

        with system.without("artifacts"):
            build = await traffic.submit(INSTANT._replace(script=f"printf %b '{written}'"))
            await traffic.ended()
            assert await seen(build.id) == [NO_UTF_8] * 3
        await eventually(lambda: archives(system), timeout=20)

        async def archived_only() -> bool:
            return (await bus.jetstream().stream_info("LOGS")).state.messages == 0

        await eventually(archived_only, timeout=20)
        await system.ready()
        assert await seen(build.id) == [NO_UTF_8] * 3
