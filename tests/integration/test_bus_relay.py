"""The relay between a log and a bus: whatever happens to EVENTS, it holds what the log holds again (FAULTS 57-60, 64, 73)."""

import asyncio
import itertools
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from msgspec import structs
from prometheus_client import CollectorRegistry

from libs.bus.bus import Bus, BusUnavailable, Message
from libs.bus.jetstream import connect_jetstream
from libs.bus.memory import MemoryBus
from libs.eventlog.checkpoints import RelayCheckpoint, RelayCheckpoints
from libs.eventlog.leadership import Leadership
from libs.eventlog.log import LogUnavailable, NewEvent
from libs.eventlog.memory import MemoryLog
from libs.eventlog.postgres import open_postgres_log
from libs.runtime.leftout import MOST
from libs.runtime.relay import Relay
from proto.envelope import CloudEvent, decode_cloud_event
from proto.events.team import TeamCreated
from proto.topology import MAX_EVENT, MAX_NAME, STREAMS
from tests.controls import eventually, write
from tests.nats_fixture import SEEDS, NatsServer
from tests.postgres_fixture import Database

EVENTS = next(stream for stream in STREAMS if stream.name == "EVENTS")


class Checkpoints:
    """One row, kept in memory, with the rule of the real one: an earlier term's word no longer counts."""

    def __init__(self) -> None:
        self.row: RelayCheckpoint | None = None

    async def load(self) -> RelayCheckpoint | None:
        return self.row

    async def save(self, checkpoint: RelayCheckpoint) -> bool:
        if self.row is not None and self.row.term > checkpoint.term:
            return False
        self.row = checkpoint
        return True


class Leader:
    def __init__(self, term: int = 1) -> None:
        self.term: int | None = term

    async def wait(self) -> int:
        while self.term is None:
            await asyncio.sleep(0.01)
        return self.term


class Outbox:
    """A log that grows, its relay, and what is in EVENTS."""

    def __init__(self, bus: Bus, log: MemoryLog | None = None, checkpoints: Checkpoints | None = None) -> None:
        self.bus = bus
        self.log = log or MemoryLog()
        self.checkpoints = checkpoints or Checkpoints()
        self.numbers = itertools.count(1)

    def relay(self, term: int = 1) -> Relay:
        return Relay(self.log, self.bus, self.checkpoints, Leader(term))

    async def append(self, count: int = 1) -> None:
        await self.log.append([write(f"team-{next(self.numbers)}", TeamCreated(name="a team")) for _ in range(count)])

    async def messages(self) -> list[CloudEvent]:
        """All that EVENTS holds, as it is stored."""
        state = await self.bus.stream_state("EVENTS")
        found: list[Message] = []
        async with asyncio.timeout(10), self.bus.tail("EVENTS", "events.>") as batches:
            while len(found) < (state.messages if state else 0):
                found += await anext(batches)
        return [decode_cloud_event(message.data) for message in found]

    async def positions(self) -> list[int]:
        return [event.position for event in await self.messages()]

    async def is_filled(self) -> bool:
        try:
            return set(await self.positions()) == set(range(1, await self.log.head() + 1))
        except BusUnavailable:
            return False


@asynccontextmanager
async def running(*relays: Relay) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(relay.run()) for relay in relays]
    try:
        yield
        for task in tasks:
            if task.done():
                await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def memory() -> Outbox:
    bus = MemoryBus()
    await bus.ensure([EVENTS], [])
    return Outbox(bus)


@pytest.fixture
async def outbox(fresh_nats: NatsServer) -> AsyncIterator[Outbox]:
    async with connect_jetstream(fresh_nats.url, fresh_nats.seed, "relay") as bus:
        await bus.ensure([EVENTS], [])
        yield Outbox(bus)


