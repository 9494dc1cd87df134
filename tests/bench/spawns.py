"""How fast this machine spawns `true`, with nothing of Penstock around it but the sandboxes' command lines."""

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from services.worker.executors.sandboxes import Choice, Folders, Sandbox, first_that_works, interpreter_folders
from tests.bench.figures import Figure


def spawn_rates(count: int, at_once: int) -> tuple[list[Figure], dict[str, float]]:
    """Figures, and spawns/s by sandbox choice: `none`, `unshare`, `bwrap` (those that work here) and `auto`, the default."""
    rates: dict[str, float] = {}
    figures: list[Figure] = []
    choices: tuple[Choice, ...] = ("none", "unshare", "bwrap")
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        default = first_that_works("auto", folder, interpreter_folders("")).name
        for choice in choices:
            try:
                sandbox = first_that_works(choice, folder, interpreter_folders(""))
            except RuntimeError:
                continue
            rates[choice] = asyncio.run(_rate(sandbox, folder / "attempt", count, at_once))
            one = 1000 / asyncio.run(_rate(sandbox, folder / "attempt", max(count // 4, 20), 1))
            figures.append(Figure(f"bare spawn of true, {sandbox.name}, {at_once} at once", rates[choice], "/s"))
            figures.append(Figure(f"bare spawn of true, {sandbox.name}, one at a time", one, "ms"))
            rates[f"{choice} ms"] = one
            if sandbox.name == default:
                rates["auto"], rates["auto ms"] = rates[choice], one
    return figures, rates


async def _rate(sandbox: Sandbox, root: Path, count: int, at_once: int) -> float:
    folders = Folders.below(root)
    for path in (folders.workspace, folders.home, folders.temp):
        path.mkdir(parents=True, exist_ok=True)
    line, place = sandbox.command([shutil.which("true") or "/bin/true"], folders, "")
    numbers = iter(range(count))

    async def spawn() -> None:
        for _ in numbers:
            assert await _ended(line, place) == 0

    began = time.monotonic()
    await asyncio.gather(*(spawn() for _ in range(at_once)))
    return count / (time.monotonic() - began)


async def _ended(line: list[str], place: str) -> int:
    """As the worker does it: Popen in a session of its own, and a pidfd on the loop."""
    loop = asyncio.get_running_loop()
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=place, env={}, start_new_session=True
    )
    descriptor, ended = os.pidfd_open(process.pid), loop.create_future()
    loop.add_reader(descriptor, ended.set_result, None)
    try:
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return process.wait()
