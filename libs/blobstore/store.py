"""The blob store: object store, index, and the threads in which blobs are written and read."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import structlog

from libs.archives.pump import in_thread
from libs.blobstore.index import BlobIndex, WriterGone
from libs.blobstore.objects import Objects, StoreUnavailable
from libs.blobstore.packs import Place, Upload, index_key, read_index
from libs.blobstore.reading import BlobReader
from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import Pool

logger = structlog.get_logger()

_RENEWAL = 10.0
_SILENCE = 60.0
_RENEWALS_A_COLLECTION = 60
_LOOKUP = 30.0


class BlobMissing(Exception):
    """The team has no such blob."""


class BlobStore:
    """Blobs of teams: what one team has says nothing about another's.
    Reads and writes run on `threads`; nothing is written before `run` has begun."""

    def __init__(self, objects: Objects, index: BlobIndex, boots: Callable[[], str], threads: ThreadPoolExecutor, instance: str = "") -> None:
        """`boots` gives names to write under: a new one each time, without a dot or slash. They are put after `instance`, which no two processes
        have at a time: what its earlier life left unfinished is collected at once ("": nobody sees to that, so it has to be silent for long)."""
        self._objects = objects
        self._index = index
        self._instance = instance
        self._boots = boots
        self._numbers = itertools.count(1)
        self._writer = instance + boots()
        self._puts: dict[str, list[tuple[bytes, asyncio.Future[bytes]]]] = {}
        self._putting: dict[str, asyncio.Task[None]] = {}
        self.threads = threads
        self.problem: str | None = "has not begun"

    async def run(self) -> None:
        """Make the tables, rebuild the index from the packs if it is empty, then say from time to time that this instance lives, and collect what the
        dead ones left."""
        begun, renewals = False, 0
        while True:
            try:
                if not begun:
                    await self._begin()
                    begun, self.problem = True, None
                elif not await self._index.renew(self._writer):
                    self._writer = self._instance + self._boots()
                    await self._index.arrive(self._writer)
                if renewals % _RENEWALS_A_COLLECTION == 0:
                    await self.collect()
                renewals += 1
                self.problem = None
            except (LogUnavailable, StoreUnavailable) as error:
                self.problem = str(error)
            await asyncio.sleep(_RENEWAL if self.problem is None else 0.5)

    async def leave(self) -> None:
        """This instance writes no more."""
        for task in list(self._putting.values()):
            task.cancel()
        await asyncio.gather(*self._putting.values(), return_exceptions=True)
        with suppress(LogUnavailable):
            await self._index.leave(self._writer)

    def begin(self, team: str) -> Upload:
        """An upload, to be fed and sealed in threads, inside `undone_unless_sealed`; then `publish` what its `seal` gave."""
        loop = asyncio.get_running_loop()

        def known(digests: list[bytes]) -> Collection[bytes]:
            try:
                return asyncio.run_coroutine_threadsafe(self._index.find(team, digests), loop).result(_LOOKUP)
            except TimeoutError:
                raise StoreUnavailable("the index does not answer") from None

        return Upload(self._objects, team, self._writer, self._numbers, known)

    @asynccontextmanager
    async def undone_unless_sealed(self, upload: Upload) -> AsyncIterator[None]:
        """Removes what the upload wrote when the body fails; if the store is away, that is collected later."""
        try:
            yield
        except BaseException:
            try:
                await in_thread(upload.undo, self.threads)
            except StoreUnavailable as error:
                logger.warning("an upload left something behind", team=upload.team, why=str(error))
            raise

    async def publish(self, upload: Upload, places: Sequence[Place]) -> None:
        """Make the sealed blobs visible, all at once. Raises LogUnavailable, StoreUnavailable.

        After a failure it is not known whether they are: nothing may be removed then. What is not visible is collected later."""
        try:
            await self._index.add(upload.writer, upload.team, places)
        except WriterGone:
            raise StoreUnavailable("the upload took longer than its writer was known to live") from None

    async def put(self, team: str, contents: bytes) -> bytes:
        """One blob, from memory; its digest. Those that come while another is written go together.
        Raises LogUnavailable, StoreUnavailable."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._puts.setdefault(team, []).append((contents, future))
        if team not in self._putting:
            self._putting[team] = asyncio.create_task(self._put_waiting(team))
        return await future

    async def reader(self, team: str, digests: Collection[bytes]) -> BlobReader:
        """A reader of these blobs. Raises BlobMissing when the team lacks one, LogUnavailable."""
        places = await self._index.find(team, digests) if digests else {}
        for digest in digests:
            if digest not in places:
                raise BlobMissing(digest.hex())
        return BlobReader(self._objects, team, places)

    async def get(self, team: str, digest: bytes) -> bytes:
        """A whole blob. Raises BlobMissing, BlobDamaged, LogUnavailable, StoreUnavailable."""
        reader = await self.reader(team, [digest])
        return await in_thread(lambda: reader.read_all(digest), self.threads)

    async def collect(self, silent_for: float = _SILENCE) -> int:
        """Remove packs that no blob needs and no living instance may be writing; how many. Raises LogUnavailable, StoreUnavailable.

        The packs are listed first: whatever is listed and not needed now was written by someone who is in `writers` now, or is dead."""
        listed, halves = await in_thread(self._list, self.threads)
        alive = await self._index.writers(silent_for)
        needed = await self._index.packs()
        garbage = {pack: keys for pack, keys in listed.items() if pack not in needed and _writer_of(pack[1]) not in alive}
        await in_thread(lambda: self._objects.delete([key for keys in garbage.values() for key in keys]), self.threads)
        for key, path in halves:
            if _writer_of(key.split("/")[-2]) not in alive:
                path.unlink(missing_ok=True)
        if garbage:
            logger.info("collected packs of unfinished uploads", packs=len(garbage))
        return len(garbage)

    async def _put_waiting(self, team: str) -> None:
        try:
            while waiting := self._puts.pop(team, None):
                upload = self.begin(team)
                try:
                    async with self.undone_unless_sealed(upload):
                        digests, places = await in_thread(partial(_write, upload, [contents for contents, _ in waiting]), self.threads)
                    await self.publish(upload, places)
                except BaseException as error:
                    for _, future in waiting:
                        if not future.done():
                            future.set_exception(error if isinstance(error, Exception) else StoreUnavailable("the service is stopping"))
                    if not isinstance(error, Exception):
                        raise
                else:
                    for (_, future), digest in zip(waiting, digests, strict=True):
                        if not future.done():
                            future.set_result(digest)
        finally:
            del self._putting[team]

    async def _begin(self) -> None:
        await self._index.create()
        if self._instance:
            await self._index.succeed(self._instance)
        await self._index.arrive(self._writer)
        if await self._index.is_empty():
            listed, _ = await in_thread(self._list, self.threads)
            for (team, pack), keys in listed.items():
                if index_key(team, pack) in keys:
                    await self._index.adopt(team, await in_thread(partial(self._read_index, index_key(team, pack)), self.threads))

    def _read_index(self, key: str) -> list[Place]:
        return read_index(self._objects.get_all(key))

    def _list(self) -> tuple[dict[tuple[str, str], set[str]], list[tuple[str, Path]]]:
        """Keys by (team, pack), and what is half written."""
        packs: dict[tuple[str, str], set[str]] = {}
        for key in self._objects.list():
            parts = key.split("/")
            if len(parts) == 3:
                packs.setdefault((parts[0], parts[1]), set()).add(key)
        return packs, [half for half in self._objects.unfinished() if half[0].count("/") == 2]


def _write(upload: Upload, blobs: Sequence[bytes]) -> tuple[list[bytes], Sequence[Place]]:
    return [upload.add(contents) for contents in blobs], upload.seal()


def _writer_of(pack: str) -> str:
    return pack.rpartition(".")[0]


@asynccontextmanager
async def open_blob_store(url: str, pool: Pool, boots: Callable[[], str], threads: int = 8, instance: str = "") -> AsyncIterator[BlobStore]:
    """A store by URL, with its index in the pool's schema. Somebody must `run` it. `boots`, `instance`: as for BlobStore."""
    executor = ThreadPoolExecutor(threads, "blobs")
    try:
        store = BlobStore(await in_thread(lambda: Objects(url), executor), BlobIndex(pool), boots, executor, instance)
        yield store
        await store.leave()
    finally:
        executor.shutdown(wait=True)
