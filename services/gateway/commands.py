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
    body_sha256: str
    keep_seconds: int = 0


class RecallBuild(msgspec.Struct, frozen=True, kw_only=True):
    """Which build does this request stand for, if it was made before?"""

    request: str
    body_sha256: str


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
    """From now on the team keeps its uploads and its builds' outputs so many seconds, and stores at most so many bytes (0: no limit)."""

    team: str
    input_seconds: int
    output_seconds: int
    quota_bytes: int


TeamCommand = CreateTeam | IssueToken | SetPolicy


def request_name(team: str, key: str) -> str:
    """The request that an idempotency key of a team names; opaque, and fit for a NATS subject."""
    return hashlib.sha256(f"{team}\0{key}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
