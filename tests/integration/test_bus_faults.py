"""The bus under what FAULTS lists for it: nothing that was promised is lost, nothing hangs, and it comes back by itself."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from libs.bus.api import Reply
from libs.bus.bus import BusUnavailable, TooLarge
from libs.bus.jetstream import JetStreamBus, connect_jetstream
from libs.bus.mailbox import LISTEN_BUFFER
from proto.topology import MAX_PAYLOAD, Consumer, Stream
from tests.controls import eventually
from tests.nats_fixture import NatsServer

WORK = Stream("WORK", ("work.>",), max_age=3600.0, max_bytes=64 << 20, full="old")
ALL = Consumer("test-all", "WORK", ("work.>",), batch=64, ack_wait=2.0)


@asynccontextmanager
async def connected(server: NatsServer) -> AsyncIterator[JetStreamBus]:
    async with connect_jetstream(server.url, server.seed, "test") as bus:
        await bus.ensure([WORK], [ALL])
        yield bus


@asynccontextmanager
async def background(coroutine: Callable[[], object]) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine())  # type: ignore[arg-type]
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Follower:
    """Consumes and tails, and remembers what it was given."""

    def __init__(self, bus: JetStreamBus, consumer: Consumer = ALL) -> None:
        self.bus = bus
        self.consumer = consumer
        self.consumed: set[str] = set()
        self.tailed: list[str] = []

    async def consume(self) -> None:
        async with self.bus.consume(self.consumer) as batches:
            async for batch in batches:
                for message in batch:
                    self.consumed.add(message.data.decode())
                    message.ack()

    async def tail(self) -> None:
        async with self.bus.tail("WORK", "work.>") as batches:
            async for batch in batches:
                self.tailed += [message.data.decode() for message in batch]


async def insist(bus: JetStreamBus, body: str) -> None:
    """What every publisher of Penstock does: again, with the same id, until there is an ack."""
    while True:
        try:
            await bus.publish("work.a", body.encode(), body)
            return
        except BusUnavailable:
            await bus.wait_connected()
            await asyncio.sleep(0.01)


async def test_nothing_acknowledged_is_lost_while_the_server_is_killed_again_and_again(fresh_nats: NatsServer) -> None:
    """FAULTS 57"""
    kills = 20
    published: list[str] = []
    stop = asyncio.Event()
    async with connected(fresh_nats) as bus:
        follower = Follower(bus)

        async def publish(publisher: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                body = f"{publisher}-{number}"
                await insist(bus, body)
                published.append(body)

        publishers = [asyncio.create_task(publish(n)) for n in range(8)]
        async with background(follower.consume), background(follower.tail):
            for _ in range(kills):
                seen = len(published)
                await eventually(lambda seen=seen: len(published) > seen + 20)
                await asyncio.to_thread(fresh_nats.restart)
            stop.set()
            await asyncio.gather(*publishers)
            await eventually(lambda: follower.consumed == set(published), timeout=30)
            await eventually(lambda: set(follower.tailed) == set(published), timeout=30)
        assert len(follower.tailed) == len(set(follower.tailed))
        assert bus.connections == kills + 1


async def test_a_publisher_hears_at_once_that_the_connection_is_gone(fresh_nats: NatsServer) -> None:
    async with connected(fresh_nats) as bus:
        fresh_nats.pause()
        futures = [bus.publish("work.a", b"x") for _ in range(10)]
        await asyncio.sleep(0)
        fresh_nats.kill()
        async with asyncio.timeout(2):
            outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(outcome, BusUnavailable) for outcome in outcomes)
        with pytest.raises(BusUnavailable):
            await bus.publish("work.a", b"x")
        with pytest.raises(BusUnavailable):
            await bus.send("presence.a", b"x")
        with pytest.raises(BusUnavailable):
            await bus.stream_state("WORK")
        assert not bus.connected
        await asyncio.to_thread(fresh_nats.start)
        async with asyncio.timeout(5):
            await bus.wait_connected()


async def test_a_server_that_says_nothing_more_is_given_up_and_found_again(fresh_nats: NatsServer) -> None:
    """A stopped process, or a partition: the connection stands, and no answer comes."""
    async with connected(fresh_nats) as bus:
        follower = Follower(bus)
        async with background(follower.consume):
            await insist(bus, "before")
            await eventually(lambda: "before" in follower.consumed)
            fresh_nats.pause()
            async with asyncio.timeout(9):
                with pytest.raises(BusUnavailable):
                    await bus.publish("work.a", b"x")
            await eventually(lambda: not bus.connected, timeout=9)
            fresh_nats.resume()
            await insist(bus, "after")
            await eventually(lambda: "after" in follower.consumed)


async def test_who_begins_to_listen_or_to_answer_while_the_server_is_stopped_hears_it_afterwards(fresh_nats: NatsServer) -> None:
    """Nobody dies of a server that says nothing just then."""

    async def answer(subject: str, data: bytes) -> bytes:
        return data * 2

    async with connected(fresh_nats) as bus:
        fresh_nats.pause()
        async with bus.listen("said.*") as messages, bus.answering("asked", "test", answer):
            fresh_nats.resume()

            async def answered() -> bytes:
                try:
                    return await bus.ask("asked", b"x")
                except BusUnavailable:
                    return b""

            assert await eventually(answered, timeout=30) == b"xx"
            await bus.send("said.now", b"words")
            assert (await anext(messages)).data == b"words"


async def test_a_deleted_stream_is_made_again_and_takes_what_comes(fresh_nats: NatsServer) -> None:
    """FAULTS 59: refilling is the relay's; here the stream and its consumers are back, and everybody goes on."""
    async with connected(fresh_nats) as bus, connected(fresh_nats) as other:
        follower = Follower(bus)
        async with background(follower.consume), background(follower.tail):
            await insist(bus, "before")
            await eventually(lambda: "before" in follower.consumed and "before" in follower.tailed)
            before = await bus.stream_state("WORK")
            await other._api.ask("STREAM.DELETE.WORK", {}, Reply)
            await insist(bus, "after")
            await eventually(lambda: "after" in follower.consumed and "after" in follower.tailed)
            after = await bus.stream_state("WORK")
        assert before is not None
        assert after is not None
        assert before.created != after.created
        assert after.last_sequence == 1


