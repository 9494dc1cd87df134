"""Steps that take what they can get: the worker and everybody else's builds live on, in bounded memory (FAULTS 55, 56, 100, 101)."""

from pathlib import Path

import pytest

from tests.controls import eventually
from tests.faults.conftest import Start
from tests.faults.processes import descendants
from tests.faults.system import SERVICES, System
from tests.faults.traffic import Traffic
from tests.faults.work import MIX, Work

MOST_GROWTH = {**dict.fromkeys(SERVICES, 48 << 20), "nats": 384 << 20}
"""Bytes that a service's memory may grow by at its highest: less than one log. The bus may hold what there is of three."""


def highest(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.timeout(240)
async def test_floods_of_log_cost_nobody_else_anything(start: Start) -> None:
    """FAULTS 100, 101: gigabytes without a newline and without an end, millions of lines a second, and nothing but newlines; the others' builds end
    meanwhile, and no service's memory grows with what is written."""
    system = start(lease=15.0)  # as it is by default: what is looked for here is no lost lease
    endless = Work("endless flood", "tr '\\0' 'x' </dev/zero", "aborted", None)
    floods = (endless, Work("lines", "yes | head -c 200000000"), Work("newlines", "yes '' | head -c 100000000 >&2"))
    async with Traffic(system) as traffic:
        for work in MIX:
            await traffic.submit(work)
        await traffic.ended()
        processes = {name: system.process(name) for name in (*SERVICES, "nats")}
        before = {name: highest(process.pid) for name, process in processes.items()}
        builds = [await traffic.submit(flood) for flood in floods]
        others = [await traffic.submit(work) for work in MIX]
        for build in others:
            await traffic.client.wait(build.id)
        assert not await traffic.has_ended(builds[0].id), "it went on all the time"
        await traffic.client.abort(builds[0].id)
        await traffic.ended()
        facts = await system.log()
        for build in (*builds, *others):
            traffic.verify_events(build.id, facts)
        for build in builds:
            await eventually(lambda build=build: archived(traffic, build.id), timeout=60)
            assert b"log limit of 64 MiB reached, " in await tail(traffic, build.id)
        assert {name: system.process(name) for name in processes} == processes, "one that has died has no highest"
        grown = {name: highest(process.pid) - before[name] for name, process in processes.items()}
        print("memory grew by (MB):", {name: size >> 20 for name, size in grown.items()})
        assert {name: size >> 20 for name, size in grown.items() if size > MOST_GROWTH[name]} == {}
        for build in others:
            await eventually(lambda build=build: traffic._verify_log(build.id), timeout=45)


async def archived(traffic: Traffic, build: str) -> bool:
    return (await traffic.client.log(build, start=10**12)).complete


async def tail(traffic: Traffic, build: str) -> bytes:
    end = b""
    async for piece in traffic.client.log_text(build):
        end = (end + piece)[-1000:]
    return end


async def test_a_step_that_opens_all_the_files_it_can_hurts_itself_alone(system: System) -> None:
    """As many as its limit allows, up to 100,000, for as long as others' builds take."""
    script = """exec python3 - <<'END'
import resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
files = []
try:
    for _ in range(100_000):
        files.append(open('/dev/null'))
except OSError as error:
    print(error.strerror, flush=True)
print(len(files) > 500, flush=True)
time.sleep(600)
END"""
    async with Traffic(system) as traffic:
        worker = system.process("worker")
        build = await traffic.submit(Work("opening", script, "aborted", None))

        async def opened() -> bool:
            return "True\n" in [line.text for line in (await traffic.client.log(build.id)).lines]

        await eventually(opened, timeout=30)
        others = [await traffic.submit(work) for work in MIX]
        for other in others:
            await traffic.client.wait(other.id)
        assert not await traffic.has_ended(build.id), "it had them open all the time"
        await traffic.client.abort(build.id)
        await traffic.ended()
        facts = await system.log()
        for one in traffic.accepted:
            traffic.verify_events(one, facts)
        assert system.process("worker") == worker


async def test_a_swarm_that_forks_away_dies_with_its_step(system: System) -> None:
    """FAULTS 55, 56: two hundred processes, each in a session of its own, with a closed standard output, and more of them all the time."""
    script = """breed() { while :; do setsid sleep 600 </dev/null >/dev/null 2>&1 & sleep 0.01; done; }
i=0; while [ $i -lt 200 ]; do (setsid sleep 600 </dev/null >/dev/null 2>&1 &) ; i=$((i+1)); done
trap '' TERM; breed >/dev/null 2>&1 & echo swarming; sleep 1; exit 3"""
    async with Traffic(system) as traffic:
        worker = system.process("worker")
        build = await traffic.submit(Work("swarm", script, "failed", 3, ("swarming\n",)))
        await eventually(lambda: len(system.steps()) > 150, timeout=30)
        for work in MIX:
            await traffic.submit(work)
        await traffic.ended()
        await eventually(lambda: system.steps() == [], timeout=20)
        assert system.process("worker") == worker
        assert len(descendants(worker.pid)) < 10
        assert (await traffic.client.build(build.id)).exit_code == 3
        await traffic.verify()
