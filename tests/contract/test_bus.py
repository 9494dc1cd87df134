"""What every Bus promises, asked of the one in memory and of JetStream."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from libs.bus.bus import Bus, BusUnavailable, Message, StreamFull, TooLarge
from libs.bus.memory import MemoryBus
from proto.topology import MAX_PAYLOAD, Consumer, Stream
from tests.controls import eventually
from tests.nats_fixture import NatsServer

WORK = Stream("WORK", ("work.>",), max_age=3600.0, max_bytes=1 << 20, full="old")
ALL = Consumer("test-all", "WORK", ("work.>",), batch=64, ack_wait=30.0)
IMPATIENT = Consumer("test-impatient", "WORK", ("work.>",), batch=64, ack_wait=0.3)


@pytest.fixture(params=["memory", "jetstream"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    if request.param == "memory":
        memory = MemoryBus()
        await memory.ensure([WORK], [])
        yield memory
    else:
        from libs.bus.jetstream import connect_jetstream

        server: NatsServer = request.getfixturevalue("fresh_nats")
        async with connect_jetstream(server.url, server.seed, "test") as connected:
            await connected.ensure([WORK], [])
            yield connected


async def take(batches: AsyncIterator[list[Message]], count: int, timeout: float = 10) -> list[Message]:
    taken: list[Message] = []
    async with asyncio.timeout(timeout):
        while len(taken) < count:
            taken += await anext(batches)
    return taken


def texts(messages: list[Message]) -> list[str]:
    return [m.data.decode() for m in messages]


async def publish(bus: Bus, subject: str, *bodies: str) -> None:
    await asyncio.gather(*[bus.publish(subject, body.encode()) for body in bodies])


async def test_everything_that_is_ready_is_handed_over_at_once(bus: Bus) -> None:
    await publish(bus, "work.a", *[str(n) for n in range(100)])
    await bus.ensure([], [ALL])
    async with bus.consume(ALL) as batches:
        sizes, seen = [], []
        async with asyncio.timeout(10):
            while len(seen) < 100:
                batch = await anext(batches)
                sizes.append(len(batch))
                seen += texts(batch)
                for message in batch:
                    message.ack()
    assert sorted(seen, key=int) == [str(n) for n in range(100)]
    assert max(sizes) > 1
    assert max(sizes) <= ALL.batch


async def test_a_message_says_where_it_stands(bus: Bus) -> None:
    acks = [await bus.publish("work.a.b", b"first"), await bus.publish("work.c", b"second")]
    assert [(a.stream, a.sequence, a.duplicate) for a in acks] == [("WORK", 1, False), ("WORK", 2, False)]
    async with bus.consume(ALL) as batches:
        messages = await take(batches, 2)
    assert [(m.subject, m.data, m.sequence, m.deliveries) for m in messages] == [("work.a.b", b"first", 1, 1), ("work.c", b"second", 2, 1)]


async def test_what_is_not_acknowledged_comes_again(bus: Bus) -> None:
    await publish(bus, "work.a", "one")
    async with bus.consume(IMPATIENT) as batches:
        [first] = await take(batches, 1)
        [second] = await take(batches, 1)
        assert (second.data, second.sequence, second.deliveries) == (first.data, first.sequence, 2)
        second.ack()


async def test_what_is_handed_back_comes_again_at_once_or_when_asked(bus: Bus) -> None:
    await publish(bus, "work.a", "one")
    async with bus.consume(ALL) as batches:
        [message] = await take(batches, 1)
        message.nak()
        [message] = await take(batches, 1, timeout=5)
        assert message.deliveries == 2
        before = asyncio.get_running_loop().time()
        message.nak(0.3)
        [message] = await take(batches, 1, timeout=5)
        assert message.deliveries == 3
        assert asyncio.get_running_loop().time() - before > 0.25
        message.ack()


async def test_what_is_given_up_or_acknowledged_never_comes_again(bus: Bus) -> None:
    await publish(bus, "work.a", "given up", "acknowledged", "kept waiting")
    async with bus.consume(IMPATIENT) as batches:
        for message in await take(batches, 3):
            if message.data == b"given up":
                message.term()
            elif message.data == b"acknowledged":
                message.ack()
        again = await take(batches, 2)
    assert texts(again) == ["kept waiting", "kept waiting"]


async def test_a_later_instance_goes_on_where_the_others_were(bus: Bus) -> None:
    await publish(bus, "work.a", "one", "two")
    async with bus.consume(ALL) as batches:
        for message in await take(batches, 2):
            message.ack()
    await publish(bus, "work.a", "three")
    async with bus.consume(ALL) as batches:
        assert texts(await take(batches, 1)) == ["three"]


async def test_instances_share_what_there_is(bus: Bus) -> None:
    seen: list[str] = []

    async def instance() -> None:
        async with bus.consume(ALL) as batches:
            async for batch in batches:
                for message in batch:
                    message.ack()
                seen.extend(texts(batch))

    instances = [asyncio.create_task(instance()) for _ in range(3)]
    for n in range(0, 300, 10):
        await publish(bus, "work.a", *[str(k) for k in range(n, n + 10)])
    await eventually(lambda: len(seen) >= 300)
    for task in instances:
        task.cancel()
    await asyncio.gather(*instances, return_exceptions=True)
    assert sorted(seen, key=int) == [str(n) for n in range(300)]


async def test_a_consumer_gets_only_its_subjects(bus: Bus) -> None:
    choosy = Consumer("test-choosy", "WORK", ("work.a.>", "work.*.*.wanted"))
    await publish(bus, "work.b.x", "no")
    await publish(bus, "work.a.x", "yes")
    await publish(bus, "work.b.x.wanted", "wanted")
    await publish(bus, "work.b.x.unwanted", "no")
    async with bus.consume(choosy) as batches:
        assert texts(await take(batches, 2)) == ["yes", "wanted"]


async def test_a_message_id_is_stored_once(bus: Bus) -> None:
    first = await bus.publish("work.a", b"one", "id-1")
    again = await bus.publish("work.a", b"one", "id-1")
    other = await bus.publish("work.a", b"one", "id-2")
    assert (first.duplicate, again.duplicate, other.duplicate) == (False, True, False)
    assert again.sequence == first.sequence
    state = await bus.stream_state("WORK")
    assert state is not None
    assert state.messages == 2


async def test_a_tail_has_everything_in_order_and_then_what_comes(bus: Bus) -> None:
    await publish(bus, "work.a.1", *[str(n) for n in range(200)])
    await publish(bus, "work.b.1", "not asked for")
    async with bus.tail("WORK", "work.a.*") as batches:
        old = await take(batches, 200)
        await publish(bus, "work.b.1", "not asked for")
        await publish(bus, "work.a.2", "new")
        new = await take(batches, 1)
    assert texts(old) == [str(n) for n in range(200)]
    assert [m.sequence for m in old] == list(range(1, 201))
    assert [(m.subject, m.data, m.sequence) for m in new] == [("work.a.2", b"new", 203)]


async def test_a_tail_goes_on_after_a_sequence(bus: Bus) -> None:
    await publish(bus, "work.a", "one", "two", "three")
    async with bus.tail("WORK", "work.a", after_sequence=2) as batches:
        assert texts(await take(batches, 1)) == ["three"]


async def test_the_last_message_and_a_purge(bus: Bus) -> None:
    assert await bus.last("WORK", "work.a") is None
    await publish(bus, "work.a.1", "one", "two")
    await publish(bus, "work.b.1", "other")
    last = await bus.last("WORK", "work.a.*")
    assert last is not None
    assert (last.subject, last.data, last.sequence) == ("work.a.1", b"two", 2)
    await bus.purge("WORK", "work.a.>", 1)
    kept = await bus.stream_state("WORK")
    assert kept is not None and kept.messages == 2
    await bus.purge("WORK", "work.a.>")
    assert await bus.last("WORK", "work.a.*") is None
    state = await bus.stream_state("WORK")
    assert state is not None
    assert (state.messages, state.first_sequence, state.last_sequence) == (1, 3, 3)


async def test_the_state_of_a_stream_that_is_not_there(bus: Bus) -> None:
    assert await bus.stream_state("NOTHING") is None
    empty = await bus.stream_state("WORK")
    assert empty is not None
    assert (empty.messages, empty.first_sequence, empty.last_sequence) == (0, 1, 0)


async def test_what_is_sent_reaches_whoever_listens(bus: Bus) -> None:
    async with bus.listen("presence.*") as everyone, bus.listen("presence.w1") as one:
        await bus.send("presence.w1", b"hello")
        await bus.send("presence.w2", b"hi")
        await bus.send("elsewhere.w2", b"no")
        async with asyncio.timeout(5):
            heard = [await anext(everyone), await anext(everyone)]
            alone = await anext(one)
    assert [(m.subject, m.data) for m in heard] == [("presence.w1", b"hello"), ("presence.w2", b"hi")]
    assert (alone.subject, alone.data) == ("presence.w1", b"hello")


async def test_what_is_too_large_fails_at_the_sender(bus: Bus) -> None:
    """FAULTS 65"""
    with pytest.raises(TooLarge):
        await bus.publish("work.a", b"x" * (MAX_PAYLOAD + 1))
    with pytest.raises(TooLarge):
        await bus.send("presence.a", b"x" * (MAX_PAYLOAD + 1))
    assert (await bus.publish("work.a", b"x" * (MAX_PAYLOAD - 4096))).sequence == 1


@pytest.mark.parametrize("subject", ["", "a b", "a..b", ".a", "a.*", "a.>", "work." + "x" * 4096])
async def test_what_is_no_subject_is_refused_and_the_connection_stays(bus: Bus, subject: str) -> None:
    with pytest.raises(ValueError, match="not a subject"):
        bus.publish(subject, b"x")
    assert (await bus.publish("work." + "x" * 3000, b"x")).sequence == 1
    assert bus.connections == 1


async def test_a_full_stream_refuses_or_forgets_as_it_was_told(bus: Bus) -> None:
    await bus.ensure([Stream("REFUSES", ("refuses.>",), 3600.0, 4096, "new"), Stream("FORGETS", ("forgets.>",), 3600.0, 4096, "old")], [])
    with pytest.raises(StreamFull):
        for _ in range(8):
            await bus.publish("refuses.a", b"x" * 1000)
    await bus.purge("REFUSES", "refuses.>")
    await bus.publish("refuses.a", b"x" * 1000)
    for _ in range(8):
        await bus.publish("forgets.a", b"x" * 1000)
    state = await bus.stream_state("FORGETS")
    assert state is not None
    assert state.last_sequence == 8
    assert 0 < state.messages < 5


async def test_what_no_stream_takes_is_not_acknowledged(bus: Bus) -> None:
    with pytest.raises(BusUnavailable):
        await bus.publish("nowhere.a", b"x")


async def test_ensuring_again_changes_what_is_different_and_keeps_the_rest(bus: Bus) -> None:
    await bus.ensure([], [ALL])
    await publish(bus, "work.a", "one")
    async with bus.consume(ALL) as batches:
        for message in await take(batches, 1):
            message.ack()
    await bus.ensure([WORK._replace(max_age=7200.0)], [ALL._replace(ack_wait=20.0)])
    await publish(bus, "work.a", "two")
    async with bus.consume(ALL._replace(ack_wait=20.0)) as batches:
        assert texts(await take(batches, 1)) == ["two"]


async def test_a_question_is_answered_by_whoever_answers_there_and_fails_where_nobody_does(bus: Bus) -> None:
    async def answer(subject: str, data: bytes) -> bytes:
        return f"{subject} {data.decode()}".encode()

    with pytest.raises(BusUnavailable):
        await bus.ask("questions.main", b"early")
    async with bus.answering("questions.*", "all", answer), bus.answering("questions.*", "all", answer):
        assert await asyncio.gather(*[bus.ask("questions.main", b"%d" % n) for n in range(9)]) == [b"questions.main %d" % n for n in range(9)]
        with pytest.raises(TooLarge):
            await bus.ask("questions.main", bytes(MAX_PAYLOAD + 1))
    with pytest.raises(BusUnavailable):
        await bus.ask("questions.main", b"late")