async def test_a_stream_that_is_deleted_while_nobody_publishes_is_made_again(fresh_nats: NatsServer) -> None:
    """FAULTS 59"""
    async with connected(fresh_nats) as bus, connected(fresh_nats) as other:
        follower = Follower(bus)
        async with background(follower.consume):
            await insist(bus, "before")
            await eventually(lambda: "before" in follower.consumed)
            await other._api.ask("STREAM.DELETE.WORK", {}, Reply)

            async def is_back() -> bool:
                return await bus.stream_state("WORK") is not None

            await eventually(is_back)


async def test_a_deleted_consumer_is_made_again(fresh_nats: NatsServer) -> None:
    """FAULTS 60"""
    async with connected(fresh_nats) as bus, connected(fresh_nats) as other:
        follower = Follower(bus)
        async with background(follower.consume):
            await insist(bus, "before")
            await eventually(lambda: "before" in follower.consumed)
            await other._api.ask(f"CONSUMER.DELETE.WORK.{ALL.name}", {}, Reply)
            await insist(bus, "after")
            await eventually(lambda: "after" in follower.consumed)


async def test_what_is_there_is_looked_at_and_not_made_again(fresh_nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make a stream or a durable consumer that is there has the server write its files anew."""
    monkeypatch.setattr("libs.bus.jetstream.RECHECK", 0.01)
    async with connected(fresh_nats) as bus, connected(fresh_nats) as other, other.listen("$JS.API.>") as calls:
        follower, heard = Follower(bus), list[str]()

        async def listen() -> None:
            async for call in calls:
                heard.append(call.subject.removeprefix("$JS.API."))

        async with background(listen), background(follower.consume):
            await eventually(lambda: heard.count(f"CONSUMER.INFO.WORK.{ALL.name}") > 5)
            await insist(bus, "one")
            async with background(follower.tail):
                await eventually(lambda: follower.tailed == ["one"])
        assert {call.rpartition(".tail-")[0] or call for call in heard if "CREATE" in call or "UPDATE" in call} == {"CONSUMER.CREATE.WORK"}


async def test_a_tail_outlives_its_consumer_without_a_gap_or_a_repeat(fresh_nats: NatsServer) -> None:
    async with connected(fresh_nats) as bus, connected(fresh_nats) as other:
        follower = Follower(bus)
        async with background(follower.tail):
            for number in range(5):
                await insist(bus, str(number))
                await eventually(lambda number=number: len(follower.tailed) == number + 1)
                names = json.loads(await other._connection.ask("$JS.API.CONSUMER.NAMES.WORK", b"", lambda headers, data: data))["consumers"]
                [tail] = [name for name in names if name.startswith("tail-")]
                await other._api.ask(f"CONSUMER.DELETE.WORK.{tail}", {}, Reply)
        assert follower.tailed == ["0", "1", "2", "3", "4"]
        names = json.loads(await other._connection.ask("$JS.API.CONSUMER.NAMES.WORK", b"", lambda headers, data: data))["consumers"]
        assert names == [ALL.name]


async def test_a_consumer_ahead_of_its_stream_is_made_anew(fresh_nats: NatsServer) -> None:
    """FAULTS 60: the stream lost its end (a power cut), its consumer's state did not."""
    folder = next(iter([fresh_nats.store / "jetstream" / "CORE" / "streams" / "WORK"]))
    async with connected(fresh_nats) as bus:
        follower = Follower(bus)
        async with background(follower.consume):
            await insist(bus, "kept")
            await eventually(lambda: "kept" in follower.consumed)
            await asyncio.to_thread(fresh_nats.stop)
            shutil.copytree(folder / "msgs", fresh_nats.folder / "msgs")
            await asyncio.to_thread(fresh_nats.start)
            for number in range(20):
                await insist(bus, f"lost-{number}")
            await eventually(lambda: len(follower.consumed) == 21)
            await asyncio.to_thread(fresh_nats.stop)
            shutil.rmtree(folder / "msgs")
            shutil.move(fresh_nats.folder / "msgs", folder / "msgs")
            await asyncio.to_thread(fresh_nats.start)
            await bus.wait_connected()
            state = await bus.stream_state("WORK")
            assert state is not None
            assert state.last_sequence == 1
            await insist(bus, "new")
            await eventually(lambda: "new" in follower.consumed)


async def test_an_emptied_jetstream_folder_is_filled_with_streams_again(fresh_nats: NatsServer) -> None:
    async with connected(fresh_nats) as bus:
        follower = Follower(bus)
        async with background(follower.consume), background(follower.tail):
            for body in ("one", "two"):
                await insist(bus, body)
            await eventually(lambda: len(follower.consumed) == 2 and len(follower.tailed) == 2)
            fresh_nats.kill()
            fresh_nats.wipe()
            await asyncio.to_thread(fresh_nats.start)
            await insist(bus, "one")
            await eventually(lambda: follower.tailed == ["one", "two", "one"])
            await insist(bus, "three")
            await eventually(lambda: "three" in follower.consumed and follower.tailed[-1] == "three")


async def test_a_duplicate_after_the_window_is_a_second_message(fresh_nats: NatsServer) -> None:
    """FAULTS 64: so consumers skip what they know; the window only saves work."""
    async with connected(fresh_nats) as bus:
        await bus.ensure([WORK._replace(dedup_window=0.2)], [])
        first = await bus.publish("work.a", b"x", "id")
        assert (await bus.publish("work.a", b"x", "id")).duplicate

        async def stored_again() -> bool:
            return not (await bus.publish("work.a", b"x", "id")).duplicate

        await eventually(stored_again)
        state = await bus.stream_state("WORK")
        assert state is not None
        assert state.last_sequence == first.sequence + 1


async def test_too_large_is_known_before_it_is_sent_and_the_connection_stays(fresh_nats: NatsServer) -> None:
    """FAULTS 65: a server that is sent too much hangs up."""
    async with connected(fresh_nats) as bus:
        with pytest.raises(TooLarge):
            await bus.publish("work.a", b"x" * MAX_PAYLOAD, "with-an-id")
        assert (await bus.publish("work.a", b"x" * MAX_PAYLOAD)).sequence == 1
        assert bus.connections == 1


async def test_a_message_without_headers_on_a_foreign_subject_is_handed_over_as_it_is(fresh_nats: NatsServer) -> None:
    """FAULTS 62: the bus delivers bytes; whoever decodes them parks them."""
    wide = Stream("WIDE", ("wide.>",), max_age=3600.0, max_bytes=1 << 20, full="old")
    consumer = Consumer("test-wide", "WIDE", ("wide.>",))
    async with connected(fresh_nats) as bus:
        await bus.ensure([wide], [])
        bus._connection.write(b"wide.\xff\xfe.x", b"", b"\x00\xff")
        async with asyncio.timeout(5), bus.consume(consumer) as batches:
            [message] = await anext(batches)
            assert message.data == b"\x00\xff"
            assert message.subject.encode(errors="surrogateescape") == b"wide.\xff\xfe.x"
            message.term()


async def test_who_reads_nothing_is_cut_off_and_named_and_others_lose_nothing(fresh_nats: NatsServer) -> None:
    """FAULTS 68: the server keeps 64 MiB for a connection. Who was cut off says so, connects again and hears again."""
    flood = 80
    async with connected(fresh_nats) as speaker, connected(fresh_nats) as quick, connected(fresh_nats) as slow:
        follower = Follower(quick)
        async with background(follower.consume), quick.listen("flood.>") as heard, slow.listen("flood.>") as late:
            wire = slow._connection._wire
            assert wire is not None
            with capture_logs() as said:
                wire._transport._io_writer.transport.pause_reading()  # type: ignore[union-attr]
                for number in range(flood):
                    await speaker.send("flood.x", b"%d " % number + bytes(1 << 20))
                    await insist(speaker, str(number))
                async with asyncio.timeout(20):
                    assert [int((await anext(heard)).data.partition(b" ")[0]) for _ in range(flood)] == list(range(flood))
                    await eventually(lambda: len(follower.consumed) == flood)
                    assert "Slow Consumer" in fresh_nats.log
                    await eventually(lambda: slow.connections == 2, timeout=15)
            assert [line["connection"] for line in said if line["event"] == "the bus hung up" and line["log_level"] == "warning"] == ["test"]
            await slow._connection.flush()
            await speaker.send("flood.x", b"again")
            async with asyncio.timeout(5):
                while (await anext(late)).data != b"again":
                    pass
        assert (speaker.connections, quick.connections) == (1, 1)


async def test_a_reader_that_is_too_slow_loses_the_oldest_and_it_is_said(fresh_nats: NatsServer) -> None:
    """FAULTS 68: of two readers of one process; a warning, and a figure."""
    registry = CollectorRegistry()
    count = LISTEN_BUFFER + 1000
    async with connected(fresh_nats) as bus, bus.listen("noise") as slow, bus.listen("noise") as quick:
        bus.measure(registry)
        with capture_logs() as said:
            async with asyncio.timeout(20):
                for number in range(count):
                    await bus.send("noise", b"%d" % number)
                    assert int((await anext(quick)).data) == number
        assert int((await anext(slow)).data) == 1000
        assert registry.get_sample_value("penstock_bus_dropped") == bus.dropped == 1000
        [warning] = [line for line in said if line["log_level"] == "warning"]
        assert (warning["subject"], warning["dropped"]) == ("noise", 1)


async def test_it_starts_before_the_server_does(fresh_nats: NatsServer) -> None:
    fresh_nats.kill()
    async with connect_jetstream(fresh_nats.url, fresh_nats.seed, "early", patience=0.1) as bus:
        assert not bus.connected
        follower = Follower(bus)
        async with background(follower.consume), bus.listen("presence.*") as heard:
            await asyncio.to_thread(fresh_nats.start)
            async with asyncio.timeout(5):
                await bus.wait_connected()
                await bus.ensure([WORK], [])
                await insist(bus, "hello")
                await eventually(lambda: "hello" in follower.consumed)
                await bus.send("presence.w1", b"here")
                assert (await anext(heard)).data == b"here"


async def test_closing_leaves_no_task_behind(fresh_nats: NatsServer) -> None:
    before = asyncio.all_tasks()
    async with connected(fresh_nats) as bus:
        async with bus.consume(ALL) as batches, bus.tail("WORK", "work.>") as tail:
            await insist(bus, "x")
            await anext(batches)
            await anext(tail)
        abandoned = bus.publish("work.a", b"x")
    assert asyncio.all_tasks() == before
    assert abandoned.done()


async def test_what_was_fetched_but_not_handed_over_goes_to_the_next_instance_at_once(fresh_nats: NatsServer) -> None:
    patient = ALL._replace(ack_wait=60.0)
    async with connected(fresh_nats) as bus:
        async with bus.consume(patient) as batches:
            await insist(bus, "first")
            [message] = await anext(batches)
            message.ack()
            await asyncio.gather(*[bus.publish("work.a", b"%d" % n) for n in range(10)])
        follower = Follower(bus, patient)
        async with background(follower.consume):
            await eventually(lambda: len(follower.consumed) == 10, timeout=5)


async def test_subjects_and_ids_cannot_smuggle_words_of_the_protocol(fresh_nats: NatsServer) -> None:
    async with connected(fresh_nats) as bus:
        for subject in ("", "a b", "a\r\nPUB b 0", "a..b", ".a", "a.", "a.*", "a.>", "a\tb"):
            with pytest.raises(ValueError, match="not a subject"):
                bus.publish(subject, b"x")
        for msg_id in ("a b", "a\r\nNats-Rollup: all"):
            with pytest.raises(ValueError, match="not a message id"):
                bus.publish("work.a", b"x", msg_id)
