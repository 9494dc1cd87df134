"""What the log in memory can do beyond the contract: other services' eyes, outages, restores."""

import pytest

from libs.eventlog.log import LogUnavailable, NewEvent, NotOwner
from libs.eventlog.memory import MemoryLog
from tests.controls import write


async def test_services_share_one_log_and_append_to_their_own_categories() -> None:
    builds = MemoryLog("builds")
    scheduler = builds.acting_as("scheduler")
    await builds.append([write("build-1", NewEvent("a", "t", b"{}"))])
    await scheduler.append([write("lease-1", NewEvent("b", "t", b"{}"))])
    with pytest.raises(NotOwner):
        await scheduler.append([write("build-1", NewEvent("c", "t", b"{}"))])
    assert await builds.read(0, 9) == await scheduler.read(0, 9)
    assert await builds.head() == 2


async def test_an_outage_is_felt_by_every_call() -> None:
    log = MemoryLog()
    log.available = False
    for question in (log.head(), log.epoch(), log.read(0, 1), log.read_streams(["build-1"]), log.append([])):
        with pytest.raises(LogUnavailable):
            await question
    log.available = True
    log.raise_epoch()
    assert await log.epoch() == 2