async def test_every_event_is_published_once_in_order_with_its_place(outbox: Outbox) -> None:
    await outbox.append(1200)
    async with running(outbox.relay()):
        await eventually(outbox.is_filled)
        await outbox.append(3)
        await eventually(outbox.is_filled)
    messages = await outbox.messages()
    assert [m.position for m in messages] == list(range(1, 1204))
    [last] = (await outbox.log.read_streams(["team-1203"]))["team-1203"]
    assert messages[-1].recorded() == last
    assert messages[-1].epoch == await outbox.log.epoch()
    stored = await outbox.bus.last("EVENTS", "events.>")
    assert stored is not None
    assert stored.subject == "events.team.main.1203.TeamCreated"


async def test_it_reads_the_log_only_when_it_has_grown(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.runtime.relay.LOOK_EVERY", 0.001)
    read, reads = memory.log.read, itertools.count()

    async def counted(*arguments: object) -> object:
        next(reads)
        return await read(*arguments)  # type: ignore[arg-type]

    class Watched(Leader):
        looks = 0

        @property
        def term(self) -> int:
            self.looks += 1
            return 1

        @term.setter
        def term(self, _: int) -> None: ...

    leader = Watched()
    monkeypatch.setattr(memory.log, "read", counted)
    async with running(Relay(memory.log, memory.bus, memory.checkpoints, leader, clock=lambda: 0.0)):
        await memory.append(3)
        await eventually(memory.is_filled)
        before, looks = next(reads), leader.looks
        await eventually(lambda: leader.looks > looks + 100)
        assert next(reads) == before + 1
        await memory.append()
        await eventually(memory.is_filled)


async def test_a_successor_goes_on_where_the_last_leader_was(memory: Outbox) -> None:
    await memory.append(50)
    async with running(memory.relay(term=1)):
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 50)
    await memory.append(5)
    successor = memory.relay(term=2)
    published: list[str] = []
    publish = memory.bus.publish
    memory.bus.publish = lambda subject, data, msg_id="": (published.append(msg_id), publish(subject, data, msg_id))[1]  # type: ignore[method-assign]
    async with running(successor):
        await eventually(memory.is_filled)
    assert len(published) == 5


async def test_two_relays_at_once_are_harmless(outbox: Outbox) -> None:
    """Nothing is doubled inside the dedup window, and nothing is left out."""
    async with running(outbox.relay(), outbox.relay()):
        for _ in range(20):
            await outbox.append(25)
        await eventually(outbox.is_filled)
        positions = await outbox.positions()
    assert positions.count(500) <= 2
    assert set(positions) == set(range(1, 501))


async def test_a_deposed_leader_stops_at_its_next_checkpoint(memory: Outbox) -> None:
    old = memory.relay(term=1)
    async with running(old):
        await memory.append(1)
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 1)
        row = memory.checkpoints.row
        assert row is not None
        memory.checkpoints.row = RelayCheckpoint(stream_created=row.stream_created, sequence=1, position=1, term=2)
        await memory.append(1)
        await eventually(lambda: old.position == 2)
        await asyncio.sleep(0.3)
        assert memory.checkpoints.row.term == 2
        assert old.problem is None


async def test_an_emptied_jetstream_folder_is_refilled(outbox: Outbox, fresh_nats: NatsServer) -> None:
    """FAULTS 59"""
    await outbox.append(300)
    async with running(outbox.relay()):
        await eventually(outbox.is_filled)
        fresh_nats.kill()
        fresh_nats.wipe()
        await asyncio.to_thread(fresh_nats.start)
        await outbox.bus.wait_connected()
        await outbox.append(1)
        await eventually(outbox.is_filled)
        assert await outbox.positions() == list(range(1, 302))


async def test_a_deleted_stream_is_made_again_and_refilled(outbox: Outbox) -> None:
    """FAULTS 59: noticed at the next event, and without one within seconds."""
    await outbox.append(300)
    async with running(outbox.relay()):
        await eventually(outbox.is_filled)
        await outbox.bus._connection.ask("$JS.API.STREAM.DELETE.EVENTS", b"", lambda headers, data: data)  # type: ignore[attr-defined]
        await outbox.append(1)
        await eventually(outbox.is_filled)


