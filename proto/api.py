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


LONGEST = 100 * 365 * 86400
"""Seconds that a lifetime may be."""
Lifetime = Annotated[int, msgspec.Meta(ge=1, le=LONGEST)]
Reference = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=5000,
        description="an artifact of the team: its id, or `artifact:ID[/path]`, or `build:N/output[/path]` (N: a build's number or id); "
        "with a path that folder's contents, or that one file under its name",
    ),
]


class Submission(_Request, frozen=True, kw_only=True):
    """Run a plan. `inputs` gives the artifacts by the names that tasks know them by. `keep`: seconds for which its outputs are kept (0: as the
    team's policy says), or `forever`."""

    plan: Plan
    inputs: dict[Name, Reference] = {}
    name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    keep: Annotated[int, msgspec.Meta(ge=0, le=LONGEST)] | Literal["forever"] = 0


class ArtifactChange(_Request, frozen=True, kw_only=True, omit_defaults=True):
    """`pinned`: it stays, whatever its expiry. `keep`: it expires so many seconds from now, unless that is sooner than before; with `shorten` also
    sooner. What is left away (or null) stays as it is."""

    pinned: bool | None = None
    keep: Annotated[int, msgspec.Meta(ge=0, le=LONGEST)] | None = None
    shorten: bool = False


class Policy(_Request, frozen=True, kw_only=True):
    """How long a team's uploads (`input_seconds`) and its builds' outputs are kept unless they say otherwise, and how many bytes all that it
    stores may take (0: no limit)."""

    input_seconds: Lifetime
    output_seconds: Lifetime
    quota_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


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


ArtifactKind = Literal["user", "output", "part"]


class Artifact(_Answer, frozen=True, kw_only=True):
    """A stored tree of files that a person uploaded (user), a step wrote (output; `build` is then the build's number), or a build was given as a part
    of another (part; listed only for whoever asks for that kind). `digest` names its content, `size` is the bytes of its files. `expires_at` is null
    when it stays; while it is `pinned` it stays in any case, and longer than it says while a build that was asked for before uses it."""

    id: str
    kind: ArtifactKind
    digest: str
    size: int
    files: int
    name: str = ""
    build: int | None = None
    build_id: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None
    pinned: bool = False


class Direct(_Answer, frozen=True, kw_only=True):
    """Where bytes may go, or come from, without the gateway in between: `url`, with `Authorization: Bearer` and this token, for so many seconds. It
    takes and answers what the gateway's own route does. Whoever cannot reach it, or is answered 401 or 403, uses that route."""

    url: str
    token: str
    seconds: int


class PendingUpload(_Answer, frozen=True, kw_only=True, omit_defaults=True):
    """The manifest is known, and these chunks are still to be sent: ranges [first, last] over the distinct chunk digests of the tree's files, in
    the order of their first appearance, from 0. `id` is the artifact's, once nothing is missing. `direct`: where they, or the tar, may go, too."""

    id: str
    missing: list[tuple[int, int]]
    missing_bytes: int
    missing_blobs: int
    direct: Direct | None = None


class TreeEntry(_Answer, frozen=True, kw_only=True):
    """One name in a tree. `digest` names a file's content (hex), `target` is a symbolic link's text, or of a hard link the file that it shares
    its content with. Bytes of a name that are no UTF-8 are shown as `\\xNN`; `path_base64` is then the name itself."""

    path: str
    kind: Literal["file", "folder", "link"]
    size: int = 0
    executable: bool = False
    digest: str = ""
    target: str = ""
    path_base64: str | None = None


class TreePage(_Answer, frozen=True, kw_only=True):
    """What lies in a folder, in order. `next` is the cursor of the next page, null at the end."""

    items: list[TreeEntry]
    next: str | None = None


class Usage(_Answer, frozen=True, kw_only=True):
    """What a team stores: `stored_bytes` count the same content once, `artifact_bytes` each time that an artifact has it. `quota_bytes` is null
    without a limit."""

    stored_bytes: int
    artifacts: int
    artifact_bytes: int
    quota_bytes: int | None = None


class Step(_Answer, frozen=True, kw_only=True):
    """A command. `percent` never falls within an attempt; `exit_code` is null when no process ended by itself."""

    name: str
    status: BuildStatus = "pending"
    percent: int = 0
    exit_code: int | None = None
    error: str = ""


class BuildStage(_Answer, frozen=True, kw_only=True):
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
    stages: list[BuildStage] = []
    positions: Positions = Positions()


class BuildPage(_Answer, frozen=True, kw_only=True):
    """Builds, newest first. `next` is the cursor of the next page, null at the end."""

    items: list[Build]
    next: str | None = None


class ArtifactPage(_Answer, frozen=True, kw_only=True):
    """Artifacts, newest first. `next` is the cursor of the next page, null at the end."""

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
