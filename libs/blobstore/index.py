"""Where blobs lie and who holds them, in Postgres (index.sql says what makes it right). Whoever has its own schema and pool may have one."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import asyncpg

from libs.blobstore.packs import Pack, Place
from libs.blobstore.upload import QuotaExceeded
from libs.eventlog.log import LogUnavailable
from libs.eventlog.postgres import Pool, unavailable

T = TypeVar("T")

_TABLES = Path(__file__).with_name("index.sql")
_TRIES = 50
_AT_ONCE = 10_000

_HOLD = """
WITH wanted AS MATERIALIZED (
    SELECT w.number, b.pack, b.ordinal, b.size <> w.size AS differs
    FROM unnest($3::bytea[], $4::integer[]) WITH ORDINALITY AS w (digest, size, number)
    LEFT JOIN blob b ON b.team = $1 AND b.digest = w.digest AND NOT b.damaged
), none AS MATERIALIZED (
    SELECT id, repeat('0', blobs)::varbit AS bits FROM pack WHERE id IN (SELECT pack FROM wanted)
), held AS (
    INSERT INTO hold AS h (team, holder, pack, used)
    SELECT $1, $2, n.id, bit_or(set_bit(n.bits, w.ordinal, 1)) FROM wanted w JOIN none n ON n.id = w.pack GROUP BY n.id ORDER BY n.id
    ON CONFLICT (team, holder, pack) DO UPDATE SET used = h.used | excluded.used WHERE h.used | excluded.used <> h.used
)
SELECT ARRAY(SELECT number - 1 FROM wanted WHERE pack IS NULL ORDER BY number), ARRAY(SELECT number - 1 FROM wanted WHERE differs)
"""
_SHARE = """
INSERT INTO hold AS h (team, holder, pack, used)
SELECT team, $3, pack, used FROM hold, set_config('synchronous_commit', 'off', true) WHERE team = $1 AND holder = $2 ORDER BY pack
ON CONFLICT (team, holder, pack) DO UPDATE SET used = h.used | excluded.used
"""
"""On the disk with the next commit that is: who shares has something to say that is worthless without."""
_RELEASE = """
WITH gone AS (DELETE FROM hold WHERE team = $1 AND holder = ANY ($2::text[]))
SELECT EXISTS (SELECT FROM hold WHERE team = $1 AND holder = ANY ($2::text[]))
"""
_HELD = "SELECT EXISTS (SELECT FROM hold WHERE team = $1 AND holder = $2)"
_FIND = """
SELECT p.name, array_agg(b.digest), array_agg(b.start), array_agg(b.size), array_agg(b.damaged)
FROM blob b JOIN pack p ON p.id = b.pack WHERE b.team = $1 AND b.digest = ANY ($2::bytea[]) GROUP BY p.name
"""
_USAGE = "SELECT coalesce(sum(bytes), 0)::bigint FROM pack WHERE team = $1"

_INTEND = "INSERT INTO leftover (team, name, writer, since, bytes) VALUES ($1, $2, $3, now(), $4)"
_INTEND_WITHIN = """
INSERT INTO leftover (team, name, writer, since, bytes) SELECT $1, $2, $3, now(), $4::bigint
WHERE (SELECT coalesce(sum(bytes), 0) FROM pack WHERE team = $1)
    + (SELECT coalesce(sum(bytes), 0) FROM leftover WHERE team = $1 AND writer <> '') + $4::bigint <= $5::bigint
