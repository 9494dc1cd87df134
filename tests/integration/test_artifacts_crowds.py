"""Many at once, and slow ones: nobody keeps another team, or builds, from their turn; and what is damaged is not passed off as expired."""

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from libs.archives.compression import compressed
from libs.archives.tree import CHUNK
from libs.runtime.http import TIMEOUTS, Timeouts
from services.artifacts import answers
from services.artifacts.receiving import UPLOADS
from services.artifacts.wiring import wire
from tests.artifacts_fixture import TREE, Answer, Api, blob_stream, manifest, missing, running, serving, tar
from tests.controls import eventually, files_in
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

FILES = {"a": b"alpha", "d/b": b"beta"}


class Hanging:
    """A body that has begun, and does not go on by itself."""

    def __init__(self) -> None:
        self.begun, self.on = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun.set()
        yield tar(FILES)[:600]
        await self.on.wait()
        yield tar(FILES)[600:]


async def begun(api: Api, team: str = "main") -> tuple[Hanging, asyncio.Task[int]]:
    body = Hanging()

    async def upload() -> int:
        return (await api.of(str(uuid4()), "put", "POST", team=team, data=aiter(body), expect100=True)).status

    task = asyncio.create_task(upload())
    await asyncio.wait_for(body.begun.wait(), 10)
    return body, task


async def test_a_team_that_takes_all_its_turns_takes_no_other_teams_and_no_builds(
    database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_MAX_UPLOADS="4") as api:
        hanging = [await begun(api, team) for team in ("main", "other", "third")]
        known = "?tree=" + "0" * 64
        for refused in (await api.upload(tar(FILES)), await api.of(str(uuid4()), "put", "POST", known), await api.upload(tar(FILES), team="fourth")):
            assert (refused.status, refused.problem, refused.headers["Retry-After"]) == (429, "too-many-uploads", "1")
        headers = {**api.build(), "Content-Type": TREE}
        assert (await api.ask("POST", "/outputs/step/out", headers, data=manifest({}))).status != 429
        for body, _ in hanging:
            body.on.set()
        assert await asyncio.gather(*(task for _, task in hanging)) == [201] * 3
        assert (await api.upload(tar(FILES))).status == 201


async def test_a_body_that_drips_is_cut_once_another_waits_for_its_turn(
    database: Database, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hasty(*arguments: object) -> object:
        app = await wire(*arguments)  # type: ignore[arg-type]
        assert app is not None
        app[TIMEOUTS] = Timeouts(body=0.3)
        return app

    async def dripping() -> AsyncIterator[bytes]:
        yield tar(FILES)[:600]
        while True:
            await asyncio.sleep(0.05)
            dripped.append(asyncio.get_running_loop().time())
            yield bytes(1024)

    dripped: list[float] = []
    monkeypatch.setattr("tests.artifacts_fixture.wire", hasty)
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_MAX_UPLOADS="1") as api:
        drip = asyncio.create_task(api.upload(dripping()))
        while not dripped or dripped[-1] - dripped[0] < 1:
            await asyncio.sleep(0.05)
            assert not drip.done(), "nobody waits"
        assert (await api.upload(tar(FILES))).status == 429
        answer = await drip
        assert (answer.status, answer.problem) == (408, "slow-body")
        assert (await api.upload(tar(FILES))).status == 201


async def test_only_so_many_downloads_run_at_once_and_each_team_has_some(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    large = {"large": bytes(8 * CHUNK)}
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_MAX_DOWNLOADS="4") as api, AsyncExitStack() as stack:
        mine, others = await api.put(large), await api.put(large, team="other")
        session = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        url = f"{api.url}/artifacts/{mine['id']}"
        unread = await stack.enter_async_context(session.get(url, headers=api.grant(mine["id"], "get")))
        assert unread.status == 200
        for refused in (await api.get(mine["id"]), await api.blobs(mine["id"], [])):
            assert (refused.status, refused.problem, refused.headers["Retry-After"]) == (429, "too-many-downloads", "1")
        assert (await api.get(others["id"], "?path=large", team="other")).status == 200
        assert (await api.of(mine["id"], "see", "GET", "/tree")).status == 200
        while await unread.content.readany():
            pass

        async def has_its_turn() -> bool:
            return (await api.get(mine["id"], "?path=large")).status == 200

        await eventually(has_its_turn)  # the last byte may be read before the service has let go of the turn


