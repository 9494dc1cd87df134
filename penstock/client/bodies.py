"""Bodies of uploads, on their way from files to a connection."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from penstock.client.chunks import Chunks
from penstock.client.errors import PenstockError
from penstock.client.tree import CHUNK, DIGEST

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdCompressor
else:
    from backports.zstd import ZstdCompressor

END_FRAME = bytes(DIGEST + 4)
GATHERED = 1 << 20
"""Bytes that are read before they are handed on; what is longer goes from the file to the connection as it is."""
STEP = 2 << 20
"""Bytes of a file that are handed to the connection at once."""


def frames(chunks: Chunks, places: Iterable[int], packed: bool, check: Callable[[], None]) -> "Iterator[tuple[tuple[bytes | Stretch, ...], int]]":
    """A blob stream of these chunks in some pieces at a time, with the bytes of contents in them. Each is drawn in a thread; `check` is asked
    often, and may raise."""
    compressor = ZstdCompressor(level=3) if packed else None
    gathered: list[bytes] = []
    size = 0
    for place in places:
        check()
        length = chunks.size(place)
        if compressor is None and length >= GATHERED and hasattr(os, "sendfile"):
            yield (b"".join([*gathered, chunks.digest(place), length.to_bytes(4, "big")]), Stretch(chunks, place)), size + length
            gathered, size = [], 0
            continue
        digest, contents = chunks.read(place)
        gathered += [digest, len(contents).to_bytes(4, "big"), contents]
        size += len(contents)
        if size >= GATHERED:
            data = b"".join(gathered)
            yield (compressor.compress(data) if compressor else data,), size
            gathered, size = [], 0
    data = b"".join([*gathered, END_FRAME])
    yield (compressor.compress(data, ZstdCompressor.FLUSH_FRAME) if compressor else data,), size


class Stretch:
    """A chunk that goes from its file to the connection without passing through this process, where it can."""

    def __init__(self, chunks: Chunks, place: int) -> None:
        self._chunks = chunks
        self._place = place

    async def send(self, writer: AbstractStreamWriter, moved: Callable[[], None]) -> None:
        """Raises Changed, Unreadable, ConnectionError."""
        broken: ConnectionError | None = None
        with self._chunks.unchanged(self._place >> 32) as handle:
            try:
                await self._sent(handle, writer, moved)
            except ConnectionError as error:  # no fault of the file's
                broken = error
        if broken is not None:
            raise broken

    async def _sent(self, handle: int, writer: AbstractStreamWriter, moved: Callable[[], None]) -> None:
        at = (self._place & 0xFFFFFFFF) * CHUNK
        end = at + self._chunks.size(self._place)
        loop, transport = asyncio.get_running_loop(), writer.transport
        with os.fdopen(handle, "rb", buffering=0, closefd=False) as file:
            while at < end:
                if transport is None or transport.is_closing():
                    raise ConnectionResetError("the connection is closed")
                sent = await loop.sendfile(transport, file, at, min(STEP, end - at))
                if not sent:
                    raise self._chunks.changed(self._place >> 32)
                at += sent
                moved()


class Body(aiohttp.Payload):
    """A body as it comes; `moved` is told of each piece that went."""

    def __init__(self, pieces: AsyncIterator[bytes | Stretch], moved: Callable[[], None], fault: list[PenstockError]) -> None:
        super().__init__(pieces)
        self._moved = moved
        self._fault = fault

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a stream")

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._consumed = True
        try:
            async for piece in self._value:
                if isinstance(piece, Stretch):
                    await piece.send(writer, self._moved)
                else:
                    await writer.write(piece)
                    self._moved()
        except PenstockError as error:  # aiohttp would call it a broken connection
            self._fault.append(error)
            raise
