"""The timers' projection, with one and two deliveries."""

from datetime import UTC, datetime, timedelta

import pytest

from proto.envelope import Fact
from proto.events.build import BuildFinished, StageFinished, StageQueued, StepFinished, StepStarted
from proto.plan import Requirements
from services.builds.projection import Gone, TimerRow, keys, project

AT = datetime(2026, 11, 22, tzinfo=UTC)


def project_all(deliveries, *events):
    rows = {}
    for position, event in enumerate(events, 1):
        fact = Fact(
            position=position,
            stream="build-b1",
            version=position,
            event_id=f"e{position}",
            team="main",
            correlation_id="c",
            causation_id="",
            actor="t",
            recorded_at=AT,
            event=event,
        )
        for _ in range(deliveries):
            named = {key for _, key in keys(fact)}

            def get(row, key, named=named):
                assert key in named
                return rows.get(key)

            for row in project(fact, get):
                if isinstance(row, Gone):
                    rows.pop(row.key, None)
                else:
                    rows[row.key] = row
    return rows


STARTED = StepStarted(stage="main", attempt=1, step="run", worker="w", timeout=60, report=1)


@pytest.mark.parametrize("deliveries", [1, 2])
def test_a_started_step_has_a_deadline(deliveries):
    [row] = project_all(deliveries, STARTED).values()
    assert isinstance(row, TimerRow)
    assert row.due_at == AT + timedelta(seconds=60) and row.payload.step == "run" and row.payload.event_id == "e1"


@pytest.mark.parametrize("deliveries", [1, 2])
@pytest.mark.parametrize(
    "end",
    [
        StepFinished(stage="main", attempt=1, step="run", status="succeeded"),
        StageFinished(stage="main", attempt=1, status="errored"),
        StageQueued(stage="main", attempt=2, requirements=Requirements()),
    ],
)
def test_what_ends_or_supersedes_a_step_removes_its_deadline(deliveries, end):
    assert project_all(deliveries, STARTED, end) == {}


@pytest.mark.parametrize("deliveries", [1, 2])
def test_the_next_step_of_a_stage_takes_the_deadline_over(deliveries):
    second = StepStarted(stage="main", attempt=1, step="second", worker="w", timeout=5, report=3)
    ended = StepFinished(stage="main", attempt=1, step="run", status="succeeded")
    [row] = project_all(deliveries, STARTED, ended, second, BuildFinished(status="failed")).values()
    assert row.payload.step == "second"
