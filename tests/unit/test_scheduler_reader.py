"""The scheduler's board is what the log says, whatever a snapshot holds."""

import time

import pytest

from libs.eventlog.memory import MemoryLog
from proto.events.build import BuildCreated, StageQueued
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig
from services.scheduler import reader
from services.scheduler.reader import Reader
from tests.controls import write

PLAN = Plan(stages=[Stage(name="main", steps=[RunStep(name="s", config=TaskConfig(run=Run(path="true")))])])


class Kept:
    """Snapshots in memory, as `libs.eventlog.snapshots` keeps them."""

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], tuple[int, bytes]] = {}

    async def save(self, name: str, position: int, code_version: str, data: bytes) -> None:
        self.stored[name, code_version] = position, data

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None:
        return self.stored.get((name, code_version))


class Spoilt(Kept):
    """What it keeps is not what was stored."""

    async def load(self, name: str, code_version: str) -> tuple[int, bytes] | None:
        return 1, b"\x81\xa6queued\xc0"


async def queued(log: MemoryLog, *builds: str) -> None:
    for build in builds:
        made = BuildCreated(plan=PLAN), StageQueued(stage="main", attempt=1, requirements=Requirements())
        await log.append([write(f"build-{build}", *made)])


async def board(log: MemoryLog, kept: Kept) -> tuple[int, set[str]]:
    """Of one that starts now, and stores it: its position, and which builds wait."""
    one = Reader(log, kept, time.monotonic)
    await one.read()
    await one.save()
    return one.board.position, {each.attempt.build for each in one.board.queue.all()}


async def test_a_snapshot_is_of_the_epoch_in_which_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log was put back: what a scheduler stored that had read on in it meanwhile, with what is lost in its memory, is nobody's truth."""
    monkeypatch.setattr(reader, "SNAPSHOT_EVERY", 1)
    kept, before, restored = Kept(), MemoryLog(), MemoryLog()
    await queued(before, "x1", "x2")
    assert await board(before, kept) == (4, {"x1", "x2"})
    assert kept.stored and await board(MemoryLog(), kept) == (4, {"x1", "x2"}), "a snapshot saves the reading"
    await queued(restored, "x3")
    restored.raise_epoch()
    assert await board(restored, kept) == (2, {"x3"})


async def test_a_snapshot_that_cannot_be_read_is_none() -> None:
    log = MemoryLog()
    await queued(log, "x1", "x2")
    assert await board(log, Spoilt()) == (4, {"x1", "x2"})
