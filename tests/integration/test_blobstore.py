"""Packs on a real folder and on a real S3 protocol, their index in a real Postgres: all or nothing, whatever dies, fills up or is damaged."""

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from libs.archives.pump import in_thread
from libs.archives.tree import CHUNK
from libs.blobstore.objects import Folder, ObjectMissing, Objects, open_objects
from libs.blobstore.store import (
    BlobDamaged,
    BlobMissing,
    BlobStore,
    QuotaExceeded,
    SizeDiffers,
    StoreFull,
    StoreUnavailable,
    open_blob_store,
)
from libs.eventlog.postgres import open_pool
from tests.controls import counter, eventually
from tests.postgres_fixture import Database
from tests.s3_fixture import S3Server


class Place:
    """Where a store is, and what is in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: Objects = open_objects(url)

    def stored(self) -> list[str]:
        return sorted(self.objects.list())

    def contents(self, key: str) -> bytes:
        return self.objects.end(key, 1 << 30)[0]

    def replace(self, key: str, data: bytes) -> None:
        self.objects.put(key, [data])


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place((tmp_path / "store").as_uri() if request.param == "folder" else request.getfixturevalue("s3")[1])


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place((tmp_path / "store").as_uri())


@asynccontextmanager
async def running(database: Database, url: str, boot: str = "boot", instance: str = "") -> AsyncIterator[BlobStore]:
    async with open_pool(database.url("artifacts")) as pool, open_blob_store(url, pool, counter(boot), instance=instance) as store:
        task = asyncio.create_task(store.run())
        try:
            await eventually(lambda: store.problem is None)
            yield store
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def uploaded(
    store: BlobStore, team: str, holder: str, blobs: Sequence[bytes], room: int | None = None, quota: int | None = None
) -> list[bytes]:
    upload = store.begin(team, holder, room, quota)

    def work() -> list[bytes]:
        digests = [upload.add(blob) for blob in blobs]
        upload.flush()
        return digests

    try:
        return await in_thread(work, store.threads)
    finally:
        await in_thread(upload.close, store.threads)


async def read(store: BlobStore, team: str, digests: Sequence[bytes]) -> list[bytes]:
    """Both ways."""
    reader = await store.reader(team, digests)
    in_order = await in_thread(lambda: [reader.read(digest) for digest in digests], store.threads)
    streamed = dict(await in_thread(lambda: list(reader.stream(digests)), store.threads))
    assert [streamed[digest] for digest in digests] == in_order
    return in_order


async def execute(database: Database, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database.url("artifacts"))
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def empty_after_collection(store: BlobStore, place: Place) -> None:
    await store.collect(silent_for=0, late_by=0)
    assert place.stored() == []


def some(count: int, size: int = 5000, seed: int = 0) -> list[bytes]:
    noise = random.Random(seed)
    return [noise.randbytes(1 + noise.randrange(size)) for _ in range(count)]


async def test_small_blobs_share_packs_and_read_back_in_any_order(database: Database, place: Place) -> None:
    blobs = some(3000, 9000)
    async with running(database, place.url) as store:
        digests = await uploaded(store, "main", "h", blobs)
        assert digests == [hashlib.sha256(blob).digest() for blob in blobs]
        assert len(place.stored()) == -(-sum(map(len, blobs)) // CHUNK)
        assert await read(store, "main", digests) == blobs
        mixed = random.Random(1).sample(range(3000), 3000)
        assert await read(store, "main", [digests[n] for n in mixed]) == [blobs[n] for n in mixed]
        assert (await store.reader("main", digests)).size(digests[7]) == len(blobs[7])
        assert await store.usage("main") == sum(len(place.contents(key)) for key in place.stored())


async def test_what_was_added_is_there_and_held_after_the_flush(database: Database, place: Place) -> None:
    async with running(database, place.url) as store:
        digests = await uploaded(store, "main", "h", [b"a", b"b", b"a", bytes(CHUNK), os.urandom(CHUNK)])
        assert digests[0] == digests[2]
        assert await store.held("main", "h") and not await store.held("main", "other")
        assert await store.hold("main", "other", [digests[1], b"x" * 32, digests[3], b"y" * 32], [1, 1, CHUNK, 1]) == [1, 3]
        await store.release("main", ["h"])
        assert (await store.collect()).packs == 1, "all but the one that the other holds"
        assert await store.get("main", digests[3]) == bytes(CHUNK)
        with pytest.raises(SizeDiffers, match=digests[3].hex()):
            await store.hold("main", "other", [digests[3]], [17])
        await store.release("main", ["other"])
        await empty_after_collection(store, place)


async def test_what_is_no_blob_is_refused(database: Database, folder: Place) -> None:
    async with running(database, folder.url) as store:
        for contents in (b"", bytes(CHUNK + 1)):
            with pytest.raises(ValueError, match="1 byte to 8 MiB"):
                await store.put("main", "h", contents)
            with pytest.raises(ValueError, match="1 byte to 8 MiB"):
                store.begin("main", "h").add(contents)


async def test_the_same_bytes_are_stored_once_within_a_team_and_apart_between_teams(database: Database, place: Place) -> None:
    """FAULTS 33"""
    blobs = some(50)
    async with running(database, place.url) as store:
        digests = await uploaded(store, "main", "h", blobs)
        with pytest.raises(BlobMissing):
            await store.get("other", digests[0])
        assert await store.hold("other", "h", digests) == list(range(50))
        before = place.stored()
        assert await store.put("main", "again", blobs[3]) == digests[3]
        assert await uploaded(store, "main", "again", blobs) == digests
        assert place.stored() == before
        await uploaded(store, "other", "h", blobs)
        assert len(place.stored()) == 2 * len(before)
        await store.release("main", ["h", "again"])
        await store.collect()
        assert await read(store, "other", digests) == blobs


async def test_two_uploads_of_the_same_blobs_at_once_keep_one_copy(database: Database, place: Place) -> None:
    blobs = some(200)
    async with running(database, place.url, "one") as one, running(database, place.url, "two") as two:
        for _ in range(5):
            await asyncio.gather(uploaded(one, "main", "h", blobs), uploaded(two, "main", "g", list(reversed(blobs))), two.collect())
            await one.release("main", ["h"])
            await one.collect()
            assert len(place.stored()) == 1
            assert await read(one, "main", [hashlib.sha256(blob).digest() for blob in blobs]) == blobs
            await one.release("main", ["g"])
            await one.collect()
            assert place.stored() == []


async def test_blobs_put_at_once_go_together(database: Database, place: Place) -> None:
    async with running(database, place.url) as store:
        digests = await asyncio.gather(*(store.put("main", f"log:{n % 20}", b"log %d" % n) for n in range(200)))
        assert await store.get("main", digests[117]) == b"log 117"
        assert len(place.stored()) <= 8
        await store.release("main", [f"log:{n}" for n in range(1, 20)])
        await store.collect()
        assert await read(store, "main", digests[::20]) == [b"log %d" % n for n in range(0, 200, 20)]
        # Ten are held. How many packs they came in, at most eight, was chance; one of so few that nothing is gained stays as it is.
        assert len(await store.hold("main", "x", digests)) >= 170, "what nobody holds was left out when the packs were rewritten"


async def test_an_upload_has_no_more_new_bytes_than_there_is_room_for(database: Database, place: Place) -> None:
    async with running(database, place.url) as store:
        await uploaded(store, "main", "h", [b"known" * 1000])
        await uploaded(store, "main", "h", [b"known" * 1000, b"new"], room=3)
        with pytest.raises(QuotaExceeded):
            await uploaded(store, "main", "g", [b"newer"], room=4)
        assert not await store.held("main", "g")


async def test_uploads_at_once_keep_to_the_quota_together(database: Database, folder: Place) -> None:
    """Each of them had room when it began; what fits does, whoever else is at it."""
    async with running(database, folder.url) as store:

        async def upload(number: int) -> bool:
            going = store.begin("main", f"h{number}", 50_000, 50_000)
            try:
                await in_thread(lambda: (going.add(os.urandom(9_000)), going.flush()), store.threads)
            except QuotaExceeded:
                return False
            finally:
                await in_thread(going.close, store.threads)
            return True

        assert sum(await asyncio.gather(*(upload(number) for number in range(8)))) == 5
        assert await store.usage("main") <= 50_000
        assert not await upload(9)


async def test_instances_keep_to_the_quota_together(database: Database, folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of both are under way at once; what one fails to store is the other's room."""
    put, on, at_it = Folder.put, threading.Event(), threading.Barrier(3)

    def waiting(self: Folder, key: str, data: Sequence[bytes]) -> None:
        at_it.wait(20)
        on.wait(20)
        if key.startswith("main/one"):
            raise StoreUnavailable("not this one")
        put(self, key, data)

    at = (running(database, folder.url, name) for name in ("one", "two", "three"))
    async with next(at) as one, next(at) as two, next(at) as three:
        tries = []
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "put", waiting)
            for number, store in enumerate((one, two)):
                tries.append(asyncio.create_task(_within(store, f"h{number}", 20_000, 50_000)))
            await asyncio.to_thread(at_it.wait, 20)
            with pytest.raises(QuotaExceeded):
                await _within(three, "h", 20_000, 50_000)
            on.set()
            first, second = await asyncio.gather(*tries, return_exceptions=True)
        assert isinstance(first, StoreUnavailable) and second is None
        await _within(three, "h", 20_000, 50_000)
        assert 40_000 < await one.usage("main") <= 50_000
        with pytest.raises(QuotaExceeded):
            await _within(one, "too much", 20_000, 50_000)


