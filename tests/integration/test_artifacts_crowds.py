"""Many at once, and slow ones: nobody keeps another team, or builds, from their turn; and what is damaged is not passed off as expired."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from libs.archives.tree import CHUNK
from libs.runtime.http import TIMEOUTS, Timeouts
from services.artifacts import answers
from services.artifacts.wiring import wire
from tests.artifacts_fixture import TREE, Api, manifest, serving, tar
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
        assert (await api.get(mine["id"], "?path=large")).status == 200


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
        (pack,) = (path for path in api.store.rglob("*") if path.is_file() and path.stat().st_size > 100_000)
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
