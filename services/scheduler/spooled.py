"""Which logs workers may forget: their spools hold them until the archive does, or until it is certain that none will."""

from collections.abc import Collection, Sequence

from libs.eventlog.log import EventLog
from proto.catalogue import decode
from proto.events.build import StageFinished, StageQueued
from proto.messages import Attempt

ASKED_AT_ONCE = 50


async def forgettable(log: EventLog, waiting: Sequence[Attempt], archived: Collection[Attempt], leased: Collection[Attempt]) -> list[Attempt]:
    """Those of `waiting` that are archived, as this instance remembers or as the log says, or that nobody will archive."""
    known = [attempt for attempt in waiting if attempt in archived]
    asked = [attempt for attempt in waiting if attempt not in archived and attempt not in leased][:ASKED_AT_ONCE]
    if asked:
        names = {a: f"artifact-log-{a.build}-{a.stage}-{a.number}" for a in asked}
        streams = await log.read_streams([*names.values(), *{f"build-{a.build}" for a in asked}])
        for attempt, name in names.items():
            if streams[name] or _never_archived(attempt, [decode(r.type, r.data) for r in streams[f"build-{attempt.build}"]]):
                known.append(attempt)
    return known


def _never_archived(attempt: Attempt, history: Sequence[object]) -> bool:
    """Whether a build's events say so: the attempt was superseded, or ended without a log."""
    for event in history:
        if isinstance(event, StageQueued) and event.stage == attempt.stage and event.attempt > attempt.number:
            return True
        if isinstance(event, StageFinished) and event.stage == attempt.stage and event.attempt == attempt.number and event.log is None:
            return True
    return False
