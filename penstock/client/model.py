"""What the public API speaks, as frozen structs. Fields that a newer server adds are ignored; all but the identity have defaults."""

import base64
from collections.abc import Callable
from datetime import datetime
from typing import Literal

import msgspec

from penstock.client.discreet import Discreet

Status = Literal["pending", "started", "succeeded", "failed", "errored", "aborted"]
ArtifactKind = Literal["user", "output", "part"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "errored", "aborted"})


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an answer."""


class Problem(_Answer, frozen=True, kw_only=True):
    """RFC 9457. `path` names the part of the request that is meant, when one is."""

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    path: str = ""


class Info(_Answer, frozen=True, kw_only=True):
    """The server's version and, with a token, whose it is."""

    version: str = ""
    teams: list[str] = []
    team: str = ""
    role: str = ""


class Artifact(_Answer, frozen=True, kw_only=True):
    """A stored tree of files: what somebody uploaded (`user`), an `output` of a build, `build` by number, or a `part` that was made of another for a
    build. `size` is the bytes of its files,
    `digest` names its content. `expires_at`: None while it stays."""

    id: str
    kind: ArtifactKind = "user"
    digest: str = ""
    size: int = 0
    files: int = 0
    name: str = ""
    build: int | None = None
    build_id: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None
    pinned: bool = False


class TreeEntry(_Answer, frozen=True, kw_only=True):
    """A name in an artifact. `digest` is a file's public name: the sha256 of its contents up to 8 MiB. In `path`, bytes that are no UTF-8 are shown
    as `\\xNN`; `path_base64` has them as they are."""

    path: str
    kind: Literal["file", "folder", "link"] = "file"
    size: int = 0
    executable: bool = False
    digest: str = ""
    target: str = ""
    path_base64: str | None = None

    @property
    def path_bytes(self) -> bytes:
        """The path as it is."""
        return self.path.encode() if self.path_base64 is None else base64.b64decode(self.path_base64)


class Usage(_Answer, frozen=True, kw_only=True):
    """What a team stores, in bytes: `stored_bytes` with the same content counted once, `artifact_bytes` without."""

    stored_bytes: int = 0
    artifacts: int = 0
    artifact_bytes: int = 0
    quota_bytes: int | None = None


class Secret(_Answer, frozen=True, kw_only=True):
    """A secret that the team has; its value is shown to nobody. `version` counts how often it was set."""

    name: str
    version: int = 0
    set_at: datetime | None = None
    set_by: str = ""


class SecretKeys(_Answer, frozen=True, kw_only=True):
    """`sealing_version`: which key secrets are sealed to on their way. `values`: how many of them are under which master key, by id; `master_key` is
    the first, under which all come to be."""

    sealing_version: int = 0
    master_key: str = ""
    values: dict[str, int] = {}


class SecretPage(_Answer, frozen=True, kw_only=True):
    """Secrets by name; `next` leads to the following page."""

    items: list[Secret]
    next: str | None = None


class Policy(_Answer, frozen=True, kw_only=True):
    """How long a team's artifacts are kept by default, in seconds, and how much it may store (0: as much as there is room). `privileged`: whether its
    steps may be."""

    input_seconds: int = 0
    output_seconds: int = 0
    quota_bytes: int = 0
    privileged: bool = False


class Direct(Discreet, frozen=True, kw_only=True):
    """Where bytes may be sent, or fetched, past the gateway: with this token."""

    url: str
    token: str


class PendingUpload(_Answer, frozen=True, kw_only=True):
    """What the server lacks: first and last of runs of distinct chunks, counted as they first appear in the manifest, from 0."""

    id: str
    missing: list[tuple[int, int]]
    missing_bytes: int = 0
    missing_blobs: int = 0
    direct: Direct | None = None


class Transfer(msgspec.Struct, frozen=True):
    """How far a transfer is, in bytes. `skipped` need not be read, sent or received because it is known to be there already."""

    phase: Literal["hashing", "sending", "receiving"]
    done: int
    total: int
    skipped: int


class Step(_Answer, frozen=True, kw_only=True):
    name: str
    status: str = "pending"
    percent: int = 0
    exit_code: int | None = None
    error: str = ""
    image: str = ""
    reference: str = ""


class Stage(_Answer, frozen=True, kw_only=True):
    """`attempt` counts from 1; it grows when a worker is lost and the stage is tried again. `reason`: why it is
    not placed yet."""

    name: str
    status: str = "pending"
    attempt: int = 0
    worker: str = ""
    sandbox: str = ""
    error: str = ""
    reason: str = ""
    steps: list[Step] = []


class Build(_Answer, frozen=True, kw_only=True):
    """`number` counts within the team and is what people type; `reason` says why it is pending; `exit_code` is that of the first step that
    did not succeed, else of the last."""

    id: str
    number: int
    team: str = ""
    name: str = ""
    status: Status = "pending"
    percent: int = 0
    error: str = ""
    reason: str = ""
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    url: str = ""
    requested_by: str = ""
    inputs: dict[str, Artifact] = {}
    outputs: dict[str, Artifact] = {}
    stages: list[Stage] = []
    positions: dict[str, int] = {}
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class LogLine(_Answer, frozen=True, kw_only=True):
    """`text` keeps its newline; the last piece of an unfinished line has none. `at` is unix time in milliseconds."""

    line: int = 0
    step: str = ""
    stream: str = "stdout"
    at: int = 0
    text: str = ""


class LogPage(_Answer, frozen=True, kw_only=True):
    """Consecutive lines of one attempt. `next` is the line to ask for next, None at the end; `complete`: no more will come."""

    stage: str = ""
    attempt: int = 0
    lines: list[LogLine] = []
    next: int | None = None
    complete: bool = False


class BuildStatus(msgspec.Struct, frozen=True):
    """The build changed; `id` resumes the stream after this event."""

    id: str
    build: Build


class BuildLogged(msgspec.Struct, frozen=True):
    """A task wrote something."""

    id: str
    stage: str
    attempt: int
    entry: LogLine


class BuildEnded(msgspec.Struct, frozen=True):
    """The build ended, its log is complete, and the stream is over."""

    id: str
    build: Build


BuildEvent = BuildStatus | BuildLogged | BuildEnded


class LogEntry(LogLine, frozen=True, kw_only=True):
    """The data of a `log` event."""

    stage: str = ""
    attempt: int = 1


class BuildPage(_Answer, frozen=True, kw_only=True):
    items: list[Build] = []
    next: str | None = None


class ArtifactPage(_Answer, frozen=True, kw_only=True):
    items: list[Artifact] = []
    next: str | None = None


class TreePage(_Answer, frozen=True, kw_only=True):
    items: list[TreeEntry] = []
    next: str | None = None


Progress = Callable[[Transfer], None]
"""Told how far a transfer is, often, on the event loop's thread; each phase ends with done = total."""
