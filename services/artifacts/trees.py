"""Trees in and out of the blob store."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from libs.archives.compression import Format
from libs.archives.pump import drawn, pump
from libs.archives.rules import Limits
from libs.archives.tree import Entry, TreeSummary, read_manifest
from libs.archives.writer import write_tree
from libs.blobstore.store import BlobStore
from services.artifacts.intake import Intake


class Trees:
    """The trees of teams, by digest (hex)."""

    def __init__(self, store: BlobStore, limits: Limits) -> None:
        self._store = store
        self.limits = limits

    async def keep(self, team: str, chunks: AsyncIterator[bytes]) -> TreeSummary:
        """Store the archive in `chunks`; whatever fails, nothing of it is kept. Raises ArchiveRefused, LogUnavailable, StoreUnavailable, and what
        `chunks` raises."""
        upload = self._store.begin(team)
        intake = Intake(upload, self.limits)
        async with self._store.undone_unless_sealed(upload):
            summary, places = await pump(chunks, intake.feed, intake.finish, self._store.threads)
        await self._store.publish(upload, places)
        return summary

    async def entries(self, team: str, digest: str) -> Sequence[Entry]:
        """Raises BlobMissing, BlobDamaged, LogUnavailable, StoreUnavailable."""
        return read_manifest(await self._store.get(team, bytes.fromhex(digest)))

    async def archive(self, team: str, entries: Sequence[Entry], form: Format) -> AsyncGenerator[bytes, None]:
        """These entries as an archive. Raises as `entries` does, at the latest in place of the last piece."""
        reader = await self._store.reader(team, {entry.digest for entry in entries if entry.size})
        return drawn(write_tree(entries, lambda entry: reader.read(entry.digest), form), self._store.threads)

    async def file(self, team: str, entry: Entry) -> AsyncGenerator[bytes, None]:
        """The contents of one file."""
        if not entry.size:
            return drawn(b"" for _ in ())
        reader = await self._store.reader(team, [entry.digest])
        return drawn(reader.read(entry.digest), self._store.threads)