async def _within(store: BlobStore, holder: str, size: int, quota: int) -> None:
    going = store.begin("main", holder, quota, quota)
    try:
        await in_thread(lambda: (going.add(os.urandom(size)), going.flush()), store.threads)
    finally:
        await in_thread(going.close, store.threads)


async def test_what_is_lost_leaves_its_room_to_what_heals_it(database: Database, folder: Place) -> None:
    blobs = [os.urandom(2000) for _ in range(15)]
    async with running(database, folder.url) as store:
        digests = await uploaded(store, "main", "h", blobs)
        await store.put("other", "h", b"is there")
        folder.objects.delete([pack for pack in folder.stored() if pack.startswith("main/")])
        with pytest.raises(BlobDamaged):
            await store.get("main", digests[0])
        assert await store.usage("main") == 0
        assert await uploaded(store, "main", "again", blobs, quota=50_000) == digests
        assert await read(store, "main", digests) == blobs


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
async def test_a_damaged_pack_is_named_and_the_next_upload_heals_it_for_all_who_hold_it(database: Database, place: Place, damage: str) -> None:
    blobs = some(20)
    async with running(database, place.url) as store:
        digests = await uploaded(store, "main", "first", blobs)
        await store.share("main", "first", "second")
        await store.hold("main", "third", digests[:5])
        (pack,) = place.stored()
        whole = place.contents(pack)
        if damage == "gone":
            await store.put("main", "another", b"is there")
            place.objects.delete([pack])
        elif damage == "cut":
            place.replace(pack, whole[:100])
        else:
            place.replace(pack, bytes([whole[0] ^ 1]) + whole[1:])
        for way in (store.get("main", digests[0]), read(store, "main", digests)):
            with pytest.raises(BlobDamaged, match=f"{digests[0].hex()}.*{pack}"):
                await way
        missing = await store.hold("main", "fourth", digests)
        assert missing[0] == 0 and len(missing) == (1 if damage == "flip" else 20)
        await uploaded(store, "main", "fourth", blobs)
        assert await read(store, "main", digests) == blobs
        if damage == "gone":
            await store.collect()
            assert pack not in place.stored()
        await store.release("main", ["first", "fourth"])
        await store.collect()
        assert await read(store, "main", digests) == blobs, "the second holds all of it"
        await store.release("main", ["second"])
        await store.collect()
        assert await read(store, "main", digests[:5]) == blobs[:5], "the third holds five"
        assert len(await store.hold("main", "fifth", digests)) == 15
        await store.release("main", ["third", "fifth", "another"])
        await empty_after_collection(store, place)


