"""Which logs workers may forget: their spools hold them until the archive does, or until it is certain that none will."""

from collections.abc import Collection, Mapping, Sequence

from libs.eventlog.log import EventLog
from proto.events.artifact import LogArchived
from proto.events.build import StageFinished, StageQueued
from proto.messages import ArchivedLog, Attempt
from services.scheduler.readable import readable

ASKED_AT_ONCE = 50


async def forgettable(
    log: EventLog, waiting: Sequence[Attempt], archived: Mapping[Attempt, ArchivedLog], leased: Collection[Attempt]
) -> list[ArchivedLog]:
    """What of `waiting` is archived, as this instance remembers or as the log says, or nobody will archive. Where that cannot be read, it is kept."""
    known = [archived[attempt] for attempt in waiting if attempt in archived]
    asked = [attempt for attempt in waiting if attempt not in archived and attempt not in leased][:ASKED_AT_ONCE]
    if asked:
        names = {a: f"artifact-log-{a.build}-{a.stage}-{a.number}" for a in asked}
        told = readable(await log.read_streams([*names.values(), *{f"build-{a.build}" for a in asked}]))
        for attempt, name in names.items():
            if name not in told:
                continue
            if told[name] and isinstance(newest := told[name][-1], LogArchived):
                known.append(archive_of(newest))
            elif _never_archived(attempt, told.get(f"build-{attempt.build}", ())):
                known.append(ArchivedLog(attempt.build, attempt.stage, attempt.number))
    return known


def archive_of(event: LogArchived) -> ArchivedLog:
    return ArchivedLog(event.build, event.stage, event.attempt, event.last, [(gap.first, gap.last) for gap in event.gaps])


def _never_archived(attempt: Attempt, history: Sequence[object]) -> bool:
    """Whether a build's events say so: the attempt was superseded, or ended without a log."""
    for event in history:
        if isinstance(event, StageQueued) and event.stage == attempt.stage and event.attempt > attempt.number:
            return True
        if isinstance(event, StageFinished) and event.stage == attempt.stage and event.attempt == attempt.number and event.log is None:
            return True
    return False
