"""What the public API speaks, as frozen structs. Fields that a newer server adds are ignored; all but the identity have defaults."""

from datetime import datetime
from typing import Literal

import msgspec

Status = Literal["pending", "started", "succeeded", "failed", "errored", "aborted"]
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
    """A stored folder. `size` is the bytes of its files, `digest` names its content."""

    id: str
    digest: str = ""
    size: int = 0
    files: int = 0
    name: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None


class Step(_Answer, frozen=True, kw_only=True):
    name: str
    status: str = "pending"
    percent: int = 0
    exit_code: int | None = None
    error: str = ""


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
