"""What the public API speaks. The gateway answers with these, and OpenAPI is generated from them (`/api/v1/openapi.json`).

An answer's fields may grow; a request's unknown fields are refused.
"""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from proto.events.team import Role
from proto.plan import Name, Plan

BuildStatus = Literal["pending", "started", "succeeded", "failed", "errored", "aborted"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "errored", "aborted"})

TeamName = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$(?!\n)", description="lower-case letters, digits and `-`; at most 63, the first no `-`")
]


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body that a client sends."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A body that the gateway answers."""


class Submission(_Request, frozen=True, kw_only=True):
    """Run a plan. `inputs` gives, by the name that tasks know it by, the id of an artifact of the team."""

    plan: Plan
    inputs: dict[Name, Annotated[str, msgspec.Meta(max_length=128)]] = {}
    name: Annotated[str, msgspec.Meta(max_length=200)] = ""


class NewToken(_Request, frozen=True, kw_only=True):
    """Issue a token for a team. owner: may issue tokens; member: may upload, build and abort; viewer: may look."""

    role: Role
    description: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Token(_Answer, frozen=True, kw_only=True):
    """A new token. `token` is shown this once: the server keeps only its SHA-256."""

    id: str
    token: str
    team: str
    role: Role
    description: str = ""


class Team(_Answer, frozen=True, kw_only=True):
    """A tenancy boundary: everything belongs to one team."""

    name: str


class Info(_Answer, frozen=True, kw_only=True, omit_defaults=True):
    """The server's version and, with a token, whose it is: `teams` lists the one team of the token."""

    version: str
    teams: list[str] = []
    team: str = ""
    role: Role | None = None


class TreeRef(_Answer, frozen=True, kw_only=True):
    """A tree of files: `digest` names its content, `size` is the bytes of its files."""

    id: str
    digest: str
    size: int
    files: int


class Artifact(_Answer, frozen=True, kw_only=True):
    """A stored tree that a person uploaded or a step wrote. `expires_at` is null when it stays."""

    id: str
    digest: str
    size: int
    files: int
    name: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None


class Step(_Answer, frozen=True, kw_only=True):
    """A command. `percent` never falls within an attempt; `exit_code` is null when no process ended by itself."""

    name: str
    status: BuildStatus = "pending"
    percent: int = 0
    exit_code: int | None = None
    error: str = ""


class Stage(_Answer, frozen=True, kw_only=True):
    """Steps on one worker. `attempt` counts from 1 (0: not queued yet) and grows when a worker is lost. `reason`: why it is not placed yet."""

    name: str
    status: BuildStatus = "pending"
    attempt: int = 0
    worker: str = ""
    sandbox: str = ""
    error: str = ""
    reason: str = ""
    steps: list[Step] = []


class Positions(_Answer, frozen=True, kw_only=True):
    """Where in the log the build's status, percent and error became what they are."""

    status: int = 0
    percent: int = 0
    error: int = 0


class Build(_Answer, frozen=True, kw_only=True):
    """One run of a plan. `number` counts within the team; `reason` says why it waits; `exit_code` is that of the first step that did not succeed,
    else of the last."""

    id: str
    number: int
    team: str
    name: str = ""
    status: BuildStatus = "pending"
    percent: int = 0
    error: str = ""
    reason: str = ""
    exit_code: int | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    requested_by: str = ""
    url: str = ""
    inputs: dict[str, TreeRef] = {}
    outputs: dict[str, TreeRef] = {}
    stages: list[Stage] = []
    positions: Positions = Positions()


class BuildPage(_Answer, frozen=True, kw_only=True):
    """Builds, newest first. `next` is the cursor of the next page, null at the end."""

    items: list[Build]
    next: str | None = None


class ArtifactPage(_Answer, frozen=True, kw_only=True):
    """User artifacts, newest first. `next` is the cursor of the next page, null at the end."""

    items: list[Artifact]
    next: str | None = None


class LogLine(_Answer, frozen=True, kw_only=True):
    """One numbered line (from 0), with its newline; an unfinished piece has none. `at` is unix time in milliseconds."""

    line: int
    step: str
    stream: Literal["stdout", "stderr"]
    at: int
    text: str


class LogPage(_Answer, frozen=True, kw_only=True):
    """Lines of one attempt's log. `next` is the line to ask for next, null when there is none yet; `complete`: no more will come."""

    stage: str
    attempt: int
    lines: list[LogLine]
    next: int | None = None
    complete: bool = False


class LogEvent(_Answer, frozen=True, kw_only=True):
    """The data of a `log` event: consecutive whole lines of one stream of one step, `line` numbering the first, or an unfinished piece of a line."""

    stage: str
    attempt: int
    step: str
    stream: Literal["stdout", "stderr"]
    line: int
    at: int
    text: str


class ProblemDetails(_Answer, frozen=True, kw_only=True):
    """RFC 9457. `path` names the part of the request that is meant, `position` the byte or character at which JSON ends to be JSON."""

    type: str
    title: str
    status: int
    detail: str = ""
    path: str = ""
    position: int | None = None
