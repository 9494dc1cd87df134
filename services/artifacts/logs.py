"""Archived logs out of the store, by range of lines."""

from collections.abc import AsyncGenerator, Generator

from libs.archives.pump import drawn
from libs.blobstore.reading import BlobDamaged, BlobReader
from libs.blobstore.store import BlobStore
from services.artifacts.log_archive import DamagedArchive, frames_from, index_span, read_frames, records


class Logs:
    """The log archives of teams, by digest (hex)."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def read(self, team: str, digest: str, first: int, limit: int | None) -> AsyncGenerator[bytes, None]:
        """Records that hold lines from `first` on, up to `limit` lines, some 256 KiB at a time. Raises BlobMissing, LogUnavailable at once;
        BlobDamaged, StoreUnavailable while it is read."""
        key = bytes.fromhex(digest)
        reader = await self._store.reader(team, [key])
        return drawn(_range(reader, key, first, limit), self._store.threads)


def _range(reader: BlobReader, digest: bytes, first: int, limit: int | None) -> Generator[bytes, None, None]:
    end = None if limit is None else first + limit
    try:
        size = reader.size(digest)
        start, length = index_span(size, reader.read_range(digest, size - 8, 8))
        for frame in frames_from(read_frames(reader.read_range(digest, start, length)), first):
            if end is not None and frame.first_line >= end:
                return
            found = [
                record
                for line, after, record in records(reader.read_range(digest, frame.offset, frame.size))
                if after > first and (end is None or line < end)
            ]
            if found:
                yield b"".join(found)
    except DamagedArchive as error:
        raise BlobDamaged(f"log archive {digest.hex()} is not what was stored: {error}") from None
