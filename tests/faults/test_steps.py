"""Steps that take what they can get: the worker and everybody else's builds live on, in bounded memory (FAULTS 55, 56, 100, 101)."""

from pathlib import Path

from tests.controls import eventually
from tests.faults.processes import descendants
from tests.faults.system import SERVICES, System
from tests.faults.traffic import Traffic
from tests.faults.work import MIX, Work

MOST_GROWTH = {"worker": 96 << 20, "gateway": 64 << 20, "builds": 64 << 20, "scheduler": 64 << 20, "artifacts": 256 << 20}
"""Bytes that a service's memory may grow by at its highest. The artifacts service holds the log that it archives."""
FLOODS = 3


def highest(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


async def test_floods_of_log_cost_nobody_else_anything(system: System) -> None:
    """Without newlines, and with nothing else; the others' builds end meanwhile, and no service's memory grows with what is written."""
    floods = ("head -c 300000000 /dev/zero | tr '\\0' 'x'; echo >&2", "yes | head -c 200000000", "yes '' | head -c 100000000 >&2")
    async with Traffic(system) as traffic:
        for work in MIX:
            await traffic.submit(work)
        await traffic.ended()
        before = {name: highest(system.process(name).pid) for name in SERVICES}
        builds = [await traffic.submit(Work(f"flood {number}", flood, lines=())) for number, flood in enumerate(floods)]
        others = [await traffic.submit(work) for work in MIX]
        await traffic.ended()
        grown = {name: highest(system.process(name).pid) - before[name] for name in SERVICES}
        print("memory grew by (MB):", {name: size >> 20 for name, size in grown.items()})
        assert {name: size >> 20 for name, size in grown.items() if size > MOST_GROWTH[name]} == {}
        facts = await system.log()
        for build in (*builds, *others):
            traffic.verify_events(build.id, facts)
        for build in builds:
            await eventually(lambda build=build: archived(traffic, build.id), timeout=60)
            assert b"log limit of 64 MiB reached, " in await tail(traffic, build.id)
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
    script = """python3 - <<'END'
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
files = []
try:
    for _ in range(100_000):
        files.append(open('/dev/null'))
except OSError as error:
    print(type(error).__name__)
print(len(files) > 500)
import time
time.sleep(1)
END"""
    async with Traffic(system) as traffic:
        worker = system.process("worker")
        build = await traffic.submit(Work("opening", script))
        for work in MIX:
            await traffic.submit(work)
        await traffic.ended()
        assert "True\n" in [line.text for line in (await traffic.client.log(build.id)).lines]
        del traffic.accepted[build.id]
        facts = await system.log()
        for other in traffic.accepted:
            traffic.verify_events(other, facts)
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
