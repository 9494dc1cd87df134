"""Archived logs in and out of the store, by range of lines. One that is longer than a chunk is stored as a long manifest is: its pieces, and the list
of them."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence

from libs.archives.pump import drawn, in_thread
from libs.archives.tree import CHUNK, pieces_of, root_of
from libs.blobstore.store import BlobDamaged, BlobMissing, BlobReader, BlobStore
from services.artifacts.log_archive import DamagedArchive, frames_from, index_span, read_frames, records


class Logs:
    """The log archives of teams, by digest (hex)."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def keep(self, team: str, stream: str, archive: bytes) -> str:
        """Store the archive that `stream` tells of; its digest. Raises LogUnavailable, StoreUnavailable."""
        root = await in_thread(lambda: root_of(archive), self._store.threads)
        digest = root.digest.hex()
        await asyncio.gather(*(self._store.put(team, _holder(stream, digest), blob) for blob in root.blobs))
        return digest

    async def forget(self, team: str, stream: str, digest: str) -> None:
        """An archive of `stream` that another has replaced, so that none can ever be this one again. Raises LogUnavailable, StoreUnavailable."""
        await self._store.release(team, [_holder(stream, digest)])

    async def hold(self, team: str, stream: str, digest: str) -> None:
        """Hold again what `stream` tells of. Raises BlobMissing, BlobDamaged, LogUnavailable, StoreUnavailable."""
        key = bytes.fromhex(digest)
        pieces = pieces_of(await self._store.get(team, key))
        if await self._store.hold(team, _holder(stream, digest), [key, *pieces]):
            raise BlobMissing(digest)

    async def read(self, team: str, digest: str, first: int, limit: int | None) -> AsyncGenerator[bytes, None]:
        """Records that hold lines from `first` on, up to `limit` lines, some 256 KiB at a time. Raises BlobMissing, BlobDamaged, LogUnavailable at
        once; BlobDamaged, StoreUnavailable while it is read."""
        root = await self._store.get(team, bytes.fromhex(digest))
        pieces = pieces_of(root)
        archive = _Long(await self._store.reader(team, pieces), pieces) if pieces else _Short(root)
        return drawn(_range(archive, digest, first, limit), self._store.threads)


class _Short:
    """An archive in one blob."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def at(self, start: int, length: int) -> bytes:
        return self._data[start : start + length]


class _Long:
    """An archive in pieces of a chunk each (the last: less), of which one is in memory. Blocking."""

    def __init__(self, reader: BlobReader, pieces: Sequence[bytes]) -> None:
        self._reader = reader
        self._pieces = pieces
        self._last = (-1, b"")

    @property
    def size(self) -> int:
        return (len(self._pieces) - 1) * CHUNK + self._reader.size(self._pieces[-1])

    def at(self, start: int, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            number, inside = divmod(start + len(found), CHUNK)
            if number != self._last[0]:
                self._last = number, self._reader.read(self._pieces[number])
            piece = self._last[1][inside : inside + length - len(found)]
            if not piece:
                raise DamagedArchive("it ends before its index says so")
            found += piece
        return bytes(found)


def _range(archive: _Short | _Long, digest: str, first: int, limit: int | None) -> Generator[bytes, None, None]:
    end = None if limit is None else first + limit
    try:
        start, length = index_span(archive.size, archive.at(archive.size - 8, 8))
        for frame in frames_from(read_frames(archive.at(start, length)), first):
            if end is not None and frame.first_line >= end:
                return
            found = [record for line, after, record in records(archive.at(frame.offset, frame.size)) if after > first and (end is None or line < end)]
            if found:
                yield b"".join(found)
    except DamagedArchive as error:
        raise BlobDamaged(f"log archive {digest} is not what was stored: {error}") from None


def _holder(stream: str, digest: str) -> str:
    return f"log:{stream}:{digest}"
