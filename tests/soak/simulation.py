"""The pure core, simulated: 10⁷ steps from seeds. `python -m tests.soak.simulation SEED` lives one world again."""

import asyncio
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import structlog

from tests.bench.figures import Figure
from tests.soak.options import Options, none, say

STEPS = 10_000_000
STEPS_OF_A_WORLD = 5_000
AT_ONCE = 2
"""Processes."""


async def run(options: Options) -> list[Figure]:
    """Worlds in processes of their own, whose hash seed is fixed: the order of a set is part of what a seed decides."""
    wanted, until, began = options.many(STEPS, 60_000), options.until(), time.monotonic()
    first = options.chance("simulation").randrange(1 << 40)
    command = [sys.executable, "-m", "tests.soak.simulation"]
    share = [str(wanted // AT_ONCE), str(max(until - began, 0.0))]
    workers = [
        await asyncio.create_subprocess_exec(
            *command, str(first + number * (1 << 40)), *share, env={**os.environ, "PYTHONHASHSEED": "0"}, stdout=subprocess.PIPE
        )
        for number in range(AT_ONCE)
    ]
    steps = worlds = failures = 0

    async def follow(process: asyncio.subprocess.Process) -> None:
        nonlocal steps, worlds, failures
        assert process.stdout is not None
        async for line in process.stdout:
            seed, took = line.split()
            steps, worlds, failures = steps + max(int(took), 0), worlds + 1, failures + (int(took) < 0)
            if int(took) < 0:
                say(f"FAILED: python -m tests.soak.simulation {int(seed)}")
            if worlds % 200 == 0:
                say(f"{worlds} worlds, {steps:,} steps, {steps / (time.monotonic() - began):,.0f}/s")
        if await process.wait():
            failures += 1

    try:
        await asyncio.gather(*map(follow, workers))
    finally:
        for process in workers:
            if process.returncode is None:
                process.kill()
    return [
        options.done("simulation: steps", steps, STEPS),
        Figure("simulation: worlds, each from a seed of its own", worlds, ""),
        Figure(f"simulation: steps/s in {AT_ONCE} processes", steps / (time.monotonic() - began), "/s"),
        none("simulation: worlds in which something was not as it must be", failures),
    ]


@contextmanager
def quick() -> Iterator[None]:
    """Nothing is signed, snapshots are frequent, and nobody writes what goes wrong: it does all the time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with (
        patch("services.scheduler.presence.verify", lambda key, context, signed: signed.body),
        patch("services.scheduler.reader.SNAPSHOT_EVERY", 40),
    ):
        yield


def main(first: int, steps: int | None = None, seconds: float = float("inf")) -> int:
    """One world; or worlds one after another, until so many steps are done. Each is a line on stdout: its seed, and its steps (-1: it failed)."""
    from tests.simulation.life import lived

    seed, done, until, failed = first, 0, time.monotonic() + seconds, False
    with quick():
        while done < (steps or 1) and time.monotonic() < until:
            try:
                took = asyncio.run(lived(seed, STEPS_OF_A_WORLD))
            except Exception:
                traceback.print_exc()
                took, failed = -1, True
            print(seed, took, flush=True)
            seed, done = seed + 1, done + max(took, STEPS_OF_A_WORLD)
    return int(failed and steps is None)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, "-m", "tests.soak.simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None, float(sys.argv[3]) if sys.argv[3:] else float("inf")))