async def test_a_store_that_is_not_mounted_for_a_moment_damages_nothing(database: Database, folder: Place, tmp_path: Path) -> None:
    blobs = some(20)
    async with running(database, folder.url) as store:
        digests = await uploaded(store, "main", "h", blobs)
        (tmp_path / "store").rename(tmp_path / "away")
        for mounted in (False, True):
            if mounted:
                (tmp_path / "store").mkdir()
            for way in (store.get("main", digests[0]), read(store, "main", digests)):
                with pytest.raises(StoreUnavailable):
                    await way
        (tmp_path / "store").rmdir()
        (tmp_path / "away").rename(tmp_path / "store")
        assert await store.hold("main", "g", digests) == []
        assert await read(store, "main", digests) == blobs


async def test_what_a_team_had_is_said_to_be_lost_with_its_folder_and_one_upload_heals_it(database: Database, folder: Place, tmp_path: Path) -> None:
    blobs, more = some(20), some(3, 4000)
    async with running(database, folder.url) as store:
        digests = await uploaded(store, "main", "h", blobs)
        others = await uploaded(store, "main", "g", more)
        theirs = await uploaded(store, "other", "h", blobs)
        (tmp_path / "store" / "main").rename(tmp_path / "lost")
        for way in (store.get("main", digests[0]), read(store, "main", digests)):
            with pytest.raises(BlobDamaged, match=r"pack main/.* is gone"):
                await way
        assert len(await store.hold("main", "i", [*digests, *others])) == 23, "all of it is missing, also what nobody has read"
        assert await store.hold("other", "i", theirs) == []
        await uploaded(store, "main", "i", [*blobs, *more])
        assert await read(store, "main", [*digests, *others]) == [*blobs, *more]
        await store.release("main", ["i"])
        await store.collect()
        assert await read(store, "main", [*digests, *others]) == [*blobs, *more], "those who held it hold what has come"


