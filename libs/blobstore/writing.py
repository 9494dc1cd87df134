"""Packs on their way into the store: first the intent, then the object, then the rows. Whatever dies in between, what it left is known."""

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

from libs.archives.pump import in_thread
from libs.blobstore.index import BlobIndex, WriterGone
from libs.blobstore.objects import Objects, StoreUnavailable
from libs.blobstore.packs import Pack, key
from libs.blobstore.upload import QuotaExceeded
from libs.eventlog.log import LogUnavailable


class PackWriter:
    """Writes packs under names of its own: `<writer>.<number>`, where the writer is known to live (BlobStore.run)."""

    def __init__(self, objects: Objects, index: BlobIndex, boots: Callable[[], str], threads: ThreadPoolExecutor, instance: str) -> None:
        self._objects = objects
        self._index = index
        self._boots = boots
        self._threads = threads
        self._instance = instance
        self._numbers = itertools.count(1)
        self.name = instance + boots()
        self.given_up: set[str] = set()
        """Names of packs that failed: what there is of them is to be collected."""

    async def live(self) -> None:
        """Say that this instance does; under a new name if it was taken for dead. Raises LogUnavailable."""
        if not await self._index.renew(self.name):
            self.name = self._instance + self._boots()
            await self._index.arrive(self.name)

    async def write(
        self,
        team: str,
        digests: Sequence[bytes],
        contents: Sequence[bytes | memoryview],
        holders: Mapping[str, Sequence[int]],
        quota: int | None = None,
    ) -> None:
        """A pack of these blobs, durable, each holder holding its ordinals. Raises QuotaExceeded when the team would have more than `quota` bytes;
        StoreFull, StoreUnavailable, LogUnavailable: then it is not known whether they are held, and what is not is collected."""
        pack = Pack(digests, [len(blob) for blob in contents])
        async with self.put(team, pack, contents, pack.bytes, quota) as (writer, name):
            await self._index.publish(writer, team, name, pack, holders)

    @asynccontextmanager
    async def put(
        self, team: str, pack: Pack, contents: Sequence[bytes | memoryview], room: int = 0, quota: int | None = None
    ) -> AsyncIterator[tuple[str, str]]:
        """The object is there, to be made visible in the body: by which writer, and its name. Meanwhile it takes `room` bytes. Raises as `write`."""
        writer = self.name
        name = f"{writer}.{next(self._numbers)}"
        try:
            await self._index.intend(team, name, writer, room, quota)
            await in_thread(lambda: self._objects.put(key(team, name), [*contents, pack.footer()]), self._threads)
            yield writer, name
        except QuotaExceeded:
            raise
        except BaseException as error:
            self.given_up.add(name)
            if room:
                with suppress(LogUnavailable):
                    await self._index.give_back(team, name)
            if not isinstance(error, WriterGone):
                raise
            await self.live()
            with suppress(StoreUnavailable):
                await in_thread(lambda: self._objects.delete([key(team, name)]), self._threads)
            raise StoreUnavailable("this instance was silent for so long that it was taken for dead") from None
