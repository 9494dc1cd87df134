"""What the artifacts service asks before it answers: its streams, which are the truth and short, and its read models."""

from typing import Protocol

import msgspec

from libs.eventlog.log import EventLog, LogUnavailable
from libs.eventlog.postgres import Pool, unavailable
from proto.envelope import facts
from proto.events.artifact import LogArchived
from proto.events.team import DEFAULT_POLICY
from services.artifacts.decider import ArtifactDecider, Sealed, State, artifact_stream, log_stream
from services.artifacts.projection import ArtifactRow, LogRow, PolicyRow, attempt_keys

_OVER = "SELECT EXISTS (SELECT FROM over WHERE key = ANY ($1::text[]) AND attempt >= $2)"
_POLICY = "SELECT input_seconds, output_seconds, quota_bytes FROM policy WHERE team = $1"
_KEEP = "SELECT keep_seconds FROM build_use WHERE build = $1"
_WITH_TREE = (
    "SELECT id, team, digest, size, files, upload, due_at FROM artifact WHERE team = $1 AND digest = $2 ORDER BY due_at = 0 DESC, due_at DESC LIMIT 1"
)

_DAMAGED = """
SELECT EXISTS (
    SELECT FROM blob b JOIN hold h ON h.pack = b.pack WHERE b.damaged AND h.team = $1 AND h.holder = $2 AND get_bit(h.used, b.ordinal) = 1
)
"""
_UNARCHIVED = """
SELECT * FROM (SELECT *, extract(epoch FROM clock_timestamp())::bigint - since AS age FROM unarchived) u
WHERE archive > 0 OR age > $1 ORDER BY since DESC LIMIT $2
"""
_USAGE = "SELECT count(*), coalesce(sum(size), 0)::bigint FROM artifact WHERE team = $1"


class Passing(Protocol):
    """What keeps the read models: a Projector."""

    async def passed(self, position: int, timeout: float = 1.0) -> bool: ...


class Queries:
    """All of them raise LogUnavailable, those about one stream UnreadableEvent."""

    def __init__(self, log: EventLog, pool: Pool, read_models: Passing) -> None:
        self._log = log
        self._pool = pool
        self._read_models = read_models
        self._decider = ArtifactDecider()

    async def artifact(self, team: str, artifact: str) -> Sealed | None:
        """None when the team never had such an artifact."""
        state = await self._state(artifact_stream(artifact), team)
        return state if isinstance(state, Sealed) else None

    async def log_archive(self, team: str, build: str, stage: str, attempt: int) -> LogArchived | None:
        """The newest archive of an attempt's log."""
        state = await self._state(log_stream(build, stage, attempt), team)
        return state if isinstance(state, LogArchived) else None

    async def unarchived(self, late: float, most: int) -> list[tuple[int, LogRow]]:
        """Logs without an archive for more than `late` seconds, and those with one that may not be the last; each with the seconds for which it has
        been so. The latest come first, and no more than `most`."""
        with unavailable():
            rows = await self._pool.fetch(_UNARCHIVED, late, most)
        return [(row["age"], msgspec.convert(row, LogRow)) for row in map(dict, rows)]

    async def is_over(self, build: str, stage: str, attempt: int) -> bool:
        """Whether the attempt has ended, as far as this service has read."""
        with unavailable():
            return bool(await self._pool.fetchval(_OVER, list(attempt_keys(build, stage)), attempt))

    async def policy(self, team: str) -> PolicyRow:
        with unavailable():
            row = await self._pool.fetchrow(_POLICY, team)
        if row is None:
            default = DEFAULT_POLICY
            return PolicyRow(team=team, input_seconds=default.input_seconds, output_seconds=default.output_seconds, quota_bytes=default.quota_bytes)
        return PolicyRow(team=team, **dict(row))

    async def output_lifetime(self, team: str, build: str) -> int:
        """Seconds for which a build's outputs are kept; 0: for ever. A build that the read models do not know yet is waited for: what was said
        when it was requested must not be missed."""
        keep = await self._keep(build)
        if keep is None and await self._read_models.passed(await self._log.head(), 5.0):
            keep = await self._keep(build) or 0
        if keep is None:
            raise LogUnavailable("the read models are behind")
        return max(keep, 0) if keep else (await self.policy(team)).output_seconds

    async def with_tree(self, team: str, digest: str) -> ArtifactRow | None:
        """An artifact of the team with this tree; of several the one that stays longest."""
        with unavailable():
            row = await self._pool.fetchrow(_WITH_TREE, team, digest)
        return None if row is None else ArtifactRow(**dict(row))

    async def is_damaged(self, team: str, holder: str) -> bool:
        """Whether anything that is held in this name is known to be damaged."""
        with unavailable():
            return bool(await self._pool.fetchval(_DAMAGED, team, holder))

    async def artifacts(self, team: str) -> tuple[int, int]:
        """How many there are, and their bytes."""
        with unavailable():
            row = await self._pool.fetchrow(_USAGE, team)
        assert row is not None
        return row[0], row[1]

    async def _keep(self, build: str) -> int | None:
        with unavailable():
            keep: int | None = await self._pool.fetchval(_KEEP, build)
        return keep

    async def _state(self, stream: str, team: str) -> State:
        history = (await self._log.read_streams([stream]))[stream]
        if not history or history[0].team != team:
            return None
        state = self._decider.initial
        for fact in facts(history):
            state = self._decider.evolve(state, fact.event)
        return state
