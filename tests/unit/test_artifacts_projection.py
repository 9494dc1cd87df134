"""Which attempts are over: the same with one delivery and with two, and rebuilt from nothing."""

from datetime import UTC, datetime

import pytest

from proto.envelope import Fact
from proto.events.base import Event
from proto.events.build import BuildFinished, StageFinished, StageQueued
from proto.plan import Requirements
from services.artifacts.projection import ALL, OverRow, keys, project


def fold(events: list[Event], deliveries: int) -> dict[str, int]:
    rows: dict[str, OverRow] = {}
    for position, event in enumerate(events, 1):
        happened = Fact(
            position=position,
            stream="build-b",
            version=position,
            event_id=str(position),
            team="main",
            correlation_id="",
            causation_id="",
            actor="",
            recorded_at=datetime.now(UTC),
            event=event,
        )
        for _ in range(deliveries):
            named = {key for _, key in keys(happened)}
            for row in project(happened, lambda _, key: rows.get(key)):
                assert row.key in named
                rows[row.key] = row
    return {key: row.attempt for key, row in rows.items()}


@pytest.mark.parametrize("deliveries", [1, 2])
def test_attempts_are_over_when_they_finish_or_another_is_queued(deliveries: int) -> None:
    queued = [StageQueued(stage="s", attempt=n, requirements=Requirements()) for n in (1, 2)]
    events: list[Event] = [queued[0]]
    assert fold(events, deliveries) == {}
    events.append(queued[1])
    assert fold(events, deliveries) == {"b/s": 1}
    events.append(StageFinished(stage="s", attempt=2, status="succeeded"))
    assert fold(events, deliveries) == {"b/s": 2}
    events.append(BuildFinished(status="succeeded"))
    assert fold(events, deliveries) == {"b/s": 2, "b": ALL}
