"""What has had its time goes: artifacts that are due, uploads that lapsed, what nobody holds (sessions.py says why that is safe)."""

import asyncio
from collections.abc import Callable

import asyncpg
import structlog

from libs.archives.tree import ZERO_CHUNK
from libs.blobstore.store import BlobDamaged, BlobMissing, BlobStore, StoreUnavailable
from libs.eventlog.log import EventLog, LogUnavailable
from libs.eventlog.postgres import Pool, unavailable
from libs.runtime.commands import CommandLoop, Outcome
from libs.runtime.decisions import Cause
from proto.catalogue import category_of, decode
from proto.envelope import UnreadableEvent
from proto.events.artifact import LogArchived
from services.artifacts.commands import Command, ExpireArtifact
from services.artifacts.decider import State, log_stream
from services.artifacts.logs import Logs
from services.artifacts.projection import ARTIFACTS
from services.artifacts.queries import Passing
from services.artifacts.sessions import LAPSE, Session, Sessions, holder_of
from services.artifacts.trees import Trees
from services.artifacts.uploads import Uploads

logger = structlog.get_logger()

ACTOR = "artifacts"
_AT_ONCE = 500
SKEW = 60.0
"""Seconds by which our clock and the database's may differ. When it is more, one of them is wrong, and nobody's time is up."""
_DUE = """
SELECT id, team FROM artifact a WHERE due_at > 0 AND due_at <= $1
AND NOT EXISTS (SELECT FROM build_use u WHERE u.uploads ? a.upload) ORDER BY due_at LIMIT $2
"""
_NEXT = "SELECT min(due_at) FROM artifact WHERE due_at > $1"
_GENERATION = "SELECT generation FROM checkpoint WHERE name = $1"
_FREE = """
WITH held AS MATERIALIZED (SELECT DISTINCT team, holder, substr(holder, 8) AS upload FROM hold WHERE holder LIKE 'upload:%')
SELECT team, array_agg(holder) FROM held
WHERE NOT EXISTS (SELECT FROM upload u WHERE u.id = held.upload)
AND NOT EXISTS (SELECT FROM artifact a WHERE a.upload = held.upload)
AND NOT EXISTS (SELECT FROM build_use u WHERE u.uploads ? held.upload)
AND EXISTS (SELECT FROM checkpoint WHERE name = $1 AND generation = $2 AND position >= $3)
GROUP BY team
"""
_ADOPTED = "SELECT EXISTS (SELECT FROM hold WHERE holder NOT LIKE 'upload:%' AND holder NOT LIKE 'log:%')"
_CLOCK = "SELECT extract(epoch FROM clock_timestamp())::double precision"
_UNHELD = """
SELECT id, team, digest, upload FROM artifact a WHERE NOT EXISTS (SELECT FROM hold h WHERE h.team = a.team AND h.holder = 'upload:' || a.upload)
"""


