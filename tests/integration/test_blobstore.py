"""Packs on a real folder with their index in a real Postgres: all or nothing, whatever dies or fills up."""

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from libs.archives.pump import in_thread
from libs.blobstore.index import BlobIndex
from libs.blobstore.objects import Objects
from libs.blobstore.packs import PART, Upload
from libs.blobstore.reading import BlobDamaged
from libs.blobstore.store import BlobMissing, BlobStore, open_blob_store
from libs.eventlog.postgres import open_pool
from tests.controls import counter, eventually
from tests.postgres_fixture import Database


@asynccontextmanager
async def running(database: Database, folder: Path, boot: str = "boot", instance: str = "") -> AsyncIterator[BlobStore]:
    opened = open_pool(database.url("artifacts"))
    async with opened as pool, open_blob_store(folder.as_uri(), pool, counter(boot), instance=instance) as store:
        task = asyncio.create_task(store.run())
        try:
            await eventually(lambda: store.problem is None)
            yield store
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def stored(store: BlobStore, team: str, write: Callable[[Upload], object]) -> object:
    upload = store.begin(team)

    def work() -> object:
        written = write(upload)
        return written, upload.seal()

    async with store.undone_unless_sealed(upload):
        written, places = await in_thread(work, store.threads)
    await store.publish(upload, places)
    return written


def objects_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


