"""The power is cut while builds run (FAULTS 58): what was acknowledged is there."""

import os
from pathlib import Path

import pytest

from tests.faults.conftest import Start
from tests.faults.powercut import Chunk, Disk, aftermath, journaled, lost
from tests.faults.traffic import Traffic


@pytest.mark.skipif(os.geteuid() != 0, reason="disks are root's to mount")
async def test_after_a_power_cut_nothing_that_was_acknowledged_is_lost(start: Start, tmp_path: Path) -> None:
    """Twice. Every event that anyone could have read is in the log, every build that was accepted ends, every artifact is whole, and so is every log
    as far as the worker's journal was synced; the bus may have forgotten anything. A log's last words may be missing, if it says so."""
    disk = Disk(tmp_path / "image")
    system = start(wrapped=disk.wrapped)
    kept: set[Chunk] = set()
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            for _ in range(2):
                await traffic.under_way()
                before = await system.log()
                await disk.cut(system)
                system.up()
                kept |= await journaled(system)
                assert await lost(system, before) == 0
        assert (await aftermath(system, traffic, kept)).wrong == []
