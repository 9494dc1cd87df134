"""Random interleavings of all that a store does, by several instances at once that are killed and taken for dead at any moment, against a model of
who holds what: what a holder holds always reads back, and what nobody holds leaves nothing behind. A failure names its seed (the database adds chance
of its own)."""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from libs.archives.pump import in_thread
from libs.blobstore import objects
from libs.blobstore.store import BlobStore, StoreUnavailable, open_blob_store
from libs.eventlog.postgres import Pool, open_pool
from tests.controls import counter, eventually
from tests.postgres_fixture import Database

SEEDS = 15
ACTORS = 6
STEPS = 40
ODDS = {"upload": 5, "put": 3, "hold": 5, "share": 3, "release": 6, "collect": 4, "read": 5, "damage": 2, "kill": 0.5}
BLOBS = {hashlib.sha256(blob).digest(): blob for blob in (random.Random(n).randbytes(random.Random(n).randrange(1, 6000)) for n in range(80))}
DIGESTS = list(BLOBS)


class Killed(Exception):
    """The instance died under an operation."""


class Instance:
    """One life of a store, and what is under way in it."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.under_way: set[asyncio.Task[object]] = set()
        self.dead = False

    async def do(self, work: Coroutine[object, object, object]) -> object:
        task = asyncio.ensure_future(work)
        self.under_way.add(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self.dead:
                raise Killed from None
            raise
        except StoreUnavailable:
            raise Killed from None
        finally:
            self.under_way.discard(task)

    async def kill(self, pool: Pool) -> None:
        """Nothing of it goes on, but for what its threads are at just now; and it is silent from now on."""
        self.dead = True
        for task in {*self.under_way, *self.store._tasks}:
            task.cancel()
        await pool.execute("UPDATE blob_writer SET seen_at = '-infinity' WHERE writer = $1", self.store._writer.name)


class World:
    def __init__(self, seed: int, pool: Pool, url: str) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.pool = pool
        self.url = url
        self.holds: dict[str, set[bytes]] = {}
        self.holders = counter(f"h{seed}")
        self.instances: list[Instance] = []
        self.kills = 0
        self.uncertain: set[str] = set()
        """Holders for which somebody was killed: of what was under way just then, the database may yet get word."""

    @asynccontextmanager
    async def instance(self) -> AsyncIterator[Instance]:
        async with open_blob_store(self.url, self.pool, lambda: f"w{self.random.getrandbits(64):x}", threads=ACTORS) as store:
            running = asyncio.create_task(store.run())
            await eventually(lambda: store.problem is None)
            try:
                yield Instance(store)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    async def do(self, instance: Instance, holder: str, work: Coroutine[object, object, object]) -> object:
        try:
            return await instance.do(work)
        except Killed:
            self.uncertain.add(holder)
            raise

    async def live(self, actors: int) -> None:
        """The lives of one place: one instance after another."""
        while not self.over:
            async with self.instance() as instance:
                self.instances.append(instance)
                await eventually(lambda: self.over or instance.dead, 60)
                self.instances.remove(instance)
                if instance.dead:
                    await asyncio.gather(*instance.under_way, return_exceptions=True)

    over = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as lives:
            for _ in range(3):
                lives.create_task(self.live(ACTORS))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(ACTORS):
                        group.create_task(self.act())
            finally:
                self.over = True

    async def act(self) -> None:
        """One who does things with holders of its own; what it shares may be anybody's."""
        mine: list[str] = []
        for _ in range(STEPS):
            await self.pause()
            instance = self.random.choice(await eventually(lambda: self.instances))
            if instance.dead:
                continue
            kind = self.random.choices(list(ODDS), list(ODDS.values()))[0]
            try:
                await getattr(self, kind)(instance, mine)
            except Killed:
                self.kills += 1

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    def holder(self, mine: list[str]) -> str:
        """Never one that was released: of such a name nothing is known."""
        if not mine or (self.random.random() < 0.4 and len(mine) < 6):
            mine.append(self.holders())
            self.holds[mine[-1]] = set()
        return self.random.choice(mine)

    async def upload(self, instance: Instance, mine: list[str]) -> None:
        holder, digests = self.holder(mine), self.random.sample(DIGESTS, self.random.randrange(1, 30))
        upload = instance.store.begin("main", holder)
        flush_at = self.random.randrange(30)

        def work() -> None:
            try:
                for number, digest in enumerate(digests):
                    upload.add(BLOBS[digest])
                    if number == flush_at:
                        upload.flush()
                upload.flush()
            finally:
                upload.close()

        await self.do(instance, holder, in_thread(work, instance.store.threads))
        self.holds[holder].update(digests)

    async def put(self, instance: Instance, mine: list[str]) -> None:
        holder, digest = self.holder(mine), self.random.choice(DIGESTS)
        await self.do(instance, holder, instance.store.put("main", holder, BLOBS[digest]))
        self.holds[holder].add(digest)

    async def hold(self, instance: Instance, mine: list[str]) -> None:
        holder, digests = self.holder(mine), self.random.sample(DIGESTS, self.random.randrange(1, 40))
        missing = await self.do(instance, holder, instance.store.hold("main", holder, digests, [len(BLOBS[digest]) for digest in digests]))
        self.holds[holder].update(digest for index, digest in enumerate(digests) if index not in missing)

    async def share(self, instance: Instance, mine: list[str]) -> None:
        other, holder = self.random.choice(list(self.holds) or ["nobody"]), self.holder(mine)
        what = set(self.holds.get(other, ()))
        if await self.do(instance, holder, instance.store.share("main", other, holder)):
            self.holds[holder] |= what

    async def release(self, instance: Instance, mine: list[str]) -> None:
        some = [mine.pop(self.random.randrange(len(mine))) for _ in range(min(len(mine), self.random.randrange(1, 3)))]
        for holder in some:
            del self.holds[holder]
        while True:
            try:
                await instance.do(instance.store.release("main", some))
                return
            except Killed:  # as the janitor: again, until it is done
                instance = self.random.choice(await eventually(lambda: [one for one in self.instances if not one.dead]))

    async def collect(self, instance: Instance, mine: list[str]) -> None:
        await instance.do(instance.store.collect())

    async def read(self, instance: Instance, mine: list[str]) -> None:
        held = [holder for holder in mine if self.holds[holder]]
        if not held:
            return
        digests = list(self.holds[self.random.choice(held)])
        reader = await instance.do(instance.store.reader("main", digests))
        await self.pause()
        if self.random.random() < 0.5:
            found = await instance.do(in_thread(lambda: dict(reader.stream(digests)), instance.store.threads))
        else:
            found = await instance.do(in_thread(lambda: {digest: reader.read(digest) for digest in digests}, instance.store.threads))
        assert found == {digest: BLOBS[digest] for digest in digests}

    async def damage(self, instance: Instance, mine: list[str]) -> None:
        """Somebody says that blobs are damaged (they are not, so that they read back all the same): whoever has them heals them."""
        digests = self.random.sample(DIGESTS, 5)
        for digest, place in (await instance.store._index.find("main", digests)).items():
            await instance.store._index.damaged("main", place.pack, digest)

    async def kill(self, instance: Instance, mine: list[str]) -> None:
        await instance.kill(self.pool)

    async def end(self) -> None:
        """What is held reads back; then nobody holds anything, and there is nothing."""
        async with self.instance() as last:
            store = last.store
            await store.collect(silent_for=0, late_by=0)
            for digests in self.holds.values():
                stream = (await store.reader("main", digests)).stream(digests)
                assert dict(await in_thread(partial(list, stream), store.threads)) == {digest: BLOBS[digest] for digest in digests}
            assert await inconsistencies(self.pool) == 0
            await store.release("main", list(self.holds))
            strays = {row["holder"] for row in await self.pool.fetch("SELECT holder FROM hold")}
            assert strays <= self.uncertain, "held by whom nobody knows"
            await store.release("main", strays)
            await store.collect(silent_for=0, late_by=0)
            await store.collect(silent_for=0, late_by=0)
            assert list(store._objects.list()) == []
            assert await self.pool.fetch("SELECT team, name FROM leftover UNION ALL SELECT team, name FROM pack") == []


async def inconsistencies(pool: Pool) -> int:
    """Bits without a blob, bit strings of another length, blobs beyond their pack."""
    return await pool.fetchval(
        """
        SELECT count(*) FROM hold h JOIN pack p ON p.id = h.pack, generate_series(0, p.blobs - 1) AS n
        WHERE length(h.used) <> p.blobs
        OR get_bit(h.used, n) = 1 AND NOT EXISTS (SELECT FROM blob b WHERE b.pack = p.id AND b.ordinal = n AND b.start + b.size < p.bytes)
        """
    )


async def test_what_is_held_reads_back_and_what_is_not_leaves_nothing(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.os, "fsync", lambda _: None)
    first = int(os.environ.get("PENSTOCK_TEST_SEED", "0"))
    kills = 0
    async with open_pool(database.url("artifacts"), 12) as pool:
        for seed in range(first, first + SEEDS):
            world = World(seed, pool, tmp_path.as_uri())
            try:
                await world.run()
                await world.end()
            except BaseException as error:
                error.add_note(f"seed {seed}: PENSTOCK_TEST_SEED={seed} starts with it")
                raise
            kills += world.kills
    assert kills
