"""The command loop over the in-memory log: group commit, conflicts, refusals, and what a lost log leaves behind."""

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest
from msgspec import structs

from libs.eventlog.log import LogUnavailable
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from proto.events.build import BuildFinished, StepProgressed
from tests.controls import counter, write

CAUSE = Cause(team="main", correlation_id="c", causation_id="e", actor="tester")


class Counting:
    """A stream counts; `+` adds one, `=n` makes sure that it is at n, `!` is refused, `?` is a bug."""

    initial = 0

    def __init__(self):
        self.decided = []

    def stream(self, command):
        return f"build-{command[0]}"

    def decide(self, command, state):
        self.decided.append((command, state))
        match command[1]:
            case "+":
                return [progressed()]
            case "!":
                raise Refused("no", "not this")
            case "?":
                raise ZeroDivisionError
            case "big":
                return [BuildFinished(status="failed", error="x" * (1 << 20))]
            case wanted:
                return [progressed()] * (int(wanted) - state)

    def evolve(self, state, event):
        return state + 1


class Overtaken(Counting):
    """`only-at-n` does nothing elsewhere, `refused-below-n` is refused there."""

    def decide(self, command, state):
        rule, _, number = command[1].rpartition("-")
        match rule:
            case "only-at":
                return [progressed()] if state == int(number) else []
            case "refused-below" if state < int(number):
                raise Refused("no", "too early")
            case "refused-below":
                return [progressed()]
        return super().decide(command, state)


def progressed():
    return StepProgressed(stage="s", attempt=1, step="s", percent=1)


class Flaky(MemoryLog):
    """Counts its calls, and fails the next ones when told to: before or after it has recorded."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.reads = 0
        self.fail = []

    async def append(self, writes):
        self.calls.append(len(writes))
        await asyncio.sleep(0)
        when = self.fail.pop(0) if self.fail else None
        if when == "before":
            raise LogUnavailable("gone")
        outcome = await super().append(writes)
        if when == "after":
            raise LogUnavailable("gone")
        return outcome

    async def read_streams(self, streams):
        self.reads += 1
        return await super().read_streams(streams)


@asynccontextmanager
async def running(log, decider, **options):
    loop = CommandLoop(log, decider, counter(), **options)
    task = asyncio.create_task(loop.run())
    try:
        yield loop
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_what_waits_together_is_recorded_in_one_call():
    log = Flaky()
    async with running(log, Counting()) as loop:
        await asyncio.gather(*(loop.execute((n, "+"), CAUSE) for n in range(100)))
    assert log.calls == [100]
    assert await log.head() == 100


async def test_commands_on_one_stream_are_decided_one_after_another():
    log = Flaky()
    async with running(log, Counting()) as loop:
        outcomes = await asyncio.gather(*(loop.execute(("a", "+"), CAUSE) for _ in range(5)))
    assert [outcome.version for outcome in outcomes] == [1, 2, 3, 4, 5]
    assert log.reads == 1


async def test_commands_on_one_stream_with_one_cause_share_a_write():
    log = Flaky()
    async with running(log, Counting()) as loop:
        outcomes = await asyncio.gather(*(loop.execute(("a", c), CAUSE) for c in ("+", "3", "3", "!", "+")), return_exceptions=True)
    assert log.calls == [1]
    assert [getattr(outcome, "version", None) for outcome in outcomes] == [1, 3, 3, None, 4]
    assert [getattr(outcome, "position", None) for outcome in outcomes] == [1, 3, 0, None, 4]
    assert isinstance(outcomes[3], Refused)


async def test_events_of_different_causes_are_not_mixed():
    log = Flaky()
    async with running(log, Counting()) as loop:
        other = structs.replace(CAUSE, causation_id="other")
        await asyncio.gather(loop.execute(("a", "+"), CAUSE), loop.execute(("a", "+"), other), loop.execute(("a", "+"), CAUSE))
    assert [recorded.causation_id for recorded in (await log.read_streams(["build-a"]))["build-a"]] == ["e", "other", "e"]


async def test_what_rests_on_an_append_that_failed_is_not_told():
    log = Flaky()
    log.fail = ["before"]
    async with running(log, Counting()) as loop:
        results = await asyncio.gather(loop.execute(("a", "1"), CAUSE), loop.execute(("a", "1"), CAUSE), return_exceptions=True)
    assert [type(result) for result in results] == [LogUnavailable, LogUnavailable]
    assert await log.head() == 0


async def test_a_repeat_decides_nothing_and_appends_nothing():
    log = Flaky()
    async with running(log, Counting()) as loop:
        await loop.execute(("a", "3"), CAUSE)
        outcome = await loop.execute(("a", "3"), CAUSE)
    assert (outcome.position, outcome.version, list(outcome.events)) == (0, 3, [])
    assert log.calls == [1]


async def test_a_refused_command_fails_alone():
    log = Flaky()
    async with running(log, Counting()) as loop:
        results = await asyncio.gather(
            *(loop.execute((n, c), CAUSE) for n, c in enumerate("+!?+")), loop.execute(("b", "big"), CAUSE), return_exceptions=True
        )
    assert isinstance(results[1], Refused) and isinstance(results[2], ZeroDivisionError)
    assert isinstance(results[4], Refused) and results[4].kind == "too-large"
    assert await log.head() == 2


async def test_a_stream_that_another_wrote_is_loaded_and_decided_again():
    # FAULTS 71
    log = Flaky()
    decider = Counting()
    async with running(log, decider) as loop:
        await loop.execute(("a", "+"), CAUSE)
        await log.append([write("build-a", progressed(), expected=1)])
        outcome = await loop.execute(("a", "3"), CAUSE)
    assert (outcome.version, outcome.state) == (3, 3)
    assert decider.decided[-2:] == [(("a", "3"), 1), (("a", "3"), 2)]


async def test_what_decides_nothing_on_a_state_that_another_has_overtaken_is_decided_again():
    # Two instances: what seems done, or refused, may be neither by now.
    log = Flaky()
    decider = Overtaken()
    async with running(log, decider) as loop:
        assert list((await loop.execute(("a", "only-at-1"), CAUSE)).events) == []
        await loop.execute(("a", "+"), CAUSE)
        await log.append([write("build-a", progressed(), expected=1)])
        assert (await loop.execute(("a", "only-at-2"), CAUSE)).version == 3
        await log.append([write("build-a", progressed(), expected=3)])
        assert (await loop.execute(("a", "refused-below-4"), CAUSE)).version == 5


async def test_a_stream_presumed_new_costs_no_read_and_a_wrong_presumption_is_corrected():
    log = Flaky()
    await log.append([write("build-old", progressed(), expected=0)])
    async with running(log, Counting(), creates=lambda _: True) as loop:
        await loop.execute(("new", "+"), CAUSE)
        assert log.reads == 0
        assert (await loop.execute(("old", "+"), CAUSE)).version == 2


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_unavailable_log_is_told_to_the_caller_whose_repeat_records_it_once(when):
    # FAULTS 69: nothing is known after an ambiguous commit; the repeat decides on what the log says
    log = Flaky()
    log.fail = [when]
    async with running(log, Counting()) as loop:
        with pytest.raises(LogUnavailable):
            await loop.execute(("a", "1"), CAUSE)
        await loop.execute(("a", "1"), CAUSE)
    assert await log.head() == 1


async def test_whoever_waits_when_the_loop_ends_is_told():
    log = Flaky()
    async with running(log, Counting()) as loop:
        await loop.execute(("a", "+"), CAUSE)
        waiting = loop.submit(("a", "+"), CAUSE)
    with pytest.raises(LogUnavailable):
        await waiting
