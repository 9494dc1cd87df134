"""Blobs on their way into packs."""

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait

from libs.archives.pages import keep
from libs.archives.tree import CHUNK
from libs.blobstore.packs import MOST_BLOBS, PACK

_LOOKUP = 2 << 20
_UNDER_WAY = 2


class QuotaExceeded(Exception):
    """More new bytes than there was room for."""


Hold = Callable[[Sequence[bytes], Sequence[int]], Coroutine[None, None, list[int]]]
Contents = bytes | memoryview
Write = Callable[[Sequence[bytes], Sequence[Contents]], Coroutine[None, None, None]]


class Upload:
    """Blobs for one holder; blocking, for one thread at a time, never the event loop's. What was stored is held by the holder, pack by pack, also
    when a later one fails; of a failed call it is not known how far it came, and the upload is over.

    At most two packs are under way while a third is gathered; of all uploads, as many as `turns` has."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hold: Hold, write: Write, turns: threading.Semaphore, room: int | None) -> None:
        """`hold` gives indexes of the missing; `write` stores a pack of blobs."""
        self._loop = loop
        self._hold = hold
        self._write = write
        self._turns = turns
        self._room = room
        self._asked: dict[bytes, Contents] = {}
        self._asked_bytes = 0
        self._fresh: dict[bytes, Contents] = {}
        self._fresh_bytes = 0
        self._under_way: deque[tuple[Future[None], frozenset[bytes]]] = deque()
        self._failed: BaseException | None = None
        self.new_bytes = 0
        """What the team did not have."""

    def add(self, contents: Contents, digest: bytes | None = None) -> bytes:
        """A blob, whose memory is not written to any more; its digest, which may be given by whoever has it. It is durable and held after `flush`.
        Raises QuotaExceeded, StoreFull, StoreUnavailable, LogUnavailable, ValueError for what is no blob."""
        if not 0 < len(contents) <= CHUNK:
            raise ValueError("a blob is of 1 byte to 8 MiB")
        self._check()
        if digest is None:
            digest = hashlib.sha256(contents).digest()
        if digest in self._asked or digest in self._fresh or any(digest in digests for _, digests in self._under_way):
            keep(contents)
            return digest
        self._asked[digest] = contents
        self._asked_bytes += len(contents)
        if self._asked_bytes >= max(PACK - self._fresh_bytes, _LOOKUP) or len(self._asked) + len(self._fresh) >= MOST_BLOBS:
            self._guarded(self._ask)
        if not any(digest in digests for _, digests in self._under_way):
            keep(contents)  # it is there, or waits for a pack to be full
        return digest

    def flush(self) -> None:
        """Everything added is durable and held. Raises as `add`."""
        self._check()
        self._guarded(self._flush)

    def close(self) -> None:
        """Nothing of it is under way any more; what was not flushed may be lost. To be called in the end, and before its holder is released."""
        self._failed = self._failed or RuntimeError("the upload is closed")
        self._asked.clear()
        self._fresh.clear()
        wait([future for future, _ in self._under_way])
        self._under_way.clear()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failed = error
            self.close()
            raise

    def _ask(self) -> None:
        """Hold those that the team has; the others are new."""
        digests = list(self._asked)
        missing = asyncio.run_coroutine_threadsafe(self._hold(digests, [len(self._asked[digest]) for digest in digests]), self._loop).result()
        for index in missing:
            contents = self._asked[digests[index]]
            self.new_bytes += len(contents)
            if self._room is not None and self.new_bytes > self._room:
                raise QuotaExceeded(f"there is room for {self._room} new bytes")
            self._fresh[digests[index]] = contents
            self._fresh_bytes += len(contents)
            if self._fresh_bytes >= PACK or len(self._fresh) >= MOST_BLOBS:
                self._send()
        self._asked.clear()
        self._asked_bytes = 0

    def _send(self) -> None:
        while len(self._under_way) >= _UNDER_WAY:
            self._under_way[0][0].result()
            self._under_way.popleft()
        self._turns.acquire()
        blobs, self._fresh, self._fresh_bytes = self._fresh, {}, 0
        future = asyncio.run_coroutine_threadsafe(self._stored(blobs), self._loop)
        future.add_done_callback(lambda _: self._turns.release())
        self._under_way.append((future, frozenset(blobs)))

    async def _stored(self, blobs: dict[bytes, Contents]) -> None:
        try:
            await self._write(list(blobs), list(blobs.values()))
        finally:
            for contents in blobs.values():
                keep(contents)  # whoever still refers to it must not keep others waiting

    def _flush(self) -> None:
        if self._asked:
            self._ask()
        if self._fresh:
            self._send()
        while self._under_way:
            self._under_way[0][0].result()
            self._under_way.popleft()
