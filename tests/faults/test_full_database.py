"""The disk of the database is full, and then it is not."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.faults.conftest import Start
from tests.faults.system import System
from tests.faults.test_database import ask
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, sleeping

ON_A_SMALL_DISK = """
cd "$PENSTOCK_DATA" && mv pg made && mkdir -m 700 pg && mount -t tmpfs -o size=$0 tmpfs pg && cp -a made/. pg && exec "$@"
"""
LARGE = INSTANT._replace(script="true #" + "x" * 100_000)
"""Some 100 kB of the log: the database has to grow for it."""


def with_its_database_on_a_disk_of(size: str, start: Start) -> System:
    """A disk of its own, which nobody else sees."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return start(wrapped=["unshare", "--mount", *user, "sh", "-c", ON_A_SMALL_DISK, size])


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 12))


@pytest.mark.parametrize("what", ["tables", "log of writes"])
async def test_on_a_full_disk_the_answer_is_503_and_all_goes_on_when_there_is_room(start: Start, what: str) -> None:
    """FAULTS 72, while a step runs: tables cannot grow, which the database says; or it cannot begin a new file of its write-ahead log, which ends it
    until there is room. Nobody else ends."""
    system = with_its_database_on_a_disk_of("160m", start)
    ballast = Path(f"/proc/{system.process('gateway').pid}/root{system.data.postgres}/ballast")
    services = {name: system.process(name) for name in ("gateway", "builds", "scheduler", "artifacts", "worker")}
    async with Traffic(system) as traffic:
        await traffic.submit(sleeping(1))
        await traffic.under_way()
        superuser = await system.database()
        fill(ballast)
        if what == "log of writes":
            await superuser.execute("SELECT pg_switch_wal()")
        refused = 0
        while refused < 5:
            status, answer, seconds = await asyncio.to_thread(ask, system, "POST", "/teams/main/builds", {"plan": LARGE.plan(system.mark)})
            assert seconds < 5, (status, answer, seconds)
            if status != 202:
                assert (status, answer["type"]) == (503, "urn:penstock:problem:unavailable"), answer
                refused += 1
        assert superuser.is_closed() == (what == "log of writes")
        await superuser.close()
        ballast.unlink()
        await system.ready()
        await traffic.submit(INSTANT)
        # What was answered 503 is a build that ends, or none.
        for build in [build async for build in traffic.client.builds()]:
            traffic.accepted.setdefault(build.id, LARGE)
        await traffic.verify()
    assert {name: system.process(name) for name in services} == services