@pytest.mark.parametrize("way", ["read", "stream"])
async def test_what_was_taken_for_damaged_is_sound_once_it_reads_back(database: Database, place: Place, way: str) -> None:
    blobs = some(20)
    async with running(database, place.url) as store:
        digests = await uploaded(store, "main", "h", blobs)
        (pack,) = place.stored()
        await store.put("main", "another", b"is there")
        whole = place.contents(pack)
        place.objects.delete([pack])
        with pytest.raises(BlobDamaged):
            await read(store, "main", digests)
        missing = await store.hold("main", "g", digests)
        assert missing
        place.replace(pack, whole)
        reader = await store.reader("main", digests)
        await in_thread(lambda: list(reader.stream(digests)) if way == "stream" else [reader.read(digest) for digest in digests], store.threads)
        assert await store.hold("main", "g", digests) == []
        assert await execute(database, "SELECT FROM blob WHERE damaged") == []


async def test_a_blob_damaged_twice_is_healed_twice(database: Database, folder: Place) -> None:
    async with running(database, folder.url) as store:
        digest = await store.put("main", "h", b"contents")
        for _ in range(3):
            for key in folder.stored():
                folder.replace(key, b"x" * 500)
            with pytest.raises(BlobDamaged):
                await store.get("main", digest)
            assert await store.put("main", "g", b"contents") == digest
            assert await store.get("main", digest) == b"contents"
        await store.collect()
        assert len(folder.stored()) == 1


async def test_a_share_holds_all_of_it_or_nothing(database: Database, place: Place) -> None:
    blobs = some(30)
    async with running(database, place.url) as store:
        digests = await uploaded(store, "main", "upload:1", blobs)
        assert await store.share("main", "upload:1", "tree:x")
        assert not await store.share("main", "upload:2", "tree:y")
        await store.release("main", ["upload:1"])
        await store.collect()
        assert await read(store, "main", digests) == blobs


async def test_mostly_dead_packs_are_rewritten_while_readers_read(database: Database, place: Place) -> None:
    blobs = some(3000, 8000)
    async with running(database, place.url, "one") as store, running(database, place.url, "two") as other:
        digests = await uploaded(store, "main", "all", blobs)
        kept = digests[::7]
        await store.hold("main", "some", kept)
        reader = await store.reader("main", kept)
        stream = reader.stream(kept)
        first = await in_thread(lambda: next(stream))
        readers = [await other.reader("main", kept) for _ in range(3)]
        before = await store.usage("main")
        await store.release("main", ["all"])
        reading = [asyncio.create_task(in_thread(lambda r=r: [r.read(d) for d in kept], other.threads)) for r in readers]
        collected = await store.collect()
        assert collected.rewritten >= 1 and await store.usage("main") < before / 3 and len(place.stored()) == 1
        assert dict([first, *await in_thread(lambda: list(stream))]) == dict(zip(kept, blobs[::7], strict=True))
        for task in reading:
            assert await task == blobs[::7]
        assert (await store.collect()).rewritten == 0, "once is enough"


