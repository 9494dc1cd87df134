"""The store away, the database away, slow peers, a lost index; and trees and files of any size in bounded memory."""

import asyncio
import hashlib
import io
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from libs.archives.tree import CHUNK, ZERO_CHUNK, Entry
from libs.blobstore.objects import Folder, StoreUnavailable
from libs.eventlog.postgres import open_postgres_log
from libs.runtime.http import TIMEOUTS, Timeouts
from proto.events.artifact import LogArchived
from services.artifacts.wiring import wire
from tests.artifacts_fixture import TREE, Api, blob_stream, manifest, missing, running, serving, tar
from tests.controls import eventually, write
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

FILES = {"a": b"alpha", "d/b": b"beta"}


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


async def test_while_the_store_is_away_uploads_are_503_and_go_on_afterwards(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = str(uuid4())
    pending = (await api.send_manifest(FILES, artifact)).json

    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as patch:
        for name in ("put", "get"):
            patch.setattr(Folder, name, away)
        for answer in (
            await api.send_blobs(artifact, blob_stream(missing(FILES, pending))),
            await api.upload(tar(FILES)),
            await api.send_manifest({"new": b"n"}),
        ):
            assert (answer.status, answer.problem, answer.headers["Retry-After"]) == (503, "unavailable", "1")
    assert (await api.send_blobs(artifact, blob_stream(missing(FILES, pending)))).status == 201
    await api.reads_back(artifact, FILES)


async def test_when_all_connections_are_at_work_the_answer_is_503_at_once(api: Api, database: Database) -> None:
    """FAULTS 77: a lock that somebody holds keeps the four of the pool busy; who comes then does not wait for it."""
    made = await api.put(FILES)
    holder = await asyncpg.connect(database.url("postgres"))
    try:
        await holder.execute("BEGIN; LOCK TABLE artifacts.blob, artifacts.pack IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        crowd = {asyncio.create_task(api.get(made["id"], "?format=tree")) for _ in range(20)}
        while len(crowd) > 6:
            done, crowd = await asyncio.wait(crowd, timeout=5 - (time.monotonic() - started), return_when=asyncio.FIRST_COMPLETED)
            assert done, f"{len(crowd)} still wait"
            for task in done:
                assert (task.result().status, task.result().problem) == (503, "unavailable")
    finally:
        await holder.close()
    await asyncio.gather(*crowd)
    await api.reads_back(made["id"], FILES)


async def test_a_team_whose_folder_is_lost_is_told_what_is_lost_and_one_upload_heals_it(api: Api) -> None:
    files = {"a": os.urandom(9 << 20), "b": b"small"}
    made, other = await api.put(files), await api.put({"c": b"another"})
    theirs = await api.put(files, team="other")
    shutil.rmtree(api.store / "main")
    for query in ("", "?format=tree", "?path=b"):
        answer = await api.get(made["id"], query)
        assert (answer.status, answer.problem) == (500, "damaged"), answer.body
        assert "is gone" in answer.json["detail"] and "uploading the same files again heals it" in answer.json["detail"]
    await api.reads_back(theirs["id"], files, "other")
    again = await api.put(files)
    for artifact in (again, made):
        await api.reads_back(artifact["id"], files)
    assert (await api.get(other["id"])).status == 500
    await api.put({"c": b"another"})
    await api.reads_back(other["id"], {"c": b"another"})


async def test_a_sender_that_dawdles_is_cut_off_and_what_it_sent_is_kept(
    database: Database, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hasty(*arguments: object) -> object:
        app = await wire(*arguments)  # type: ignore[arg-type]
        assert app is not None
        app[TIMEOUTS] = Timeouts(body=0.3)
        return app

    monkeypatch.setattr("tests.artifacts_fixture.wire", hasty)
    async with serving(database, nats_server, tmp_path / "store") as api:
        never = asyncio.Event()

        async def slowly(body: bytes) -> AsyncIterator[bytes]:
            yield body
            await never.wait()

        files = {"large": os.urandom(1 << 20), "small": b"s"}
        artifact = str(uuid4())
        chunks = missing(files, (await api.send_manifest(files, artifact)).json)
        answer = await api.send_blobs(artifact, slowly(blob_stream(chunks[:1], end=bytes(1))))
        assert (answer.status, answer.problem) == (408, "slow-body")
        again = await api.send_manifest(files, artifact)
        assert missing(files, again.json) == chunks[1:]
        assert (await api.upload(slowly(tar(FILES)[:600]))).status == 408


async def test_what_lives_is_held_again_when_the_index_was_lost(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    store = tmp_path / "store"
    async with serving(database, nats_server, store) as api:
        kept, deleted = await api.put(FILES), await api.put({"x": b"x"})
        await api.of(deleted["id"], "change", "DELETE")
        await eventually(lambda: len(api.stored()) <= 2)
    async with open_postgres_log(database.url("artifacts")) as log:
        lost = LogArchived(build="b", stage="s", attempt=1, archive=1, digest="ab" * 32, chunks=1, lines=1, bytes=1)
        await log.append([write("artifact-log-b-s-1", lost)])
    async with open_postgres_log(database.url("postgres")) as log:
        await log.pool.execute("DROP TABLE artifacts.hold, artifacts.blob, artifacts.pack, artifacts.adopted, artifacts.leftover, artifacts.upload")
        async with serving(database, nats_server, store) as api:
            await eventually(lambda: _only_uploads_hold(log.pool))
            await api.reads_back(kept["id"], FILES)
            await api.of(kept["id"], "change", "DELETE")
            await eventually(lambda: api.stored() == [])


async def _only_uploads_hold(pool: object) -> bool:
    holders = await pool.fetch("SELECT DISTINCT holder FROM artifacts.hold")  # type: ignore[attr-defined]
    return bool(holders) and all(row[0].startswith("upload:") for row in holders)


async def test_a_file_of_fifty_gigabytes_of_holes_costs_next_to_nothing(api: Api) -> None:
    last = os.urandom(1000)
    size = 50 << 30
    chunks = size // CHUNK
    huge = Entry(b"huge", "file", 0o644, size + 1000, ZERO_CHUNK * chunks + hashlib.sha256(last).digest())
    artifact = str(uuid4())
    pending = await api.send_manifest(manifest([huge]), artifact)
    assert pending.json == {"id": artifact, "missing": [[1, 1]], "missing_bytes": 1000, "missing_blobs": 1}
    assert (await api.send_blobs(artifact, blob_stream([last]))).json["size"] == size + 1000
    part = await api.get(artifact, "?path=huge", Range=f"bytes={size - 5}-{size + 4}")
    assert part.body == bytes(5) + last[:5]
    part = await api.get(artifact, Range="bytes=-1")
    assert (part.status, part.body) == (206, b"\0")


async def test_a_tree_of_100_000_files_takes_bounded_memory(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    """Some 115 MB, all in all, 77 of them for nothing, and 400 bytes for each file."""
    digests = [hashlib.sha256(b"%d" % n).digest() for n in range(100_000)]
    entries = (Entry(b"%04d" % (n // 1000), "folder", 0o755) if n % 1000 == 0 else _small(n, digests) for n in range(100_000))
    body = tmp_path / "manifest"
    body.write_bytes(manifest(entries))
    async with running(database, nats_server, tmp_path / "store", "one") as service:
        api, artifact = service.api, str(uuid4())
        with body.open("rb") as opened:
            pending = await api.of(artifact, "put", "POST", data=opened, headers={"Content-Type": TREE})
        assert pending.json["missing_blobs"] == 99_900
        assert (await api.send_blobs(artifact, blob_stream(b"%d" % n for n in range(100_000) if n % 1000))).status == 201
        for method, below, action, data in (
            ("GET", "?format=tree", "get", None),
            ("GET", "?format=tar", "get", None),
            ("POST", "/blobs", "get", b"".join(digest for n, digest in enumerate(digests) if n % 1000)),
            ("GET", "/tree?recursive=1", "see", None),
            ("GET", "?path=0099/099999", "get", None),
        ):
            options = {} if data is None else {"data": io.BytesIO(data)}
            url = f"{api.url}/artifacts/{artifact}{below}"
            async with api.session.request(method, url, headers=api.grant(artifact, action), **options) as answer:
                assert answer.status == 200
                while await answer.content.readany():
                    pass
        assert service.peak < 130_000_000, f"{service.peak >> 20} MiB"


def _small(n: int, digests: list[bytes]) -> Entry:
    return Entry(b"%04d/%06d" % (n // 1000, n), "file", 0o644, len(b"%d" % n), digests[n])