async def test_a_reader_must_take_more_than_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_WRITE_SECONDS", 0.2)
    monkeypatch.setattr(answers, "_WRITE_LEAST", 100)
    monkeypatch.setattr(answers, "_WRITTEN", 10)

    class Slow:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds
            self.taken = 0

        async def write(self, part: memoryview) -> None:
            await asyncio.sleep(self.seconds)
            self.taken += len(part)

    quick, slow = Slow(0.001), Slow(0.05)
    await answers._Pace(quick).write(bytes(1000))  # type: ignore[arg-type]
    assert quick.taken == 1000
    pace = answers._Pace(slow)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        for _ in range(50):
            await pace.write(bytes(10))
    assert slow.taken < 100


async def test_what_is_made_of_a_damaged_artifact_is_said_to_be_damaged_and_not_to_have_expired(
    database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with serving(database, nats_server, tmp_path / "store") as api:
        files = {"d/b": os.urandom(100_000), "e": os.urandom(1000)}
        made = await api.put({"d/b": files["d/b"]})
        (pack,) = (api.store / name for name, size in files_in(api.store).items() if size > 100_000)
        data = bytearray(pack.read_bytes())
        data[data.find(files["d/b"]) + 50_000] ^= 1
        pack.write_bytes(data)
        assert (await api.get(made["id"], "?path=d/b")).status == 500
        for query in ("", "&path=d"):
            part = str(uuid4())
            answer = await api.of(part, "put", "POST", f"?from={made['id']}{query}")
            assert (answer.status, answer.problem) == (500, "damaged")
            assert (await api.send_manifest({"other": b"tree"}, part)).status == 202, "nothing of it is left"
        data[data.find(files["d/b"][:1000]) + 50_000] ^= 1
        pack.write_bytes(data)
        assert (await api.get(made["id"], "?path=d/b")).body == files["d/b"], "it was only away"
        for query in ("", "&path=d"):
            assert (await api.of(str(uuid4()), "put", "POST", f"?from={made['id']}{query}")).status == 201


MB = 1 << 20


async def test_150_readers_that_do_not_read_cost_their_team_its_turns_and_nobody_anything_else(
    database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    """FAULTS 18: of 96 turns a team has 24, all people have 72, and builds have the rest; memory is bounded by turns, not by readers."""
    large = {"large": os.urandom(4 * CHUNK)}
    async with running(database, nats_server, tmp_path / "store", "one") as service, AsyncExitStack() as stack:
        api = service.api
        mine, theirs = await api.put(large), await api.put(FILES, team="other")
        builds = api.build("b1", inputs={"src": mine["digest"]})
        before = service.peak
        readers = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)))

        async def read(artifact: str, team: str) -> int:
            url = f"{api.url}/artifacts/{artifact}?path=large"
            return (await stack.enter_async_context(readers.get(url, headers=api.grant(artifact, "get", team)))).status

        assert Counter(await asyncio.gather(*(read(mine["id"], "main") for _ in range(150)))) == {200: 24, 429: 126}
        assert (await api.get(theirs["id"], team="other")).status == 200
        assert (await api.of(mine["id"], "see", "GET", "/tree")).status == 200
        assert (await api.put({"c": b"gamma"}))["files"] == 1
        assert (await api.ask("GET", "/inputs/src", builds)).status == 200
        for team in ("second", "third"):
            artifact = (await api.put(large, team=team))["id"]
            assert Counter(await asyncio.gather(*(read(artifact, team) for _ in range(50)))) == {200: 24, 429: 26}
        assert (await api.get(theirs["id"], team="other")).status == 429, "people have had all their turns"
        for _ in range(3):
            chunk = hashlib.sha256(large["large"][:CHUNK]).digest()
            assert (await api.ask("POST", "/inputs/src/blobs", builds, data=chunk)).status == 200
        assert service.peak - before < 72 * 16 * MB
        await readers.close()

        async def free() -> bool:
            return (await api.get(mine["id"], "?path=large")).body == large["large"]

        await eventually(free)


