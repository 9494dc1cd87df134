"""A system of the soak's own, and workers of it that may be killed and come back."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from penstock.client.joining import Membership
from penstock.up.processes import Identity, identify, send
from tests.faults.system import System, running
from tests.faults.workers import registered, worker_process


@cache
def _template() -> "tempfile.TemporaryDirectory[str]":
    """Where a system had its first start; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="penstock-soak-")
    template = System(Path(folder.name))
    template.up()
    template.down()
    return folder


@contextmanager
def fresh_system(**options: Any) -> Iterator[System]:
    """A running system; nothing of it is left afterwards. If something goes wrong, what its logs say last is said."""
    with running(Path(_template().name) / "data", **options) as system:
        try:
            yield system
        except BaseException:
            print(system.last_words(), file=sys.stderr, flush=True)
            raise


class Mate:
    """A worker beside the local one; whenever it dies it is started again. `process`: its present life."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.process: Identity | None = None

    def hit(self, number: signal.Signals) -> Identity:
        """Signal it; who was hit. Raises AssertionError while it does not run."""
        assert self.process is not None and send(self.process, number), f"{self.name} does not run"
        return self.process

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP, and in the end SIGCONT, for its present life."""
        process = self.hit(signal.SIGSTOP)
        try:
            yield
        finally:
            send(process, signal.SIGCONT)

    async def live(self, system: System, member: Membership, slots: int, bus: str) -> None:
        """For ever."""
        while True:
            async with worker_process(system, member, slots=slots, bus=bus) as process:
                self.process = identify(process.pid)
                await process.wait()
            await asyncio.sleep(0.2)


@asynccontextmanager
async def mates(system: System, names: Sequence[str], slots: int, bus: str = "") -> AsyncIterator[list[Mate]]:
    """So many more workers, which reach the bus at `bus`."""
    made = [Mate(name, system.home / name) for name in names]
    lives = [asyncio.create_task(mate.live(system, await registered(system, mate.name), slots, bus)) for mate in made]
    try:
        yield made
    finally:
        for life in lives:
            life.cancel()
        await asyncio.wait(lives)