async def test_many_small_packs_become_few(database: Database, place: Place) -> None:
    async with running(database, place.url) as store:
        digests = []
        for n in range(40):
            digests.append(await store.put("main", f"log:{n}", b"line\n" * (n + 1)))
            if n % 8 == 7:
                await store.collect()
        assert len(place.stored()) <= 8
        await store.release("main", [f"log:{n}" for n in range(30)])
        await store.collect()
        assert await read(store, "main", digests[30:]) == [b"line\n" * (n + 1) for n in range(30, 40)]


async def test_a_lost_index_is_made_again_from_the_packs(database: Database, place: Place) -> None:
    async with running(database, place.url, "one") as store:
        digests = [await store.put(team, "h", b"%d" % n) for n, team in enumerate(("a", "b", "a"))]
    await execute(database, "DROP TABLE blob, hold, pack, leftover, adopted, blob_writer")
    place.objects.put("a/nonsense", [b"is no pack"])
    async with running(database, place.url, "two") as store:
        await store.collect()
        assert await store.get("a", digests[2]) == b"2"
        assert await store.get("b", digests[1]) == b"1"
        assert await store.hold("a", "tree", [digests[2]]) == []
        await store.disown()
        await store.collect()
        assert len(place.stored()) == 2, "what was held anew, and what is not ours"
        assert await store.get("a", digests[2]) == b"2"


async def test_an_index_put_back_from_yesterday_adopts_what_came_since(database: Database, folder: Place) -> None:
    async with running(database, folder.url) as store:
        old, new = await store.put("main", "h", b"old"), await store.put("main", "h", b"new")
        await execute(database, "DELETE FROM hold WHERE pack = (SELECT max(id) FROM pack)")
        await execute(database, "DELETE FROM pack WHERE id = (SELECT max(id) FROM pack)")
        with pytest.raises(BlobMissing):
            await store.get("main", new)
        assert await store.adopt() == 1
        assert await store.adopt() == 0
        assert [await store.get("main", digest) for digest in (old, new)] == [b"old", b"new"]


async def test_a_store_that_is_away_says_so_and_comes_back(database: Database, s3: tuple[S3Server, str]) -> None:
    server, url = s3
    async with running(database, url) as store:
        digest = await store.put("main", "h", b"before")
        server.away = True
        attempts = [store.get("main", digest), store.put("main", "h", b"during"), uploaded(store, "main", "h", [b"more"])]
        assert [type(error) for error in await asyncio.gather(*attempts, return_exceptions=True)] == [StoreUnavailable] * 3
        assert await store.hold("main", "g", [digest]) == [], "it is away, not damaged"
        server.away = False
        assert await store.get("main", digest) == b"before"
        await uploaded(store, "main", "h", [b"during", b"more"])
        await store.release("main", ["h", "g"])
        await empty_after_collection(store, Place(url))


