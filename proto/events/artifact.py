"""`artifact-<artifact>` and `artifact-log-<build>-<stage>-<attempt>`. Owned by artifacts."""

from typing import Literal

from proto.events.base import Event, Value


class ArtifactSealed(Event, frozen=True, kw_only=True):
    """artifacts, once all bytes are stored: the tree `digest` can be read until `expires_at` (unix seconds; 0: for ever), or for as long as it is
    pinned. `upload` names the session that brought it, and with it what the artifact holds in the store. `part`: nobody asked for it by itself; a
    build was given a part of another artifact."""

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


class ArtifactLifetimeChanged(Event, frozen=True, kw_only=True):
    """artifacts, when a member asks: from now on this holds, as in ArtifactSealed."""

    artifact: str
    expires_at: int
    pinned: bool


class ArtifactExpired(Event, frozen=True, kw_only=True):
    """artifacts, when its time is up: a tombstone. What was requested before, by the log's order, may still read the tree; its bytes go when
    nothing does."""

    artifact: str


class ArtifactDeleted(Event, frozen=True, kw_only=True):
    """artifacts, when a member asks: a tombstone as ArtifactExpired."""

    artifact: str


class LogGap(Value, frozen=True, kw_only=True):
    """Lines that never reached the archive: chunks `first` to `last` of the attempt's log."""

    first: int
    last: int


class LogArchived(Event, frozen=True, kw_only=True):
    """artifacts, after a stage's end: the attempt's log can be read from the store, whatever the bus forgets.
    An archive is immutable; a late chunk makes a new `archive` number. `digest` is the blob's sha256. Its `chunks` are those up to number `last`
    that are in no gap."""

    build: str
    stage: str
    attempt: int
    archive: int
    digest: str
    chunks: int
    lines: int
    bytes: int
    gaps: list[LogGap] = []

    @property
    def last(self) -> int:
        return self.chunks + sum(gap.last - gap.first + 1 for gap in self.gaps)
