"""Message in, commands out."""

from collections.abc import Callable

import msgspec

from libs.runtime.decisions import Cause
from proto.envelope import Fact, decode_cloud_event, fact
from proto.events.lease import LeaseExpired
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.messages import Attempt, Reports
from services.builds.commands import AbortBuild, Command, CreateBuild, LoseAttempt, RecordReports

ACTOR = "builds"

_REPORTS = msgspec.msgpack.Decoder(Reports)


def on_event(data: bytes, epoch: int) -> list[tuple[Command, Cause]]:
    """A message of EVENTS. One of an earlier epoch of the log may tell of what never was; if it is still so, it is published again."""
    event = decode_cloud_event(data)
    return on_fact(fact(event.recorded())) if event.epoch >= epoch else []


def on_fact(happened: Fact) -> list[tuple[Command, Cause]]:
    """The event itself, from wherever it came."""
    command = _command(happened)
    return [(command, _cause(happened))] if command is not None else []


def _command(happened: Fact) -> Command | None:
    match happened.event:
        case BuildRequested() as event:
            return CreateBuild(build=event.build, plan=event.plan, inputs=event.inputs, name=event.name)
        case BuildAbortRequested() as event:
            return AbortBuild(build=event.build)
        case LeaseExpired() as event:
            return LoseAttempt(build=happened.subject_id, stage=event.stage, attempt=event.attempt, evidence=event.evidence)
        case _:
            return None


def _cause(happened: Fact) -> Cause:
    return Cause(team=happened.team, correlation_id=happened.correlation_id, causation_id=happened.event_id, actor=ACTOR)


class Lease(msgspec.Struct, frozen=True):
    """Whom an attempt was leased to, and where that came from."""

    worker: str
    team: str
    correlation_id: str
    event_id: str


def on_report(subject: str, data: bytes, lease_of: Callable[[Attempt], Lease | None]) -> list[tuple[Command, Cause]]:
    """A message of REPORTS, `reports.<worker>.<build>`. The worker is the subject's, never the body's."""
    worker = subject.split(".")[1]
    reports = _REPORTS.decode(data)
    attempt = reports.attempt
    lease = lease_of(attempt)
    command = RecordReports(
        build=attempt.build,
        stage=attempt.stage,
        attempt=attempt.number,
        worker=worker,
        leased_to=lease.worker if lease else "",
        first=reports.first,
        bodies=reports.bodies,
    )
    cause = Cause(
        team=lease.team if lease else "",
        correlation_id=lease.correlation_id if lease else "",
        causation_id=lease.event_id if lease else "",
        actor=f"worker:{worker}",
    )
    return [(command, cause)]