async def test_requests_grow_with_bytes_and_not_with_files(database: Database, s3: tuple[S3Server, str]) -> None:
    server, url = s3
    blobs = some(10_000, 9_000)
    packs = -(-sum(map(len, blobs)) // CHUNK)
    async with running(database, url) as store:
        server.requests.clear()
        digests = await uploaded(store, "main", "h", blobs)
        assert [method for method, _ in server.requests] == ["PUT"] * packs
        assert packs <= 7
        server.requests.clear()
        assert await store.hold("main", "again", digests) == []
        await uploaded(store, "main", "again", blobs)
        assert server.requests == [], "what is known costs nothing"
        assert await read(store, "main", digests) == blobs
        assert [method for method, _ in server.requests] == ["GET"] * 2 * packs
        await store.release("main", ["h", "again"])
        server.requests.clear()
        await store.collect()
        assert len(server.requests) <= packs


async def test_what_a_kill_at_any_point_leaves_is_collected(database: Database, folder: Place) -> None:
    """FAULTS 32: a process is killed in the middle of an upload; what it published is held, and the rest is removed by others."""
    program = textwrap.dedent(
        """
        import asyncio, os, signal, sys
        from libs.archives.pump import in_thread
        from libs.blobstore import objects, index
        from libs.blobstore.store import open_blob_store
        from libs.eventlog.postgres import open_pool
        url, database, point, boot = sys.argv[1:]
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        rename, sync, intend, publish = objects.Path.rename, os.fsync, index.BlobIndex.intend, index.BlobIndex.publish
        count = 0
        def at(name):
            global count
            count += point.startswith(name)
            if point == f"{name}{count}":
                kill()
        def renamed(self, to):
            at("written"); rename(self, to); at("renamed")
        def synced(file):
            at("unsynced"); sync(file)
        async def intended(self, *rest):
            await intend(self, *rest); at("intended")
        async def published(self, *rest):
            await publish(self, *rest); at("published")
        objects.Path.rename, os.fsync, index.BlobIndex.intend, index.BlobIndex.publish = renamed, synced, intended, published
        async def main():
            async with open_pool(database) as pool, open_blob_store(url, pool, lambda: boot) as store:
                task = asyncio.create_task(store.run())
                while store.problem: await asyncio.sleep(0.01)
                upload = store.begin("main", "upload:" + boot)
                def work():
                    for n in range(5):
                        upload.add(bytes([n]) * (4 << 20) + boot.encode())
                    upload.flush()
                await in_thread(work, store.threads)
                kill()
        asyncio.run(main())
        """
    )
    points = ["unsynced1", "written1", "renamed1", "intended2", "published1", "renamed3", "published3", "end"]
    async with running(database, folder.url, "survivor") as survivor:
        kept = await survivor.put("main", "kept", b"kept")
        before = folder.stored()
        runs = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, folder.url, database.url("artifacts"), point, f"victim-{n}", stderr=subprocess.PIPE
            )
            for n, point in enumerate(points)
        ]
        for run in runs:
            _, errors = await run.communicate()
            assert run.returncode == -9, errors.decode()
        listed = folder.stored()
        assert (await survivor.collect()).packs == 0, "who was killed may live"
        assert folder.stored() == listed
        await execute(database, "UPDATE blob_writer SET seen_at = now() - interval '5 minutes' WHERE writer LIKE 'victim%'")
        await survivor.collect()
        packs = await execute(database, "SELECT team || '/' || name AS key FROM pack")
        assert folder.stored() == sorted(row["key"] for row in packs), "what is not published is gone, what is published is there"
        finished = [hashlib.sha256(bytes([n]) * (4 << 20) + b"victim-7").digest() for n in range(5)]
        assert await survivor.hold("main", "again", finished) == []
        await survivor.release("main", ["again", *(f"upload:victim-{n}" for n in range(8))])
        await survivor.collect(late_by=0)
        assert folder.stored() == before
        assert await survivor.get("main", kept) == b"kept"
        assert await execute(database, "SELECT FROM leftover") == []


async def test_a_successor_of_the_same_name_needs_no_patience(database: Database, folder: Place) -> None:
    """FAULTS 32"""
    async with running(database, folder.url, "a", "other-") as other:
        await execute(database, "INSERT INTO blob_writer VALUES ('local-1', now())")
        await execute(database, "INSERT INTO leftover VALUES ('main', 'local-1.1', 'local-1', now()), ('main', 'other-x.1', 'other-a-1', now())")
        for name in ("main/local-1.1", "main/other-x.1"):
            folder.replace(name, b"x")
        await other.collect()
        assert len(folder.stored()) == 2
        async with running(database, folder.url, "b", "local-") as store:
            await store.collect()
            assert folder.stored() == ["main/other-x.1"]


async def test_a_writer_taken_for_dead_cannot_publish_what_was_collected(database: Database, folder: Place) -> None:
    """FAULTS 45: stopped in the middle of an upload, and resumed after its packs were collected."""
    async with running(database, folder.url, "zombie") as zombie, running(database, folder.url, "other") as other:
        collect = stopped(zombie, other)
        with pytest.raises(StoreUnavailable, match="taken for dead"):
            await uploaded(zombie, "main", "h", [b"late"])
        assert collect.done()
        assert not await other.held("main", "h")
        assert folder.stored() == []


def stopped(zombie: BlobStore, other: BlobStore) -> asyncio.Future[None]:
    """Just after its next pack is put, `zombie` stops until `other` has taken it for dead."""
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    put = zombie._objects.put

    async def bury() -> None:
        await other.collect(silent_for=0, late_by=0)
        done.set_result(None)

    def late(key: str, data: Sequence[bytes]) -> None:
        put(key, data)
        asyncio.run_coroutine_threadsafe(bury(), loop).result()
        put(key, data)

    zombie._objects.put = late  # type: ignore[method-assign]
    return done


