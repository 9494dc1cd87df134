"""What a worker looks like to a client: what the log says of it, and what it said last. Pure."""

from collections.abc import Sequence
from datetime import UTC, datetime

from proto.api.workers import RunningBuild, Worker, WorkerStatus
from proto.messages import Heartbeat
from services.gateway.presence import Heard
from services.gateway.workers import LeaseRow, WorkerRow

SILENT = 30.0
"""Seconds after which a worker that was heard here is lost, also when no scheduler is there to say so."""
_LOST = {"drained": "it has left", "silent": "nothing is heard of it"}


def worker_view(row: WorkerRow, heard: Heard | None, leases: Sequence[LeaseRow], now: float, team: str, owner: bool) -> Worker:
    """As `team` may see it; `owner`: as an owner of the first team may. `leases` are its own, `now` unix seconds."""
    status, reason = _status(row, heard, leases, now)
    said = heard.heartbeat if heard is not None else None
    about, offers = (said.about, said.availability.offers) if said is not None else (row.about, row.offers)
    seen = [lease for lease in leases if owner or lease.team == team]
    return Worker(
        name=row.name,
        hostname=about.hostname if owner else "",
        address=about.address if owner else "",
        routes=[offers.platform, *(row.tags or offers.tags)],  # as the scheduler has it
        active=row.standing in ("", "registered"),
        status=status,
        reason=reason,
        last_status_update_at=row.changed_at,
        running_builds=[RunningBuild(id=one.build, number=one.number, stage=one.stage, attempt=one.attempt, since=one.since) for one in seen],
        other_builds=len(leases) - len(seen),
        last_build_started_at=row.build_started_at,
        last_build_finished_at=row.build_finished_at,
        last_checked_in=datetime.fromtimestamp(heard.at, UTC) if heard is not None else None,
        build_limit=said.slots if said is not None else row.slots,
        slots_in_use=_in_use(said, leases) if said is not None and status not in ("lost", "revoked") else len(leases),
        mode=about.mode,
        version=about.version,
        sandbox=offers.sandbox,
        images=list(offers.images),
        cache_used=said.cache_used if said is not None else 0,
        cache_limit=said.cache_limit if said is not None else 0,
        registered_at=row.registered_at,
    )


def _in_use(said: Heartbeat, leases: Sequence[LeaseRow]) -> int:
    """What it was given may be newer than what it said."""
    return min(said.slots, max(said.busy, len(leases)))


def _status(row: WorkerRow, heard: Heard | None, leases: Sequence[LeaseRow], now: float) -> tuple[WorkerStatus, str]:
    """The first that is true, and why."""
    if row.standing == "revoked":
        return "revoked", row.reason
    if row.life == "":
        return "idle", "it was never heard of"
    if row.life == "lost":
        return "lost", _LOST.get(row.lost, row.lost)
    if heard is None:
        return ("draining", row.reason) if row.standing == "drained" else ("busy" if len(leases) >= row.slots else "idle", "")
    said = heard.heartbeat
    if now - heard.at > SILENT:
        return "lost", _LOST["silent"]
    if said.trouble:
        return "error", said.trouble
    if said.draining or row.standing == "drained":
        return "draining", row.reason
    if _in_use(said, leases) >= said.slots:
        return "busy", said.limited
    if said.availability.credits:
        return "available", said.limited
    if said.about.mode == "pull":
        return "idle", f"it wants no work now: {said.limited}" if said.limited else "it wants no work now"
    return "idle", said.limited
