"""What must be kept and for how long, folded from the log: artifacts that live, what unfinished builds may read, the policies of teams; which
attempts are over, because their build tokens are dead; and whose logs are not archived whole. Pure.

The rows at one position are what the log says up to there, so they decide by its order: a build that was requested before a tombstone has noted
what it uses by then, and one that was requested after it finds nothing to note.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from libs.eventlog.projections import Get, Gone, Projection, Table
from proto.envelope import Fact
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived
from proto.events.build import BuildFinished, StageFinished, StageQueued
from proto.events.request import BuildRequested
from proto.events.team import TeamPolicySet
from services.artifacts.decider import log_stream
from services.artifacts.reactions import ended_log

CODE_VERSION = "2"
"""Raised when a row's meaning changes: the tables are then rebuilt from the log."""

ALL = 1 << 31
"""For a build that has finished: more attempts than a stage can have."""


class OverRow(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts up to `attempt` of `key` (`build/stage`, or a whole `build`) are over."""

    key: str
    attempt: int


class ArtifactRow(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact without a tombstone. `due_at`: when it is to expire (unix seconds; 0: not at all, or it is pinned).
    What it needs of the store is held by the session `upload`."""

    id: str
    team: str
    digest: str
    size: int
    files: int
    upload: str
    due_at: int


class UseRow(msgspec.Struct, frozen=True, kw_only=True):
    """An unfinished build, which may read, or has made, the artifacts that came with these `uploads`. Its outputs are kept `keep_seconds`
    (0: as the policy says; -1: for ever)."""

    build: str
    uploads: list[str] = []
    keep_seconds: int = 0


class LogRow(msgspec.Struct, frozen=True, kw_only=True):
    """The log of an attempt that has ended (EndedLog says what is known of it), of which there is no `archive` yet (0), or one that may lack
    chunks: so it was at `since` (unix seconds)."""

    stream: str
    team: str
    build: str
    stage: str
    attempt: int
    worker: str
    chunks: int
    lines: int
    bytes: int
    correlation_id: str
    event_id: str
    archive: int = 0
    since: int


class PolicyRow(msgspec.Struct, frozen=True, kw_only=True):
    """TeamPolicySet, the last of a team."""

    team: str
    input_seconds: int
    output_seconds: int
    quota_bytes: int


def attempt_keys(build: str, stage: str) -> tuple[str, str]:
    """The rows that say whether an attempt of the stage is over."""
    return f"{build}/{stage}", build


def keys(fact: Fact) -> Iterable[tuple[type[Any], str]]:
    """The rows that an event concerns."""
    match fact.event:
        case StageFinished(stage=stage) | StageQueued(stage=stage):
            return [(OverRow, f"{fact.subject_id}/{stage}")]
        case LogArchived():
            return [(LogRow, fact.stream)]
        case BuildFinished():
            return [(OverRow, fact.subject_id), (UseRow, fact.subject_id)]
        case BuildRequested() as event:
            return [(ArtifactRow, ref.id) for ref in event.inputs.values()]
        case ArtifactSealed() as event:
            return [(ArtifactRow, event.artifact), (UseRow, event.build), (OverRow, event.build)]
        case ArtifactLifetimeChanged() | ArtifactExpired() | ArtifactDeleted() as event:
            return [(ArtifactRow, event.artifact)]
        case _:
            return []


def project(fact: Fact, get: Get) -> Iterable[msgspec.Struct]:
    """The rows that are different after an event."""
    match fact.event:
        case StageFinished(stage=stage, attempt=attempt):
            return [*_over(f"{fact.subject_id}/{stage}", attempt, get), *_log(fact)]
        case LogArchived() as event:
            return _archived(fact, event, get)
        case StageQueued(stage=stage, attempt=attempt) if attempt > 1:
            return _over(f"{fact.subject_id}/{stage}", attempt - 1, get)
        case BuildFinished():
            ended = [Gone(UseRow, fact.subject_id)] if get(UseRow, fact.subject_id) is not None else []
            return [*_over(fact.subject_id, ALL, get), *ended]
        case BuildRequested() as event:
            return _requested(fact.team, event, get)
        case ArtifactSealed() as event:
            return _sealed(fact.team, event, get)
        case ArtifactLifetimeChanged() as event:
            row = get(ArtifactRow, event.artifact)
            return [replace(row, due_at=0 if event.pinned else event.expires_at)] if row is not None else []
        case ArtifactExpired() | ArtifactDeleted() as event:
            return [Gone(ArtifactRow, event.artifact)]
        case TeamPolicySet() as event:
            policy = PolicyRow(team=fact.team, input_seconds=event.input_seconds, output_seconds=event.output_seconds, quota_bytes=event.quota_bytes)
            return [policy]
        case _:
            return []


def _over(key: str, attempt: int, get: Get) -> Iterable[OverRow]:
    known = get(OverRow, key)
    return [OverRow(key=key, attempt=attempt)] if known is None or known.attempt < attempt else []


def _log(fact: Fact) -> Iterable[LogRow]:
    log = ended_log(fact)
    if log is None:
        return []
    return [LogRow(stream=log_stream(log.build, log.stage, log.attempt), since=_recorded(fact), **msgspec.structs.asdict(log))]


def _archived(fact: Fact, event: LogArchived, get: Get) -> Iterable[Any]:
    row = get(LogRow, fact.stream)
    if row is None:
        return []
    if row.chunks == event.chunks:
        return [Gone(LogRow, fact.stream)]
    return [replace(row, archive=event.archive, since=_recorded(fact))]


def _recorded(fact: Fact) -> int:
    return int(fact.recorded_at.timestamp())


def _requested(team: str, event: BuildRequested, get: Get) -> Iterable[UseRow]:
    rows = [get(ArtifactRow, ref.id) for ref in event.inputs.values()]
    uploads = sorted({row.upload for row in rows if row is not None and row.team == team})
    return [UseRow(build=event.build, uploads=uploads, keep_seconds=event.keep_seconds)]


def _sealed(team: str, event: ArtifactSealed, get: Get) -> Iterable[msgspec.Struct]:
    due_at = 0 if event.pinned else event.expires_at
    row = ArtifactRow(id=event.artifact, team=team, digest=event.digest, size=event.size, files=event.files, upload=event.upload, due_at=due_at)
    changed: list[msgspec.Struct] = [row]
    if event.build and get(OverRow, event.build) is None:
        use = get(UseRow, event.build) or UseRow(build=event.build)
        changed.append(replace(use, uploads=[*use.uploads, event.upload]))
    return changed


ARTIFACTS = Projection(
    name="artifacts",
    code_version=CODE_VERSION,
    tables=[
        Table(OverRow, "over", "key"),
        Table(ArtifactRow, "artifact", "id"),
        Table(UseRow, "build_use", "build"),
        Table(PolicyRow, "policy", "team"),
        Table(LogRow, "unarchived", "stream"),
    ],
    tables_sql=(Path(__file__).parent / "tables.sql").read_text(encoding="utf-8"),
    categories=frozenset({"artifact", "build", "request", "team"}),
    project=project,
    keys=keys,
)
