"""Workers: how they register, and how they are shown."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from proto.api.bodies import Answer, ProblemDetails, Request
from proto.plan import Name
from proto.private import Private


class NewRegistration(Request, frozen=True, kw_only=True):
    """Issue a token that registers one worker within so many minutes. `tags`, if there are any, are all that the worker will have."""

    minutes: Annotated[int, msgspec.Meta(ge=1, le=10)] = 10
    tags: Annotated[list[Name], msgspec.Meta(max_length=64)] = []
    description: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Registration(Private, Answer, frozen=True, kw_only=True):
    """A token that registers one worker. `token` is shown this once: the server keeps only its SHA-256."""

    id: str
    token: str
    expires_at: datetime
    tags: list[str] = []
    description: str = ""


class Challenge(Answer, frozen=True, kw_only=True):
    """What a worker must sign within a minute, to register or to ask what became of it: which server it speaks to, and a nonce."""

    server: str
    nonce: str


class NewWorker(Private, Request, frozen=True, kw_only=True):
    """A worker registers. `key` is its Ed25519 public key, `signature` the key's over `penstock-register`, the challenge's `server` and `nonce`,
    `name` and `key`, with a zero byte between them; both as base64url without padding."""

    token: Annotated[str, msgspec.Meta(max_length=200)]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
    key: Annotated[str, msgspec.Meta(max_length=43, min_length=43)]
    nonce: Annotated[str, msgspec.Meta(max_length=1000)]
    signature: Annotated[str, msgspec.Meta(max_length=86, min_length=86)]


class Myself(Request, frozen=True, kw_only=True):
    """A worker asks whether it is one still. `question` is random; `signature` is as a NewWorker's, over `penstock-standing` in place of
    `penstock-register`, and over `question` after `key`."""

    question: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{16,64}$(?!\n)")]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
    key: Annotated[str, msgspec.Meta(max_length=43, min_length=43)]
    nonce: Annotated[str, msgspec.Meta(max_length=1000)]
    signature: Annotated[str, msgspec.Meta(max_length=86, min_length=86)]


class WorkerStanding(Answer, frozen=True, kw_only=True):
    """What has become of a worker; one that was removed, or never was there, is absent. `signature` is the gateway's, over `penstock-become`, the
    worker's `question`, its `name` and `key`, and `standing`, with a zero byte between them."""

    standing: Literal["registered", "revoked"]
    signature: str


class RegisteredWorker(Answer, frozen=True, kw_only=True):
    """What a worker needs to know of its server: whose signatures to trust, the scheduler's (`server_public_key`) on the bus and the gateway's over
    HTTP, and where the bus is."""

    worker: str
    server_public_key: str
    gateway_public_key: str
    nats_url: str


class Why(Request, frozen=True, kw_only=True):
    """A reason, for whoever asks later."""

    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


WorkerStatus = Literal["idle", "available", "busy", "error", "draining", "lost", "revoked"]


class RunningBuild(Answer, frozen=True, kw_only=True):
    """An attempt that a worker has."""

    id: str
    number: int
    stage: str
    attempt: int
    since: datetime


class Worker(Answer, frozen=True, kw_only=True):
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


class WorkerPage(Answer, frozen=True, kw_only=True):
    """Workers by name. `next` is the cursor of the next page, null at the end."""

    items: list[Worker]
    next: str | None = None


class NoWorker(ProblemDetails, frozen=True, kw_only=True):
    """There is no such worker. `signature`: as a WorkerStanding's, whose `standing` is `unknown`."""

    signature: str = ""
