"""How fast a worker runs no-op stages and carries log lines, beside the bare spawn rates of the same run. No server: the bus is in memory.

python -m tests.bench.bench_worker [--profile]
"""

import asyncio
import cProfile
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proto.messages import Attempt
from services.worker.executors.sandboxes import Folders, Sandbox, first_that_works, interpreter_folders
from tests.bench.logs import show_errors_only
from tests.worker_controls import PATH, Scheduler, a_system, sandboxes_here, sh, step

STAGES = 400
SLOTS = 4
LINES = 2_000_000


def bare(sandbox: Sandbox, folder: Path, count: int) -> float:
    """Spawns of `true` per second, one after another."""
    folders = Folders.below(folder / "bare")
    for path in (folders.workspace, folders.home, folders.temp):
        path.mkdir(parents=True)
    argv, cwd = sandbox.command(["/usr/bin/true"], folders, "")
    start = time.perf_counter()
    for _ in range(count):
        subprocess.run(argv, cwd=cwd, env={"PATH": PATH}, stdin=subprocess.DEVNULL, check=True, start_new_session=True)
    return count / (time.perf_counter() - start)


async def stages(scheduler: Scheduler, count: int) -> float:
    """No-op stages per second, as many at once as there are slots."""
    start = time.perf_counter()
    room = asyncio.Semaphore(SLOTS)

    async def one() -> None:
        async with room:
            await scheduler.finished(await scheduler.send(step("true")), 60)

    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.perf_counter() - start)


async def lines(scheduler: Scheduler) -> tuple[float, Attempt]:
    start = time.perf_counter()
    attempt = await scheduler.send(sh(f"yes 'a line of output as a compiler writes them, sixty bytes' | head -n {LINES}"))
    extent = await scheduler.finished(attempt, 120)
    assert extent.lines == LINES + 1, extent
    return LINES / (time.perf_counter() - start), attempt


async def main(profile: bool) -> None:
    for choice in sandboxes_here():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sandbox = first_that_works(choice, folder, interpreter_folders(PATH))
            spawns = bare(sandbox, folder, STAGES // 2)
            async with a_system(folder, sandbox=choice, slots=SLOTS, log_limit=1 << 30) as (scheduler, _):
                await stages(scheduler, 20)
                profiler = cProfile.Profile()
                if profile:
                    profiler.enable()
                cpu = time.process_time()
                rate = await stages(scheduler, STAGES)
                cpu = (time.process_time() - cpu) / STAGES * 1000
                profiler.disable()
                if profile:
                    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
                line_rate = (await lines(scheduler))[0]
        print(
            f"{sandbox.name:12} bare spawns {spawns:6.0f}/s   no-op stages {rate:6.0f}/s with {SLOTS} slots "
            f"({cpu:.2f} ms of this process each, test scheduler included)   log {line_rate:9.0f} lines/s"
        )


if __name__ == "__main__":
    show_errors_only()
    asyncio.run(main("--profile" in sys.argv))
