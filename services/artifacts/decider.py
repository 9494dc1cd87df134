"""The life of an artifact and of a log's archive: sealed once, kept for as long as is wanted, gone for ever; archived once (and again only with
more of it). Pure."""

from collections.abc import Sequence

import msgspec

from libs.runtime.decisions import Refused
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived
from proto.events.base import Event
from services.artifacts.commands import ArchiveLog, ChangeLifetime, Command, DeleteArtifact, ExpireArtifact, SealArtifact


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact: as it was sealed, what holds of its lifetime now (`expires_at` and `pinned` as in ArtifactSealed), and whether it is gone: only a
    tombstone says so, and no clock of whoever is asked."""

    as_sealed: ArtifactSealed
    expires_at: int
    pinned: bool
    gone: bool = False


State = Sealed | LogArchived | None
"""None: nothing has happened."""


def artifact_stream(artifact: str) -> str:
    return f"artifact-{artifact}"


def log_stream(build: str, stage: str, attempt: int) -> str:
    return f"artifact-log-{build}-{stage}-{attempt}"


class ArtifactDecider:
    """An immutable thing under a name: the same again is nothing, another is refused. A tombstone is for ever."""

    initial: State = None

    def stream(self, command: Command) -> str:
        match command:
            case ArchiveLog():
                return log_stream(command.build, command.stage, command.attempt)
            case _:
                return artifact_stream(command.artifact)

    def decide(self, command: Command, state: State) -> Sequence[Event]:
        match command, state:
            case SealArtifact(), None:
                return [ArtifactSealed(**msgspec.structs.asdict(command))]
            case SealArtifact(), Sealed(as_sealed=ArtifactSealed(digest=digest)) if digest == command.digest:
                return []
            case ArchiveLog(), None:
                return [_archived(command, 1)]
            case ArchiveLog(replaces=former), LogArchived(archive=newest) if former == newest and command.chunks > state.chunks:
                return [_archived(command, newest + 1)]
            case ArchiveLog(), LogArchived():
                return []
            case SealArtifact() | ArchiveLog(), _:
                raise Refused("conflict", "there is another artifact under this id")
            case ExpireArtifact(), Sealed(pinned=False, gone=False, expires_at=due) if 0 < due <= command.now:
                return [ArtifactExpired(artifact=command.artifact)]
            case DeleteArtifact(), Sealed(gone=False):
                return [ArtifactDeleted(artifact=command.artifact)]
            case ExpireArtifact() | DeleteArtifact(), _:
                return []
            case ChangeLifetime(), Sealed(gone=False):
                return _changed(command, state)
            case _:
                raise Refused("missing", "there is no such artifact any more")

    def evolve(self, state: State, event: Event) -> State:
        match event, state:
            case ArtifactSealed(), _:
                return Sealed(as_sealed=event, expires_at=event.expires_at, pinned=event.pinned)
            case ArtifactLifetimeChanged(), Sealed():
                return msgspec.structs.replace(state, expires_at=event.expires_at, pinned=event.pinned)
            case ArtifactExpired() | ArtifactDeleted(), Sealed():
                return msgspec.structs.replace(state, gone=True)
            case LogArchived(), _:
                return event
            case _:
                return state


def _changed(command: ChangeLifetime, state: Sealed) -> Sequence[Event]:
    pinned = state.pinned if command.pinned is None else command.pinned
    expires_at, wanted = state.expires_at, command.expires_at
    if wanted is not None and (command.shorten or (expires_at and (wanted == 0 or wanted > expires_at))):
        expires_at = wanted
    if (pinned, expires_at) == (state.pinned, state.expires_at):
        return []
    return [ArtifactLifetimeChanged(artifact=command.artifact, expires_at=expires_at, pinned=pinned)]


def _archived(command: ArchiveLog, archive: int) -> LogArchived:
    fields = msgspec.structs.asdict(command)
    del fields["replaces"]
    return LogArchived(**fields, archive=archive)