class Janitor:
    """One of them for each instance; several do no harm. `now` is unix seconds."""

    def __init__(
        self,
        log: EventLog,
        pool: Pool,
        read_models: Passing,
        store: BlobStore,
        sessions: Sessions,
        uploads: Uploads,
        trees: Trees,
        logs: Logs,
        commands: CommandLoop[Command, State],
        now: Callable[[], float],
        interval: float = 60.0,
        instance: str = "",
        life: str = "",
        skew: float = SKEW,
    ) -> None:
        """It looks each `interval` seconds, and when something is due before; an upload that is to be sealed and is not seen as an
        artifact (its maker is at it or has died, or it was deleted at once) is its to seal, too. `instance`: how the ids of this instance's uploads,
        and of no other's, begin ("": as any), `life`: how those begin that it has made since its start."""
        self._log = log
        self._pool = pool
        self._read_models = read_models
        self._store = store
        self._sessions = sessions
        self._uploads = uploads
        self._trees = trees
        self._logs = logs
        self._commands = commands
        self._now = now
        self._interval = interval
        self._instance, self._life = instance, life
        self._skew = skew
        self._begun = False
        self._agenda = uploads.agenda
        self.problem: str | None = "has not begun"
        """Why no upload can be taken."""

    async def run(self) -> None:
        """Make the table of uploads; then tidy up for ever."""
        while True:
            self._agenda.begin()
            try:
                if self.problem is not None:
                    await self._sessions.create()
                    if self._instance:
                        await self._sessions.succeed(self._instance, self._life)
                    self.problem = None
                await self.round()
                pause = await self._until_next()
            except (LogUnavailable, StoreUnavailable) as error:
                logger.info("tidying up waits", why=str(error))
                pause = min(self._interval, 5.0) if self.problem is None else 0.5
            except asyncpg.UndefinedTableError:
                pause = 0.1  # the read models, or the store's tables, are still to be made
            await self._agenda.rest(pause)

    async def round(self) -> None:
        """Everything once. Raises LogUnavailable, StoreUnavailable."""
        right = await self._clock_is_right()
        if (right and await self._expire()) or not self._begun:
            await self._read_models.passed(await self._log.head(), 5.0)
        if right:
            await self._lapse()
        await self._end_uploads()
        if not await self._release():
            return
        await self._store.collect()

    async def _until_next(self) -> float:
        now = self._now()
        with unavailable():
            due = await self._pool.fetchval(_NEXT, now)
        return self._interval if due is None else max(min(self._interval, due - now), 0.1)

    async def _expire(self) -> bool:
        """Whether anything did. What an unfinished build uses stays; if one is requested just now, the log's order decides."""
        now = self._now()
        expired = False
        while True:
            with unavailable():
                due = await self._pool.fetch(_DUE, now, _AT_ONCE)
            outcomes = await asyncio.gather(*(self._expired(row["team"], row["id"], now) for row in due))
            positions = [outcome.position for outcome in outcomes if outcome is not None and outcome.events]
            expired = expired or bool(positions)
            if len(due) < _AT_ONCE or not positions or not await self._read_models.passed(max(positions), 5.0):
                return expired

    async def _expired(self, team: str, artifact: str, now: float) -> Outcome | None:
        """One whose stream cannot be read stays, and stops no other."""
        try:
            return await self._commands.execute(ExpireArtifact(artifact=artifact, now=now), _cause(team, artifact))
        except UnreadableEvent as error:
            logger.error("an artifact cannot expire", artifact=artifact, team=team, why=str(error))
            return None

    async def _clock_is_right(self) -> bool:
        """What has expired is gone for ever, so two clocks must agree on it."""
        with unavailable():
            database: float = await self._pool.fetchval(_CLOCK)
        ahead = self._now() - database
        if abs(ahead) > self._skew:
            logger.error("nothing expires: this machine's clock and the database's differ", seconds_ahead=round(ahead))
        return abs(ahead) <= self._skew

    async def _lapse(self) -> None:
        lapsed = await self._sessions.lapse(self._now() - LAPSE)
        if lapsed:
            logger.info("uploads lapsed", uploads=lapsed)

    async def _end_uploads(self) -> None:
        await self._sessions.forget_sealed()
        for session in await self._sessions.stale(self._now()):
            try:
                await self._complete(session)
            except UnreadableEvent as error:
                logger.error("an upload cannot be ended", upload=session.id, team=session.team, why=str(error))

    async def _complete(self, session: Session) -> None:
        """Whoever marked it died, or sleeps, before it heard what became of it."""
        sealed = await self._uploads.finish(session, _cause(session.team, session.seal.artifact))
        if sealed is not None and sealed.as_sealed.upload == session.id and not await self._read_models.passed(await self._log.head(), 5.0):
            return
        await self._sessions.end(session.id)

    async def _release(self) -> bool:
        """Release what neither an upload nor an artifact nor an unfinished build holds, as of a moment when the read models knew all that had
        happened when this began; and hold what was lost with the index. False: they are behind."""
        with unavailable():
            generation = await self._pool.fetchval(_GENERATION, ARTIFACTS.name)
        head = await self._log.head()
        if not await self._read_models.passed(head, 5.0):
            return False
        if not self._begun:
            await self._hold_again()
            self._begun = True
        with unavailable():
            # the rows may be made anew from the log's start at any time: another generation, or a position before the head, says so
            free = await self._pool.fetch(_FREE, ARTIFACTS.name, generation, head)
        for team, holders in free:
            for at in range(0, len(holders), _AT_ONCE):
                await self._store.release(team, holders[at : at + _AT_ONCE])
        return True

    async def _hold_again(self) -> None:
        """After the index was lost, what is in the store is held only because it was found there. Once a start."""
        with unavailable():
            lost = await self._pool.fetch(_UNHELD)
            adopted = await self._pool.fetchval(_ADOPTED)
        for row in lost:
            try:
                await self._hold_tree(row["team"], row["digest"], holder_of(row["upload"]))
            except (BlobMissing, BlobDamaged) as error:
                logger.error("an artifact is not whole", artifact=row["id"], team=row["team"], why=str(error))
        if adopted:
            await self._hold_logs()
            await self._store.disown()

    async def _hold_tree(self, team: str, digest: str, holder: str) -> None:
        tree = await self._trees.open(team, digest)
        sizes = await tree.select(lambda entries: {chunk: size for entry in entries for chunk, size in entry.chunks()})
        sizes.pop(ZERO_CHUNK, None)
        missing = await self._store.hold(team, holder, [bytes.fromhex(digest), *tree.pieces, *sizes])
        if missing:
            raise BlobMissing(f"{len(missing)} chunks")

    async def _hold_logs(self) -> None:
        after, head = 0, await self._log.head()
        while after < head:
            page = await self._log.read(after, _AT_ONCE, {category_of(log_stream("", "", 0))})
            for recorded in page:
                event = decode(recorded.type, recorded.data)
                if isinstance(event, LogArchived):
                    try:
                        await self._logs.hold(recorded.team, recorded.stream, event.digest)
                    except (BlobMissing, BlobDamaged) as error:
                        if (await self._log.read_streams([recorded.stream]))[recorded.stream][-1].position == recorded.position:
                            logger.error("an archived log is not whole", stream=recorded.stream, team=recorded.team, why=str(error))
            after = page[-1].position if page else head


def _cause(team: str, artifact: str) -> Cause:
    return Cause(team=team, correlation_id=artifact, causation_id="", actor=ACTOR)
