"""What the bus in memory can be told to do to a test, and how subjects match."""

import asyncio
import random

import pytest

from libs.bus.bus import BusUnavailable, matches
from libs.bus.memory import MemoryBus
from proto.topology import Consumer, Stream

WORK = Stream("WORK", ("work.>",), max_age=3600.0, max_bytes=1 << 20, full="old")
ALL = Consumer("test-all", "WORK", ("work.>",))


@pytest.mark.parametrize(
    ("pattern", "subject", "yes"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*.c", "a.b.c", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*", "a.b", False),
        ("a.*.*.x", "a.b.c.y", False),
    ],
)
def test_a_pattern_matches_as_nats_says(pattern: str, subject: str, yes: bool) -> None:
    assert matches(pattern, subject) is yes


async def test_disorder_shuffles_a_batch_and_loses_nothing() -> None:
    bus = MemoryBus(disorder=random.Random(1))
    await bus.ensure([WORK], [])
    for n in range(20):
        await bus.publish("work.a", b"%d" % n)
    async with bus.consume(ALL) as batches:
        numbers = [int(m.data) for m in await anext(batches)]
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(20))


async def test_an_outage_fails_whoever_sends_and_ends_by_itself() -> None:
    bus = MemoryBus()
    await bus.ensure([WORK], [])
    bus.connected = False
    with pytest.raises(BusUnavailable):
        await bus.publish("work.a", b"x")
    with pytest.raises(BusUnavailable):
        await bus.send("work.a", b"x")
    with pytest.raises(BusUnavailable):
        await bus.stream_state("WORK")
    waiting = asyncio.create_task(bus.wait_connected())
    bus.connected = True
    await waiting
    assert bus.connections == 2
    assert (await bus.publish("work.a", b"x")).sequence == 1


async def test_a_stream_that_was_lost_starts_anew() -> None:
    bus = MemoryBus()
    await bus.ensure([WORK], [])
    await bus.publish("work.a", b"old", "id")
    before = await bus.stream_state("WORK")
    async with bus.consume(ALL) as batches, bus.tail("WORK", "work.>") as tail:
        assert [m.data for m in await anext(batches)] == [b"old"]
        assert [m.data for m in await anext(tail)] == [b"old"]
        bus.lose("WORK")
        ack = await bus.publish("work.a", b"new", "id")
        assert (ack.sequence, ack.duplicate) == (1, False)
        assert [m.data for m in await anext(batches)] == [b"new"]
        assert [m.data for m in await anext(tail)] == [b"new"]
    after = await bus.stream_state("WORK")
    assert before is not None
    assert after is not None
    assert before.created != after.created
