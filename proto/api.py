"""What the public API speaks. The gateway answers with these, and OpenAPI is generated from them (`/api/v1/openapi.json`).

An answer's fields may grow; a request's unknown fields are refused.
"""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from proto.events.team import Role
from proto.plan import Name, Plan
from proto.private import Private

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
    stores may take (0: no limit). `privileged`: its steps may be, on workers that allow it; owners of the first team may grant that."""

    input_seconds: Lifetime
    output_seconds: Lifetime
    quota_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    privileged: bool = False


class SecretValue(Private, _Request, frozen=True, kw_only=True):
    """The value of a secret: text of at most 64 KiB (UTF-8)."""

    value: str


class NewToken(_Request, frozen=True, kw_only=True):
    """Issue a token for a team. owner: may issue tokens; member: may upload, build and abort; viewer: may look."""

    role: Role
    description: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Token(Private, _Answer, frozen=True, kw_only=True):
    """A new token. `token` is shown this once: the server keeps only its SHA-256."""

    id: str
    token: str
    team: str
    role: Role
    description: str = ""


class NewRegistration(_Request, frozen=True, kw_only=True):
    """Issue a token that registers one worker within so many minutes. `tags`, if there are any, are all that the worker will have."""

    minutes: Annotated[int, msgspec.Meta(ge=1, le=10)] = 10
    tags: Annotated[list[Name], msgspec.Meta(max_length=64)] = []
    description: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Registration(Private, _Answer, frozen=True, kw_only=True):
    """A token that registers one worker. `token` is shown this once: the server keeps only its SHA-256."""

    id: str
    token: str
    expires_at: datetime
    tags: list[str] = []
    description: str = ""


class Challenge(_Answer, frozen=True, kw_only=True):
    """What a new worker must sign within a minute: which server it speaks to, and a nonce."""

    server: str
    nonce: str


class NewWorker(Private, _Request, frozen=True, kw_only=True):
    """A worker registers. `key` is its Ed25519 public key, `signature` the key's over `penstock-register`, the challenge's `server` and `nonce`,
    `name` and `key`, with a zero byte between them; both as base64url without padding."""

    token: Annotated[str, msgspec.Meta(max_length=200)]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
    key: Annotated[str, msgspec.Meta(max_length=43, min_length=43)]
    nonce: Annotated[str, msgspec.Meta(max_length=1000)]
    signature: Annotated[str, msgspec.Meta(max_length=86, min_length=86)]


class Myself(_Request, frozen=True, kw_only=True):
    """A worker asks whether it is one still. `signature` is as a NewWorker's, over `penstock-standing` in place of `penstock-register`."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
    key: Annotated[str, msgspec.Meta(max_length=43, min_length=43)]
    nonce: Annotated[str, msgspec.Meta(max_length=1000)]
    signature: Annotated[str, msgspec.Meta(max_length=86, min_length=86)]


class WorkerStanding(_Answer, frozen=True, kw_only=True):
    """What has become of a worker; one that was removed, or never was there, is absent."""

    standing: Literal["registered", "revoked"]


class RegisteredWorker(_Answer, frozen=True, kw_only=True):
    """What a worker needs to know of its server: whose signature to trust, and where the bus is."""

    worker: str
    server_public_key: str
    nats_url: str


class Why(_Request, frozen=True, kw_only=True):
    """A reason, for whoever asks later."""

    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


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


class Direct(Private, _Answer, frozen=True, kw_only=True):
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
    """A command. `percent` never falls within an attempt; `exit_code` is null when no process ended by itself. `image` is exactly the one that it
    ran in, if in any, by digest where it has one; `reference` is how its task names it, made whole."""

    name: str
    status: BuildStatus = "pending"
    percent: int = 0
    exit_code: int | None = None
    error: str = ""
    image: str = ""
    reference: str = ""


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


WorkerStatus = Literal["idle", "available", "busy", "error", "draining", "lost", "revoked"]


class RunningBuild(_Answer, frozen=True, kw_only=True):
    """An attempt that a worker has."""

    id: str
    number: int
    stage: str
    attempt: int
    since: datetime


