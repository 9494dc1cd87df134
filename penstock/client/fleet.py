"""Workers, and why builds wait for them, as the public API speaks of them. Fields that a newer server adds are ignored."""

from datetime import datetime
from typing import Literal

import msgspec

from penstock.client.discreet import Discreet
from penstock.client.model import Status


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an answer."""


class RunningBuild(_Answer, frozen=True, kw_only=True):
    """An attempt that a worker has, since `since`."""

    id: str
    number: int
    stage: str
    attempt: int
    since: datetime


class Worker(_Answer, frozen=True, kw_only=True):
    """Whoever runs builds. `status`: idle (it offers nothing now), available, busy, error (`reason` says why), draining, lost, revoked. `routes` is
    what it is chosen by: platform and tags. `running_builds` are the team's, or all for owners of the first team; `other_builds` counts the others.
    `build_limit` are its slots; `cache_*` in bytes."""

    name: str
    hostname: str = ""
    address: str = ""
    routes: list[str] = []
    active: bool = True
    status: str = "idle"
    reason: str = ""
    last_status_update_at: datetime | None = None
    running_builds: list[RunningBuild] = []
    other_builds: int = 0
    last_build_started_at: datetime | None = None
    last_build_finished_at: datetime | None = None
    last_checked_in: datetime | None = None
    build_limit: int = 0
    slots_in_use: int = 0
    mode: str = "push"
    version: str = ""
    sandbox: str = ""
    images: list[str] = []
    cache_used: int = 0
    cache_limit: int = 0
    registered_at: datetime | None = None


class WorkerPage(_Answer, frozen=True, kw_only=True):
    items: list[Worker]
    next: str | None = None


class Registration(Discreet, frozen=True, kw_only=True):
    """A token that registers one worker until `expires_at`; it is shown this once."""

    id: str
    token: str
    expires_at: datetime
    tags: list[str] = []
    description: str = ""


class Candidate(_Answer, frozen=True, kw_only=True):
    """A worker that could have had a stage: the share of its slots in use then, the bytes that it would have had to fetch."""

    worker: str
    load: float = 0.0
    missing: int = 0


class Waiting(_Answer, frozen=True, kw_only=True):
    """Another stage of the team that waits; `build` by number."""

    build: int
    stage: str


class Holder(_Answer, frozen=True, kw_only=True):
    """A worker that could take a stage, and who has its slots: `builds` of the team by number, and how many stages of other teams; `offered`: how
    many it offers now."""

    worker: str
    slots: int = 0
    offered: int = 0
    builds: list[int] = []
    others: int = 0


class Preparation(_Answer, frozen=True, kw_only=True):
    """Why a stage is where it is. `reason` and `refused` (workers by why) are as recorded. Only if `live`, a scheduler has said: what a worker must
    offer (`requires`), how many stages come before it (`ahead`; at least so many with `more`), the first of the team's own among them, how many
    workers are `able`, and who has their slots. `why`: the best workers when it was placed, the chosen one first. `lost`: what became of the attempt
    before, if there was one."""

    stage: str
    state: Literal["blocked", "queued", "leased", "over"]
    attempt: int = 0
    status: Status = "pending"
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
    """Why a build waits, or why it is where it is."""

    id: str
    number: int
    status: Status
    stages: list[Preparation] = []
