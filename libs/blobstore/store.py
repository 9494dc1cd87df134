"""The blob store: object store, index, and the threads in which blobs are written and read.

A blob is 1 byte to CHUNK, named by its sha256 (32 bytes). Blobs are kept in packs (packs.py), and a pack stays while somebody holds one of its blobs.
A holder is opaque text ("upload:<id>", "log:<stream>:<digest>"). To find a blob present, or to store it, is to hold it: there is no moment
between."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import structlog

from libs.archives.pump import in_thread
from libs.archives.tree import CHUNK
from libs.blobstore.adoption import adopt
from libs.blobstore.collection import Collected, Collector
from libs.blobstore.index import BlobIndex, SizeDiffers
from libs.blobstore.objects import Objects, StoreFull, StoreUnavailable, open_objects
from libs.blobstore.packs import MOST_BLOBS, PACK, Place
from libs.blobstore.reading import BlobDamaged, BlobMissing, BlobReader
from libs.blobstore.upload import QuotaExceeded, Upload
from libs.blobstore.writing import PackWriter
from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import Pool

__all__ = [
    "BlobDamaged",
    "BlobMissing",
    "BlobReader",
    "BlobStore",
    "Collected",
    "QuotaExceeded",
    "SizeDiffers",
    "StoreFull",
    "StoreUnavailable",
    "Upload",
    "open_blob_store",
]

logger = structlog.get_logger()

T = TypeVar("T")

_RENEWAL = 10.0
_SILENCE = 60.0
_LATE = 3600.0
_TURNS = 4
"""Packs that uploads may have under way at once: 8 MiB of memory each."""


class _Waiting:
    """A blob that waits to be put, and what becomes of it."""

    def __init__(self, holder: str, digest: bytes, contents: bytes) -> None:
        self.holder = holder
        self.digest = digest
        self.contents = contents
        self.stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class BlobStore:
    """Blobs of teams: what one team has says nothing about another's. Every method raises LogUnavailable while the database is away, and
    StoreUnavailable before `run` has begun. Uploads and readers are fed and drawn on `threads`.

    Several instances may work on one store and one database at once."""

    def __init__(
        self,
        objects: Objects,
        index: BlobIndex,
        boots: Callable[[], str],
        threads: ThreadPoolExecutor,
        store_threads: ThreadPoolExecutor,
        instance: str = "",
    ) -> None:
        """`boots` gives names to write under: a new one each time, without a dot or slash. They are put after `instance`, which no two processes
        have at a time: what its earlier life left unfinished is collected at once ("": nobody sees to that, so it has to be silent for long).
        On `store_threads` packs are put and read ahead."""
        self._objects = objects
        self._index = index
        self._instance = instance
        self._writer = PackWriter(objects, index, boots, store_threads, instance)
        self._collector = Collector(objects, index, self._writer, self._reader_at, threads)
        self._collecting = asyncio.Lock()
        self._store_threads = store_threads
        self._waiting: dict[str, list[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._putting: set[str] = set()
        self._storing: dict[str, list[asyncio.Future[None]]] = {}
        """By team: the ends of packs under way that have a quota to keep to."""
        self._begun = False
        self._turns = threading.Semaphore(_TURNS)
        self.threads = threads
        self.problem: str | None = "has not begun"

    async def run(self) -> None:
        """Make the tables; adopt the packs that are there if the index is new; then say from time to time that this instance lives. It does not
        collect: whoever knows what is needed does that."""
        while True:
            try:
                if not self._begun:
                    await self._begin()
                    self._begun = True
                else:
                    await self._writer.live()
                self.problem = None
            except (LogUnavailable, StoreUnavailable) as error:
                self.problem = str(error)
            await asyncio.sleep(_RENEWAL if self.problem is None else 0.5)

    async def leave(self) -> None:
        """This instance writes no more. What it is writing is ended first."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(LogUnavailable):
            await self._index.leave(self._writer.name)

    async def hold(self, team: str, holder: str, digests: Sequence[bytes], sizes: Sequence[int] | None = None) -> list[int]:
        """Hold those that are there and sound; the indexes of the missing, in order. Raises SizeDiffers when one that is there has another size."""
        self._ready()
        return await self._index.hold(team, holder, digests, sizes)

    async def share(self, team: str, holder: str, other: str) -> bool:
        """`other` now holds all that `holder` holds, too, at one moment; False when that is nothing."""
        self._ready()
        return await self._index.share(team, holder, other)

    async def release(self, team: str, holders: Collection[str]) -> None:
        """They hold nothing any more. An upload for one of them must have been closed: what it publishes later is held again."""
        self._ready()
        await self._index.release(team, holders)

    async def held(self, team: str, holder: str) -> bool:
        """Whether it holds anything."""
        self._ready()
        return await self._index.held(team, holder)

    def begin(self, team: str, holder: str, room: int | None = None, quota: int | None = None) -> Upload:
        """An upload, to be fed in threads: `add(contents, digest=None) -> digest`, `flush()`, and in the end, whatever happened, `close()`.
        More than `room` new bytes raise QuotaExceeded, and so does a pack that would take all that the team has in the store, with what is being
        put here now, past `quota`."""
        self._ready()

        def write(digests: Sequence[bytes], contents: Sequence[bytes | memoryview]) -> Coroutine[None, None, None]:
            write = partial(self._writer.write, team, digests, contents, {holder: range(len(digests))}, quota)
            return self._unbroken(write() if quota is None else self._in_turn(team, write))

        return Upload(asyncio.get_running_loop(), partial(self._index.hold, team, holder), write, self._turns, room)

    async def put(self, team: str, holder: str, contents: bytes) -> bytes:
        """One blob, durable and held; its digest. Those that come while another is written go together. Raises StoreFull, StoreUnavailable."""
        self._ready()
        if not 0 < len(contents) <= CHUNK:
            raise ValueError("a blob is of 1 byte to 8 MiB")
        digest = hashlib.sha256(contents).digest()
        if await self._index.hold(team, holder, [digest]):
            waiting = _Waiting(holder, digest, contents)
            self._waiting.setdefault(team, []).append(waiting)
            if team not in self._putting:
                self._putting.add(team)
                self._spawn(self._put_waiting(team))
            await waiting.stored
        return digest

    async def get(self, team: str, digest: bytes) -> bytes:
        """Raises BlobMissing, BlobDamaged, StoreUnavailable."""
        reader = await self.reader(team, [digest])
        return await in_thread(lambda: reader.read(digest), self.threads)

    async def reader(self, team: str, digests: Collection[bytes]) -> BlobReader:
        """For these blobs, used in a thread: `read(digest) -> bytes`, `stream(digests) -> Iterator[(digest, bytes)]` in the store's order,
        `size(digest)`; all verified. Raises BlobMissing when the team lacks one."""
        self._ready()
        places = await self._index.find(team, digests) if digests else {}
        for digest in digests:
            if digest not in places:
                raise BlobMissing(digest.hex())
        return self._reader_at(team, places)

    async def collect(self, silent_for: float = _SILENCE, late_by: float = _LATE) -> Collected:
        """Remove what nobody holds: packs, and what dead instances left half written; rewrite packs that are mostly dead, merge small ones.

        An instance `silent_for` so many seconds is dead; what it was putting is there within `late_by` seconds, or never. Raises StoreUnavailable."""
        self._ready()
        async with self._collecting:
            return await self._collector.collect(silent_for, late_by)

    async def adopt(self) -> int:
        """Index packs that the store has and the index does not know; how many. They are held until `disown`. `run` does it when the index is new."""
        return await adopt(self._objects, self._index, self.threads)

    async def disown(self) -> None:
        """What was adopted is no more held for that: for whoever has held anew all that it needs, before it collects."""
        self._ready()
        await self._index.disown()

    async def usage(self, team: str) -> int:
        """Bytes in the store."""
        self._ready()
        return await self._index.usage(team)

    async def _in_turn(self, team: str, write: Callable[[], Coroutine[None, None, None]]) -> None:
        """When there is no room, the end of those that came before is waited for: they may fail, and give theirs back."""
        under_way = self._storing.setdefault(team, [])
        before, ended = list(under_way), asyncio.get_running_loop().create_future()
        under_way.append(ended)
        try:
            while True:
                try:
                    return await write()
                except QuotaExceeded:
                    if not before:
                        raise
                await asyncio.wait([before.pop(0)])
        finally:
            ended.set_result(None)
            under_way.remove(ended)
            if not under_way:
                self._storing.pop(team, None)

    def _ready(self) -> None:
        if not self._begun:
            raise StoreUnavailable("the store has not begun")

    async def _begin(self) -> None:
        await self._index.create()
        if self._instance:
            await self._index.succeed(self._instance)
        await self._index.arrive(self._writer.name)
        if await self._index.is_new():
            await self.adopt()
            await self._index.has_adopted()

    def _reader_at(self, team: str, places: dict[bytes, Place]) -> BlobReader:
        loop = asyncio.get_running_loop()

        def find(digests: Collection[bytes]) -> dict[bytes, Place]:
            return asyncio.run_coroutine_threadsafe(self._index.find(team, digests), loop).result()

        def damaged(pack: str, digest: bytes, end: int) -> None:
            with suppress(LogUnavailable, StoreUnavailable):  # then the next who reads it says so
                asyncio.run_coroutine_threadsafe(self._damaged(team, pack, digest, end), loop).result()

        def sound(pack: str, digests: Collection[bytes]) -> None:
            with suppress(LogUnavailable):
                asyncio.run_coroutine_threadsafe(self._index.sound(team, pack, digests), loop).result()

        return BlobReader(self._objects, team, places, find, damaged, sound, self._store_threads)

    async def _damaged(self, team: str, pack: str, digest: bytes, end: int) -> None:
        """A pack that is gone seldom went alone: what else of the team is gone is found out at once, so that one upload heals all of it."""
        # whoever calls keeps one of `threads` waiting
        if await self._index.damaged(team, pack, digest, end) and not end:
            packs = await self._index.packs(team)
            lost = packs - await in_thread(lambda: {found.removeprefix(f"{team}/") for found in self._objects.list()}, self._store_threads)
            logger.error("packs are gone from the store", team=team, packs=len(lost), of=len(packs))
            await self._index.lost(team, lost)

    async def _put_waiting(self, team: str) -> None:
        try:
            while waiting := self._waiting.pop(team, None):
                some: list[_Waiting] = []
                size = 0
                while waiting and (not some or size + len(waiting[0].contents) <= PACK) and len(some) < MOST_BLOBS:
                    some.append(waiting.pop(0))
                    size += len(some[-1].contents)
                if waiting:
                    self._waiting[team] = waiting
                await self._put(team, some)
        finally:
            self._putting.discard(team)

    async def _put(self, team: str, some: Sequence[_Waiting]) -> None:
        blobs = {waiting.digest: waiting.contents for waiting in some}
        ordinals = {digest: ordinal for ordinal, digest in enumerate(blobs)}
        holders: dict[str, list[int]] = {}
        for waiting in some:
            holders.setdefault(waiting.holder, []).append(ordinals[waiting.digest])
        try:
            await self._writer.write(team, list(blobs), list(blobs.values()), holders)
        except BaseException as error:
            for waiting in some:
                if not waiting.stored.done():
                    waiting.stored.set_exception(error if isinstance(error, Exception) else StoreUnavailable("the service is stopping"))
            if not isinstance(error, Exception):
                raise
        else:
            for waiting in some:
                if not waiting.stored.done():
                    waiting.stored.set_result(None)

    async def _unbroken(self, work: Coroutine[None, None, None]) -> None:
        """Ended even when whoever waits for it goes away."""
        await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@asynccontextmanager
async def open_blob_store(url: str, pool: Pool, boots: Callable[[], str], threads: int = 8, instance: str = "") -> AsyncIterator[BlobStore]:
    """A store by URL, with its index in the pool's schema. Somebody must `run` it. `boots`, `instance`: as for BlobStore."""
    executor, store_executor = ThreadPoolExecutor(threads, "blobs"), ThreadPoolExecutor(threads, "packs")
    try:
        store = BlobStore(await in_thread(lambda: open_objects(url), executor), BlobIndex(pool), boots, executor, store_executor, instance)
        try:
            yield store
        finally:
            await store.leave()
    finally:
        # The loop goes on meanwhile: a thread may be waiting for it.
        for pool_of_threads in (executor, store_executor):
            await asyncio.to_thread(pool_of_threads.shutdown)