async def test_a_stream_that_lost_its_end_is_refilled_from_there(outbox: Outbox, fresh_nats: NatsServer) -> None:
    """FAULTS 58: acknowledged, not fsynced, and the power went."""
    stored = fresh_nats.store / "jetstream" / "CORE" / "streams" / "EVENTS" / "msgs"
    kept = fresh_nats.folder / "kept"
    async with running(outbox.relay()):
        await outbox.append(100)
        await eventually(outbox.is_filled)
        await asyncio.to_thread(fresh_nats.stop)
        shutil.copytree(stored, kept)
        await asyncio.to_thread(fresh_nats.start)
        await outbox.append(100)
        await eventually(outbox.is_filled)
        await eventually(lambda: outbox.checkpoints.row is not None and outbox.checkpoints.row.position == 200)
        await asyncio.to_thread(fresh_nats.stop)
        shutil.rmtree(stored)
        shutil.move(kept, stored)
        await asyncio.to_thread(fresh_nats.start)
        await eventually(outbox.is_filled)
        assert await outbox.positions() == list(range(1, 201))


async def test_everything_arrives_while_the_server_is_killed_again_and_again(outbox: Outbox, fresh_nats: NatsServer) -> None:
    """FAULTS 57"""
    async with running(outbox.relay()):
        for _ in range(10):
            await outbox.append(50)
            await asyncio.to_thread(fresh_nats.restart)
        await outbox.append(1)
        await eventually(outbox.is_filled, timeout=20)
        positions = await outbox.positions()
    assert sorted(set(positions)) == list(range(1, 502))


async def test_after_a_raised_epoch_all_is_published_anew(outbox: Outbox) -> None:
    """FAULTS 73"""
    async with running(outbox.relay(term=1)):
        await outbox.append(20)
        await eventually(outbox.is_filled)
    outbox.log.raise_epoch()
    async with running(outbox.relay(term=2)):

        async def is_refilled() -> bool:
            epochs = [(m.position, m.epoch) for m in await outbox.messages()]
            return epochs == [(n, 1) for n in range(1, 21)] + [(n, 2) for n in range(1, 21)]

        await eventually(is_refilled)
    async with running(outbox.relay(term=3)):
        await outbox.append(1)
        await eventually(lambda: outbox.checkpoints.row is not None and outbox.checkpoints.row.position == 21)
    assert len(await outbox.messages()) == 41


async def test_events_that_have_aged_out_are_not_published_again(memory: Outbox) -> None:
    async with running(memory.relay(term=1)):
        await memory.append(20)
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 20)
    await memory.bus.purge("EVENTS", "events.>")
    async with running(memory.relay(term=2)):
        await memory.append(1)
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 21)
    assert await memory.positions() == [21]


async def test_it_refills_no_further_back_than_anybody_needs(memory: Outbox) -> None:
    async def floor() -> int:
        return 15

    await memory.append(20)
    async with running(Relay(memory.log, memory.bus, memory.checkpoints, Leader(), floor=floor)):
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 20)
    assert await memory.positions() == [16, 17, 18, 19, 20]


async def test_an_outage_of_either_side_is_said_and_ends_by_itself(memory: Outbox) -> None:
    bus, log, relay = memory.bus, memory.log, memory.relay()
    assert isinstance(bus, MemoryBus)
    async with running(relay):
        await memory.append(1)
        await eventually(memory.is_filled)
        bus.connected = False
        await memory.append(1)
        await eventually(lambda: relay.problem is not None)
        bus.connected = True
        await eventually(lambda: relay.problem is None)
        log.available = False
        await eventually(lambda: relay.problem is not None, timeout=8)
        log.available = True
        await eventually(lambda: relay.problem is None)
        await eventually(memory.is_filled)


