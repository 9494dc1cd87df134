"""The database is put back as it was some time ago (FAULTS 73): what was recorded since is gone, and everything that is there goes on."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

from libs.embedded.postgres import EmbeddedPostgres, _binary
from libs.eventlog.migrate import migrate, raise_epoch
from proto.events.artifact import LogArchived
from proto.events.request import BuildRequested
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.test_bus import relayed
from tests.faults.traffic import Traffic
from tests.faults.work import COPYING, FAILING, INSTANT, sleeping, talking

SERVICES = ("gateway", "builds", "scheduler", "artifacts")


async def forget_the_lost(system: System, traffic: Traffic) -> int:
    """How many builds are not there any more."""
    known = {fact.event.build for fact in await system.log("request") if isinstance(fact.event, BuildRequested)}
    lost = traffic.accepted.keys() - known
    for build in lost:
        del traffic.accepted[build]
    return len(lost)


async def archived(system: System) -> set[str]:
    """The builds with a log that is put away."""
    return {fact.event.build for fact in await system.log("artifact") if isinstance(fact.event, LogArchived)}


async def goes_on(system: System, traffic: Traffic) -> None:
    """What is there ends once, as it should, and so does what comes now; nothing of what is lost comes back."""
    for work in (INSTANT, COPYING, talking(20, 0.01)):
        await traffic.submit(work)
    await traffic.verify()
    await eventually(lambda: relayed(system))


async def test_after_a_failover_that_lost_a_tail_all_goes_on(system: System, tmp_path: Path) -> None:
    """A replica that was behind is the primary now. Nobody but Postgres was stopped: services, worker and bus know of events that are gone, and of
    attempts that run and, as the log has it, do not, or that have ended and have not."""
    services = {name: system.process(name) for name in SERVICES}
    async with Traffic(system) as traffic:
        for work in (INSTANT, COPYING, FAILING):
            await traffic.submit(work)
        await traffic.ended()
        await traffic.submit(talking(40, 0.1))
        await traffic.submit(sleeping(4))
        await traffic.under_way()
        before = system.process("postgres")
        with system.without("postgres"):
            shutil.copytree(system.data.postgres, tmp_path / "behind", symlinks=True)
        await system.back("postgres", before)
        for work in (INSTANT, COPYING, sleeping(5)):
            await traffic.submit(work)
        await traffic.ended()
        await traffic.submit(talking(100, 0.1))
        await traffic.submit(sleeping(8))
        await traffic.under_way()
        before, head = system.process("postgres"), (await system.log())[-1].position
        with system.without("postgres"):
            shutil.rmtree(system.data.postgres)
            shutil.copytree(tmp_path / "behind", system.data.postgres, symlinks=True)
        await system.back("postgres", before)
        await raise_epoch(dsn(system))
        assert (await system.log())[-1].position < head
        for name, process in services.items():
            await system.back(name, process)
        await system.ready()
        assert await forget_the_lost(system, traffic) == 5
        await goes_on(system, traffic)


async def test_a_dump_is_restored_and_all_goes_on(system: System, tmp_path: Path) -> None:
    """As an operator would: a dump of the running system; some day a new database, and the dump put into it. The bus, the store and the worker are of
    that day."""
    async with Traffic(system) as traffic:
        async with traffic.trickle(at_least=8):
            await asyncio.to_thread(tool, system, "pg_dump", "--format=custom", f"--file={tmp_path / 'dump'}")
        await traffic.submit(sleeping(1))
        await traffic.ended()
        await traffic.submit(sleeping(20))
        await traffic.under_way()
        before = await archived(system)
        system.down()
        shutil.rmtree(system.data.postgres)
        passwords = system.data.secrets().database
        fresh = EmbeddedPostgres(system.data.postgres, system.ports.postgres, system.data.log("postgres"), passwords["postgres"])
        fresh.start()
        try:
            await migrate(fresh.dsn(), passwords)
            onto = ("--clean", "--if-exists", "--exit-on-error", "--dbname=postgres")
            await asyncio.to_thread(tool, system, "pg_restore", *onto, str(tmp_path / "dump"))
        finally:
            fresh.stop()
        system.up("--restored")
    async with Traffic(system) as again:  # the gateway may be at another port
        again.accepted, again.unlogged = traffic.accepted, before - await archived(system)
        assert await forget_the_lost(system, again) >= 2
        await goes_on(system, again)


def dsn(system: System) -> str:
    return f"postgresql://postgres:{system.data.secrets().database['postgres']}@127.0.0.1:{system.ports.postgres}/postgres?sslmode=disable"


def tool(system: System, name: str, *words: str) -> None:
    environ = {**os.environ, "PGPASSWORD": system.data.secrets().database["postgres"]}
    command = [_binary(name), "--host=127.0.0.1", f"--port={system.ports.postgres}", "--username=postgres", *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