class Worker(_Answer, frozen=True, kw_only=True):
    """Whoever runs builds. idle: it offers nothing now, or was never heard of; available: it has free slots, and offers them; busy: all are in use;
    error: it can take no work, and `reason` says why; draining: it finishes what it has; lost: nothing is heard of it; revoked: nothing that it
    says counts.

    `active`: it may be given work, were it there. `routes`: what it is chosen by, its platform and its tags. `running_builds` are the asker's team's
    (of all teams for owners of the first one), `other_builds` how many others there are. `hostname` and `address` are shown to owners of the first
    team. `cache_*` in bytes."""

    name: str
    hostname: str = ""
    address: str = ""
    routes: list[str] = []
    active: bool = True
    status: WorkerStatus
    reason: str = ""
    last_status_update_at: datetime
    running_builds: list[RunningBuild] = []
    other_builds: int = 0
    last_build_started_at: datetime | None = None
    last_build_finished_at: datetime | None = None
    last_checked_in: datetime | None = None
    build_limit: int = 0
    slots_in_use: int = 0
    mode: Literal["push", "pull"] = "push"
    version: str = ""
    sandbox: str = ""
    images: list[str] = []
    cache_used: int = 0
    cache_limit: int = 0
    registered_at: datetime | None = None


class WorkerPage(_Answer, frozen=True, kw_only=True):
    """Workers by name. `next` is the cursor of the next page, null at the end."""

    items: list[Worker]
    next: str | None = None


class Secret(_Answer, frozen=True, kw_only=True):
    """A secret that the team has. Its value is shown to nobody."""

    name: str
    version: int
    set_at: datetime
    set_by: str


class SecretPage(_Answer, frozen=True, kw_only=True):
    """Secrets by name. `next` is the cursor of the next page, null at the end."""

    items: list[Secret]
    next: str | None = None


class SecretKeys(_Answer, frozen=True, kw_only=True):
    """`sealing_version`: which key secrets are sealed to on their way to the schedulers. `master_key`: the id of the master key that is first;
    `values`: how many values are under which master key. Those under others than the first are being encrypted anew."""

    sealing_version: int
    master_key: str
    values: dict[str, int]


class Candidate(_Answer, frozen=True, kw_only=True):
    """A worker that could have had it: the share of its slots in use, and the bytes of the inputs that it was not known to have."""

    worker: str
    load: float = 0.0
    missing: int = 0


class Waiting(_Answer, frozen=True, kw_only=True):
    """Another stage of the team that waits."""

    build: int
    stage: str


class Holder(_Answer, frozen=True, kw_only=True):
    """A worker that could take it, and who has its slots: builds of the team by number, and how many stages of other teams; `offered`: how many it
    offers now."""

    worker: str
    slots: int
    offered: int = 0
    builds: list[int] = []
    others: int = 0


class Preparation(_Answer, frozen=True, kw_only=True):
    """Why a stage is where it is. blocked: by the stages that it needs; queued: for a worker; leased: given to `worker`, and why there; over.

    Queued: `since` when, what a worker must offer (`requires`), the `reason` last recorded with `refused` workers counted by reason; then, if the
    scheduler could be asked (`live`): how many stages come before it in the true order (`ahead`, at least so many with `more`), those of the team
    among them (the first of them), the share of the workers that could take it (`able`), and who has their slots.
    Leased: `why` has the best workers as they were when it was placed, the first one got it.
    `lost`: what became of the attempt before, if there was one."""

    stage: str
    state: Literal["blocked", "queued", "leased", "over"]
    attempt: int = 0
    status: BuildStatus = "pending"
    needs: list[str] = []
    requires: list[str] = []
    since: datetime | None = None
    reason: str = ""
    refused: dict[str, int] = {}
    live: bool = False
    ahead: int = 0
    more: bool = False
    ahead_builds: list[Waiting] = []
    able: int = 0
    holders: list[Holder] = []
    worker: str = ""
    leased_at: datetime | None = None
    started_at: datetime | None = None
    why: list[Candidate] = []
    lost: str = ""


class BuildPreparation(_Answer, frozen=True, kw_only=True):
    """Why a build waits, or why it is where it is, stage by stage."""

    id: str
    number: int
    status: BuildStatus
    stages: list[Preparation] = []


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