async def as_chunks(api: Api, files: dict[str, bytes], team: str) -> Answer:
    answer = await api.send_manifest(files, artifact := str(uuid4()), team)
    return await api.send_blobs(artifact, blob_stream(missing(files, answer.json)), team)


async def as_packed_chunks(api: Api, files: dict[str, bytes], team: str) -> Answer:
    answer = await api.send_manifest(files, artifact := str(uuid4()), team)
    packed = b"".join(compressed(iter([blob_stream(missing(files, answer.json))]), "tzst"))
    return await api.send_blobs(artifact, packed, team, **{"Content-Encoding": "zstd"})


async def as_tar(api: Api, files: dict[str, bytes], team: str) -> Answer:
    return await api.upload(tar(files), team=team)


async def as_packed_tar(api: Api, files: dict[str, bytes], team: str) -> Answer:
    return await api.upload(b"".join(compressed(iter([tar(files)]), "tzst")), team=team)


@pytest.mark.parametrize(("send", "most"), [(as_chunks, 100), (as_tar, 150), (as_packed_chunks, 200), (as_packed_tar, 210)])
async def test_16_uploads_of_large_files_at_once_share_the_memory_of_a_few(
    database: Database, nats_server: NatsServer, tmp_path: Path, send: Callable[..., Awaitable[Answer]], most: int
) -> None:
    """Each on its own would take some 16 MB, and the packs that are on their way to the disk 32. What of a body is at hand comes on top, and what it
    takes to unpack it."""
    base = memoryview(os.urandom(2 * CHUNK))
    files = [{"large": b"".join((b"%016d" % number, base[16:CHUNK], b"%016d" % number, base[CHUNK + 16 :]))} for number in range(16)]
    async with running(database, nats_server, tmp_path / "store", "one") as service:
        before = service.peak
        done = await asyncio.gather(*(send(service.api, each, f"team{number % 2}") for number, each in enumerate(files)))
        assert [(each.status, each.json["size"]) for each in done] == [(201, 2 * CHUNK)] * 16
        assert service.peak - before < most * MB


async def test_uploads_that_are_opened_and_left_cost_their_team_its_turns_and_nobody_anything_else(
    database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    """FAULTS 7, 8"""
    async with running(database, nats_server, tmp_path / "store", "one") as service:
        api, before, answered = service.api, service.peak, Counter[int]()
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

        async def leave(begun: list[bytes]) -> None:
            headers = api.grant(artifact := str(uuid4()), "put")
            async with session.post(f"{api.url}/artifacts/{artifact}", headers=headers, data=_begun(begun), expect100=True) as answer:
                answered[answer.status] += 1

        begun: list[bytes] = []
        left = [asyncio.create_task(leave(begun)) for _ in range(200)]
        most = UPLOADS // 4
        await eventually(lambda: (len(begun), answered) == (most, {429: 200 - most}))
        assert (await api.upload(tar(FILES))).status == 429
        assert (await api.upload(tar(FILES), team="other")).status == 201
        headers = {**api.build(), "Content-Type": TREE}
        assert (await api.ask("POST", "/outputs/step/out", headers, data=manifest({}))).status == 201
        assert service.peak - before < (most + 2) * 24 * MB
        for task in left:
            task.cancel()
        await asyncio.wait(left)
        await session.close()

        async def free() -> bool:
            return (await api.upload(tar(FILES))).status == 201

        await eventually(free)


async def _begun(begun: list[bytes]) -> AsyncIterator[bytes]:
    begun.append(b"")
    yield tar(FILES)[:600]
    await asyncio.Event().wait()
