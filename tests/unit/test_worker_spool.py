"""The worker's journal."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.worker import spool as module
from services.worker.spool import Spool
from tests.controls import eventually


@asynccontextmanager
async def a_spool(folder: Path) -> AsyncIterator[Spool]:
    spool = Spool(folder)
    try:
        yield spool
    finally:
        await spool.close()


async def test_what_is_written_is_read_back_by_a_later_life(tmp_path: Path) -> None:
    async with a_spool(tmp_path) as spool:
        places = [spool.append(f"record {i}".encode()) for i in range(10)]
        assert spool.read(places[3]) == b"record 3"
    async with a_spool(tmp_path) as again:
        assert [record for _, record in again.replay()] == [f"record {i}".encode() for i in range(10)]


async def test_a_torn_end_is_left_out(tmp_path: Path) -> None:
    async with a_spool(tmp_path) as spool:
        spool.append(b"whole")
        spool.append(b"torn away")
    (journal,) = tmp_path.glob("*.journal")
    os.truncate(journal, journal.stat().st_size - 3)
    async with a_spool(tmp_path) as again:
        assert [record for _, record in again.replay()] == [b"whole"]
        again.append(b"after")
    async with a_spool(tmp_path) as last:
        assert [record for _, record in last.replay()] == [b"whole", b"after"]


async def test_an_end_of_zeros_is_left_out(tmp_path: Path) -> None:
    """FAULTS 58: the file system knew the size, and had not written what is there."""
    async with a_spool(tmp_path) as spool:
        spool.append(b"whole")
    (journal,) = tmp_path.glob("*.journal")
    os.truncate(journal, journal.stat().st_size + 50)
    async with a_spool(tmp_path) as again:
        assert [record for _, record in again.replay()] == [b"whole"]


async def test_a_file_in_which_nothing_is_wanted_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    async with a_spool(tmp_path) as spool:
        places = [spool.append(b"x" * 400) for _ in range(9)]
        assert len(list(tmp_path.glob("*.journal"))) == 3
        for place in places:
            spool.release(place)
        await eventually(lambda: len(list(tmp_path.glob("*.journal"))) == 1)


async def test_a_file_stays_until_what_was_written_before_it_was_released_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 58: a record that was carried forward is in a file that survives a power cut, the old one or the new one."""
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    go_on, synced = threading.Event(), os.fdatasync
    async with a_spool(tmp_path) as spool:
        old = spool.append(b"x" * 1000)
        await eventually(lambda: not spool._unsynced | spool._busy)

        def held_up(descriptor: int) -> None:
            go_on.wait()
            synced(descriptor)

        monkeypatch.setattr(os, "fdatasync", held_up)
        try:
            spool.append(spool.read(old))
            spool.release(old)
            first = tmp_path / f"{old.file:08d}.journal"
            assert first.exists(), "not written out yet"
            await eventually(lambda: spool._busy)
            assert first.exists(), "being written out"
        finally:
            go_on.set()
        await eventually(lambda: not first.exists())


async def test_many_records_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    async with a_spool(tmp_path) as spool:
        for _ in range(1000):
            spool.append(b"report")
        await eventually(lambda: len(syncs) == 1)
        await asyncio.sleep(0)
    assert len(syncs) == 1


async def test_a_full_disk_refuses_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 53"""
    real = os.pwrite
    async with a_spool(tmp_path) as spool:
        spool.append(b"before")
        monkeypatch.setattr(os, "pwrite", lambda fd, text, offset: real(fd, text[:5], offset))
        with pytest.raises(OSError, match="No space left"):
            spool.append(b"too much")
        monkeypatch.undo()
        spool.append(b"after")
    async with a_spool(tmp_path) as again:
        assert [record for _, record in again.replay()] == [b"before", b"after"]
