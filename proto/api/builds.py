"""Builds, as they are asked for and shown."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from proto.api.artifacts import TreeRef
from proto.api.bodies import LONGEST, Answer, Request
from proto.plan import Name, Plan

BuildStatus = Literal["pending", "started", "succeeded", "failed", "errored", "aborted"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "errored", "aborted"})
Reference = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=5000,
        description="an artifact of the team: its id, or `artifact:ID[/path]`, or `build:N/output[/path]` (N: a build's number or id); "
        "with a path that folder's contents, or that one file under its name",
    ),
]


class Submission(Request, frozen=True, kw_only=True):
    """Run a plan. `inputs` gives the artifacts by the names that tasks know them by. `keep`: seconds for which its outputs are kept (0: as the
    team's policy says), or `forever`."""

    plan: Plan
    inputs: dict[Name, Reference] = {}
    name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    keep: Annotated[int, msgspec.Meta(ge=0, le=LONGEST)] | Literal["forever"] = 0


class Step(Answer, frozen=True, kw_only=True):
    """A command. `percent` never falls within an attempt; `exit_code` is null when no process ended by itself. `image` is exactly the one that it
    ran in, if in any, by digest where it has one; `reference` is how its task names it, made whole."""

    name: str
    status: BuildStatus = "pending"
    percent: int = 0
    exit_code: int | None = None
    error: str = ""
    image: str = ""
    reference: str = ""


class BuildStage(Answer, frozen=True, kw_only=True):
    """Steps on one worker. `attempt` counts from 1 (0: not queued yet) and grows when a worker is lost. `reason`: why it is not placed yet."""

    name: str
    status: BuildStatus = "pending"
    attempt: int = 0
    worker: str = ""
    sandbox: str = ""
    error: str = ""
    reason: str = ""
    steps: list[Step] = []


class Positions(Answer, frozen=True, kw_only=True):
    """Where in the log the build's status, percent and error became what they are."""

    status: int = 0
    percent: int = 0
    error: int = 0


class Build(Answer, frozen=True, kw_only=True):
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


class BuildPage(Answer, frozen=True, kw_only=True):
    """Builds, newest first. `next` is the cursor of the next page, null at the end."""

    items: list[Build]
    next: str | None = None