async def test_a_bus_that_loses_things_at_random_is_always_filled_in_the_end(memory: Outbox) -> None:
    """FAULTS 57-59, from a seed."""
    chance = random.Random(7)
    bus = memory.bus
    assert isinstance(bus, MemoryBus)

    async def lose() -> None:
        bus.lose("EVENTS")

    async def fall_out() -> None:
        bus.connected = False
        await asyncio.sleep(0)
        bus.connected = True

    async def append() -> None:
        await memory.append(chance.randint(1, 30))

    acts: list[Callable[[], object]] = [append, append, append, lose, fall_out]
    async with running(memory.relay()):
        for _ in range(200):
            await chance.choice(acts)()  # type: ignore[misc]
            for _ in range(chance.randint(0, 5)):
                await asyncio.sleep(0)
        await memory.append(1)
        bus.connected = False
        await asyncio.sleep(0)
        bus.connected = True
        await eventually(memory.is_filled)


async def test_whatever_the_log_takes_the_bus_carries(outbox: Outbox) -> None:
    """FAULTS 65: the largest event there can be, under the longest names, in the characters that JSON writes longest."""
    new = NewEvent("e" * MAX_NAME, "team." + "c" * (MAX_NAME - 5), b'"' + b"x" * (MAX_EVENT - 2) + b'"')
    largest = structs.replace(
        write("team-" + "\\" * (MAX_NAME - 5), new),
        team="\\" * MAX_NAME,
        correlation_id="\1" * MAX_NAME,
        causation_id="\1" * MAX_NAME,
        actor="\1" * MAX_NAME,
    )
    await outbox.log.append([largest])
    relay = outbox.relay()
    async with running(relay):
        await outbox.append()
        await eventually(outbox.is_filled)
        assert relay.unpublished is None


