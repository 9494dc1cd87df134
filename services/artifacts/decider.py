"""The life of an artifact and of a log's archive: sealed once, archived once (and again only with more of it). Pure."""

from collections.abc import Sequence

from libs.runtime.decisions import Refused
from proto.events.artifact import ArtifactSealed, LogArchived
from proto.events.base import Event
from services.artifacts.commands import ArchiveLog, Command, SealArtifact

State = ArtifactSealed | LogArchived | None
"""The last fact of the stream is all that matters; None: nothing has happened."""


def artifact_stream(artifact: str) -> str:
    return f"artifact-{artifact}"


def log_stream(build: str, stage: str, attempt: int) -> str:
    return f"artifact-log-{build}-{stage}-{attempt}"


class ArtifactDecider:
    """An immutable thing under a name: the same again is nothing, another is refused."""

    initial: State = None

    def stream(self, command: Command) -> str:
        match command:
            case SealArtifact():
                return artifact_stream(command.artifact)
            case ArchiveLog():
                return log_stream(command.build, command.stage, command.attempt)

    def decide(self, command: Command, state: State) -> Sequence[Event]:
        match command, state:
            case SealArtifact(), None:
                return [_sealed(command)]
            case SealArtifact(), ArtifactSealed(digest=digest) if digest == command.digest:
                return []
            case ArchiveLog(), None:
                return [_archived(command, 1)]
            case ArchiveLog(), LogArchived() if command.chunks > state.chunks:
                return [_archived(command, state.archive + 1)]
            case ArchiveLog(), LogArchived():
                return []
            case _:
                raise Refused("conflict", "there is another artifact under this id")

    def evolve(self, state: State, event: Event) -> State:
        match event:
            case ArtifactSealed() | LogArchived():
                return event
            case _:
                return state


def _sealed(command: SealArtifact) -> ArtifactSealed:
    return ArtifactSealed(
        artifact=command.artifact,
        kind=command.kind,
        digest=command.digest,
        size=command.size,
        files=command.files,
        name=command.name,
        build=command.build,
        stage=command.stage,
        attempt=command.attempt,
        step=command.step,
        expires_at=command.expires_at,
    )


def _archived(command: ArchiveLog, archive: int) -> LogArchived:
    return LogArchived(
        build=command.build,
        stage=command.stage,
        attempt=command.attempt,
        archive=archive,
        digest=command.digest,
        chunks=command.chunks,
        lines=command.lines,
        bytes=command.bytes,
        gaps=command.gaps,
    )
