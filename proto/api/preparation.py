"""Why a build waits, as it is shown."""

from datetime import datetime
from typing import Literal

from proto.api.bodies import Answer
from proto.api.builds import BuildStatus


class Candidate(Answer, frozen=True, kw_only=True):
    """A worker that could have had it: the share of its slots in use, and the bytes of the inputs that it was not known to have."""

    worker: str
    load: float = 0.0
    missing: int = 0


class Waiting(Answer, frozen=True, kw_only=True):
    """Another stage of the team that waits."""

    build: int
    stage: str


class Holder(Answer, frozen=True, kw_only=True):
    """A worker that could take it, and who has its slots: builds of the team by number, and how many stages of other teams; `offered`: how many it
    offers now."""

    worker: str
    slots: int
    offered: int = 0
    builds: list[int] = []
    others: int = 0


class Preparation(Answer, frozen=True, kw_only=True):
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


class BuildPreparation(Answer, frozen=True, kw_only=True):
    """Why a build waits, or why it is where it is, stage by stage."""

    id: str
    number: int
    status: BuildStatus
    stages: list[Preparation] = []
