"""Which attempts are over, folded from the log: their build tokens are dead. Pure."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from libs.eventlog.projections import Get, Projection, Table
from proto.envelope import Fact
from proto.events.build import BuildFinished, StageFinished, StageQueued

CODE_VERSION = "1"
"""Raised when a row's meaning changes: the table is then rebuilt from the log."""

ALL = 1 << 31
"""For a build that has finished: more attempts than a stage can have."""


class OverRow(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts up to `attempt` of `key` (`build/stage`, or a whole `build`) are over."""

    key: str
    attempt: int


def attempt_keys(build: str, stage: str) -> tuple[str, str]:
    """The rows that say whether an attempt of the stage is over."""
    return f"{build}/{stage}", build


def _over(fact: Fact) -> OverRow | None:
    match fact.event:
        case StageFinished(stage=stage, attempt=attempt):
            return OverRow(key=f"{fact.subject_id}/{stage}", attempt=attempt)
        case StageQueued(stage=stage, attempt=attempt) if attempt > 1:
            return OverRow(key=f"{fact.subject_id}/{stage}", attempt=attempt - 1)
        case BuildFinished():
            return OverRow(key=fact.subject_id, attempt=ALL)
        case _:
            return None


def keys(fact: Fact) -> Iterable[tuple[type[OverRow], str]]:
    """The one row that an event concerns."""
    over = _over(fact)
    return [(OverRow, over.key)] if over is not None else []


def project(fact: Fact, get: Get) -> Iterable[OverRow]:
    over = _over(fact)
    if over is None:
        return []
    known = get(OverRow, over.key)
    return [over] if known is None or known.attempt < over.attempt else []


OVER = Projection(
    name="over",
    code_version=CODE_VERSION,
    tables=[Table(OverRow, "over", "key")],
    tables_sql=(Path(__file__).parent / "tables.sql").read_text(encoding="utf-8"),
    categories=frozenset({"build"}),
    project=project,
    keys=keys,
)
