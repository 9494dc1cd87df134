"""Where the values of secrets are: rows of `secret`, encrypted. Nothing else of this service holds one for longer than it takes to pass it on."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import asyncpg
import msgspec

from libs.eventlog.postgres import Pool, unavailable
from proto.private import Private
from proto.secrets import MAX_TOGETHER
from services.scheduler.master_keys import Keyring, MissingKey, Tampered
from services.scheduler.secret_index import Entry, Wanted

_TABLES = Path(__file__).with_name("secrets.sql")
_STORE = """
INSERT INTO secret (entry, team, name, build, key_id, ciphertext)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[])
ON CONFLICT (entry) DO UPDATE SET key_id = excluded.key_id, ciphertext = excluded.ciphertext
"""
_READ = "SELECT entry, team, name, key_id, ciphertext FROM secret WHERE entry = ANY ($1)"
_REMOVE = """
DELETE FROM secret s USING secret removed
WHERE removed.entry = $1 AND s.team = removed.team AND s.name = removed.name AND s.build = '' AND s.stored_at <= removed.stored_at
"""
_FORGET_BEFORE = """
DELETE FROM secret s USING secret latest
WHERE latest.entry = $1 AND s.team = latest.team AND s.name = latest.name AND s.stored_at < latest.stored_at
AND latest.stored_at < now() - make_interval(secs => $2)
"""
_FORGET = "DELETE FROM secret WHERE build = ANY ($1)"
_STALE = """
SELECT entry, team, name, build, stored_at < now() - interval '1 day' AS old FROM secret
WHERE entry > $1 AND stored_at < now() - make_interval(secs => $2) ORDER BY entry LIMIT $3
"""
_DROP = "DELETE FROM secret WHERE entry = ANY ($1)"
_KEYS = "SELECT key_id, count(*) FILTER (WHERE team <> '') FROM secret GROUP BY key_id"
_OLDER = "SELECT entry, team, name, key_id, ciphertext FROM secret WHERE key_id = $1 AND entry > $2 ORDER BY entry LIMIT 100"
_RENEW = "UPDATE secret SET key_id = $3, ciphertext = $4 WHERE entry = $1 AND key_id = $2"


class Unreadable(msgspec.Struct, frozen=True):
    """Why a value that is stored cannot be had."""

    why: str


class Given(Private, frozen=True):
    """What a stage's references stand for: values by name, and why others are not to be had."""

    values: dict[str, str] = {}
    unreadable: dict[str, str] = {}


_NOTHING = Given()