async def test_what_fails_is_collected_while_its_writer_lives(database: Database, folder: Place) -> None:
    async with running(database, folder.url) as store:
        put = store._objects.put

        def fails(key: str, data: Sequence[bytes]) -> None:
            put(key, data)
            raise StoreUnavailable("who knows what came of it")

        store._objects.put = fails  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            await uploaded(store, "main", "h", [b"contents"])
        assert len(folder.stored()) == 1
        await store.collect()
        assert folder.stored() == []


async def test_an_upload_that_failed_says_so_again_and_keeps_what_was_stored(database: Database, folder: Place) -> None:
    async with running(database, folder.url) as store:
        put, count = store._objects.put, counter()

        def fails(key: str, data: Sequence[bytes]) -> None:
            if count() == "id-3":
                raise StoreFull("full")
            put(key, data)

        store._objects.put = fails  # type: ignore[method-assign]
        upload = store.begin("main", "h")
        blobs = [os.urandom(CHUNK) for _ in range(8)]

        def work() -> None:
            for blob in blobs:
                upload.add(blob)

        with pytest.raises(StoreFull):
            await in_thread(work, store.threads)
        with pytest.raises(StoreFull):
            await in_thread(lambda: upload.add(b"more"), store.threads)
        missing = await store.hold("main", "again", [hashlib.sha256(blob).digest() for blob in blobs])
        assert {2} <= set(missing) <= set(range(2, 8))
        assert {0, 1}.isdisjoint(missing)
        assert len(folder.stored()) == 8 - len(missing)


async def test_a_full_disk_is_said_and_its_space_comes_back(database: Database, tmp_path: Path) -> None:
    """FAULTS 31: on a real file system of 30 MB, in a mount namespace of its own."""
    program = textwrap.dedent(
        """
        import asyncio, os, sys
        from libs.archives.pump import in_thread
        from libs.blobstore.store import StoreFull, open_blob_store
        from libs.eventlog.postgres import open_pool
        folder, database = sys.argv[1:]
        def fed(upload, megabytes):
            for _ in range(megabytes):
                upload.add(os.urandom(1 << 20))
            upload.flush()
        async def main():
            async with open_pool(database) as pool, open_blob_store("file://" + folder, pool, lambda: "boot") as store:
                task = asyncio.create_task(store.run())
                while store.problem: await asyncio.sleep(0.01)
                kept = await store.put("main", "kept", b"kept")
                for _ in range(2):
                    upload = store.begin("main", "upload")
                    try:
                        await in_thread(lambda: fed(upload, 50), store.threads)
                    except StoreFull:
                        pass
                    else:
                        sys.exit("it was not full")
                    assert await store.get("main", kept) == b"kept"
                    await store.release("main", ["upload"])
                    await store.collect()
                    assert len(os.listdir(folder + "/main")) == 1, [list(w) for w in os.walk(folder)]
                upload = store.begin("main", "upload")
                await in_thread(lambda: fed(upload, 24), store.threads)
                task.cancel()
        asyncio.run(main())
        """
    )
    run = await asyncio.create_subprocess_exec(
        *small_disk(tmp_path, "30m"), sys.executable, "-c", program, str(tmp_path), database.url("artifacts"), stderr=subprocess.PIPE
    )
    _, errors = await run.communicate()
    assert run.returncode == 0, errors.decode()


def small_disk(folder: Path, size: str) -> list[str]:
    """A command's prefix: it sees a small file system of its own at `folder`."""
    user = ["--user", "--map-root-user"] if os.getuid() else []
    return [shutil.which("unshare") or "unshare", *user, "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} none "$0" && exec "$@"', str(folder)]


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot open the store"):
        open_objects((tmp_path / "file").as_uri())


def test_an_object_is_replaced_or_read_past_its_end_by_nobody(place: Place) -> None:
    place.objects.put("a/b", [b"one", b"", b"two"])
    assert bytes(place.objects.get("a/b", 2, 100)) == b"etwo"
    assert bytes(place.objects.get("a/b", 60, 100)) == b""
    assert place.objects.end("a/b", 2) == (b"wo", 6)
    place.objects.delete(["a/b", "a/c"])
    for attempt in (lambda: place.objects.get("a/b", 0, 1), lambda: place.objects.end("a/b", 1)):
        with pytest.raises(ObjectMissing):
            attempt()
    assert place.stored() == []
