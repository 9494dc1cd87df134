"""What nobody holds is removed; what is mostly dead, or small, is written anew. Any number of instances may do it at once, and die at any point.

It never waits for a lock while it has one: what somebody else is about to hold is left for the next time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import asyncpg
import structlog

from libs.archives.pump import in_thread
from libs.blobstore.index import BlobIndex, WriterGone, again, bits
from libs.blobstore.objects import Objects
from libs.blobstore.packs import MOST_BLOBS, PACK, Pack, Place, key
from libs.blobstore.reading import BlobDamaged, BlobMissing, BlobReader
from libs.blobstore.writing import PackWriter
from libs.eventlog.postgres import unavailable

logger = structlog.get_logger()

_SMALL = 2 << 20
_FEW = 8
"""So many small packs of about one size become one: each byte is moved once for each size, not once for each pack that comes."""
_BATCH = 500

_BURY = "DELETE FROM blob_writer WHERE seen_at < now() - make_interval(secs => $1)"
_GIVE_UP = """
UPDATE leftover SET writer = '', since = now()
WHERE writer <> '' AND (NOT EXISTS (SELECT FROM blob_writer b WHERE b.writer = leftover.writer) OR name = ANY ($1::text[]))
"""
_UNHELD = "SELECT id FROM pack p WHERE NOT EXISTS (SELECT FROM hold h WHERE h.pack = p.id) LIMIT $1 FOR UPDATE SKIP LOCKED"
_REMOVE = """
WITH gone AS (
    DELETE FROM pack p WHERE id = ANY ($1::bigint[]) AND NOT EXISTS (SELECT FROM hold h WHERE h.pack = p.id) RETURNING team, name, bytes
), left_over AS (
    INSERT INTO leftover (team, name, writer, since) SELECT team, name, '', '-infinity' FROM gone
)
SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM gone
"""
_LEFTOVER = """
SELECT team, name FROM leftover WHERE writer = '' AND (NOT emptied OR since < now() - make_interval(secs => $1)) ORDER BY team, name LIMIT $2
"""
_EMPTIED = """
WITH done AS (SELECT * FROM unnest($1::text[], $2::text[]) AS d (team, name)),
over AS (
    DELETE FROM leftover l USING done d WHERE l.team = d.team AND l.name = d.name AND since < now() - make_interval(secs => $3)
)
UPDATE leftover l SET emptied = true FROM done d WHERE l.team = d.team AND l.name = d.name AND since >= now() - make_interval(secs => $3)
"""
_LOOSE = """
WITH needed AS (
    SELECT pack, bit_or(used) AS used FROM hold GROUP BY pack
), loose AS (
    SELECT p.id, p.team, p.name, p.bytes, n.used FROM pack p JOIN needed n ON n.pack = p.id WHERE bit_count(n.used) < p.blobs OR p.bytes < $1
)
SELECT s.id, s.team, s.name, s.bytes, coalesce(sum(b.size), 0)::bigint AS live, count(b.ordinal) AS blobs
FROM loose s LEFT JOIN blob b ON b.pack = s.id AND get_bit(s.used, b.ordinal) = 1
GROUP BY s.id, s.team, s.name, s.bytes HAVING NOT coalesce(bool_or(b.damaged), false)
ORDER BY s.team, s.id
"""
_LIVE = """
SELECT b.digest, b.size, b.start, p.name, p.id, b.ordinal
FROM pack p JOIN blob b ON b.pack = p.id
WHERE p.id = ANY ($1::bigint[]) AND EXISTS (SELECT FROM hold h WHERE h.pack = p.id AND get_bit(h.used, b.ordinal) = 1)
ORDER BY p.id, b.ordinal
"""
_LOCK = "SELECT id FROM pack WHERE id = ANY ($1::bigint[]) FOR UPDATE SKIP LOCKED"
_HOLDS = "SELECT holder, pack, used::text FROM hold WHERE pack = ANY ($1::bigint[]) FOR UPDATE NOWAIT"
_REPLACE = """
WITH intent AS (
    DELETE FROM leftover WHERE team = $1 AND name = $2 AND writer = $3 RETURNING name
), new AS (
    INSERT INTO pack (team, name, bytes, blobs) SELECT $1, $2, $4, $5 FROM intent RETURNING id
), moved AS (
    UPDATE blob b SET pack = new.id, start = w.start, ordinal = w.number - 1, damaged = false
    FROM new, unnest($6::bytea[], $7::integer[]) WITH ORDINALITY AS w (digest, start, number)
    WHERE b.team = $1 AND b.digest = w.digest AND b.pack = ANY ($8::bigint[]) RETURNING b.digest
), held AS (
    INSERT INTO hold (team, holder, pack, used)
    SELECT $1, h.holder, new.id, h.used::varbit FROM new, unnest($9::text[], $10::text[]) AS h (holder, used)
), freed AS (
    DELETE FROM hold USING intent WHERE pack = ANY ($8::bigint[])
)
SELECT (SELECT id FROM new), (SELECT count(*) FROM moved)
"""


class Collected(NamedTuple):
    """What came of it: packs that nobody held, their bytes, and packs that were rewritten."""

    packs: int
    bytes: int
    rewritten: int


class _Loose(NamedTuple):
    """A pack that could be smaller, or part of another."""

    id: int
    team: str
    name: str
    bytes: int
    live: int
    blobs: int


Reader = Callable[[str, dict[bytes, Place]], BlobReader]


class Collector:
    """For one run at a time."""

    def __init__(self, objects: Objects, index: BlobIndex, writer: PackWriter, reader: Reader, threads: ThreadPoolExecutor) -> None:
        """`reader` gives one for blobs of a team at places."""
        self._objects = objects
        self._index = index
        self._writer = writer
        self._reader = reader
        self._threads = threads

    async def collect(self, silent_for: float, late_by: float) -> Collected:
        """A writer `silent_for` so many seconds is dead, and what it was putting is there within `late_by` seconds, or never.
        Raises LogUnavailable, StoreUnavailable; what was done until then is done."""
        with unavailable():
            await self._index.pool.execute(_BURY, silent_for)
            given_up = set(self._writer.given_up)
            await self._index.pool.execute(_GIVE_UP, list(given_up))
            self._writer.given_up -= given_up
        packs, size = await self._remove()
        rewritten = 0
        with unavailable():
            loose = [_Loose(*row) for row in await self._index.pool.fetch(_LOOSE, _SMALL)]
        for group in _groups(loose):
            if (saved := await self._rewrite(group)) is not None:
                rewritten, size = rewritten + len(group), size + saved
        await self._empty(late_by)
        if packs or rewritten:
            logger.info("collected packs", packs=packs, bytes=size, rewritten=rewritten)
        return Collected(packs, size, rewritten)

    async def _remove(self) -> tuple[int, int]:
        """Packs that nobody holds become leftovers. What locks a pack keeps others from holding it, and only then is it sure that none does."""

        async def some() -> tuple[int, int]:
            async with self._index.pool.acquire() as connection, connection.transaction():
                found = [row[0] for row in await connection.fetch(_UNHELD, _BATCH)]
                (gone, gone_bytes), *_ = await connection.fetch(_REMOVE, found) if found else [(0, 0)]
                return gone, gone_bytes

        packs = size = 0
        while True:
            gone, gone_bytes = await again(some)
            packs, size = packs + gone, size + gone_bytes
            if not gone:
                return packs, size

    async def _empty(self, late_by: float) -> None:
        while True:
            with unavailable():
                found = [(row[0], row[1]) for row in await self._index.pool.fetch(_LEFTOVER, late_by, _BATCH)]
            if not found:
                return
            await in_thread(lambda: self._objects.delete([key(team, name) for team, name in found]), self._threads)  # noqa: B023  awaited here
            with unavailable():
                await self._index.pool.execute(_EMPTIED, [team for team, _ in found], [name for _, name in found], late_by)

    async def _rewrite(self, group: Sequence[_Loose]) -> int | None:
        """One new pack of what is live in these; bytes saved, None when it has to wait for another time."""
        team, old = group[0].team, [pack.id for pack in group]
        with unavailable():
            rows = await self._index.pool.fetch(_LIVE, old)
        places = {row["digest"]: Place(row["name"], row["start"], row["size"]) for row in rows}
        ordinals = {(row["id"], row["ordinal"]): ordinal for ordinal, row in enumerate(rows)}
        new = Pack([row["digest"] for row in rows], [row["size"] for row in rows])
        if not rows:
            return None
        try:
            reader = self._reader(team, places)
            contents = await in_thread(lambda: [reader.read(digest) for digest in new.digests], self._threads)
        except (BlobDamaged, BlobMissing) as error:
            logger.warning("a pack cannot be rewritten", team=team, why=str(error))
            return None
        try:
            async with self._writer.put(team, new, contents) as (writer, name):
                await again(lambda: self._replace(team, writer, name, new, old, ordinals))
        except _Changed:
            return None
        return sum(pack.bytes for pack in group) - new.bytes

    async def _replace(self, team: str, writer: str, name: str, new: Pack, old: list[int], ordinals: Mapping[tuple[int, int], int]) -> None:
        """In one transaction: blobs and holds go to the new pack, the old ones' ids are gone. Raises _Changed: then nothing was done."""
        async with self._index.pool.acquire() as connection, connection.transaction():
            if len(await connection.fetch(_LOCK, old)) != len(old):
                raise _Changed
            holds: dict[str, set[int]] = {}
            try:
                for holder, pack, used in await connection.fetch(_HOLDS, old):
                    holds.setdefault(holder, set()).update(ordinals[pack, ordinal] for ordinal, bit in enumerate(used) if bit == "1")
            except (KeyError, asyncpg.LockNotAvailableError):
                raise _Changed from None
            used = [bits(len(new.digests), mine) for mine in holds.values()]
            columns = new.digests, new.starts(), old, list(holds), used
            (made, moved), *_ = await connection.fetch(_REPLACE, team, name, writer, new.bytes, len(new.digests), *columns)
            if made is None:
                raise WriterGone(writer)
            (removed, _), *_ = await connection.fetch(_REMOVE, old)
            if moved != len(new.digests) or removed != len(old):
                raise _Changed


class _Changed(Exception):
    """A blob is somewhere else meanwhile."""


def _groups(loose: Iterable[_Loose]) -> Iterator[list[_Loose]]:
    """What to write together: by team the mostly dead ones, and the small ones of one order of magnitude, if they are many."""
    dead: dict[str, list[_Loose]] = {}
    small: dict[tuple[str, int], list[_Loose]] = {}
    for pack in loose:
        if pack.live < pack.bytes / 2 and pack.live + pack.blobs * 64 + 256 < pack.bytes:
            dead.setdefault(pack.team, []).append(pack)
        elif pack.bytes < _SMALL:
            small.setdefault((pack.team, int(math.log(pack.bytes, 8))), []).append(pack)
    for packs in (*dead.values(), *(packs for packs in small.values() if len(packs) >= _FEW)):
        group: list[_Loose] = []
        for pack in packs:
            if group and (sum(p.live for p in group) + pack.live > PACK or sum(p.blobs for p in group) + pack.blobs > MOST_BLOBS):
                yield group
                group = []
            group.append(pack)
        if group:
            yield group