class Vault:
    """All calls raise LogUnavailable. `source` gives the master keys as they are now (raising ValueError, OSError), `keys` are those last seen."""

    def __init__(self, pool: Pool, source: Callable[[], Keyring]) -> None:
        self._pool = pool
        self._source = source
        self.keys = source()

    async def look(self) -> Keyring:
        """The master keys, read again. Raises ValueError, OSError."""
        self.keys = await asyncio.to_thread(self._source)
        return self.keys

    async def create(self) -> None:
        """Make the table if it is not there."""
        with unavailable():
            try:
                await self._pool.execute(_TABLES.read_text(encoding="utf-8"))
            except (asyncpg.UniqueViolationError, asyncpg.DuplicateObjectError):
                # two instances starting at once: the other's table is there
                await self._pool.execute(_TABLES.read_text(encoding="utf-8"))

    async def store(self, values: Mapping[Entry, str]) -> None:
        """Keep them, under the first key."""
        if not values:
            return
        rows = [(e.entry, e.team, e.name, e.build, *self.keys.encrypt(value.encode(), _bound(e))) for e, value in values.items()]
        with unavailable():
            await self._pool.execute(_STORE, *map(list, zip(*rows, strict=True)))

    async def read(self, entries: Collection[Entry]) -> dict[Entry, str | Unreadable]:
        """The values of those that are there and were stored as this team's."""
        wanted = {entry.entry: entry for entry in entries}
        with unavailable():
            rows = await self._pool.fetch(_READ, list(wanted))
        if any(row["key_id"] not in self.keys for row in rows):
            with contextlib.suppress(ValueError, OSError):  # another instance may have seen a new one a moment earlier
                await self.look()
        return {wanted[row["entry"]]: self._value(row) for row in rows if row["team"] == wanted[row["entry"]].team}

    def _value(self, row: asyncpg.Record) -> str | Unreadable:
        try:
            return self._opened(row).decode()
        except MissingKey as missing:
            return Unreadable(f"cannot be read: the scheduler was not given the master key `{missing}`")
        except Tampered:
            return Unreadable("cannot be read: what is stored of it was changed")

    def _opened(self, row: asyncpg.Record) -> bytes:
        return self.keys.decrypt(row["key_id"], row["ciphertext"], _bound(Entry(row["entry"], row["team"], row["name"])))

    async def given(self, wanted: Wanted) -> Given:
        """For a package."""
        if not wanted.entries:
            return _NOTHING
        stored = await self.read([entry for entry in wanted.entries.values() if entry is not None])
        given, room = Given({}, {}), MAX_TOGETHER
        for name, entry in wanted.entries.items():
            value = stored.get(entry, Unreadable("is not there any more")) if entry is not None else Unreadable("is not set")
            if isinstance(value, str):
                room -= len(value.encode())
            if isinstance(value, Unreadable):
                given.unreadable[name] = value.why
            elif room < 0:
                given.unreadable[name] = f"is too much: what a stage refers to may have {MAX_TOGETHER} bytes in all"
            else:
                given.values[name] = value
        return given

    async def remove(self, entry: str) -> None:
        """A team's secret: this version of it, and earlier ones."""
        with unavailable():
            await self._pool.execute(_REMOVE, entry)

    async def forget_before(self, entry: str, seconds: float) -> None:
        """What was stored before this one for the same name, if this one was stored longer ago."""
        with unavailable():
            await self._pool.execute(_FORGET_BEFORE, entry, seconds)

    async def forget_builds(self, builds: Sequence[str]) -> None:
        """What was kept for these builds."""
        with unavailable():
            await self._pool.execute(_FORGET, builds)

    async def older(self, seconds: float, after: str, limit: int) -> list[tuple[Entry, bool]]:
        """What was stored longer ago, by entry, after one; and whether that is more than a day."""
        with unavailable():
            rows = await self._pool.fetch(_STALE, after, seconds, limit)
        return [(Entry(row["entry"], row["team"], row["name"], row["build"]), row["old"]) for row in rows]

    async def drop(self, entries: Sequence[str]) -> None:
        with unavailable():
            await self._pool.execute(_DROP, entries)

    async def under(self) -> dict[str, int]:
        """How many values are under which master key (0: none but of the schedulers' own)."""
        with unavailable():
            return {row[0]: row[1] for row in await self._pool.fetch(_KEYS)}

    async def rotate(self) -> tuple[int, dict[str, int]]:
        """Encrypt anew, under the first key, what is under others. (how many values, and how many are under each key that is missing)."""
        known, renewed = await self.under(), 0
        with unavailable():
            for key_id in known.keys() - {self.keys.first}:
                after = ""
                while key_id in self.keys and (rows := await self._pool.fetch(_OLDER, key_id, after)):
                    after = rows[-1]["entry"]
                    renewed += await self._renew(rows)
        return renewed, {key_id: count for key_id, count in known.items() if count and key_id not in self.keys}

    async def _renew(self, rows: Sequence[asyncpg.Record]) -> int:
        fresh: list[tuple[object, ...]] = []
        for row in rows:
            try:
                value = self._opened(row)
            except (Tampered, MissingKey):  # the key may have gone just now
                continue  # said when it is read
            fresh.append((row["entry"], row["key_id"], *self.keys.encrypt(value, _bound(Entry(row["entry"], row["team"], row["name"])))))
        await self._pool.executemany(_RENEW, fresh)
        return len(fresh)


def _bound(entry: Entry) -> bytes:
    return "\0".join((entry.team, entry.name, entry.entry)).encode()
