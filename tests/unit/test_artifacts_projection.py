"""What must be kept, for how long, and which attempts are over: the same with one delivery and with two, rebuilt from nothing."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from libs.eventlog.projections import Gone
from proto.envelope import Fact
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived, LogGap
from proto.events.base import ArtifactRef, Event
from proto.events.build import BuildFinished, LogExtent, StageFinished, StageQueued
from proto.events.request import BuildRequested
from proto.events.team import TeamPolicySet
from proto.plan import Plan, Requirements
from services.artifacts.projection import ALL, ARTIFACTS, ArtifactRow, LogRow, OverRow, PolicyRow, UseRow, keys, project

SEALED = ArtifactSealed(artifact="a", kind="user", digest="d", size=1, files=1, expires_at=100, upload="u")
ROW = ArtifactRow(id="a", team="main", digest="d", size=1, files=1, upload="u", due_at=100)
PLAN = msgspec.convert({"stages": [{"name": "s", "steps": [{"step": "run", "name": "t", "config": {"run": {"path": "true"}}}]}]}, Plan)
KEY_OF = {table.row: table.key for table in ARTIFACTS.tables}


def fold(*events: tuple[str, Event] | Event, deliveries: int = 1, team: str = "main") -> dict[type, dict[str, Any]]:
    """The rows after these events; those without a stream are on `build-b`."""
    rows: dict[type, dict[str, Any]] = {row: {} for row in KEY_OF}
    for position, given in enumerate(events, 1):
        stream, event = given if isinstance(given, tuple) else ("build-b", given)
        happened = Fact(
            position=position,
            stream=stream,
            version=position,
            event_id=str(position),
            team=team,
            correlation_id="",
            causation_id="",
            actor="",
            recorded_at=datetime.now(UTC),
            event=event,
        )
        for _ in range(deliveries):
            named = set(keys(happened))

            def get(row: type, key: str, named: set = named) -> Any:
                assert (row, key) in named
                return rows[row].get(key)

            for row in project(happened, get):
                if isinstance(row, Gone):
                    rows[row.row].pop(row.key, None)
                else:
                    rows[type(row)][getattr(row, KEY_OF[type(row)])] = row
    return rows


def artifact(event: Event) -> tuple[str, Event]:
    return "artifact-a", event


def requested(*artifacts: str, keep: int = 0) -> tuple[str, Event]:
    inputs = {name: ArtifactRef(id=name, digest="d") for name in artifacts}
    return "request-r", BuildRequested(build="b", plan=PLAN, inputs=inputs, keep_seconds=keep)


@pytest.mark.parametrize("deliveries", [1, 2])
def test_attempts_are_over_when_they_finish_or_another_is_queued(deliveries: int) -> None:
    queued = [StageQueued(stage="s", attempt=n, requirements=Requirements()) for n in (1, 2)]
    events: list[Event] = [queued[0]]

    def over() -> dict[str, int]:
        return {key: row.attempt for key, row in fold(*events, deliveries=deliveries)[OverRow].items()}

    assert over() == {}
    events.append(queued[1])
    assert over() == {"b/s": 1}
    events.append(StageFinished(stage="s", attempt=2, status="succeeded"))
    assert over() == {"b/s": 2}
    events.append(BuildFinished(status="succeeded"))
    assert over() == {"b/s": 2, "b": ALL}


@pytest.mark.parametrize("tombstone", [ArtifactExpired(artifact="a"), ArtifactDeleted(artifact="a")])
def test_an_artifact_lives_from_its_sealing_to_its_tombstone(tombstone: Event) -> None:
    assert fold(artifact(SEALED))[ArtifactRow] == {"a": ROW}
    assert fold(artifact(SEALED), artifact(tombstone))[ArtifactRow] == {}


def test_what_is_pinned_or_kept_for_ever_is_never_due() -> None:
    def due(pinned: bool, expires_at: int) -> int:
        changed = ArtifactLifetimeChanged(artifact="a", expires_at=expires_at, pinned=pinned)
        return fold(artifact(SEALED), artifact(changed))[ArtifactRow]["a"].due_at

    assert [due(True, 100), due(False, 0), due(False, 200)] == [0, 0, 200]


def test_an_unfinished_build_uses_the_inputs_that_lived_when_it_was_requested() -> None:
    assert fold(artifact(SEALED), requested("a", "x"))[UseRow] == {"b": UseRow(build="b", uploads=["u"])}
    kept = fold(artifact(SEALED), requested("a"), artifact(ArtifactExpired(artifact="a")))
    assert (kept[ArtifactRow], kept[UseRow]["b"].uploads) == ({}, ["u"])
    assert fold(artifact(SEALED), requested("a"), BuildFinished(status="failed"))[UseRow] == {}
    assert fold(artifact(SEALED), artifact(ArtifactExpired(artifact="a")), requested("a"))[UseRow] == {"b": UseRow(build="b")}


def test_an_unfinished_build_uses_what_it_has_made() -> None:
    output = msgspec.structs.replace(SEALED, artifact="o", kind="output", build="b", upload="v")
    assert fold(("artifact-o", output))[UseRow] == {"b": UseRow(build="b", uploads=["v"])}
    assert fold(artifact(SEALED), requested("a", keep=-1), ("artifact-o", output))[UseRow]["b"] == UseRow(
        build="b", uploads=["u", "v"], keep_seconds=-1
    )
    assert fold(BuildFinished(status="aborted"), ("artifact-o", output))[UseRow] == {}


def test_the_last_policy_holds() -> None:
    set_to = [TeamPolicySet(input_seconds=n, output_seconds=2, quota_bytes=3) for n in (1, 9)]
    assert fold(*(("team-main", event) for event in set_to))[PolicyRow] == {
        "main": PolicyRow(team="main", input_seconds=9, output_seconds=2, quota_bytes=3)
    }


def logged(chunks: int, *archives: LogArchived) -> dict[str, LogRow]:
    ended = StageFinished(stage="s", attempt=1, status="succeeded", worker="w1", log=LogExtent(chunks=chunks, lines=5, bytes=9))
    return fold(ended, *(("artifact-log-b-s-1", each) for each in archives), deliveries=2)[LogRow]


def an_archive(number: int, chunks: int, *gaps: LogGap) -> LogArchived:
    return LogArchived(build="b", stage="s", attempt=1, archive=number, digest="d", chunks=chunks, lines=5, bytes=9, gaps=list(gaps))


def test_a_log_is_to_be_archived_until_its_archive_holds_all_chunks() -> None:
    [row] = logged(3).values()
    assert (row.stream, row.team, row.worker, row.chunks, row.lines, row.bytes, row.archive) == ("artifact-log-b-s-1", "main", "w1", 3, 5, 9, 0)
    assert [row.archive for row in logged(3, an_archive(1, 2, LogGap(first=2, last=2))).values()] == [1]
    assert logged(3, an_archive(1, 2, LogGap(first=2, last=2)), an_archive(2, 3)) == {}


def test_of_a_lost_workers_log_nobody_knows_whether_it_is_whole() -> None:
    assert [row.archive for row in logged(-1, an_archive(1, 3)).values()] == [1]


def test_an_attempt_without_a_log_has_none_to_be_archived() -> None:
    assert logged(0) == {} == fold(StageFinished(stage="s", attempt=1, status="succeeded"))[LogRow]
