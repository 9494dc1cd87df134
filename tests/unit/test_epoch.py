"""A log that becomes another under a process which remembers the first one: it ends, whenever that happens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from libs.eventlog.log import LogUnavailable
from libs.eventlog.memory import MemoryLog
from libs.runtime.epoch import Epoch, begin_epoch
from tests.controls import eventually

Begin = Callable[[MemoryLog], Awaitable[tuple[Epoch, asyncio.Event]]]


@pytest.fixture
async def begin(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Begin]:
    """An epoch that is known, if it can be; then, before anybody looks again, whatever the test does; and whether the process was told to end."""
    monkeypatch.setattr("libs.runtime.epoch.EVERY", 0.01)
    monkeypatch.setattr("libs.runtime.epoch.FIRST", 0.01)
    async with AsyncExitStack() as stack:

        async def begun(log: MemoryLog) -> tuple[Epoch, asyncio.Event]:
            ended = asyncio.Event()
            epoch = await begin_epoch(log, ended.set)
            watching = asyncio.create_task(epoch.watch())
            stack.callback(watching.cancel)
            return epoch, ended

        yield begun


async def test_what_is_raised_while_a_process_starts_ends_it(begin: Begin) -> None:
    log = MemoryLog()
    epoch, ended = await begin(log)
    log.raise_epoch()
    assert epoch.number == 1
    await asyncio.wait_for(ended.wait(), 10)


async def test_nobody_is_told_an_epoch_that_is_not_known(begin: Begin) -> None:
    log = MemoryLog()
    log.available = False
    epoch, ended = await begin(log)
    with pytest.raises(LogUnavailable):
        await epoch.load()
    with pytest.raises(LogUnavailable):
        _ = epoch.number
    log.available = True
    await epoch.load()
    assert epoch.number == 1 and not ended.is_set()


async def test_one_that_began_without_the_database_comes_to_know_it_and_ends_when_it_is_raised(begin: Begin) -> None:
    log = MemoryLog()
    log.available = False
    epoch, ended = await begin(log)
    log.available = True
    await eventually(lambda: epoch._number == 1)
    assert not ended.is_set()
    log.raise_epoch()
    await asyncio.wait_for(ended.wait(), 10)
