"""What is stored is not what was stored: blocks of the bus with flipped bits, an old copy of its store, positions of the log that leap."""

import random
import shutil
from pathlib import Path

import pytest

from proto.topology import CONSUMERS
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.test_bus import relayed
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, sleeping, talking

JUMP = 10**12
LEAP = """
INSERT INTO eventlog.event (position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at)
SELECT max(position) + $1, 'team-leap', 1, 'leap', 'team.created', '{"name": "leap"}', 'leap', 'leap', 'leap', 'test', clock_timestamp()
FROM eventlog.event
"""


def blocks(system: System) -> list[Path]:
    """The files in which the bus keeps its messages."""
    return [path for path in system.data.nats.rglob("*.blk") if path.stat().st_size]


@pytest.mark.parametrize("seed", [1, 2])
async def test_flipped_bits_in_what_the_bus_keeps_cost_no_build(system: System, seed: int) -> None:
    """FAULTS 61: three times while builds run, somewhere in every block."""
    chance = random.Random(seed)
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            for _ in range(3):
                # a stream may have lost all that it had the last time
                await eventually(lambda: {path.parent.parent.name for path in blocks(system)} >= {"EVENTS", "REPORTS"})
                before = system.process("nats")
                with system.without("nats"):
                    for path in blocks(system):
                        content = bytearray(path.read_bytes())
                        for _ in range(4):
                            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                        path.write_bytes(content)
                await system.back("nats", before)
                await traffic.under_way()
        await traffic.verify()


async def test_an_old_copy_of_the_busses_store_is_brought_up_to_date(system: System, tmp_path: Path) -> None:
    """FAULTS 58: what a power cut leaves of a store that syncs every two minutes. Streams end before what they acknowledged; consumers have seen what
    is not there."""
    store, copy = system.data.nats / "store", tmp_path / "copy"
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            before = system.process("nats")
            with system.without("nats"):
                shutil.copytree(store, copy)
            await system.back("nats", before)
            for _ in range(2):
                for work in (talking(30, 0.02), sleeping(0.5), INSTANT):
                    await traffic.submit(work)
                await traffic.under_way()
                before = system.process("nats")
                with system.without("nats"):
                    shutil.rmtree(store)
                    shutil.copytree(copy, store)
                await system.back("nats", before)
        await traffic.verify()


async def test_positions_that_leap_are_positions_like_others(system: System) -> None:
    """FAULTS 74: as after a restore elsewhere; nothing counts them."""
    async with Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        await traffic.ended()
        database = await system.database()
        try:
            async with traffic.trickle(at_least=10), database.transaction():
                await database.execute("SELECT pg_advisory_xact_lock(x'70656e73746f636b'::bigint)")
                await database.execute(LEAP, JUMP)
            build = await traffic.submit(sleeping(0.2))
            await traffic.ended()
            assert (await traffic.client.build(build.id)).positions["status"] > JUMP
            await traffic.verify()
            await eventually(lambda: relayed(system))
        finally:
            await database.close()


async def test_a_consumer_whose_file_a_power_cut_has_spoilt_costs_no_build(system: System) -> None:
    """FAULTS 58, 60: its state is zeroes, or half of what it was; the server would never open it again."""
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            for spoil in (lambda content: bytes(len(content)), lambda content: content[: len(content) // 2]):
                before = system.process("nats")
                with system.without("nats"):
                    spoilt = list(system.data.nats.rglob("obs/*/o.dat"))
                    assert len(spoilt) == len(CONSUMERS)
                    for path in spoilt:
                        path.write_bytes(spoil(path.read_bytes()))
                await system.back("nats", before)
                await traffic.under_way()
        await traffic.verify()
