"""50 power cuts while builds run: 0 acknowledged facts lost (FAULTS 58). The bus keeps what it likes.

`python -m tests.soak.powercut [--rounds N] [--seed S]`."""

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.figures import Figure
from tests.faults.powercut import Chunk, Disk, aftermath, journaled, lost
from tests.faults.traffic import Traffic
from tests.faults.work import MIX
from tests.soak.options import Options, none, say
from tests.soak.rounds import alone
from tests.soak.system import fresh_system

ROUNDS = 50
END_SECONDS = 120.0


async def run(options: Options) -> list[Figure]:
    figures = await cuts(options.many(ROUNDS, 1), options.chance("powercut"), options.until())
    return [options.done(figures[0].name, int(figures[0].measured), ROUNDS), *figures[1:]]


async def cuts(rounds: int, chance: random.Random, until: float) -> list[Figure]:
    done, facts, gone = 0, 0, 0
    kept: set[Chunk] = set()
    with tempfile.TemporaryDirectory(prefix="penstock-disk-") as folder:
        disk = Disk(Path(folder) / "image")
        with fresh_system(wrapped=disk.wrapped) as system:
            async with Traffic(system) as traffic:
                while done < rounds and time.monotonic() < until:
                    submitting = asyncio.create_task(_some(traffic))
                    await traffic.under_way()
                    await asyncio.sleep(chance.uniform(0, 1.5))
                    before = await system.log()
                    await disk.cut(system)
                    system.up()
                    kept |= await journaled(system)
                    done, facts, gone = done + 1, len(before), gone + await lost(system, before)
                    say(f"cut {done}: {facts} facts before it, {gone} lost so far")
                    await submitting
                after = await aftermath(system, traffic, kept, END_SECONDS)
                for what in after.wrong:
                    say(what)
    return [
        Figure("power cuts", done, ""),
        Figure("facts that were there at the last", facts, ""),
        none("acknowledged facts lost", gone),
        none("accepted builds that did not end once, as they should, or whose outputs or journaled words are not whole", len(after.wrong)),
        Figure("chunks of logs that the journal had after a cut", len(kept), ""),
        Figure("builds whose log lacks what had not reached the disk, and says so", len(after.marked), ""),
    ]


async def _some(traffic: Traffic) -> None:
    for work in MIX:
        await traffic.submit(work)


if __name__ == "__main__":
    sys.exit(alone("powercut", "Cut the power of a system that runs builds, again and again.", ROUNDS, cuts))
