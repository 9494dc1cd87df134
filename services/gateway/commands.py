"""What the gateway may be asked to record."""

import hashlib

import msgspec

from proto.events.base import ArtifactRef
from proto.events.team import Role
from proto.plan import Plan


class RequestBuild(msgspec.Struct, frozen=True, kw_only=True):
    """A client wants `plan` run as build `build`. `request` names the wish: the same `request` with the same body is the same wish."""

    request: str
    build: str
    plan: Plan
    inputs: dict[str, ArtifactRef]
    name: str
    body_mac: str
    keep_seconds: int = 0


class RecallBuild(msgspec.Struct, frozen=True, kw_only=True):
    """Which build does this request stand for, if it was made before?"""

    request: str
    body_mac: str


class AbortBuild(msgspec.Struct, frozen=True, kw_only=True):
    """A client wants the build to stop."""

    build: str


RequestCommand = RequestBuild | RecallBuild | AbortBuild


class CreateTeam(msgspec.Struct, frozen=True, kw_only=True):
    """The team shall exist."""

    team: str


class IssueToken(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever shows the token with this SHA-256 (hex) shall act for the team in this role."""

    team: str
    token_id: str
    sha256: str
    role: Role
    description: str


class SetPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """From now on the team keeps its uploads and its builds' outputs so many seconds, and stores at most so many bytes (0: no limit). `privileged`:
    whether its steps may be."""

    team: str
    input_seconds: int
    output_seconds: int
    quota_bytes: int
    privileged: bool = False


TeamCommand = CreateTeam | IssueToken | SetPolicy


class IssueRegistration(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever shows the token with this SHA-256 (hex) before `expires_at` (unix seconds) may register one worker, with these tags."""

    token_id: str
    sha256: str
    expires_at: float
    tags: tuple[str, ...]
    description: str


class UseRegistration(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody shows the token with this SHA-256, at `now` (unix seconds), for a worker and its key. `trial`: may it?"""

    token_id: str
    sha256: str
    worker: str
    key: str
    now: float
    trial: bool = False


class RegisterWorker(msgspec.Struct, frozen=True, kw_only=True):
    """The worker of this name shall be known by this key. `trial`: may it?"""

    worker: str
    key: str
    tags: tuple[str, ...] = ()
    token_id: str = ""
    trial: bool = False


class DrainWorker(msgspec.Struct, frozen=True, kw_only=True):
    """It shall get nothing new."""

    worker: str
    reason: str = ""


class ResumeWorker(msgspec.Struct, frozen=True, kw_only=True):
    """It shall get work again."""

    worker: str


class RevokeWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Its key shall be good for nothing."""

    worker: str
    reason: str = ""


class DeleteWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Its name shall be free. `lost`: nothing is heard of it."""

    worker: str
    lost: bool


FleetCommand = IssueRegistration | UseRegistration | RegisterWorker | DrainWorker | ResumeWorker | RevokeWorker | DeleteWorker


def token_id_of(sha256: str) -> str:
    """The name of a registration token, by what is known of it."""
    return sha256[:32]


def request_name(team: str, key: str) -> str:
    """The request that an idempotency key of a team names; opaque, and fit for a NATS subject."""
    return hashlib.sha256(f"{team}\0{key}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
