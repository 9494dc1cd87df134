"""The timers of running steps, folded from the log: one row a step that has a deadline, gone when its stage or build is over. Pure."""

from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec

from libs.eventlog.projections import Get, Gone, Projection, Table
from proto.envelope import Fact
from proto.events.build import StageFinished, StageInterrupted, StageQueued, StepFinished, StepStarted

CODE_VERSION = "1"
"""Raised when a row's meaning changes: the table is then rebuilt from the log."""


class TimerPayload(msgspec.Struct, frozen=True, kw_only=True):
    """What the alarm needs to issue the command, and its cause."""

    build: str
    stage: str
    attempt: int
    step: str
    team: str
    correlation_id: str
    event_id: str


class TimerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A step's deadline. `key` is `build/stage`: the steps of a stage run one after another."""

    key: str
    due_at: datetime
    payload: TimerPayload
    position: int


def keys(fact: Fact) -> Iterable[tuple[type[TimerRow], str]]:
    """The one row that an event concerns."""
    match fact.event:
        case StepStarted() | StepFinished() | StageFinished() | StageQueued() | StageInterrupted() as event:
            return [(TimerRow, f"{fact.subject_id}/{event.stage}")]
        case _:
            return []


def project(fact: Fact, get: Get) -> Iterable[TimerRow | Gone]:
    """A step's start sets its timer; whatever ends or supersedes the step removes it."""
    match fact.event:
        case StepStarted() as event:
            key = f"{fact.subject_id}/{event.stage}"
            row = get(TimerRow, key)
            if row is not None and row.position >= fact.position:
                return []
            payload = TimerPayload(
                build=fact.subject_id,
                stage=event.stage,
                attempt=event.attempt,
                step=event.step,
                team=fact.team,
                correlation_id=fact.correlation_id,
                event_id=fact.event_id,
            )
            due_at = fact.recorded_at + timedelta(seconds=event.timeout)
            return [TimerRow(key=key, due_at=due_at, payload=payload, position=fact.position)]
        case StepFinished() | StageFinished() | StageQueued() | StageInterrupted() as event:
            key = f"{fact.subject_id}/{event.stage}"
            return [Gone(TimerRow, key)] if get(TimerRow, key) is not None else []
        case _:
            return []


def timers(tables_sql: str) -> Projection:
    """The projection, with the SQL that makes its table."""
    return Projection(
        name="timers",
        code_version=CODE_VERSION,
        tables=[Table(TimerRow, "timers", "key")],
        tables_sql=tables_sql,
        categories=frozenset({"build"}),
        project=project,
        keys=keys,
    )
