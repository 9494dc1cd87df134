"""What may become of an artifact and of a log's archive: given, when, then."""

from typing import Any

import pytest
from msgspec.structs import replace

from libs.runtime.decisions import Refused
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived, LogGap
from services.artifacts.commands import ArchiveLog, ChangeLifetime, DeleteArtifact, ExpireArtifact, SealArtifact
from services.artifacts.decider import ArtifactDecider, Sealed, State

DECIDER = ArtifactDecider()
SEAL = SealArtifact(artifact="a", kind="user", digest="d1", size=3, files=1, name="src", expires_at=100, upload="u")
SEALED = ArtifactSealed(artifact="a", kind="user", digest="d1", size=3, files=1, name="src", expires_at=100, upload="u")
GONE = [ArtifactExpired(artifact="a"), ArtifactDeleted(artifact="a")]
CHANGE = ChangeLifetime(artifact="a")
ARCHIVE = ArchiveLog(build="b", stage="s", attempt=1, digest="d", chunks=3, lines=9, bytes=99)


def given(*events: Any) -> State:
    state = DECIDER.initial
    for event in events:
        state = DECIDER.evolve(state, event)
    return state


def changed(expires_at: int, pinned: bool = False) -> ArtifactLifetimeChanged:
    return ArtifactLifetimeChanged(artifact="a", expires_at=expires_at, pinned=pinned)


def test_a_tree_is_sealed_once() -> None:
    assert DECIDER.decide(SEAL, given()) == [SEALED]
    assert DECIDER.decide(SEAL, given(SEALED)) == []
    assert DECIDER.decide(replace(SEAL, expires_at=200, upload="v"), given(SEALED)) == []


def test_another_tree_under_the_same_id_is_refused() -> None:
    with pytest.raises(Refused) as refusal:
        DECIDER.decide(replace(SEAL, digest="d2"), given(SEALED))
    assert refusal.value.kind == "conflict"


@pytest.mark.parametrize("tombstone", GONE)
def test_what_is_gone_does_not_come_back(tombstone: Any) -> None:
    state = given(SEALED, tombstone)
    assert isinstance(state, Sealed) and state.gone
    assert DECIDER.decide(SEAL, state) == []
    assert DECIDER.decide(DeleteArtifact(artifact="a"), state) == []
    assert DECIDER.decide(ExpireArtifact(artifact="a", now=1000), state) == []
    with pytest.raises(Refused) as refusal:
        DECIDER.decide(replace(CHANGE, pinned=True), state)
    assert refusal.value.kind == "missing"


def test_only_what_is_due_expires() -> None:
    def expires(now: float, *events: Any) -> bool:
        return DECIDER.decide(ExpireArtifact(artifact="a", now=now), given(*events)) == GONE[:1]

    assert expires(100, SEALED)
    assert not expires(99, SEALED)
    assert not expires(100)
    assert not expires(100, replace(SEALED, expires_at=0))
    assert not expires(100, SEALED, changed(200))
    assert not expires(100, SEALED, changed(100, pinned=True))
    assert expires(200, SEALED, changed(200))


def test_a_lifetime_is_lengthened_and_shortened_only_when_told_so() -> None:
    def after(**change: Any) -> list[Any]:
        return list(DECIDER.decide(replace(CHANGE, **change), given(SEALED)))

    assert after(expires_at=200) == [changed(200)]
    assert after(expires_at=0) == [changed(0)]
    assert after(expires_at=50) == []
    assert after(expires_at=50, shorten=True) == [changed(50)]
    assert after(pinned=True) == [changed(100, pinned=True)]
    assert after(pinned=False) == after() == []
    forever = given(SEALED, changed(0))
    assert DECIDER.decide(replace(CHANGE, expires_at=200), forever) == []
    assert DECIDER.decide(replace(CHANGE, expires_at=200, shorten=True), forever) == [changed(200)]


def test_anything_can_be_deleted_once() -> None:
    assert DECIDER.decide(DeleteArtifact(artifact="a"), given(SEALED, changed(0, pinned=True))) == GONE[1:]
    assert DECIDER.decide(DeleteArtifact(artifact="a"), given()) == []


def test_what_never_was_has_no_lifetime() -> None:
    with pytest.raises(Refused) as refusal:
        DECIDER.decide(replace(CHANGE, pinned=True), given())
    assert refusal.value.kind == "missing"


def test_a_log_is_archived_again_only_with_more_of_it() -> None:
    [first] = DECIDER.decide(replace(ARCHIVE, chunks=2, gaps=[LogGap(first=2, last=2)]), given())
    assert isinstance(first, LogArchived) and first.archive == 1
    assert DECIDER.decide(replace(ARCHIVE, chunks=2, digest="other"), given(first)) == []
    assert DECIDER.decide(ARCHIVE, given(first)) == [], "it was made of the chunks alone, and not of the first archive"
    [second] = DECIDER.decide(replace(ARCHIVE, replaces=1), given(first))
    assert isinstance(second, LogArchived) and (second.archive, second.gaps) == (2, [])
    assert DECIDER.decide(replace(ARCHIVE, chunks=2), given(first, second)) == []


def test_streams_do_not_collide() -> None:
    assert {DECIDER.stream(command) for command in (SEAL, CHANGE, DeleteArtifact(artifact="a"))} == {"artifact-a"}
    assert DECIDER.stream(ARCHIVE) == "artifact-log-b-s-1"
