"""What is uploaded, downloaded and built with while everything between is killed or cut: it arrives whole, and nothing else stays."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from msgspec.structs import replace

from penstock.client import Artifact, Client, Transfer, Unavailable
from penstock.client.http import Http
from penstock.client.model import Direct
from penstock.up.processes import Identity
from tests.faults.folders import SUMS, edited, files_in, same, some_files, write
from tests.faults.proxy import Proxy
from tests.faults.storage import nothing_but_what_lives
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import Work

T = TypeVar("T")

CHECKING = f"cd src && sha256sum --check --quiet {SUMS} && echo whole && cp -r . ../dist"
"""A step that finds out whether its input is whole, and makes an output of it."""
SEED = int(os.environ.get("PENSTOCK_FAULTS_SEED", random.SystemRandom().randrange(10**6)))
MIDDLE = 17 << 20
"""Bytes of a file of three chunks."""


@pytest.fixture
def chance() -> random.Random:
    """Chances of another kind in each run; a failure says how to have the same again."""
    print(f"PENSTOCK_FAULTS_SEED={SEED}")
    return random.Random(SEED)


class Customer:
    """Someone with a folder, which changes, is uploaded, fetched back and built with."""

    def __init__(self, traffic: Traffic, home: Path, chance: random.Random) -> None:
        self._traffic = traffic
        self._home = home
        self._chance = chance
        self.files = some_files(chance, 3 << 20)
        self.rounds = 0

    async def go_on(self, enough: asyncio.Event) -> None:
        """Again and again, three times at least."""
        while not enough.is_set() or self.rounds < 3:
            await self.round()
            self.rounds += 1

    async def round(self) -> None:
        client, folder = self._traffic.client, self._home / "work"
        write(folder, self.files)
        artifact = await client.upload(folder)
        work = Work("checking", CHECKING, lines=("whole\n",), outputs={"dist": self.files})
        build, fetched = await asyncio.gather(self._traffic.submit(work, artifact), self._fetched(artifact))
        assert same(fetched, folder)
        ended = await client.wait(build.id)
        assert ended.status == "succeeded", ended
        assert same(await self._fetched(ended.outputs["dist"]), folder)
        if self._chance.random() < 0.3:
            await client.delete(artifact)
        self.files = edited(self._chance, self.files)

    async def _fetched(self, artifact: Artifact) -> Path:
        """Into a folder that may have much of it already."""
        into = self._home / ("again" if self._chance.random() < 0.5 else artifact.id)
        for path in files_in(into).keys() - self.files.keys():
            (into / path).unlink()
        await self._traffic.client.download(artifact, into)
        return into


@asynccontextmanager
async def customers(traffic: Traffic, home: Path, chance: random.Random, number: int = 3) -> AsyncIterator[Sequence[Customer]]:
    """They go on within, and a little longer; whatever one of them finds wrong ends it."""
    enough = asyncio.Event()
    people = [Customer(traffic, home / f"customer{n}", random.Random(chance.random())) for n in range(number)]
    async with asyncio.TaskGroup() as group:
        for each in people:
            group.create_task(each.go_on(enough))
        yield people
        enough.set()


@pytest.mark.timeout(240)
async def test_uploads_downloads_and_builds_survive_deaths_at_random(system: System, tmp_path: Path, chance: random.Random) -> None:
    """FAULTS 32: of the artifacts service, the gateway and the database, one after another, in any order."""
    async with Traffic(system) as traffic:
        async with customers(traffic, tmp_path, chance):
            for _ in range(12):
                await asyncio.sleep(chance.uniform(0, 0.7))
                name = chance.choice(["artifacts", "gateway", "postgres"])
                before = system.kill(name)
                await system.back(name, before)
        await traffic.verify()
        await nothing_but_what_lives(system, traffic.client)
        async for artifact in traffic.client.artifacts():
            await traffic.client.delete(artifact)
        await nothing_but_what_lives(system, traffic.client)


class Blow:
    """Kills a service when something has moved for the `number`-th time."""

    def __init__(self, system: System, name: str, number: int) -> None:
        self._system = system
        self._name = name
        self._left = number
        self._died: Identity | None = None

    def __call__(self, _: Transfer) -> None:
        self._left -= 1
        if not self._left:
            self._died = self._system.kill(self._name)

    async def over(self) -> bool:
        """When it is back; whether it was killed at all."""
        if self._died is None:
            return False
        await self._system.back(self._name, self._died)
        return True


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "each"), [("artifacts", 1), ("gateway", 3), ("postgres", 3)])
async def test_an_upload_and_a_download_survive_a_death_at_any_point(system: System, tmp_path: Path, name: str, each: int) -> None:
    """FAULTS 32: when the client hears for the n-th time that something has moved, from the first byte that is hashed to the last that is written;
    of the service that receives at each n, of the others at every third."""
    chance = random.Random(name)
    work, back = tmp_path / "work", tmp_path / "back"
    files = some_files(chance, MIDDLE)
    async with system.client() as client:
        points, hit = {"upload": 1 - each, "download": 1 - each}, True
        while hit:
            # all chunks of the large file are others each time
            files = {**files, "large": chance.randbytes(MIDDLE)}
            write(work, files)
            points["upload"] += each
            blow = Blow(system, name, points["upload"])
            artifact = await client.upload(work, progress=blow)
            hit = await blow.over()
            assert await whole(client, artifact, work, back)
        hit = True
        while hit:
            points["download"] += each
            blow = Blow(system, name, points["download"])
            into = tmp_path / f"back{points['download']}"
            await client.download(artifact, into, progress=blow)
            hit = await blow.over()
            assert same(into, work)
        assert points["upload"] > 4 and points["download"] > 2, points
        await nothing_but_what_lives(system, client)


async def whole(client: Client, artifact: Artifact, folder: Path, into: Path) -> bool:
    await client.download(artifact, into)
    return same(into, folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("straight", [True, False], ids=["straight", "by the gateway"])
async def test_connections_that_are_cut_at_any_byte_cost_time_and_nothing_else(
    system: System, tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch, straight: bool
) -> None:
    """FAULTS 29: three clients behind proxies of the gateway and of the address that it offers them, or with no such address; most connections end
    early, some within their first bytes."""
    budgets = random.Random(chance.random())
    direct = Http.direct

    def budget() -> int:
        return budgets.randrange(30 << 20) if budgets.random() < 0.4 else int(10 ** budgets.uniform(0, 7))

    def through_proxy(http: Http, offered: Direct | None) -> Direct | None:
        found = direct(http, offered)
        if found is None or http.url == system.url:
            return found
        return replace(found, url=found.url.replace(f":{system.ports.artifacts}", f":{bytes_proxy.port}")) if straight else None

    monkeypatch.setattr(Http, "direct", through_proxy)
    with Proxy(system.ports.gateway, budget) as proxy, Proxy(system.ports.artifacts, budget) as bytes_proxy:

        async def one(number: int) -> None:
            mine = random.Random(chance.random())
            work = tmp_path / f"work{number}"
            files = some_files(mine, MIDDLE)
            url = f"http://127.0.0.1:{proxy.port}"
            async with system.client() as sure, Client(url, system.token, system.team, patience=60.0) as client:
                await reached(client)
                for again in range(3):
                    write(work, files)
                    artifact = await client.upload(work)
                    assert await whole(client, artifact, work, tmp_path / f"back{number}.{again}")
                    assert await whole(sure, artifact, work, tmp_path / f"sure{number}.{again}")
                    files = edited(mine, files)

        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(one(number))
        assert proxy.cut + bytes_proxy.cut > 10
        assert bool(bytes_proxy.cut) is straight
    async with system.client() as client:
        await nothing_but_what_lives(system, client)


async def reached(client: Client) -> None:
    """A client that has never had an answer gives up at once."""
    for _ in range(100):
        try:
            await client.info()
        except Unavailable:
            continue
        return
