"""Uploads on their way: rows of `upload`, in Postgres, so that any instance can go on with any of them.

Why no byte that an artifact needs is ever removed, whoever stops, dies or sleeps at whatever point:

1. A session's id is new, and its row comes before anything is held in its name. While there is the row, nobody releases what it holds.
2. An artifact is sealed only after the row was found and marked `sealing`, in one statement. What lapses is deleted, in one statement too, and only
   while it is not marked: so an upload that slept through its lapse finds no row and can never be sealed, and one that is marked does not lapse, but
   is sealed in the end, by the janitor if need be.
3. A marked row goes when the projection shows the artifact that came with it (or it is known that there never will be one): from then on
   the artifact holds, in the same name, until it is gone and no unfinished build uses it.
4. Several streams may be at one session, and any of them may mark it while another fails. So whoever fails drops it only while it is not marked, in
   one statement; only who knows what came of the command to seal it (it was executed, or refused) ends a marked one.
5. So what nobody needs at one moment nobody can ever need again, and the janitor may release it at any later one.

What is only said on the way to an append, or to a hold, need not be on the disk by itself: the append comes after it in the one log of Postgres, and
when a power cut takes the former, it takes the latter, too.
"""

from pathlib import Path

import asyncpg
import msgspec

from libs.eventlog.postgres import Pool, unavailable
from services.artifacts.commands import SealArtifact

LAPSE = 3600.0
"""Seconds without a sign of life after which an upload is dropped."""

_TABLES = Path(__file__).with_name("sessions.sql")
_OPEN = """
INSERT INTO upload (id, team, artifact, tree, seal, lifetime, seen_at)
SELECT $1, $2, $3, $4, $5::bytea, $6::bigint, $7::double precision FROM set_config('synchronous_commit', 'off', true)
ON CONFLICT (team, artifact) WHERE tree <> '' DO UPDATE SET seen_at = greatest(upload.seen_at, excluded.seen_at) RETURNING id, seal, lifetime
"""
_FIND = """
UPDATE upload SET seen_at = greatest(seen_at, $3) FROM set_config('synchronous_commit', 'off', true)
WHERE team = $1 AND artifact = $2 AND tree <> '' RETURNING id, seal, lifetime
"""
_TOUCH = "UPDATE upload SET seen_at = greatest(seen_at, $2) WHERE id = $1 RETURNING true"
_MARK = """
UPDATE upload SET sealing = true, seal = $2, seen_at = $3 FROM set_config('synchronous_commit', 'off', true)
WHERE id = $1 AND ($4 = '' OR EXISTS (SELECT FROM upload u WHERE u.id = $4) OR EXISTS (SELECT FROM artifact a WHERE a.upload = $4)) RETURNING true
"""
_MARKED = "SELECT id, team, seal, lifetime FROM upload WHERE team = $1 AND tree = $2 AND sealing LIMIT 1"
_DROP = "DELETE FROM upload WHERE id = $1 AND NOT sealing"
_END = "DELETE FROM upload WHERE id = $1"
_LAPSE = "DELETE FROM upload WHERE NOT sealing AND seen_at < $1 RETURNING id"
_SUCCEED = "DELETE FROM upload WHERE NOT sealing AND tree = '' AND starts_with(id, $1) AND NOT starts_with(id, $2)"
_SEALED = "DELETE FROM upload u WHERE sealing AND EXISTS (SELECT FROM artifact a WHERE a.upload = u.id)"
_STALE = "SELECT id, team, seal, lifetime FROM upload WHERE sealing AND seen_at < $1 LIMIT 500"
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(SealArtifact)


def holder_of(upload: str) -> str:
    """The name in which an upload, and then its artifact, holds blobs."""
    return f"upload:{upload}"


class Session(msgspec.Struct, frozen=True):
    """An upload: its id, and what is to be sealed, as far as it is known (`digest` "": not yet), to be kept `lifetime` seconds (0: for ever)."""

    id: str
    team: str
    seal: SealArtifact
    lifetime: int = 0

    @property
    def holder(self) -> str:
        return holder_of(self.id)


class Sessions:
    """All calls raise LogUnavailable. Times are unix seconds, given by the caller."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(self) -> None:
        """Make the table if it is not there."""
        with unavailable():
            try:
                await self._pool.execute(_TABLES.read_text(encoding="utf-8"))
            except asyncpg.UniqueViolationError:
                # two instances starting at once: the other's table is there
                await self._pool.execute(_TABLES.read_text(encoding="utf-8"))

    async def open(self, session: Session, now: float) -> Session:
        """This session; or the one, perhaps of another tree, that is open for its artifact already: an artifact has one with a tree at a time."""
        seal = session.seal
        with unavailable():
            row = await self._pool.fetchrow(_OPEN, session.id, session.team, seal.artifact, seal.digest, _ENCODER.encode(seal), session.lifetime, now)
        assert row is not None
        return _session(row, session.team)

    async def find(self, team: str, artifact: str, now: float) -> Session | None:
        """The session of a manifest for this artifact, which is alive as of now."""
        with unavailable():
            row = await self._pool.fetchrow(_FIND, team, artifact, now)
        return None if row is None else _session(row, team)

    async def touch(self, upload: str, now: float) -> bool:
        """Say that it is alive. False: it has lapsed."""
        with unavailable():
            return bool(await self._pool.fetchval(_TOUCH, upload, now))

    async def mark(self, upload: str, seal: SealArtifact, now: float, shared: str = "") -> bool:
        """All that `seal` needs is held: from now on the upload does not lapse. False: it has lapsed, and may never be sealed. What it holds may
        have been `shared` by another upload: only if nobody may have released that by now, it had all of it then."""
        with unavailable():
            return bool(await self._pool.fetchval(_MARK, upload, _ENCODER.encode(seal), now, shared))

    async def marked(self, team: str, tree: str) -> Session | None:
        """One that came with the manifest of this tree, and is marked: all of the tree is held."""
        with unavailable():
            row = await self._pool.fetchrow(_MARKED, team, tree)
        return None if row is None else _session(row, team)

    async def drop(self, upload: str) -> None:
        """Nothing will come of it, unless another stream has marked it: then that one goes on."""
        with unavailable():
            await self._pool.execute(_DROP, upload)

    async def end(self, upload: str) -> None:
        """It is known what became of the command to seal it, and who else may have sent one will hear the same."""
        with unavailable():
            await self._pool.execute(_END, upload)

    async def lapse(self, before: float) -> int:
        """Drop those that were last seen before then and are not marked; how many."""
        with unavailable():
            return len(await self._pool.fetch(_LAPSE, before))

    async def succeed(self, instance: str, life: str) -> None:
        """Drop what nobody but an instance whose ids begin so could have gone on with: it is dead. Ids of its successor begin with `life`: requests
        do not wait for this."""
        with unavailable():
            await self._pool.execute(_SUCCEED, instance, life)

    async def forget_sealed(self) -> None:
        """Drop those whose artifacts are projected."""
        with unavailable():
            await self._pool.execute(_SEALED)

    async def stale(self, before: float) -> list[Session]:
        """Those that were marked before then, and whose artifacts are not projected."""
        with unavailable():
            rows = await self._pool.fetch(_STALE, before)
        return [_session(row, row["team"]) for row in rows]


def _session(row: asyncpg.Record, team: str) -> Session:
    return Session(row["id"], team, _DECODER.decode(row["seal"]), row["lifetime"])