class Untaken:
    """Each way in which an event may be in the log that the bus does not take: `put` has it there, `mend` makes the bus take it."""

    def __init__(self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outbox = outbox
        monkeypatch.setattr("libs.eventlog.memory.check_writes", lambda _: None)
        monkeypatch.setattr("libs.runtime.relay.EXAMINE_EVERY", 0.05)

    async def put(self) -> None:
        await self.outbox.log.append([write("team-bad", TeamCreated(name="x" * 4096))])

    async def mend(self) -> None:
        raise NotImplementedError

    def replace(self, *rows: object) -> None:
        records = self.outbox.log._records.events
        at = next(at for at, recorded in enumerate(records) if recorded.stream.startswith("team-bad"))
        records[at : at + 1] = rows


class TooLargeForTheServer(Untaken):
    """By what the server says of itself, as after a change of its configuration."""

    async def put(self) -> None:
        self.outbox.bus._connection._wire._max_payload = 2048  # type: ignore[attr-defined]
        await super().put()

    async def mend(self) -> None:
        self.outbox.bus._connection._wire._max_payload = 1 << 20  # type: ignore[attr-defined]


class TooLargeForTheStream(Untaken):
    async def put(self) -> None:
        bus = self.outbox.bus
        config = b'{"name":"EVENTS","subjects":["events.>"],"storage":"file","discard":"old","max_msg_size":2048,"duplicate_window":120000000000}'
        answer = await bus._connection.ask("$JS.API.STREAM.UPDATE.EVENTS", config, lambda _, data: data)  # type: ignore[attr-defined]
        assert b'"max_msg_size":2048' in answer
        await super().put()

    async def mend(self) -> None:
        await self.outbox.bus.ensure([EVENTS], [])


class NoSubject(Untaken):
    async def put(self) -> None:
        await self.outbox.log.append([write("team-bad one", TeamCreated(name="a team"))])

    async def mend(self) -> None:
        """Somebody has mended the event itself."""
        bad = (await self.outbox.log.read_streams(["team-bad one"]))["team-bad one"][0]
        self.replace(structs.replace(bad, stream="team-good", event_id="mended"))


class HangsUp(NoSubject):
    """The server ends the connection of whoever sends it a line so long."""

    async def put(self) -> None:
        await self.outbox.log.append([write("team-bad one" + "x" * 8192, TeamCreated(name="a team"))])

    async def mend(self) -> None:
        self.replace(structs.replace(self.outbox.log._records.events[1], stream="team-good", event_id="mended"))


@pytest.mark.parametrize("kind", [TooLargeForTheServer, TooLargeForTheStream, NoSubject, HangsUp])
async def test_an_event_that_the_bus_does_not_take_stops_no_other_and_is_never_forgotten(
    outbox: Outbox, kind: type[Untaken], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out and named, by a successor too, and published as soon as it can be."""
    untaken = kind(outbox, monkeypatch)
    relay, registry = outbox.relay(term=1), CollectorRegistry()
    relay.measure(registry)
    async with running(relay):
        await outbox.append()
        await eventually(outbox.is_filled)
        await untaken.put()
        await outbox.append(3)
        await eventually(lambda: relay.position == 5)
        assert await outbox.positions() == [1, 3, 4, 5]
        assert relay.problem is None
        assert "event 2 is not on the bus (team.created on team-bad" in str(relay.unpublished)
        assert registry.get_sample_value("penstock_relay_left_out") == 1
        await eventually(lambda: outbox.checkpoints.row is not None and outbox.checkpoints.row.left_out == ((2, 0),))
    successor = outbox.relay(term=2)
    async with running(successor):
        await outbox.append()
        await eventually(lambda: successor.position == 6)
        assert "event 2 is not on the bus" in str(successor.unpublished)
        await untaken.mend()
        await eventually(lambda: successor.unpublished is None)
        assert await outbox.positions() == [1, 3, 4, 5, 6, 2]
        await eventually(lambda: outbox.checkpoints.row is not None and outbox.checkpoints.row.left_out == ((2, 6),))
        await outbox.bus.purge("EVENTS", "events.>")  # as if all had aged
        await eventually(lambda: outbox.checkpoints.row is not None and outbox.checkpoints.row.left_out == ())
    assert outbox.bus.connections == 1


async def test_what_was_left_out_and_is_gone_from_the_log_is_let_go_of(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    untaken, relay = NoSubject(outbox, monkeypatch), outbox.relay()
    async with running(relay):
        await untaken.put()
        await eventually(lambda: relay.unpublished is not None)
        untaken.replace()
        await eventually(lambda: relay.unpublished is None)


async def test_a_stream_that_is_filled_again_is_offered_what_was_left_out_in_its_turn(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    untaken, relay = NoSubject(memory, monkeypatch), memory.relay()
    monkeypatch.setattr("libs.runtime.relay.EXAMINE_EVERY", 30.0)
    async with running(relay):
        await memory.append()
        await untaken.put()
        await memory.append()
        await eventually(lambda: relay.position == 3 and relay.unpublished is not None)
        await untaken.mend()
        assert isinstance(memory.bus, MemoryBus)
        memory.bus.lose("EVENTS")
        memory.bus.connected = False
        memory.bus.connected = True
        await eventually(memory.is_filled)
        assert await memory.positions() == [1, 2, 3]
        assert relay.unpublished is None


def lose_end(outbox: Outbox, count: int) -> None:
    """The last messages were not synced when the power went."""
    bus = outbox.bus
    assert isinstance(bus, MemoryBus)
    stream = bus._streams["EVENTS"]
    for _ in range(count):
        stream.remove(stream.sequence)
        stream.sequence -= 1
    stream.sequence_of_id = {msg_id: sequence for msg_id, sequence in stream.sequence_of_id.items() if sequence <= stream.sequence}


def reconnect(outbox: Outbox) -> None:
    bus = outbox.bus
    assert isinstance(bus, MemoryBus)
    bus.connected = False
    bus.connected = True


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_was_taken_late_is_offered_again_when_the_stream_has_lost_it(
    memory: Outbox, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """What the stream ends with by then says nothing of it."""
    untaken = NoSubject(memory, monkeypatch)
    relay, row = memory.relay(term=1), memory.checkpoints

    async def is_taken_late() -> bool:
        return await memory.positions() == [1, 3, 2]

    async with AsyncExitStack() as stack:
        async with running(relay):
            await memory.append()
            await untaken.put()
            await memory.append()
            await eventually(lambda: relay.position == 3 and relay.unpublished is not None)
            await untaken.mend()
            await eventually(is_taken_late)
            await eventually(lambda: row.row is not None and row.row.left_out == ((2, 3),))
            if not restarted:
                lose_end(memory, 1)
                reconnect(memory)
                await eventually(is_taken_late)
        if restarted:
            lose_end(memory, 1)
            await stack.enter_async_context(running(memory.relay(term=2)))
            await eventually(is_taken_late)


async def test_what_a_stream_has_lost_is_found_before_anything_is_offered_to_it_again(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its sequences are given out anew, and the whole log is published rather than the end."""
    untaken, now = NoSubject(memory, monkeypatch), [0.0]
    monkeypatch.setattr("libs.runtime.relay.EXAMINE_EVERY", 30.0)
    relay = Relay(memory.log, memory.bus, memory.checkpoints, Leader(), clock=lambda: now[0])
    async with running(relay):
        await memory.append()
        await untaken.put()
        await memory.append(3)
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 5)
        await untaken.mend()
        lose_end(memory, 2)
        reconnect(memory)
        now[0] += 60.0
        await memory.append()
        await eventually(memory.is_filled)
        assert sorted(await memory.positions()) == [1, 2, 3, 4, 5, 6]


async def test_what_nobody_needs_stays_left_out_whatever_the_stream_forgets(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    async def floor() -> int:
        return 2

    untaken = NoSubject(memory, monkeypatch)
    monkeypatch.setattr("libs.runtime.relay.EXAMINE_EVERY", 30.0)
    await untaken.put()
    await memory.append()
    relay = Relay(memory.log, memory.bus, memory.checkpoints, Leader(), clock=lambda: 0.0)
    async with running(relay):
        await eventually(lambda: relay.position == 2)
        relay._floor = floor
        await memory.append(2)
        await eventually(lambda: relay.position == 4)
        lose_end(memory, 1)
        await memory.append()  # and its sequence is given out again
        await eventually(lambda: relay.position == 5)
        assert await memory.positions() == [2, 3, 5, 3, 4, 5]
        assert relay.left_out.positions == (1,)


async def test_that_a_stream_has_forgotten_is_not_forgotten_itself_while_the_log_is_away(memory: Outbox) -> None:
    """By then the stream may have grown past what it had."""
    save, failed = memory.checkpoints.save, asyncio.Event()

    async def fails_once(checkpoint: RelayCheckpoint) -> bool:
        if not checkpoint.stream_created and not failed.is_set():
            failed.set()
            raise LogUnavailable("it is away")
        return await save(checkpoint)

    memory.checkpoints.save = fails_once  # type: ignore[method-assign]
    async with running(Relay(memory.log, memory.bus, memory.checkpoints, Leader(), clock=lambda: 0.0)):
        await memory.append(4)
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 4)
        lose_end(memory, 2)
        await memory.append(3)
        await eventually(failed.is_set)
        await eventually(memory.is_filled)


async def test_who_is_stopped_before_it_knows_how_far_the_last_leader_was_saves_nothing(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    untaken = NoSubject(memory, monkeypatch)
    leader, relay = Leader(), memory.relay()
    relay._leadership = leader
    loading, load = asyncio.Event(), memory.checkpoints.load

    async def slow() -> RelayCheckpoint | None:
        loading.set()
        return await asyncio.Future()

    async with running(relay):
        await untaken.put()
        await memory.append(2)
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 3)
        leader.term = None
        await memory.append()  # it looks up
        other = RelayCheckpoint(stream_created="made", sequence=500, position=500, term=2, left_out=((50, 0),))
        memory.checkpoints.row = other
        memory.checkpoints.load = slow  # type: ignore[method-assign]
        leader.term = 3
        await asyncio.wait_for(loading.wait(), 5)
    assert await load() == other


async def test_who_is_stopped_while_it_goes_back_does_not_say_that_the_new_stream_is_full(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.runtime.relay.EXAMINE_EVERY", 30.0)
    asked, head = asyncio.Event(), memory.log.head

    async def slow() -> int:
        asked.set()
        return await asyncio.Future()

    relay = Relay(memory.log, memory.bus, memory.checkpoints, Leader(), clock=lambda: 0.0)
    async with running(relay):
        await memory.append()
        await eventually(lambda: memory.checkpoints.row is not None and memory.checkpoints.row.position == 1)
        await memory.append(2)
        await eventually(lambda: relay.position == 3)
        assert isinstance(memory.bus, MemoryBus)
        memory.bus.lose("EVENTS")
        reconnect(memory)
        monkeypatch.setattr(memory.log, "head", slow)
        await asyncio.wait_for(asked.wait(), 5)
    monkeypatch.setattr(memory.log, "head", head)
    async with running(memory.relay(term=2)):
        await eventually(memory.is_filled)


async def test_a_server_that_is_started_again_with_a_higher_limit_is_given_what_was_too_large(
    fresh_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.runtime.relay.EXAMINE_EVERY", 0.05)
    with monkeypatch.context() as low:
        low.setattr("libs.bus.accounts.MAX_PAYLOAD", 2048)
        await asyncio.to_thread(fresh_nats.restart)
    async with connect_jetstream(fresh_nats.url, fresh_nats.seed, "relay") as bus:
        await bus.ensure([EVENTS], [])
        outbox = Outbox(bus)
        relay = outbox.relay()
        async with running(relay):
            await outbox.log.append([write("team-large", TeamCreated(name="x" * 4096))])
            await outbox.append()
            await eventually(lambda: relay.position == 2)
            assert await outbox.positions() == [2]
            await asyncio.to_thread(fresh_nats.restart)
            await eventually(outbox.is_filled)
            assert relay.unpublished is None


async def test_a_bus_that_takes_nothing_is_not_left_out_but_waited_for(memory: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    untaken, relay = NoSubject(memory, monkeypatch), memory.relay()
    async with running(relay):
        for _ in range(MOST):
            await untaken.put()
        await memory.append()
        await eventually(lambda: relay.position == MOST + 1)
        assert relay.problem is None
        await untaken.put()
        await memory.append()
        await eventually(lambda: relay.problem is not None and f"takes none of {MOST + 1} events" in relay.problem)
        await untaken.mend()  # there is room for another
        await eventually(lambda: relay.problem is None and relay.position == MOST + 3)
        assert sorted(await memory.positions()) == [1, MOST + 1, MOST + 3]


async def test_it_works_on_the_real_log_with_a_real_office(database: Database, fresh_nats: NatsServer) -> None:
    async with AsyncExitStack() as stack:
        log = await stack.enter_async_context(open_postgres_log(database.url("builds")))
        gateway = await stack.enter_async_context(open_postgres_log(database.url("gateway")))
        bus = await stack.enter_async_context(connect_jetstream(fresh_nats.url, SEEDS["builds"], "relay"))
        await bus.ensure([EVENTS], [])
        office = Leadership(log.pool, "relay", "me")
        relay = Relay(log, bus, RelayCheckpoints(log.pool), office)
        campaign = asyncio.create_task(office.run())
        stack.callback(campaign.cancel)
        async with running(relay):
            for first in range(0, 500, 100):
                await gateway.append([write(f"team-{n}", TeamCreated(name="a team")) for n in range(first, first + 100)])

            async def is_filled() -> bool:
                state = await bus.stream_state("EVENTS")
                return state is not None and state.messages == 500

            await eventually(is_filled)
            await eventually(lambda: relay.position == 500)
            assert relay.problem is None
