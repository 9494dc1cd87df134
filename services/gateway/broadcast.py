"""Messages made once and read by any number of readers, each at its own pace, within one buffer.

The buffer keeps what somebody still has to read, and what a newcomer may want, up to its limit. At the limit the maker waits for the slowest
reader; one that takes nothing for `stall` seconds is dropped, so that it cannot hold up the others (FAULTS 18).
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

JOINED = 64 << 10
"""Bytes handed to a reader at once."""


class Reader:
    """One reader's place. `drop` is called when it is dropped."""

    def __init__(self, place: int, drop: Callable[[], None]) -> None:
        self.place = place
        self.dropped = False
        self.drop = drop
        self.news = asyncio.Event()


class Broadcast:
    """`append` by one maker, `read` by many. Each message has a token, by which a reader that comes back finds its place."""

    def __init__(self, limit: int, stall: float) -> None:
        self._limit = limit
        self._stall = stall
        self._messages: deque[tuple[str, bytes]] = deque()
        self._first = 0
        self._size = 0
        self._ended = False
        self._readers: set[Reader] = set()
        self._progress = asyncio.Event()
        self._joined: tuple[int, int, bytes] = (0, 0, b"")

    @property
    def readers(self) -> int:
        return len(self._readers)

    def place_after(self, token: str | None) -> int | None:
        """Where a reader goes on that has seen the message of `token` last (None: nothing); None when that is not in the buffer, or nothing
        follows it."""
        if token is None:
            return 0 if self._first == 0 else None
        for back, (known, _) in enumerate(reversed(self._messages)):
            if known == token:
                return None if back == 0 and self._ended else self._first + len(self._messages) - back
        return None

    async def append(self, token: str, message: bytes) -> None:
        """Raises nothing; waits while the buffer is full."""
        self._messages.append((token, message))
        self._size += len(message)
        for reader in self._readers:
            reader.news.set()
        while self._size > self._limit:
            slowest = min((reader.place for reader in self._readers), default=self._first + len(self._messages))
            while self._size > self._limit and self._first < slowest:
                self._size -= len(self._messages.popleft()[1])
                self._first += 1
            if self._size > self._limit:
                await self._make_room(slowest)

    async def _make_room(self, slowest: int) -> None:
        self._progress.clear()
        try:
            async with asyncio.timeout(self._stall):
                await self._progress.wait()
        except TimeoutError:
            for reader in [reader for reader in self._readers if reader.place <= slowest]:
                reader.dropped = True
                reader.drop()
                self._readers.discard(reader)

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = True
        for reader in self._readers:
            reader.news.set()

    def join(self, place: int, drop: Callable[[], None]) -> Reader:
        reader = Reader(place, drop)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        self._readers.discard(reader)
        self._progress.set()

    async def read(self, reader: Reader) -> AsyncGenerator[bytes, None]:
        """Messages from the reader's place on, joined, until the end or until the reader is dropped."""
        while not reader.dropped:
            last = self._first + len(self._messages)
            if reader.place < last:
                joined = self._join(reader.place)
                yield joined[2]
                reader.place = joined[1]
                self._progress.set()
            elif self._ended:
                return
            else:
                reader.news.clear()
                await reader.news.wait()

    def _join(self, start: int) -> tuple[int, int, bytes]:
        """(start, end, bytes) of messages from a place on; readers that keep pace share the bytes."""
        last = self._first + len(self._messages)
        if self._joined[0] == start and self._joined[1] > start and (self._joined[1] == last or len(self._joined[2]) >= JOINED):
            return self._joined
        parts: list[bytes] = []
        size = 0
        for index in range(start - self._first, len(self._messages)):
            part = self._messages[index][1]
            parts.append(part)
            size += len(part)
            if size >= JOINED:
                break
        self._joined = (start, start + len(parts), b"".join(parts))
        return self._joined
