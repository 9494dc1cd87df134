"""Uploads that do not come to their end leave nothing."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from penstock.client import PenstockError
from proto.events.artifact import ArtifactSealed
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.work import archive, files_of

WHOLE = archive({"big": os.urandom(40 << 20)})


class Upload:
    """An archive that is sent up to its middle, and on when it is let go."""

    def __init__(self) -> None:
        self.halfway = asyncio.Event()
        self.go_on = asyncio.Event()

    async def pieces(self) -> AsyncIterator[bytes]:
        middle = len(WHOLE) // 2
        for at in range(0, middle, 1 << 18):
            yield WHOLE[at : at + (1 << 18)]
        self.halfway.set()
        await self.go_on.wait()
        yield WHOLE[middle:]


def stored(system: System) -> Sequence[Path]:
    """Every file of the store, whatever it is for."""
    return sorted(path for path in system.data.blobs.rglob("*") if path.is_file())


async def sealed(system: System) -> int:
    return len([fact for fact in await system.log("artifact") if isinstance(fact.event, ArtifactSealed)])


async def test_an_upload_whose_receiver_dies_leaves_nothing(system: System) -> None:
    """FAULTS 32: artifacts is killed with half of it stored; the client is told, nothing is visible, and what was stored is collected."""
    upload = Upload()
    async with system.client() as client:
        await client.upload(archive({"before": b"1"}))
        before = stored(system)
        sending = asyncio.create_task(client.upload(upload.pieces()))
        await upload.halfway.wait()
        await eventually(lambda: stored(system) != before)
        died = system.kill("artifacts")
        upload.go_on.set()
        with pytest.raises(PenstockError):
            await sending
        await system.back("artifacts", died)
        await eventually(lambda: stored(system) == before)
        assert len([artifact async for artifact in client.artifacts()]) == await sealed(system) == 1
        await round_trip(system)


async def test_an_upload_whose_gateway_dies_leaves_nothing(system: System) -> None:
    """FAULTS 32: the pipe between them is cut."""
    upload = Upload()
    async with system.client() as client:
        sending = asyncio.create_task(client.upload(upload.pieces()))
        await upload.halfway.wait()
        await eventually(lambda: stored(system))
        died = system.kill("gateway")
        upload.go_on.set()
        with pytest.raises(PenstockError):
            await sending
        await system.back("gateway", died)
        await eventually(lambda: stored(system) == [])
        assert [artifact async for artifact in client.artifacts()] == []
        await round_trip(system)


async def test_a_client_that_disconnects_in_the_middle_of_an_upload_leaves_nothing(system: System) -> None:
    """FAULTS 29, 32."""
    upload = Upload()
    async with system.client() as client:
        sending = asyncio.create_task(client.upload(upload.pieces()))
        await upload.halfway.wait()
        await eventually(lambda: stored(system))
        sending.cancel()
        await asyncio.wait([sending])
    await eventually(lambda: stored(system) == [])
    assert await sealed(system) == 0
    await round_trip(system)


async def round_trip(system: System) -> None:
    """All of it, sent and fetched, is what it was."""
    pieces: list[bytes] = []

    async def keep(piece: bytes) -> None:
        pieces.append(piece)

    async with system.client() as client:
        await client.download(await client.upload(WHOLE), keep)
    assert files_of(b"".join(pieces)) == files_of(WHOLE)
