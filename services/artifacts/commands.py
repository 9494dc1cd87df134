"""What may be asked of artifacts."""

from typing import Literal

import msgspec

from proto.events.artifact import LogGap


class SealArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """All bytes of the tree are stored, and held by the session `upload`: it exists from now on. The fields are ArtifactSealed's."""

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
    pinned: bool = False
    upload: str = ""
    part: bool = False


class ChangeLifetime(msgspec.Struct, frozen=True, kw_only=True):
    """A member wants it pinned or not, or kept until `expires_at` (unix seconds), which is sooner than before only when it may `shorten`.
    None: as it is."""

    artifact: str
    pinned: bool | None = None
    expires_at: int | None = None
    shorten: bool = False


class ExpireArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """Its time seems to be up at `now` (unix seconds)."""

    artifact: str
    now: float


class DeleteArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """A member wants it gone."""

    artifact: str


class ArchiveLog(msgspec.Struct, frozen=True, kw_only=True):
    """The log of an attempt is stored as the blob `digest`. `chunks` are those that it holds: more than the archive that it `replaces` (its number;
    0: none)."""

    build: str
    stage: str
    attempt: int
    digest: str
    chunks: int
    lines: int
    bytes: int
    gaps: list[LogGap] = []
    replaces: int = 0


Command = SealArtifact | ChangeLifetime | ExpireArtifact | DeleteArtifact | ArchiveLog
