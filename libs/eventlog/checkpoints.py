"""How far the relay has published, in terms of both sides: the log's position and the JetStream sequence that it became."""

from msgspec import Struct

from libs.eventlog.postgres import Pool, unavailable

_LOAD = "SELECT stream_created, sequence, position, term, left_out FROM relay_checkpoint WHERE name = $1"
_SAVE = """
INSERT INTO relay_checkpoint AS c (name, stream_created, sequence, position, term, left_out) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (name) DO UPDATE SET
    stream_created = excluded.stream_created, sequence = excluded.sequence, position = excluded.position, term = excluded.term,
    left_out = excluded.left_out
WHERE c.term <= excluded.term
RETURNING true
"""


class RelayCheckpoint(Struct, frozen=True):
    """Everything up to `position` was acknowledged in order by the JetStream stream made at `stream_created`, the last of it as `sequence`; but for
    the positions in `left_out`, each with the sequence as which it was taken late, or 0 if it was not yet."""

    stream_created: str
    sequence: int
    position: int
    term: int
    left_out: tuple[tuple[int, int], ...] = ()


class RelayCheckpoints:
    """Rows of the service's own schema; both calls may raise LogUnavailable."""

    def __init__(self, pool: Pool, name: str = "relay") -> None:
        self._pool = pool
        self._name = name

    async def load(self) -> RelayCheckpoint | None:
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                row = await connection.fetchrow(_LOAD, self._name, timeout=2.4)
        if row is None:
            return None
        created, sequence, position, term, left_out = row
        return RelayCheckpoint(created, sequence, position, term, tuple((at, late) for at, late in left_out))

    async def save(self, checkpoint: RelayCheckpoint) -> bool:
        """False: a leader of a later term has saved, and this one's word no longer counts. A rewind is saved like an advance."""
        with unavailable():
            async with self._pool.acquire(timeout=1.2) as connection:
                saved = await connection.fetchval(
                    _SAVE,
                    self._name,
                    checkpoint.stream_created,
                    checkpoint.sequence,
                    checkpoint.position,
                    checkpoint.term,
                    [list(pair) for pair in checkpoint.left_out],
                    timeout=2.4,
                )
        return bool(saved)