"""
_ROOM_BY_TURNS = "SELECT pg_advisory_xact_lock(hashtext('room for blobs'), hashtext($1))"
_GIVE_BACK = "UPDATE leftover SET bytes = 0 WHERE team = $1 AND name = $2"
_PUBLISH = """
WITH intent AS (
    DELETE FROM leftover WHERE team = $1 AND name = $2 AND writer = $3 RETURNING name
), new AS (
    INSERT INTO pack (team, name, bytes, blobs) SELECT $1, $2, $4, cardinality($5::bytea[]) FROM intent RETURNING id, blobs
), none AS MATERIALIZED (
    SELECT repeat('0', blobs)::varbit AS bits FROM new
), added AS (
    INSERT INTO blob (team, digest, size, pack, start, ordinal)
    SELECT $1, b.digest, b.size, new.id, b.start, b.number - 1
    FROM new, unnest($5::bytea[], $6::integer[], $7::integer[]) WITH ORDINALITY AS b (digest, size, start, number) ORDER BY b.digest
    ON CONFLICT (team, digest) DO NOTHING RETURNING ordinal
), bits AS (
    SELECT bit_or(set_bit(none.bits, ordinal, 1)) AS added FROM none, added
), held AS (
    INSERT INTO hold (team, holder, pack, used)
    SELECT $1, h.holder, new.id, h.used::varbit & bits.added FROM new, bits, unnest($8::text[], $9::text[]) AS h (holder, used)
    WHERE bit_count(h.used::varbit & bits.added) > 0
)
SELECT (SELECT id FROM new), ARRAY(SELECT ordinal FROM added)
"""
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('blobs held elsewhere'), hashtext($1))"
"""For who locks several packs one after another, and would meet the likes of it in the other order."""
_RENUMBER = """
UPDATE pack SET id = DEFAULT WHERE id IN (SELECT pack FROM blob WHERE team = $1 AND digest = ANY ($2::bytea[]) AND damaged) RETURNING id
"""
_HEAL = """
WITH healed AS MATERIALIZED (
    SELECT b.digest, b.pack, b.ordinal, w.start, w.ordinal AS new_ordinal, set_bit(repeat('0', p.blobs)::varbit, b.ordinal, 1) AS mask
    FROM unnest($3::bytea[], $4::integer[], $5::integer[]) AS w (digest, start, ordinal)
    JOIN blob b ON b.team = $1 AND b.digest = w.digest AND b.damaged AND b.pack = ANY ($6::bigint[]) JOIN pack p ON p.id = b.pack
), none AS (
    SELECT repeat('0', blobs)::varbit AS bits FROM pack WHERE id = $2
), needs AS MATERIALIZED (
    SELECT h.holder, bit_or(set_bit(none.bits, healed.new_ordinal, 1)) AS used
    FROM none, healed JOIN hold h ON h.pack = healed.pack AND get_bit(h.used, healed.ordinal) = 1 GROUP BY h.holder
), held AS (
    INSERT INTO hold AS h (team, holder, pack, used) SELECT $1, holder, $2, used FROM needs
    ON CONFLICT (team, holder, pack) DO UPDATE SET used = h.used | excluded.used
), cleared AS (
    UPDATE hold h SET used = h.used & ~m.mask FROM (SELECT pack, bit_or(mask) AS mask FROM healed GROUP BY pack) m WHERE h.pack = m.pack
), moved AS (
    UPDATE blob b SET pack = $2, start = healed.start, ordinal = healed.new_ordinal, damaged = false
    FROM healed WHERE b.team = $1 AND b.digest = healed.digest
)
SELECT count(*) FROM healed
"""
_HOLD_HEALED = """
INSERT INTO hold AS h (team, holder, pack, used) VALUES ($1, $2, $3, $4::text::varbit)
ON CONFLICT (team, holder, pack) DO UPDATE SET used = h.used | excluded.used
"""
_NOTHING_USED = "DELETE FROM hold WHERE team = $1 AND bit_count(used) = 0"

_DAMAGED = """
UPDATE blob b SET damaged = true FROM pack p
WHERE p.team = $1 AND p.name = $2 AND b.pack = p.id AND NOT b.damaged AND (b.digest = $3 OR b.start + b.size > $4)
"""
_LOST = """
WITH lost AS (UPDATE pack SET bytes = 0 WHERE team = $1 AND name = ANY ($2::text[]) RETURNING id)
UPDATE blob b SET damaged = true FROM lost WHERE b.pack = lost.id AND NOT b.damaged
"""
_SOUND = """
UPDATE blob b SET damaged = false FROM pack p WHERE p.team = $1 AND p.name = $2 AND b.pack = p.id AND b.damaged AND b.digest = ANY ($3::bytea[])
"""

_UNKNOWN = """
SELECT o.team, o.name FROM unnest($1::text[], $2::text[]) AS o (team, name)
WHERE NOT EXISTS (SELECT FROM pack p WHERE p.team = o.team AND p.name = o.name)
AND NOT EXISTS (SELECT FROM leftover l WHERE l.team = o.team AND l.name = o.name)
"""
_CLAIM = "INSERT INTO leftover (team, name, writer, since) VALUES ($1, $2, '', now()) ON CONFLICT DO NOTHING"
_ADOPTED = "adopted"

_NEWEST = "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('leftover') AND attname = 'bytes')"

_ARRIVE = "INSERT INTO blob_writer (writer, seen_at) VALUES ($1, now()) ON CONFLICT (writer) DO UPDATE SET seen_at = now()"
_RENEW = "UPDATE blob_writer SET seen_at = now() WHERE writer = $1"
_LEAVE = "DELETE FROM blob_writer WHERE writer = $1"
_SUCCEED = "DELETE FROM blob_writer WHERE starts_with(writer, $1)"


class SizeDiffers(Exception):
    """A blob has another size than was said."""


class WriterGone(Exception):
    """This instance was taken for dead, and what it was writing for garbage."""


class _Moved(Exception):
    """What a statement relied on has changed since: do it again."""


class _Gone(Exception):
    """A pack that was to be adopted."""


class BlobIndex:
    """The rows of `pack`, `blob`, `hold`, `leftover` and `blob_writer`. All methods raise LogUnavailable when the database is away."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def create(self) -> None:
        """Make the tables if they are not there. Whoever works with them is not disturbed: even CREATE INDEX IF NOT EXISTS waits for writers."""
        with unavailable():
            if await self.pool.fetchval(_NEWEST):
                return
            try:
                await self.pool.execute(_TABLES.read_text(encoding="utf-8"))
            except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError):
                # two instances starting at once: the other's tables are there
                await self.pool.execute(_TABLES.read_text(encoding="utf-8"))

    async def hold(self, team: str, holder: str, digests: Sequence[bytes], sizes: Sequence[int] | None = None) -> list[int]:
        """Indexes of those that are not there. Raises SizeDiffers."""
        missing: list[int] = []
        for at in range(0, len(digests), _AT_ONCE):
            some, some_sizes = digests[at : at + _AT_ONCE], None if sizes is None else sizes[at : at + _AT_ONCE]
            (absent, different), *_ = await again(lambda: self.pool.fetch(_HOLD, team, holder, some, some_sizes))  # noqa: B023  awaited here
            if different:
                raise SizeDiffers(f"blob {some[different[0]].hex()} has another size")
            missing += absent if at == 0 else [at + index for index in absent]
        return missing

    async def share(self, team: str, holder: str, other: str) -> bool:
        return bool(await again(lambda: self.pool.execute(_SHARE, team, holder, other)) != "INSERT 0 0")

    async def release(self, team: str, holders: Collection[str]) -> None:
        """Until there was nothing to delete: a hold that is just being moved to another pack is seen, but where it was."""
        while await again(lambda: self.pool.fetchval(_RELEASE, team, list(holders))):
            continue

    async def held(self, team: str, holder: str) -> bool:
        with unavailable():
            return bool(await self.pool.fetchval(_HELD, team, holder))

    async def find(self, team: str, digests: Collection[bytes]) -> dict[bytes, Place]:
        """Places of those that the team has, damaged or not."""
        with unavailable():
            rows = await self.pool.fetch(_FIND, team, list(digests))
        return {digest: Place(name, *place) for name, *columns in rows for digest, *place in zip(*columns, strict=True)}

    async def usage(self, team: str) -> int:
        with unavailable():
            return int(await self.pool.fetchval(_USAGE, team))

    async def intend(self, team: str, name: str, writer: str, size: int = 0, quota: int | None = None) -> None:
        """Before an object is put: whatever happens now, it is not forgotten. It takes `size` bytes of the team's room, until it is published or
        given up. Raises QuotaExceeded when that is more than is left, beside all that is there or under way."""
        with unavailable():
            if quota is None:
                await self.pool.execute(_INTEND, team, name, writer, size)
                return
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute(_ROOM_BY_TURNS, team)
                if await connection.execute(_INTEND_WITHIN, team, name, writer, size, quota) == "INSERT 0 0":
                    raise QuotaExceeded(f"the team may store {quota} bytes")

    async def give_back(self, team: str, name: str) -> None:
        """It will not be published: others may have its room."""
        with unavailable():
            await self.pool.execute(_GIVE_BACK, team, name)

    async def publish(self, writer: str, team: str, name: str, pack: Pack, holders: Mapping[str, Sequence[int]]) -> None:
        """A pack that is in the store becomes visible, each holder holding its ordinals, all or nothing. A blob that meanwhile came from elsewhere is
        held there; one that is damaged elsewhere is taken from here, for all who hold it. Raises WriterGone."""
        places = pack.digests, pack.sizes, pack.starts()
        used = [bits(len(pack.digests), ordinals) for ordinals in holders.values()]

        async def work() -> None:
            async with self.pool.acquire() as connection, connection.transaction():
                (new, added), *_ = await connection.fetch(_PUBLISH, team, name, writer, pack.bytes, *places, list(holders), used)
                if new is None:
                    raise WriterGone(writer)
                if len(added) < len(pack.digests):
                    await connection.execute(_ONE_AT_A_TIME, team)
                    await self._hold_elsewhere(connection, team, new, pack, holders, set(added))

        await again(work)

    async def _hold_elsewhere(
        self, connection: asyncpg.pool.PoolConnectionProxy, team: str, new: int, pack: Pack, holders: Mapping[str, Sequence[int]], added: set[int]
    ) -> None:
        """Those that were not `added` to the new pack. Raises _Moved."""
        for holder, ordinals in sorted(holders.items()):
            others = [ordinal for ordinal in ordinals if ordinal not in added]
            if not others:
                continue
            (absent, _), *_ = await connection.fetch(_HOLD, team, holder, [pack.digests[ordinal] for ordinal in others], None)
            if not absent:
                continue
            damaged = [others[index] for index in absent]
            digests, starts = [pack.digests[ordinal] for ordinal in damaged], pack.starts()
            ours = [row[0] for row in await connection.fetch(_RENUMBER, team, digests)]
            if await connection.fetchval(_HEAL, team, new, digests, [starts[ordinal] for ordinal in damaged], damaged, ours) != len(damaged):
                raise _Moved
            await connection.execute(_HOLD_HEALED, team, holder, new, bits(len(pack.digests), damaged))
            await connection.execute(_NOTHING_USED, team)

    async def damaged(self, team: str, pack: str, digest: bytes, end: int = 1 << 31) -> bool:
        """This blob of the pack is not what it was, nor is any that goes beyond `end`: to be stored anew by whoever has it. Whether that is news."""
        with unavailable():
            return bool(await self.pool.execute(_DAMAGED, team, pack, digest, min(end, (1 << 31) - 1)) != "UPDATE 0")

    async def packs(self, team: str) -> set[str]:
        """Names of all that the team should have."""
        with unavailable():
            return {row[0] for row in await self.pool.fetch("SELECT name FROM pack WHERE team = $1", team)}

    async def lost(self, team: str, packs: Collection[str]) -> None:
        """Nothing is left of these, and what heals them needs their room."""
        await again(lambda: self.pool.execute(_LOST, team, list(packs)))

    async def sound(self, team: str, pack: str, digests: Collection[bytes]) -> None:
        """These blobs of the pack are what they were, after all."""
        with unavailable():
            await self.pool.execute(_SOUND, team, pack, list(digests))

    async def is_new(self) -> bool:
        """Whether the store may have packs from before these tables."""
        with unavailable():
            return not await self.pool.fetchval("SELECT EXISTS (SELECT FROM adopted)")

    async def has_adopted(self) -> None:
        with unavailable():
            await self.pool.execute("INSERT INTO adopted VALUES (now())")

    async def unknown(self, objects: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
        """(team, name) of those that are neither packs nor leftovers."""
        with unavailable():
            rows = await self.pool.fetch(_UNKNOWN, [team for team, _ in objects], [name for _, name in objects])
        return [(row[0], row[1]) for row in rows]

    async def adopt(self, team: str, name: str, pack: Pack, is_there: Callable[[], Awaitable[bool]]) -> bool:
        """An unknown pack becomes visible, and is held until `disown`; false when it became known meanwhile, or is there no more
        (asked when nobody else can make it known)."""
        places = pack.digests, pack.sizes, pack.starts()
        used = bits(len(pack.digests), range(len(pack.digests)))

        async def work() -> bool:
            async with self.pool.acquire() as connection, connection.transaction():
                if await connection.execute(_CLAIM, team, name) != "INSERT 0 1":
                    return False
                await connection.fetchrow(_PUBLISH, team, name, "", pack.bytes, *places, [_ADOPTED], [used])
                if not await is_there():
                    raise _Gone
                return True

        try:
            return await again(work)
        except (_Gone, asyncpg.UniqueViolationError):
            return False

    async def disown(self) -> None:
        with unavailable():
            await self.pool.execute("DELETE FROM hold WHERE holder = $1", _ADOPTED)

    async def abandon(self, team: str, name: str) -> None:
        """What is half written, and nobody's."""
        with unavailable():
            await self.pool.execute(_CLAIM, team, name)

    async def arrive(self, writer: str) -> None:
        with unavailable():
            await self.pool.execute(_ARRIVE, writer)

    async def renew(self, writer: str) -> bool:
        """False: it was taken for dead."""
        with unavailable():
            return bool(await self.pool.execute(_RENEW, writer) == "UPDATE 1")

    async def leave(self, writer: str) -> None:
        with unavailable():
            await self.pool.execute(_LEAVE, writer)

    async def succeed(self, instance: str) -> None:
        """Whoever wrote under a name that begins so is dead."""
        with unavailable():
            await self.pool.execute(_SUCCEED, instance)


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """Do it until it did not collide with somebody who moved or removed a pack."""
    for _ in range(_TRIES):
        with unavailable():
            try:
                return await work()
            except (_Moved, asyncpg.ForeignKeyViolationError, asyncpg.DeadlockDetectedError):
                continue
    raise LogUnavailable("the index does not come to rest")


def bits(length: int, ordinals: Iterable[int]) -> str:
    """As Postgres writes a bit string."""
    characters = bytearray(b"0" * length)
    for ordinal in ordinals:
        characters[ordinal] = 0x31
    return characters.decode()
