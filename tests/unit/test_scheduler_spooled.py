"""Which logs workers may forget."""

import pytest

from libs.eventlog.log import NewEvent
from libs.eventlog.memory import MemoryLog
from proto.events.build import StageQueued
from proto.messages import ArchivedLog, Attempt
from proto.plan import Requirements
from services.scheduler.spooled import forgettable
from tests.controls import write


@pytest.mark.parametrize("stream", ["build-b1", "artifact-log-b1-main-1"])
@pytest.mark.parametrize("bad", ["build.of_tomorrow", "build.stage_queued"])
async def test_what_cannot_be_read_is_kept_and_others_are_told(stream: str, bad: str) -> None:
    log = MemoryLog()
    for build in ("b1", "b2"):
        await log.append([write(f"build-{build}", *(StageQueued(stage="main", attempt=n, requirements=Requirements()) for n in (1, 2)))])
    await log.append([write(stream, NewEvent("bad", bad, b'{"attempt":"x"}'))])
    answer = await forgettable(log, [Attempt("b1", "main", 1), Attempt("b2", "main", 1)], {}, ())
    assert answer == [ArchivedLog("b2", "main", 1)]