async def test_small_blobs_share_packs_and_read_back(database: Database, tmp_path: Path) -> None:
    blobs = [os.urandom(1 + n % 9000) for n in range(3000)]
    async with running(database, tmp_path) as store:
        digests = await stored(store, "main", lambda upload: [upload.add(blob) for blob in blobs])
        parts = [name for name in objects_in(tmp_path) if not name.endswith("index")]
        assert len(parts) == -(-sum(map(len, blobs)) // PART)
        reader = await store.reader("main", digests)
        assert await in_thread(lambda: [reader.read_all(digest) for digest in digests]) == blobs


async def test_a_large_blob_spans_parts_and_reads_by_range(database: Database, tmp_path: Path) -> None:
    blob = os.urandom(2 * PART + 12345)

    def write(upload: Upload) -> bytes:
        upload.begin()
        for at in range(0, len(blob), 1_000_000):
            upload.write(blob[at : at + 1_000_000])
        return upload.end()

    async with running(database, tmp_path) as store:
        digest = await stored(store, "main", write)
        reader = await store.reader("main", [digest])
        assert await in_thread(lambda: reader.read_all(digest)) == blob
        assert await in_thread(lambda: reader.read_range(digest, PART - 10, 20)) == blob[PART - 10 : PART + 10]
        before = objects_in(tmp_path)
        assert await stored(store, "main", write) == digest
        assert objects_in(tmp_path) == before, "the same bytes were kept twice"


async def test_the_same_bytes_are_stored_once_within_a_team_and_apart_between_teams(database: Database, tmp_path: Path) -> None:
    """FAULTS 33"""
    async with running(database, tmp_path) as store:
        digest = await store.put("main", b"contents")
        with pytest.raises(BlobMissing):
            await store.get("other", digest)
        before = objects_in(tmp_path)
        assert await store.put("main", b"contents") == digest
        assert objects_in(tmp_path) == before
        await store.put("other", b"contents")
        assert len(objects_in(tmp_path)) == 2 * len(before)


async def test_blobs_put_at_once_go_together(database: Database, tmp_path: Path) -> None:
    async with running(database, tmp_path) as store:
        digests = await asyncio.gather(*(store.put("main", b"log %d" % n) for n in range(200)))
        assert await store.get("main", digests[117]) == b"log 117"
        assert len(objects_in(tmp_path)) <= 8


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
async def test_a_damaged_pack_is_named_and_never_passed_off_as_whole(database: Database, tmp_path: Path, damage: str) -> None:
    async with running(database, tmp_path) as store:
        digest = await store.put("main", b"x" * 5000)
        part = next(path for path in tmp_path.rglob("000000"))
        if damage == "gone":
            part.unlink()
        else:
            part.write_bytes(b"x" * 4999 + (b"y" if damage == "flip" else b""))
        with pytest.raises(BlobDamaged, match=part.parent.name):
            await store.get("main", digest)


async def test_an_upload_that_fails_leaves_nothing(database: Database, tmp_path: Path) -> None:
    """FAULTS 29"""
    async with running(database, tmp_path) as store:
        upload = store.begin("main")

        def work() -> None:
            for _ in range(20):
                upload.add(os.urandom(1 << 20))
            upload.begin()
            upload.write(os.urandom(2 * PART))
            raise ConnectionError("cut")

        with pytest.raises(ConnectionError):
            async with store.undone_unless_sealed(upload):
                await in_thread(work, store.threads)
        assert not any(tmp_path.iterdir())


async def test_what_a_crash_leaves_is_invisible_and_collected(database: Database, tmp_path: Path) -> None:
    """FAULTS 32: a process is killed in the middle of an upload; the next one removes what it wrote, and nothing else."""
    async with running(database, tmp_path, "survivor") as survivor:
        kept = await survivor.put("main", b"kept")
        before = objects_in(tmp_path)
        program = textwrap.dedent(
            """
            import os, signal, sys, itertools, asyncio
            from libs.blobstore.objects import Objects
            from libs.blobstore.index import BlobIndex
            from libs.blobstore.packs import Upload
            from libs.eventlog.postgres import open_pool
            async def main():
                async with open_pool(sys.argv[2]) as pool:
                    await BlobIndex(pool).arrive("victim")
                    upload = Upload(Objects(sys.argv[1]), "main", "victim", itertools.count(), lambda digests: ())
                    for _ in range(3):
                        upload.add(os.urandom(9 << 20))
                    open(sys.argv[1].removeprefix("file://") + "/main/victim.0/000009#1", "wb").close()
                    os.kill(os.getpid(), signal.SIGKILL)
            asyncio.run(main())
            """
        )
        run = await asyncio.create_subprocess_exec(sys.executable, "-c", program, tmp_path.as_uri(), database.url("artifacts"))
        assert await run.wait() == -9
        assert len(objects_in(tmp_path)) > len(before)
        assert await survivor.collect() == 0, "its writer may live"
        connection = await asyncpg.connect(database.url("artifacts"))
        await connection.execute("UPDATE blob_writer SET seen_at = now() - interval '5 minutes' WHERE writer = 'victim'")
        await connection.close()
        assert await survivor.collect() == 1
        assert objects_in(tmp_path) == before
        assert await survivor.get("main", kept) == b"kept"


async def test_a_successor_of_the_same_name_collects_what_its_predecessor_left_at_once(database: Database, tmp_path: Path) -> None:
    """FAULTS 32: and what another instance is writing stays."""
    async with running(database, tmp_path, "a", "other-") as other:
        started = other.begin("main")
        await in_thread(lambda: started.add(os.urandom(9 << 20)), other.threads)
        before = objects_in(tmp_path)
        async with open_pool(database.url("artifacts")) as pool:
            await BlobIndex(pool).arrive("local-1")
            Upload(Objects(tmp_path.as_uri()), "main", "local-1", itertools.count(), lambda digests: ()).add(os.urandom(9 << 20))
        assert objects_in(tmp_path) != before
        async with running(database, tmp_path, "b", "local-"):
            await eventually(lambda: objects_in(tmp_path) == before)
        await in_thread(started.undo, other.threads)


async def test_a_writer_taken_for_dead_cannot_publish_what_was_collected(database: Database, tmp_path: Path) -> None:
    """FAULTS 45: stopped in the middle of an upload, and resumed after its packs were collected."""
    async with running(database, tmp_path, "zombie") as zombie, running(database, tmp_path, "other") as other:
        upload = zombie.begin("main")
        digest = await in_thread(lambda: upload.add(b"late"), zombie.threads)
        places = await in_thread(upload.seal, zombie.threads)
        connection = await asyncpg.connect(database.url("artifacts"))
        await connection.execute("UPDATE blob_writer SET seen_at = now() - interval '5 minutes' WHERE writer LIKE 'zombie%'")
        await connection.close()
        assert await other.collect() == 1
        with pytest.raises(Exception, match="longer than its writer"):
            await zombie.publish(upload, places)
        with pytest.raises(BlobMissing):
            await other.get("main", digest)


async def test_a_lost_index_is_made_again_from_the_packs(database: Database, tmp_path: Path) -> None:
    async with running(database, tmp_path, "one") as store:
        digests = [await store.put(team, b"%d" % n) for n, team in enumerate(("a", "b", "a"))]
    connection = await asyncpg.connect(database.url("artifacts"))
    await connection.execute("DROP TABLE blob")
    await connection.close()
    async with running(database, tmp_path, "two") as store:
        assert await store.get("a", digests[2]) == b"2"
        assert await store.get("b", digests[1]) == b"1"


async def test_a_full_disk_is_said_and_its_space_comes_back(tmp_path: Path) -> None:
    """FAULTS 31: on a real file system of 12 MB, in a mount namespace of its own."""
    program = textwrap.dedent(
        """
        import itertools, os, sys
        from libs.blobstore.objects import Objects, StoreFull
        from libs.blobstore.packs import Upload
        folder = sys.argv[1]
        objects = Objects("file://" + folder)
        upload = Upload(objects, "main", "boot", itertools.count(), lambda digests: ())
        try:
            for _ in range(30):
                upload.add(os.urandom(1 << 20))
            upload.seal()
        except StoreFull:
            upload.undo()
        else:
            sys.exit("it was not full")
        assert not os.listdir(folder), [list(w) for w in os.walk(folder)]
        upload = Upload(objects, "main", "boot", itertools.count(100), lambda digests: ())
        upload.add(os.urandom(10 << 20))
        upload.seal()
        """
    )
    run = await asyncio.create_subprocess_exec(*small_disk(tmp_path, "12m"), sys.executable, "-c", program, str(tmp_path), stderr=subprocess.PIPE)
    _, errors = await run.communicate()
    assert run.returncode == 0, errors.decode()


def small_disk(folder: Path, size: str) -> list[str]:
    """A command's prefix: it sees a small file system of its own at `folder`."""
    user = ["--user", "--map-root-user"] if os.getuid() else []
    return [shutil.which("unshare") or "unshare", *user, "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} none "$0" && exec "$@"', str(folder)]


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="cannot open the store"):
        Objects((tmp_path / "file").as_uri())
