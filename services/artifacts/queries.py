"""What the artifacts service asks before it answers: its streams, which are the truth and short, and its read model."""

from libs.eventlog.log import EventLog
from libs.eventlog.postgres import Pool, unavailable
from proto.envelope import fact
from proto.events.artifact import ArtifactSealed, LogArchived
from services.artifacts.decider import artifact_stream, log_stream
from services.artifacts.projection import attempt_keys

_OVER = "SELECT EXISTS (SELECT FROM over WHERE key = ANY ($1::text[]) AND attempt >= $2)"


class Queries:
    """All of them raise LogUnavailable."""

    def __init__(self, log: EventLog, pool: Pool) -> None:
        self._log = log
        self._pool = pool

    async def artifact(self, team: str, artifact: str, now: float) -> ArtifactSealed | None:
        """None when the team has no such artifact, or it has expired."""
        sealed = await self._last(artifact_stream(artifact), team)
        if not isinstance(sealed, ArtifactSealed) or 0 < sealed.expires_at <= now:
            return None
        return sealed

    async def log_archive(self, team: str, build: str, stage: str, attempt: int) -> LogArchived | None:
        """The newest archive of an attempt's log."""
        archived = await self._last(log_stream(build, stage, attempt), team)
        return archived if isinstance(archived, LogArchived) else None

    async def is_over(self, build: str, stage: str, attempt: int) -> bool:
        """Whether the attempt has ended, as far as this service has read."""
        with unavailable():
            return bool(await self._pool.fetchval(_OVER, list(attempt_keys(build, stage)), attempt))

    async def _last(self, stream: str, team: str) -> object:
        history = (await self._log.read_streams([stream]))[stream]
        return fact(history[-1]).event if history and history[-1].team == team else None
