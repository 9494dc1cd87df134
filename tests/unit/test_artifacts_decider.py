"""What may become of an artifact and of a log's archive: given, when, then."""

from typing import Any

import pytest
from msgspec.structs import replace

from libs.runtime.decisions import Refused
from proto.events.artifact import ArtifactSealed, LogArchived, LogGap
from services.artifacts.commands import ArchiveLog, SealArtifact
from services.artifacts.decider import ArtifactDecider, State

DECIDER = ArtifactDecider()
SEAL = SealArtifact(artifact="a", kind="user", digest="d1", size=3, files=1, name="src", expires_at=100)
ARCHIVE = ArchiveLog(build="b", stage="s", attempt=1, digest="d", chunks=3, lines=9, bytes=99)


def given(*events: Any) -> State:
    state = DECIDER.initial
    for event in events:
        state = DECIDER.evolve(state, event)
    return state


def test_a_tree_is_sealed_once() -> None:
    [sealed] = DECIDER.decide(SEAL, given())
    assert sealed == ArtifactSealed(artifact="a", kind="user", digest="d1", size=3, files=1, name="src", expires_at=100)
    assert DECIDER.decide(SEAL, given(sealed)) == []
    assert DECIDER.decide(replace(SEAL, expires_at=200), given(sealed)) == []


def test_another_tree_under_the_same_id_is_refused() -> None:
    [sealed] = DECIDER.decide(SEAL, given())
    with pytest.raises(Refused) as refusal:
        DECIDER.decide(replace(SEAL, digest="d2"), given(sealed))
    assert refusal.value.kind == "conflict"


def test_a_log_is_archived_again_only_with_more_of_it() -> None:
    [first] = DECIDER.decide(replace(ARCHIVE, chunks=2, gaps=[LogGap(first=2, last=2)]), given())
    assert isinstance(first, LogArchived) and first.archive == 1
    assert DECIDER.decide(replace(ARCHIVE, chunks=2, digest="other"), given(first)) == []
    [second] = DECIDER.decide(ARCHIVE, given(first))
    assert isinstance(second, LogArchived) and (second.archive, second.gaps) == (2, [])
    assert DECIDER.decide(replace(ARCHIVE, chunks=2), given(first, second)) == []


def test_streams_do_not_collide() -> None:
    assert DECIDER.stream(SEAL) == "artifact-a"
    assert DECIDER.stream(ARCHIVE) == "artifact-log-b-s-1"
