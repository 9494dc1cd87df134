"""What may be asked of artifacts."""

from typing import Literal

import msgspec

from proto.events.artifact import LogGap


class SealArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """All bytes of the tree are stored: it exists from now on. The fields are ArtifactSealed's."""

    artifact: str
    kind: Literal["user", "output"]
    digest: str
    size: int
    files: int
    name: str = ""
    build: str = ""
    stage: str = ""
    attempt: int = 0
    step: str = ""
    expires_at: int = 0


class ArchiveLog(msgspec.Struct, frozen=True, kw_only=True):
    """The log of an attempt is stored as the blob `digest`. `chunks` are those that it holds."""

    build: str
    stage: str
    attempt: int
    digest: str
    chunks: int
    lines: int
    bytes: int
    gaps: list[LogGap] = []


Command = SealArtifact | ArchiveLog
