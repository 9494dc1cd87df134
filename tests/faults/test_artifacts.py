"""An upload outlives what dies under it: what was stored stays for an hour, and the client goes on by itself. What came to nothing leaves nothing."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from penstock.client import Client, PenstockError, Transfer
from proto.events.artifact import ArtifactSealed
from tests.controls import eventually, files_in
from tests.faults.folders import same, write
from tests.faults.storage import nothing_but_what_lives, stored
from tests.faults.system import System
from tests.faults.work import archive, files_of

SIZE = 64 << 20
WHOLE = archive({"big": os.urandom(SIZE)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of several packs."""
    write(tmp_path / "work", {"big": os.urandom(SIZE), "small": b"s"})
    return tmp_path / "work"


def halfway(system: System, act: Callable[[], object]) -> Callable[[Transfer], None]:
    """Does something once, when half of what there is to send was sent, and some of it stored."""
    done: list[object] = []

    def tell(transfer: Transfer) -> None:
        if transfer.phase == "sending" and not done and transfer.done >= transfer.total / 2 and len(stored(system)) >= 4:
            done.append(act())

    return tell


async def sealed(system: System) -> int:
    return len([fact for fact in await system.log("artifact") if isinstance(fact.event, ArtifactSealed)])


@pytest.mark.parametrize("name", ["artifacts", "gateway"])
async def test_an_upload_goes_on_when_its_receiver_has_died(system: System, folder: Path, tmp_path: Path, name: str) -> None:
    """FAULTS 32: nothing is visible before it is whole, what was stored is not sent again, and nothing is stored twice."""
    packs: list[set[Path]] = []
    before = system.process(name)

    def die() -> None:
        packs.append(set(stored(system)))
        system.kill(name)

    async with system.client() as client:
        artifact = await client.upload(folder, progress=halfway(system, die))
        await system.back(name, before)
        # two may have been on their way, and nobody's yet
        assert packs and len(packs[0] - set(stored(system))) <= 2
        assert sum(files_in(system.data.blobs).values()) < SIZE + (1 << 20)
        assert [each.id async for each in client.artifacts()] == [artifact.id]
        assert await sealed(system) == 1
        await client.download(artifact, tmp_path / "back")
        assert same(tmp_path / "back", folder)
        await nothing_but_what_lives(system, client)


async def test_a_client_that_goes_away_leaves_what_it_sent_for_an_hour(system: System, folder: Path) -> None:
    """FAULTS 29, 32: whoever sends the same within that time sends only the rest; afterwards nothing of it is left."""
    async with system.client() as client:
        sending = asyncio.create_task(client.upload(folder, progress=halfway(system, lambda: sending.cancel())))
        await asyncio.wait([sending])
        assert sending.cancelled()
        await eventually(lambda: published(client), timeout=20)
        left = stored(system)
        assert [artifact async for artifact in client.artifacts()] == []
        sent: list[Transfer] = []
        artifact = await client.upload(folder, progress=sent.append)
        assert set(left) <= set(stored(system))
        totals = {transfer.total for transfer in sent if transfer.phase == "sending"}
        assert len(totals) == 1 and 0 < totals.pop() <= SIZE * 3 / 4
        await client.delete(artifact)
        await nothing_but_what_lives(system, client)
        again = asyncio.create_task(client.upload(folder, progress=halfway(system, lambda: again.cancel())))
        await asyncio.wait([again])
        await eventually(lambda: stored(system))
        await nothing_but_what_lives(system, client)
        assert stored(system) == []
        assert await sealed(system) == 3


async def published(client: Client) -> bool:
    """A quarter of it, at least."""
    return (await client.usage()).stored_bytes > SIZE / 4


class Stream:
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


@pytest.mark.parametrize("name", ["artifacts", "gateway"])
async def test_a_stream_can_be_read_only_once_and_leaves_nothing_when_its_receiver_dies(system: System, name: str) -> None:
    """FAULTS 32: the client is told, nothing is visible, and what was stored is collected at once."""
    stream = Stream()
    async with system.client() as client:
        sending = asyncio.create_task(client.upload(stream.pieces()))
        await stream.halfway.wait()
        await eventually(lambda: stored(system))
        died = system.kill(name)
        stream.go_on.set()
        with pytest.raises(PenstockError):
            await sending
        await system.back(name, died)
        await eventually(lambda: stored(system) == [], timeout=20)
        assert [artifact async for artifact in client.artifacts()] == []
        await round_trip(system)


async def test_a_client_that_disconnects_in_the_middle_of_a_stream_leaves_nothing(system: System) -> None:
    """FAULTS 29, 32."""
    stream = Stream()
    async with system.client() as client:
        sending = asyncio.create_task(client.upload(stream.pieces()))
        await stream.halfway.wait()
        await eventually(lambda: stored(system))
        sending.cancel()
        await asyncio.wait([sending])
    await eventually(lambda: stored(system) == [], timeout=20)
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
