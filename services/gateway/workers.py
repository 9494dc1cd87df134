"""Workers as people see them, folded from the log: who may be one (`fleet-`), who lives (`worker-`), who has which attempt. Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from libs.eventlog.projections import Get, Gone
from proto.api.builds import BuildStage
from proto.envelope import Fact
from proto.events.build import StageFinished, StageQueued
from proto.events.fleet import WorkerDeleted, WorkerDrained, WorkerRegistered, WorkerResumed, WorkerRevoked
from proto.events.lease import LeaseExpired, StageLeased
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import About, Offers

_AT_A_WORKER = (StageLeased, StageFinished, LeaseExpired)

Standing = Literal["", "registered", "drained", "revoked", "deleted"]

FleetEvent = WorkerRegistered | WorkerDrained | WorkerResumed | WorkerRevoked | WorkerDeleted
LifeEvent = WorkerBooted | WorkerLost


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker. `standing` is what the owner decided of it, and `reason` why; `life` whether it was heard of ("" never was), `lost` why it is not
    any more. `changed_at`: when one of these changed. `tags` were given to it, in place of those that it `offers`."""

    name: str
    key: str = ""
    tags: list[str] = []
    standing: Standing = ""
    reason: str = ""
    life: Literal["", "up", "lost"] = ""
    lost: str = ""
    boot: str = ""
    since: int = 0
    slots: int = 0
    offers: Offers = Offers()
    about: About = About()
    registered_at: datetime | None = None
    changed_at: datetime
    build_started_at: datetime | None = None
    build_finished_at: datetime | None = None


class LeaseRow(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that a worker has; `key` is `<build>/<stage>`."""

    key: str
    build: str
    number: int
    team: str
    stage: str
    attempt: int
    worker: str
    since: datetime


def of_worker(fact: Fact) -> str:
    """The worker that an event of `fleet-worker-<name>` is about."""
    return fact.subject_id.removeprefix("worker-")


def worker_after(worker: WorkerRow | None, fact: Fact) -> WorkerRow | None:
    """A worker after a fact about its standing or its life."""
    event, at = fact.event, fact.recorded_at
    if isinstance(event, WorkerRegistered):
        # A worker with the same key is the same worker, and may well be living.
        same = worker if worker is not None and worker.key == event.key else WorkerRow(name=event.worker, key=event.key, changed_at=at)
        return replace(same, tags=list(event.tags), standing="registered", reason="", since=0, registered_at=at, changed_at=at)
    if isinstance(event, WorkerBooted):
        known = worker or WorkerRow(name=event.worker, changed_at=at)
        if event.rank < (known.since, known.boot if known.since else ""):
            return known  # a later one is there
        booted = replace(known, life="up", lost="", boot=event.boot, since=event.since, slots=event.slots, offers=event.offers)
        return replace(booted, about=event.about, changed_at=at)
    if worker is None:
        return None
    match event:
        case WorkerLost(boot=boot, reason=reason):
            return replace(worker, life="lost", lost=reason, changed_at=at) if boot == worker.boot else worker
        case WorkerDrained(reason=reason):
            return replace(worker, standing="drained", reason=reason, changed_at=at)
        case WorkerResumed():
            return replace(worker, standing="registered", reason="", changed_at=at)
        case WorkerRevoked(reason=reason):
            return replace(worker, standing="revoked", reason=reason, changed_at=at)
        case WorkerDeleted():
            return replace(worker, standing="deleted", reason="", changed_at=at)
        case _:
            raise TypeError(f"{type(event).__name__} is not about a worker")


def lease_key(build: str, stage: str) -> str:
    """Names what is leased of a build."""
    return f"{build}/{stage}"


def lease_keys(fact: Fact) -> Sequence[tuple[type[Any], str]]:
    """The rows that `leases_after` asks for."""
    event = fact.event
    if isinstance(event, _AT_A_WORKER):
        lease = LeaseRow, lease_key(fact.subject_id, event.stage)
        return (lease, (WorkerRow, event.worker)) if event.worker else (lease,)
    if isinstance(event, StageQueued) and event.attempt > 1:
        return ((LeaseRow, lease_key(fact.subject_id, event.stage)),)
    return ()


def leases_after(fact: Fact, number: int, stages: Sequence[BuildStage], get: Get) -> Iterable[Any]:
    """Who has what after a fact about a build, whose number and stages are as they were before it. A lease may come too late for its attempt: it is
    none, and nothing would end it."""
    if not (needed := lease_keys(fact)):
        return
    event, at = fact.event, fact.recorded_at
    assert isinstance(event, (StageQueued, *_AT_A_WORKER)), "only these have keys"
    worker = get(WorkerRow, needed[1][1]) if len(needed) > 1 else None
    key = needed[0][1]
    if isinstance(event, StageLeased):
        if any(each.name == event.stage and each.attempt == event.attempt and each.status in ("pending", "started") for each in stages):
            yield LeaseRow(
                key=key, build=fact.subject_id, number=number, team=fact.team, stage=event.stage, attempt=event.attempt, worker=event.worker, since=at
            )
            if worker is not None:
                yield replace(worker, build_started_at=at)
        return
    lease = get(LeaseRow, key)
    if lease is not None and lease.attempt <= event.attempt:
        yield Gone(LeaseRow, key)
        if worker is not None:
            yield replace(worker, build_finished_at=at)
